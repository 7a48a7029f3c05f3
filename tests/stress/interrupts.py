"""Exceptions out of nowhere: a signal handler that raises, at random instants and at every instruction of the SDK.

*Random*: a timer of random length whose handler raises, over a loop of calls. It hits where time is spent: in waits,
and right after compiled calls. *Every instruction*: a trace function that raises before the n-th instruction of Python
that a call executes, for n = 1, 2, 3 … until the call comes through. It hits where a timer rarely does. CPython
delivers signals at a few kinds of instructions only; here they come at all of them.

After each the same is asked: does every call still work, from every thread; are the tables whole; and has the process
what it was given and no more: no pin and no reservation that nobody answers for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Final

import numpy as np

from kvplug import KvStore
from kvplug.config import Config
from kvplug.errors import Code, KvplugError
from kvplug.shm import copy as copies
from kvplug.shm import segment
from tests.inside import pool_of

BLOCK: Final = 4096
POOL_BYTES: Final = 4 << 20
OURS: Final = tuple(str(Path(sys.modules[name].__file__ or "").resolve().parent) for name in ("kvplug", "kvplug.shm"))
CHECK_EVERY: Final = 50
LONGEST_S: Final = 0.0008
SETTLED_S: Final = 30.0
INSTRUCTIONS: Final = 24_000
"""About as many as all calls here execute."""


class Interrupt(BaseException):
    """What the handler raises: like KeyboardInterrupt, it is no Exception."""


@dataclasses.dataclass
class Tally:
    """What a run did and found."""

    interrupts: int = 0
    failed: int = 0
    leaked: int = 0
    notes: list[str] = dataclasses.field(default_factory=list)

    def note(self, what: str) -> None:
        self.failed += 1
        self.notes.append(what)


def keys(n: int, seed: int) -> np.ndarray:
    """(n, 32) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (n, 32), np.uint8)


