"""A block that one process stored is read by another, after the first has ended.

Prints:
    the writer: ['OK']
    the reader: ['OK'], 65536 equal bytes
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np

from kvplug import Code, KvStore
from kvplug.shm.segment import remove_pool

POOL = f"example-two-processes-{os.getpid()}"
KEY = bytes(range(32))

WRITER = """
import sys
import numpy as np
from kvplug import Code, KvStore

with KvStore(sys.argv[1], "16mib") as store:
    codes = store.put([bytes.fromhex(sys.argv[2])], [np.full(65536, 7, np.uint8)])
    print("the writer:", [Code(code).name for code in codes])
"""


def main() -> None:
    subprocess.run([sys.executable, "-c", WRITER, POOL, KEY.hex()], check=True)
    with KvStore(POOL, create=False) as store:  # attaches to what the other process has left
        block = np.empty(65536, np.uint8)
        codes = store.get_into([KEY], [block])
        print(f"the reader: {[Code(code).name for code in codes]}, {np.count_nonzero(block == 7)} equal bytes")


if __name__ == "__main__":
    try:
        main()
    finally:
        remove_pool(POOL)
