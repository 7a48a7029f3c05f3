"""SGLang's figures, in both modes: what a warm pool saves, and what kvplug costs a prompt that nobody has seen.

Real servers (``tests/sglang_lab``) over HTTP, as a client sees them. float32 on the CPU, pages of 64 tokens;
``verify="never"``, as a user has it. Pairs are interleaved, in random order, so that a busy neighbour slows both. In
hicache mode the server without kvplug has no host cache either, so that its cost is in the figure.

SGLang's attention on the CPU computes the whole square of a prompt, also where all but its last tokens come from a
cache. So the model here has little attention for its size, as real ones have at this length on an accelerator.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bench import figures
from kvplug.store import KvStore
from tests.lab.env import temporary_pool
from tests.lab.models import VOCAB, ModelSpec, model_dir
from tests.sglang_lab.env import installed
from tests.sglang_lab.server import PAGE, Answer, SglangServer

PROMPT_TOKENS = 3000
OUT_TOKENS = 16
FRESH_ROUNDS = 5
PAIRS = 11
MODEL = ModelSpec(layers=2, hidden=1024, heads=4, kv_heads=4, inter=4096)
POOL = "1gib"
SETTLE_S = 20.0
SETTINGS = {"verify": "never"}
SUFFIX = {"linker": "", "hicache": "_hicache"}

pytestmark = [
    pytest.mark.skipif(not installed(), reason="no SGLang here: tests/sglang_lab/install.sh .venv"),
    pytest.mark.timeout(1800),
]


class Servers(NamedTuple):
    """``with_it`` and ``fresh`` on one pool, ``without`` kvplug; all warmed up."""

    mode: str
    pool: str
    with_it: SglangServer
    fresh: SglangServer
    without: SglangServer


@pytest.fixture(scope="module", params=["linker", "hicache"])
def servers(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    mode = request.param
    logs: Path = tmp_path_factory.mktemp("servers")
    with temporary_pool("bench-sglang") as pool, contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(
                SglangServer(model_dir(MODEL), logs / f"{name}.log", pool=on, mode=mode, size=POOL, settings=SETTINGS)
            )
            for name, on in (("with", pool), ("fresh", pool), ("without", None))
        ]
        for server in started:
            server.ready()
            ask(server, 0, OUT_TOKENS)
        yield Servers(mode, pool, *started)


def ask(server: SglangServer, seed: int, out: int = 1) -> Answer:
    rng = random.Random(seed)
    return server.generate([rng.randrange(3, VOCAB) for _ in range(PROMPT_TOKENS)], out)


def cpu_s(server: SglangServer) -> float:
    """Processor time of all of a server's processes so far."""
    return sum(sum(process.cpu_times()[:2]) for process in server.family())


def settle(pool: str) -> None:
    """Waits until what was computed is stored."""
    deadline = time.monotonic() + SETTLE_S
    with KvStore(pool, create=False) as store:
        before = -1
        while (now := store.stats().stored_blocks) != before or store.stats().writing_slots:
            assert time.monotonic() < deadline, "a block is never sealed"
            before = now
            time.sleep(0.2)


def test_first_token_from_a_warm_pool(benchmark: Any, servers: Servers) -> None:
    """A prompt that another engine has computed, in an engine whose own cache is empty, ÷ computing it there."""
    computed: list[float] = []
    read: list[float] = []
    whole = (PROMPT_TOKENS - 1) // PAGE * PAGE

    def once(seed: int) -> None:
        computed.append(ask(servers.with_it, seed).ttft_s)
        settle(servers.pool)
        servers.fresh.flush()
        answer = ask(servers.fresh, seed)
        assert answer.cached == whole, answer.details
        read.append(answer.ttft_s)

    seeds = iter(range(1000, 2000))
    benchmark.pedantic(lambda: once(next(seeds)), rounds=FRESH_ROUNDS, warmup_rounds=1)
    ratio = statistics.median(r / c for r, c in zip(read[1:], computed[1:], strict=True))
    ms = [statistics.median(x[1:]) * 1e3 for x in (read, computed)]
    name = "sglang_ttft" + SUFFIX[servers.mode]
    benchmark.extra_info[name] = round(ratio, 4)
    figures.record(
        f"sglang-{servers.mode}", name, ratio, rounds=FRESH_ROUNDS, beside=f"{ms[0]:.0f} ms against {ms[1]:.0f} ms",
        note=f"{PROMPT_TOKENS} tokens, small model",
    )  # fmt: skip


def test_prompts_never_seen(benchmark: Any, servers: Servers) -> None:
    """Looking up and storing what nobody has asked for: a whole request with kvplug ÷ without, in pairs. The processor
    time of both servers beside it, which a busy machine changes less."""
    ratios: list[float] = []
    spent = {"with": 0.0, "without": 0.0}
    times: dict[str, list[float]] = {"with": [], "without": []}
    rng = random.Random(7)
    by_name = {"with": servers.with_it, "without": servers.without}

    def once(seed: int) -> None:
        order = rng.sample(sorted(by_name), 2)
        took = {}
        for name in order:
            before = cpu_s(by_name[name])
            took[name] = ask(by_name[name], seed, OUT_TOKENS).total_s
            time.sleep(0.1)  # storing goes on behind the answer
            spent[name] += cpu_s(by_name[name]) - before
        for name, t in took.items():
            times[name].append(t)
        ratios.append(took["with"] / took["without"])

    seeds = iter(range(5000, 6000))
    benchmark.pedantic(lambda: once(next(seeds)), rounds=PAIRS, warmup_rounds=1)
    ratio = statistics.median(ratios[1:])
    ms = [statistics.median(times[name][1:]) * 1e3 for name in ("with", "without")]
    quartiles = statistics.quantiles(ratios[1:], n=4)
    name = "sglang_unseen" + SUFFIX[servers.mode]
    benchmark.extra_info[name] = round(ratio, 4)
    figures.record(
        f"sglang-{servers.mode}", name, ratio, rounds=PAIRS, beside=f"{ms[0]:.0f} ms against {ms[1]:.0f} ms",
        note=f"quartiles of the pairs {quartiles[0]:.3f} to {quartiles[2]:.3f}; "
        f"processor time {spent['with'] / spent['without']:.3f}",
    )  # fmt: skip
