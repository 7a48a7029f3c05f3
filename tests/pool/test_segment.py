"""What lies under a pool's name is adopted only if it is a pool of this build and user; else refused and left alone."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kvplug import errors, hostmem
from kvplug.config import Config
from kvplug.errors import Code
from kvplug.shm import layout as lay
from kvplug.shm import segment
from kvplug.sizes import format_size, parse_size
from kvplug.store import KvStore
from tests.inside import pool_of

MakeStore = Callable[..., KvStore]
KEYS = np.arange(64, dtype=np.uint8).reshape(2, 32)
BLOCKS = np.full((2, 5000), 3, np.uint8)
NOBODY_UID = 65534
CHILD_TIMEOUT_S = 120
FILLED_AT_MOST_BYTES = 256 << 20


def child(code: str, *args: str, namespace: str = "") -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a process of its own; with ``namespace``, in a mount namespace where that was run first."""
    argv = [sys.executable, "-c", textwrap.dedent(code), *args]
    if namespace:
        argv = [*may_mount(), "sh", "-c", f'set -e; {namespace}; exec "$@"', "sh", *argv]
    env = {k: v for k, v in os.environ.items() if not k.startswith("KVPLUG_")}
    return subprocess.run(argv, capture_output=True, text=True, timeout=CHILD_TIMEOUT_S, check=False, env=env)


