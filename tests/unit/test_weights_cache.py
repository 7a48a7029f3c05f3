"""Promises of `filehash`: a remembered hash is never that of other content, whatever happens to file or cache."""

from __future__ import annotations

import json
import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3

from kvplug.errors import NamespaceError
from kvplug.identity.filehash import HashCache, hash_file, stamp_of
from tests.stopwatch import Stopwatch

CHUNK_BYTES = 16 << 20
WRONG = b"\xee" * 32


@pytest.fixture
def cache(tmp_path: Path) -> HashCache:
    return HashCache(tmp_path / "cache", settled_s=0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(os.urandom(1000))
    time.sleep(0.02)  # past the tick of the file system's clock
    return path


def truth(path: Path) -> bytes:
    return blake3(path.read_bytes()).digest()


@pytest.mark.parametrize("nbytes", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES + 77])
@pytest.mark.parametrize("threads", [None, 1, 2])
def test_the_hash_is_blake3_of_the_content(tmp_path: Path, nbytes: int, threads: int | None) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(nbytes))
    digest, stamp = hash_file(path, threads=threads)
    assert digest == truth(path)
    assert stamp == stamp_of(path.stat())


def test_a_hash_is_remembered_and_not_taken_again(cache: HashCache, file: Path) -> None:
    digest, stamp = hash_file(file, cache=cache)
    assert cache.get(stamp) == digest
    cache.put(stamp, WRONG)
    assert hash_file(file, cache=cache)[0] == WRONG, "the second time nothing is read"
    assert HashCache(cache.directory).get(stamp) == WRONG, "another process sees it"


def rewrite(path: Path) -> None:
    path.write_bytes(os.urandom(1000))


def rewrite_and_restore_mtime(path: Path) -> None:
    before = path.stat()
    path.write_bytes(os.urandom(1000))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(os.urandom(1000))
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


@pytest.mark.parametrize("change", [rewrite, rewrite_and_restore_mtime, replace, grow], ids=lambda f: f.__name__)
def test_a_changed_file_is_hashed_again(cache: HashCache, file: Path, change: Callable[[Path], None]) -> None:
    before, _ = hash_file(file, cache=cache)
    change(file)
    after, _ = hash_file(file, cache=cache)
    assert after == truth(file) != before


def test_a_file_that_was_changed_just_now_is_not_remembered(tmp_path: Path, file: Path) -> None:
    cache = HashCache(tmp_path / "cache")
    _, stamp = hash_file(file, cache=cache)
    assert cache.get(stamp) is None


def shrink(path: Path) -> None:
    os.truncate(path, CHUNK_BYTES)


