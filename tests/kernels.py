"""Which way to the pool's kernels a test is for (kvplug/shm/native.py). Both are run: tests/pool/test_both_ways.py."""

from __future__ import annotations

import os

import pytest

from kvplug.shm.jit import KERNELS
from kvplug.shm.native import ENV

HAS_LIBRARY = KERNELS.library is not None
if not HAS_LIBRARY and os.environ.get(ENV) != "numba" and os.environ.get("KVPLUG_TEST_LIBRARY") == "required":
    raise RuntimeError(f".ci/run wants the library to be tested, but {KERNELS.why}: is there a C compiler?")
NUMBA_ONLY = pytest.mark.skipif(HAS_LIBRARY, reason="calls what no entry is: test_both_ways.py runs it with numba")
LIBRARY_ONLY = pytest.mark.skipif(not HAS_LIBRARY, reason=KERNELS.why)
