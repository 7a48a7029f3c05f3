"""The same work by what a user would pick instead, of what can be had without a network or a heavy installation.

    kvplug           one process stores, this one reads
    dict of arrays   in this process: the limit of what Python can do
    shared_memory    the standard library's: one block of it, key → offset in a manager's dict, second process reads
    redis            over its unix socket, if redis-server and its client are installed

Stored bytes are compared once; each figure is the median of ROUNDS. Beside each get stands the ratio to np.copyto of
the same bytes in the same run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import multiprocessing
import multiprocessing.shared_memory
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from bench import figures
from bench.harness import GIB, KIB, MIB, config, keys, pool_name, remove_pool, room_for, wait_for_memory
from bench.worker import pattern
from kvplug import KvStore

SIZES = {"256K": (256 * KIB, 512), "2M": (2 * MIB, 64), "32K": (32 * KIB, 4096)}
ROUNDS = 7
LOOKUPS = 2048
ONE_GETS = 200
START_S = 10.0
RESULTS_FILE = "peers.json"

U8 = Any


class Peer(Protocol):
    """What each of them can do: a batch at a time if it knows batches."""

    def put(self, wanted: list[bytes], blocks: U8) -> None: ...
    def get(self, wanted: list[bytes], to: U8) -> None: ...
    def exists(self, wanted: list[bytes]) -> int: ...
    def clear(self, wanted: list[bytes]) -> None: ...


class Kvplug:
    def __init__(self) -> None:
        self._pool = pool_name()
        self._writer = KvStore(config=config(self._pool, GIB))
        wait_for_memory(self._writer)
        self._reader = KvStore(config=config(self._pool, GIB), create=False)
        wait_for_memory(self._reader)

    def put(self, wanted: list[bytes], blocks: U8) -> None:
        assert not self._writer.put(wanted, blocks).any()

    def get(self, wanted: list[bytes], to: U8) -> None:
        assert not self._reader.get_into(wanted, to).any()

    def exists(self, wanted: list[bytes]) -> int:
        return int(self._reader.exists(wanted).sum())

    def clear(self, wanted: list[bytes]) -> None:
        self._writer.remove(wanted)

    def close(self) -> None:
        self._reader.close()
        self._writer.close()
        remove_pool(self._pool)


class DictOfArrays:
    def __init__(self) -> None:
        self._blocks: dict[bytes, U8] = {}

    def put(self, wanted: list[bytes], blocks: U8) -> None:
        for key, block in zip(wanted, blocks, strict=True):
            self._blocks[key] = block.copy()

    def get(self, wanted: list[bytes], to: U8) -> None:
        for key, out in zip(wanted, to, strict=True):
            np.copyto(out, self._blocks[key])

    def exists(self, wanted: list[bytes]) -> int:
        return sum(map(self._blocks.__contains__, wanted))

    def clear(self, wanted: list[bytes]) -> None:
        self._blocks.clear()

    def close(self) -> None:
        self._blocks.clear()


class SharedMemory:
    def __init__(self) -> None:
        self._manager = multiprocessing.get_context("spawn").Manager()
        self._index = self._manager.dict()
        self._memory = multiprocessing.shared_memory.SharedMemory(create=True, size=GIB)
        self._bytes = np.frombuffer(self._memory.buf, np.uint8)
        self._bytes[:] = 0
        self._end = 0

    def put(self, wanted: list[bytes], blocks: U8) -> None:
        size, at = blocks.shape[1], self._end
        np.copyto(self._bytes[at : at + blocks.size].reshape(blocks.shape), blocks)
        self._index.update({key: (at + i * size, size) for i, key in enumerate(wanted)})
        self._end += blocks.size

    def get(self, wanted: list[bytes], to: U8) -> None:
        for key, out in zip(wanted, to, strict=True):
            at, size = self._index[key]
            np.copyto(out, self._bytes[at : at + size])

    def exists(self, wanted: list[bytes]) -> int:
        return sum(key in self._index for key in wanted)

    def clear(self, wanted: list[bytes]) -> None:
        self._index.clear()
        self._end = 0

    def close(self) -> None:
        del self._bytes
        self._memory.close()
        self._memory.unlink()
        self._manager.shutdown()


class Redis:
    def __init__(self) -> None:
        import redis

        self._folder = tempfile.mkdtemp(prefix="kvplug-bench-redis-")
        socket = f"{self._folder}/s"
        self._server = subprocess.Popen(
            ["redis-server", "--port", "0", "--unixsocket", socket, "--save", "", "--appendonly", "no"],
            stdout=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + START_S
        while not os.path.exists(socket) and time.monotonic() < deadline:
            time.sleep(0.02)
        self._redis = redis.Redis(unix_socket_path=socket)

    def put(self, wanted: list[bytes], blocks: U8) -> None:
        for at in range(0, len(wanted), 64):
            self._redis.mset(
                {k: memoryview(b) for k, b in zip(wanted[at : at + 64], blocks[at : at + 64], strict=True)}
            )

    def get(self, wanted: list[bytes], to: U8) -> None:
        for at in range(0, len(wanted), 64):
            for out, value in zip(to[at : at + 64], self._redis.mget(wanted[at : at + 64]), strict=True):
                np.copyto(out, np.frombuffer(value, np.uint8))

    def exists(self, wanted: list[bytes]) -> int:
        pipe = self._redis.pipeline(transaction=False)
        for key in wanted:
            pipe.exists(key)
        return sum(pipe.execute())

    def clear(self, wanted: list[bytes]) -> None:
        self._redis.flushall()

    def close(self) -> None:
        self._redis.close()
        self._server.terminate()
        self._server.wait(START_S)
        shutil.rmtree(self._folder, ignore_errors=True)


PEERS: dict[str, Callable[[], Any]] = {
    "kvplug": Kvplug,
    "dict of arrays (the limit)": DictOfArrays,
    "shared_memory + manager": SharedMemory,
    "redis, unix socket": Redis,
}


@pytest.fixture(scope="module")
def seen() -> Iterator[dict[str, dict[str, Any]]]:
    """What each peer did; printed and kept at the end."""
    rows: dict[str, dict[str, Any]] = {}
    yield rows
    figures.RESULTS.mkdir(exist_ok=True)
    (figures.RESULTS / RESULTS_FILE).write_text(
        json.dumps({"machine": figures.machine(), "peers": rows}, indent=1, ensure_ascii=False) + "\n"
    )


def measure(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def one_size(peer: Peer, block: int, count: int, seed: int) -> dict[str, float]:
    """GiB/s of put and get, and get ÷ memcpy."""
    source, to = pattern(block, count), np.ones((count, block), np.uint8)
    put_s, get_s, ratios = [], [], []
    for i in range(ROUNDS):
        names = [k.tobytes() for k in keys(count, seed + i)]
        put_s.append(measure(lambda n=names: peer.put(n, source)))
        to[:] = 0
        copy_s = measure(lambda: np.copyto(to, source))
        to[:] = 0
        get_s.append(measure(lambda n=names: peer.get(n, to)))
        ratios.append(copy_s / get_s[-1])
        assert (to == source).all(), "wrong bytes"
        peer.clear(names)
    nbytes = count * block
    return {
        "put": nbytes / statistics.median(put_s) / GIB,
        "get": nbytes / statistics.median(get_s) / GIB,
        "ratio": statistics.median(ratios),
    }


@pytest.mark.parametrize("name", PEERS)
def test_peer(benchmark: Any, seen: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str], name: str) -> None:
    if not room_for(2 * GIB):
        pytest.skip("not enough memory to spare")
    if name.startswith("redis") and not (shutil.which("redis-server") and importlib.util.find_spec("redis")):
        pytest.skip("redis-server or its client is not installed")
    with contextlib.closing(PEERS[name]()) as peer:
        row: dict[str, Any] = {}
        for i, (size, (block, count)) in enumerate(SIZES.items()):
            row[size] = one_size(peer, block, count, 100 * i)
        block, count = SIZES["256K"]
        source, to = pattern(block, count), np.ones((count, block), np.uint8)
        known = [k.tobytes() for k in keys(count, 1)]
        peer.put(known, source)
        unknown = [k.tobytes() for k in keys(LOOKUPS, 2)]
        hits = known * (LOOKUPS // count)
        assert peer.exists(hits) == LOOKUPS
        assert peer.exists(unknown) == 0
        row["hit_ms"] = statistics.median(measure(lambda: peer.exists(hits)) for _ in range(ROUNDS)) * 1e3
        row["miss_ms"] = statistics.median(measure(lambda: peer.exists(unknown)) for _ in range(ROUNDS)) * 1e3
        one_s = sorted(
            measure(lambda i=i: peer.get([known[i * 37 % count]], to[i * 53 % count][None])) for i in range(ONE_GETS)
        )
        row["one_us"] = [one_s[ONE_GETS // 2] * 1e6, one_s[int(ONE_GETS * 0.99)] * 1e6]
        benchmark.pedantic(lambda: peer.get(known, to), rounds=ROUNDS, warmup_rounds=1)
    seen[name] = row
    if name == list(PEERS)[-1] or len(seen) == len(PEERS) - 1:
        with capsys.disabled():
            print()
            show(seen)


def show(rows: dict[str, dict[str, Any]], console: Console | None = None) -> None:
    """The table, as the design's page of peers has it."""
    table = Table(title="Beside others, GiB/s", caption=figures.machine(), caption_justify="left")
    for head in (
        "system",
        "put 256K / 2M / 32K",
        "get 256K / 2M / 32K",
        "get ÷ memcpy",
        "exists 2048 hit / miss, ms",
        "one 256K get p50 / p99, µs",
    ):
        table.add_column(head, justify="left" if head == "system" else "right")
    for name, row in rows.items():
        table.add_row(
            name,
            " / ".join(f"{row[s]['put']:.1f}" for s in SIZES),
            " / ".join(f"{row[s]['get']:.1f}" for s in SIZES),
            " / ".join(f"{row[s]['ratio']:.2f}" for s in SIZES),
            f"{row['hit_ms']:.2f} / {row['miss_ms']:.2f}",
            " / ".join(f"{x:.0f}" for x in row["one_us"]),
        )
    (console or Console(width=120)).print(table)


if __name__ == "__main__":
    show(json.loads(Path(figures.RESULTS / RESULTS_FILE).read_text())["peers"])
