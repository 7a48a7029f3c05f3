"""Who starts, stops, kills and counts: one controller over a handful of actors on one small pool at a time."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import random
import signal
import sys
import time
import traceback
from typing import Final

import numpy as np

from kvplug import KvStore
from kvplug.config import Config
from kvplug.errors import Code, IntegrityError, LockTimeoutError, PoolError
from kvplug.shm import copy as copies
from kvplug.shm import failpoints
from kvplug.shm import layout as lay
from kvplug.shm.batch import SlotBatch
from kvplug.shm.segment import remove_pool
from tests.inside import pool_of
from tests.stress import actors, content
from tests.stress.board import CALLS, CHILD, HITS, MAX_ACTORS, SINCE_NS, SLOWEST_NS, Board
from tests.stress.groups import KeptGroups

POOL_BYTES: Final = 20 << 20
SLAB_BYTES: Final = 1 << 20
GRACE_S: Final = 0.05
KILLS_AN_EPOCH: Final = 60
ARMED_LIFE_S: Final = 1.5
HUNG_S: Final = 30.0
QUIET_S: Final = 10.0
STOP_MARGIN_S: Final = 3.0
SHARE_ARMED: Final = 0.5


@dataclasses.dataclass
class Child:
    """An actor that runs."""

    pid: int
    row: int
    role: str
    armed: tuple[str, int, int] | None
    since: float
    stopped_until: float = 0.0


@dataclasses.dataclass
class Report:
    """What a run did and found."""

    seed: int
    kills: int = 0
    wrong_bytes: int = 0
    leaked_slots: int = 0
    leaked_pins: int = 0
    hung: int = 0
    parted: int = 0
    broken_tables: int = 0
    other: int = 0
    stumbles: int = 0
    inside_lock: int = 0
    stopped_holders: int = 0
    rebuilds: int = 0
    reaped_pins: int = 0
    reaped_writes: int = 0
    slab_moves: int = 0
    evictions: int = 0
    calls: int = 0
    hits: int = 0
    slowest_ms: float = 0.0
    random_kills: int = 0
    orphans: int = 0
    at: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def violations(self) -> int:
        """0 in a run that found nothing. A traceback of an actor is a fault too, but it may be the actor's own."""
        return (
            self.wrong_bytes
            + self.leaked_slots
            + self.leaked_pins
            + self.hung
            + self.broken_tables
            + self.parted
            + self.other
        )


