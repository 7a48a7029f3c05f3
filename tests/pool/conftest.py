"""Pools of the tests' own: each test has names nobody else uses, and leaves nothing in /dev/shm."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvplug import hostmem
from kvplug.config import Config
from kvplug.shm import segment
from kvplug.store import KvStore

_numbers = itertools.count()

PATIENT_S = 5.0


def leave_nothing(pool: str) -> None:
    """Unlink all that has this pool name, or the name and a suffix, whatever it is and whoever owns it."""
    exact = {segment.segment_name(pool)}
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(hostmem.DEV_SHM):
            if name in exact or name.startswith(tuple(f"kvplug.{pool}{mark}" for mark in (".new.", ".v", ".u", "-"))):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(hostmem.DEV_SHM, name))


@pytest.fixture
def pool_name(_new_name: Callable[[], str]) -> str:
    """The name of a pool that does not exist yet."""
    return _new_name()


@pytest.fixture
def _new_name() -> Iterator[Callable[[], str]]:
    given: list[str] = []

    def new() -> str:
        given.append(f"t-{os.getpid()}-{next(_numbers)}")
        return given[-1]

    yield new
    for name in given:
        leave_nothing(name)


@pytest.fixture
def make_store(pool_name: str) -> Iterator[Callable[..., KvStore]]:
    """``make_store(size="32mib", **config)``: a store on this test's pool; closed afterwards, the pool removed.

    Keywords are those of Config (``pool=`` too), and ``create=``. Environment and configuration file count for nothing.
    Unless a test is about time-outs, the lock is waited for longer than a busy machine starves anybody.
    """
    made: list[KvStore] = []

    def make(size: int | str = "32mib", *, create: bool = True, **config: Any) -> KvStore:
        store = KvStore(
            config=Config(**{"pool": pool_name, "size": size, "lock_timeout_s": PATIENT_S, **config}), create=create
        )
        made.append(store)
        return store

    yield make
    for store in made:
        with contextlib.suppress(OSError):
            store.close()
