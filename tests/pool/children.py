"""Processes that a test makes, kills and watches: forked from the test process, whose kernels are compiled already.

Every wait has a deadline, and a child whose test forgot it is ended by its own alarm.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import Pipe
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvplug import KvStore
from kvplug.shm import layout as lay
from kvplug.shm.failpoints import arm
from tests.inside import pool_of

DEADLINE_S: Final = 120.0
LIFE_S: Final = 120
GRACE_S: Final = 0.05
"""Quarantine that these tests configure: long enough to be seen, short enough to be waited out."""
U8 = npt.NDArray[np.uint8]


def keys(n: int, seed: int) -> U8:
    """``n`` keys, (n, 32) uint8, the same for the same seed in every process."""
    return np.random.default_rng(seed).integers(0, 256, (n, 32), np.uint8)


def blocks(of: U8, nbytes: int) -> U8:
    """The only right bytes for each key, (n, nbytes) uint8: a block under a wrong key is seen as such."""
    words = np.ascontiguousarray(of).view(np.uint64)
    steps = np.arange(nbytes // 8, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return ((words[:, :1] + steps) ^ words[:, 1:2]).view(np.uint8)


def read(store: KvStore, of: U8, nbytes: int) -> tuple[npt.NDArray[np.int8], U8]:
    """(codes, bytes) of these keys."""
    out = np.zeros((len(of), nbytes), np.uint8)
    return store.get_into(of, list(out)), out


def check_bytes(store: KvStore, of: U8, nbytes: int, *, may_miss: bool = False) -> int:
    """Each key's block is right, or missing where that is allowed. The number of hits."""
    codes, out = read(store, of, nbytes)
    assert set(codes.tolist()) <= ({0, -1} if may_miss else {0}), codes.tolist()
    hit = codes == 0
    assert (out[hit] == blocks(of[hit], nbytes)).all(), "a hit gave other bytes than were stored"
    return int(hit.sum())


def put(store: KvStore, of: U8, nbytes: int, batch: int = 32) -> npt.NDArray[np.int8]:
    """Put each key's block, in batches that fit every budget."""
    data = blocks(of, nbytes)
    parts = [store.put(of[i : i + batch], list(data[i : i + batch])) for i in range(0, len(of), batch)]
    return np.concatenate(parts)


