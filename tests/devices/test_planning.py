"""What device copies are made of, as plain numbers: descriptors, pieces, groups, choices. No device is needed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from kvplug.adapters.devices.base import ByteRuns
from kvplug.adapters.devices.planning import (
    HostMemory,
    Layout,
    alignment,
    cut,
    descriptors,
    dma_from_bytes,
    groups,
    like,
    signature,
    word_bytes,
)

SLAB = 1 << 20
MEMORY = HostMemory(base=1 << 30, nbytes=8 * SLAB + 4096, first=4096, slab_bytes=SLAB)
SLOT0 = MEMORY.base + MEMORY.first


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def test_descriptors_are_every_run_of_every_block() -> None:
    layout = Layout.of(ByteRuns.of([(1000, 100, 10), (5000, 0, 0), (9000, 64, 6)]))
    near, far, nbytes = descriptors(layout, ints(3, 0), ints(SLOT0, SLOT0 + 640), MEMORY)
    found = sorted(zip(near.tolist(), far.tolist(), nbytes.tolist(), strict=True))
    assert found == [
        (1000, SLOT0 + 640, 10),
        (1300, SLOT0, 10),
        (9000, SLOT0 + 650, 6),
        (9192, SLOT0 + 10, 6),
    ]


def test_neighbours_are_one_range_but_not_over_the_edge_of_a_slab() -> None:
    layout = Layout.of(ByteRuns.of([(0, 4096, 4096)]))
    blocks = np.arange(10, 16)
    slots = MEMORY.slab_address(1) + 4096 * np.arange(-3, 3)
    near, far, nbytes = descriptors(layout, blocks, slots, MEMORY)
    assert near.tolist() == [10 * 4096, 13 * 4096]
    assert far.tolist() == [MEMORY.slab_address(1) - 3 * 4096, MEMORY.slab_address(1)]
    assert nbytes.tolist() == [3 * 4096] * 2
    for apart in (slots[::-1].copy(), slots * 2):
        assert descriptors(layout, blocks, apart, MEMORY)[2].tolist() == [4096] * 6


def test_joined_ranges_cover_the_same_bytes() -> None:
    rng = np.random.default_rng(3)
    layout = Layout.of(ByteRuns.of([(64, 256, 256)]))
    for _ in range(50):
        blocks = np.sort(rng.permutation(40)[: rng.integers(1, 40)])
        slots = SLOT0 + 256 * (blocks if rng.integers(2) else np.sort(rng.permutation(40)[: len(blocks)]))
        near, far, nbytes = descriptors(layout, blocks, slots, MEMORY)
        moved = {
            (a + i, b + i)
            for a, b, n in zip(near.tolist(), far.tolist(), nbytes.tolist(), strict=True)
            for i in range(0, n, 256)
        }
        assert moved == set(zip((64 + blocks * 256).tolist(), slots.tolist(), strict=True))


def test_slabs_are_found_by_address() -> None:
    assert MEMORY.num_slabs == 8
    at = ints(SLOT0, SLOT0 + SLAB - 1, SLOT0 + SLAB, MEMORY.slab_address(7))
    assert MEMORY.slabs_of(at).tolist() == [0, 0, 1, 7]
    assert MEMORY.slabs_of(ints(MEMORY.base))[0] < 0


@pytest.mark.parametrize(("numbers", "word"), [((64, 8), 8), ((64, 4), 4), ((6, 64), 2), ((7, 64), 1), ((), 8)])
def test_the_word_divides_everything(numbers: tuple[int, ...], word: int) -> None:
    assert word_bytes(ints(*numbers)) == word


def test_pieces_are_the_runs_again() -> None:
    rng = np.random.default_rng(5)
    for _ in range(50):
        lengths = rng.integers(0, 5000, rng.integers(1, 6)) * 4
        runs = ByteRuns.of(
            [(i * 1_000_000 + int(rng.integers(99)) * 4, 1 << 20, int(n)) for i, n in enumerate(lengths)]
        )
        layout = Layout.of(runs)
        word = min(alignment(layout), 8)
        pieces = cut(layout, word, 1024)
        base, stride, offset, words = pieces.table
        assert (words * word <= 1024).all()
        assert (words > 0).all()
        assert pieces.lanes >= int(words.max(initial=0))
        assert set(stride.tolist()) <= {1 << 20}
        covered = {
            int(b) + i: int(o) + i for b, o, n in zip(base, offset, words * word, strict=True) for i in range(int(n))
        }
        expected: dict[int, int] = {}
        for b, o, n in zip(layout.runs.base, layout.offset, layout.runs.nbytes, strict=True):
            expected |= {int(b) + i: int(o) + i for i in range(int(n))}
        assert covered == expected
        assert int((words * word).sum()) == runs.part_nbytes


def test_groups_are_the_batch_again() -> None:
    assert groups(10, 4 << 20, 8 << 20) == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8), slice(8, 10)]
    assert groups(5, 100, 10) == [slice(i, i + 1) for i in range(5)]
    assert groups(0, 100, 1000) == []
    few = groups(1000, 1 << 20, 1, most_groups=16)
    assert len(few) <= 16
    assert [i for some in few for i in range(1000)[some]] == list(range(1000))
    assert groups(3, 0, 100) == [slice(0, 3)]


def test_the_copy_engines_get_what_they_are_not_slower_at() -> None:
    sizes = (1000, 2000, 4000)
    assert dma_from_bytes(sizes, (9, 9, 1), (2, 2, 2)) == 4000
    assert dma_from_bytes(sizes, (1, 1, 1), (2, 2, 2)) == 1000
    assert dma_from_bytes(sizes, (9, 9, 9), (2, 2, 2)) == 4001
    assert dma_from_bytes(sizes, (1, 9, 1), (2, 2, 2)) == 4000
    assert dma_from_bytes(sizes, (2.05, 2.05, 2.05), (2, 2, 2)) == 1000


def test_a_scratch_layout_is_aligned_like_the_engines() -> None:
    rng = np.random.default_rng(8)
    for _ in range(50):
        count = int(rng.integers(1, 6))
        lengths = rng.integers(1, 5000, count)
        runs = ByteRuns(rng.integers(1 << 40, 1 << 41, count), lengths + rng.integers(0, 9999, count), lengths)
        scratch, room = like(runs, 5, 1 << 20)
        assert signature(scratch) == signature(runs)
        spans = sorted(
            (int(base) + int(stride) * block, int(n))
            for base, stride, n in zip(scratch.base, scratch.stride, scratch.nbytes, strict=True)
            for block in range(5)
        )
        assert spans[0][0] >= 1 << 20
        assert spans[-1][0] + spans[-1][1] <= (1 << 20) + room
        assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(spans)), "runs overlap"
    assert like(ByteRuns.of([]), 5, 0)[1] == 0
