"""The decorators that every compiled kernel of this package wears.

There are two ways to machine code, from the same sources. A wheel brings a library that ``build.py`` has made; with it
a kernel that Python calls is a function of that library, and numba is not even imported (``native.py`` says when).
Elsewhere numba compiles, in the first process after an installation.

Kernels run without the GIL and are cached on disk by numba, so that a process does not compile them again. numba
notices a change of the file that a kernel stands in, but not of the files that it takes functions and constants from;
a stale kernel over a new table layout would write wherever the old one did. Hence the stamp: the content of all files
here decides whether a cached kernel may be used.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, NoReturn, TypeVar, cast

from kvplug.shm import native

COMPILE_TIMEOUT_S = 180.0
COMPILE_POLL_S = 0.05
WAIT_SAID_AFTER_S = 2.0
PROGRESS_EVERY_S = 15.0
F = TypeVar("F", bound=Callable[..., Any])


STAMP = native.sources_stamp()
KERNELS: Final = native.choose(STAMP[0])
"""Which way this process goes, and why: decided once, when the first module with kernels is imported."""


class _Nothing:
    """Stands for numba's and LLVM's names where nothing is compiled: what is made of them is never used."""

    def __getattr__(self, name: str) -> _Nothing:
        if name.startswith("__"):  # inspect, copy and doctest ask objects for what they are
            raise AttributeError(name)
        return self

    def __call__(self, *_: Any, **__: Any) -> _Nothing:
        return self


def _compilers_names() -> tuple[Any, ...]:
    if KERNELS.library is not None:
        return (_Nothing(),) * 5
    from llvmlite import ir
    from numba import njit, types
    from numba.core import cgutils
    from numba.extending import intrinsic

    return ir, types, cgutils, intrinsic, njit


ir, types, cgutils, intrinsic, njit = _compilers_names()
"""What the modules of this package that write LLVM's code need, or nothing."""


_entries: list[tuple[Any, str]] = []
_late: list[tuple[Any, str]] = []
_not_kept: list[str] = []
"""Kernels that numba has no place for on disk, by name."""
_warm = threading.Lock()


def kernel(fn: F) -> F:
    """Compile ``fn`` on its first call, without the GIL, cached on disk where numba finds a writable place.

    With the library this is part of those functions that Python calls, and can't be called by itself.
    """
    if KERNELS.library is not None:
        return cast(F, functools.partial(_part_of_the_library, fn.__qualname__))
    try:
        dispatcher = njit(nogil=True, cache=True)(fn)
        dispatcher._cache._cache_file._source_stamp = STAMP
    except (RuntimeError, AttributeError):
        # No writable cache directory (a read-only image without a home), or a numba that keeps its stamp elsewhere:
        # compiling anew in every process is slow but right. `kvplug doctor` says so.
        dispatcher = njit(nogil=True)(fn)
        _not_kept.append(fn.__name__)
    return cast(F, dispatcher)


def _part_of_the_library(name: str, *_: Any) -> NoReturn:
    raise TypeError(f"{name} is no entry of the compiled library; {native.ENV}=numba lets it be called")


def entry(signature: str, *, late: bool = False) -> Callable[[F], F]:
    """A kernel that Python calls: it has one signature, which :func:`warm_up` compiles or loads before the first call.

    ``late``: no ordinary call needs it, so that whoever does calls :func:`prepare` first.

    In ``signature``, I, I8, I32, B, K stand for arrays of int64, int8, int32, bool and for keys, int64 (N, 4); i and
    b for scalars.
    """

    def decorate(fn: F) -> F:
        if KERNELS.library is not None:
            return cast(F, getattr(KERNELS.library, export_name(fn)))
        dispatcher = kernel(fn)
        (_late if late else _entries).append((dispatcher, signature))
        return dispatcher

    return decorate


def export_name(fn: Callable[..., Any]) -> str:
    """What an entry is called in the library: ``read_exists``."""
    return f"{fn.__module__.rpartition('.')[2]}_{fn.__name__}"


