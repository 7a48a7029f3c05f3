"""What tests/unit/test_sglang_plugin.py looks at in a process of SGLang's in which another plugin hooks the same
functions: ``python sglang_inside_beside.py MODEL``, with ``SGLANG_OTHER`` (tests/sglang_lab/other). Prints one JSON
object, as sglang_inside.py does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import traceback
from types import SimpleNamespace
from typing import Any

import sglang_inside as inside
import sglang_other
from sglang.srt.plugins import load_plugins

DOES = os.environ["SGLANG_OTHER"]


def kvplug_is_asked_for_and_on() -> None:
    """The flags are there, and what they stand for is put in, whatever else is hooked there."""
    from kvplug.adapters.sglang import compat, flags

    load_plugins()
    record = inside.resolved("--enable-kvplug")
    assert flags.extra_of(record) is not None, inside.said
    assert compat.lost_hooks((*compat.FRONT_TARGETS, *compat.TOKENIZER_TARGETS)) is None
    if "notes" in DOES:
        assert sglang_other.calls["resolve_once"] == 1, "the other plugin's hooks are called too, once"
        assert sglang_other.calls["add_cli_args"] == 1


def images_named_by_the_user_stay_in_the_engine() -> None:
    """Through SGLang's own function, as far as it gets without an engine."""
    from sglang.srt.managers.io_struct import GenerateReqInput
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    from kvplug.adapters.sglang import flags

    manager = SimpleNamespace(server_args=inside.resolved("--enable-kvplug"))

    def key_of(**given: Any) -> str | None:
        request = GenerateReqInput(text="x", **given)
        with contextlib.suppress(Exception):
            asyncio.run(TokenizerManager._tokenize_one_request(manager, request))
        if "names" in DOES:  # where it would have come to that
            with contextlib.suppress(Exception):
                TokenizerManager._create_tokenized_object(manager, request, "x", [1])
        return request.extra_key

    assert key_of(mm_hashes=["ab"]) == flags.PRIVATE
    assert key_of(mm_hashes=["ab"], extra_key="mine") == flags.PRIVATE + "mine"
    assert key_of() == (flags.PRIVATE if "names" in DOES else None)


def hooks_of_a_scheduler_are_in_place() -> None:
    import sglang.srt.managers.scheduler as module
    from sglang.srt.plugins.hook_registry import HookRegistry

    from kvplug.adapters.sglang import compat, engine, plugin

    os.environ["KVPLUG_ENABLE"] = "1"
    plugin.register()
    plugin.register()
    HookRegistry.apply_hooks()
    assert compat.lost_hooks(compat.scheduler_targets()) is None
    told: list[str] = []
    engine._engines[:] = [SimpleNamespace(flushed=lambda: told.append("flushed"))]  # type: ignore[list-item]
    if "subclass" in DOES:
        assert module.Scheduler.__name__ == "OwnScheduler"
        assert module.Scheduler.flush_cache(SimpleNamespace()) is True
        assert sglang_other.calls["own flush"] == 1
        assert told == ["flushed"], "kvplug's hook is around the function of the scheduler that runs"
    engine._engines.clear()


def what_another_has_taken_is_noticed() -> None:
    """Also by an engine that starts, before it shares anything."""
    from kvplug.adapters.sglang import compat, engine

    sglang_other.replace_flush(calling=True)
    assert compat.lost_hooks() is None, "a plain closure around what was there"
    sglang_other.replace_flush(calling=False)
    lost = compat.lost_hooks()
    assert lost is not None
    assert "Scheduler.flush_cache" in lost
    compat.remember_context(SimpleNamespace(), asked=True)
    rank = engine.RankEngine("linker", {})
    assert rank.off_reason == lost


CHECKS = [
    kvplug_is_asked_for_and_on,
    images_named_by_the_user_stay_in_the_engine,
    hooks_of_a_scheduler_are_in_place,
    what_another_has_taken_is_noticed,
]


def main() -> None:
    out = {}
    for check in CHECKS:
        try:
            check()
            out[check.__name__] = ""
        except BaseException:  # noqa: BLE001 - reported to the test
            out[check.__name__] = f"{traceback.format_exc()}\nkvplug said: {inside.said}"
    print("RESULT " + json.dumps(out))


if __name__ == "__main__":
    main()
