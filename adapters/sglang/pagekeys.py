"""From SGLang's page hashes to the pool's keys.

SGLang names a page by a chained SHA-256 over the tokens up to its end, seeded by what keeps requests apart (extra key,
cache salt). That is the token identity; the rest of what decides a page's bytes is the namespace. A key is the hash
XORed with a mask that stands for namespace and page pool, and with the number of the rank's shard in its last bytes:
two pages share a key only if blake3 or SHA-256 collides. On all ranks of an engine the keys of one page differ in the
shard alone, which is how the pool finds a page's parts on the other ranks (docs/keys.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from kvplug.errors import EngineContractError
from kvplug.identity.keys import KEY_BYTES, fold

Keys = npt.NDArray[np.uint8]
_MASK_CONTEXT = b"kvplug page mask 1\0"
_HEX_CHARS = 2 * KEY_BYTES


def mask(root: bytes, pool: str, shard: int) -> Keys:
    """What the hashes of one page pool are XORed with: (1, 32) uint8. ``root``: the namespace's digest."""
    digest = blake3(_MASK_CONTEXT + root + pool.encode()).digest()
    return fold(np.frombuffer(digest, dtype=np.uint8).reshape(1, KEY_BYTES), 0, shard)


def page_keys(hashes: Sequence[str], masked: Keys) -> Keys:
    """Keys of pages: (N, 32) uint8.

    Args:
        hashes: SGLang's page hashes, 64 hexadecimal digits each.
        masked: of :func:`mask`.

    Raises:
        EngineContractError: a hash has another form, so that this is not the SGLang that kvplug knows.
    """
    try:
        raw = bytes.fromhex("".join(hashes))
    except (TypeError, ValueError) as error:
        raise EngineContractError(f"SGLang's page hashes are not hexadecimal: {error}") from None
    if not {_HEX_CHARS}.issuperset(map(len, hashes)) or len(raw) != KEY_BYTES * len(hashes):
        bad = next(one for one in hashes if {len(one), len("".join(one.split()))} != {_HEX_CHARS})
        raise EngineContractError(f"SGLang's page hashes should have {_HEX_CHARS} digits, one is {bad!r}")
    keys: Keys = np.frombuffer(raw, dtype=np.uint8).reshape(-1, KEY_BYTES) ^ masked
    return keys
