"""A block is made in its slot, and read where it lies: no copy on either side.

Prints:
    reserved: ['OK'], readable: False
    sealed: ['OK'], readable: True
    pinned, read-only: 0 1 2 3
"""

from __future__ import annotations

import os

import numpy as np

from kvplug import Code, KvStore
from kvplug.shm.segment import remove_pool

POOL = f"example-in-place-{os.getpid()}"
KEY = bytes(32)
BLOCK_BYTES = 65536


def main() -> None:
    with KvStore(POOL, "16mib") as store:
        with store.reserve([KEY], BLOCK_BYTES) as slots:
            names = [Code(code).name for code in slots.codes]
            print(f"reserved: {names}, readable: {store.exists([KEY])[0]}")
            if slots.codes[0] == Code.OK:  # else it is there already, or there was no room
                np.frombuffer(slots.views[0], np.uint32)[:] = np.arange(BLOCK_BYTES // 4)
            sealed = slots.seal()
        print(f"sealed: {[Code(code).name for code in sealed]}, readable: {store.exists([KEY])[0]}")

        with store.pin([KEY]) as blocks:  # the block stays in place until the end of this with
            words = np.frombuffer(blocks[0], np.uint32)
            print("pinned, read-only:" if blocks[0].readonly else "pinned:", *words[:4])
            del words  # a view that is still in use keeps its pin


if __name__ == "__main__":
    try:
        main()
    finally:
        remove_pool(POOL)
