"""Keys, blocks and damage that the tests of the SDK share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kvplug.errors import Code
from kvplug.store import KvStore

MakeStore = Callable[..., KvStore]
BLOCK = 20_000


def some_keys(n: int, seed: int = 1) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n, 32), np.uint8)


def some_blocks(n: int, nbytes: int = BLOCK, seed: int = 2) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n, nbytes), np.uint8)


def flip_a_byte(store: KvStore, key: npt.NDArray[np.uint8], at: int = 777) -> None:
    """Damage a stored block behind the store's back."""
    b = store.pin_batch(key[None])
    assert b.codes[0] == Code.OK
    store.mapping[int(b.offsets[0]) + at] ^= 0xFF
    store.unpin(b.slots)
