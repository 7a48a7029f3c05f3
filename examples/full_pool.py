"""Codes instead of exceptions: what a full pool, a repeated key and a missing key answer.

Prints:
    a new key: OK
    the same key: EXISTS
    a missing key: MISSING
    while everything is pinned: FULL
    with nothing pinned: OK, and the oldest block is gone
"""

from __future__ import annotations

import contextlib
import os

import numpy as np

from kvplug import Code, KvStore
from kvplug.config import load
from kvplug.shm.segment import remove_pool

POOL = f"example-full-pool-{os.getpid()}"
BLOCK = np.ones(1024 * 1024, np.uint8)


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


def put(store: KvStore, number: int) -> Code:
    return Code(store.put([key(number)], [BLOCK])[0])


def main() -> None:
    config = load(policy="lru", pin_budget_share=1.0)  # so that one process may pin all there is
    with KvStore(POOL, "8mib", config=config) as store:
        print("a new key:", put(store, 0).name)
        print("the same key:", put(store, 0).name)
        print("a missing key:", Code(store.get_into([key(99)], [np.empty_like(BLOCK)])[0]).name)

        count = 1
        with contextlib.ExitStack() as pins:
            pins.enter_context(store.pin([key(0)]))
            while put(store, count) == Code.OK:
                pins.enter_context(store.pin([key(count)]))
                count += 1
            print("while everything is pinned:", put(store, count).name)
        code = put(store, count)
        is_oldest_gone = not store.exists([key(0)])[0]
        print(f"with nothing pinned: {code.name}, and the oldest block is {'gone' if is_oldest_gone else 'there'}")


if __name__ == "__main__":
    try:
        main()
    finally:
        remove_pool(POOL)
