"""XXH3 in compiled code against the reference implementation (PyPI `xxhash`): same bits for every input."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from kvplug.shm.xxh3 import BLOCK_BYTES, wrap_add, wrap_mul, xxh3_64
from tests.kernels import NUMBA_ONLY

pytestmark = NUMBA_ONLY
MASK = (1 << 64) - 1
SEED = 20261124


@pytest.fixture(scope="module")
def data() -> npt.NDArray[np.uint8]:
    return np.random.default_rng(SEED).integers(0, 256, (4 << 20) + 64, dtype=np.uint8)


def ours(part: npt.NDArray[np.uint8]) -> int:
    return int(xxh3_64(part.ctypes.data, part.nbytes)) & MASK


def theirs(part: npt.NDArray[np.uint8]) -> int:
    return int(xxhash.xxh3_64_intdigest(part.tobytes()))


def test_every_length_up_to_two_blocks_gives_the_reference_hash(data: npt.NDArray[np.uint8]) -> None:
    wrong = [n for n in range(2 * BLOCK_BYTES + 64) if ours(data[:n]) != theirs(data[:n])]
    assert wrong == []


@pytest.mark.parametrize("fill", [0x00, 0x7F, 0x80, 0xFF])
def test_bytes_of_one_value_give_the_reference_hash(fill: int) -> None:
    # all ones and all zeros are where a signed product or shift would show
    data = np.full(5000, fill, np.uint8)
    wrong = [n for n in (*range(300), 1023, 1024, 1025, 4096, 5000) if ours(data[:n]) != theirs(data[:n])]
    assert wrong == []


@settings(deadline=None)
@given(start=st.integers(0, 63), nbytes=st.integers(0, 4 << 20))
def test_any_length_at_any_alignment_gives_the_reference_hash(start: int, nbytes: int) -> None:
    data = np.random.default_rng(SEED).integers(0, 256, start + nbytes, dtype=np.uint8)
    assert ours(data[start:]) == theirs(data[start:])


@settings(deadline=None)
@given(content=st.binary(max_size=3000))
def test_any_content_gives_the_reference_hash(content: bytes) -> None:
    data = np.frombuffer(content, np.uint8)
    assert ours(data) == theirs(data)


def test_one_changed_bit_anywhere_changes_the_hash(data: npt.NDArray[np.uint8]) -> None:
    part = data[: 3 * BLOCK_BYTES + 17].copy()
    before = ours(part)
    for at in range(part.nbytes):
        part[at] ^= 1 << (at % 8)
        assert ours(part) != before, f"byte {at}"
        part[at] ^= 1 << (at % 8)
    assert ours(part) == before


@njit
def _wrapped(left: int, right: int) -> tuple[int, int]:
    return wrap_add(left, right), wrap_mul(left, right)


@given(left=st.integers(-(1 << 63), (1 << 63) - 1), right=st.integers(-(1 << 63), (1 << 63) - 1))
def test_wrapping_arithmetic_is_modulo_2_to_the_64(left: int, right: int) -> None:
    total, product = _wrapped(left, right)
    assert total & MASK == (left + right) & MASK
    assert product & MASK == (left * right) & MASK
