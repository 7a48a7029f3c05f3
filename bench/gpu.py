"""CUDA copies beside the bus's own speed: `just bench-gpu`, on a machine with a GPU.

Each figure is a ratio to a limit that is measured in the same rounds: one large copy between the same device and pinned
memory (``Tensor.copy_``), as many bytes as ours. Blocks and slots are in random order. A round's time is the wall
clock's, from the call to its return, with everything arrived; medians. Beside the figures stand the numbers by which
defaults are chosen. What one GPU can't show (several ranks that hold the same KV) is said to be missing.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np

from bench.figures import RESULTS, Figure, machine

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
TOTAL_BYTES: Final = 512 * MIB
SLAB_BYTES: Final = 64 * MIB
ROUNDS: Final = 9
COMPUTE_SIZE: Final = 4096
COMPUTE_ITERATIONS: Final = 200
LAYERS: Final = 32

SIZES: Final = (256 * KIB, MIB, 2 * MIB)
FIGURES: Final = {
    **{
        f"{way}_{size}": Figure(f"{way}_{size}", f"{way}, blocks of {size // KIB} KiB ÷ one large copy", "", 0.90, True)
        for size in SIZES
        for way in ("store", "load")
    },
    "store_hashed": Figure("store_hashed", "store with checksums, blocks of 256 KiB ÷ one large copy", "", None),
    "both": Figure("both", "both ways at once ÷ both large copies at once", "", 0.85, True),
    "store_runs": Figure("store_runs", "store, layers of 32 KiB runs ÷ one large copy", "", 0.75, True),
    "load_runs": Figure("load_runs", "load, layers of 32 KiB runs ÷ one large copy", "", 0.75, True),
    "launch_store": Figure("launch_store", "host time to launch a store of 2048 blocks", "ms", 2.0),
    "launch_load": Figure("launch_load", "host time to launch a load of 2048 blocks", "ms", 2.0),
    "launch_kernel": Figure("launch_kernel", "the same for 2048 blocks of 32 runs of 4 KiB", "ms", 2.0),
    "slowdown_dma": Figure("slowdown_dma", "matrix products beside copies by DMA: slower by", "%", 5.0),
    "slowdown_kernel": Figure("slowdown_kernel", "matrix products beside copies by the kernel: slower by", "%", None),
    "register": Figure("register", "pinning a slab, for a GiB", "ms", None),
    "start": Figure("start", "measuring and checking at an engine's start", "s", None),
}


class Bed:
    """A device's memory and a mapping, each TOTAL_BYTES twice over, and the large copies that are the limit."""

    def __init__(self) -> None:
        import torch

        from kvplug.adapters.devices.planning import HostMemory

        self.torch = torch
        self.device = torch.zeros(2 * TOTAL_BYTES, dtype=torch.uint8, device="cuda")
        self.mapping = mmap.mmap(-1, 2 * TOTAL_BYTES)
        self.host = np.frombuffer(self.mapping, np.uint8)
        self.host[:] = 1
        self.memory = HostMemory(self.host.ctypes.data, 2 * TOTAL_BYTES, 0, SLAB_BYTES)
        self.pinned = [torch.zeros(TOTAL_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self.streams = [torch.cuda.Stream() for _ in range(2)]
        self.rng = np.random.default_rng(0)
        torch.cuda.synchronize()

    def runs(self, number: int, nbytes: int, half: int = 0) -> Any:
        """Layers, one behind the other, of TOTAL_BYTES together; a block is a run of each."""
        from kvplug.adapters.devices.base import ByteRuns

        layer = TOTAL_BYTES // number
        base = self.device.data_ptr() + half * TOTAL_BYTES
        return ByteRuns.of([(base + i * layer, nbytes, nbytes) for i in range(number)])

    def batch(self, part: int, half: int = 0, count: int | None = None) -> tuple[Any, Any]:
        """(block ids, slots) that fill TOTAL_BYTES, in random order."""
        blocks = count or TOTAL_BYTES // part
        slots = self.memory.base + half * TOTAL_BYTES + self.rng.permutation(TOTAL_BYTES // part)[:blocks] * part
        return self.rng.permutation(TOTAL_BYTES // part)[:blocks], slots

    def large(self, *ways: str) -> None:
        """One large copy each way that is named, all at once."""
        for at, way in enumerate(ways):
            with self.torch.cuda.stream(self.streams[at]):
                device = self.device[at * TOTAL_BYTES : (at + 1) * TOTAL_BYTES]
                dst, src = (self.pinned[at], device) if way == "store" else (device, self.pinned[at])
                dst.copy_(src, non_blocking=True)
        for stream in self.streams:
            stream.synchronize()


def timed(*calls: Callable[[], Any]) -> list[float]:
    """The median seconds of each, taken by turns."""
    taken: list[list[float]] = [[] for _ in calls]
    for number in range(ROUNDS + 1):
        for call, kept in zip(calls, taken, strict=True):
            began = time.perf_counter()
            call()
            if number:  # the first round registers and compiles
                kept.append(time.perf_counter() - began)
    return [statistics.median(kept) for kept in taken]


class Report:
    """What was measured, in the order in which it was."""

    def __init__(self) -> None:
        self.rows: list[tuple[Figure, float, str]] = []
        self.lines: list[str] = []

    def add(self, name: str, measured: float, beside: str = "") -> None:
        """A figure."""
        figure = FIGURES[name]
        self.rows.append((figure, measured, beside))
        print(f"{figure.what}: {measured:.3f} {figure.unit} {beside}", flush=True)

    def say(self, line: str) -> None:
        """Something to read beside the figures."""
        self.lines.append(line)
        print(line, flush=True)

    def table(self, where: str) -> str:
        """For documentation and for people."""
        out = ["| what | at least / at most | measured | | in the same run |", "|---|---|---|---|---|"]
        for figure, measured, beside in self.rows:
            verdict = {True: "PASS", False: "FAIL", None: ""}[figure.met(measured)]
            out.append(f"| {figure.what} | {figure.target()} | {measured:.3g} {figure.unit} | {verdict} | {beside} |")
        missing = [figure.what for name, figure in FIGURES.items() if name not in {row[0].name for row in self.rows}]
        out += ["", *self.lines, *(f"not measured: {what}" for what in missing)]
        out += ["not measured: several ranks with the same KV, which takes several GPUs", "", where]
        return "\n".join(out)


def rate(nbytes: int, seconds: float) -> str:
    """In GB/s, as buses are counted."""
    return f"{nbytes / seconds / 1e9:.1f} GB/s"


def one_way(bed: Bed, copy: Any, report: Report) -> None:
    for size in SIZES:
        runs, (ids, slots) = bed.runs(1, size), bed.batch(size)
        for way, call in (("store", copy.store_unhashed), ("load", copy.load)):
            given = (ids, slots) if way == "store" else (slots, ids)
            ours, limit = timed(
                lambda call=call, given=given, runs=runs: call(runs, *given, None), lambda way=way: bed.large(way)
            )
            beside = f"{rate(TOTAL_BYTES, ours)}, one large copy {rate(TOTAL_BYTES, limit)}"
            report.add(f"{way}_{size}", limit / ours, beside)
    runs, (ids, slots) = bed.runs(1, SIZES[0]), bed.batch(SIZES[0])
    ours, limit = timed(lambda: copy.store(runs, ids, slots, None), lambda: bed.large("store"))
    report.add(
        "store_hashed",
        limit / ours,
        f"{rate(TOTAL_BYTES, ours)}; checksums by {copy.checksum_threads} threads of the host",
    )


def reasons(bed: Bed, copy: Any, report: Report) -> None:
    """What a ratio below its limit comes from: the mapping's pages, or the batches; and what the driver offers else."""
    from kvplug.adapters.devices import cuda_driver

    slab, block, layers = bed.runs(1, SLAB_BYTES), bed.runs(1, SIZES[0]), bed.runs(LAYERS, 32 * KIB)
    for name, runs in (("whole slabs", slab), ("blocks of 256 KiB", block), ("layers of 32 KiB runs", layers)):
        ids, slots = bed.batch(runs.part_nbytes)
        said = []
        for order, flags, first, how in (
            (1, 0, cuda_driver.FIRST_COPIES, "as is"),
            (1, 0, 1 << 30, "in one call"),
            (3, 0, cuda_driver.FIRST_COPIES, "source in any order"),
            (1, 1, cuda_driver.FIRST_COPIES, "overlap asked for"),
        ):
            attributes, usual = copy.driver._attributes, cuda_driver.FIRST_COPIES
            attributes.src_access_order, attributes.flags, cuda_driver.FIRST_COPIES = order, flags, first
            try:
                taken = timed(
                    lambda runs=runs, ids=ids, slots=slots: copy.store_unhashed(runs, ids, slots, None),
                    lambda runs=runs, ids=ids, slots=slots: copy.load(runs, slots, ids, None),
                )
            finally:
                attributes.src_access_order, attributes.flags, cuda_driver.FIRST_COPIES = 1, 0, usual
            said.append(f"{how} {' and '.join(rate(TOTAL_BYTES, seconds) for seconds in taken)}")
        report.say(f"{name} by DMA, store and load: {', '.join(said)}")


def both_ways(bed: Bed, copy: Any, report: Report) -> None:
    out, back = bed.runs(1, SIZES[0]), bed.runs(1, SIZES[0], half=1)
    (ids, slots), (others, sources) = bed.batch(SIZES[0]), bed.batch(SIZES[0], half=1)

    with ThreadPoolExecutor(1) as other:

        def together() -> None:
            stored = other.submit(copy.store_unhashed, out, ids, slots, None)
            copy.load(back, sources, others, None)
            stored.result()  # a store that failed is no fast one

        ours, limit = timed(together, lambda: bed.large("store", "load"))
    beside = f"{rate(2 * TOTAL_BYTES, ours)}, two large copies {rate(2 * TOTAL_BYTES, limit)}"
    report.add("both", limit / ours, beside)


def small_runs(bed: Bed, ways: dict[str, Any], report: Report) -> None:
    run = 32 * KIB
    runs, (ids, slots) = bed.runs(LAYERS, run), bed.batch(LAYERS * run)
    calls: list[Callable[[], Any]] = [lambda: bed.large("store"), lambda: bed.large("load")]
    for copy in ways.values():
        calls.append(lambda copy=copy: copy.store_unhashed(runs, ids, slots, None))
        calls.append(lambda copy=copy: copy.load(runs, slots, ids, None))
    limits, *taken = (found := timed(*calls))[:2], *(found[at : at + 2] for at in range(2, len(calls), 2))
    for at, way in enumerate(("store", "load")):
        beside = ", ".join(f"{name} {rate(TOTAL_BYTES, both[at])}" for name, both in zip(ways, taken, strict=True))
        report.add(
            f"{way}_runs", limits[at] / taken[0][at], f"{beside}, one large copy {rate(TOTAL_BYTES, limits[at])}"
        )


def launches(bed: Bed, ways: dict[str, Any], report: Report) -> None:
    runs, (ids, slots) = bed.runs(1, SIZES[0]), bed.batch(SIZES[0], count=2048)
    taken: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(ROUNDS):
        ways["chosen"].store(runs, ids, slots, None)
        ways["chosen"].load(runs, slots, ids, None)
        for to_slots, kept in taken.items():
            kept.append(ways["chosen"].launch_s(to_slots=to_slots))
    report.add("launch_store", statistics.median(taken[True]) * 1e3, "one run of 256 KiB a block, 16 groups")
    report.add("launch_load", statistics.median(taken[False]) * 1e3, "one run of 256 KiB a block")
    for name in ("kernel", "DMA"):
        runs, (ids, slots) = bed.runs(LAYERS, 4 * KIB), bed.batch(LAYERS * 4 * KIB, count=2048)
        seconds = []
        for _ in range(ROUNDS):
            ways[name].load(runs, slots, ids, None)
            seconds.append(ways[name].launch_s(to_slots=False))
        if name == "kernel":
            report.add("launch_kernel", statistics.median(seconds) * 1e3, "one launch")
        else:
            report.say(f"the same by DMA, 65536 descriptors: {statistics.median(seconds) * 1e3:.1f} ms to launch")


def slowdown(bed: Bed, ways: dict[str, Any], report: Report) -> None:
    torch = bed.torch
    a, b = (torch.randn(COMPUTE_SIZE, COMPUTE_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)

    def compute() -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(COMPUTE_ITERATIONS):
            torch.matmul(a, b, out=c)
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last))

    copied: list[float] = []

    @contextlib.contextmanager
    def copying(copy: Any, runs: Any, ids: Any, slots: Any) -> Iterator[None]:
        """Loads and stores by turns. That they went on all the time, and how fast, stands beside the figure: copies
        that failed would not slow anything down."""
        ending = threading.Event()

        def loads() -> float:
            began, number = time.perf_counter(), 0
            while not ending.is_set():
                copy.load(runs, slots, ids, None)
                copy.store_unhashed(runs, ids, slots, None)
                number += 2
            return number * TOTAL_BYTES / (time.perf_counter() - began)

        with ThreadPoolExecutor(1) as other:
            going = other.submit(loads)
            try:
                time.sleep(0.05)
                yield
            finally:
                ending.set()
            copied.append(going.result())

    for name, ways_name, run in (("slowdown_dma", "DMA", SIZES[0]), ("slowdown_kernel", "kernel", 32 * KIB)):
        number = 1 if run == SIZES[0] else LAYERS
        runs, (ids, slots) = bed.runs(number, run), bed.batch(number * run)
        copied.clear()
        alone, beside = [], []
        for _ in range(5):
            compute()  # clocks and power as after some work, before the one and before the other
            alone.append(compute())
            with copying(ways[ways_name], runs, ids, slots):
                compute()
                beside.append(compute())
        one, other = statistics.median(alone), statistics.median(beside)
        speed = rate(round(statistics.median(copied)), 1.0)
        report.add(name, (other / one - 1) * 100, f"{one:.1f} ms alone, {other:.1f} ms beside copies at {speed}")


def by_length(report: Report) -> Any:
    """What the choice is made of, and the choice."""
    from kvplug.adapters.devices import cuda_check

    found = cuda_check.timings(0)
    for (to_slots, name), seconds in found.items():
        text = ", ".join(
            f"{size // KIB} KiB {rate(cuda_check.MEASURED_BYTES, one)}"
            for size, one in zip(cuda_check.SIZES, seconds, strict=True)
        )
        what = f"{'stores' if to_slots else 'loads'} of {cuda_check.MEASURED_BYTES // MIB} MiB by {name}"
        report.say(f"{what}, by length of the runs: {text}")
    again = [cuda_check.measure(0) for _ in range(3)]
    choice, kernels = again[-1]
    report.say(f"chosen: {choice}, kernel {'works' if kernels else 'DOES NOT WORK'}")
    if len(set(again)) > 1:  # then the choice is noise, and what is measured for it too short
        report.say(f"NOT THE SAME each time: {', '.join(str(one) for one, _ in again)}")
    return choice


def programs(bed: Bed, report: Report) -> None:
    from kvplug.adapters.devices.cuda import CudaCopy
    from kvplug.adapters.devices.kernels import KernelCopies
    from kvplug.adapters.devices.streams import NEVER_DMA

    runs, (ids, slots) = bed.runs(LAYERS, 8 * KIB), bed.batch(LAYERS * 8 * KIB)
    for number in (4, 8, 16, 32, 64):
        copy = CudaCopy(bed.memory, 0, NEVER_DMA)
        copy._kernels = KernelCopies(copy._device, programs=number)
        out, back = timed(
            lambda copy=copy: copy.store_unhashed(runs, ids, slots, None),
            lambda copy=copy: copy.load(runs, slots, ids, None),
        )
        copy.close()
        both = f"store {rate(TOTAL_BYTES, out)}, load {rate(TOTAL_BYTES, back)}"
        report.say(f"kernel with {number} programs, runs of 8 KiB: {both}")


def hashed(slots: Any, nbytes: int, threads: int) -> None:
    """Checksums of slots, by so many threads."""
    from kvplug.shm.copy import hash_batch

    def one(share: Any) -> None:
        hash_batch(share, np.full(len(share), nbytes), np.empty(len(share), np.int64))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, np.array_split(slots, threads)))


def host_side(bed: Bed, ways: dict[str, Any], report: Report) -> None:
    """Pinning, checksums, and the start of an engine."""
    from kvplug.adapters.devices import cuda_check

    driver, seconds = ways["chosen"].driver, []
    spare = mmap.mmap(-1, 8 * SLAB_BYTES)
    memory = np.frombuffer(spare, np.uint8)
    memory[:] = 1
    for slab in range(8):
        began = time.perf_counter()
        _, problem = driver.register(memory.ctypes.data + slab * SLAB_BYTES, SLAB_BYTES)
        seconds.append(time.perf_counter() - began)
        if problem:
            report.say(f"pinning a slab: {problem}")
    for slab in range(8):
        driver.unregister(memory.ctypes.data + slab * SLAB_BYTES)
    report.add("register", statistics.median(seconds) * GIB / SLAB_BYTES * 1e3, "slabs of 64 MiB, pages there")
    _, slots = bed.batch(SIZES[0])
    for threads in (1, 2, 4, 8):
        (taken,) = timed(lambda threads=threads: hashed(slots, SIZES[0], threads))
        report.say(f"checksums of slots by {threads} threads of the host: {rate(TOTAL_BYTES, taken)}")
    began = time.perf_counter()
    cuda_check.start(bed.memory, 0, [bed.runs(LAYERS, 32 * KIB)]).close()
    report.add("start", time.perf_counter() - began, "kernels compiled before")


def main() -> int:
    try:
        import torch
    except ImportError:
        sys.exit("bench-gpu: there is no torch here")
    if not torch.cuda.is_available():
        sys.exit(f"bench-gpu: torch {torch.__version__} finds no CUDA device")
    from kvplug.adapters.devices.cuda import CudaCopy
    from kvplug.adapters.devices.streams import ALWAYS_DMA, NEVER_DMA, Choice

    report, bed = Report(), Bed()
    try:
        choice = by_length(report)
    except Exception as error:  # noqa: BLE001 - the other figures are wanted all the same
        choice = Choice()
        report.say(f"FAILED: {type(error).__name__}: {error}; going on with {choice}")
    ways = {
        "chosen": CudaCopy(bed.memory, 0, choice),
        "kernel": CudaCopy(bed.memory, 0, NEVER_DMA),
        "DMA": CudaCopy(bed.memory, 0, ALWAYS_DMA),
    }
    steps: tuple[Callable[[], Any], ...] = (
        lambda: one_way(bed, ways["chosen"], report),
        lambda: both_ways(bed, ways["chosen"], report),
        lambda: small_runs(bed, ways, report),
        lambda: launches(bed, ways, report),
        lambda: reasons(bed, ways["DMA"], report),
        lambda: slowdown(bed, ways, report),
        lambda: programs(bed, report),
        lambda: host_side(bed, ways, report),
    )
    failed = int(bool(report.lines and report.lines[-1].startswith("FAILED")))
    for step in steps:
        try:
            step()
        except Exception as error:  # noqa: BLE001 - the other figures are wanted all the same
            failed += 1
            report.say(f"FAILED: {type(error).__name__}: {error}")
    for copy in ways.values():
        copy.close()
    where = f"{machine()}; {torch.cuda.get_device_name(0)}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    print("\n" + report.table(where))
    RESULTS.mkdir(exist_ok=True)
    kept = {figure.name: {"measured": measured, "beside": beside} for figure, measured, beside in report.rows}
    (RESULTS / "gpu.json").write_text(json.dumps({"where": where, "figures": kept, "lines": report.lines}, indent=1))
    return int(failed > 0 or any(figure.met(measured) is False for figure, measured, _ in report.rows))


if __name__ == "__main__":
    sys.exit(main())
