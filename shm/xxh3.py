"""XXH3_64bits (seed 0, default secret) over raw addresses, for use inside compiled kernels.

Written from the public description of the algorithm (https://github.com/Cyan4973/xxHash, XXH3 64-bit); equal bit for
bit to the reference for every length. Little-endian machines only, as every machine that runs an engine is.

How it is made fast: inputs above 240 bytes are eaten in stripes of 64 bytes by eight 64-bit lanes. The lanes are one
``<8 x i64>`` value written straight in LLVM IR, so they are vector instructions on every CPU (LLVM splits them to what
there is: 512, 256 or 128 bits) and do not hang on an optimiser that recognises a loop. Two sums run beside each
other, products and plain data, because only the data sum is added crosswise (lane ^ 1): crossing it once per
1024-byte block instead of once per stripe leaves five vector instructions per 64 bytes.

All values are ``int64``, since a stray ``uint64`` would turn numba to float64. Arithmetic modulo 2**64 goes through the
intrinsics here: numba's own ``+``, ``-`` and ``*`` tell LLVM that a signed result never overflows (``nsw``), and a hash
that is written with them comes out wrong after optimisation.
"""

from __future__ import annotations

import platform
from typing import Any

import numpy as np

from kvplug.shm.jit import cgutils, intrinsic, ir, kernel, types

__all__ = [
    "BLOCK_BYTES",
    "PREFETCH_BYTES",
    "STRIPE_BYTES",
    "block_walker",
    "lanes_on_stack",
    "stream_fence",
    "wrap_add",
    "wrap_mul",
    "xxh3_64",
    "xxh3_finish",
    "xxh3_start",
]

STRIPE_BYTES = 64
BLOCK_BYTES = 1024
"""After this many bytes the lanes are scrambled: 16 stripes, as the 192-byte secret moves on by 8 a stripe."""
SHORT_BYTES = 240
"""Inputs up to this length are hashed by other formulas, without lanes."""
PREFETCH_BYTES = 4096
"""How far reading is announced ahead: measured, 4 and 8 KiB are equal, 1 and 2 KiB are slower."""
LANES_BYTES = 64
"""Size of the state between :func:`xxh3_start` and :func:`xxh3_finish`."""

_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


_P32_1 = 0x9E3779B1
_P32_2 = 0x85EBCA77
_P32_3 = 0xC2B2AE3D
_P64_1 = _signed(0x9E3779B185EBCA87)
_P64_2 = _signed(0xC2B2AE3D27D4EB4F)
_P64_3 = _signed(0x165667B19E3779F9)
_P64_4 = _signed(0x85EBCA77C2B2AE63)
_P64_5 = _signed(0x27D4EB2F165667C5)
_MX1 = _signed(0x165667919E3779F9)
_MX2 = _signed(0x9FB21C651E98DF25)

_LANES = 8
_STRIPES_PER_BLOCK = BLOCK_BYTES // STRIPE_BYTES
_SECRET_STEP_BYTES = 8
_SCRAMBLE_AT = len(_SECRET) - STRIPE_BYTES
_LAST_STRIPE_AT = len(_SECRET) - STRIPE_BYTES - 7
_MERGE_AT = 11
_MID_START_AT = 3
_MID_LAST_AT = 136 - 17
_START_LANES = (_P32_3, _P64_1, _P64_2, _P64_3, _P64_4, _P32_2, _P64_5, _P32_1)


def _secret64(at: int) -> int:
    return int.from_bytes(_SECRET[at : at + 8], "little", signed=True)


def _secret32(at: int) -> int:
    return int.from_bytes(_SECRET[at : at + 4], "little")


# secret as int64 at every byte offset, a constant inside the compiled code
_SECRET_AT = np.array([_secret64(at) for at in range(len(_SECRET) - 7)], dtype=np.int64)
_FLIP_0 = _secret64(56) ^ _secret64(64)
_FLIP_1TO3 = _secret32(0) ^ _secret32(4)
_FLIP_4TO8 = _secret64(8) ^ _secret64(16)
_FLIP_9TO16_LOW = _secret64(24) ^ _secret64(32)
_FLIP_9TO16_HIGH = _secret64(40) ^ _secret64(48)

# ---------------------------------------------------------------------------------------------------------------
# Vector code: the eight lanes

