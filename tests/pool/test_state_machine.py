"""The pool against a plain dict, over random histories with a second process and with deaths inside operations.

The dict says for each key which versions of its block a hit may give. Whatever happens, a hit is one of them and a miss
is only wrong under a pin. Nothing runs in the background here (maintenance threads are stopped), so a history that
fails is found again and made smaller by Hypothesis.
"""

from __future__ import annotations

import itertools
import os
import time
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvplug import KvStore
from kvplug.config import Config
from kvplug.errors import Code
from kvplug.identity.keys import fold
from kvplug.shm import copy as copies
from kvplug.shm.failpoints import NAMES, arm
from kvplug.shm.jit import warm_up
from kvplug.shm.segment import remove_pool
from tests.inside import pool_of
from tests.pool.children import Child, Peer, another, blocks, keys, quiet

SIZES: Final = (4096, 3 * 4096, 8 * 4096)
PARTS: Final = {size: (size // 2 - 64, size // 2) for size in SIZES}
"""A block of two parts needs as much room as one of ``size``, less the padding."""
N_KEYS: Final = 30
KEYS: Final = {size: keys(N_KEYS, size) for size in SIZES}
GRACE_S: Final = 0.005
Name = tuple[int, int]
"""(size, number): one key."""
Handle = tuple[int, int, int]
"""(slot, generation, offset)."""

GROUP: Final = 3
GROUP_BYTES: Final = 4096
GROUPS: Final = keys(8, 3)
"""Blocks that leave together: sibling *i* of each has its key with *i* folded in."""
OPEN_CODES: Final = {Code.FULL, Code.BUDGET}
numbers = itertools.count()


def content(name: Name, version: int, parts: bool) -> list[np.ndarray]:
    """The parts of a block; a version differs from another one in every word."""
    size, number = name
    sizes = PARTS[size] if parts else (size,)
    words = blocks(KEYS[size][number : number + 1], 2 * size)[0].view(np.uint64) ^ np.uint64(
        version * 0x0101010101010101
    )
    raw = words.view(np.uint8)
    starts = [0, sizes[0]]
    return [raw[start : start + nbytes] for start, nbytes in zip(starts, sizes, strict=False)]


def keys_of(names: list[Name]) -> np.ndarray:
    return np.stack([KEYS[size][number] for size, number in names])


# ---- what a process does with its store; also sent to the second process -------------------------


def put(store: KvStore, names: list[Name], version: int) -> list[int]:
    return store.put(keys_of(names), [content(name, version, False)[0] for name in names]).tolist()


def get(store: KvStore, names: list[Name]) -> list[tuple[int, bytes]]:
    """(code, bytes) of each; a block of another size than asked for answers SIZE."""
    out = [np.zeros(size, np.uint8) for size, _ in names]
    codes = store.get_into(keys_of(names), out)
    return [(int(code), got.tobytes()) for code, got in zip(codes, out, strict=True)]


def pin(store: KvStore, names: list[Name]) -> list[tuple[int, Handle, int]]:
    b = store.pin_batch(keys_of(names))
    return [
        (int(c), (int(s), int(g), int(o)), int(n))
        for c, s, g, o, n in zip(b.codes, b.slots, b.gens, b.offsets, b.nbytes, strict=True)
    ]


def unpin(store: KvStore, handle: Handle) -> None:
    store.unpin(np.array(handle[:1]), np.array(handle[1:2]))


def look(store: KvStore, handle: Handle, nbytes: int) -> bytes:
    return store.mapping[handle[2] : handle[2] + nbytes].tobytes()


def reserve(store: KvStore, names: list[Name]) -> list[tuple[int, Handle]]:
    size = names[0][0]
    b = store.reserve_batch(keys_of(names), PARTS[size])
    return [(int(c), (int(s), int(g), int(o))) for c, s, g, o in zip(b.codes, b.slots, b.gens, b.offsets, strict=True)]


def write_part(store: KvStore, name: Name, version: int, handle: Handle, part: int) -> int:
    data = content(name, version, True)[part]
    at = handle[2] + int(store.part_offsets(PARTS[name[0]])[part])
    assert store.still_writing(np.array(handle[:1]), np.array(handle[1:2]))[0]
    store.mapping[at : at + len(data)] = data
    sums = np.empty(1, np.int64)
    copies.hash_batch(np.array([store.base_address + at]), np.array([len(data)]), sums)
    return int(store.complete(np.array(handle[:1]), np.array(handle[1:2]), part, sums)[0])


def abort(store: KvStore, handle: Handle, writers_done: bool) -> int:
    return int(store.abort_batch(np.array(handle[:1]), np.array(handle[1:2]), writers_done)[0])


def acknowledge(store: KvStore, handle: Handle) -> int:
    return int(store.acknowledge(np.array(handle[:1]), np.array(handle[1:2]))[0])


def remove(store: KvStore, names: list[Name]) -> list[int]:
    return store.remove(keys_of(names)).tolist()


def everything(store: KvStore, names: list[Name], version: int) -> None:
    """A bit of each operation, for a process that is to die in one of them."""
    pins = pin(store, names)
    put(store, names, version)
    size = names[0][0]
    same = [name for name in names if name[0] == size]
    got = reserve(store, same)
    for i, (name, (code, handle)) in enumerate(zip(same, got, strict=True)):
        if code == Code.OK:
            if i % 3 == 0 and write_part(store, name, version, handle, 0) == Code.PENDING:
                write_part(store, name, version, handle, 1)
            elif i % 3 == 1:
                abort(store, handle, True)
            else:
                abort(store, handle, False)
                acknowledge(store, handle)
    for code, handle, _ in pins:
        if code == Code.OK:
            unpin(store, handle)
    remove(store, names[:1])
    put(store, names, version)


def put_siblings(store: KvStore, numbers: list[int], index: int) -> list[int]:
    of = fold(GROUPS[numbers], 0, index)
    b = store.reserve_batch(of, [GROUP_BYTES], siblings=(GROUP, index))
    ok = b.codes == Code.OK
    for at, data in zip(b.offsets[ok].tolist(), blocks(of[ok], GROUP_BYTES), strict=True):
        store.mapping[at : at + GROUP_BYTES] = data
    sums = np.empty(int(ok.sum()), np.int64)
    copies.hash_batch(store.base_address + b.offsets[ok], b.nbytes[ok], sums)
    b.codes[ok] = store.complete(b.slots[ok], b.gens[ok], 0, sums)
    return b.codes.tolist()


def remove_siblings(store: KvStore, numbers: list[int], index: int) -> list[int]:
    return store.remove(fold(GROUPS[numbers], 0, index)).tolist()


NAME = st.tuples(st.sampled_from(SIZES), st.integers(0, N_KEYS - 1))
NAMES_LIST = st.lists(NAME, min_size=1, max_size=8, unique=True)
WHO = st.booleans()
"""Whether the second process does it (where there is one)."""
WHICH = st.integers(0, GROUP - 1)


class PoolMachine(RuleBasedStateMachine):
    """The model is ``known``: for each key the versions that a hit may give, (version, made of two parts)."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[Name, set[tuple[int, bool]]] = {}
        self.pins: list[tuple[bool, Name, tuple[int, bool], Handle, int]] = []
        self.open: list[tuple[Name, int, Handle, set[int]]] = []
        self.quarantined: list[Handle] = []
        self.limbo: set[Name] = set()
        self.groups: dict[int, set[int]] = {number: set() for number in range(len(GROUPS))}
        self.may_break = 0
        self.peer: Peer | None = None
        self.joined = False
        self.version = 0
        self.config = Config(
            pool=f"machine-{os.getpid()}-{next(numbers)}", size=1 << 20, slab=64 << 10, min_block=4096, prefault=False,
            quarantine_grace_s=GRACE_S, lock_timeout_s=2.0, verify="always",
        )  # fmt: skip
        self.store = quiet(KvStore(config=self.config))

    def teardown(self) -> None:
        if self.peer is not None:
            self.peer.kill()
        self.store.close()
        remove_pool(self.config.pool)

    # ---- the model -------------------------------------------------------------------------------

    def do(self, by_peer: bool, function: Any, *args: Any) -> Any:
        if by_peer and self.peer is not None:
            return self.peer.call(function, *args)
        return function(self.store, *args)

    def next_version(self) -> int:
        self.version = self.version % 250 + 1
        return self.version

    def pinned(self, name: Name) -> bool:
        return any(name == one for _, one, _, _, _ in self.pins)

    def written(self, name: Name) -> bool:
        return name in self.limbo or any(name == one for one, _, _, _ in self.open)

    def bytes_of(self, name: Name, version: tuple[int, bool]) -> bytes:
        """All parts one after another; between two parts of these sizes there is no padding."""
        return b"".join(part.tobytes() for part in content(name, *version))

    def saw_hit(self, name: Name, got: bytes) -> None:
        fits = {v for v in self.known.get(name, ()) if self.bytes_of(name, v) == got}
        assert fits, f"a hit of {name} gave bytes that were never stored under it"
        self.known[name] = fits

    def saw_miss(self, name: Name) -> None:
        assert not self.pinned(name), f"{name} is pinned and was missed"
        self.known[name] = set()

    def stored(self, names: list[Name], codes: list[int], version: int, parts: bool) -> None:
        for name, code in zip(names, codes, strict=True):
            if code == Code.OK:
                assert not self.pinned(name), f"{name} is pinned and was stored anew"
                self.known[name] = {(version, parts)}
            elif code == Code.EXISTS:
                assert self.known.get(name), f"{name} is said to exist and was never stored"
            elif code == Code.IN_PROGRESS:
                assert self.written(name), f"{name} is said to be in writing and is not"
            else:
                assert code in OPEN_CODES, Code(code).name

    # ---- rules -----------------------------------------------------------------------------------

    @initialize(names=st.lists(NAME, min_size=5, max_size=20, unique=True))
    def begin(self, names: list[Name]) -> None:
        self.put(False, names)

    @rule(by_peer=WHO, names=NAMES_LIST)
    def put(self, by_peer: bool, names: list[Name]) -> None:
        version = self.next_version()
        self.stored(names, self.do(by_peer, put, names, version), version, False)

    @rule(by_peer=WHO, names=NAMES_LIST)
    def get(self, by_peer: bool, names: list[Name]) -> None:
        for name, (code, got) in zip(names, self.do(by_peer, get, names), strict=True):
            if code == Code.OK:
                self.saw_hit(name, got)
            elif code == Code.SIZE:
                assert any(parts for _, parts in self.known.get(name, ())), f"{name} has another size"
            else:
                assert code == Code.MISSING, Code(code).name
                self.saw_miss(name)

    @rule(by_peer=WHO, names=NAMES_LIST)
    def pin(self, by_peer: bool, names: list[Name]) -> None:
        by_peer = by_peer and self.peer is not None
        for name, (code, handle, nbytes) in zip(names, self.do(by_peer, pin, names), strict=True):
            if code == Code.OK:
                self.saw_hit(name, look(self.store, handle, nbytes))
                (version, *_) = self.known[name]
                self.pins.append((by_peer, name, version, handle, nbytes))
            elif code == Code.MISSING:
                self.saw_miss(name)
            else:
                assert code == Code.BUDGET, Code(code).name

    @precondition(lambda self: self.pins)
    @rule(which=st.integers(0, 1 << 16), count=st.integers(1, 6))
    def unpin(self, which: int, count: int) -> None:
        for _ in range(min(count, len(self.pins))):
            by_peer, _, _, handle, _ = self.pins.pop(which % len(self.pins))
            self.do(by_peer, unpin, handle)

    @rule(size=st.sampled_from(SIZES), picked=st.lists(st.integers(0, N_KEYS - 1), min_size=1, max_size=5, unique=True))
    def reserve(self, size: int, picked: list[int]) -> None:
        names = [(size, number) for number in picked]
        version = self.next_version()
        for name, (code, handle) in zip(names, reserve(self.store, names), strict=True):
            if code == Code.OK:
                assert not self.pinned(name)
                self.known[name] = set()
                self.open.append((name, version, handle, set()))
            else:
                self.stored([name], [code], version, True)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 1 << 16), part=st.integers(0, 1), by_peer=WHO)
    def complete(self, which: int, part: int, by_peer: bool) -> None:
        i = which % len(self.open)
        name, version, handle, done = self.open[i]
        code = self.do(by_peer and self.joined, write_part, name, version, handle, part)
        done.add(part)
        assert code == (Code.OK if len(done) == 2 else Code.PENDING), Code(code).name
        if len(done) == 2:
            del self.open[i]
            self.known[name] = {(version, True)}

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 1 << 16), writers_done=st.booleans())
    def abort(self, which: int, writers_done: bool) -> None:
        name, _, handle, _ = self.open.pop(which % len(self.open))
        assert abort(self.store, handle, writers_done) == Code.OK
        assert abort(self.store, handle, writers_done) == Code.STALE
        assert write_stale(self.store, handle) == Code.STALE
        if not writers_done:
            self.quarantined.append(handle)
        assert not self.do(True, get, [name])[0][0] >= 0, "a block that was given up can be read"

    @precondition(lambda self: self.quarantined)
    @rule(which=st.integers(0, 1 << 16))
    def acknowledge(self, which: int) -> None:
        handle = self.quarantined.pop(which % len(self.quarantined))
        assert acknowledge(self.store, handle) == Code.OK
        assert acknowledge(self.store, handle) == Code.STALE

    @rule(by_peer=WHO, names=NAMES_LIST)
    def remove(self, by_peer: bool, names: list[Name]) -> None:
        for name, code in zip(names, self.do(by_peer, remove, names), strict=True):
            if code == Code.PINNED:
                assert self.pinned(name) or self.limbo, f"{name} is said to be pinned and is not"
            elif code == Code.IN_PROGRESS:
                assert self.written(name)
            else:
                assert code in (Code.OK, Code.MISSING), Code(code).name
                assert not self.pinned(name)
                assert code == Code.MISSING or self.known.get(name)
                self.known[name] = set()

    @rule(names=NAMES_LIST)
    def exists(self, names: list[Name]) -> None:
        for name, there in zip(names, self.store.exists(keys_of(names)).tolist(), strict=True):
            if there:
                assert self.known.get(name), f"{name} exists and was never stored"
            else:
                self.saw_miss(name)

    @rule(size=st.sampled_from(SIZES), seed=st.integers(0, 1 << 20))
    def pressure(self, size: int, seed: int) -> None:
        """Blocks nobody asks for again: others are evicted, and slabs move to this size."""
        g = pool_of(self.store).geometry
        of = keys(3 * (g.slab_bytes // size), 1 << 32 | seed)
        codes = self.store.put(of, list(blocks(of, size)))
        assert set(codes.tolist()) <= {Code.OK, Code.EXISTS} | OPEN_CODES, codes.tolist()

    def siblings_there(self) -> dict[int, set[int]]:
        found = [self.store.exists(fold(GROUPS, 0, index)) for index in range(GROUP)]
        return {number: {i for i in range(GROUP) if found[i][number]} for number in self.groups}

    @rule(
        by_peer=WHO, picked=st.lists(st.integers(0, len(GROUPS) - 1), min_size=1, max_size=4, unique=True), index=WHICH
    )
    def put_siblings(self, by_peer: bool, picked: list[int], index: int) -> None:
        codes = self.do(by_peer, put_siblings, picked, index)
        found = self.siblings_there()
        for number, code in zip(picked, codes, strict=True):
            before = self.groups[number]
            assert code == Code.OK or (code == Code.EXISTS and index in before) or code in OPEN_CODES, Code(code).name
            assert found[number] in (set(), before, before | {index}, {index}), f"of group {number} a part went"
            self.groups[number] = found[number]

    @rule(
        by_peer=WHO, picked=st.lists(st.integers(0, len(GROUPS) - 1), min_size=1, max_size=4, unique=True), index=WHICH
    )
    def remove_siblings(self, by_peer: bool, picked: list[int], index: int) -> None:
        for number, code in zip(picked, self.do(by_peer, remove_siblings, picked, index), strict=True):
            assert code == (Code.OK if index in self.groups[number] else Code.MISSING), Code(code).name
            if code == Code.OK:
                self.groups[number] = set()

    # ---- other processes -------------------------------------------------------------------------

    @precondition(lambda self: self.peer is None)
    @rule(join=st.booleans())
    def second_process(self, join: bool) -> None:
        token, config, store = self.store.token, self.config, self.store
        self.peer = Peer((lambda: KvStore.join(token, config=config)) if join else (lambda: another(store)))
        self.joined = join
        assert (self.peer.session_id == self.store.session_id) == join
        self.limbo.clear()  # who attaches reaps

    @precondition(lambda self: self.peer is not None)
    @rule(kill=st.booleans())
    def second_process_ends(self, kill: bool) -> None:
        assert self.peer is not None
        (self.peer.kill if kill else self.peer.close)()
        self.peer, self.joined = None, False
        self.pins = [one for one in self.pins if not one[0]]

    @rule(point=st.sampled_from(sorted(NAMES)), skip=st.integers(0, 4), names=NAMES_LIST)
    def crash_here(self, point: str, skip: int, names: list[Name]) -> None:
        """A process of its own session dies inside an operation, or does all of it."""
        version = self.next_version()
        store = self.store

        def body() -> None:
            own = quiet(another(store))
            arm(pool_of(own).L, point, skip=skip)
            everything(own, names, version)

        status = Child(body).wait()
        assert status in (0, -9), f"the child ended with {status}"
        event(f"crash at {point}" if status else "crash: nothing of it was passed")
        for name in names:
            if not self.pinned(name) and not any(name == one for one, _, _, _ in self.open):  # in limbo: reaped by it
                self.known.setdefault(name, set()).update(((version, False), (version, True)))
        self.limbo.update(names)
        self.may_break = 1 if status else 0

    @rule()
    def upkeep(self) -> None:
        """The dead are reaped, their quarantine runs out; then there is exactly what the model says."""
        assert pool_of(self.store).reap() >= 0
        time.sleep(GRACE_S * 1.5)
        pool_of(self.store).release_expired()
        self.limbo.clear()
        s = self.store.stats()
        assert s.clients == 1 + (self.peer is not None)
        assert s.writing_slots == len(self.open), "a slot in writing leaked or was lost"
        assert s.quarantined_slots == len(self.quarantined), "a quarantined slot leaked or was lost"
        assert s.pinned_slots == len({handle[0] for _, _, _, handle, _ in self.pins}), "a pin leaked or was lost"

    @rule()
    def attach_again(self) -> None:
        """This process leaves and comes back in a new session; what it had in writing and pinned goes."""
        if self.joined:
            self.second_process_ends(True)
        self.store.close()
        self.limbo.update(name for name, _, _, _ in self.open)
        self.open.clear()
        self.quarantined.clear()
        self.pins = [one for one in self.pins if one[0]]
        self.store = quiet(KvStore(config=self.config, create=False))
        self.limbo.clear()

    # ---- always ----------------------------------------------------------------------------------

    @invariant()
    def tables_are_whole(self) -> None:
        self.store.check_integrity(deep=True)

    @invariant()
    def siblings_leave_together(self) -> None:
        """A death may catch one group half-way; nothing else does."""
        found = self.siblings_there()
        broken = [n for n, before in self.groups.items() if found[n] not in (set(), before)]
        assert len(broken) <= self.may_break, f"groups {broken} went in part: {found}, were {self.groups}"
        assert all(found[n] < self.groups[n] for n in broken)
        self.groups, self.may_break = found, 0

    @invariant()
    def pinned_blocks_stay(self) -> None:
        for _, name, version, handle, nbytes in self.pins:
            assert look(self.store, handle, nbytes) == self.bytes_of(name, version), f"{name} changed under its pin"


def write_stale(store: KvStore, handle: Handle) -> int:
    """A completion by somebody who does not know that the reservation was given up."""
    return int(store.complete(np.array(handle[:1]), np.array(handle[1:2]), 0, np.zeros(1, np.int64))[0])


@pytest.mark.slow
def test_random_histories_agree_with_a_plain_dict() -> None:
    warm_up()
    run_state_machine_as_test(
        PoolMachine,
        settings=settings(
            max_examples=int(os.environ.get("KVPLUG_TEST_EXAMPLES", "25")),
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            database=None,
            print_blob=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
