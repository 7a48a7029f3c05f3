"""What tests of the plugin ask of a living scheduler."""

from __future__ import annotations

import threading
from typing import Any


def adapter_ids(scheduler: Any) -> list[str]:
    """Ids of the adapters that this process has loaded."""
    manager = scheduler.tp_worker.model_runner.lora_manager
    return sorted(manager.lora_refs)


def kind_of_cache(scheduler: Any) -> str:
    """The class of the prefix cache."""
    return type(scheduler.tree_cache).__name__


def adapters_known(scheduler: Any) -> bool:
    """Whether the content of all adapters that this process has loaded is known."""
    from kvplug.adapters.sglang import engine, lora

    return all(adapter.digest(engine.engines()[0]) is not None for adapter in lora._loaded.values())


def page_names(scheduler: Any) -> dict[str, Any]:
    """How this rank's pages are named: the epoch, why it is off, one page's key in hex, and whether the weights may
    become known with nothing more to be done."""
    from kvplug.adapters.sglang import engine

    (rank,) = engine.engines()
    keys = rank.keys("kv", ["0" * 64])
    return {
        "epoch": rank.epoch,
        "off": rank.off_reason,
        "key": None if keys is None else keys.tobytes().hex(),
        "pending": rank._weights.pending,
        "counts": dict(rank.counts),
    }


_identification_goes_on = threading.Event()
_plain_identify: Any = None


def hold_identification(scheduler: Any, fail: bool = False) -> None:
    """Weights that are read again from now on are identified after :func:`let_identification_go`; or never."""
    global _plain_identify
    from kvplug.errors import NamespaceError
    from kvplug.identity.weights import WeightFiles

    plain = _plain_identify = WeightFiles.identify
    _identification_goes_on.clear()

    def identify(*args: Any) -> Any:
        if fail:
            raise NamespaceError("told to fail")
        _identification_goes_on.wait(60)
        return plain(*args)

    WeightFiles.identify = identify


def let_identification_go(scheduler: Any) -> None:
    """Ends it."""
    from kvplug.identity.weights import WeightFiles

    WeightFiles.identify = _plain_identify
    _identification_goes_on.set()


def scale_weights(scheduler: Any, factor: float) -> None:
    """As a trainer does it that has this process's memory mapped: no call tells the engine."""
    import torch

    with torch.no_grad():
        for tensor in scheduler.tp_worker.model_runner.model.parameters():
            tensor.mul_(factor)


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


_broken: list[tuple[Any, str]] = []
_broken_calls = 0


def fail_in(scheduler: Any, mode: str, path: str, times: int = 1 << 30) -> None:
    """So often from now on this method of kvplug's object raises, by its path from there; :func:`recover` ends it."""
    cache = scheduler.tree_cache
    owner: Any = cache.linker.cache_linker if mode == "linker" else cache.cache_controller.storage_backend
    *names, method = path.split(".")
    for name in names:
        owner = getattr(owner, name)
    plain = getattr(owner, method)

    def broken(*args: Any, **kwargs: Any) -> Any:
        global _broken_calls
        _broken_calls += 1
        if _broken_calls > times:
            return plain(*args, **kwargs)
        raise ZeroDivisionError(path)

    setattr(owner, method, broken)
    _broken.append((owner, method))


def broken_calls(scheduler: Any) -> int:
    """How often that was called so far."""
    return _broken_calls


def recover(scheduler: Any) -> None:
    """Ends it."""
    global _broken_calls
    while _broken:
        delattr(*_broken.pop())
    _broken_calls = 0


def pool_in_use(scheduler: Any) -> list[int]:
    """Slots of this rank's pool that are pinned, and that are being written."""
    from kvplug.adapters.sglang import engine

    (rank,) = engine.engines()
    stats = rank.store.stats()
    return [int(stats.pinned_slots), int(stats.writing_slots)]
