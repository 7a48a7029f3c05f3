"""What tests/unit/test_sglang_plugin.py looks at inside a process of SGLang's: ``python sglang_inside.py MODEL``.

Each function checks one promise, in the order in which they stand here: first a process in which kvplug is installed
and not asked for, then one that was asked, then (sglang_inside_scheduler.py) one that runs a scheduler. Prints one JSON
object: name to "" or to what went wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import pickle
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import pytest
import sglang
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry

MODEL = sys.argv[1]
NEWEST = sglang.__version__.startswith("0.5.23")
BASIC = ("--model-path", MODEL, "--device", "cpu", "--attention-backend", "torch_native")
HEAVY = ("numba", "kvplug.config", "kvplug.store", "kvplug.shm", "kvplug.adapters.sglang.engine")
said: list[str] = []


class _Ear(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        said.append(record.getMessage())


logging.getLogger("sglang.kvplug").addHandler(_Ear())
logging.getLogger("sglang.kvplug").setLevel(logging.INFO)


def parsed(*more: str) -> Any:
    """A fresh command line's settings, not worked out yet."""
    from sglang.srt.server_args import prepare_server_args

    forget()
    handlers = logging.root.handlers[:]  # SGLang sets up logging once more
    try:
        return prepare_server_args([*BASIC, *more])
    finally:
        logging.root.handlers[:] = handlers


def resolved(*more: str) -> Any:
    record = parsed(*more)
    record.resolve_once()
    return record


def forget() -> None:
    """What a process remembers of its one command line."""
    from kvplug.adapters.sglang import plugin

    said.clear()
    plugin._said.clear()
    plugin._asked = None
    os.environ.pop("KVPLUG_ENABLE", None)


def the_off_line() -> str:
    """The one line that says why kvplug is off."""
    lines = [line for line in said if line.startswith("kvplug: OFF: ")]
    assert len(lines) == 1, said
    return lines[0]


