"""Content keys: 32 bytes that name a block's content, the same in every process, engine version and language.

    k[0] = blake3(namespace)                                        for steps of 16 tokens
    k[i] = blake3(k[i-1] ‖ 16 tokens, u32 little-endian ‖ extras)   for the step that ends at token 16·i

A block that ends at token 16·i is named by k[i], with its cache group and shard folded into the last four bytes
(:func:`fold`). What a step's extras are (LoRA, salt, multimodal content) is in :mod:`kvplug.identity.extras`.
docs/keys.md says all this for other languages; tests/vectors/keys.json lets them check.

Nothing here depends on PYTHONHASHSEED or on an engine's own block hashes.
"""

from __future__ import annotations

import math
import struct
import sys
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from kvplug.errors import KeyFormatError, NamespaceError
from kvplug.identity.namespace import Namespace

__all__ = [
    "KEY_BYTES",
    "MIN_STEP_TOKENS",
    "STEP_TOKENS",
    "KeyArray",
    "KeyChain",
    "StepExtras",
    "as_key_array",
    "block_keys",
    "fold",
    "root",
    "step_for_spans",
]

KEY_BYTES = 32
STEP_TOKENS = 16
"""Tokens per step of a chain, unless a model's block spans force another (`step_for_spans`)."""
MIN_STEP_TOKENS = 4
"""Smaller steps would cost more to name than they could save."""
MAX_STEP_TOKENS = 4096
_U16_MAX = 0xFFFF
_U32_MAX = 0xFFFFFFFF
_TOKEN_BYTES = 4
_ARRAY_U32 = "I" if array("I").itemsize == _TOKEN_BYTES else "L"
_BIG_ENDIAN = sys.byteorder == "big"
_MIN_CAPACITY_STEPS = 16

KeyArray: TypeAlias = NDArray[np.uint8]
"""(N, 32) uint8."""
StepExtras: TypeAlias = "Mapping[int, bytes] | Callable[[int], bytes]"
"""Step index (0 is tokens 0..step-1) to the step's extras, already encoded; empty bytes for none."""


def root(namespace: Namespace | bytes) -> bytes:
    """The 32 bytes that a chain starts from: blake3 of the namespace's canonical bytes.

    A `Namespace`, or, for users of the SDK without an engine, bytes of their own that say what decides their blocks.
    """
    if isinstance(namespace, Namespace):
        return namespace.digest()
    if isinstance(namespace, bytes):
        return blake3(namespace).digest()
    raise KeyFormatError(f"root() takes a Namespace or bytes, not {type(namespace).__name__}")


def step_for_spans(spans: Iterable[int]) -> int:
    """The step in tokens for a model whose cache groups have blocks of these spans.

    16 if every span is a multiple of 16, else their greatest common divisor.
    Raises NamespaceError if that is below MIN_STEP_TOKENS or above what a chain takes.
    """
    spans = tuple(spans)
    if not spans or min(spans) < 1:
        raise NamespaceError(f"block spans must be positive numbers of tokens, not {spans}")
    divisor = math.gcd(*spans)
    step = STEP_TOKENS if divisor % STEP_TOKENS == 0 else divisor
    if not MIN_STEP_TOKENS <= step <= MAX_STEP_TOKENS:
        raise NamespaceError(f"blocks of {sorted(set(spans))} tokens have no common step of at least {MIN_STEP_TOKENS}")
    return step


