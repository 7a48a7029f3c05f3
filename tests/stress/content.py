"""Blocks that say what they should hold: every word depends on the key and on its place.

A block that is another's, half another's, or half old has words that no key explains; checking one costs microseconds.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from blake3 import blake3

U64 = npt.NDArray[np.uint64]
SIZES = (16 * 1024, 40 * 1024, 96 * 1024, 768 * 1024)
"""Bytes of a block: four size classes, two of which leave a slab with a remainder."""
PARTS = (24 * 1024, 24 * 1024 - 64)
"""Bytes of the parts of a block that two processes write."""
NAMES_PER_SIZE = 160
HOT_NAMES = 6
GROUP = 3
"""Blocks that leave the pool together."""
GROUP_BYTES = SIZES[0]
GROUPS = 60
GARBAGE = 0xDEAD_BEEF_DEAD_BEEF
_ODD = np.uint64(0x9E37_79B9_7F4A_7C15)


def key(kind: str, number: int, size: int) -> bytes:
    """The key of a block: 32 bytes."""
    return blake3(f"{kind}:{number}:{size}".encode()).digest()


def sibling(kind: str, number: int, index: int) -> bytes:
    """The key of one of the blocks of a group: those of a group differ in byte 30 only."""
    name = key(kind, number, GROUP_BYTES)
    return name[:30] + bytes([name[30] ^ index]) + name[31:]


def words(name: bytes, nbytes: int) -> U64:
    """What the block with this key holds."""
    seed = np.frombuffer(name, np.uint64)
    out: U64 = np.arange(nbytes // 8, dtype=np.uint64)
    out *= _ODD
    out += seed[0]
    out ^= seed[1] ^ seed[3]
    return out


def difference(name: bytes, got: U64) -> str:
    """Empty if ``got`` is the block's content, else what is wrong with it, in words."""
    want = words(name, got.nbytes)
    wrong = np.flatnonzero(want != got)
    if not len(wrong):
        return ""
    garbage = int((got[wrong] == np.uint64(GARBAGE)).sum())
    where = f"from word {int(wrong[0])} on ({garbage} of a late writer) in {name.hex()[:12]}"
    return f"{len(wrong)} of {len(got)} words differ {where}"
