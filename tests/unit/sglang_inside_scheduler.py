"""The second half of sglang_inside.py: what requests bring along, and the hooks of a scheduler's process."""

from __future__ import annotations

import contextlib
import inspect
import os
from types import SimpleNamespace
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry
from sglang_inside import MODEL, resolved, the_off_line

# ---- what requests bring along ---------------------------------------------------------------------------------------


def images_named_by_the_user_stay_in_the_engine() -> None:
    from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    from kvplug.adapters.sglang import flags, plugin

    assert hasattr(TokenizerManager._tokenize_one_request, "__wrapped__")  # since kvplug's settings were made
    manager = SimpleNamespace(server_args=resolved("--enable-kvplug"))
    private = flags.PRIVATE
    for given, own, becomes in (
        ({"mm_hashes": ["ab"]}, None, private),
        ({"mm_hashes": ["ab"]}, "mine", private + "mine"),
        ({"image_data": [{"format": "processor_output", "hash": 7}]}, None, private),
        ({"image_data": [["a.png", {"pad_value": 7}]]}, None, private),
        ({"image_data": ["a.png"]}, "mine", "mine"),
        ({"image_data": [{"format": "processor_output", "feature": 7}]}, None, None),
        ({}, None, None),
    ):
        request = GenerateReqInput(text="x", extra_key=own, **given)
        plugin.before_tokenize(manager, request)
        assert request.extra_key == becomes, (given, request.extra_key)
    plugin.before_tokenize(manager, EmbeddingReqInput(text="x", image_data=[{"hash": 7}]))  # it has no extra key
    manager.server_args = resolved("--enable-kvplug", "--kvplug-config", '{"trust_mm_ids": true}')
    request = GenerateReqInput(text="x", mm_hashes=["ab"])
    plugin.before_tokenize(manager, request)
    assert request.extra_key is None
    manager.server_args = resolved()
    plugin.before_tokenize(manager, request)
    assert request.extra_key is None


# ---- in a scheduler's process ----------------------------------------------------------------------------------------


class Engine:
    """Stands where a rank's engine is, and notes what it is told."""

    secret = b"s" * 32
    keeps_sessions = False
    private_name = "kvplug-private-word|"

    def __init__(self) -> None:
        self.told: list[Any] = []

    def ranks_agree(self, topic: str, mine: bytes) -> bool:
        return True

    def say(self, line: str) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self.told.append((name, *args, *kwargs.values()))


def hooks_fit_and_are_applied() -> None:
    import sglang.srt.managers.scheduler  # noqa: F401 - what a scheduler's process was started from

    from kvplug.adapters.sglang import compat, engine, plugin

    for targets in (compat.FRONT_TARGETS, compat.TOKENIZER_TARGETS, compat.scheduler_targets(), compat.CALLED):
        assert compat.problems(targets) == []
    os.environ["KVPLUG_ENABLE"] = "1"
    plugin.register()
    HookRegistry.apply_hooks()
    for target in compat.scheduler_targets():
        assert target in HookRegistry._patched, target
        assert hasattr(compat._resolve(target), "__wrapped__"), target
    engine._engines[:] = [Engine()]  # type: ignore[list-item]


def told() -> list[Any]:
    from kvplug.adapters.sglang import engine

    out = list(engine._engines[0].told)  # type: ignore[attr-defined]
    engine._engines[0].told.clear()  # type: ignore[attr-defined]
    return out


def weight_changes_are_told() -> None:
    from sglang.srt.managers.io_struct import CheckWeightsReqInput, ResumeMemoryOccupationReqInput
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager as Updater

    from kvplug.adapters.sglang import compat

    updater = object.__new__(Updater)  # has nothing to do any of it with: the hook comes first

    def call(name: str, request: Any = None) -> list[Any]:
        with contextlib.suppress(Exception):
            getattr(updater, name)(request)
        return told()

    for target in compat.WEIGHT_CHANGES:
        name = target.rpartition(".")[2]
        if name not in ("check_weights", "resume_memory_occupation"):
            assert call(name) == [("weights_changed", name)]
    assert call("resume_memory_occupation", ResumeMemoryOccupationReqInput(tags=["kv_cache"])) == []
    assert call("resume_memory_occupation", ResumeMemoryOccupationReqInput(tags=["weights"])) != []
    assert call("resume_memory_occupation", ResumeMemoryOccupationReqInput()) != []
    assert call("check_weights", CheckWeightsReqInput(action="checksum")) == []
    assert call("check_weights", CheckWeightsReqInput(action="reset_tensors")) == [("weights_changed", "check_weights")]
    if hasattr(Updater, "begin_weight_update"):
        assert call("begin_weight_update") == [("update_began",)]
        updater._session = None
        assert call("end_weight_update") == [("update_ended", False)]
        updater._session = SimpleNamespace(loaded_weights=True, selector="all")
        assert call("end_weight_update") == [("update_ended", True)]
    busy = SimpleNamespace(
        is_fully_idle=lambda **_: False, waiting_queue=[], running_batch=SimpleNamespace(reqs=[]), _engine_paused=False
    )
    assert Scheduler.flush_cache(busy) is False
    assert told() == []