class KeyChain:
    """The keys of one request's tokens, made step by step as the tokens come. Not thread-safe.

    `root`: 32 bytes from :func:`root`. `extras`: see `StepExtras`; read when a step is hashed, not before and not
    again. `step_tokens`: tokens per step. Another step than 16 starts from blake3(root ‖ step as u32), so that chains
    of different steps have no key in common.

    Only whole steps have keys; tokens beyond the last whole step wait for more. Tokens that are not final (drafts,
    placeholders) must not be given; `truncate` is there for a request whose tail is replaced all the same.
    """

    __slots__ = (
        "_extra",
        "_extras",
        "_fresh",
        "_keys",
        "_last",
        "_n",
        "_pending",
        "_start",
        "_step_bytes",
        "_unpack",
        "step_tokens",
    )

    def __init__(self, root: bytes, extras: StepExtras | None = None, *, step_tokens: int = STEP_TOKENS) -> None:
        if type(root) is not bytes or len(root) != KEY_BYTES:
            raise KeyFormatError("a chain starts from the 32 bytes that root() gives")
        if type(step_tokens) is not int or not 1 <= step_tokens <= MAX_STEP_TOKENS:
            raise KeyFormatError(f"step_tokens must be an integer from 1 to {MAX_STEP_TOKENS}, not {step_tokens!r}")
        if extras is not None and not callable(extras) and not isinstance(extras, Mapping):
            raise KeyFormatError("extras must be a mapping or a callable: step index to bytes")
        if step_tokens != STEP_TOKENS:
            root = blake3(root + struct.pack("<I", step_tokens)).digest()
        self.step_tokens = step_tokens
        self._step_bytes = step_tokens * _TOKEN_BYTES
        self._unpack = struct.Struct(f"{self._step_bytes}s").iter_unpack
        self._extras = extras
        self._extra = _by_step(extras)
        self._start = root
        self._last = root
        self._pending = b""
        self._n = 0
        self._fresh: list[bytes] = []
        self._keys: KeyArray = np.empty((_MIN_CAPACITY_STEPS, KEY_BYTES), np.uint8)

    @property
    def n_steps(self) -> int:
        """Whole steps so far: the length of `step_keys`."""
        return self._n

    @property
    def n_tokens(self) -> int:
        """Tokens taken so far, those waiting for a whole step included: continue with `tokens[chain.n_tokens:]`."""
        return self._n * self.step_tokens + len(self._pending) // _TOKEN_BYTES

    @property
    def step_keys(self) -> KeyArray:
        """(n_steps, 32) uint8, read-only, no copy: row i names the prefix that ends at token step·(i+1).

        The view stays as it is when the chain goes on or is truncated.
        """
        self._flush()
        view = self._keys[: self._n]
        view.flags.writeable = False
        return view

    def extend(self, tokens: Sequence[int] | NDArray[Any]) -> int:
        """Append tokens; returns how many steps became whole.

        Raises KeyFormatError, and changes nothing, if a token is not an integer of 0 <= t < 2**32 or if the extras of
        a step are not bytes. An exception of an extras callable passes through, and changes nothing either.
        """
        raw = _token_bytes(tokens)
        if self._pending:
            raw = self._pending + raw
        if len(raw) == self._step_bytes:  # one step, exactly: what a decoding engine gives
            message = self._last + raw
            if self._extra is not None and (extra := self._extra(self._n)) != b"":
                message += _checked(extra, self._n)
            self._last = k = blake3(message).digest()
            self._fresh.append(k)
            self._n += 1
            self._pending = b""
            return 1
        n_new = len(raw) // self._step_bytes
        if not n_new:
            self._pending = raw
            return 0
        whole = n_new * self._step_bytes
        digests = self._chain(raw[:whole], n_new)
        self._fresh += digests
        self._last = digests[-1]
        self._n += n_new
        self._pending = raw[whole:]
        return n_new

    def _chain(self, data: bytes, n_new: int) -> list[bytes]:
        k, first, hasher, extra = self._last, self._n, blake3, self._extra
        steps = self._unpack(data)
        if extra is not None and isinstance(self._extras, Mapping) and len(self._extras) < n_new:
            # The usual mapping is a salt at step 0: none of it concerns the steps after that.
            extra = extra if any(first <= step < first + n_new for step in self._extras) else None
        if extra is None:
            return [k := hasher(k + tokens).digest() for (tokens,) in steps]
        return [
            k := hasher(k + tokens + _checked(extra(step), step)).digest()
            for step, (tokens,) in enumerate(steps, first)
        ]

    def _flush(self) -> None:
        """Move digests made since the last look into the array, which grows geometrically."""
        if not self._fresh:
            return
        first, end = self._n - len(self._fresh), self._n
        if end > len(self._keys):
            grown = np.empty((max(end, 2 * len(self._keys)), KEY_BYTES), np.uint8)
            grown[:first] = self._keys[:first]
            self._keys = grown
        self._keys[first:end] = np.frombuffer(b"".join(self._fresh), np.uint8).reshape(-1, KEY_BYTES)
        self._fresh = []

    def truncate(self, n_tokens: int) -> int:
        """Drop tokens from the end so that at most `n_tokens` are left; returns how many are.

        A step whose tail goes is dropped whole, since its tokens are not kept: the answer may be less than was asked,
        and the caller goes on with `chain.extend(tokens[chain.n_tokens:])`. Truncating to more than there is changes
        nothing.
        """
        if n_tokens < 0:
            raise KeyFormatError(f"cannot truncate to {n_tokens} tokens")
        if n_tokens >= self.n_tokens:
            return self.n_tokens
        keep = min(n_tokens // self.step_tokens, self._n)
        if keep == self._n:
            self._pending = self._pending[: (n_tokens - keep * self.step_tokens) * _TOKEN_BYTES]
        else:
            self._pending = b""
            self._flush()
            self._keys = self._keys.copy()  # views that were given out keep the old rows
            self._n = keep
            self._last = self._keys[keep - 1].tobytes() if keep else self._start
        return self.n_tokens


def _by_step(extras: StepExtras | None) -> Callable[[int], bytes] | None:
    if isinstance(extras, Mapping):
        get = extras.get
        return lambda step: get(step, b"")
    return extras


def _checked(extra: bytes, step: int) -> bytes:
    """Never None for none: what is not known must not pass for what is not there."""
    if type(extra) is not bytes:
        raise KeyFormatError(f"extras of step {step} must be bytes, not {type(extra).__name__}")
    return extra


def _token_bytes(tokens: Sequence[int] | NDArray[Any]) -> bytes:
    """Tokens as u32 little-endian. array() from a list checks each value and is the cheapest way: 70 ns per 16."""
    if type(tokens) is not list:
        if isinstance(tokens, (bytes, bytearray, str)):  # array() would take their bytes for words
            raise KeyFormatError(f"tokens must be integers, not {type(tokens).__name__}")
        if isinstance(tokens, np.ndarray) or hasattr(tokens, "__array__"):
            return _token_bytes_of_array(np.asarray(tokens))
    try:
        words = array(_ARRAY_U32, tokens)
    except (OverflowError, TypeError) as error:
        raise _bad_token(tokens) from error
    if _BIG_ENDIAN:
        words.byteswap()
    return words.tobytes()


def _token_bytes_of_array(tokens: NDArray[Any]) -> bytes:
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        if tokens.size == 0 and tokens.ndim == 1:
            return b""
        raise KeyFormatError(f"tokens must be a 1-D array of integers, not {tokens.dtype} of shape {tokens.shape}")
    if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) > _U32_MAX):
        raise _bad_token(tokens.tolist())
    return tokens.astype("<u4").tobytes()


