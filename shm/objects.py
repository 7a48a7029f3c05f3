"""Where the data of many numpy arrays lies, read from the array objects themselves.

numpy's own ways to an address (``__array_interface__``, ``ctypes``) build Python objects: more than a microsecond for
each array, as long as copying 16 KiB. The first fields of an array object are part of numpy's binary interface, since
every extension module has its accessors compiled in, and CPython's ``id`` is the object's address.
:func:`kvplug.buffers.addresses` checks both once before it uses this.
"""

from __future__ import annotations

from typing import Any, Final

from kvplug.shm.atomics import load_relaxed
from kvplug.shm.jit import entry

HEAD_BYTES: Final = object.__basicsize__
"""What every object begins with. Then, of an array: data, nd, dimensions, strides, base, descr, flags."""
FLAGS_AT: Final = HEAD_BYTES + 48
READ_BYTES: Final = FLAGS_AT + 8
C_CONTIGUOUS: Final = 0x0001
WRITEABLE: Final = 0x0400


@entry("i(I, I, i, I)")
def array_addresses(objects: Any, nbytes: Any, flags: int, out: Any) -> int:
    """Data address of each array object into ``out``; the first that is empty or lacks a flag, or -1. All int64[N]."""
    for i in range(objects.shape[0]):
        if load_relaxed(objects[i] + FLAGS_AT) & flags != flags or nbytes[i] <= 0:
            return i
        out[i] = load_relaxed(objects[i] + HEAD_BYTES)
    return -1
