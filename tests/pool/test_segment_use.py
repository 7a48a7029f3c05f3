"""A pool that somebody uses is in use, whatever was done to its file; the kernel is asked, not the file."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvplug import KvStore, errors, hostmem
from kvplug.config import Config
from kvplug.shm import layout as lay
from kvplug.shm import liveness, segment
from kvplug.shm.liveness import close_private, count_listed, count_locks, open_private, try_lock_byte
from tests.inside import pool_of
from tests.pool.children import Peer, blocks, keys, put, quiet

Make = Callable[..., KvStore]
SIZE = 16 << 10
NOBODY_UID = 65534


def write(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def replaced(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def moved_behind_a_link(path: Path) -> None:
    elsewhere = path.with_name(path.name + ".moved")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "mode 0000": lambda path: path.chmod(0),
    "mode 0666": lambda path: path.chmod(0o666),
    "first bytes": lambda path: write(path, 0, b"precious"),
    "first page": lambda path: write(path, 0, b"\xff" * 4096),
    "zeros": lambda path: write(path, 0, bytes(lay.HEADER_WORDS * 8)),
    "another format": lambda path: write(path, lay.P_FORMAT * 8, struct.pack("<q", lay.FORMAT + 1)),
    "clients elsewhere": lambda path: write(path, lay.P_LIVE_OFFSET * 8, struct.pack("<qq", 1 << 30, 0)),
    "cut to nothing": lambda path: os.truncate(path, 0),
    "cut to a header": lambda path: os.truncate(path, lay.HEADER_WORDS * 8),
    "longer": lambda path: os.truncate(path, path.stat().st_size + 4096),
    "another file": lambda path: replaced(path, lambda path: path.write_bytes(b"x" * 5000)),
    "a copy": lambda path: replaced(path, lambda path: path.write_bytes(b"x") and path.chmod(0o600)),
    "a pipe": lambda path: replaced(path, os.mkfifo),
    "a folder": lambda path: replaced(path, Path.mkdir),
    "a link that leads nowhere": lambda path: replaced(path, lambda path: path.symlink_to("/nonexistent")),
    "moved behind a link": moved_behind_a_link,
}


@pytest.fixture
def path(pool_name: str) -> Iterator[Path]:
    found = Path(segment.segment_path(pool_name))
    yield found
    found.with_name(found.name + ".moved").unlink(missing_ok=True)
    if found.is_dir():
        found.rmdir()


@pytest.fixture
def used(pool_name: str, path: Path) -> Iterator[Peer]:
    """Another process that is attached to the pool, and touches nothing by itself: what was cut off is SIGBUS."""
    peer = Peer(lambda: KvStore(config=Config(pool=pool_name, size="8mib", lock_timeout_s=5.0)))
    yield peer
    peer.kill()


def info_of(pool: str) -> segment.PoolInfo:
    [info] = [info for info in segment.list_pools() if info.name == pool]
    return info


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_pool_with_a_client_is_in_use_until_it_ends(
    make_store: Make, pool_name: str, path: Path, used: Peer, damage: str
) -> None:
    DAMAGES[damage](path)
    before = path.lstat()
    info = info_of(pool_name)
    assert (info.clients_alive, info.usable) == (1, False), info
    with pytest.raises(errors.PoolError, match="1 process attached"):
        segment.remove_pool(pool_name)
    for create in (True, False):
        with pytest.raises(errors.PoolError, match="kvplug"):
            make_store(size="8mib", create=create)
    after = path.lstat()
    assert (after.st_ino, after.st_size, after.st_mode) == (before.st_ino, before.st_size, before.st_mode)
    used.kill()
    assert info_of(pool_name).clients_alive == 0
    if path.is_dir():
        with pytest.raises(errors.PoolError, match="rmdir"):
            segment.remove_pool(pool_name)
    else:
        segment.remove_pool(pool_name)
        assert not os.path.lexists(path)
        make_store(size="8mib")


def test_a_client_of_a_removed_pool_does_not_keep_the_next_one(make_store: Make, pool_name: str, used: Peer) -> None:
    segment.remove_pool(pool_name, force=True)
    make_store(size="8mib").close()
    assert info_of(pool_name).clients_alive == 0
    segment.remove_pool(pool_name)


def test_another_users_client_is_counted_though_the_file_can_not_be_opened(path: Path, pool_name: str) -> None:
    """As the file's owner with no right to read it; root may read anything, so it becomes somebody else."""
    code = """
        import os, sys
        import kvplug.shm.segment as segment
        from kvplug import errors
        from kvplug.shm import liveness
        pool, owner = sys.argv[1], int(sys.argv[2])
        if os.geteuid() != owner:
            os.setuid(owner)
        path = segment.segment_path(pool)
        try:
            os.close(os.open(path, os.O_RDONLY))
        except PermissionError:
            print("closed")
        for proc in ("/proc", "/nonexistent"):
            liveness.PROC = proc
            [info] = [info for info in segment.list_pools() if info.name == pool]
            print(info.clients_alive)
            try:
                segment.remove_pool(pool)
            except errors.PoolError as e:
                print(e)
    """
    owner = NOBODY_UID if os.geteuid() == 0 else os.geteuid()
    peer = Peer(lambda: KvStore(config=Config(pool=pool_name, size="8mib", lock_timeout_s=5.0)))
    try:
        os.chown(path, owner, -1)
        path.chmod(0)
        argv = [sys.executable, "-c", textwrap.dedent(code), pool_name, str(owner)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    finally:
        peer.kill()
    assert done.returncode == 0, done.stderr
    closed, alive, refused, unknown, doubted = done.stdout.splitlines()
    assert (closed, alive, unknown) == ("closed", "1", "-1")
    assert "1 process attached" in refused
    assert "perhaps" in doubted
    assert path.exists()


def test_the_dead_are_told_from_the_living_though_the_header_lies(make_store: Make, pool_name: str) -> None:
    """Whoever reaps by an overwritten header would take the pins of all that live."""
    a, b = quiet(make_store(size="8mib")), quiet(make_store(size="8mib"))
    of = keys(2, 1)
    put(a, of, SIZE)
    pinned = b.pin_batch(of)
    write(Path(segment.segment_path(pool_name)), lay.P_LIVE_OFFSET * 8, struct.pack("<q", 1 << 30))
    assert pool_of(a).reap() == 0
    assert a.remove(of).tolist() == [-10, -10]
    b.unpin(pinned.slots)
    assert a.remove(of).tolist() == [0, 0]


def test_the_last_to_leave_is_the_last_though_the_header_lies(make_store: Make, pool_name: str, path: Path) -> None:
    a, b = (quiet(make_store(size="8mib", persist="until-last-exit")) for _ in range(2))
    write(path, lay.P_LIVE_OFFSET * 8, struct.pack("<q", 1 << 30))
    a.close()
    assert path.exists()
    b.close()
    assert not path.exists()


def test_a_life_span_that_nobody_wrote_removes_nothing(make_store: Make, pool_name: str, path: Path) -> None:
    store = quiet(make_store(size="8mib"))
    write(path, lay.H_PERSIST * 8, struct.pack("<q", 0x3333333333333333))
    store.close()
    assert path.exists()


def test_a_link_under_the_name_ends_no_maintenance(make_store: Make, pool_name: str, path: Path) -> None:
    """One that leads to itself can't even be looked at."""
    store = quiet(make_store(size="8mib"))
    path.unlink()
    path.symlink_to(path)
    pool_of(store).maintain()
    of = keys(1, 2)
    assert store.put(of, list(blocks(of, SIZE))).tolist() == [errors.Code.RETIRED]


def test_locks_are_counted_wherever_they_lie(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    st = path.stat()
    mine = open_private(str(path), os.O_RDWR)
    others = []
    try:
        for at in (0, 1, 1024, 1151, 1 << 30, liveness.LOCKS_END - 1, liveness.LOCKS_END, 1 << 62):
            others.append(open_private(str(path), os.O_RDWR))
            assert try_lock_byte(others[-1], at)
            assert count_locks(mine) == min(len(others), 6), "an agent's own lies above"
        if os.path.exists("/proc/locks"):
            assert count_listed({(st.st_dev, st.st_ino)}) in (6, 0), "0: a file system that shows another device"
        assert count_locks(others[0]) == 5
    finally:
        for fd in [mine, *others]:
            close_private(fd)
    assert count_listed(set()) in (0, -1)


def test_proc_shows_the_device_that_stat_shows_for_shared_memory() -> None:
    """Files that can't be opened are found in the kernel's lists by it."""
    path = Path(hostmem.DEV_SHM, f"kvplug-test-{os.getpid()}")
    path.touch()
    fd = open_private(str(path), os.O_RDWR)
    try:
        assert try_lock_byte(fd, 7)
        st = path.stat()
        assert count_listed({(st.st_dev, st.st_ino)}) == 1
    finally:
        close_private(fd)
        path.unlink()