def blocks(of: np.ndarray) -> np.ndarray:
    """What is stored under each of these keys, (n, BLOCK) uint8."""
    return np.tile(of, (1, BLOCK // 32))


class Calls:
    """Every call of the SDK, each as one step that keeps nothing."""

    def __init__(self, store: KvStore) -> None:
        self.store = store
        self.known = keys(6, 1)
        self.fresh = 1000
        self.source = blocks(self.known)
        self.out = np.zeros_like(self.source)
        self.scratch = np.zeros((3, BLOCK), np.uint8)
        store.put(self.known, self.source)
        store.register_buffer(self.scratch.ctypes.data, self.scratch.nbytes)

    def new(self, n: int = 3) -> np.ndarray:
        self.fresh += 1
        return keys(n, self.fresh)

    def put(self) -> None:
        of = self.new()
        self.store.put(of, blocks(of))

    def put_again(self) -> None:
        self.store.put(self.known, self.source)

    def get_into(self) -> None:
        self.store.get_into(self.known, self.out)

    def look(self) -> None:
        self.store.exists(self.known)
        self.store.match_prefix(self.known)
        self.store.touch(self.known)

    def pin(self) -> None:
        with self.store.pin(self.known) as held:
            for i in range(len(held)):
                held[i]

    def pin_forgotten(self) -> None:
        held = self.store.pin(self.known)
        views = list(held)
        del held
        views.clear()

    def reserve_and_seal(self) -> None:
        of = self.new()
        data = blocks(of)
        with self.store.reserve(of, BLOCK) as slots:
            for view, block in zip(slots.views, data, strict=True):
                if view is not None:
                    view[:] = block.tobytes()
            slots.seal()

    def reserve_and_abort(self) -> None:
        with self.store.reserve(self.new(), BLOCK):
            pass

    def reserve_forgotten(self) -> None:
        slots = self.store.reserve(self.new(), BLOCK)
        kept = slots.views[0]
        del slots, kept

    def remove(self) -> None:
        of = self.new()
        self.store.put(of, blocks(of))
        self.store.remove(of)

    def multi_buffers(self) -> None:
        names = [f"name-{self.fresh}-{i}" for i in range(3)]
        self.fresh += 1
        at = [[row.ctypes.data] for row in self.scratch]
        sizes = [[BLOCK]] * 3
        self.store.batch_put_from_multi_buffers(names, at, sizes)
        self.store.batch_get_into_multi_buffers(names, at, sizes)
        self.store.batch_is_exist(names)

    def fragments(self) -> None:
        of = self.new()
        at = self.scratch.ctypes.data + np.arange(3)[:, None] * BLOCK + np.array([0, BLOCK // 2])
        self.store.put_fragments(of, at, [BLOCK // 2] * 2)
        self.store.get_fragments(of, at, [BLOCK // 2] * 2)
        self.store.remove(of)

    def register(self) -> None:
        other = np.zeros(64, np.uint8)
        try:
            self.store.register_buffer(other.ctypes.data, 64)
        finally:
            with contextlib.suppress(KvplugError):
                self.store.unregister_buffer(other.ctypes.data)

    def upkeep(self) -> None:
        self.store.stats()
        pool_of(self.store).maintain()
        pool_of(self.store).grow()

    @property
    def steps(self) -> list[Callable[[], None]]:
        return [
            self.put,
            self.put_again,
            self.get_into,
            self.look,
            self.pin,
            self.pin_forgotten,
            self.reserve_and_seal,
            self.reserve_and_abort,
            self.reserve_forgotten,
            self.remove,
            self.multi_buffers,
            self.fragments,
            self.register,
            self.upkeep,
        ]


def raw_calls(store: KvStore, known: np.ndarray, fresh: np.ndarray) -> None:
    """Those that give out bare slots. What the caller was given is the caller's: it is given back here."""
    held = store.pin_batch(known)
    store.unpin(held.slots, held.gens)
    new = store.reserve_batch(fresh, [100, BLOCK - 128])
    ok = new.codes == Code.OK
    slots, gens, offsets = new.slots[ok], new.gens[ok], new.offsets[ok]
    sums = np.empty(len(slots), np.int64)
    for part, (at, nbytes) in enumerate(((0, 100), (128, BLOCK - 128))):
        copies.hash_batch(store.base_address + offsets + at, np.full(len(slots), nbytes, np.int64), sums)
        store.complete(slots, gens, part, sums)
    store.still_writing(slots, gens)
    store.abort_batch(slots, gens, False)
    store.acknowledge(slots, gens)
    store.remove(fresh)


class Watch:
    """The store under test, an onlooker on the same pool, and what has to hold after every interrupt."""

    def __init__(self, name: str) -> None:
        config = Config(
            pool=name,
            size=POOL_BYTES,
            min_block=4096,
            slab=1 << 20,
            prefault=False,
            lock_timeout_s=5.0,
            quarantine_grace_s=0.01,
            pin_budget_share=1.0,
            reserve_budget_share=1.0,
        )
        self.name = name
        self.store = KvStore(config=config)
        self.onlooker = KvStore(config=config)
        self.tally = Tally()

    def end(self) -> None:
        self.store.close()
        if not self.is_left_alone(clients=1):
            self.tally.leaked += 1
            self.tally.note(f"after close: {self.onlooker.stats()}")
        self.onlooker.check_integrity()
        self.onlooker.close()
        segment.remove_pool(self.name, force=True)

    def is_left_alone(self, clients: int = 2) -> bool:
        """Whether nothing is pinned, in writing or in quarantine, once the grace period of the dead is over."""
        deadline = time.monotonic() + SETTLED_S
        while time.monotonic() < deadline:
            gc.collect()
            pool_of(self.onlooker).maintain()
            s = self.onlooker.stats()
            if (s.pinned_slots, s.writing_slots, s.quarantined_slots, s.clients) == (0, 0, 0, clients):
                return True
            time.sleep(0.005)
        return False

    def check(self, where: str, *, deep: bool = True) -> None:
        """Every thread is served, nothing is held by nobody, the tables are whole."""
        answers: list[Any] = []
        of = keys(2, 7)

        def other() -> None:
            answers.append(self.store.remove(of).tolist())
            answers.append(self.store.put(of, blocks(of)).tolist())

        thread = threading.Thread(target=other)
        thread.start()
        thread.join(SETTLED_S)
        if not answers or Code.TIMEOUT in answers[0] or answers[1:] != [[Code.OK, Code.OK]]:
            self.tally.note(f"{where}: another thread was answered {answers}")
        gc.collect()
        pool_of(self.store).maintain()
        s = self.store.stats()
        if s.pinned_slots or s.writing_slots or s.quarantined_slots:
            self.tally.leaked += 1
            self.tally.note(
                f"{where}: {s.pinned_slots} pinned, {s.writing_slots} writing, {s.quarantined_slots} waiting"
            )
        pool = pool_of(self.store)
        if pool._due or pool._holdings.all:
            self.tally.note(f"{where}: {len(pool._due)} queued, {len(pool._holdings.all)} held")
        if deep:
            self.onlooker.check_integrity()


@contextlib.contextmanager
def _handler(tally: Tally) -> Iterator[None]:
    def strike(_number: int, _frame: FrameType | None) -> None:
        tally.interrupts += 1
        raise Interrupt

    before = signal.signal(signal.SIGALRM, strike)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def at_random(name: str, interrupts: int, seed: int) -> Tally:
    """A timer of random length over random calls, until ``interrupts`` have struck."""
    rng = random.Random(seed)
    watch = Watch(name)
    calls = Calls(watch.store)
    gc.collect()
    gc.freeze()  # what is there already, numba's most of all, is no concern of the collections to come
    steps = calls.steps
    with _handler(watch.tally):
        while watch.tally.interrupts < interrupts:
            struck = watch.tally.interrupts
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.random() * LONGEST_S + 1e-6)
                while watch.tally.interrupts == struck:
                    rng.choice(steps)()
            except Interrupt:
                pass
            signal.setitimer(signal.ITIMER_REAL, 0)
            if watch.tally.interrupts % CHECK_EVERY == 0:
                watch.check(f"after interrupt {watch.tally.interrupts} (seed {seed})")
    watch.check("at the end")
    watch.end()
    gc.unfreeze()
    return watch.tally


def is_ours(frame: FrameType) -> bool:
    """Whether this is Python code of the SDK, at whose every instruction an exception may come.

    Not of liveness.py and threads.py: they do little else than `with` blocks of a lock that is written in C. CPython
    looks for signals neither between taking such a lock and its block, nor between the block and releasing it; a trace
    function does.
    """
    name = frame.f_code.co_filename
    return name.startswith(OURS) and not name.endswith(("liveness.py", "threads.py"))


class _Countdown:
    """A trace function that raises before the ``n``-th instruction that the SDK's Python executes."""

    def __init__(self, n: int) -> None:
        self.left = n
        self.where = ""

    def __call__(self, frame: FrameType, event: str, _argument: Any) -> Any:
        if not is_ours(frame):
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return self.each

    def each(self, frame: FrameType, event: str, _argument: Any) -> Any:
        if event == "opcode":
            self.left -= 1
            if self.left == 0:
                self.where = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}"
                sys.settrace(None)
                raise Interrupt
        return self.each


def struck_at(step: Callable[[], None], n: int) -> str:
    """Where the ``n``-th instruction of this call is, at which it was interrupted; "" if it has fewer."""
    count = _Countdown(n)
    sys.settrace(count)
    try:
        step()
    except Interrupt:
        pass
    finally:
        sys.settrace(None)
    return count.where


def _own_stores(watch: Watch, calls: Calls, stride: int, offset: int) -> None:
    """Calls that give out bare slots, and closing: each on a store of its own, which is closed afterwards.

    Slots that a caller has read are the caller's, and one that was interrupted can't know them any more. They are gone
    with the store.
    """

    def closing(mine: KvStore) -> None:
        held = mine.pin(calls.known)
        kept = mine.reserve(calls.new(), BLOCK)
        view = held[0]
        del held, view
        mine.close()
        del kept

    for step in (lambda mine: raw_calls(mine, calls.known, calls.new()), closing):
        n = 1 + offset % stride
        where = "the first"
        while where:
            with KvStore(config=watch.store.config, create=False) as mine:
                where = struck_at(functools.partial(step, mine), n)
            watch.tally.interrupts += bool(where)
            n += stride
            del mine
            if not watch.is_left_alone():
                watch.tally.leaked += 1
                watch.tally.note(f"closed, instruction {n - stride} ({where}): {watch.store.stats()}")
            watch.check(f"closed, instruction {n - stride} ({where})", deep=n % CHECK_EVERY == 0)


def at_every_instruction(name: str, *, stride: int, offset: int = 0) -> Tally:
    """Each call, interrupted before its first instruction, its second, …; every ``stride``-th of them is tried."""
    watch = Watch(name)
    calls = Calls(watch.store)
    gc.collect()
    gc.freeze()  # what is there already, numba's most of all, is no concern of the collections to come
    for step in calls.steps:
        step()
        n = 1 + offset % stride
        while where := struck_at(step, n):
            watch.tally.interrupts += 1
            watch.check(f"{step.__name__}, instruction {n} ({where})", deep=n % CHECK_EVERY == 0)
            n += stride
        watch.onlooker.check_integrity()
    _own_stores(watch, calls, stride, offset)
    watch.end()
    gc.unfreeze()
    return watch.tally