def an_update_from_files_is_told_before_and_after() -> None:
    """With the folder if all weights are read from it, and with whether SGLang says that they were."""
    from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput as Request
    from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqOutput as Answer
    from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager as Updater

    from kvplug.adapters.sglang import compat, plugin

    with contextlib.suppress(Exception):  # it has nothing to do it with, and ends in an error
        object.__new__(Updater).update_weights_from_disk(Request(model_path=MODEL, load_format="auto"))
    assert told() == [("reload_began", "update_weights_from_disk", MODEL), ("reload_ended", False)]
    for request, folder in (
        (Request(model_path="/x", load_format="safetensors"), "/x"),
        (Request(model_path="/x", load_format="dummy"), None),
        (Request(model_path="/x", load_format=None), None),
        (Request(model_path="/x", load_format="auto", manifest={}), None),
        (None, None),
    ):
        assert compat.reloaded_folder(request) == folder
    unflushed = "Weights were updated, but the cache was not flushed because requests are still running or queued."
    for success, message, whole in ((True, "", True), (False, "Failed to update", False), (False, unflushed, True)):
        given = Answer(success=success, message=message)
        assert plugin.around_disk_update(lambda *_, answer=given: answer, None, None) is given
        assert told() == [("reload_began", "update_weights_from_disk", None), ("reload_ended", whole)]
    from sglang.srt.managers.scheduler_components import weight_updater

    code = inspect.getsource(weight_updater)
    assert compat._NOT_FLUSHED in code or "assert flush_cache_success" in code, (
        "else such an answer means something else"
    )


def a_flush_that_came_through_is_told() -> None:
    from sglang.srt.managers.scheduler import Scheduler

    class Anything:
        is_fully_idle = staticmethod(lambda **_: True)
        draft_worker = None
        _engine_paused = False

        def __getattr__(self, name: str) -> Any:
            return Anything()

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return None

    idle = Anything()
    assert Scheduler.flush_cache(idle, empty_cache=False) is True
    assert told() == [("flushed",)]


def adapters_are_named_by_content_wherever_pages_are_named() -> None:
    from sglang.srt.disaggregation import decode_kvcache_offload_manager as offload
    from sglang.srt.lora.lora_manager import LoRAManager
    from sglang.srt.lora.lora_registry import LoRARef
    from sglang.srt.mem_cache import utils

    from kvplug.adapters.sglang import lora

    ref = LoRARef(lora_name="a", lora_path=MODEL)
    with contextlib.suppress(Exception):
        LoRAManager._load_lora_adapter(object.__new__(LoRAManager), ref)
    assert lora.is_known("user" + ref.lora_id)
    with contextlib.suppress(Exception):
        LoRAManager._load_lora_adapter_from_tensors(object.__new__(LoRAManager), ref, {}, {})
    assert lora._loaded[ref.lora_id].read is None
    plain = utils.storage_namespace_seed.__wrapped__
    named = utils.storage_namespace_seed("user" + ref.lora_id, "salt")
    assert named != plain("user" + ref.lora_id, "salt")
    assert len(bytes.fromhex(named)) == 32
    assert offload.storage_namespace_seed is utils.storage_namespace_seed
    key = SimpleNamespace(extra_key="user" + ref.lora_id, cache_salt="salt")
    seen: list[Any] = []
    real, utils.get_hash_str = utils.get_hash_str, lambda key, prior, page_size=None: seen.append(prior) or "h"
    utils.get_storage_hash_str(key, None, 4)
    utils.get_hash_str = real
    assert seen == [named], seen
    assert utils.storage_namespace_seed(None, None) is None
    assert utils.storage_namespace_seed("user", None) == plain("user", None)