class Controller:
    """One run. ``stop_at_first``: give up at the first violation (for mutants)."""

    def __init__(self, *, kills: int, seed: int, n_actors: int, stop_at_first: bool, scratch: str) -> None:
        self.wanted, self.n_actors, self.stop_at_first = kills, n_actors, stop_at_first
        self.rng = random.Random(seed)
        self.report = Report(seed)
        self.board = Board(os.path.join(scratch, "violations"))
        self.children: dict[int, Child] = {}
        self.told = 0
        self.sleepers: list[int] = []
        self.epoch = 0
        self.deaths = 0
        self.config = Config(
            pool="unset",
            size=POOL_BYTES,
            slab=SLAB_BYTES,
            prefault=False,
            quarantine_grace_s=GRACE_S,
            lock_timeout_s=0.1,
            pin_budget_share=1.0,
            reserve_budget_share=1.0,
        )

    # ---- the run

    def run(self) -> Report:
        """Epochs of a fresh pool each, until enough were killed."""
        began = time.monotonic()
        while self.report.kills < self.wanted and not self._give_up():
            self.epoch += 1
            name = f"stress-{os.getpid()}-{self.epoch}"
            policy = self.rng.choice(("tail_first", "lru", "fifo"))
            self.checker = KvStore(config=self.config.with_changes(pool=name, policy=policy))
            try:
                self._one_epoch(min(self.report.kills + KILLS_AN_EPOCH, self.wanted))
            finally:
                self._kill_everybody()
                self._wake_orphans()
                self.checker.close()
                with contextlib.suppress(PoolError):
                    remove_pool(name, force=True)
            print(
                f"  {self.report.kills} kills, {time.monotonic() - began:.0f} s, {self.report.violations} violations",
                file=sys.stderr,
            )
        return self.report

    def _give_up(self) -> bool:
        self._read_board()
        return self.stop_at_first and self.report.violations > 0

    def _one_epoch(self, until: int) -> None:
        self.deaths = 0
        self.groups = KeptGroups(self.checker, self.board, self._watch_paused)
        for _ in range(2):  # while the pool still grows
            self._spawn(("watermark", self.rng.randrange(8), signal.SIGKILL))
        if self.epoch % 2 == 0:
            self._stopped_holder()
        next_kill = time.monotonic()
        while self.report.kills < until and not self._give_up():
            while len(self.children) < self.n_actors:
                self._spawn(self._arm_one() if self.rng.random() < SHARE_ARMED else None)
            time.sleep(0.002)
            self._collect()
            self._watch()
            now = time.monotonic()
            free = [c for c in self.children.values() if c.armed is None]
            if free and now >= next_kill:
                next_kill = now + self.rng.expovariate(1 / 0.06)
                victim = self.rng.choice(free)
                self._kill(victim)
            elif free and self.rng.random() < 0.15:
                self._pause(self.rng.choice(free))
        self._quiesce()

    def _arm_one(self) -> tuple[str, int, int]:
        names = [n for n in failpoints.NAMES if n != "watermark"]
        busy = {c.armed[0] for c in self.children.values() if c.armed}
        names = sorted(names, key=lambda n: (n in busy, self.report.at[n], self.rng.random()))
        return names[0], self.rng.choice((0, 0, 1, 3)), signal.SIGKILL

    def _spawn(self, armed: tuple[str, int, int] | None) -> Child:
        row = next(r for r in range(MAX_ACTORS) if r not in {c.row for c in self.children.values()})
        role, seed = self.rng.choice(actors.ROLES), self.rng.getrandbits(32)
        config = self.checker.config.with_changes(verify=self.rng.choice(("always", "never")))
        pid = os.fork()
        if pid == 0:
            try:
                self.board.begin(row, os.getpid())
                actors.run(config.pool, config, self.board, row, role, seed, armed)
            except BaseException:  # noqa: BLE001 - whatever ends an actor must reach the report
                self.board.violation("stumble", traceback.format_exc().replace("\n", " | ")[-1500:])
            finally:
                os._exit(0)
        child = Child(pid, row, role, armed, time.monotonic())
        self.children[pid] = child
        return child

    # ---- killing

    def _kill(self, child: Child) -> None:
        os.kill(child.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child.pid, 0)
        inside = int(pool_of(self.checker).T[lay.H_HOLDER]) == child.pid
        self._buried(child, None, inside)

    def _buried(self, child: Child, failpoint: str | None, inside: bool) -> None:
        self.children.pop(child.pid, None)
        r = self.report
        if r.kills < self.wanted:  # those who were armed may go on dying: checked, not counted
            r.kills += 1
            r.inside_lock += inside
            r.random_kills += failpoint is None
            if failpoint is not None:
                r.at[failpoint] += 1
        self._sum_up(child)
        self.deaths += 1
        when = f"after a kill at {failpoint or 'a random instant'} of {child.role}"
        self._integrity(when)
        self.groups.check(when, self.deaths)

    def _sum_up(self, child: Child) -> None:
        row = self.board.rows[child.row]
        if child.role == "orphan" and int(row[CHILD]):
            self.sleepers.append(int(row[CHILD]))
            self.report.orphans += 1
        self.report.calls += int(row[CALLS])
        self.report.hits += int(row[HITS])
        self.report.slowest_ms = max(self.report.slowest_ms, int(row[SLOWEST_NS]) / 1e6)

    def _collect(self) -> None:
        """Notice who died by its failpoint, or ended."""
        for child in list(self.children.values()):
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if pid == 0:
                continue
            if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and child.armed:
                self._buried(child, child.armed[0], child.armed[0] not in failpoints.OUTSIDE_LOCK)
            else:
                self.children.pop(pid, None)
                self._sum_up(child)
                if os.WIFSIGNALED(status):
                    self.board.violation("crash", f"{child.role} died of signal {os.WTERMSIG(status)}")

    def _watch(self) -> None:
        """Continue who was paused; kill who was armed for something that did not come; report who hangs."""
        now = time.monotonic()
        for child in list(self.children.values()):
            if child.stopped_until and now >= child.stopped_until:
                os.kill(child.pid, signal.SIGCONT)
                child.stopped_until = 0.0
            since = int(self.board.rows[child.row, SINCE_NS])
            if since and not child.stopped_until and now - since / 1e9 > HUNG_S:
                self.board.violation("hung", f"{child.role} {child.armed} is in one call for {now - since / 1e9:.1f} s")
                self._kill(child)
            elif child.armed and now - child.since > ARMED_LIFE_S:
                self._kill(child)

    def _pause(self, child: Child) -> None:
        if not child.stopped_until:
            os.kill(child.pid, signal.SIGSTOP)
            child.stopped_until = time.monotonic() + self.rng.uniform(0.002, 0.03)

    def _kill_everybody(self) -> None:
        for child in list(self.children.values()):
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(child.pid, signal.SIGKILL)
                os.waitpid(child.pid, 0)
            self.deaths += 1
        self.children.clear()

    # ---- checking

    def _integrity(self, when: str) -> None:
        deadline = time.monotonic() + HUNG_S
        while time.monotonic() < deadline:
            try:
                self.checker.check_integrity(deep=True)
            except LockTimeoutError:  # a paused holder
                self._watch_paused()
                time.sleep(0.01)
                continue
            except IntegrityError as e:
                self.board.violation("broken_tables", f"{when}: {e}")
            return
        self.board.violation(
            "hung", f"the pool lock was not to be had {when}, holder {int(pool_of(self.checker).T[lay.H_HOLDER])}"
        )

    def _watch_paused(self) -> None:
        for child in self.children.values():
            if child.stopped_until:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGCONT)
                child.stopped_until = 0.0

    def _quiesce(self) -> None:
        """Kill all at once; then nothing of them may be left but sealed blocks with the right bytes."""
        for child in list(self.children.values()):
            if self.report.kills < self.wanted:
                self._kill(child)
        self._kill_everybody()
        pool = pool_of(self.checker)
        deadline = time.monotonic() + QUIET_S
        while True:  # workers that outlive their scheduler end by themselves
            pool.reap()
            pool.release_expired()
            s = self.checker.stats()
            if s.clients == 1 and not (s.writing_slots or s.quarantined_slots or s.pinned_slots):
                break
            if time.monotonic() > deadline:
                clients = s.clients - 1
                self.report.leaked_slots += s.writing_slots + s.quarantined_slots
                self.report.leaked_pins += s.pinned_slots
                if clients:
                    self.report.other += 1
                self.report.notes.append(
                    f"after everybody was killed: {clients} clients, {s.writing_slots} writing, {s.quarantined_slots} "
                    f"quarantined, {s.pinned_slots} pinned slots are left"
                )
                break
            time.sleep(0.02)
        self._integrity("with everybody dead")
        self.groups.check("with everybody dead", self.deaths)
        self.groups.one_leaves()
        self._all_blocks()
        r = self.report
        r.rebuilds += s.rebuilds
        r.reaped_pins += s.reaped_pins
        r.reaped_writes += s.reaped_writes
        r.slab_moves += s.slab_moves
        r.evictions += s.evicted_blocks
        self._wake_orphans()

    def _wake_orphans(self) -> None:
        """End the children that outlived their parents, once it was checked that they kept nothing alive."""
        for pid in self.sleepers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.sleepers.clear()

    def _all_blocks(self) -> None:
        """Every block that is there holds what its key says."""
        groups = [content.sibling("group", n, i) for n in range(content.GROUPS) for i in range(content.GROUP)]
        for size in content.SIZES:
            names = [content.key("block", n, size) for n in range(content.NAMES_PER_SIZE)]
            names += groups if size == content.GROUP_BYTES else []
            buffer = np.zeros((len(names), size // 8), np.uint64)
            codes = self.checker.get_into(names, buffer)
            for i in np.flatnonzero(codes == Code.OK).tolist():
                if wrong := content.difference(names[i], buffer[i]):
                    self.board.violation("wrong_bytes", f"at rest: {wrong}")

    def _stopped_holder(self) -> None:
        """A holder that is stopped: others answer in time, reads go on; continued, it finishes what it was at."""
        size = content.SIZES[0]
        name = content.key("kept", self.epoch, size)
        if self.checker.put([name], [content.words(name, size)])[0] not in (Code.OK, Code.EXISTS):
            return
        held = self.checker.pin_batch([name])
        late = content.key("late", self.epoch, size)
        reserved = self.checker.reserve_batch([late], (size,))
        point = self.rng.choice(("locked", "unlocking", "reserve_word", "evict_word", "part_done", "pinned_bit"))
        child = self._spawn((point, 0, signal.SIGSTOP))
        deadline = time.monotonic() + ARMED_LIFE_S
        while time.monotonic() < deadline:
            pid, status = os.waitpid(child.pid, os.WNOHANG | os.WUNTRACED)
            if pid and os.WIFSTOPPED(status):
                break
            if pid:  # it could not even attach, on a machine as busy as that
                self.children.pop(pid)
                break
            time.sleep(0.002)
        if child.pid not in self.children or not pid:
            if child.pid in self.children:
                self._kill(child)  # before it stops where nobody looks for it
            self.checker.unpin(held.slots)
            self.checker.abort_batch(reserved.slots, reserved.gens, writers_done=True)
            return
        child.armed = None
        began = time.monotonic()
        codes = self.checker.put([content.key("new", self.epoch, size)], [b"x" * size])
        took = time.monotonic() - began
        if codes[0] != Code.TIMEOUT or took > self.config.lock_timeout_s + STOP_MARGIN_S:
            self.board.violation("hung", f"put beside a holder stopped at {point}: {codes[0]} after {took:.2f} s")
        got = np.zeros(size // 8, np.uint64)
        if self.checker.get_into([name], [got])[0] == Code.OK and content.difference(name, got):
            self.board.violation("wrong_bytes", "read beside a stopped holder")
        self.checker.unpin(held.slots)
        at = int(reserved.offsets[0])
        self.checker.mapping[at : at + size].view(np.uint64)[:] = content.words(late, size)
        sums = np.empty(1, np.int64)
        copies.hash_batch(self.checker.base_address + reserved.offsets, reserved.nbytes, sums)
        self.checker.complete(reserved.slots, reserved.gens, 0, sums)
        os.kill(child.pid, signal.SIGCONT)
        self.report.stopped_holders += 1
        self._queue_is_drained(int(held.slots[0]), reserved, point)
        deadline = time.monotonic() + QUIET_S
        while self.checker.remove([name])[0] == Code.TIMEOUT:
            if time.monotonic() > deadline:
                self.board.violation(
                    "hung", f"the lock did not come back after its holder, stopped at {point}, went on"
                )
                break
            time.sleep(0.005)
        self._integrity("after a stopped holder went on")

    def _queue_is_drained(self, pinned: int, sealed: SlotBatch, point: str) -> None:
        """A release and a seal that found the lock stopped are done without another call."""
        pool = pool_of(self.checker)
        word = pool.geometry.o_row + pinned * lay.ROW_WORDS + lay.R_PIN + (pool.client >> 6)
        deadline = time.monotonic() + QUIET_S
        while time.monotonic() < deadline:
            # Sealed, and perhaps evicted since: in either case nobody but its seal can have ended the writing.
            writing = self.checker.still_writing(sealed.slots, sealed.gens)[0]
            if not (int(pool.T[word]) >> (pool.client & 63)) & 1 and not writing:
                return
            time.sleep(0.01)
        self.board.violation(
            "hung", f"what was queued beside a holder stopped at {point} was not done after it went on"
        )

    def _read_board(self) -> None:
        lines = self.board.violations()
        for kind, what in lines[self.told :]:
            r = self.report
            if kind == "wrong_bytes":
                r.wrong_bytes += 1
            elif kind == "hung":
                r.hung += 1
            elif kind == "broken_tables":
                r.broken_tables += 1
            elif kind == "parted":
                r.parted += 1
            elif kind == "stumble":
                r.stumbles += 1
            else:
                r.other += 1
            print(f"! {kind}: {what}", file=sys.stderr, flush=True)
            if len(r.notes) < 50:
                r.notes.append(f"{kind}: {what}")
        self.told = len(lines)


def run(*, kills: int, seed: int, n_actors: int, stop_at_first: bool, scratch: str) -> Report:
    """A run from beginning to end; kernels are loaded before the first fork."""
    from kvplug.shm.integrity import prepare
    from kvplug.shm.jit import warm_up

    warm_up()
    prepare()  # else it is compiled while somebody is stopped inside the lock
    controller = Controller(kills=kills, seed=seed, n_actors=n_actors, stop_at_first=stop_at_first, scratch=scratch)
    controller.run()
    controller._read_board()
    return controller.report
