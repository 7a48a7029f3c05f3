"""What a device must do for an adapter: fill slot parts from its blocks, and fill its blocks from slot parts.

A *block* of an engine is spread over memory as R byte runs, one per layer (or more, where a layer's page is not
dense). Run r of block b lies at ``base[r] + b * stride[r]`` and is ``nbytes[r]`` long. A slot *part* holds the runs of
one block one after another, without gaps. Nothing here knows what the bytes mean.

Both copies block the calling thread until the bytes have arrived, so they are called from an adapter's own copy
threads, never from an engine's. What orders them against the engine's work is a *mark*: taken on the engine's thread,
it stands for everything that the engine has given its device so far.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class ByteRuns:
    """Where the bytes of a block lie. Three int64 arrays of one length: addresses, strides and lengths in bytes."""

    base: Int64s
    stride: Int64s
    nbytes: Int64s

    @property
    def part_nbytes(self) -> int:
        """Bytes of one block, that is: the size of its slot part."""
        return int(self.nbytes.sum())

    @staticmethod
    def of(runs: list[tuple[int, int, int]]) -> ByteRuns:
        """From (base, stride, nbytes) triples."""
        table = np.array(runs, dtype=np.int64).reshape(-1, 3)
        return ByteRuns(*(np.ascontiguousarray(table[:, i]) for i in range(3)))


class DeviceCopy(ABC):
    """Moves bytes between one engine process's KV memory and the pool's mapping."""

    chunk_bytes = 4 << 20
    """About how much an adapter gives to one store; in between it looks whether the store still stands."""

    @abstractmethod
    def mark(self, also: Any = None) -> Any:
        """A point in the engine's work, taken on the engine's thread: copies given it begin after that work is done.

        ``also``: another stream of the engine's, beside the thread's current one, whose work up to now counts as well.
        """

    @abstractmethod
    def store(self, runs: ByteRuns, block_ids: Int64s, dst: Int64s, after: Any) -> UInt64s:
        """Blocks into slot parts.

        Args:
            runs: where a block's bytes lie.
            block_ids: int64[N].
            dst: int64[N], the address of each block's part in this process's mapping of the pool.
            after: a mark; the copy starts when the work that it stands for is done. None: there is nothing to wait for.

        Returns:
            uint64[N]: XXH3-64 of each part, taken from the bytes that were written.
        """

    @abstractmethod
    def load(self, runs: ByteRuns, src: Int64s, block_ids: Int64s, after: Any) -> None:
        """Slot parts into blocks; the blocks may be used when this returns. Arguments as for :meth:`store`."""

    def describe(self) -> str:
        """One line on how it copies, for the log; empty if there is nothing to say."""
        return ""

    @abstractmethod
    def close(self) -> None:
        """Gives back what the device holds for us. No copy may be running."""
