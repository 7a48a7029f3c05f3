"""Which way to the pool's kernels a test is for (kvplug/shm/native.py). Both are run: tests/pool/test_both_ways.py."""

from __future__ import annotations

import pytest

from kvplug.shm.jit import KERNELS

HAS_LIBRARY = KERNELS.library is not None
NUMBA_ONLY = pytest.mark.skipif(HAS_LIBRARY, reason="calls what no entry is: test_both_ways.py runs it with numba")
LIBRARY_ONLY = pytest.mark.skipif(not HAS_LIBRARY, reason=KERNELS.why)