def _bad_token(tokens: Sequence[int]) -> KeyFormatError:
    try:
        for i, token in enumerate(tokens):
            if not isinstance(token, (int, np.integer)) or not 0 <= token <= _U32_MAX:
                return KeyFormatError(f"token {i} is {token!r}; tokens are integers of 0 <= t < 2**32")
    except TypeError:
        pass
    return KeyFormatError(f"tokens must be a sequence of integers of 0 <= t < 2**32, not {type(tokens).__name__}")


def fold(keys: KeyArray, group: int | NDArray[Any] = 0, shard: int | NDArray[Any] = 0) -> KeyArray:
    """Fold cache group and shard into keys: a new (N, 32) uint8 array.

    Bytes 28..31 are XORed with group as u16 and shard as u16, both little-endian. With group and shard given this is a
    bijection, so no two keys of one group and shard can meet unless blake3 collides in all 256 bits; one key folded
    with two different (group, shard) always differs; and across groups two keys could meet only if blake3 collided in
    its first 224 bits. Group 0 and shard 0 leave a key as it is. `group` and `shard` may be arrays of N.

    Raises KeyFormatError if one is outside 0..65535.
    """
    word = np.asarray(_u16(group, "group") | (_u16(shard, "shard") << np.uint32(16)), dtype="<u4")
    out = np.array(keys, dtype=np.uint8, order="C", ndmin=2)
    if out.shape[1] != KEY_BYTES:
        raise KeyFormatError(f"keys must be an (N, 32) uint8 array, not of shape {out.shape}")
    out.view("<u4")[:, -1] ^= word
    return out


