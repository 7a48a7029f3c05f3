"""The namespace: everything but the tokens that decides a block's bytes, as one digest.

Blocks of two engines may be exchanged only if every field here is equal. A field has no default unless its absence
is itself a fact, so that an adapter cannot forget one; what an adapter cannot identify raises NamespaceError, which
means "not cached", and one log line.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from typing import Any

from blake3 import blake3

from kvplug.errors import NamespaceError
from kvplug.identity.canonical import Value, encode

__all__ = ["ByteRun", "GroupLayout", "Namespace", "WeightsIdentity", "digest_of"]

_MAGIC = b"kvplug namespace 1\0"
_DIGEST_BYTES = 32
_EPOCH_BYTES = 32


def digest_of(value: object, path: str = "value") -> bytes:
    """blake3 (32 bytes) of the canonical encoding of `value`; NamespaceError names what cannot be encoded."""
    return blake3(encode(value, path)).digest()


@dataclasses.dataclass(frozen=True)
class WeightsIdentity:
    """Which weights these are, by content; made by :mod:`kvplug.identity.weights`."""

    kind: str
    """How it was found: "files", "dummy", "remote" or "user". Different kinds are never equal."""
    digest: bytes
    """32 bytes."""

    def __post_init__(self) -> None:
        if type(self.kind) is not str or not self.kind:
            raise NamespaceError("weights identity: kind must be a non-empty string")
        if type(self.digest) is not bytes or len(self.digest) != _DIGEST_BYTES:
            raise NamespaceError("weights identity: digest must be 32 bytes")


@dataclasses.dataclass(frozen=True)
class ByteRun:
    """One contiguous run of bytes inside a part of a block: usually one layer's page."""

    layer: str
    """The layer's name in the engine."""
    nbytes: int


