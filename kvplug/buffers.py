"""Addresses of the buffers that a caller hands in, checked before anything is done with them."""

from __future__ import annotations

import builtins
import ctypes
import functools
import operator
import re
import sys
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from kvplug.errors import BufferError
from kvplug.shm.jit import warm_up
from kvplug.shm.layout import SIZE_MASK
from kvplug.shm.objects import C_CONTIGUOUS, HEAD_BYTES, READ_BYTES, WRITEABLE, array_addresses

I64 = npt.NDArray[np.int64]
MAX_ADDRESS = 1 << 57
"""Beyond what any 64-bit Linux gives to a process; below what int64 can hold."""
_INT64 = np.dtype(np.int64)
_ONE_EACH = np.arange(4097)
_nbytes = operator.attrgetter("nbytes")
_is_cpu = operator.attrgetter("is_cpu")
_dtype = operator.attrgetter("dtype")
_MEMBER_NAMES = re.compile(r":[^:]*:")  # of a structure, in the format of a buffer


def addresses(buffers: Any, n: int, *, writable: bool) -> tuple[I64, I64, Any]:
    """(addresses int64[N], bytes int64[N], what keeps them alive) of ``n`` buffers.

    ``buffers`` is an array or CPU tensor whose first dimension has length N, or a sequence of N objects with the
    buffer protocol, numpy arrays or CPU tensors. Raises BufferError for a wrong number, a buffer that is not
    contiguous, empty, on another device, or read-only although it would be written to, and for one whose elements are
    references to Python objects: their addresses mean nothing in another process, and written over they end this one.
    """
    if type(buffers) is list or type(buffers) is tuple:
        if quick := _of_one_kind(tuple(buffers), n, writable):
            return quick
    else:
        array = _as_array(buffers)
        if array is not None and array.ndim >= 2:
            return _rows_of(array, n, writable)
    if not isinstance(buffers, Sequence) or isinstance(buffers, (bytes, bytearray, memoryview)):
        raise BufferError(
            f"buffers must be a sequence of {n} buffers or an array of shape ({n}, …), not {type(buffers).__name__}"
        )
    if len(buffers) != n:
        raise BufferError(f"{len(buffers)} buffers were given for {n} keys")
    out = np.empty((2, n), np.int64)
    keep = []
    for i, buffer in enumerate(buffers):
        out[0, i], out[1, i], alive = _one(buffer, i, writable)
        keep.append(alive)
    return out[0], out[1], keep


@functools.cache
def _objects_are_as_expected() -> bool:
    """Whether array objects of this interpreter and numpy look as :mod:`kvplug.shm.objects` has it."""
    if sys.implementation.name != "cpython" or np.ndarray.__basicsize__ < READ_BYTES:
        return False
    warm_up()
    plain, frozen, strided = np.zeros(3, np.uint8), np.zeros((2, 2)), np.zeros((4, 4))[:, ::2]
    frozen.flags.writeable = False
    found = np.zeros(1, np.int64)
    for array in (plain, frozen, strided, strided.T.copy()):
        ids = np.array([id(array)])
        for flags, has in ((C_CONTIGUOUS, array.flags.c_contiguous), (WRITEABLE, array.flags.writeable)):
            if (array_addresses(ids, np.ones(1, np.int64), flags, found) < 0) != has:
                return False
        if array_addresses(ids, np.ones(1, np.int64), 0, found) >= 0 or found[0] != array.ctypes.data:
            return False
    return True


def _of_one_kind(buffers: tuple[Any, ...], n: int, writable: bool) -> tuple[I64, I64, Any] | None:
    """Arrays only, or tensors only, without a Python statement for each. None: mixed, or one is not as it should be."""
    kinds = set(map(type, buffers))
    if len(kinds) != 1 or len(buffers) != n:
        return None
    kind: Any = kinds.pop()
    if kind is np.ndarray:
        if not _objects_are_as_expected() or any(kind.hasobject for kind in set(map(_dtype, buffers))):
            return None
        nbytes = np.fromiter(map(_nbytes, buffers), _INT64, n)
        out = np.empty(n, _INT64)
        if n == 1:  # the call of a kernel would cost more
            have = buffers[0].flags
            if not have.c_contiguous or (writable and not have.writeable) or not nbytes[0]:
                return None
            out[0] = ctypes.c_int64.from_address(id(buffers[0]) + HEAD_BYTES).value
            return out, nbytes, buffers
        flags = C_CONTIGUOUS | WRITEABLE if writable else C_CONTIGUOUS
        if array_addresses(np.fromiter(map(id, buffers), _INT64, n), nbytes, flags, out) >= 0:
            return None
        return out, nbytes, buffers
    if not (hasattr(kind, "data_ptr") and hasattr(kind, "untyped_storage")):
        return None
    if not (all(map(_is_cpu, buffers)) and all(map(kind.is_contiguous, buffers))):
        return None
    nbytes = np.fromiter(map(_nbytes, buffers), _INT64, n)
    if int(nbytes.min()) <= 0:
        return None
    return np.fromiter(map(kind.data_ptr, buffers), _INT64, n), nbytes, buffers


