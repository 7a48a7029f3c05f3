"""What switches kvplug on and off, and that SGLang always runs: with kvplug, or without it and saying why."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.lab.models import LLAMA, LLAMA_OTHER, ModelSpec, model_dir
from tests.sglang.common import Control, agree, pick, serve
from tests.sglang_lab.env import base_env
from tests.sglang_lab.server import PAGE, SglangServer
from tests.vllm.common import eventually

INSIDE = "tests.sglang.inside_plugin"
ENGINE_S = 240
WINDOWS_ALONE = ModelSpec(family="mellum", layers=2)
"""The first layers of :data:`tests.lab.models.MELLUM`, which all have a sliding window."""
OFFLINE = """
import json, sys
import sglang

if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    engine = sglang.Engine(log_level="info", **given["arguments"])
    answers = []
    for _ in range(2):
        answers.append(engine.generate(input_ids=given["prompt"], sampling_params=given["sampling"]))
        for _ in range(100):  # what was computed is stored behind the engine's back
            engine.flush_cache()
            again = engine.generate(input_ids=given["prompt"], sampling_params=given["sampling"])
            if again["meta_info"]["cached_tokens"]:
                answers.append(again)
                break
    print("ANSWERS " + json.dumps([[a["output_ids"], a["meta_info"]["cached_tokens"]] for a in answers]))
    engine.shutdown()
"""


def lines(server: SglangServer) -> list[str]:
    """What kvplug has said in a server's log, without the time in front."""
    return [line.partition("] ")[2] for line in server.log.read_text().splitlines() if "] kvplug: " in line]


@pytest.mark.parametrize(
    ("name", "words", "arguments", "settings"),
    [
        ("no-room", "does not fit", (), {"size": "4tb"}),
        ("no-prefix-cache", "--disable-radix-cache leaves no prefix cache to share", ("--disable-radix-cache",), {}),
    ],
)
def test_off_is_said_and_the_server_answers(
    boot: Callable[..., SglangServer],
    control: Control,
    name: str,
    words: str,
    arguments: tuple[str, ...],
    settings: Any,
) -> None:
    server = boot(name, settings=settings, arguments=arguments).ready()
    cases = control.pick(1, 70)
    for _ in range(2):
        serve(server, cases)
        server.flush()
    off = [line for line in lines(server) if line.startswith("kvplug: OFF: ")]
    assert len(set(off)) == 1, lines(server)
    assert words in off[0]
    assert not any(value for metric, value in server.metrics().items() if metric == "kvplug_stored_pages_total")


@pytest.mark.parametrize("mode", ["linker", "hicache"])
def test_a_model_of_windows_alone_runs_without(boot: Callable[..., SglangServer], mode: Any) -> None:
    """SGLang keeps a cache of its own for those, unless it is told to load a linker; and ends with a host cache."""
    small = ("--max-total-tokens", "2048")
    server = boot(f"windows-{mode}", WINDOWS_ALONE, mode=mode, page_size=1, arguments=small).ready()
    cases = pick(server, 6, seed=71)
    for _ in range(2):
        agree(cases * 3, server.generate_many([case.prompt for case in cases * 3], len(cases[0].tokens)))
        server.flush()
    off = {line for line in lines(server) if line.startswith("kvplug: OFF: ")}
    assert len(off) == 1, lines(server)
    assert "every layer has a sliding window" in off.pop()
    assert server.ask(f"{INSIDE}:kind_of_cache") == "PureSWARadixCache", "another one gives wrong answers, now and then"


def test_an_offline_engine_needs_the_environment_alone(pool: str, control: Control, tmp_path: Path) -> None:
    """``sglang.Engine(...)`` with ``KVPLUG_ENABLE=1``; and what it has stored a server of the same model finds."""
    (case,) = control.pick(1, 80)
    script = tmp_path / "offline.py"
    script.write_text(OFFLINE)
    given = {
        "arguments": {
            "model_path": str(model_dir(LLAMA)),
            "device": "cpu",
            "attention_backend": "torch_native",
            "dtype": "float32",
            "max_total_tokens": 8192,
            "context_length": 4096,
            "page_size": PAGE,
            "max_running_requests": 8,
            "random_seed": 0,
            "skip_server_warmup": True,
        },
        "prompt": list(case.prompt),
        "sampling": {"temperature": 0, "max_new_tokens": len(case.tokens), "ignore_eos": True},
    }
    env = {"KVPLUG_ENABLE": "1", "KVPLUG_POOL": pool, "KVPLUG_SIZE": "256mib", "KVPLUG_VERIFY": "always"}
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(given)],
        env=base_env(plugins=("kvplug",), env=env),
        capture_output=True,
        text=True,
        timeout=ENGINE_S,
        check=False,
    )
    said = done.stdout + done.stderr
    answers = [line for line in said.splitlines() if line.startswith("ANSWERS ")]
    assert answers, said[-6000:]
    found = json.loads(answers[0].removeprefix("ANSWERS "))
    assert all(tuple(tokens) == case.tokens for tokens, _ in found)
    assert found[0][1] == 0
    assert found[1][1] == case.whole, "nothing was read from the pool"
    assert f"kvplug: ON in linker mode, pool {pool}" in said
    assert "kvplug: sharing as" in said


def test_weights_that_change_in_a_living_server_part_it_from_the_pool(
    boot: Callable[..., SglangServer], control: Control
) -> None:
    """No hit of the old weights' pages, whether SGLang flushed its cache with the update or later; and once the first
    weights are back, and nothing else is on the device, their pages are found."""
    (case,) = control.pick(1, 90)
    server = boot("updated").ready()
    serve(server, [case])

    def stored() -> bool:
        server.flush()
        return serve(server, [case])[0].cached == case.whole

    def names() -> Any:
        return server.ask(f"{INSIDE}:page_names")

    def update(model: ModelSpec, flush: bool) -> None:
        answer = server.post("/update_weights_from_disk", {"model_path": str(model_dir(model)), "flush_cache": flush})
        assert answer["success"], answer

    eventually("the prompt is in the pool", stored)
    assert any(line.startswith("kvplug: ON in linker mode") for line in lines(server))
    first = names()["key"]
    update(LLAMA_OTHER, flush=True)
    again = server.generate(case.prompt, len(case.tokens))
    assert again.cached == 0
    assert tuple(again.tokens) != case.tokens
    update(LLAMA, flush=False)
    eventually("the weights are known", lambda: not names()["pending"])
    assert names()["key"] is None, "old pages may still be on the device"
    server.flush()
    assert names()["key"] == first
    assert serve(server, [case])[0].cached == case.whole
    assert names()["counts"].get("weight_changes", 0) == 2
    assert names()["off"] is None