_I8 = ir.IntType(8)
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_I128 = ir.IntType(128)
_VEC = ir.VectorType(_I64, _LANES)
_CROSS = ir.Constant(ir.VectorType(_I32, _LANES), [lane ^ 1 for lane in range(_LANES)])


def _splat(value: int) -> Any:
    return ir.Constant(_VEC, [value] * _LANES)


def _secret_vector(at: int) -> Any:
    return ir.Constant(_VEC, [_secret64(at + 8 * lane) for lane in range(_LANES)])


def vector_at(builder: Any, addr: Any, offset: int = 0) -> Any:
    """Pointer to the 64 bytes at `addr` + `offset`."""
    if offset:
        addr = builder.add(addr, ir.Constant(_I64, offset))
    return builder.inttoptr(addr, _VEC.as_pointer())


def _prefetch(builder: Any, addr: Any, offset: int) -> None:
    pointer = _I8.as_pointer()
    fnty = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
    fn = builder.module.declare_intrinsic("llvm.prefetch", [pointer], fnty)
    read, keep, data = (ir.Constant(_I32, flag) for flag in (0, 3, 1))
    builder.call(fn, [builder.inttoptr(builder.add(addr, ir.Constant(_I64, offset)), pointer), read, keep, data])


def _products(builder: Any, data: Any, secret: Any) -> Any:
    keyed = builder.xor(data, secret)
    return builder.mul(builder.and_(keyed, _splat(0xFFFFFFFF)), builder.lshr(keyed, _splat(32)))


def _emit_block(builder: Any, lanes: Any, stripes: Any) -> Any:
    """IR for one whole block: `lanes` and the 16 `stripes` (all <8 x i64>) to the scrambled lanes after them."""
    plain = stripes[0]
    for i, data in enumerate(stripes):
        lanes = builder.add(lanes, _products(builder, data, _secret_vector(_SECRET_STEP_BYTES * i)))
        if i:
            plain = builder.add(plain, data)
    lanes = builder.add(lanes, builder.shuffle_vector(plain, plain, _CROSS))
    lanes = builder.xor(lanes, builder.lshr(lanes, _splat(47)))
    lanes = builder.xor(lanes, _secret_vector(_SCRAMBLE_AT))
    return builder.mul(lanes, _splat(_P32_1))


