"""Whose a pool's name is while it is made: other users are not in the way, and what failed leaves nothing."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from kvplug import errors, hostmem
from kvplug.shm import segment
from kvplug.shm.liveness import close_private, open_private, try_lock_byte
from kvplug.store import KvStore
from tests.pool.children import DEADLINE_S, Child


def child(code: str, pool: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("KVPLUG_")}
    argv = [sys.executable, "-c", textwrap.dedent(code), pool]
    return subprocess.run(argv, capture_output=True, text=True, timeout=240, check=False, env=env)


def test_a_lock_file_that_another_user_left_is_not_in_the_way(pool_name: str) -> None:
    """Of a pool that is gone; nobody but its owner could open or delete the file."""
    os.close(os.open(segment.lock_path(pool_name), os.O_CREAT | os.O_EXCL, 0))
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


# ---- what is left under a name -----------------------------------------------------------------------------------


def files_of(pool: str) -> list[str]:
    return sorted(name for name in os.listdir(hostmem.DEV_SHM) if name.startswith(f"kvplug.{pool}."))


def test_who_asks_for_a_pool_that_is_not_there_leaves_nothing(
    make_store: Callable[..., KvStore], pool_name: str
) -> None:
    with pytest.raises(errors.PoolNotFoundError):
        make_store(create=False)
    assert files_of(pool_name) == []
    for force in (False, True):
        with pytest.raises(errors.PoolNotFoundError, match="kvplug pools"):
            segment.remove_pool(pool_name, force=force)
        assert files_of(pool_name) == []
    with pytest.raises(errors.PoolSpaceError):
        make_store(size="8tb")
    assert files_of(pool_name) == []


def test_a_lock_file_that_a_killed_process_left_goes_when_the_pool_is_asked_to(pool_name: str) -> None:
    Path(segment.lock_path(pool_name)).touch(0o600)
    with pytest.raises(errors.PoolNotFoundError):
        segment.remove_pool(pool_name)
    assert files_of(pool_name) == []


def test_a_pool_that_is_gone_leaves_nothing(make_store: Callable[..., KvStore], pool_name: str) -> None:
    make_store(size="8mib").close()
    assert len(files_of(pool_name)) == 2, "pool and lock file"
    segment.remove_pool(pool_name)
    assert files_of(pool_name) == []
    make_store(size="8mib", persist="until-last-exit").close()
    assert files_of(pool_name) == []


def test_one_at_a_time_holds_a_name_though_its_lock_file_comes_and_goes(pool_name: str, tmp_path: Path) -> None:
    """Each round deletes the file under those who wait for it."""
    inside = tmp_path / "inside"

    def body() -> None:
        for _ in range(300):
            with segment.name_lock(pool_name, timeout_s=DEADLINE_S):
                os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # somebody else is in there: an error
                os.unlink(inside)

    with contextlib.ExitStack() as running:
        children = [running.enter_context(Child(body)) for _ in range(6)]
        assert [child.wait(120) for child in children] == [0] * 6
    assert files_of(pool_name) == []


@pytest.fixture
def unfinished(pool_name: str) -> Path:
    """What a creator that was killed leaves."""
    path = Path(hostmem.DEV_SHM, f"kvplug.{pool_name}.new.1.0123abcd")
    path.write_bytes(bytes(8192))
    path.chmod(0o600)
    return path


def test_what_a_killed_creator_left_goes_with_the_next_pool_or_by_rm(
    make_store: Callable[..., KvStore], pool_name: str, unfinished: Path
) -> None:
    segment.remove_pool(pool_name)
    assert files_of(pool_name) == []
    unfinished.write_bytes(bytes(8192))
    make_store(size="8mib").close()
    assert not unfinished.exists()


def test_what_a_creator_that_lives_has_begun_stays(
    make_store: Callable[..., KvStore], pool_name: str, unfinished: Path
) -> None:
    """It may hold another lock file: the same user has another number inside a container."""
    fd = open_private(str(unfinished), os.O_RDWR)
    try:
        assert try_lock_byte(fd, segment.CREATING_BYTE)
        make_store(size="8mib").close()
        segment.remove_pool(pool_name)
        assert unfinished.exists()
    finally:
        close_private(fd)
    make_store(size="8mib")
    assert not unfinished.exists()


def test_a_folder_where_a_creator_would_have_left_a_file_is_not_in_the_way(
    make_store: Callable[..., KvStore], pool_name: str
) -> None:
    folder = Path(hostmem.DEV_SHM, f"kvplug.{pool_name}.new.1.0123abcd")
    folder.mkdir()
    try:
        make_store(size="8mib")
    finally:
        folder.rmdir()
