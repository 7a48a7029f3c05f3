"""Keys from tokens, and the longest prefix that a pool has.

A key names everything up to the last token of its block, so prompts with one beginning have their first keys in common.

Prints:
    stored: 4 blocks of 16 tokens
    the same prompt: 4 blocks
    another ending after 40 tokens: 2 blocks
    another model: 0 blocks
"""

from __future__ import annotations

import os

import numpy as np

from kvplug import KvStore
from kvplug.keys import KeyChain, block_keys
from kvplug.shm.segment import remove_pool

POOL = f"example-token-prefix-{os.getpid()}"
ROOT = bytes(32)  # an engine takes root(namespace) here: weights, dtype, layout and all else that decides the bytes
OTHER_ROOT = bytes([1]) * 32
STEP_TOKENS = 16


def keys_of(tokens: list[int], root: bytes = ROOT) -> np.ndarray:
    """One key for each whole block of 16 tokens, as an (N, 32) uint8 array."""
    chain = KeyChain(root, step_tokens=STEP_TOKENS)
    chain.extend(tokens)
    return block_keys(chain.step_keys, 1, group=0)


def main() -> None:
    prompt = list(range(64))
    with KvStore(POOL, "16mib") as store:
        keys = keys_of(prompt)
        store.put(keys, np.zeros((len(keys), 32768), np.uint8))
        print(f"stored: {len(keys)} blocks of {STEP_TOKENS} tokens")
        print(f"the same prompt: {store.match_prefix(keys_of(prompt))} blocks")
        print(f"another ending after 40 tokens: {store.match_prefix(keys_of(prompt[:40] + [7] * 24))} blocks")
        print(f"another model: {store.match_prefix(keys_of(prompt, OTHER_ROOT))} blocks")


if __name__ == "__main__":
    try:
        main()
    finally:
        remove_pool(POOL)
