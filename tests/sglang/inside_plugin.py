"""What tests of the plugin ask of a living scheduler."""

from __future__ import annotations

from typing import Any


def adapter_ids(scheduler: Any) -> list[str]:
    """Ids of the adapters that this process has loaded."""
    manager = scheduler.tp_worker.model_runner.lora_manager
    return sorted(manager.lora_refs)


def adapters_known(scheduler: Any) -> bool:
    """Whether the content of all adapters that this process has loaded is known."""
    from kvplug.adapters.sglang import lora

    return all(adapter.digest(None) is not None for adapter in lora._loaded.values())


def page_names(scheduler: Any) -> dict[str, Any]:
    """How this rank's pages are named: the epoch, why it is off, and one page's key in hex."""
    from kvplug.adapters.sglang import engine

    (rank,) = engine.engines()
    keys = rank.keys("kv", ["0" * 64])
    return {
        "epoch": rank.epoch,
        "off": rank.off_reason,
        "key": None if keys is None else keys.tobytes().hex(),
        "counts": dict(rank.counts),
    }


def counts_now(scheduler: Any) -> dict[str, int]:
    """kvplug's counters on this rank, those of its fetches included."""
    from kvplug.adapters.sglang import engine

    (rank,) = engine.engines()
    rank.gather_counts()
    return dict(rank.counts)


def tokens_per_s(scheduler: Any, pretend: float | None = None) -> float | None:
    """How fast this rank has found itself to compute prompts. ``pretend``: that fast, until it is asked again."""
    from kvplug.adapters.sglang import engine

    (rank,) = engine.engines()
    measured = rank.speed.tokens_per_s
    rank._measures = pretend is None
    if pretend is not None:
        rank.speed.tokens_per_s = pretend
    return measured