def _address(array: npt.NDArray[Any]) -> int:
    if _objects_are_as_expected():
        return ctypes.c_int64.from_address(id(array) + HEAD_BYTES).value
    return int(array.ctypes.data)


def _as_array(buffer: Any) -> npt.NDArray[Any] | None:
    """A numpy view of an array or tensor, None for anything else. Imports no torch unless it was given a tensor."""
    if isinstance(buffer, np.ndarray):
        return buffer
    if hasattr(buffer, "data_ptr") and hasattr(buffer, "untyped_storage"):
        if buffer.device.type != "cpu":
            raise BufferError(f"a tensor on device {buffer.device} was given; the store takes CPU memory only")
        if not buffer.is_contiguous():
            raise BufferError(f"a tensor of shape {tuple(buffer.shape)} is not contiguous; give tensor.contiguous()")
        detached = buffer.detach()
        # bfloat16 and the 8-bit floats have no numpy type: look at the bytes.
        import torch

        flat: npt.NDArray[Any] = (
            detached.view(torch.uint8).numpy() if detached.ndim else detached.reshape(1).view(torch.uint8).numpy()
        )
        return flat
    return None


def _refuse_references(dtype: np.dtype[Any], what: str) -> None:
    if dtype.hasobject:
        raise BufferError(f"{what} of dtype {dtype} holds references to Python objects, not bytes that can be stored")


def _rows_of(array: npt.NDArray[Any], n: int, writable: bool) -> tuple[I64, I64, Any]:
    _refuse_references(array.dtype, "an array")
    if array.shape[0] != n:
        raise BufferError(f"an array with {array.shape[0]} rows was given for {n} keys")
    if writable and not array.flags.writeable:
        raise BufferError("a read-only array was given to be written to")
    if n == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64), array
    stride = array.strides[0]
    nbytes = array.nbytes // n
    if not array.flags.c_contiguous and (not array[0].flags.c_contiguous or stride <= 0):
        raise BufferError(f"rows of an array of shape {array.shape}, strides {array.strides} are not contiguous")
    if nbytes == 0:
        raise BufferError(f"rows of an array of shape {array.shape} are empty")
    sizes = np.empty(n, _INT64)
    sizes.fill(nbytes)
    base = _address(array)
    if n == 1:  # numpy lets the stride of one row be anything
        return np.fromiter((base,), _INT64, 1), sizes, array
    return np.arange(base, base + n * stride, stride, dtype=_INT64), sizes, array


def _one(buffer: Any, i: int, writable: bool) -> tuple[int, int, Any]:
    array = _as_array(buffer)
    if array is None:
        try:
            if "O" in _MEMBER_NAMES.sub("", memoryview(buffer).format):
                raise TypeError("it holds references to Python objects, not bytes that can be stored")
            array = np.frombuffer(buffer, np.uint8)
        except (TypeError, ValueError, AttributeError, builtins.BufferError) as e:
            raise BufferError(f"buffer {i} of type {type(buffer).__name__} can't be used: {e}") from e
    _refuse_references(array.dtype, f"buffer {i}")
    if not array.flags.c_contiguous:
        raise BufferError(f"buffer {i} (shape {array.shape}, strides {array.strides}) is not contiguous")
    if writable and not array.flags.writeable:
        raise BufferError(f"buffer {i} is read-only and would be written to")
    if array.nbytes == 0:
        raise BufferError(f"buffer {i} is empty")
    return _address(array), array.nbytes, array


class RegisteredRanges:
    """Memory that the caller has vouched for by ``register_buffer``: raw addresses are taken from nowhere else."""

    def __init__(self) -> None:
        self._ends: dict[int, int] = {}
        """By first address. Changed by one instruction each time: threads and signal handlers may come between."""
        self._sorted: tuple[dict[int, int], I64, I64] = ({}, np.empty(0, np.int64), np.empty(0, np.int64))

    def add(self, addr: int, nbytes: int) -> None:
        """Vouch for ``nbytes`` bytes at ``addr``; once more: what counts is what was said last. Raises BufferError."""
        said = f"register_buffer({addr!r:.40}, {nbytes!r:.40})"
        if not (is_whole(addr) and is_whole(nbytes)):
            raise BufferError(f"{said}: address and length must be integers")
        if addr <= 0 or nbytes <= 0:
            raise BufferError(f"{said}: address and length must be positive")
        if int(addr) + int(nbytes) > MAX_ADDRESS:
            raise BufferError(f"{said}: no memory of a process reaches so far")
        self._ends[int(addr)] = int(addr) + int(nbytes)

    def remove(self, addr: int) -> None:
        """Withdraw what was registered at this address. Raises BufferError if nothing was."""
        if not is_whole(addr) or self._ends.pop(int(addr), None) is None:
            raise BufferError(f"unregister_buffer({addr!r:.40}): nothing is registered there")

    def check(self, addrs: I64, nbytes: I64) -> None:
        """Raises BufferError naming the first fragment that is outside of every registered range."""
        if not len(addrs):
            return
        known, starts, reach = self._sorted
        if known != self._ends:
            known = dict(self._ends)
            starts = np.array(sorted(known), np.int64)
            reach = np.maximum.accumulate(np.array([known[start] for start in starts.tolist()], np.int64))
            self._sorted = known, starts, reach
        inside = nbytes == 0  # of nothing there is nothing to vouch for
        if len(starts):
            at = np.searchsorted(starts, addrs, side="right") - 1
            inside |= (at >= 0) & (addrs + nbytes <= reach[np.maximum(at, 0)]) & (nbytes >= 0)
        if not inside.all():
            bad = int(np.flatnonzero(~inside)[0])
            raise BufferError(
                f"fragment {bad} ({int(nbytes[bad])} bytes at {int(addrs[bad]):#x}) is not inside a registered buffer; "
                f"call register_buffer first"
            )


