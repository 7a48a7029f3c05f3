"""CUDA's copies on a real GPU: ``just test-gpu``. Skipped where there is none."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kvplug import config as configuration  # noqa: E402
from kvplug.adapters.devices import cuda_check, for_device  # noqa: E402
from kvplug.adapters.devices.cuda import CudaCopy  # noqa: E402
from kvplug.adapters.devices.planning import HostMemory  # noqa: E402
from kvplug.adapters.devices.streams import ALWAYS_DMA, NEVER_DMA, Choice  # noqa: E402
from kvplug.errors import Code, DeviceCopyError  # noqa: E402
from kvplug.store import KvStore  # noqa: E402
from tests.devices.conformance import Conformance, Rig, Trial, fresh_rng  # noqa: E402
from tests.devices.layouts import NAMES, layout_of, narrow, wide  # noqa: E402
from tests.devices.races import Race, without_waits  # noqa: E402
from tests.lab.env import temporary_pool  # noqa: E402

pytestmark = pytest.mark.gpu

MAPPING_BYTES = 16 << 20
SLAB_BYTES = 2 << 20
WAYS: dict[str, dict[str, Any]] = {
    "copy engines": {"choice": ALWAYS_DMA},
    "kernel": {"choice": NEVER_DMA},
    "both": {"choice": Choice(16 << 10, 8 << 10)},
    "ring": {"choice": Choice(16 << 10, 8 << 10), "pin": False},
}
RACE_ROUNDS = 1000
BLIND_ROUNDS = 50


def memory_of(mapping: mmap.mmap) -> HostMemory:
    address = np.frombuffer(mapping, np.uint8).ctypes.data
    return HostMemory(address, len(mapping), 0, SLAB_BYTES)


def rig_of(**how: Any) -> Rig:
    mapping = mmap.mmap(-1, MAPPING_BYTES)
    copy = CudaCopy(memory_of(mapping), 0, **how)
    if how["choice"] is NEVER_DMA:
        assert copy.kernels is not None, "no Triton here, or no way for a kernel to reach host memory"
    return Rig(copy, "cuda", memory=mapping, slab_bytes=SLAB_BYTES, large=True)


@pytest.fixture(scope="module", params=WAYS)
def made(request: pytest.FixtureRequest) -> Iterator[Rig]:
    rig = rig_of(**WAYS[request.param])
    yield rig
    rig.copy.close()


class TestCuda(Conformance):
    @pytest.fixture
    def rig(self, made: Rig) -> Rig:
        return made


@pytest.fixture
def new_rig() -> Iterator[Callable[..., Rig]]:
    """Makes rigs, and closes them also where a test fails: a mapping that goes away while it is registered leaves its
    addresses registered for pages that are no longer there, and the tests after it fail for that."""
    with contextlib.ExitStack() as rigs:

        def make(**how: Any) -> Rig:
            rig = rig_of(**how)
            rigs.callback(rig.copy.close)
            return rig

        yield make


@pytest.mark.timeout(300)
@pytest.mark.parametrize("run_bytes", [512, 64 << 10])
@pytest.mark.parametrize("way", ["copy engines", "kernel", "ring"])
def test_compute_and_copies_on_their_streams_keep_their_order(
    new_rig: Callable[..., Rig], way: str, run_bytes: int
) -> None:
    out = Race(new_rig(**WAYS[way]), run_bytes).run(RACE_ROUNDS)
    assert out.wrong == 0, out
    assert out.rounds == RACE_ROUNDS


@pytest.mark.timeout(300)
def test_the_order_holds_for_work_out_of_a_graph(new_rig: Callable[..., Rig]) -> None:
    graph = torch.cuda.CUDAGraph()
    captured: list[Any] = []

    def compute(work: Any) -> None:
        if not captured:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                work()  # nothing is loaded for the first time while it is captured
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph):
                work()
            captured.append(graph)
        graph.replay()

    out = Race(new_rig(**WAYS["both"]), 4096, compute=compute).run(RACE_ROUNDS)
    assert out.wrong == 0, out


@pytest.mark.timeout(300)
@pytest.mark.parametrize("way", ["copy engines", "kernel"])
def test_without_the_waits_the_race_is_lost(new_rig: Callable[..., Rig], way: str) -> None:
    """Else the two tests before this one would show nothing."""
    rig = new_rig(**WAYS[way])
    rig.copy = without_waits(rig.copy)
    out = Race(rig, 4096).run(BLIND_ROUNDS)
    torch.cuda.synchronize()
    assert not out.errors, out
    assert out.stale_stores > 0, out
    assert out.overtaken_reads > 0, out


def test_a_mark_counts_another_stream_too(new_rig: Callable[..., Rig]) -> None:
    rig, rng = new_rig(**WAYS["copy engines"]), fresh_rng()
    trial = Trial(rig, layout_of(NAMES[0], wide(2)), rng)
    other = torch.cuda.Stream()
    content = torch.from_numpy(rng.integers(0, 256, trial.layout.nbytes, np.uint8))
    later = content.cuda()
    torch.cuda.synchronize()
    with torch.cuda.stream(other):
        torch.cuda._sleep(40_000_000)
        trial.arena.copy_(later)
    slots = trial.slots(4)
    rig.copy.store(trial.on_device.runs, np.arange(4), trial.addresses(slots), rig.copy.mark(other))
    written = trial.layout.build(content)
    for at, block in zip(slots.tolist(), range(4), strict=True):
        assert np.array_equal(rig.host[at : at + trial.part_nbytes], written.get(block))


def test_what_is_made_in_an_engines_modes_copies_outside_of_them(new_rig: Callable[..., Rig]) -> None:
    """Engines compute in inference mode and build models with the device as the default; copy threads do neither."""
    with torch.inference_mode(), torch.device("cuda"):
        rig = new_rig(**WAYS["kernel"])
    trial = Trial(rig, layout_of(NAMES[0], narrow(2)), fresh_rng())
    slots = trial.slots(4)
    trial.store(np.arange(4), slots)
    trial.load(slots, np.arange(4, 8))


def test_slabs_are_pinned_when_used_and_given_back() -> None:
    mapping = mmap.mmap(-1, MAPPING_BYTES)
    for _ in range(2):  # the second time fails if the first gave nothing back
        with contextlib.closing(CudaCopy(memory_of(mapping), 0)) as copy:
            rig, rng = Rig(copy, "cuda", memory=mapping, slab_bytes=SLAB_BYTES, large=True), fresh_rng()
            trial = Trial(rig, layout_of(NAMES[0], wide(2)), rng)
            assert copy.pins.counts == (0, 0)
            slots = np.sort(trial.slots(50))[:2]
            trial.store(np.arange(2), slots)
            used = len(set((slots // SLAB_BYTES).tolist()))
            assert copy.pins.counts == (used, 0), copy.pins.refusal
            assert mapping_is_registered(copy, memory_of(mapping), int(slots[0]) // SLAB_BYTES)


def mapping_is_registered(copy: CudaCopy, memory: HostMemory, slab: int) -> bool:
    """The driver refuses to register a range twice, which is told apart from ours."""
    ours, problem = copy.driver.register(memory.slab_address(slab), SLAB_BYTES)
    return not ours and not problem


LAYOUTS = ["vllm: keys apart from values", "vllm: all layers in one block", "sglang: layer first"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_from_a_real_pool_and_back_by_what_an_engine_would_get(name: str) -> None:
    """Measured and checked at start; stored, sealed, found by key, loaded into other blocks."""
    rng = fresh_rng()
    layout = layout_of(name, wide(2))
    content = rng.integers(0, 256, layout.nbytes, np.uint8)
    arena, on_host = torch.from_numpy(content).cuda(), layout.build(torch.from_numpy(content))
    runs = layout.build(arena).runs
    keys = rng.integers(0, 256, (8, 32), np.uint8)
    with contextlib.ExitStack() as ends:
        pool = ends.enter_context(temporary_pool("gpu"))
        settings = configuration.load(pool=pool, size="256mib", cuda="on", verify="always")
        store = ends.enter_context(contextlib.closing(KvStore(config=settings)))
        copy = for_device(str(arena.device), store, [runs])
        ends.callback(copy.close)  # before the pool is unmapped
        assert isinstance(copy, CudaCopy)
        print(copy.describe())
        batch = store.reserve_batch(keys, [runs.part_nbytes])
        assert (batch.codes == Code.OK).all()
        sums = copy.store(runs, np.arange(8), store.base_address + batch.offsets, copy.mark())
        assert (store.complete(batch.slots, batch.gens, 0, sums) == Code.OK).all()
        store.check_integrity(deep=True)
        out = [np.empty(runs.part_nbytes, np.uint8) for _ in keys]
        assert (store.get_into(keys, out) == Code.OK).all()
        for block, got in enumerate(out):
            assert np.array_equal(got, on_host.get(block))
        pinned = store.pin_batch(keys)
        copy.load(runs, store.base_address + pinned.offsets, np.arange(16, 24), copy.mark())
        store.unpin(pinned.slots)
        back = layout.build(arena.cpu())
        for block in range(8):
            assert np.array_equal(back.get(16 + block), on_host.get(block))
        assert copy.pins.counts[0] > 0, copy.pins.refusal


def test_the_check_at_start_notices_copies_that_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of(NAMES[0], wide(2))
    arena = torch.zeros(layout.nbytes, dtype=torch.uint8, device="cuda")
    runs = layout.build(arena).runs
    cuda_check.check(0, [runs], ALWAYS_DMA)
    right = CudaCopy._launch

    def short(
        self: Any, lane: Any, plan: Any, ids: Any, addresses: Any, memory: Any, to_slots: bool, some: slice
    ) -> Any:
        return right(self, lane, plan, ids, addresses, memory, to_slots, slice(some.start, some.stop - 1))

    monkeypatch.setattr(CudaCopy, "_launch", short)
    with pytest.raises(DeviceCopyError, match="differs in"):
        cuda_check.check(0, [runs], ALWAYS_DMA)


def test_an_error_on_the_way_is_typed_and_the_next_copy_works(
    new_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, rng = new_rig(**WAYS["copy engines"]), fresh_rng()
    trial = Trial(rig, layout_of(NAMES[0], wide(2)), rng)
    blocks = np.arange(4)

    def fails(*given: Any) -> None:
        raise RuntimeError("the driver said no")

    with monkeypatch.context() as broken:
        broken.setattr(rig.copy.driver, "copy_batch", fails)
        with pytest.raises(DeviceCopyError, match=r"4 blocks into slots.*said no"):
            trial.store(blocks, trial.slots(4))
    trial.store(blocks, trial.slots(4))
    trial.load(trial.slots(4), blocks)
