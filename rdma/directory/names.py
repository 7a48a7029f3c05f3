"""What the directory calls things: names of blocks, keys in Redis, and host records that a stranger can't forge.

Whoever reads the directory's server must not learn which prefixes were asked for, so a block's name is a keyed MAC of
its key, cut to 64 bits: two blocks that meet in one cost a miss, since the owner is asked by the whole key. All that
is derived from the hosts' common secret; hosts with another one have another domain, and see nothing of each other.

    <domain>:members                      set of host ids
    <domain>:host:<id>                    the host's record, with a time to live that heartbeats renew
    <domain>:has:<id>:<epoch>:<bucket>    set of names of the blocks that the host has, in BUCKETS pieces

A host's entries stand under its epoch, a new one at each start: those of an epoch that its record does not name count
for nothing, however they came to be left behind.
"""

from __future__ import annotations

import hmac
from typing import Final

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from kvplug.rdma.directory.resp import NAME_BYTES

__all__ = ["BUCKETS", "NAME_BYTES", "Names"]

BUCKETS: Final = 16
"""Pieces of a host's entries: none so large that freeing it holds the server up."""
MAC_BYTES: Final = 16
MAX_RECORD_BYTES: Final = 2048
_BUCKET_SHIFT: Final = np.uint64(60)
_PUBLIC: Final = b"kvplug: hosts without a common secret"
U8 = npt.NDArray[np.uint8]
U64 = npt.NDArray[np.uint64]


def _derived(secret: bytes, use: str) -> bytes:
    return blake3(secret, derive_key_context=f"kvplug 2026 directory {use}").digest(length=32)


class Names:
    """Names under one secret. ``secret`` None: hosts that need none, since the server is this host's own."""

    def __init__(self, secret: bytes | None) -> None:
        secret = _PUBLIC if secret is None else secret
        self.domain = "kvplug:" + _derived(secret, "domain").hex()[:16]
        self._name_key = _derived(secret, "block names")
        self._record_key = _derived(secret, "host records")
        odd = np.frombuffer(_derived(secret, "buckets"), "<u8") | np.uint64(1)
        self._multipliers: U64 = odd.astype(np.uint64)

    @property
    def members(self) -> str:
        """The set of host ids."""
        return f"{self.domain}:members"

    def host(self, host_id: str) -> str:
        """Where a host's record is."""
        return f"{self.domain}:host:{host_id}"

    def has(self, host_id: str, epoch: str, bucket: int) -> str:
        """Where a piece of a host's entries is."""
        return f"{self.domain}:has:{host_id}:{epoch}:{bucket}"

    def of(self, keys: U8) -> U64:
        """Names of keys (N, 32): uint64[N]."""
        secret = self._name_key
        raw = np.ascontiguousarray(keys).tobytes()
        made = b"".join(
            [blake3(raw[at : at + 32], key=secret).digest(length=NAME_BYTES) for at in range(0, len(raw), 32)]
        )
        return np.frombuffer(made, "<u8")

    def buckets(self, keys: U8) -> U8:
        """Which piece each key (N, 32) belongs to, uint8[N]: a multilinear hash, cheap enough for a whole pool."""
        words = np.ascontiguousarray(keys).view("<u8").reshape(-1, 4)
        mixed = (words * self._multipliers).sum(axis=1, dtype=np.uint64) >> _BUCKET_SHIFT
        buckets: U8 = mixed.astype(np.uint8)
        return buckets

    def seal(self, record: bytes) -> bytes:
        """The record with its MAC."""
        return blake3(record, key=self._record_key).digest(length=MAC_BYTES) + record

    def unseal(self, sealed: bytes) -> bytes | None:
        """The record, or None if its MAC does not fit or it is too long."""
        mac, record = sealed[:MAC_BYTES], sealed[MAC_BYTES:]
        if len(record) > MAX_RECORD_BYTES:
            return None
        return (
            record if hmac.compare_digest(mac, blake3(record, key=self._record_key).digest(length=MAC_BYTES)) else None
        )