_TYPES = {
    "I": "int64[::1]",
    "I8": "int8[::1]",
    "I32": "int32[::1]",
    "B": "boolean[::1]",
    "K": "int64[:,::1]",
    "i": "int64",
    "b": "boolean",
    "v": "void",
    "ii": "UniTuple(int64, 2)",
}


def entries() -> list[tuple[Any, str]]:
    """(dispatcher, signature) of all that Python calls, as far as they were imported and not warmed up."""
    return [*_entries, *_late]


def types_of(signature: str) -> tuple[str, list[str]]:
    """(type of what an entry answers, types of its arguments) as numba spells them."""
    result, _, arguments = signature.partition("(")
    return _TYPES[result], [_TYPES[a.strip()] for a in arguments.rstrip(")").split(",") if a.strip()]


def _compile_entry(dispatcher: Any, signature: str) -> None:
    """Load or compile one kernel for the signature of an entry. Does nothing the second time."""
    result, arguments = types_of(signature)
    dispatcher.compile(f"{result}({', '.join(arguments)})")


def prepare(late_entry: Callable[..., Any]) -> None:
    """Load or compile an entry that :func:`warm_up` leaves out. Does nothing with the library."""
    for dispatcher, signature in _late:
        if dispatcher is late_entry:
            _compile_entry(dispatcher, signature)


@contextlib.contextmanager
def _one_process_compiles() -> Iterator[None]:
    """Processes that start together after an installation: the first compiles, the others then load what it made.

    The lock is on this source file, which they share exactly if they share the cache. After the deadline they go on
    without it: slower, not wrong.
    """
    fd = os.open(__file__, os.O_RDONLY | os.O_CLOEXEC)
    try:
        began = time.monotonic()
        is_said = False
        while (waited := time.monotonic() - began) < COMPILE_TIMEOUT_S:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if not is_said and waited >= WAIT_SAID_AFTER_S:
                    is_said = True
                    native.logger().warning(
                        "another process compiles the pool's inner loops: waiting for it, %.0f s at most",
                        COMPILE_TIMEOUT_S,
                    )
                time.sleep(COMPILE_POLL_S)
        yield
    finally:
        os.close(fd)


def _why_again() -> str:
    if not _not_kept:
        return "; numba keeps the result for the next start"
    return ", at every start: numba has no place to keep them; set NUMBA_CACHE_DIR to a folder of this user's"


class _Progress:
    """What is said while kernels are compiled: that it begins, how far it is, how long it took. Loading is silent."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._began = self._said_at = time.monotonic()
        self._is_said = False

    def step(self, *, was_compiled: bool) -> None:
        """One more kernel is there."""
        self._done += 1
        now = time.monotonic()
        if was_compiled and not self._is_said:  # the first of many: the rest takes a while
            self._is_said, self._said_at = True, now
            native.logger().warning(
                "compiling the pool's inner loops, %d of them: a minute on a quiet machine, longer on a busy one%s",
                self._total,
                _why_again(),
            )
        elif self._is_said and now - self._said_at >= PROGRESS_EVERY_S and self._done < self._total:
            self._said_at = now
            native.logger().warning(
                "compiling the pool's inner loops: %d of %d after %.0f s", self._done, self._total, now - self._began
            )

    def end(self) -> None:
        """All are there."""
        if self._is_said:
            native.logger().warning("compiled the pool's inner loops in %.0f s", time.monotonic() - self._began)


def warm_up() -> None:
    """Load every entry kernel, from numba's cache or by compiling it: a minute the first time, then part of a second.

    Called before a store is attached, so that no call later compiles anything while others wait for it. With the
    library there is nothing to do.
    """
    with _warm:
        if not _entries:
            return
        with _one_process_compiles():
            progress = _Progress(len(_entries))
            while _entries:
                _compile_entry(*_entries[-1])
                dispatcher, _ = _entries.pop()
                progress.step(was_compiled=bool(dispatcher.stats.cache_misses))
            progress.end()