def requests_say_what_their_pages_depend_on() -> None:
    import torch
    from sglang.srt.managers.embed_types import PositionalEmbeds
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    from kvplug.adapters.sglang import engine, lora

    def key(**more: Any) -> Any:
        tokens = [1, 2, 3, 4]
        given = {"sampling_params": SamplingParams(max_new_tokens=1), "vocab_size": 100, **more}
        try:
            return Req("r", "", tokens, **given).extra_key
        except TypeError:
            from array import array

            return Req("r", "", array("q", tokens), **given).extra_key

    def overrides(value: float, at: int = 1) -> PositionalEmbeds:
        return PositionalEmbeds(embeds=torch.full((1, 8), value, dtype=torch.bfloat16), positions=[at])

    assert key() is None
    assert key(extra_key="e") == "e"
    assert key(extra_key="e", lora_id="l") == "el"
    one = key(positional_embed_overrides=overrides(1.0))
    assert one.startswith("kvplug-")
    assert one == key(positional_embed_overrides=overrides(1.0))
    assert (
        len({one, key(positional_embed_overrides=overrides(2.0)), key(positional_embed_overrides=overrides(1.0, 2))})
        == 3
    )
    assert key(positional_embed_overrides=overrides(1.0), extra_key="e", lora_id="l") == one + "el"
    assert key(multi_item_delimiter_indices=[1]) != key(multi_item_delimiter_indices=[2])
    known = "f" * 32
    lora.note_load(known, None)
    assert key(extra_key="e", lora_id=known) == "e" + known
    assert not lora.is_known(key(extra_key="e" + known))  # nobody passes off plain pages as an adapter's
    here = engine._engines[0]
    assert key(session=SimpleNamespace()) is None
    here.keeps_sessions = True
    assert key(session=SimpleNamespace()) == "kvplug-private-word|"
    here.keeps_sessions = False
    assert key(extra_key="kvplug-private|e") == "kvplug-private-word|e"
    # Nobody has pages that were made from embeddings by an extra key, and whatever is given, two stay two.
    given = [one, "|" + one, "||" + one, one[:-1], "e" + known, "e" + known + "|", "e" + known + "||", "e", "|e"]
    becomes = [key(extra_key=each) for each in given]
    assert one not in becomes
    assert len(set(becomes)) == len(given)
    assert told() == []


def the_tree_is_pythons_where_adapters_are_used() -> None:
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams

    from kvplug.adapters.sglang import compat

    if (
        not hasattr(CacheInitParams, "tree_core_backend")
        and "tree_core_backend" not in CacheInitParams.__dataclass_fields__
    ):
        return
    for given, becomes in (
        ((), None),
        (("--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", "q_proj"), "python"),
    ):
        record = resolved(*given)
        ctx = SimpleNamespace(server_args=record, params=SimpleNamespace(tree_core_backend=None))
        compat.take_python_tree(ctx)
        assert ctx.params.tree_core_backend == becomes, given


def an_engine_that_never_came_up_is_reported() -> None:
    from kvplug.adapters.sglang import engine, plugin

    here, engine._engines[:] = list(engine._engines), []
    ctx = SimpleNamespace(server_args=resolved("--enable-kvplug"), disable_radix_cache=False)
    plugin.after_tree_cache(None, ctx)
    assert "SGLang was told to load kvplug and did not" in the_off_line()
    engine._engines[:] = here
    plugin.after_tree_cache(None, ctx)
    assert told() == []
    ctx.disable_radix_cache = True
    plugin.after_tree_cache(None, ctx)
    assert told() == [("off", "SGLang keeps no prefix cache with this model or these settings")]


CHECKS = [
    images_named_by_the_user_stay_in_the_engine,
    hooks_fit_and_are_applied,
    weight_changes_are_told,
    an_update_from_files_is_told_before_and_after,
    a_flush_that_came_through_is_told,
    adapters_are_named_by_content_wherever_pages_are_named,
    requests_say_what_their_pages_depend_on,
    the_tree_is_pythons_where_adapters_are_used,
    an_engine_that_never_came_up_is_reported,
]
