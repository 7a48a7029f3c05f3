"""What every implementation of the copy interface must do: subclass :class:`Conformance`, give it a ``rig``.

Each check works on fresh random bytes. It compares *all* memory that a copy could reach with what it must be
afterwards, the bytes beside its targets included, and takes that from torch's indexing on the host and from the C
library's XXH3, not from the code on trial. The seed is printed; ``KVPLUG_TEST_SEED`` repeats it.
"""

from __future__ import annotations

import mmap
import os
import random
import threading

import numpy as np
import pytest
import torch
import xxhash

from kvplug.adapters.devices.base import ByteRuns, DeviceCopy
from tests.devices.layouts import NAMES, Built, Layout, Shape, layout_of, narrow, odd_layout, wide

SEED_ENV = "KVPLUG_TEST_SEED"
THREAD_S = 120.0


class Rig:
    """An implementation on trial, with memory on its device and memory that stands for the pool's mapping."""

    def __init__(
        self, copy: DeviceCopy, device: str, *, memory: mmap.mmap, slab_bytes: int, large: bool, many: int = 2048
    ) -> None:
        """
        Args:
            copy: what is on trial.
            device: where the engine's memory is, as torch names it.
            memory: a mapping; slots are cut out of it, and none lies across a multiple of slab_bytes.
            slab_bytes: see memory.
            large: whether runs as long as real models' can be afforded.
            many: blocks of a large batch.
        """
        self.copy = copy
        self.device = device
        self.memory = memory
        self.host = np.frombuffer(memory, np.uint8)
        self.slab_bytes = slab_bytes
        self.large = large
        self.many = many

    def shape(self, itemsize: int, rng: np.random.Generator) -> Shape:
        """Numbers of a model."""
        return wide(itemsize) if self.large and rng.integers(2) else narrow(itemsize)

    def slots(self, part_nbytes: int, count: int, rng: np.random.Generator, shift: int = 0) -> np.ndarray:
        """Offsets of ``count`` parts in the mapping, in any order, ``shift`` bytes behind a multiple of 64."""
        stride = -(-(part_nbytes + 64) // 64) * 64
        in_slab = self.slab_bytes // stride
        at = rng.permutation(self.host.nbytes // self.slab_bytes * in_slab)[:count]
        assert len(at) == count, f"{count} parts of {part_nbytes} bytes do not fit"
        return (at // in_slab * self.slab_bytes + at % in_slab * stride + shift).astype(np.int64)


class Trial:
    """One arena on the device, a mirror of it on the host, and the mapping before the copy."""

    def __init__(self, rig: Rig, layout: Layout, rng: np.random.Generator) -> None:
        self.rig = rig
        self.rng = rng
        self.layout = layout
        self.mirror = rng.integers(0, 256, layout.nbytes, np.uint8)
        self.arena = torch.from_numpy(self.mirror.copy()).to(rig.device)
        self.on_device = layout.build(self.arena)
        self.on_host: Built = layout.build(torch.from_numpy(self.mirror))
        rig.host[:] = np.frombuffer(rng.bytes(rig.host.nbytes), np.uint8)
        self.before = rig.host.copy()

    @property
    def part_nbytes(self) -> int:
        return self.on_device.runs.part_nbytes

    def slots(self, count: int, shift: int = 0) -> np.ndarray:
        """See :meth:`Rig.slots`."""
        return self.rig.slots(self.part_nbytes, count, self.rng, shift)

    def addresses(self, offsets: np.ndarray) -> np.ndarray:
        """Of slots in the mapping."""
        return self.rig.host.ctypes.data + offsets

    def store(self, block_ids: np.ndarray, offsets: np.ndarray) -> None:
        """Blocks to slots, and everything is looked at."""
        after = self.rig.copy.mark()
        hashes = self.rig.copy.store(self.on_device.runs, block_ids, self.addresses(offsets), after)
        expected = [self.on_host.get(int(block)) for block in block_ids]
        for at, content in zip(offsets.tolist(), expected, strict=True):
            self.before[at : at + self.part_nbytes] = content
        self.check()
        assert hashes.dtype == np.uint64
        assert hashes.tolist() == [xxhash.xxh3_64_intdigest(content.tobytes()) for content in expected]

    def load(self, offsets: np.ndarray, block_ids: np.ndarray) -> None:
        """Slots to blocks, and everything is looked at."""
        after = self.rig.copy.mark()
        self.rig.copy.load(self.on_device.runs, self.addresses(offsets), block_ids, after)
        self.expect_loaded(offsets, block_ids)
        self.check()

    def expect_loaded(self, offsets: np.ndarray, block_ids: np.ndarray) -> None:
        """What the arena must be afterwards."""
        for at, block in zip(offsets.tolist(), block_ids.tolist(), strict=True):
            self.on_host.put(block, self.rig.host[at : at + self.part_nbytes])

    def check(self) -> None:
        """Every byte of the arena and of the mapping is what it must be."""
        _same(self.arena.cpu().numpy(), self.mirror, f"{self.layout.name}: the device's memory")
        _same(self.rig.host, self.before, f"{self.layout.name}: the mapping")


def _same(found: np.ndarray, expected: np.ndarray, where: str) -> None:
    if not np.array_equal(found, expected):
        wrong = np.flatnonzero(found != expected)
        raise AssertionError(f"{where} has {len(wrong)} wrong bytes, from {int(wrong[0])} to {int(wrong[-1])}")


def any_blocks(layout: Layout, rng: np.random.Generator, *, repeats: bool) -> np.ndarray:
    """Block ids, int64[N]; where they are only read the same one may come twice."""
    count = int(rng.integers(1, layout.num_blocks + 1))
    if repeats:
        return rng.integers(0, layout.num_blocks, count)
    return rng.permutation(layout.num_blocks)[:count].astype(np.int64)


def fresh_rng() -> np.random.Generator:
    """Seeded anew, and the seed said."""
    seed = int(os.environ.get(SEED_ENV) or random.SystemRandom().getrandbits(32))
    print(f"{SEED_ENV}={seed}")
    return np.random.default_rng(seed)


class Conformance:
    """One promise each. ``rig`` is a fixture of the subclass's."""

    @pytest.fixture
    def rng(self) -> np.random.Generator:
        return fresh_rng()

    @pytest.fixture(params=[1, 2, 4, 8], ids=lambda itemsize: f"{itemsize} byte")
    def itemsize(self, request: pytest.FixtureRequest) -> int:
        return int(request.param)

    @pytest.mark.parametrize("name", NAMES)
    def test_stores_the_bytes_of_blocks_and_nothing_else(
        self, rig: Rig, rng: np.random.Generator, name: str, itemsize: int
    ) -> None:
        trial = Trial(rig, layout_of(name, rig.shape(itemsize, rng)), rng)
        blocks = any_blocks(trial.layout, rng, repeats=True)
        trial.store(blocks, trial.slots(len(blocks)))

    @pytest.mark.parametrize("name", NAMES)
    def test_loads_slots_into_blocks_and_nothing_else(
        self, rig: Rig, rng: np.random.Generator, name: str, itemsize: int
    ) -> None:
        trial = Trial(rig, layout_of(name, rig.shape(itemsize, rng)), rng)
        blocks = any_blocks(trial.layout, rng, repeats=False)
        slots = trial.slots(len(blocks))
        trial.load(slots[rng.integers(0, len(slots), len(slots))], blocks)  # one slot may fill several blocks

    @pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("sglang")])
    def test_loads_layer_by_layer(self, rig: Rig, rng: np.random.Generator, name: str, itemsize: int) -> None:
        trial = Trial(rig, layout_of(name, rig.shape(itemsize, rng)), rng)
        blocks = any_blocks(trial.layout, rng, repeats=False)
        slots = trial.slots(len(blocks))
        pool = trial.on_device.pool
        assert pool is not None
        after = rig.copy.mark()
        for layer in pool.layers:
            if layer is not None:
                rig.copy.load(layer.runs, trial.addresses(slots) + layer.offset, blocks, after)
        trial.expect_loaded(slots, blocks)
        trial.check()

    @pytest.mark.parametrize("turn", range(6))
    def test_runs_of_any_length_at_any_address(self, rig: Rig, rng: np.random.Generator, turn: int) -> None:
        trial = Trial(rig, odd_layout(rng, 100_000 if rig.large else 3000), rng)
        for _ in range(2):
            shift = int(rng.integers(0, 64))
            blocks = any_blocks(trial.layout, rng, repeats=True)
            trial.store(blocks, trial.slots(len(blocks), shift))
            blocks = any_blocks(trial.layout, rng, repeats=False)
            trial.load(trial.slots(len(blocks), shift), blocks)

    def test_what_was_stored_comes_back_in_other_blocks(self, rig: Rig, rng: np.random.Generator) -> None:
        for name in rng.permutation(NAMES)[:3].tolist():
            trial = Trial(rig, layout_of(name, rig.shape(2, rng)), rng)
            blocks = rng.permutation(trial.layout.num_blocks)
            half = len(blocks) // 2
            slots = trial.slots(half)
            trial.store(blocks[:half], slots)
            trial.load(slots, blocks[half : 2 * half])

    def test_an_empty_batch_does_nothing(self, rig: Rig, rng: np.random.Generator) -> None:
        trial = Trial(rig, layout_of(NAMES[0], narrow(2)), rng)
        none = np.empty(0, np.int64)
        trial.store(none, none)
        trial.load(none, none)

    def test_a_part_without_runs_is_empty(self, rig: Rig, rng: np.random.Generator) -> None:
        trial = Trial(rig, layout_of(NAMES[0], narrow(2)), rng)
        slots = trial.addresses(trial.slots(2))
        ids = np.array([1, 2])
        hashes = rig.copy.store(ByteRuns.of([]), ids, slots, rig.copy.mark())
        rig.copy.load(ByteRuns.of([]), slots, ids, rig.copy.mark())
        trial.check()
        assert hashes.tolist() == [xxhash.xxh3_64_intdigest(b"")] * 2

    def test_a_large_batch(self, rig: Rig, rng: np.random.Generator) -> None:
        some = narrow(2)
        shape = Shape(rig.many, some.layers, some.tokens, some.heads, some.width, some.dtype)
        trial = Trial(rig, layout_of("vllm: keys apart from values", shape), rng)
        blocks = rng.permutation(rig.many).astype(np.int64)
        trial.store(blocks, trial.slots(len(blocks)))
        trial.load(trial.slots(len(blocks)), blocks)

    def test_blocks_and_slots_side_by_side(self, rig: Rig, rng: np.random.Generator) -> None:
        """Runs that could be joined to longer ones, over the edges of slabs too, carry each its own bytes."""
        trial = Trial(rig, layout_of("vllm: all layers in one block", rig.shape(4, rng)), rng)
        blocks = np.arange(trial.layout.num_blocks)
        part = trial.part_nbytes
        assert part % 64 == 0
        per_slab = rig.slab_bytes // part
        first = max(0, per_slab - len(blocks) // 2)
        at = first + blocks
        slots = at // per_slab * rig.slab_bytes + at % per_slab * part
        trial.store(blocks, slots)
        trial.store(blocks[::-1].copy(), slots)
        trial.load(slots, blocks)

    def test_layouts_by_turns(self, rig: Rig, rng: np.random.Generator) -> None:
        """What an implementation keeps of one layout never serves another, though it may lie where that one lay."""
        for turn in range(12):
            trial = Trial(rig, layout_of(NAMES[turn % 2 * 6], narrow(int(rng.choice([1, 2, 4])))), rng)
            blocks = any_blocks(trial.layout, rng, repeats=False)
            slots = trial.slots(len(blocks))
            trial.store(blocks, slots)
            trial.load(slots, blocks[::-1].copy())
            del trial

    def test_a_store_and_a_load_at_once(self, rig: Rig, rng: np.random.Generator) -> None:
        """From two threads, as adapters do, on blocks and slots of their own."""
        trial = Trial(rig, layout_of("vllm: keys apart from values", rig.shape(2, rng)), rng)
        blocks = rng.permutation(trial.layout.num_blocks)
        half = len(blocks) // 2
        out, back = blocks[:half], blocks[half : 2 * half]
        slots = trial.slots(2 * half)
        errors: list[BaseException] = []

        def stores() -> None:
            try:
                for _ in range(10):
                    rig.copy.store(trial.on_device.runs, out, trial.addresses(slots[:half]), after)
            except BaseException as error:  # noqa: BLE001 - told to the test
                errors.append(error)

        after = rig.copy.mark()
        thread = threading.Thread(target=stores)
        thread.start()
        for _ in range(10):
            rig.copy.load(trial.on_device.runs, trial.addresses(slots[half:]), back, after)
        thread.join(THREAD_S)
        assert not thread.is_alive()
        assert not errors, errors
        for at, block in zip(slots[:half].tolist(), out.tolist(), strict=True):
            trial.before[at : at + trial.part_nbytes] = trial.on_host.get(block)
        trial.expect_loaded(slots[half:], back)
        trial.check()
