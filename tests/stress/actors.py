"""What the processes under fire do. Each runs until it is killed; none of them ever expects to end well."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable

import numpy as np

from kvplug import KvStore
from kvplug.config import Config
from kvplug.errors import Code, KvplugError, PoolError
from kvplug.shm import copy as copies
from kvplug.shm import failpoints
from kvplug.shm import layout as lay
from tests.inside import pool_of
from tests.stress import content
from tests.stress.board import CHILD, HITS, Board

SLOW_WRITE_S = 0.002
LATE_WRITE_S = 0.004
ORPHAN_LIFE_S = 60.0
PHASE_S = 0.15
SHARE_OF_GROUPS = 0.3


class Actor:
    """One process: a store of its own, a seeded generator, a row on the board."""

    def __init__(self, pool: str, config: Config, board: Board, row: int, seed: int, token: str | None = None) -> None:
        self.board, self.row, self.rng = board, row, random.Random(seed)
        self.store = KvStore.join(token, config=config) if token else KvStore(pool, config=config, create=False)
        self.old: list[tuple[np.ndarray, np.ndarray]] = []
        self.buffers = {size: np.zeros((8, size // 8), np.uint64) for size in content.SIZES}

    def size(self) -> int:
        """Mostly the size of the present phase, so that size classes take slabs from one another."""
        phase = int(time.monotonic() / PHASE_S) % len(content.SIZES)
        return content.SIZES[phase] if self.rng.random() < 0.7 else self.rng.choice(content.SIZES)

    def names(self, size: int, n: int) -> list[bytes]:
        """Some keys of a size; a batch may hold one twice."""
        among = content.NAMES_PER_SIZE if self.rng.random() < 0.6 else content.HOT_NAMES  # some that all are after
        return [
            content.sibling("group", self.rng.randrange(content.GROUPS), self.rng.randrange(content.GROUP))
            if size == content.GROUP_BYTES and self.rng.random() < SHARE_OF_GROUPS
            else content.key("block", self.rng.randrange(among), size)
            for _ in range(n)
        ]

    def check(self, name: bytes, got: np.ndarray, how: str) -> None:
        """Report a block that is not what its key says."""
        wrong = content.difference(name, got)
        if wrong:
            self.board.violation("wrong_bytes", f"{how}: {wrong}")

    # ---- operations

    def put(self) -> None:
        size = self.size()
        names = self.names(size, self.rng.randint(1, 6))
        codes = self.store.put(names, [content.words(name, size) for name in names])
        for code in codes.tolist():
            if code not in (Code.OK, Code.EXISTS, Code.IN_PROGRESS, Code.FULL, Code.TIMEOUT, Code.BUDGET, Code.STALE):
                self.board.violation("bad_code", f"put answered {code}")

    def get(self) -> None:
        size = self.size()
        names = self.names(size, self.rng.randint(1, 6))
        buffers = self.buffers[size][: len(names)]
        codes = self.store.get_into(names, buffers)
        for name, code, got in zip(names, codes.tolist(), buffers, strict=True):
            if code == Code.OK:
                self.board.rows[self.row, HITS] += 1
                self.check(name, got, "get_into")
            elif code != Code.MISSING:
                self.board.violation("wrong_bytes", f"get_into answered {Code(code).name} for {name.hex()[:12]}")

    def put_group(self) -> None:
        """Blocks that leave together, each from two fragments, in any order, as ranks would store them."""
        number, half = self.rng.randrange(content.GROUPS), content.GROUP_BYTES // 2
        for index in self.rng.sample(range(content.GROUP), content.GROUP):
            name = content.sibling("group", number, index)
            data = content.words(name, content.GROUP_BYTES)
            at = np.array([[data.ctypes.data, data.ctypes.data + half]])
            (code,) = self.store.put_fragments([name], at, [half, half], siblings=(content.GROUP, index)).tolist()
            if code not in (Code.OK, Code.EXISTS, Code.IN_PROGRESS, Code.FULL, Code.TIMEOUT, Code.BUDGET, Code.STALE):
                self.board.violation("bad_code", f"put_fragments answered {code}")

    def get_group(self) -> None:
        number, half = self.rng.randrange(content.GROUPS), content.GROUP_BYTES // 2
        names = [content.sibling("group", number, index) for index in range(content.GROUP)]
        buffers = self.buffers[content.GROUP_BYTES][: content.GROUP]
        at = buffers.ctypes.data + np.arange(content.GROUP)[:, None] * content.GROUP_BYTES + np.array([0, half])
        for name, code, got in zip(
            names, self.store.get_fragments(names, at, [half, half]).tolist(), buffers, strict=True
        ):
            if code == Code.OK:
                self.board.rows[self.row, HITS] += 1
                self.check(name, got, "get_fragments")
            elif code != Code.MISSING:
                self.board.violation("wrong_bytes", f"get_fragments answered {Code(code).name} for {name.hex()[:12]}")

    def get_parts(self) -> None:
        name = content.key("pair", self.rng.randrange(content.NAMES_PER_SIZE), sum(content.PARTS))
        with self.store.pin([name]) as blocks:
            if blocks[0] is not None:
                at = self.store.part_offsets(content.PARTS)
                for start, nbytes in zip(at.tolist(), content.PARTS, strict=True):
                    got = np.frombuffer(bytes(blocks[0][start : start + nbytes]), np.uint64)
                    self.check(name, got, "part")

    def pin(self) -> None:
        size = self.size()
        names = self.names(size, self.rng.randint(1, 4))
        twice = self.rng.random() < 0.5
        outer = self.store.pin_batch(names)
        inner = self.store.pin_batch(names) if twice else None
        try:
            for again in range(3):
                for i in np.flatnonzero(outer.codes == Code.OK).tolist():
                    at = int(outer.offsets[i])
                    self.check(names[i], self.store.mapping[at : at + size].view(np.uint64), f"pinned, look {again}")
                if again == 0 and self.rng.random() < 0.3:
                    answers = self.store.remove(names)
                    if (answers[outer.codes == Code.OK] == Code.OK).any():
                        self.board.violation("bad_code", "a pinned block was removed")
                if inner is not None and again == 0:
                    self.store.unpin(inner.slots)  # the outer pin still holds
                    inner = None
                time.sleep(self.rng.random() * SLOW_WRITE_S)
        finally:
            if inner is not None:
                self.store.unpin(inner.slots)
            self.store.unpin(outer.slots)

    def slow_write(self) -> None:
        """In place, in two halves; sealed, or given up while a write is still to come."""
        size = self.size()
        names = self.names(size, self.rng.randint(1, 3))
        b = self.store.reserve_batch(names, (size,))
        ok = np.flatnonzero(b.codes == Code.OK)
        if not len(ok):
            return
        slots, gens, offsets = b.slots[ok], b.gens[ok], b.offsets[ok]
        half = size // 2
        for i, at in zip(ok.tolist(), offsets.tolist(), strict=True):
            self.store.mapping[at : at + half] = content.words(names[i], size).view(np.uint8)[:half]
        time.sleep(self.rng.random() * SLOW_WRITE_S)
        if self.rng.random() < 0.35:
            self.store.abort_batch(slots, gens, writers_done=False)
            end = time.monotonic() + LATE_WRITE_S  # a copy that was under way goes on
            while time.monotonic() < end:
                for at in offsets.tolist():
                    self.store.mapping[at : at + size].view(np.uint64)[:] = content.GARBAGE
                time.sleep(0.0002)
            self.store.acknowledge(slots, gens)
            return
        if self.rng.random() < 0.1:
            self.store.abort_batch(slots, gens, writers_done=True)
            return
        for i, at in zip(ok.tolist(), offsets.tolist(), strict=True):
            self.store.mapping[at + half : at + size] = content.words(names[i], size).view(np.uint8)[half:]
        sums = np.empty(len(ok), np.int64)
        copies.hash_batch(self.store.base_address + offsets, np.full(len(ok), size, np.int64), sums)
        self.written(self.store.complete(slots, gens, 0, sums), Code.OK)

    def written(self, answers: np.ndarray, *right: Code) -> None:
        """A living session's reservation is nobody else's to take: its completion is accepted, at worst later."""
        for code in answers.tolist():
            if code not in (*right, Code.TIMEOUT, Code.RETIRED):
                self.board.violation("bad_code", f"a living session's completion was answered {Code(code).name}")

    def remove(self) -> None:
        self.store.remove(self.names(self.size(), self.rng.randint(1, 4)))

    def look(self) -> None:
        names = self.names(self.size(), 32)
        self.store.exists(names)
        self.store.match_prefix(names)
        self.store.touch(names)

    def stale(self) -> None:
        """Handles that were good once must do nothing now."""
        size = self.size()
        b = self.store.reserve_batch(self.names(size, 1), (size,))
        if b.codes[0] != Code.OK:
            return
        if self.store.abort_batch(b.slots, b.gens, writers_done=True)[0] != Code.OK:
            return  # queued: the reservation stands for a while
        self.old = [*self.old[-20:], (b.slots, b.gens)]
        for slots, gens in self.rng.sample(
            self.old, min(4, len(self.old))
        ):  # by now somebody else may be writing there
            if self.store.complete(slots, gens, 0, np.zeros(1, np.int64))[0] not in (Code.STALE, Code.TIMEOUT):
                self.board.violation("bad_code", "a completion with an old generation was taken")
        for answer in (
            self.store.complete(b.slots, b.gens, 0, np.zeros(1, np.int64)),
            self.store.abort_batch(b.slots, b.gens, writers_done=True),
            self.store.acknowledge(b.slots, b.gens),
        ):
            if answer[0] not in (Code.STALE, Code.TIMEOUT):
                self.board.violation("bad_code", f"a stale handle was answered {int(answer[0])}")

    def mark_dirty(self) -> None:
        """As if somebody had died: the next one in rebuilds. Harmless at any time, since a rebuild changes nothing."""
        pool_of(self.store).T[lay.H_DIRTY] = 1
        self.store.exists(self.names(self.size(), 1))
        self.remove()

    def reap(self) -> None:
        """A client that is gone without a word, and its remains."""
        pid = os.fork()
        if pid == 0:
            try:
                store = KvStore(self.store.pool_name, config=self.store.config, create=False)
                size = content.SIZES[0]
                taken = [store.pin_batch(self.names(size, 4))]  # while they are kept, they are its own
                taken.append(store.reserve_batch(self.names(size, 2), (size,)))
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        pool_of(self.store).reap()

    def grow(self) -> None:
        pool_of(self.store).grow()

    def orphan(self) -> None:
        """A child that keeps the mapping and all descriptions it was not made to close, and outlives this process."""
        if not self.board.rows[self.row, CHILD]:
            pid = os.fork()
            if pid == 0:
                time.sleep(ORPHAN_LIFE_S)
                os._exit(0)
            self.board.rows[self.row, CHILD] = pid
        self.mixed()

    def mixed(self) -> None:
        """One call of any kind."""
        self.one(
            self.rng.choice(
                (
                    self.put,
                    self.put,
                    self.put,
                    self.get,
                    self.get,
                    self.put_group,
                    self.get_group,
                    self.get_parts,
                    self.pin,
                    self.slow_write,
                    self.remove,
                    self.look,
                    self.stale,
                )
            )
        )

    def one(self, operation: Callable[[], None]) -> None:
        """A call, timed on the board."""
        self.board.call(self.row)
        operation()
        self.board.done(self.row)


def _pair(actor: Actor, pool: str, config: Config, board: Board, seed: int) -> None:
    """A scheduler that reserves, and a worker forked from it that joins its session; each writes one part."""
    read_fd, write_fd = os.pipe()
    token = actor.store.token
    pid = os.fork()
    if pid == 0:
        try:
            _worker(Actor(pool, config, board, actor.row, seed + 1, token=token), read_fd, write_fd)
        except (KvplugError, OSError):
            pass
        finally:
            os._exit(0)
    board.rows[actor.row, CHILD] = pid
    os.close(read_fd)
    while True:
        board.call(actor.row)
        number = actor.rng.randrange(content.NAMES_PER_SIZE)
        name = content.key("pair", number, sum(content.PARTS))
        b = actor.store.reserve_batch([name], content.PARTS)
        if b.codes[0] == Code.OK:
            os.write(write_fd, np.array([number, b.slots[0], b.gens[0], b.offsets[0]], np.int64).tobytes())
            _write_part(actor, name, b.slots, b.gens, int(b.offsets[0]), 0)
        board.done(actor.row)
        actor.one(actor.get_parts)
        actor.one(actor.put)
        time.sleep(0.001)


def _write_part(actor: Actor, name: bytes, slots: np.ndarray, gens: np.ndarray, offset: int, part: int) -> None:
    nbytes = content.PARTS[part]
    at = offset + int(actor.store.part_offsets(content.PARTS)[part])
    if not actor.store.still_writing(slots, gens)[0]:
        actor.board.violation("bad_code", "a living session's reservation was taken away")
        return
    whole = content.words(name, nbytes).view(np.uint8)
    for start in range(0, nbytes, 8192):  # slowly: the other half of the session may die meanwhile
        actor.store.mapping[at + start : at + min(start + 8192, nbytes)] = whole[start : start + 8192]
        time.sleep(actor.rng.random() * 0.001)
    sums = np.empty(1, np.int64)
    copies.hash_batch(np.array([actor.store.base_address + at]), np.array([nbytes]), sums)
    actor.written(actor.store.complete(slots, gens, part, sums), Code.OK, Code.PENDING)


def _worker(actor: Actor, read_fd: int, write_fd: int) -> None:
    """Goes on with what it was given after its scheduler has died, then goes as well."""
    os.close(write_fd)
    while raw := os.read(read_fd, 32):
        number, slot, gen, offset = np.frombuffer(raw, np.int64).tolist()
        name = content.key("pair", number, sum(content.PARTS))
        _write_part(actor, name, np.array([slot]), np.array([gen]), offset, 1)


ROLES = ("mixed", "mixed", "mixed", "writer", "reader", "pinner", "pair", "orphan")
_FITTING: dict[str, tuple[str, ...]] = {
    "rebuild_cleared": ("mark_dirty",),
    "rebuild_half": ("mark_dirty",),
    "reap_half": ("reap",),
    "watermark": ("put",),
    "ack_word": ("slow_write",),
    "abort_word": ("slow_write", "stale"),
    "abort_unindexed": ("stale", "slow_write"),
    "freed_listed": ("stale", "remove"),
    "write_copy": ("put",),
    "index_shift": ("put", "remove"),
    "unpinned_bit": ("pin",),
    "pinned_bit": ("pin",),
    "drain_started": ("put",),
    "drain_empty": ("put",),
    "slab_cut": ("put",),
    "slab_owned": ("put",),
}


def run(
    pool: str, config: Config, board: Board, row: int, role: str, seed: int, armed: tuple[str, int, int] | None
) -> None:
    """The life of one process; returns only if its pool was removed. ``armed``: failpoint, skip, signal."""
    if armed is not None and armed[0] == "attach_locked":
        os.environ[failpoints.ENV] = f"{armed[0]}:0:{armed[2]}"
    try:
        actor = Actor(pool, config, board, row, seed)
        if armed is not None and armed[0] != "attach_locked":
            failpoints.arm(pool_of(actor.store).L, armed[0], skip=armed[1], sig=armed[2])
            mix = [
                getattr(actor, name)
                for name in _FITTING.get(armed[0], ("put", "put_group", "get", "pin", "slow_write"))
            ]
            while True:
                actor.one(actor.rng.choice(mix))
        if role == "pair":
            _pair(actor, pool, config, board, seed)
        loops = {
            "writer": (actor.put, actor.put, actor.put_group, actor.slow_write),
            "reader": (actor.get, actor.get_group, actor.get_parts),
            "pinner": (actor.pin, actor.get, actor.put),
            "orphan": (actor.orphan,),
            "mixed": (actor.mixed,),
        }
        while True:
            if role in ("mixed", "orphan"):
                actor.rng.choice(loops[role])()
            else:
                actor.one(actor.rng.choice(loops[role]))
    except (PoolError, BrokenPipeError):  # a pair's worker is gone with its pool
        return  # the pool went away under us: the controller has made a new one
