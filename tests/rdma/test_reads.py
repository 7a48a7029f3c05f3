"""How blocks become READs: every byte once, to its place, never across a region's end or longer than a device reads."""

from __future__ import annotations

import numpy as np
import pytest

from kvplug.rdma.verbs.reads import READ_BYTES, SIGNAL_BYTES, SIGNAL_READS, Plan, plan, split
from kvplug.rdma.verbs.regions import MAX_REGIONS, REGION_BYTES, region_bytes

MIB = 1 << 20
REGIONS = (32 * MIB, 64 * MIB)
LONGEST = 8 * MIB


def array(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def check(planned: Plan, sources: np.ndarray, targets: np.ndarray, nbytes: np.ndarray, regions: tuple[int, int],
          longest: int) -> None:  # fmt: skip
    """What any plan promises."""
    assert (planned.nbytes > 0).all()
    assert planned.nbytes.max() <= min(longest, READ_BYTES)
    for at, size in ((planned.local, regions[0]), (planned.remote, regions[1])):
        assert (at // size == (at + planned.nbytes - 1) // size).all(), "a READ crosses the end of a region"
    assert planned.nbytes.sum() == nbytes.sum()
    assert (planned.ends == np.cumsum(planned.nbytes)).all()
    begins = planned.ends - planned.nbytes
    block = np.searchsorted(planned.block_ends, begins, "right")
    into = begins - (planned.block_ends - nbytes)[block]
    assert (planned.local == targets[block] + into).all()
    assert (planned.remote == sources[block] + into).all()
    for at, n, first in zip(begins, planned.nbytes, block, strict=True):
        last = int(np.searchsorted(planned.block_ends, at + n - 1, "right"))
        for one in range(first, last):  # only neighbours at both ends share a READ
            assert sources[one + 1] == sources[one] + nbytes[one]
            assert targets[one + 1] == targets[one] + nbytes[one]
    assert planned.signalled[-1]
    silent = np.diff(np.concatenate(([-1], np.flatnonzero(planned.signalled))))
    assert silent.max() <= SIGNAL_READS
    ends = np.concatenate(([0], planned.ends[planned.signalled]))
    assert np.diff(ends).max() <= SIGNAL_BYTES + READ_BYTES


@pytest.mark.parametrize("seed", range(20))
def test_any_plan_keeps_its_promises(seed: int) -> None:
    rng = np.random.default_rng(seed)
    regions = tuple(int(x) for x in rng.choice([MIB, 4 * MIB, 32 * MIB], 2))
    longest = int(rng.choice([4096, 100_000, LONGEST]))
    n = int(rng.integers(1, 200))
    nbytes = rng.integers(1, 200_000, n) if seed % 2 else np.full(n, 65536, np.int64)
    sources = np.cumsum(nbytes) - nbytes + int(rng.integers(0, 64 * MIB))
    targets = np.cumsum(nbytes) - nbytes + int(rng.integers(0, 64 * MIB))
    apart = rng.random(n) < 0.3
    sources, targets = sources + np.cumsum(apart) * 4096, targets + np.cumsum(rng.random(n) < 0.3) * 8192
    check(plan(sources, targets, nbytes, regions=regions, longest=longest), sources, targets, nbytes, regions, longest)


def test_neighbours_are_joined_and_others_are_not() -> None:
    nbytes = array(1000, 1000, 1000, 1000)
    planned = plan(array(0, 1000, 2000, 9000), array(50_000, 51_000, 60_000, 61_000), nbytes,
                   regions=REGIONS, longest=LONGEST)  # fmt: skip
    assert planned.nbytes.tolist() == [2000, 1000, 1000]
    assert planned.local.tolist() == [50_000, 60_000, 61_000]
    assert planned.remote.tolist() == [0, 2000, 9000]


def test_a_block_larger_than_the_longest_message_is_split() -> None:
    planned = plan(array(0), array(0), array(10_000), regions=REGIONS, longest=4096)
    assert planned.nbytes.tolist() == [4096, 4096, 1808]


def test_a_region_that_ends_within_a_block_ends_a_read_at_either_end() -> None:
    planned = plan(array(64 * MIB - 10), array(32 * MIB - 30), array(100), regions=REGIONS, longest=LONGEST)
    assert planned.nbytes.tolist() == [10, 20, 70]


def test_blocks_count_as_arrived_once_their_last_read_has_completed() -> None:
    nbytes = array(10, 4096, 10)
    planned = plan(array(0, 100, 9000), array(0, 100, 9000), nbytes, regions=REGIONS, longest=2048)
    assert planned.nbytes.tolist() == [10, 2048, 2048, 10]
    assert [planned.arrived(done) for done in range(5)] == [0, 1, 1, 2, 3]


def test_ranges_are_cut_at_multiples() -> None:
    which, ahead, nbytes = split(array(5, 20, 8), array(10, 10, 1), 10)
    assert which.tolist() == [0, 0, 1, 2]
    assert ahead.tolist() == [0, 5, 0, 0]
    assert nbytes.tolist() == [5, 5, 10, 1]


@pytest.mark.parametrize("pool", [1 << 20, 1 << 36, 1 << 40, 1 << 44])
def test_regions_cover_any_pool_within_what_a_device_has(pool: int) -> None:
    for most in (64, 4096, 1 << 24):
        size = region_bytes(pool, most)
        assert size >= REGION_BYTES
        assert -(-pool // size) <= min(MAX_REGIONS, most // 2)
        assert size == REGION_BYTES or -(-pool // (size // 2)) > min(MAX_REGIONS, most // 2), "smaller ones would do"