def fails(*more: str) -> str:
    """What is written to stderr by a command line that can't be meant."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), pytest.raises(SystemExit, match=r"^2$"):
        parsed(*more)
    return err.getvalue()


# ---- not asked for ---------------------------------------------------------------------------------------------------


def not_asked_for_is_light_and_changes_nothing() -> None:
    os.environ.pop("KVPLUG_ENABLE", None)
    load_plugins()
    found = [name for name in HEAVY if name in sys.modules]
    assert not found, found
    from kvplug.adapters.sglang import compat

    assert not [t for t, hooks in HookRegistry._hooks.items() if any("kvplug" in h.__module__ for _, h, _ in hooks)]
    ours = sorted(t for t, _ in compat._ours)
    assert compat.lost_hooks(tuple(ours)) is None
    assert [t.rpartition(".")[2] for t in ours] == ["add_cli_args", "from_cli_args", "resolve_once"], ours
    record = resolved()
    assert not record.enable_hierarchical_cache
    assert record.hicache_storage_backend is None
    assert not record.enable_unified_cache_external_linker
    assert not [name for name in HEAVY if name in sys.modules and name.startswith("kvplug")]
    assert "KVPLUG_ENABLE" not in os.environ
    assert not said, said


def registering_again_adds_one_set_of_flags() -> None:
    from sglang.srt.server_args import ServerArgs

    from kvplug.adapters.sglang import plugin

    plugin.register()
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    text = parser.format_help()
    for flag in ("--enable-kvplug", "--kvplug-mode", "--kvplug-config"):
        assert flag in text, flag


# ---- asked for -------------------------------------------------------------------------------------------------------


def auto_takes_the_linker_where_there_is_one() -> None:
    record = resolved("--enable-kvplug", "--kvplug-config", '{"pool": "unit-a", "size": "64mib"}')
    assert record.enable_unified_cache_external_linker is NEWEST
    assert record.enable_hierarchical_cache is not NEWEST
    assert os.environ["KVPLUG_ENABLE"] == "1"  # for the processes that this one starts
    assert said[-1] == f"kvplug: {'linker' if NEWEST else 'hicache'} mode", said
    from kvplug.adapters.sglang import flags

    extra = flags.extra_of(record)
    assert extra is not None
    assert extra["settings"] == {"pool": "unit-a", "size": "64mib"}, extra
    if NEWEST:
        config = record.unified_cache_external_linker_config
        assert config["linker_module_path"] == "kvplug.adapters.sglang.linker", config
        assert record.unified_cache_external_linker_backend == "dynamic"
    copy = pickle.loads(pickle.dumps(record))  # what a scheduler gets
    copy.resolve_once()
    assert flags.extra_of(copy) == extra


def hicache_mode_is_a_dynamic_storage_backend() -> None:
    record = resolved("--enable-kvplug", "--kvplug-mode", "hicache")
    config = json.loads(record.hicache_storage_backend_extra_config)
    assert record.enable_hierarchical_cache
    assert record.hicache_storage_backend == "dynamic"
    assert (config["class_name"], config["interface_v1"]) == ("KvplugStorage", 1), config
    assert not record.enable_unified_cache_external_linker


def auto_keeps_the_host_cache_that_was_asked_for() -> None:
    record = resolved("--enable-kvplug", "--enable-hierarchical-cache")
    assert record.hicache_storage_backend == "dynamic"
    assert not record.enable_unified_cache_external_linker


def auto_takes_the_host_cache_where_the_linker_lacks_something() -> None:
    recurrent = {
        "architectures": ["Lfm2ForCausalLM"], "model_type": "lfm2", "vocab_size": 2048, "hidden_size": 64,
        "intermediate_size": 128, "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"],
        "num_attention_heads": 4, "num_key_value_heads": 2, "conv_L_cache": 3, "dtype": "float32",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(recurrent))
        for given in (("--model-path", folder), ("--pp-size", "2")):
            record = resolved(*given, "--enable-kvplug")
            assert record.hicache_storage_backend == "dynamic", given
            assert not record.enable_unified_cache_external_linker, given
            assert said[-1] == "kvplug: hicache mode", said
        if NEWEST:
            record = resolved("--model-path", folder, "--enable-kvplug", "--kvplug-mode", "linker")
            assert record.enable_unified_cache_external_linker, "what was asked for by name is tried"


def a_config_file_says_it_too() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sglang.yaml"
        path.write_text("enable-kvplug: true\nkvplug-mode: hicache\nkvplug-config: {pool: unit-b, size: 64mib}\n")
        record = resolved("--config", str(path))
    config = json.loads(record.hicache_storage_backend_extra_config)
    assert config["kvplug"]["settings"] == {"pool": "unit-b", "size": "64mib"}, config


def settings_come_from_a_file() -> None:
    from kvplug.adapters.sglang import flags

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kvplug.json"
        path.write_text('{"pool": "unit-c"}')
        assert (
            flags.extra_of(resolved("--enable-kvplug", "--kvplug-config", f"@{path}"))["settings"]["pool"] == "unit-c"
        )
    assert "can't be read" in fails("--enable-kvplug", "--kvplug-config", f"@{path}")


def the_environment_alone_is_enough() -> None:
    from kvplug.adapters.sglang import flags

    record = parsed()
    os.environ.update(KVPLUG_ENABLE="1", KVPLUG_SGLANG_MODE="hicache")
    record.resolve_once()
    assert record.hicache_storage_backend == "dynamic"
    assert flags.extra_of(record)["settings"] == {}
    os.environ["KVPLUG_SGLANG_MODE"] = "sideways"
    said.clear()
    record = ServerArgsOf(record)
    record.resolve_once()
    assert (
        the_off_line()
        == "kvplug: OFF: KVPLUG_SGLANG_MODE=sideways is not a mode: set it to one of auto, hicache, linker"
    )
    assert record.hicache_storage_backend is None
    del os.environ["KVPLUG_SGLANG_MODE"]
    os.environ["KVPLUG_ENABLE"] = "1"
    engine = sglang.srt.server_args.ServerArgs(model_path=MODEL, device="cpu", attention_backend="torch_native")
    engine.resolve_once()  # what sglang.Engine(...) does
    assert flags.extra_of(engine) is not None


def ServerArgsOf(record: Any) -> Any:
    return type(record)(model_path=MODEL, device=record.device, attention_backend=record.attention_backend)


def flags_go_with_the_environment() -> None:
    forget()
    handlers = logging.root.handlers[:]
    from sglang.srt.server_args import prepare_server_args

    os.environ["KVPLUG_ENABLE"] = "1"
    record = prepare_server_args([*BASIC, "--kvplug-mode", "hicache", "--kvplug-config", '{"pool": "unit-d"}'])
    logging.root.handlers[:] = handlers
    record.resolve_once()
    assert json.loads(record.hicache_storage_backend_extra_config)["kvplug"]["settings"] == {"pool": "unit-d"}


def what_cant_be_meant_ends_the_command() -> None:
    assert "--kvplug-config is not JSON" in fails("--enable-kvplug", "--kvplug-config", "{pool: a}")
    assert "is a JSON list; an object" in fails("--enable-kvplug", "--kvplug-config", "[1]")
    assert "siez" in fails("--enable-kvplug", "--kvplug-config", '{"siez": "30gb"}')
    assert "write 30gb" in fails("--enable-kvplug", "--kvplug-config", '{"size": "30g"}')
    assert "--kvplug-config is given without --enable-kvplug" in fails("--kvplug-config", "{}")
    assert "--kvplug-mode is given without --enable-kvplug" in fails("--kvplug-mode", "linker")
    assert "invalid choice" in fails("--enable-kvplug", "--kvplug-mode", "sideways")


def what_is_in_the_way_is_said_and_left_alone() -> None:
    for given, words in (
        (("--disable-radix-cache",), "--disable-radix-cache leaves no prefix cache to share"),
        (("--enable-hierarchical-cache", "--hicache-storage-backend", "file"), "--hicache-storage-backend file is set"),
        (("--enable-lmcache",), "--enable-lmcache takes the place"),
        (("--enable-unified-cache-external-linker",), "--enable-unified-cache-external-linker is set already"),
        (("--disaggregation-mode", "decode"), "--disaggregation-mode decode"),
    ):
        record = parsed("--enable-kvplug", *given)
        before = repr(record)
        with contextlib.suppress(Exception):  # whatever SGLang itself thinks of these settings on this machine
            record.resolve_once()
        assert repr(record) == before, given
        assert words in the_off_line(), given
        assert "KVPLUG_ENABLE" not in os.environ
    record = resolved("--enable-kvplug", "--kvplug-mode", "linker", *(("--enable-hicache",) if NEWEST else ()))
    assert not record.enable_unified_cache_external_linker
    words = "take --kvplug-mode hicache" if NEWEST else "--kvplug-mode linker needs SGLang 0.5.23"
    assert words in the_off_line()


def a_model_without_prefix_cache_gets_none() -> None:
    """SGLang finds that out after it has looked at the settings of its host cache and of a linker."""
    config = json.loads((Path(MODEL) / "config.json").read_text())
    sizes = {name: config[name] for name in ("hidden_size", "intermediate_size", "vocab_size", "head_dim")}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    encoder = {"architectures": ["Gemma3TextModel"], "model_type": "gemma3_text", "use_bidirectional_attention": True}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({**sizes, **heads, **encoder, "dtype": "float32"}))
        for mode in ("auto", "hicache"):
            record = resolved("--model-path", folder, "--enable-kvplug", "--kvplug-mode", mode)
            assert record.resolved_dict()["disable_radix_cache"]
            for name in ("enable_hierarchical_cache", "enable_unified_cache_external_linker"):
                assert not record.resolved_dict().get(name), (mode, name)
            assert "SGLang keeps no prefix cache" in the_off_line()


def sglang_starts_without_what_it_refuses() -> None:
    """The settings come out as without kvplug, where SGLang does not take them together with kvplug's."""
    record = parsed("--enable-kvplug", "--kvplug-mode", "hicache", "--hicache-ratio", "2")
    plain = parsed("--hicache-ratio", "2")
    plain.resolve_once()
    forget()
    from kvplug.adapters.sglang import flags, plugin

    real, plugin._asked = flags.settings_for, flags.Options("hicache")
    # radix_cache_backend is refused beside a host cache by no version alike, so SGLang's own check of ratios is used.
    flags.settings_for = lambda mode, options: {**real(mode, options), "hicache_host_memory_mode": "sideways"}  # type: ignore[assignment]
    try:
        record.resolve_once()
    finally:
        flags.settings_for = real
    assert record.resolved_dict() == {**plain.resolved_dict(), "random_seed": record.resolved_dict()["random_seed"]}
    assert "does not take it together" in the_off_line()
    bad = parsed("--enable-kvplug", "--page-size", "64", "--swa-full-tokens-ratio", "7")
    with pytest.raises(ValueError, match="swa-full-tokens-ratio"):  # the user's own mistake
        bad.resolve_once()


