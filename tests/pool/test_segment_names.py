"""Whose a pool's name is while it is made: other users are not in the way, and what failed leaves nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from kvplug import errors
from kvplug.shm import segment
from kvplug.store import KvStore


def child(code: str, pool: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("KVPLUG_")}
    argv = [sys.executable, "-c", textwrap.dedent(code), pool]
    return subprocess.run(argv, capture_output=True, text=True, timeout=240, check=False, env=env)


def test_a_lock_file_that_another_user_left_is_not_in_the_way(pool_name: str) -> None:
    """Of a pool that is gone; nobody but its owner could open or delete the file."""
    with segment.name_lock(pool_name):
        pass
    os.chmod(segment.lock_path(pool_name), 0)
    done = child(
        """
        import os, sys
        from kvplug.shm import segment
        owner = os.geteuid()
        if owner == 0:
            os.setuid(65534)
        else:
            os.geteuid = lambda: owner + 1
        with segment.name_lock(sys.argv[1]):
            print("locked")
        """,
        pool_name,
    )
    assert done.stdout == "locked\n", done.stderr


def test_a_pool_that_another_user_made_at_the_same_time_is_refused(
    make_store: Callable[..., KvStore], pool_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two users hold two locks: what keeps their pools apart is that a name is linked once."""
    make_store(size="8mib").close()
    made = Path(segment.segment_path(pool_name))
    found = segment.open_segment

    def not_yet(pool: str) -> segment.Segment:
        monkeypatch.setattr(segment, "open_segment", found)
        raise errors.PoolNotFoundError(pool)

    monkeypatch.setattr(segment, "open_segment", not_yet)
    before = made.stat().st_ino, made.read_bytes()
    with pytest.raises(errors.PoolOwnerError, match="made by another user meanwhile"):
        make_store(size="8mib")
    assert (made.stat().st_ino, made.read_bytes()) == before


def test_a_pool_that_can_not_be_mapped_is_a_typed_error_and_a_new_one_is_not_left(pool_name: str) -> None:
    done = child(
        """
        import resource, sys
        from kvplug.config import Config
        from kvplug.errors import PoolSpaceError
        from kvplug.shm.jit import warm_up
        from kvplug.store import KvStore
        warm_up()
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
        try:
            KvStore(config=Config(pool=sys.argv[1], size="256mib"))
        except PoolSpaceError as e:
            print(e)
        """,
        pool_name,
    )
    assert "ulimit -v" in done.stdout, done.stderr
    assert "Raise that limit" in done.stdout
    assert not Path(segment.segment_path(pool_name)).exists()


def test_a_reservation_that_is_open_at_exit_is_no_noise(pool_name: str) -> None:
    done = child(
        """
        import sys
        from kvplug import KvStore
        store = KvStore(sys.argv[1], "8mib")
        reserved, pinned = store.reserve([bytes(32)], 100), store.pin([bytes(32)])
        sys.modules["kvplug.kept"] = (reserved, pinned)
        """,
        pool_name,
    )
    assert (done.returncode, done.stderr) == (0, "")