@intrinsic
def xxh3_start(typingctx: Any, state: Any) -> Any:
    """xxh3_start(state: int64): puts the start values into the 64 bytes at `state`."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(ir.Constant(_VEC, list(_START_LANES)), vector_at(builder, args[0]), align=8)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


def block_walker(*, store: str | None, hashed: bool) -> Any:
    """An intrinsic that goes over whole blocks once, hashing them, copying them, or both.

    ``walk(state, dst, src, blocks, nbytes, after)``, all int64. `store`: None (`dst` is not used), ``"plain"``, or
    ``"stream"``: non-temporal, past the caches; then `dst` must be a multiple of STRIPE_BYTES and the caller calls
    :func:`stream_fence` before anybody is told. Not hashed: `state` is not used.

    Reading runs PREFETCH_BYTES ahead. Hardware prefetchers stop at the page's end and know nothing about the next
    block of a batch, so where the `nbytes` at `src` end (they may be more than the blocks), prefetching goes on at
    `after`: the address that is read next, or any other that is mapped.
    """

    @intrinsic
    def walk(typingctx: Any, state: Any, dst: Any, src: Any, blocks: Any, nbytes: Any, after: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            state, dst, src, blocks, nbytes, after = args
            lanes_at = cgutils.alloca_once(builder, _VEC)
            if hashed:
                builder.store(builder.load(vector_at(builder, state), align=8), lanes_at)
            ahead = ir.Constant(_I64, PREFETCH_BYTES)
            edge = builder.sub(nbytes, ahead)
            with cgutils.for_range(builder, blocks) as loop:
                offset = builder.mul(loop.index, ir.Constant(_I64, BLOCK_BYTES))
                read, write = builder.add(src, offset), builder.add(dst, offset)
                inside = builder.icmp_signed("<", offset, edge)
                beyond = builder.add(after, builder.sub(offset, edge))
                soon = builder.select(inside, builder.add(read, ahead), beyond)
                stripes = []
                for at in range(0, BLOCK_BYTES, STRIPE_BYTES):
                    stripes.append(builder.load(vector_at(builder, read, at), align=1))
                    _prefetch(builder, soon, at)
                    if store:
                        stream = store == "stream"
                        stored = builder.store(
                            stripes[-1], vector_at(builder, write, at), align=STRIPE_BYTES if stream else 1
                        )
                        if stream:
                            stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_I32, 1)]))
                if hashed:
                    builder.store(_emit_block(builder, builder.load(lanes_at), stripes), lanes_at)
            if hashed:
                builder.store(builder.load(lanes_at), vector_at(builder, state), align=8)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), codegen

    return walk


_hash_blocks = block_walker(store=None, hashed=True)


@intrinsic
def stream_fence(typingctx: Any) -> Any:
    """stream_fence(): streamed stores before it are visible before any store after it.

    On x86 they alone are not ordered by an ordinary release; elsewhere a release orders them.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if platform.machine().lower() in ("x86_64", "amd64"):
            fnty = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, fnty, "llvm.x86.sse.sfence"), [])
        else:
            builder.fence("release")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _stripes(typingctx: Any, state: Any, addr: Any, count: Any, secret_at: Any) -> Any:
    """_stripes(state, addr, count, secret_at: int64): `count` stripes, not scrambled afterwards."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        state, addr, count, secret_at = args
        table = ir.Constant(ir.ArrayType(_I8, len(_SECRET)), bytearray(_SECRET))
        secret = builder.ptrtoint(cgutils.global_constant(builder.module, "xxh3_secret", table), _I64)
        secret = builder.add(secret, secret_at)
        lanes_at = cgutils.alloca_once_value(builder, builder.load(vector_at(builder, state), align=8))
        with cgutils.for_range(builder, count) as loop:
            at = builder.add(addr, builder.mul(loop.index, ir.Constant(_I64, STRIPE_BYTES)))
            key_at = builder.add(secret, builder.mul(loop.index, ir.Constant(_I64, _SECRET_STEP_BYTES)))
            data = builder.load(vector_at(builder, at), align=1)
            key = builder.load(vector_at(builder, key_at), align=1)
            lanes = builder.add(builder.load(lanes_at), _products(builder, data, key))
            builder.store(builder.add(lanes, builder.shuffle_vector(data, data, _CROSS)), lanes_at)
        builder.store(builder.load(lanes_at), vector_at(builder, state), align=8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def lanes_on_stack(typingctx: Any) -> Any:
    """lanes_on_stack() -> int64: address of LANES_BYTES in the frame of the calling function, gone when it returns."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.ptrtoint(cgutils.alloca_once(builder, _VEC), _I64)

    return types.int64(), codegen


# ---------------------------------------------------------------------------------------------------------------
# Scalar code: short inputs and the end of long ones