def other_versions_are_refused_in_one_line() -> None:
    from kvplug.adapters.sglang import compat

    real = compat.version
    compat.version = lambda: "0.6.0"  # type: ignore[assignment]
    try:
        record = resolved("--enable-kvplug")
        assert not record.enable_hierarchical_cache
        assert not record.enable_unified_cache_external_linker
        assert "SGLang 0.6.0 is not one that kvplug was written for" in the_off_line()
    finally:
        compat.version = real  # type: ignore[assignment]


CHECKS = [
    not_asked_for_is_light_and_changes_nothing,
    registering_again_adds_one_set_of_flags,
    auto_takes_the_linker_where_there_is_one,
    hicache_mode_is_a_dynamic_storage_backend,
    auto_keeps_the_host_cache_that_was_asked_for,
    auto_takes_the_host_cache_where_the_linker_lacks_something,
    a_config_file_says_it_too,
    settings_come_from_a_file,
    the_environment_alone_is_enough,
    flags_go_with_the_environment,
    what_cant_be_meant_ends_the_command,
    what_is_in_the_way_is_said_and_left_alone,
    a_model_without_prefix_cache_gets_none,
    sglang_starts_without_what_it_refuses,
    other_versions_are_refused_in_one_line,
]


def main() -> None:
    import sglang_inside_scheduler

    out = {}
    for check in [*CHECKS, *sglang_inside_scheduler.CHECKS]:
        try:
            check()
            out[check.__name__] = ""
        except BaseException:  # noqa: BLE001 - reported to the test
            out[check.__name__] = f"{traceback.format_exc()}\nkvplug said: {said}"
    print("RESULT " + json.dumps(out))


if __name__ == "__main__":
    sys.modules["sglang_inside"] = sys.modules["__main__"]  # one state for both files
    main()