@dataclasses.dataclass(frozen=True)
class GroupLayout:
    """How a block of one KV cache group is made up."""

    kind: str
    """"full", "mla", "sliding", "chunked"."""
    span_tokens: int
    """Tokens that one block covers."""
    shards: tuple[tuple[ByteRun, ...], ...]
    """For each shard (rank or part) the runs in the order in which they lie in the block."""
    window_tokens: int | None = None
    """The sliding window or chunk; None for groups that attend to everything."""

    def __post_init__(self) -> None:
        if type(self.span_tokens) is not int or self.span_tokens < 1:
            raise NamespaceError(f"a block's span must be a positive number of tokens, not {self.span_tokens!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Namespace:
    """Frozen and validated: constructing one raises NamespaceError, with the path, for what cannot be identified.

    The canonical bytes are taken once, at construction; changing a dict afterwards that was given here has no effect.
    """

    weights: WeightsIdentity
    config_digest: bytes
    """`digest_of(configuration)`, 32 bytes: the model's configuration after every override."""
    quantization: Value
    """The method and its parameters; None if not quantised."""
    kv_dtype: str
    """The dtype in which keys and values are stored, resolved ("bfloat16", "fp8_e4m3"), never "auto"."""
    kv_scales: Value
    """Static scales or their digest; None if there are none. "dynamic" is refused: such bytes depend on history."""
    draft: WeightsIdentity | None
    """The draft model of speculative decoding, if any."""
    eagle: bool
    """Whether drafting is EAGLE- or MTP-like: such groups leave the trailing block unstored."""
    engine: str
    engine_version: str
    device: str
    """"cpu", "cuda", …"""
    attention_backend: Value
    """The backend's name, or a mapping of group or layer to name."""
    cpu_isa: str | None
    """The instruction set by which a CPU backend packs bytes inside a block; None if bytes are not packed."""
    kv_layout: Value
    """The name of the KV layout ("NHD", "HND", …), or whatever describes it."""
    groups: tuple[GroupLayout, ...]
    """One per KV cache group, in the engine's order: block spans and the table of byte runs."""
    tp: int
    pp: int
    cp: int
    """Sizes of tensor, pipeline and context parallelism."""
    weights_epoch: bytes | None = None
    """None: the weights as loaded. Else 32 random bytes: weights were changed in the living engine."""
    rotation: bytes | None = None
    """None, or 32 random bytes: this engine's cache was reset."""
    other: Mapping[str, Value] = dataclasses.field(default_factory=dict)
    """What an engine has beyond the above and that decides bytes too."""
    _canonical: bytes = dataclasses.field(init=False, repr=False, compare=False, default=b"")

    def __post_init__(self) -> None:
        # Exact types, since a lookalike (a path for an identity, 1 for True) would make a valid but wrong namespace.
        if type(self.weights) is not WeightsIdentity:
            raise NamespaceError("weights must be a WeightsIdentity: unidentified weights are not cached")
        if self.draft is not None and type(self.draft) is not WeightsIdentity:
            raise NamespaceError("draft must be None or a WeightsIdentity")
        if type(self.config_digest) is not bytes or len(self.config_digest) != _DIGEST_BYTES:
            raise NamespaceError("config_digest must be the 32 bytes of digest_of(configuration)")
        if self.kv_scales == "dynamic":
            raise NamespaceError("kv_scales: dynamic scales make a block's bytes depend on history")
        if self.kv_dtype == "auto":
            raise NamespaceError('kv_dtype: "auto" names no dtype; give the resolved one')
        for name in ("tp", "pp", "cp"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise NamespaceError(f"{name} must be an integer of at least 1")
        if type(self.eagle) is not bool:
            raise NamespaceError("namespace.eagle must be a bool")
        if not self.groups:
            raise NamespaceError("groups: a namespace without a KV cache group names no blocks")
        for name in ("weights_epoch", "rotation"):
            value = getattr(self, name)
            if value is not None and (type(value) is not bytes or len(value) != _EPOCH_BYTES):
                raise NamespaceError(f"{name} must be None or {_EPOCH_BYTES} bytes")
        for name in ("kv_dtype", "engine", "engine_version", "device"):
            if type(getattr(self, name)) is not str or not getattr(self, name):
                raise NamespaceError(f"{name} must be a non-empty string")
        object.__setattr__(self, "_canonical", _MAGIC + encode(_plain(self, "namespace"), "namespace"))

    def canonical(self) -> bytes:
        """The canonical bytes: a magic, then the mapping of every field's name to its value (docs/keys.md)."""
        return self._canonical

    def digest(self) -> bytes:
        """blake3 of :meth:`canonical`, 32 bytes: the root of every chain of keys in this namespace."""
        return blake3(self._canonical).digest()

    def __hash__(self) -> int:
        return hash(self._canonical)

    def private(self, epoch: bytes | None = None) -> Namespace:
        """The namespace of an engine whose weights were changed: equal to no other, until they are identified again.

        `epoch`: 32 random bytes drawn elsewhere, where several processes of one engine have to agree.
        """
        return dataclasses.replace(self, weights_epoch=epoch or secrets.token_bytes(_EPOCH_BYTES))

    def identified(self, weights: WeightsIdentity) -> Namespace:
        """The namespace once changed weights are known again: shared with every engine that has the same."""
        return dataclasses.replace(self, weights=weights, weights_epoch=None)

    def rotated(self, rotation: bytes | None = None) -> Namespace:
        """The namespace after this engine's cache was reset: its old blocks are hidden from it, not deleted."""
        return dataclasses.replace(self, rotation=rotation or secrets.token_bytes(_EPOCH_BYTES))

    def differences(self, other: Namespace) -> tuple[str, ...]:
        """Names of the fields in which two namespaces differ: what to say where ranks must agree and do not."""
        mine, theirs = _plain(self, "namespace"), _plain(other, "namespace")
        return tuple(name for name in mine if encode(mine[name], name) != encode(theirs[name], name))

    def describe(self) -> str:
        """One line for logs: what can be told without giving away more than a prefix of any digest."""
        parts = [
            self.digest().hex()[:12],
            f"{self.engine} {self.engine_version}",
            f"weights {self.weights.kind}:{self.weights.digest.hex()[:12]}",
            f"kv {self.kv_dtype}",
            f"tp{self.tp} pp{self.pp} cp{self.cp}",
            "spans " + "/".join(str(group.span_tokens) for group in self.groups),
        ]
        if self.weights_epoch is not None:
            parts.append("private (weights changed)")
        if self.rotation is not None:
            parts.append("rotated (cache reset)")
        return ", ".join(parts)


def _plain(part: object, path: str) -> dict[str, Any]:
    """Our own dataclasses as mappings, public fields only; everything else is left to `encode` to judge."""
    return {
        field.name: _plain_value(getattr(part, field.name), f"{path}.{field.name}")
        for field in dataclasses.fields(part)  # type: ignore[arg-type]
        if not field.name.startswith("_")
    }


def _plain_value(value: object, path: str) -> object:
    if isinstance(value, (WeightsIdentity, ByteRun, GroupLayout)):
        return _plain(value, path)
    if type(value) is tuple:
        return tuple(_plain_value(item, f"{path}[{i}]") for i, item in enumerate(value))
    return value