@functools.cache
def may_mount() -> tuple[str, ...]:
    """What to put before a command that mounts for itself alone; empty where this user may not."""
    for way in (("unshare", "-m"), ("unshare", "-rm")):
        with contextlib.suppress(OSError):
            trial = [*way, "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
            if subprocess.run(trial, capture_output=True, check=False, timeout=20).returncode == 0:
                return way
    return ()


def small_shm(nbytes: int) -> str:
    return f"mount -t tmpfs -o size={nbytes} tmpfs /dev/shm"


@pytest.fixture
def made(make_store: MakeStore, pool_name: str) -> Path:
    """The segment of a pool with two blocks that nobody is attached to."""
    store = make_store(size="8mib")
    store.put(KEYS, BLOCKS)
    store.close()
    return Path(segment.segment_path(pool_name))


def poke(path: Path, word: int, value: int) -> None:
    with path.open("r+b") as f:
        f.seek(word * 8)
        f.write(struct.pack("<q", value))


def look(path: Path) -> tuple[object, ...]:
    """All that must not change while it is refused."""
    st = path.lstat()
    return st.st_ino, st.st_size, st.st_mode, st.st_uid, path.read_bytes()


def refused(
    make_store: MakeStore, pool_name: str, path: Path, error: type[errors.PoolError], *what_differs: str
) -> None:
    """Attaching fails with ``error`` that names ``what_differs`` and changes nothing; list_pools says so too."""
    before = look(path)
    for create in (True, False):
        with pytest.raises(error) as caught:
            make_store(size="8mib", create=create)
        for words in what_differs:
            assert words in str(caught.value)
    assert look(path) == before
    [info] = [i for i in segment.list_pools() if i.name == pool_name]
    assert not info.usable
    for words in what_differs:
        assert words in info.problem
    assert look(path) == before


def removed_and_made_anew(make_store: MakeStore, pool_name: str, path: Path) -> None:
    segment.remove_pool(pool_name)
    assert not path.exists()
    assert make_store(size="8mib").put(KEYS, BLOCKS).tolist() == [Code.OK] * 2


def test_a_pool_that_nothing_was_done_to_is_adopted_with_its_blocks(make_store: MakeStore, made: Path) -> None:
    assert make_store(size="8mib").exists(KEYS).all()


def test_another_format_is_refused(make_store: MakeStore, pool_name: str, made: Path) -> None:
    poke(made, lay.P_FORMAT, lay.FORMAT + 1)
    refused(make_store, pool_name, made, errors.PoolFormatError, f"format {lay.FORMAT + 1}", f"uses {lay.FORMAT}")
    removed_and_made_anew(make_store, pool_name, made)


def test_another_builds_layout_is_refused(make_store: MakeStore, pool_name: str, made: Path) -> None:
    poke(made, lay.P_LAYOUT0, lay.layout_hash() ^ 0xFF)
    here, there = lay.layout_hash() & (1 << 64) - 1, (lay.layout_hash() ^ 0xFF) & (1 << 64) - 1
    refused(make_store, pool_name, made, errors.PoolFormatError, f"{here:016x}", f"{there:016x}")
    removed_and_made_anew(make_store, pool_name, made)


@pytest.mark.parametrize("name", lay.HEADER_OF_GEOMETRY)
@pytest.mark.parametrize("value", [0, -1, 1 << 62, 3])
def test_a_header_that_describes_no_layout_is_refused(
    make_store: MakeStore, pool_name: str, made: Path, name: str, value: int
) -> None:
    poke(made, lay.HEADER_OF_GEOMETRY[name], value)
    refused(make_store, pool_name, made, errors.PoolFormatError, "header")


@pytest.mark.parametrize("word", [lay.H_MAX_CLIENTS, lay.P_LIVE_OFFSET])
def test_a_client_table_elsewhere_is_refused(make_store: MakeStore, pool_name: str, made: Path, word: int) -> None:
    poke(made, word, 1 << 40)
    refused(make_store, pool_name, made, errors.PoolFormatError, "client table")


def test_random_bytes_are_refused(make_store: MakeStore, pool_name: str) -> None:
    path = Path(segment.segment_path(pool_name))
    path.write_bytes(np.random.default_rng(3).bytes(1 << 20))
    path.chmod(0o600)
    refused(make_store, pool_name, path, errors.PoolFormatError, repr(lay.MAGIC), "not a pool")
    removed_and_made_anew(make_store, pool_name, path)


@pytest.mark.parametrize("nbytes", [0, 1, 8, lay.HEADER_WORDS * 8 - 1])
def test_too_short_for_a_header_is_refused(make_store: MakeStore, pool_name: str, made: Path, nbytes: int) -> None:
    os.truncate(made, nbytes)
    refused(make_store, pool_name, made, errors.PoolFormatError, f"{nbytes} bytes long")
    removed_and_made_anew(make_store, pool_name, made)


@pytest.mark.parametrize("left", ["header", "tables", "all but a page"])
def test_a_truncated_segment_is_refused_and_not_touched_past_its_end(
    make_store: MakeStore, pool_name: str, made: Path, left: str
) -> None:
    whole = made.stat().st_size
    nbytes = {"header": lay.HEADER_WORDS * 8, "tables": 100_000, "all but a page": whole - 4096}[left]
    os.truncate(made, nbytes)
    # In a process of its own: what must not happen is SIGBUS.
    done = child(
        """
        import sys
        from kvplug.config import Config
        from kvplug.errors import PoolFormatError
        from kvplug.store import KvStore
        try:
            KvStore(config=Config(pool=sys.argv[1], size="8mib"))
        except PoolFormatError as e:
            print(e)
        """,
        pool_name,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert str(nbytes) in done.stdout
    assert str(whole) in done.stdout
    refused(make_store, pool_name, made, errors.PoolFormatError, "truncated")
    removed_and_made_anew(make_store, pool_name, made)


def test_a_longer_segment_is_refused(make_store: MakeStore, pool_name: str, made: Path) -> None:
    os.truncate(made, made.stat().st_size + 4096)
    refused(make_store, pool_name, made, errors.PoolFormatError, str(made.stat().st_size), "appended")


@pytest.mark.parametrize("mode", [0o644, 0o666, 0o400, 0o660])
def test_another_mode_is_refused(make_store: MakeStore, pool_name: str, made: Path, mode: int) -> None:
    made.chmod(mode)
    refused(
        make_store, pool_name, made, errors.PoolOwnerError, *(["600"] if mode != 0o400 or os.geteuid() == 0 else [])
    )
    segment.remove_pool(pool_name)
    assert not made.exists()


def test_a_foreign_owners_segment_is_refused_and_not_removed(make_store: MakeStore, pool_name: str, made: Path) -> None:
    if os.geteuid() == 0:
        os.chown(made, NOBODY_UID, NOBODY_UID)
        refused(make_store, pool_name, made, errors.PoolOwnerError, f"uid {NOBODY_UID}")
        before = look(made)
        for force in (False, True):
            with pytest.raises(errors.PoolOwnerError, match=str(NOBODY_UID)):
                segment.remove_pool(pool_name, force=force)
        assert look(made) == before
        return
    # Without the right to give the file away: look at it as another user would.
    done = child(
        """
        import os, sys
        owner = os.geteuid()
        os.geteuid = lambda: owner + 1
        from kvplug.config import Config
        from kvplug.errors import PoolOwnerError
        from kvplug.store import KvStore
        try:
            KvStore(config=Config(pool=sys.argv[1], size="8mib"))
        except PoolOwnerError as e:
            print(e)
        """,
        pool_name,
    )
    assert f"uid {os.geteuid()}" in done.stdout


@pytest.mark.parametrize("target", ["a pool", "a file", "nothing", "a folder"])
def test_a_symlink_under_the_name_is_refused_and_not_followed(
    make_store: MakeStore, pool_name: str, made: Path, tmp_path: Path, target: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    if target == "a pool":
        elsewhere.write_bytes(made.read_bytes())
        elsewhere.chmod(0o600)
    elif target == "a file":
        elsewhere.write_bytes(b"precious")
    elif target == "a folder":
        elsewhere.mkdir()
    before = elsewhere.read_bytes() if elsewhere.is_file() else None
    made.unlink()
    made.symlink_to(elsewhere)
    for create in (True, False):
        with pytest.raises(errors.PoolError, match="kvplug"):
            make_store(size="8mib", create=create)
    assert made.is_symlink()
    [info] = [i for i in segment.list_pools() if i.name == pool_name]
    assert not info.usable
    assert info.problem
    segment.remove_pool(pool_name)
    assert not os.path.lexists(made)
    assert (elsewhere.read_bytes() if elsewhere.is_file() else None) == before


def test_a_folder_under_the_name_is_refused(make_store: MakeStore, pool_name: str) -> None:
    path = Path(segment.segment_path(pool_name))
    path.mkdir()
    try:
        for create in (True, False):
            with pytest.raises(errors.PoolError, match="kvplug"):
                make_store(size="8mib", create=create)
        [info] = [i for i in segment.list_pools() if i.name == pool_name]
        assert not info.usable
        with pytest.raises(errors.PoolError):
            segment.remove_pool(pool_name)
    finally:
        path.rmdir()


def test_a_lock_file_that_is_a_symlink_is_not_followed(make_store: MakeStore, pool_name: str, tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    Path(segment.lock_path(pool_name)).symlink_to(tmp_path / "precious")
    with pytest.raises(errors.PoolError, match="lock is a symbolic link"):
        make_store(size="8mib")
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_no_pool_is_made_where_none_was_asked_for(make_store: MakeStore, pool_name: str) -> None:
    with pytest.raises(errors.PoolNotFoundError, match=pool_name):
        make_store(create=False)
    with pytest.raises(errors.PoolNotFoundError, match=pool_name):
        segment.remove_pool(pool_name)
    assert not Path(segment.segment_path(pool_name)).exists()


# ---- removing ----------------------------------------------------------------------------------------------------


def test_a_pool_in_use_is_removed_only_by_force(make_store: MakeStore, pool_name: str) -> None:
    store = make_store(size="8mib")
    with pytest.raises(errors.PoolError, match="1 process"):
        segment.remove_pool(pool_name)
    assert store.put(KEYS, BLOCKS).tolist() == [Code.OK] * 2
    segment.remove_pool(pool_name, force=True)
    assert not Path(segment.segment_path(pool_name)).exists()


def test_clients_of_a_removed_pool_get_retired_and_new_ones_a_new_pool(
    make_store: MakeStore, pool_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    old = make_store(size="8mib")
    old.put(KEYS[:1], BLOCKS[:1])
    reserved = old.reserve_batch(KEYS[1:], [100])
    token = old.token
    segment.remove_pool(pool_name, force=True)
    assert old.put(KEYS[1:], BLOCKS[1:]).tolist() == [Code.RETIRED]
    assert old.reserve(KEYS, 100).codes.tolist() == [Code.RETIRED] * 2
    assert old.pin(KEYS).codes.tolist() == [Code.RETIRED] * 2
    assert old.remove(KEYS).tolist() == [Code.RETIRED] * 2
    assert old.complete(reserved.slots, reserved.gens, 0, np.zeros(1, np.uint64)).tolist() == [Code.RETIRED]
    out = np.zeros_like(BLOCKS)
    pool_of(old).maintain()
    pool_of(old).maintain()
    assert [r.getMessage() for r in caplog.records if "was removed: nothing is stored" in r.getMessage()] == [
        f"kvplug: pool {pool_name!r} was removed: nothing is stored any more until a restart"
    ], "said once, by the client that stores nothing more"
    old.get_into(KEYS, out)  # no crash: its own mapping is still there
    old.stats()

    new = make_store(size="8mib")
    assert new.stats().clients == 1
    assert not new.exists(KEYS).any()
    assert new.put(KEYS, BLOCKS).tolist() == [Code.OK] * 2
    with pytest.raises(errors.PoolError, match="another one"):
        KvStore.join(token, config=Config(pool=pool_name))
    old.close()
    assert new.get_into(KEYS, out).tolist() == [Code.OK] * 2
    new.check_integrity()


def test_a_file_that_was_simply_deleted_is_noticed(make_store: MakeStore, pool_name: str) -> None:
    store = make_store(size="8mib")
    os.unlink(segment.segment_path(pool_name))
    pool_of(store).maintain()
    assert store.put(KEYS, BLOCKS).tolist() == [Code.RETIRED] * 2


# ---- until the last exit -----------------------------------------------------------------------------------------


def test_by_default_a_pool_outlives_its_last_process(make_store: MakeStore, made: Path) -> None:
    assert made.exists()


def test_until_last_exit_the_last_to_close_removes_it(make_store: MakeStore, pool_name: str) -> None:
    path = Path(segment.segment_path(pool_name))
    a = make_store(size="8mib", persist="until-last-exit")
    b = make_store(size="8mib")  # it is the pool that says how long it lives, not each client
    a.close()
    assert path.exists()
    b.close()
    assert not path.exists()


def test_until_last_exit_holds_after_the_last_was_killed(make_store: MakeStore, pool_name: str) -> None:
    done = child(
        """
        import os, signal, sys
        import numpy as np
        from kvplug.config import Config
        from kvplug.store import KvStore
        store = KvStore(config=Config(pool=sys.argv[1], size="8mib", persist="until-last-exit"))
        store.put([bytes(32)], [bytes(100)])
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        pool_name,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = Path(segment.segment_path(pool_name)).stat().st_ino
    store = make_store(size="8mib", persist="until-last-exit")
    assert not store.exists([bytes(32)]).any()
    assert Path(segment.segment_path(pool_name)).stat().st_ino != left


# ---- no room, no /dev/shm ----------------------------------------------------------------------------------------

ATTACH = """
    import sys
    from kvplug.config import Config
    from kvplug.errors import KvplugError
    from kvplug.store import KvStore
    try:
        store = KvStore(config=Config(pool=sys.argv[1], size=int(sys.argv[2])))
        print("made", store.put([bytes(32)], [bytes(100)]))
    except KvplugError as e:
        print(type(e).__name__, e)
"""


def test_a_pool_larger_than_dev_shm_is_refused_with_both_numbers(pool_name: str) -> None:
    if may_mount():
        size, done = 64 << 20, child(ATTACH, pool_name, str(64 << 20), namespace=small_shm(32 << 20))
        assert "of 32 MiB free" in done.stdout
    else:
        space = hostmem.shm_space()
        assert space is not None
        size = space.total_bytes * 2
        done = child(ATTACH, pool_name, str(size))
        assert format_size(space.total_bytes) in done.stdout
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("PoolSpaceError"), done.stdout
    asked = parse_size(done.stdout.split("a pool of ")[1].split(" does")[0].replace(" ", ""))
    assert asked == size
    assert not Path(segment.segment_path(pool_name)).exists()


def test_in_a_small_dev_shm_the_largest_pool_that_is_named_fits_and_the_default_too(pool_name: str) -> None:
    if not may_mount():
        pytest.skip("no right to mount a small /dev/shm; what is asked there is tested with the numbers of one")
    code = """
        import os, sys
        os.environ |= {"KVPLUG_POOL": sys.argv[1], "XDG_CONFIG_HOME": "/nonexistent"}
        from kvplug import KvStore, hostmem
        from kvplug.doctor import examine
        from kvplug.errors import PoolSpaceError
        from kvplug.shm.segment import remove_pool
        def tried(size):
            os.environ["KVPLUG_SIZE"] = size
            faults = [f.fix for f in examine() if f.name == "/dev/shm" and f.status.value == "fault"]
            try:
                KvStore.from_config().close()
                remove_pool(sys.argv[1])
                return not faults, True, ""
            except PoolSpaceError as e:
                return not faults, False, str(e)
        print(tried("56mib"))
        largest = hostmem.room().largest
        print(largest, tried(largest)[:2])
        other = os.open("/dev/shm/other", os.O_CREAT | os.O_RDWR)
        os.posix_fallocate(other, 0, 36 << 20)
        print(tried("")[:2], tried("28mib")[:2])
    """
    done = child(code, pool_name, namespace=small_shm(64 << 20))
    assert done.returncode == 0, done.stderr
    refused, largest, default = done.stdout.splitlines()
    assert refused.startswith("(False, False, "), refused
    for words in ("64 MiB of 64 MiB free", "16 MiB stay free", "48 MiB for a pool", "at most 48mib"):
        assert words in refused
    assert largest == "48mib (True, True)"
    assert default == "(True, True) (False, False)"


@pytest.mark.parametrize("kind", ["absent", "read-only"])
def test_without_a_usable_dev_shm_the_error_is_typed(pool_name: str, tmp_path: Path, kind: str) -> None:
    if may_mount():
        empty = (
            "mount -t tmpfs tmpfs /dev" if kind == "absent" else f"{small_shm(32 << 20)}; mount -o remount,ro /dev/shm"
        )
        if kind == "absent":  # numpy and others want these
            empty += "; touch /dev/null; mount --bind /proc/self/fd/0 /dev/null || true"
        done = child(ATTACH, pool_name, str(8 << 20), namespace=empty)
    else:
        # the same code, led to a folder that is not there, or where not even root can make a file
        (tmp_path / "file").touch()
        where = tmp_path / ("none" if kind == "absent" else "file")
        done = child(
            f"    from kvplug import hostmem\n    hostmem.DEV_SHM = {str(where)!r}\n{ATTACH}", pool_name, str(8 << 20)
        )
    assert done.returncode == 0, done.stderr
    assert "Error" in done.stdout.split()[0]
    assert "/dev/shm" in done.stdout or str(tmp_path) in done.stdout


def test_dev_shm_filled_by_others_in_mid_growth_is_not_stored_and_no_crash(pool_name: str) -> None:
    code = """
        import os, sys
        import numpy as np
        from kvplug import hostmem
        from kvplug.config import Config
        from kvplug.store import KvStore
        store = KvStore(config=Config(pool=sys.argv[1], size="24mib", prefault=False, min_block="64kib"))
        n, block = 20, 1 << 19
        keys = np.random.default_rng(1).integers(0, 256, (n, 32), np.uint8)
        held = []
        filler = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR)
        for i in range(n):
            if i == 6:
                free = hostmem.shm_space().free_bytes
                os.posix_fallocate(filler, 0, free - 8192)
            r = store.reserve(keys[i:i + 1], block)
            held.append(r)
            if r.codes[0] == 0:
                r.views[0][:] = bytes([i]) * block
                r.seal()
                held.append(store.pin_batch(keys[i:i + 1]))
            codes = r.codes
            print(int(codes[0]), end=" ")
        print()
        print(store.stats().refused_full, store.stats().reserved_slabs, store.stats().slabs)
        out = np.zeros((6, block), np.uint8)
        print(store.get_into(keys[:6], out).tolist(), [int(x[0]) for x in out], bool((out == out[:, :1]).all()))
        store.check_integrity()
        os.close(filler)
        print("end")
    """
    space = hostmem.shm_space()
    assert space is not None
    if not may_mount() and space.free_bytes > FILLED_AT_MOST_BYTES:
        pytest.skip("no right to mount a small /dev/shm, and the one that everybody uses is too large to be filled")
    done = child(code, pool_name, namespace=small_shm(48 << 20) if may_mount() else "")
    assert done.returncode == 0, (done.returncode, done.stderr)
    codes, figures, got, end = done.stdout.strip().splitlines()
    answers = [int(x) for x in codes.split()]
    assert answers[:6] == [Code.OK] * 6
    assert answers[-1] == Code.FULL
    refused_full, reserved, slabs = map(int, figures.split())
    assert refused_full == answers.count(Code.FULL)
    assert reserved < slabs
    assert got == "[0, 0, 0, 0, 0, 0] [0, 1, 2, 3, 4, 5] True"
    assert end == "end"
