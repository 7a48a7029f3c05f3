"""Between hosts, the same work by others: a second process reads over TCP on loopback what a first one has stored.

    kvplug            into the second process's pool: looked up, leased, checked, sealed
    … and copied out  the same, and from there into private memory
    redhare 0.6       transport "tcp"
    Mooncake          protocol "tcp", its master beside it

They take turns in every round, and each round has one bare TCP stream of as many bytes. Every byte that the others
deliver is compared; kvplug's once, since its checksums are. The others come from an environment of their own
(others_install.sh), run in a network that has only a loopback, and are told of nothing but that.
"""

from __future__ import annotations

import contextlib
import json
import select
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from bench import figures
from bench.harness import GIB, KIB, MIB, keys, room_for
from bench.rdma_hosts import Hosts, Stream, cpu
from bench.worker import pattern
from kvplug.shm import segment
from tests.rdma.redis_server import binaries

SIZES = {"256 KiB": (256 * KIB, 512), "2 MiB": (2 * MIB, 128), "32 KiB": (32 * KIB, 4096)}
ROUNDS = 7
PYTHON = Path(__file__).resolve().parent.parent / ".venv" / "others" / "bin" / "python"
PROGRAM = Path(__file__).resolve().parent / "others.py"
INSTALL = "not installed: run bench/others_install.sh"
ANSWER_S = 60.0
RESULTS_FILE = "others.json"
Figure = Callable[..., None]


class Other:
    """One other system: its servers, the process that stores, and the one that reads."""

    def __init__(self, system: str) -> None:
        self.process = subprocess.Popen(
            [PYTHON, PROGRAM, system, binaries()[0]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._answer() is True

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], ANSWER_S)[0]:
            raise TimeoutError(f"{self.process.args}: no answer within {ANSWER_S:g} s")
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended with status {self.process.wait()}")
        return json.loads(line)

    def do(self, command: str, block: int, count: int) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([command, {"block": block, "count": count}]) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()  # its children go with it
            self.process.wait()


@pytest.fixture(scope="module")
def seen() -> Iterator[dict[str, dict[str, dict[str, float]]]]:
    """Seconds and more by size and system; printed and kept at the end."""
    rows: dict[str, dict[str, dict[str, float]]] = {}
    yield rows
    figures.RESULTS.mkdir(exist_ok=True)
    (figures.RESULTS / RESULTS_FILE).write_text(
        json.dumps({"machine": figures.machine(), "others": rows}, indent=1, ensure_ascii=False) + "\n"
    )


def one_size(hosts: Hosts, others: dict[str, Other], block: int, count: int, note: Callable[..., None]) -> None:
    """All rounds of one size: ``note(system, seconds, CPU seconds)``."""
    source, into = pattern(block, count), np.empty((count, block), np.uint8)
    wanted = keys(count, block)
    assert not hosts.owner.put(wanted, source).any()
    stream = Stream(segment.segment_path(hosts.names[0]))
    with contextlib.closing(stream):
        memory, start = stream.target(source.nbytes), hosts.owner.data_offset
        for other in others.values():
            assert other.do("put", block, count), "not stored"
            assert other.do("seen", block, count), "never seen by the reader"
        for _ in range(1 + ROUNDS):  # the first warms up
            began = time.perf_counter()
            stream.receive(start, memory)
            note("stream", time.perf_counter() - began, 0.0)
            hosts.reader.remove(wanted)
            used, began = cpu(hosts.agent), time.perf_counter()
            assert not hosts.peer.fetch(wanted).any()
            fetched = time.perf_counter()
            used = cpu(hosts.agent) - used
            assert not hosts.reader.get_into(wanted, into).any()
            note("kvplug", fetched - began, used)
            note("kvplug, and copied out", time.perf_counter() - began, used)
            for name, other in others.items():
                answer = other.do("get", block, count)
                assert answer["right"], f"{name}: wrong or missing bytes"
                note(name, answer["seconds"], answer["cpu_s"])
        assert (into == source).all(), "wrong bytes"
        for other in others.values():
            other.do("remove", block, count)
    hosts.reader.remove(wanted)
    hosts.owner.remove(wanted)


def test_fetch_beside_others(benchmark: Any, figure: Figure, seen: Any, capsys: pytest.CaptureFixture[str]) -> None:
    if not room_for(7 * GIB):
        pytest.skip("not enough memory to spare")
    if not PYTHON.exists():
        for name in ("fetch_redhare", "fetch_mooncake"):
            figures.not_measured("pool", name, INSTALL)
        pytest.skip(INSTALL)
    if not binaries():
        pytest.skip("no redis-server and no valkey-server is installed")
    with contextlib.ExitStack() as stack:
        hosts = stack.enter_context(contextlib.closing(Hosts()))
        others = {name: stack.enter_context(contextlib.closing(Other(name))) for name in ("redhare", "mooncake")}
        taken: dict[str, dict[str, list[float]]] = {}
        for size, (block, count) in SIZES.items():
            rounds: dict[str, list[tuple[float, float]]] = {}

            def note(system: str, seconds: float, cpu_s: float, rounds: Any = rounds) -> None:
                rounds.setdefault(system, []).append((seconds, cpu_s))

            one_size(hosts, others, block, count, note)
            taken[size] = {name: [seconds for seconds, _ in some[1:]] for name, some in rounds.items()}
            for name, some in rounds.items():
                gb = block * count / 1e9
                seen.setdefault(name, {})[size] = {
                    "gb_s": gb / statistics.median(taken[size][name]),
                    "of_stream": ratio(taken[size], "stream", name),
                    "cpu_s_gb": sum(cpu for _, cpu in some[1:]) / gb / ROUNDS,
                }
        wanted = keys(512, 1)
        assert not hosts.owner.put(wanted, pattern(256 * KIB, 512)).any()

        def forget() -> None:
            hosts.reader.remove(wanted)

        benchmark.pedantic(lambda: hosts.peer.fetch(wanted), setup=forget, rounds=ROUNDS, warmup_rounds=1)
    with capsys.disabled():
        print()
        show(seen)
    for name in others:
        by_size = {size: ratio(times, name, "kvplug") for size, times in taken.items()}
        beside = "; ".join(f"{size} {x:.2f}" for size, x in by_size.items())
        figure(f"fetch_{name}", min(by_size.values()), rounds=ROUNDS, beside=beside)


def ratio(times: dict[str, list[float]], reference: str, system: str) -> float:
    """Median of the rounds' (reference's time ÷ the system's)."""
    return statistics.median(r / s for r, s in zip(times[reference], times[system], strict=True))


def show(rows: dict[str, dict[str, dict[str, float]]], console: Console | None = None) -> None:
    """One row a system."""
    table = Table(title="Between hosts, beside others", caption=figures.machine(), caption_justify="left")
    sizes = " / ".join(size.replace(" ", "").removesuffix("iB") for size in SIZES)
    table.add_column("system")
    for head in (f"GB/s, {sizes}", "÷ one bare stream", "CPU s a GB, all its processes"):
        table.add_column(head, justify="right")
    for name, row in rows.items():
        cpu = (
            " / ".join(f"{row[s]['cpu_s_gb']:.2f}" for s in SIZES) if name in ("kvplug", "redhare", "mooncake") else ""
        )
        table.add_row(
            name,
            " / ".join(f"{row[s]['gb_s']:.2f}" for s in SIZES),
            " / ".join(f"{row[s]['of_stream']:.2f}" for s in SIZES),
            cpu,
        )
    (console or Console(width=120)).print(table)


if __name__ == "__main__":
    show(json.loads(Path(figures.RESULTS / RESULTS_FILE).read_text())["others"])
