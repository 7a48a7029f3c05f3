"""Atomic words, fences and the few libc calls that compiled kernels need.

Everything here is usable inside ``@kernel`` functions: addresses are plain ``int64``, and
libc is reached by symbol name (`ExternalFunction`), never by a ctypes pointer, so that numba can cache the caller.

Memory order is that of C11. The words are 64 bits wide and **must be 8-byte aligned**: a misaligned atomic is
undefined here, as it is in C. Python-level stores into shared memory (numpy, memoryview) order nothing: x86 hides
that, aarch64 does not, so a word that another process reads goes through this module.
"""

from __future__ import annotations

import platform
from typing import Any

from kvplug.shm.jit import cgutils, intrinsic, ir, kernel, types

__all__ = [
    "clock_gettime",
    "compare_exchange",
    "cpu_pause",
    "errno_location",
    "fcntl",
    "fence",
    "fence_acquire",
    "fence_release",
    "flock",
    "getpid",
    "kill",
    "load_acquire",
    "load_errno",
    "load_relaxed",
    "memcpy",
    "now_ns",
    "prefetch",
    "sched_yield",
    "store_relaxed",
    "store_release",
    "usleep",
]

WORD_BYTES = 8
CLOCK_MONOTONIC = 1
"""Linux's id: one clock for all processes of a host, not set by anyone, not running while the host sleeps."""

_I64 = ir.IntType(64)
_I32 = ir.IntType(32)

memcpy = types.ExternalFunction("memcpy", types.intp(types.intp, types.intp, types.intp))
"""memcpy(dst, src, nbytes) -> dst. The ranges must not overlap."""
flock = types.ExternalFunction("flock", types.intc(types.intc, types.intc))
"""flock(fd, operation) -> 0, or -1 with errno (see :func:`load_errno`)."""
fcntl = types.ExternalFunction("fcntl", types.intc(types.intc, types.intc, types.intp))
"""fcntl(fd, command, address) -> 0, or -1 with errno. Variadic in C: on the two machines that are supported an address
goes where a fixed third argument would."""
clock_gettime = types.ExternalFunction("clock_gettime", types.intc(types.intc, types.intp))
"""clock_gettime(clock, address of int64[2]) -> 0 or -1."""
usleep = types.ExternalFunction("usleep", types.intc(types.uint32))
"""usleep(microseconds) -> 0 or -1; a signal ends it early."""
sched_yield = types.ExternalFunction("sched_yield", types.intc())
kill = types.ExternalFunction("kill", types.intc(types.intc, types.intc))
getpid = types.ExternalFunction("getpid", types.intc())
errno_location = types.ExternalFunction("__errno_location", types.intp())


def _load_atomic(builder: Any, addr: Any, ordering: str) -> Any:
    ptr = builder.inttoptr(addr, _I64.as_pointer())
    try:
        return builder.load_atomic(ptr, ordering, WORD_BYTES, typ=_I64)
    except TypeError:  # llvmlite before opaque pointers takes the type from the pointer
        return builder.load_atomic(ptr, ordering, WORD_BYTES)


def _store_atomic(builder: Any, addr: Any, val: Any, ordering: str) -> None:
    builder.store_atomic(val, builder.inttoptr(addr, _I64.as_pointer()), ordering, WORD_BYTES)


@intrinsic
def load_acquire(typingctx: Any, addr: Any) -> Any:
    """load_acquire(addr: int64) -> int64: nothing after it is read or written before it."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _load_atomic(builder, args[0], "acquire")

    return types.int64(types.int64), codegen


@intrinsic
def load_relaxed(typingctx: Any, addr: Any) -> Any:
    """load_relaxed(addr: int64) -> int64: whole, but in no order with anything else."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _load_atomic(builder, args[0], "monotonic")

    return types.int64(types.int64), codegen


@intrinsic
def store_release(typingctx: Any, addr: Any, val: Any) -> Any:
    """store_release(addr: int64, val: int64): everything before it is visible to whoever acquires `val`."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _store_atomic(builder, args[0], args[1], "release")
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def store_relaxed(typingctx: Any, addr: Any, val: Any) -> Any:
    """store_relaxed(addr: int64, val: int64): whole, but in no order with anything else."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _store_atomic(builder, args[0], args[1], "monotonic")
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def compare_exchange(typingctx: Any, addr: Any, expected: Any, new: Any) -> Any:
    """compare_exchange(addr, expected, new: int64) -> bool: put `new` there if `expected` is there; a full fence."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], _I64.as_pointer())
        answer = builder.cmpxchg(pointer, args[1], args[2], "seq_cst", "seq_cst")
        return builder.extract_value(answer, 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def fence(typingctx: Any) -> Any:
    """fence(): sequentially consistent; also orders a store before a later load."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def fence_acquire(typingctx: Any) -> Any:
    """fence_acquire(): loads before it are done before anything after it (copy, fence, look at the word again)."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.fence("acquire")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def fence_release(typingctx: Any) -> Any:
    """fence_release(): everything before it is done before any store after it."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.fence("release")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def prefetch(typingctx: Any, addr: Any) -> Any:
    """prefetch(addr: int64): the cache line there is going to be read. A hint: any address will do."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = ir.IntType(8).as_pointer()
        fnty = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
        fn = builder.module.declare_intrinsic("llvm.prefetch", [pointer], fnty)
        read, keep, data = (ir.Constant(_I32, flag) for flag in (0, 3, 1))
        builder.call(fn, [builder.inttoptr(args[0], pointer), read, keep, data])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


_MACHINE = platform.machine().lower()
_HINT_YIELD = 1


@intrinsic
def cpu_pause(typingctx: Any) -> Any:
    """cpu_pause(): a hint for the body of a spin loop; orders nothing. Nothing at all on other machines.

    By LLVM's own intrinsics: numba carries no assembler, inline assembly would end the process.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if _MACHINE in ("x86_64", "amd64"):
            fnty = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, fnty, "llvm.x86.sse2.pause"), [])
        elif _MACHINE in ("aarch64", "arm64"):
            fnty = ir.FunctionType(ir.VoidType(), [_I32])
            hint = cgutils.get_or_insert_function(builder.module, fnty, "llvm.aarch64.hint")
            builder.call(hint, [ir.Constant(_I32, _HINT_YIELD)])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _monotonic_ns(typingctx: Any) -> Any:
    """clock_gettime into the stack: an array for the answer would cost more than the call."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        i8p = ir.IntType(8).as_pointer()
        fnty = ir.FunctionType(_I32, [_I32, _I64])
        fn = cgutils.get_or_insert_function(builder.module, fnty, "clock_gettime")
        sec = cgutils.alloca_once(builder, _I64, size=2)
        base = builder.ptrtoint(builder.bitcast(sec, i8p), _I64)
        builder.call(fn, [ir.Constant(_I32, CLOCK_MONOTONIC), base])
        nsec = builder.inttoptr(builder.add(base, ir.Constant(_I64, WORD_BYTES)), _I64.as_pointer())
        return builder.add(builder.mul(builder.load(sec), ir.Constant(_I64, 1_000_000_000)), builder.load(nsec))

    return types.int64(), codegen


@kernel
def now_ns() -> int:
    """Nanoseconds of CLOCK_MONOTONIC, comparable between the processes of this host. int64."""
    return _monotonic_ns()


@intrinsic
def _load_i32(typingctx: Any, addr: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], _I32.as_pointer()))

    return types.int32(types.int64), codegen


@kernel
def load_errno() -> int:
    """This thread's errno, right after a libc call that answered -1. int32."""
    return _load_i32(errno_location())
