"""The pool behind a store, for tests of what lies inside of shm/.

Products know a store by its public names alone (`tests/unit/test_house.py`); a test that breaks a table, arms a
failpoint or lets upkeep run once goes through here.
"""

from __future__ import annotations

from kvplug.shm.pool import Pool
from kvplug.store import KvStore


def pool_of(store: KvStore) -> Pool:
    """The store's pool: tables, words of this process, sections."""
    return store._pool