def fill(store: KvStore, nbytes: int, seed: int) -> U8:
    """Fill the whole pool with blocks of one size; their keys."""
    g = pool_of(store).geometry
    of = keys(g.n_slabs * (g.slab_bytes // g.stride(nbytes, 1)), seed)
    codes = put(store, of, nbytes)
    assert (codes == 0).all(), codes.tolist()
    return of


def quiet(store: KvStore) -> KvStore:
    """Without its maintenance thread: what happens, the test does."""
    pool_of(store)._maintenance.stop()
    return store


def clients_of(store: KvStore) -> list[tuple[int, int, int]]:
    """(row, state, session) of each client row in use."""
    g = pool_of(store).geometry
    rows = pool_of(store).T[g.o_client : g.o_client + lay.MAX_CLIENTS * lay.CLIENT_WORDS].reshape(-1, lay.CLIENT_WORDS)
    return [
        (int(c), int(rows[c, lay.C_STATE]), int(rows[c, lay.C_SESSION]))
        for c in np.flatnonzero(rows[:, lay.C_STATE] != lay.CLIENT_FREE)
    ]


def settle(store: KvStore, grace_s: float = GRACE_S) -> None:
    """Reap the dead and wait their quarantine out."""
    assert pool_of(store).reap() >= 0
    time.sleep(grace_s * 1.2)
    pool_of(store).release_expired()


def check_nothing_left(store: KvStore) -> None:
    """No slot in writing or quarantine, no pin, no client but this one; tables and bytes whole."""
    s = store.stats()
    left = (s.writing_slots, s.quarantined_slots, s.pinned_slots)
    assert left == (0, 0, 0), f"writing, quarantined, pinned slots left: {left}"
    assert [c for c, _, _ in clients_of(store)] == [pool_of(store).client]
    store.check_integrity(deep=True)


class Child:
    """A forked process that runs ``body`` and exits with 0, or 70 and a traceback."""

    def __init__(self, body: Callable[[], object]) -> None:
        self.status: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(LIFE_S)
                body()
                code = 0
            except BaseException:  # noqa: BLE001
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(code)

    def wait(self, timeout_s: float = DEADLINE_S) -> int:
        """Exit status, the negative signal number if one killed it. AssertionError when it is late."""
        deadline = time.monotonic() + timeout_s
        while self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"the child did not end within {timeout_s} s")
            else:
                time.sleep(0.001)
        return self.status

    def wait_stopped(self, timeout_s: float = DEADLINE_S) -> None:
        """Until a stop signal has stopped it."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED)
            if pid:
                assert os.WIFSTOPPED(status), f"ended with status {status} instead of stopping"
                return
            time.sleep(0.001)
        self.kill()
        raise AssertionError(f"the child did not stop within {timeout_s} s")

    def signal(self, sig: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, sig)

    def kill(self) -> None:
        """End it, if it has not ended."""
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class Peer:
    """A second process with a store of its own on the same pool, driven call by call.

    ``peer.call(function, *args)`` runs ``function(store, *args)`` there; functions and arguments travel pickled, so the
    functions stand at the top of a module.
    """

    def __init__(self, make: Callable[[], KvStore]) -> None:
        self._near, far = Pipe()

        def body() -> None:
            self._near.close()
            store = quiet(make())
            far.send(store.session_id)
            while True:
                try:
                    message = far.recv()
                except EOFError:
                    return
                if message is None:
                    store.close()
                    return
                function, args = message
                try:
                    far.send((True, function(store, *args)))
                except Exception as e:  # noqa: BLE001
                    far.send((False, f"{type(e).__name__}: {e}"))

        self.child = Child(body)
        far.close()
        self.session_id: int = self._receive()

    def _receive(self) -> Any:
        assert self._near.poll(DEADLINE_S), "the other process does not answer"
        return self._near.recv()

    def begin(self, function: Callable[..., object], *args: object) -> None:
        """Start a call without waiting for its answer."""
        self._near.send((function, args))

    def end(self) -> Any:
        """The answer of the call that was started."""
        ok, answer = self._receive()
        assert ok, answer
        return answer

    def call(self, function: Callable[..., object], *args: object) -> Any:
        """Run ``function(store, *args)`` there and return what it answers."""
        self.begin(function, *args)
        return self.end()

    def kill(self) -> None:
        """End it by SIGKILL."""
        self.child.kill()
        self._near.close()

    def close(self) -> None:
        """Let it close its store and exit."""
        if self.child.status is None:
            with contextlib.suppress(OSError):
                self._near.send(None)
            self.child.wait()
        self._near.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        if self.child.status is None:
            self.kill()


def another(store: KvStore) -> KvStore:
    """A store of this process on the same pool, in a session of its own."""
    return KvStore(config=store.config, create=False)


def die_at(
    store: KvStore, name: str, operation: Callable[[KvStore], object], *, skip: int = 0, sig: int = signal.SIGKILL
) -> Child:
    """A child with a store of its own that gets ``sig`` when it passes failpoint ``name`` in ``operation``.

    With SIGKILL its death is waited for and proved; with SIGSTOP, its stop.
    """

    def body() -> None:
        own = quiet(another(store))
        arm(pool_of(own).L, name, skip=skip, sig=sig)
        operation(own)

    child = Child(body)
    if sig == signal.SIGKILL:
        status = child.wait()
        assert status == -signal.SIGKILL, f"the child was to die at {name}; it ended with {status}"
    else:
        child.wait_stopped()
    return child
