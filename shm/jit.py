"""The decorator that every compiled kernel of this package wears.

Kernels run without the GIL and are cached on disk by numba, so that a process does not compile them again. numba
notices a change of the file that a kernel stands in, but not of the files that it takes functions and constants from;
a stale kernel over a new table layout would write wherever the old one did. Hence the stamp: the content of all files
here decides whether a cached kernel may be used.
"""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

F = TypeVar("F", bound=Callable[..., Any])


def _sources_stamp() -> tuple[str, int]:
    digest = hashlib.blake2b(digest_size=16)
    size = 0
    for path in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        text = path.read_bytes()
        size += len(text)
        digest.update(path.name.encode() + b"\0" + text)
    return digest.hexdigest(), size


_STAMP = _sources_stamp()


def kernel(fn: F) -> F:
    """Compile ``fn`` on its first call, without the GIL, cached on disk where numba finds a writable place."""
    try:
        dispatcher = njit(nogil=True, cache=True)(fn)
        dispatcher._cache._cache_file._source_stamp = _STAMP
    except (RuntimeError, AttributeError):
        # No writable cache directory (a read-only image without a home), or a numba that keeps its stamp elsewhere:
        # compiling anew in every process is slow but right. `kvplug doctor` says so.
        dispatcher = njit(nogil=True)(fn)
    return cast(F, dispatcher)
