"""A plugin of SGLang's that is not kvplug and hooks the functions that kvplug hooks. What it does to them is said in
``SGLANG_OTHER``, words with commas; nothing without it:

    notes     an AFTER hook on each that changes nothing and counts its calls in :data:`calls`
    applies   asks SGLang to apply hooks at once, as it loads, and does not wait for other plugins
    subclass  takes a scheduler of its own, whose ``flush_cache`` calls nobody else's
    names     a BEFORE hook that gives images names of its own
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

calls: Counter[str] = Counter()
SRT = "sglang.srt."
SCHEDULER = SRT + "managers.scheduler.Scheduler"
TOKENIZER = SRT + "managers.tokenizer_manager.TokenizerManager"
TARGETS = (
    SRT + "server_args.ServerArgs.add_cli_args",
    SRT + "server_args.ServerArgs.from_cli_args",
    SRT + "server_args.ServerArgs.resolve_once",
    SRT + "mem_cache.registry.create_tree_cache",
    SRT + "mem_cache.utils.storage_namespace_seed",
    SRT + "managers.schedule_batch.Req.__init__",
    SRT + "managers.schedule_policy.PrefillAdder.add_one_req",
    SCHEDULER + ".flush_cache",
    SCHEDULER + ".run_batch",
    SCHEDULER + ".process_batch_result",
    TOKENIZER + "._tokenize_one_request",
    TOKENIZER + "._create_tokenized_object",
)


def install() -> None:
    """Called by SGLang in each of its processes."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    does = os.environ.get("SGLANG_OTHER", "").split(",")
    if "notes" in does:
        for target in TARGETS:
            HookRegistry.register(target, _noting(target.rpartition(".")[2]), HookType.AFTER)
    if "names" in does:
        HookRegistry.register(f"{TOKENIZER}._tokenize_one_request", _names, HookType.BEFORE)
    if "subclass" in does:
        HookRegistry.register(SCHEDULER, _own_scheduler(), HookType.REPLACE)
    if "applies" in does:
        HookRegistry.apply_hooks()


def _noting(name: str) -> Any:
    def note(*args: Any, **kwargs: Any) -> None:
        calls[name] += 1

    return note


def _names(manager: Any, obj: Any, *args: Any, **kwargs: Any) -> None:
    obj.mm_hashes = ["ab"]


def _own_scheduler() -> type:
    from sglang.srt.managers.scheduler import Scheduler

    class OwnScheduler(Scheduler):
        def flush_cache(self, empty_cache: bool = True) -> bool:
            calls["own flush"] += 1
            return True

    return OwnScheduler


def replace_flush(*, calling: bool) -> None:
    """Puts another function in the place of ``Scheduler.flush_cache``; ``calling``: one that calls what was there."""
    from sglang.srt.managers.scheduler import Scheduler

    plain = Scheduler.flush_cache

    def flush_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls["flush"] += 1
        return plain(self, *args, **kwargs)

    def alone(self: Any, empty_cache: bool = True) -> bool:
        return True

    Scheduler.flush_cache = flush_cache if calling else alone