def is_whole(value: Any) -> bool:
    """Whether it is an integer, Python's or numpy's; True and False are none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def one_each(n: int) -> I64:
    """Offsets, ``n`` + 1 or more, of blocks that have one fragment each: a slice would cost more than it is worth."""
    return _ONE_EACH if n < len(_ONE_EACH) else np.arange(n + 1)


def equal_fragments(addrs: Any, nbytes: Any, n: int) -> tuple[I64, I64, I64]:
    """The same as :func:`fragments` for F fragments each: addrs (N, F), nbytes (N, F) or (F,), arrays of integers."""
    try:
        at, sizes = np.asarray(addrs), np.asarray(nbytes)
    except (TypeError, ValueError, OverflowError) as e:
        raise BufferError(f"addresses and lengths must be arrays of integers: {e}") from e
    if at.dtype.kind not in "iu" or sizes.dtype.kind not in "iu":
        raise BufferError(f"addresses and lengths must be integers, not {at.dtype} and {sizes.dtype}")
    if at.ndim != 2 or len(at) != n or at.shape[1] < 1:
        raise BufferError(f"addresses of shape {at.shape} were given for {n} keys; they must be ({n}, F), F at least 1")
    if sizes.shape not in (at.shape, at.shape[1:]):
        raise BufferError(
            f"lengths of shape {sizes.shape} were given for addresses of shape {at.shape}; they must have that shape, "
            f"or ({at.shape[1]},) if they are the same for every key"
        )
    sizes = np.broadcast_to(sizes, at.shape)
    _refuse_impossible(at, sizes)
    offsets = np.arange(0, at.size + 1, at.shape[1], dtype=np.int64)
    return offsets, np.require(at.ravel(), np.int64, "W"), np.require(sizes.ravel(), np.int64, "W")


def _refuse_impossible(at: npt.NDArray[Any], sizes: npt.NDArray[Any]) -> None:
    """BufferError for fragments (N, F) that are nobody's memory. Whether the rest is the caller's, nobody can see."""
    bad = (sizes < 0) | (sizes > SIZE_MASK) | (at > MAX_ADDRESS - SIZE_MASK) | ((at <= 0) & (sizes > 0))
    if bad.any():
        which = np.argwhere(bad)[0].tolist()
        name = f"fragment {which[1]} of key {which[0]}" if len(which) == 2 else f"fragment {which[0]}"
        where = tuple(which)
        raise BufferError(
            f"{name}: {int(sizes[where])} bytes at {int(at[where]):#x} can't be: an address is positive and "
            f"below 2**57, a length 0 to 2**40"
        )


def fragments(addrs: Sequence[Sequence[int]], sizes: Sequence[Sequence[int]], n: int) -> tuple[I64, I64, I64]:
    """(offsets int64[N+1], addresses int64[M], bytes int64[M]) of N lists of fragments. Raises BufferError."""
    try:
        lists, counts = (len(addrs), len(sizes)), [list(map(len, one)) for one in (addrs, sizes)]
    except (TypeError, ValueError) as e:
        raise BufferError(f"addresses and sizes must be lists, with one list of integers for each key: {e}") from e
    if lists != (n, n):
        raise BufferError(f"{lists[0]} address lists and {lists[1]} size lists were given for {n} keys")
    if counts[0] != counts[1]:
        i = next(i for i, (a, b) in enumerate(zip(*counts, strict=True)) if a != b)
        raise BufferError(f"key {i} has {counts[0][i]} addresses and {counts[1][i]} sizes")
    offsets = np.concatenate(([0], np.cumsum(counts[0]))).astype(np.int64)
    flat = _integers(addrs, int(offsets[-1])), _integers(sizes, int(offsets[-1]))
    _refuse_impossible(*flat)
    return offsets, *flat


def _integers(lists: Sequence[Sequence[int]], total: int) -> I64:
    try:
        return np.fromiter(map(operator.index, chain.from_iterable(lists)), np.int64, total)
    except (TypeError, ValueError, OverflowError) as e:
        raise BufferError(f"addresses and lengths must be integers of at most 64 bits: {e}") from e