def _loader(bits: int) -> Any:
    @intrinsic
    def load(typingctx: Any, addr: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            word = ir.IntType(bits)
            value = builder.load(builder.inttoptr(args[0], word.as_pointer()), align=1)
            return value if bits == _I64.width else builder.zext(value, _I64)

        return types.int64(types.int64), codegen

    return load


_load8 = _loader(8)
_load32 = _loader(32)
_load64 = _loader(64)


def _binary(emit: Any) -> Any:
    @intrinsic
    def operation(typingctx: Any, left: Any, right: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return emit(builder, args[0], args[1])

        return types.int64(types.int64, types.int64), codegen

    return operation


def _emit_mul_fold(builder: Any, left: Any, right: Any) -> Any:
    product = builder.mul(builder.zext(left, _I128), builder.zext(right, _I128))
    return builder.xor(builder.trunc(product, _I64), builder.trunc(builder.lshr(product, ir.Constant(_I128, 64)), _I64))


def _emit_rotl(builder: Any, value: Any, bits: Any) -> Any:
    return builder.or_(builder.shl(value, bits), builder.lshr(value, builder.sub(ir.Constant(_I64, 64), bits)))


wrap_add = _binary(lambda builder, left, right: builder.add(left, right))
wrap_mul = _binary(lambda builder, left, right: builder.mul(left, right))
_shr = _binary(lambda builder, value, bits: builder.lshr(value, bits))
_rotl = _binary(_emit_rotl)
_mul_fold = _binary(_emit_mul_fold)
"""The unsigned 128-bit product, its halves xored."""


@intrinsic
def _byteswap(typingctx: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bswap(args[0])

    return types.int64(types.int64), codegen


@kernel
def _avalanche(h: int) -> int:
    h = wrap_mul(h ^ _shr(h, 37), _MX1)
    return h ^ _shr(h, 32)


@kernel
def _avalanche_xxh64(h: int) -> int:
    h = wrap_mul(h ^ _shr(h, 33), _P64_2)
    h = wrap_mul(h ^ _shr(h, 29), _P64_3)
    return h ^ _shr(h, 32)


@kernel
def _mix16(addr: int, secret_at: int) -> int:
    return _mul_fold(_load64(addr) ^ _SECRET_AT[secret_at], _load64(addr + 8) ^ _SECRET_AT[secret_at + 8])


@kernel
def _upto_16(addr: int, nbytes: int) -> int:
    if nbytes > 8:
        low = _load64(addr) ^ _FLIP_9TO16_LOW
        high = _load64(addr + nbytes - 8) ^ _FLIP_9TO16_HIGH
        return _avalanche(wrap_add(wrap_add(nbytes, _byteswap(low)), wrap_add(high, _mul_fold(low, high))))
    if nbytes >= 4:
        h = (_load32(addr + nbytes - 4) | _rotl(_load32(addr), 32)) ^ _FLIP_4TO8
        h = wrap_mul(h ^ _rotl(h, 49) ^ _rotl(h, 24), _MX2)
        h = wrap_mul(h ^ (_shr(h, 35) + nbytes), _MX2)
        return h ^ _shr(h, 28)
    if nbytes > 0:
        first, middle, last = _load8(addr), _load8(addr + (nbytes >> 1)), _load8(addr + nbytes - 1)
        return _avalanche_xxh64(((first << 16) | (middle << 24) | last | (nbytes << 8)) ^ _FLIP_1TO3)
    return _avalanche_xxh64(_FLIP_0)


@kernel
def _upto_240(addr: int, nbytes: int) -> int:
    h = wrap_mul(nbytes, _P64_1)
    if nbytes <= 128:
        # pairs from both ends towards the middle, the innermost first
        for i in range((nbytes - 1) // 32, -1, -1):
            h = wrap_add(h, _mix16(addr + 16 * i, 32 * i))
            h = wrap_add(h, _mix16(addr + nbytes - 16 * (i + 1), 32 * i + 16))
        return _avalanche(h)
    for i in range(8):
        h = wrap_add(h, _mix16(addr + 16 * i, 16 * i))
    h = _avalanche(h)
    for i in range(8, nbytes // 16):
        h = wrap_add(h, _mix16(addr + 16 * i, 16 * (i - 8) + _MID_START_AT))
    return _avalanche(wrap_add(h, _mix16(addr + nbytes - 16, _MID_LAST_AT)))


@kernel
def xxh3_finish(state: int, addr: int, nbytes: int) -> int:
    """XXH3 of the `nbytes` at `addr`, all of whose blocks that something follows are in `state` already.

    That is ``(nbytes - 1) // BLOCK_BYTES`` blocks. Reads the bytes after them and, if those are fewer than 64, some
    before. Up to SHORT_BYTES, `state` is not looked at and everything is read. Returns the hash's bits as int64.
    """
    if nbytes <= 16:
        return _upto_16(addr, nbytes)
    if nbytes <= SHORT_BYTES:
        return _upto_240(addr, nbytes)
    done = (nbytes - 1) // BLOCK_BYTES * BLOCK_BYTES
    _stripes(state, addr + done, (nbytes - 1 - done) // STRIPE_BYTES, 0)
    _stripes(state, addr + nbytes - STRIPE_BYTES, 1, _LAST_STRIPE_AT)
    h = wrap_mul(nbytes, _P64_1)
    for i in range(_LANES // 2):
        at = _MERGE_AT + 16 * i
        low, high = _load64(state + 16 * i), _load64(state + 16 * i + 8)
        h = wrap_add(h, _mul_fold(low ^ _SECRET_AT[at], high ^ _SECRET_AT[at + 8]))
    return _avalanche(h)


@kernel
def xxh3_64(addr: int, nbytes: int) -> int:
    """XXH3_64bits with seed 0 of `nbytes` at `addr` (any alignment). Returns its bits as int64."""
    state = lanes_on_stack()
    xxh3_start(state)
    if nbytes > BLOCK_BYTES:
        _hash_blocks(state, 0, addr, (nbytes - 1) // BLOCK_BYTES, nbytes, addr)
    return xxh3_finish(state, addr, nbytes)
