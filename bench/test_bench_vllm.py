"""vLLM's figures: what a warm pool saves, what kvplug costs a prompt that nobody has seen, and each scheduler step.

Engines run in processes of their own (``tests/vllm_lab``), stepped by a driver inside them, so that a time to first
token is the engine's own and no HTTP is in it. float32 on the CPU, chunked as a server does it; ``verify="never"``, as
a user has it. Pairs are interleaved: with kvplug, without, with, without, so that a busy neighbour slows both. One
process may be a twentieth faster than its twin for as long as it lives, so what is compared between two is measured in
several pairs of processes.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import figures
from kvplug.store import KvStore
from tests.lab.env import temporary_pool
from tests.lab.models import LLAMA, VOCAB, model_dir
from tests.vllm_lab.engine import InProcess

PROMPT_TOKENS = 4000
OUT_TOKENS = 16
FRESH_ROUNDS = 7
ENGINE_PAIRS = 5
PAIRS = 9
POOL = "1gib"
SETTLE_S = 20.0
IN_FLIGHT = 16
LLM: dict[str, Any] = {
    "block_size": 128,  # vLLM's own choice on the CPU
    "max_model_len": 8192,
    "max_num_batched_tokens": 2048,
    "num_gpu_blocks_override": 400,
}

Engines = dict[str, InProcess]


@pytest.fixture(scope="module")
def pool() -> Iterator[str]:
    with temporary_pool("bench-vllm") as name:
        yield name


def boot(logs: Path, **pools: str | None) -> Engines:
    """Engines that are warmed up, each on this pool or without kvplug."""
    env = {"KVPLUG_VERIFY": "never"}
    out: Engines = {}
    try:
        for name, on in pools.items():
            out[name] = InProcess(model_dir(LLAMA), logs / f"{name}.log", pool=on, size=POOL, env=env, **LLM)
        for engine in out.values():
            engine.ready()
            engine.each([{"prompt": prompt(i, 1000), "max_tokens": 4} for i in range(3)])
    except BaseException:
        close(out)
        raise
    return out


def close(engines: Engines) -> None:
    for engine in engines.values():
        engine.close()


@pytest.fixture(scope="module")
def engines(pool: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """``with`` kvplug, and ``fresh`` beside it on its pool."""
    booted = boot(tmp_path_factory.mktemp("engines"), **{"with": pool, "fresh": pool})
    yield booted
    close(booted)


def prompt(seed: int, tokens: int = PROMPT_TOKENS) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, VOCAB) for _ in range(tokens)]


def answer(engine: InProcess, seed: int, out: int = 1) -> dict[str, Any]:
    (record,) = engine.each([{"prompt": prompt(seed), "max_tokens": out}])
    return record


def settle(pool: str) -> None:
    """Waits until what was computed is stored."""
    deadline = time.monotonic() + SETTLE_S
    with KvStore(pool, create=False) as store:
        time.sleep(0.1)
        while store.stats().writing_slots:
            assert time.monotonic() < deadline, "a block is never sealed"
            time.sleep(0.05)


def test_first_token_from_a_warm_pool(benchmark: Any, engines: Engines, pool: str) -> None:
    """A prompt that another engine has computed, in an engine whose own cache is empty, ÷ computing it there."""
    computed, read = [], []

    def once(seed: int) -> None:
        computed.append(answer(engines["with"], seed)["ttft_s"])
        settle(pool)
        engines["fresh"].do("reset")
        record = answer(engines["fresh"], seed)
        assert record["external"] == PROMPT_TOKENS // 128 * 128
        read.append(record["ttft_s"])

    seeds = iter(range(1000, 2000))
    benchmark.pedantic(lambda: once(next(seeds)), rounds=FRESH_ROUNDS, warmup_rounds=1)
    ratio = statistics.median(r / c for r, c in zip(read[1:], computed[1:], strict=True))
    ms = [statistics.median(x[1:]) * 1e3 for x in (read, computed)]
    benchmark.extra_info["vllm_ttft"] = round(ratio, 4)
    figures.record(
        "vllm", "vllm_ttft", ratio, rounds=FRESH_ROUNDS, beside=f"{ms[0]:.0f} ms against {ms[1]:.0f} ms",
        note=f"{PROMPT_TOKENS} tokens, tiny model",
    )  # fmt: skip


def test_prompts_never_seen(benchmark: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Looking up and storing what nobody has asked for: a whole request with kvplug ÷ without."""
    times: dict[str, list[float]] = {"with": [], "without": []}
    by_engines: list[float] = []
    rng = random.Random(7)
    seeds = iter(range(5000, 6000))

    def once(pair: Engines, ratios: list[float]) -> None:
        seed, took = next(seeds), {}
        for name in rng.sample(sorted(pair), 2):
            took[name] = float(answer(pair[name], seed, OUT_TOKENS)["total_s"])
        ratios.append(took["with"] / took["without"])
        for name, t in took.items():
            times[name].append(t)

    def all_of_a_pair() -> None:
        with temporary_pool("bench-vllm-pair") as own:
            pair = boot(tmp_path_factory.mktemp("pair"), **{"with": own, "without": None})
            try:
                ratios: list[float] = []
                for _ in range(2 + PAIRS):  # two warm up
                    once(pair, ratios)
                by_engines.append(statistics.median(ratios[2:]))
            finally:
                close(pair)

    benchmark.pedantic(all_of_a_pair, rounds=ENGINE_PAIRS)
    ratio = statistics.median(by_engines)
    ms = [statistics.median(times[name]) * 1e3 for name in ("with", "without")]
    benchmark.extra_info["vllm_unseen"] = round(ratio, 4)
    figures.record(
        "vllm", "vllm_unseen", ratio, rounds=ENGINE_PAIRS * PAIRS, beside=f"{ms[0]:.0f} ms against {ms[1]:.0f} ms",
        note=f"{ENGINE_PAIRS} pairs of engines, from {min(by_engines):.3f} to {max(by_engines):.3f}",
    )  # fmt: skip


def test_scheduler_time_of_a_quiet_step(benchmark: Any, engines: Engines) -> None:
    """The time inside the connector's scheduler-side calls, per engine step that admits no request, 16 in flight."""
    engine = engines["with"]
    engine.do("time_connector")
    requests = [{"prompt": prompt(8000 + i, 200), "max_tokens": 200} for i in range(IN_FLIGHT)]

    def once() -> list[float]:
        engine.do("reset")
        engine.do("timings")
        engine.generate(requests)
        return list(engine.do("timings")["connector_quiet_s"])

    quiet = benchmark.pedantic(once, rounds=1, warmup_rounds=1)
    assert len(quiet) > 100
    median, p99 = statistics.median(quiet) * 1e6, statistics.quantiles(quiet, n=100)[98] * 1e6
    benchmark.extra_info["vllm_step"] = round(median, 2)
    figures.record(
        "vllm", "vllm_step", median, rounds=len(quiet), beside=f"p99 {p99:.0f} µs", note=f"{IN_FLIGHT} in flight"
    )