def overwrite_and_restore_mtime(path: Path) -> None:
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b"changed")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    "change", [grow, shrink, overwrite_and_restore_mtime, replace, Path.unlink], ids=lambda f: f.__name__
)
def test_a_file_that_changes_while_it_is_read_is_refused_and_not_remembered(
    cache: HashCache, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    path = tmp_path / "large"
    path.write_bytes(os.urandom(2 * CHUNK_BYTES))
    stamp = stamp_of(path.stat())
    time.sleep(0.02)  # past the tick of the file system's clock

    class ChangeAfterFirstChunk(threading.Event):
        done = False

        def is_set(self) -> bool:
            if not self.done:
                self.done = True
                change(path)
            return False

    with pytest.raises(NamespaceError, match=r"changed while it was read|No such file"):
        hash_file(path, cache=cache, stop=ChangeAfterFirstChunk())
    assert cache.get(stamp) is None
    assert not path.exists() or cache.get(stamp_of(path.stat())) is None


def entry(path: Path, digest: bytes = WRONG) -> list[object]:
    return [*stamp_of(path.stat()), digest.hex()]


def as_text(content: Callable[[Path], str | bytes]) -> Callable[[Path, Path], None]:
    def write(cache_file: Path, file: Path) -> None:
        data = content(file)
        cache_file.write_bytes(data if isinstance(data, bytes) else data.encode())
        cache_file.chmod(0o600)

    return write


def good(file: Path) -> str:
    return json.dumps({"format": 1, "files": [entry(file)]})


def others_may_read(cache_file: Path, file: Path) -> None:
    cache_file.write_text(good(file))
    cache_file.chmod(0o644)


def others_may_write(cache_file: Path, file: Path) -> None:
    cache_file.write_text(good(file))
    cache_file.chmod(0o622)


def link(cache_file: Path, file: Path) -> None:
    elsewhere = cache_file.with_name("elsewhere")
    elsewhere.write_text(good(file))
    elsewhere.chmod(0o600)
    cache_file.symlink_to(elsewhere)


def pipe(cache_file: Path, file: Path) -> None:
    os.mkfifo(cache_file, 0o600)


def foreign(cache_file: Path, file: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    cache_file.write_text(good(file))
    cache_file.chmod(0o600)
    os.chown(cache_file, 12345, 12345)


ATTACKS = {
    "empty": as_text(lambda f: ""),
    "not json": as_text(lambda f: "{"),
    "not utf-8": as_text(lambda f: b"\xff\xfe{"),
    "random": as_text(lambda f: os.urandom(5000)),
    "nested": as_text(lambda f: "[" * 200_000),
    "a list": as_text(lambda f: "[]"),
    "another format": as_text(lambda f: json.dumps({"format": 2, "files": [entry(f)]})),
    "more fields": as_text(lambda f: json.dumps({"format": 1, "files": [entry(f)], "more": 1})),
    "a short row": as_text(lambda f: json.dumps({"format": 1, "files": [entry(f)[1:]]})),
    "a float": as_text(lambda f: json.dumps({"format": 1, "files": [[1.5, *entry(f)[1:]]]})),
    "no hex": as_text(lambda f: json.dumps({"format": 1, "files": [[*entry(f)[:5], "z" * 64]]})),
    "short hex": as_text(lambda f: json.dumps({"format": 1, "files": [entry(f, b"xx")]})),
    "too large": as_text(lambda f: good(f) + " " * (5 << 20)),
    "readable by others": others_may_read,
    "writable by others": others_may_write,
    "a link": link,
    "a pipe": pipe,
    "a foreign owner's": foreign,
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_a_cache_file_that_is_not_whole_and_ours_is_ignored_and_replaced(
    cache: HashCache, file: Path, attack: Callable[[Path, Path], None]
) -> None:
    path = Path(cache.path)
    path.parent.mkdir(mode=0o700)
    attack(path, file)
    digest, stamp = hash_file(file, cache=cache)
    assert digest == truth(file)
    assert cache.get(stamp) == digest
    status = path.lstat()
    assert stat.S_ISREG(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_uid == os.geteuid()
    assert {entry.name for entry in path.parent.iterdir()} <= {path.name, "weights.lock", "elsewhere"}


def test_the_attacks_would_succeed_on_a_cache_file_that_is_ours(cache: HashCache, file: Path) -> None:
    Path(cache.directory).mkdir(mode=0o700)
    as_text(good)(Path(cache.path), file)
    assert hash_file(file, cache=cache)[0] == WRONG


def test_a_directory_that_others_may_write_to_is_not_used(cache: HashCache, file: Path) -> None:
    folder = Path(cache.directory)
    folder.mkdir()
    folder.chmod(0o777)
    digest, stamp = hash_file(file, cache=cache)
    assert digest == truth(file)
    assert not cache.put(stamp, digest)
    assert list(folder.iterdir()) == []


def test_where_nothing_can_be_written_hashing_works_all_the_same(tmp_path: Path, file: Path) -> None:
    (tmp_path / "plain file").write_text("")
    cache = HashCache(tmp_path / "plain file" / "below", settled_s=0)
    digest, stamp = hash_file(file, cache=cache)
    assert digest == truth(file)
    assert cache.get(stamp) is None


def test_many_entries_stay_within_bounds_and_the_newest_are_kept(cache: HashCache) -> None:
    Path(cache.directory).mkdir(mode=0o700)
    rows = [[1, i, 10**12, 2 * 10**18, 2 * 10**18, "00" * 32] for i in range(8192)]
    path = Path(cache.path)
    path.write_text(json.dumps({"format": 1, "files": rows}))
    path.chmod(0o600)
    assert cache.put((1, 8192, 0, 0, 0), WRONG)
    assert cache.get((1, 8192, 0, 0, 0)) == WRONG
    assert cache.get((1, 0, 10**12, 2 * 10**18, 2 * 10**18)) is None
    assert cache.get((1, 1, 10**12, 2 * 10**18, 2 * 10**18)) == bytes(32)
    assert path.stat().st_size < 4 << 20


def test_writers_at_the_same_time_leave_a_whole_file(cache: HashCache) -> None:
    def write(first: int) -> None:
        for i in range(first, first + 20):
            assert cache.put((1, i, 0, 0, 0), WRONG)

    threads = [threading.Thread(target=write, args=(100 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    kept = json.loads(Path(cache.path).read_text())["files"]
    assert len(kept) == 80
    assert sorted(os.listdir(cache.directory)) == ["weights.json", "weights.lock"]


@pytest.mark.parametrize("value", ["", "relative/path"])
def test_the_directory_is_that_of_the_xdg_specification(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert HashCache().directory == str(tmp_path / "kvplug")
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert HashCache().directory == os.path.expanduser("~/.cache/kvplug")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda p: p.symlink_to("/dev/zero"), lambda p: None])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "it")
    watch = Stopwatch()
    with pytest.raises(NamespaceError, match="it: "):
        hash_file(tmp_path / "it")
    assert watch.took_s() < 5