def _u16(value: int | NDArray[Any], name: str) -> NDArray[np.uint32]:
    numbers = np.asarray(value)
    if numbers.dtype.kind not in "iu" or (numbers.size and (numbers.min() < 0 or numbers.max() > _U16_MAX)):
        raise KeyFormatError(f"{name} must be in 0..{_U16_MAX}, not {value!r}")
    return numbers.astype(np.uint32)


def block_keys(step_keys: KeyArray, steps_per_block: int, group: int = 0, shard: int = 0, start: int = 0) -> KeyArray:
    """Keys of whole blocks: the key at each block's end, with group and shard folded in.

    `step_keys`: (n, 32) uint8 of a chain. `start`: the first block wanted, so that only new ones are made.
    Returns a new (m, 32) uint8 array, m = max(0, n // steps_per_block - start); row j names block start + j.
    """
    if steps_per_block < 1 or start < 0:
        raise KeyFormatError(f"steps_per_block is {steps_per_block} and start is {start}; at least 1 and 0 are needed")
    return fold(step_keys[(start + 1) * steps_per_block - 1 :: steps_per_block], group, shard)


def as_key_array(keys: Sequence[bytes] | NDArray[np.uint8]) -> KeyArray:
    """Keys as an (N, 32) uint8 array, C-contiguous and writable: what compiled kernels take without a second variant.

    A suitable array is passed through; a read-only or strided one and a sequence of 32-byte `bytes` are copied.
    Raises KeyFormatError naming the index and length of the first key that is wrong.
    """
    if isinstance(keys, np.ndarray):
        if keys.dtype != np.uint8 or keys.ndim != 2 or keys.shape[1] != KEY_BYTES:
            hint = "; for one key give keys[None]" if keys.shape == (KEY_BYTES,) else ""
            raise KeyFormatError(f"keys must be an (N, 32) uint8 array, not {keys.dtype} of shape {keys.shape}{hint}")
        return np.require(keys, requirements=["C", "W"])
    if isinstance(keys, (bytes, bytearray, memoryview, str)):
        raise KeyFormatError(f"keys must be a sequence of 32-byte keys, not one {type(keys).__name__}; give [key]")
    if not isinstance(keys, (list, tuple)):
        try:
            keys = tuple(keys)
        except TypeError as error:
            raise KeyFormatError(f"keys must be a sequence of 32-byte keys, not {type(keys).__name__}") from error
    if set(map(type, keys)) - {bytes} or set(map(len, keys)) - {KEY_BYTES}:
        for i, key in enumerate(keys):
            if type(key) is not bytes:
                raise KeyFormatError(f"key {i} is of type {type(key).__name__}; keys are bytes of length 32")
            if len(key) != KEY_BYTES:
                raise KeyFormatError(f"key {i} has {len(key)} bytes; keys are bytes of length 32")
    return np.frombuffer(bytearray().join(keys), np.uint8).reshape(len(keys), KEY_BYTES)
