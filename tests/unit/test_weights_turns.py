"""Many ranks want the same hashes at the same time: one of them reads, whatever happens to it, and nobody hangs."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3

from kvplug.errors import NamespaceError
from kvplug.identity.filehash import HashCache, hash_file, stamp_of
from kvplug.identity.weights import identify_weights
from tests.pool.children import Child
from tests.stopwatch import Stopwatch

MIB = 1 << 20
FILE_BYTES = 24 * MIB
RANKS = 8


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for i in range(3):
        (folder / f"model-{i}.safetensors").write_bytes(os.urandom(FILE_BYTES))
    time.sleep(0.02)  # past the tick of the file system's clock
    return folder


def file_of(model: Path) -> Path:
    return model / "model-0.safetensors"


def cache_of(model: Path, *, patience_s: float = 30.0) -> HashCache:
    return HashCache(model.parent / "cache", settled_s=0, patience_s=patience_s)


def bytes_read() -> int:
    """That this process has read by system calls, from a disk or not."""
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])


class Ranks:
    """Processes that begin together; each says what it found and how many bytes it read for it."""

    def __init__(self, n: int, find: Callable[[int], bytes]) -> None:
        self._out, far = os.pipe()
        go, self._go = os.pipe()

        def body(rank: int) -> None:
            os.close(self._go)
            os.read(go, 1)  # until the other end is closed
            before = bytes_read()
            found = find(rank)
            os.write(far, found.hex().encode() + b" %d\n" % (bytes_read() - before))

        self.children = [Child(lambda rank=rank: body(rank)) for rank in range(n)]
        os.close(far)
        os.close(go)

    def run(self) -> tuple[list[bytes], int]:
        """(what each found, bytes that all have read together)."""
        os.close(self._go)
        statuses = [child.wait() for child in self.children]
        with os.fdopen(self._out) as file:
            told = [line.split() for line in file]
        assert len(told) == statuses.count(0)
        return [bytes.fromhex(found) for found, _ in told], sum(int(nbytes) for _, nbytes in told)


def test_one_of_many_ranks_reads_the_weights(model: Path) -> None:
    truth = identify_weights(model).digest
    found, nbytes = Ranks(RANKS, lambda _: identify_weights(model, hash_cache=cache_of(model)).digest).run()
    assert found == [truth] * RANKS
    assert 3 * FILE_BYTES <= nbytes < 4 * FILE_BYTES, "each file was to be read once"


def test_nothing_is_lost_when_ranks_remember_different_files_at_once(model: Path) -> None:
    files = [model / f"{i}.bin" for i in range(RANKS)]
    for i, file in enumerate(files):
        file.write_bytes(bytes([i]) * 5 * MIB)
    time.sleep(0.02)
    Ranks(RANKS, lambda rank: hash_file(files[rank], cache=cache_of(model))[0]).run()
    assert all(cache_of(model).get(stamp_of(file.stat())) for file in files)


class KillAfterFirstChunk(threading.Event):
    """This process ends in the midst of reading."""

    def __init__(self, sig: int) -> None:
        super().__init__()
        self.sig = sig

    def is_set(self) -> bool:
        os.kill(os.getpid(), self.sig)
        return False


def begin_and(sig: int, file: Path, cache: HashCache) -> Child:
    """A process that gets the signal while it has the turn to read this file."""
    child = Child(lambda: hash_file(file, cache=cache, stop=KillAfterFirstChunk(sig)))
    if sig == signal.SIGSTOP:
        child.wait_stopped()
    return child


def test_when_the_one_who_reads_dies_another_takes_over(model: Path) -> None:
    """Stopped first, so that all wait for it; then killed."""
    file, cache = file_of(model), cache_of(model)
    with begin_and(signal.SIGSTOP, file, cache) as first:
        ranks = Ranks(4, lambda _: hash_file(file, cache=cache)[0])
        threading.Timer(0.5, first.signal, (signal.SIGKILL,)).start()
        began = time.monotonic()
        found, nbytes = ranks.run()
    assert time.monotonic() - began >= 0.4, "they were to wait"
    assert found == [blake3(file.read_bytes()).digest()] * 4
    assert FILE_BYTES <= nbytes < 2 * FILE_BYTES, "one of the others was to read the file"


def test_one_that_dies_at_once_holds_up_nobody(model: Path) -> None:
    file, cache = file_of(model), cache_of(model)
    for _ in range(3):
        with begin_and(signal.SIGKILL, file, cache) as child:
            assert child.wait() == -signal.SIGKILL
    watch = Stopwatch()
    assert hash_file(file, cache=cache)[0] == blake3(file.read_bytes()).digest()
    assert watch.took_s() < 5


def test_one_that_is_stopped_is_not_waited_for_for_ever(model: Path) -> None:
    file = file_of(model)
    with begin_and(signal.SIGSTOP, file, cache_of(model)):
        began = time.monotonic()
        cache = cache_of(model, patience_s=0.2)
        assert hash_file(file, cache=cache)[0] == blake3(file.read_bytes()).digest()
        took = time.monotonic() - began
    assert 0.2 + FILE_BYTES / (20 * MIB) <= took < 20


def test_waiting_can_be_given_up(model: Path) -> None:
    file, cache, stop = file_of(model), cache_of(model), threading.Event()
    with begin_and(signal.SIGSTOP, file, cache):
        threading.Timer(0.2, stop.set).start()
        watch = Stopwatch()
        with pytest.raises(NamespaceError, match="stopped"):
            hash_file(file, cache=cache, stop=stop)
    assert watch.took_s() < 10


def test_a_child_that_outlives_the_one_who_reads_does_not_keep_its_turn(model: Path) -> None:
    file, cache = file_of(model), cache_of(model)
    pids, far = os.pipe()

    class ForkAndDie(threading.Event):
        def is_set(self) -> bool:
            pid = os.fork()
            if pid == 0:
                time.sleep(60)
                os._exit(0)
            os.write(far, b"%d" % pid)
            os.kill(os.getpid(), signal.SIGKILL)
            return False

    with Child(lambda: hash_file(file, cache=cache, stop=ForkAndDie())) as child:
        assert child.wait() == -signal.SIGKILL
    orphan = int(os.read(pids, 20))
    try:
        watch = Stopwatch()
        hash_file(file, cache=cache)
        assert watch.took_s() < 5
    finally:
        os.kill(orphan, signal.SIGKILL)
        os.close(pids)
        os.close(far)


def test_threads_of_one_process_take_turns_too(model: Path) -> None:
    file, cache = file_of(model), cache_of(model)
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(hash_file(file, cache=cache)[0])) for _ in range(4)]
    before = bytes_read()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 4
    assert len(set(found)) == 1
    assert bytes_read() - before < 2 * FILE_BYTES


@pytest.mark.parametrize("spoil", ["others may write there", "the lock is a link", "the lock is a folder"])
def test_where_no_lock_can_be_had_everybody_reads(model: Path, spoil: str) -> None:
    file, cache = file_of(model), cache_of(model)
    folder = Path(cache.directory)
    folder.mkdir(mode=0o700)
    if spoil == "others may write there":
        folder.chmod(0o777)
    elif spoil == "the lock is a link":
        (folder / "weights.lock").symlink_to(file)
    else:
        (folder / "weights.lock").mkdir()
    before = file.stat().st_mtime_ns
    assert hash_file(file, cache=cache)[0] == blake3(file.read_bytes()).digest()
    assert file.stat().st_mtime_ns == before
