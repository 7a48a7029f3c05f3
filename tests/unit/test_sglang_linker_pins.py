"""Promises of the linker: every length that can be restored and no other, pinned until taken, and never longer."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvplug.adapters.sglang.devicepools import KV, MAMBA, SWA
from kvplug.adapters.sglang.pagekeys import Keys, mask, page_keys
from kvplug.adapters.sglang.pins import LIFE_STEPS, Pins
from kvplug.config import Config
from kvplug.errors import Code
from kvplug.store import KvStore
from tests.lab.env import remove_pool

SIZES = {KV: 6000, SWA: 5000, MAMBA: 4097}
PAGES = 24


class Names:
    """A rank's engine as far as promises know it: SGLang's hashes to keys, by the real mask."""

    def __init__(self) -> None:
        self.epoch = 0
        self.identified = True

    def keys(self, pool: str, hashes: Sequence[str], replicated: bool = False) -> Keys | None:
        if not self.identified:
            return None
        return page_keys(hashes, mask(f"root {self.epoch}".encode(), pool, 0))


class Starting(Names):
    """One that becomes identified, on a thread of its own, while its keys are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.epoch = -1
        self.identified = False

    def keys(self, pool: str, hashes: Sequence[str], replicated: bool = False) -> Keys | None:
        if not self.identified:
            self.identified = True
            self.epoch += 1
        return super().keys(pool, hashes, replicated)


def chain(seed: int, n: int = PAGES) -> list[str]:
    """Page hashes as SGLang chains them: each stands for all tokens up to its page's end."""
    out, last = [], f"sequence {seed}".encode()
    for _ in range(n):
        last = hashlib.sha256(last).digest()
        out.append(last.hex())
    return out


@contextlib.contextmanager
def temporary_store(name: str, **config: Any) -> Iterator[KvStore]:
    pool = f"t-{name}-{os.getpid()}"
    store = KvStore(
        config=Config.defaults().with_changes(pool=pool, size="64mib", min_block="4kib", prefault=False, **config)
    )
    try:
        yield store
    finally:
        store.close()
        remove_pool(pool)


@pytest.fixture
def store() -> Iterator[KvStore]:
    with temporary_store("pins") as one:
        yield one


def put(store: KvStore, names: Names, source: str, hashes: Sequence[str]) -> None:
    if hashes:
        keys = names.keys(source, hashes)
        assert keys is not None
        codes = store.put(keys, np.ones((len(hashes), SIZES[source]), np.uint8))
        assert set(codes.tolist()) <= {Code.OK, Code.EXISTS}


def removable(store: KvStore, names: Names, source: str, hashes: Sequence[str]) -> list[bool]:
    """Whether each page could be taken away, as an eviction would; those that could are gone afterwards."""
    keys = names.keys(source, hashes)
    assert keys is not None
    return [code != Code.PINNED for code in store.remove(keys).tolist()]


def pinned(store: KvStore) -> int:
    return store.stats().pinned_slots


def make(names: Names, store: KvStore, *sources: str, verify: bool = False) -> Pins:
    return Pins(names, store, {name: SIZES[name] for name in (KV, *sources)}, replicated=False, verify=verify)


# ---- which lengths ---------------------------------------------------------------------------------------------------


def restorable(there: dict[str, set[int]], n: int, windows: dict[str, int]) -> list[int]:
    """The definition, page by page."""
    found = []
    for length in range(1, n + 1):
        full = all(page in there[KV] for page in range(length))
        if full and all(
            page in there[name] for name, window in windows.items() for page in range(max(0, length - window), length)
        ):
            found.append(length)
    return found


some_pages = st.sets(st.integers(0, PAGES - 1))


@settings(max_examples=120)
@given(
    missing=st.sets(st.integers(0, PAGES - 1), max_size=2),
    swa=some_pages,
    mamba=some_pages,
    n=st.integers(1, PAGES),
    window=st.integers(1, PAGES + 4),
    kinds=st.sets(st.sampled_from([SWA, MAMBA])),
    seed=st.integers(0, 1 << 30),
)
def test_every_length_that_can_be_restored_and_no_other(
    shared: tuple[KvStore, Names],
    missing: set[int],
    swa: set[int],
    mamba: set[int],
    n: int,
    window: int,
    kinds: set[str],
    seed: int,
) -> None:
    """Against the definition; and all pages of a length's windows are pinned, so that none can be taken away."""
    store, names = shared
    hashes = chain(seed)
    there = {KV: set(range(PAGES)) - missing, SWA: swa, MAMBA: mamba}
    for source, pages in there.items():
        put(store, names, source, [hashes[page] for page in sorted(pages)])
    windows = {name: {SWA: min(window, n), MAMBA: 1}[name] for name in kinds}
    pins = make(names, store, *kinds)
    answer = pins.lookup("r", hashes[:n], windows)
    assert answer == restorable(there, n, windows)
    assert pins.lookup("r", hashes[:n], windows) == answer
    for length in answer:
        for name, pages in [(KV, range(length)), *((k, range(max(0, length - w), length)) for k, w in windows.items())]:
            assert not any(removable(store, names, name, [hashes[page] for page in pages]))
    if not answer:
        assert not len(pins)
    pins.clear()
    assert pinned(store) == 0
    for source in there:
        removable(store, names, source, hashes)


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[KvStore, Names]]:
    with temporary_store("shared-pins") as one:
        yield one, Names()


# ---- one promise -----------------------------------------------------------------------------------------------------


def test_what_was_not_there_is_looked_up_again(store: KvStore) -> None:
    names, hashes = Names(), chain(1)
    pins = make(names, store)
    put(store, names, KV, hashes[:5])
    assert pins.lookup("r", hashes, {}) == [1, 2, 3, 4, 5]
    put(store, names, KV, hashes[5:9])
    assert pins.lookup("r", hashes, {})[-1] == 9
    assert pinned(store) == 9


def test_a_shorter_a_longer_and_a_later_stretch_move_the_promise_along(store: KvStore) -> None:
    """SGLang asks about whole prompts and about prompts less a token, and from where its own cache ends by then."""
    names, hashes = Names(), chain(2)
    pins = make(names, store, SWA)
    put(store, names, KV, hashes)
    put(store, names, SWA, hashes)
    assert pins.lookup("r", hashes[:20], {SWA: 4})[-1] == 20
    assert pins.lookup("r", hashes[:19], {SWA: 4})[-1] == 19
    assert pins.lookup("r", hashes, {SWA: 4})[-1] == PAGES
    assert pinned(store) == 2 * PAGES
    assert pins.lookup("r", hashes[6:], {SWA: 4}) == list(range(1, PAGES - 5))
    assert pinned(store) == 2 * (PAGES - 6)
    taken = pins.take("r", {KV: hashes[6:10], SWA: hashes[6:10]})
    assert taken is not None
    for source, part in taken.items():
        keys = names.keys(source, hashes[6:10])
        assert keys is not None
        again = store.pin_batch(keys)
        assert again.slots.tolist() == part.slots.tolist()
        assert again.offsets.tolist() == part.offsets.tolist()
        store.unpin(again.slots)
    assert pinned(store) == 8


def test_a_later_stretch_has_no_more_than_was_left_of_the_promise(store: KvStore) -> None:
    names, hashes = Names(), chain(15)
    pins = make(names, store)
    put(store, names, KV, hashes[:9])
    assert pins.lookup("r", hashes, {})[-1] == 9
    assert pins.lookup("r", hashes[4:], {}) == [1, 2, 3, 4, 5]
    assert pinned(store) == 5
    assert pins.lookup("r", hashes[9:], {}) == []
    assert pinned(store) == 0


def test_other_tokens_replace_the_promise(store: KvStore) -> None:
    names, one, other = Names(), chain(3), chain(4)
    pins = make(names, store)
    put(store, names, KV, [*one, *other[:7]])
    pins.lookup("r", one, {})
    assert pins.lookup("r", other, {})[-1] == 7
    assert pinned(store) == 7
    assert pins.take("r", {KV: one[:3]}) is None
    assert pinned(store) == 0


def test_a_promise_taken_leaves_only_what_the_load_needs(store: KvStore) -> None:
    names, hashes = Names(), chain(5)
    pins = make(names, store, SWA, MAMBA)
    for source in SIZES:
        put(store, names, source, hashes)
    pins.lookup("r", hashes, {SWA: 3, MAMBA: 1})
    taken = pins.take("r", {KV: hashes[:10], SWA: hashes[7:10], MAMBA: hashes[9:10]})
    assert taken is not None
    assert {name: len(part.slots) for name, part in taken.items()} == {KV: 10, SWA: 3, MAMBA: 1}
    assert pinned(store) == 14
    assert pins.take("r", {KV: hashes[:10]}) is None, "a promise is taken once"


@pytest.mark.parametrize("wanted", ["nothing", "unknown", "too long", "not in a row", "never asked"])
def test_what_was_not_promised_is_not_loaded(store: KvStore, wanted: str) -> None:
    names, hashes = Names(), chain(6)
    pins = make(names, store)
    put(store, names, KV, hashes[:8])
    if wanted != "never asked":
        pins.lookup("r", hashes, {})
    pages = {
        "nothing": [],
        "unknown": chain(7)[:2],
        "too long": hashes[:9],
        "not in a row": [hashes[0], hashes[2], hashes[1]],
        "never asked": hashes[:2],
    }[wanted]
    assert pins.take("r", {KV: pages}) is None
    assert pinned(store) == 0


def test_nothing_is_promised_over_a_change_of_weights(store: KvStore) -> None:
    names, hashes = Names(), chain(8)
    pins = make(names, store)
    put(store, names, KV, hashes)
    assert pins.lookup("r", hashes, {})
    assert pins.lookup("s", hashes, {})
    names.epoch += 1
    assert pins.take("r", {KV: hashes[:4]}) is None
    assert pins.lookup("s", hashes, {}) == []
    names.identified = False
    assert pins.lookup("t", hashes, {}) == []
    assert pinned(store) == 0


def test_a_block_of_another_size_is_a_miss(store: KvStore) -> None:
    names, hashes = Names(), chain(9)
    pins = make(names, store)
    put(store, names, KV, hashes[:2])
    keys = names.keys(KV, hashes)
    assert keys is not None
    store.put(keys[2:3], np.ones((1, SIZES[KV] - 8), np.uint8))
    put(store, names, KV, hashes[3:])
    assert pins.lookup("r", hashes, {}) == [1, 2]
    assert pinned(store) == 2


def test_verified_before_it_is_promised() -> None:
    """verify="always": a damaged page ends the prefix, is removed, and can be stored again."""
    with temporary_store("verify-pins", verify="always") as store:
        names, hashes = Names(), chain(10)
        pins = make(names, store, SWA, verify=True)
        for source in (KV, SWA):
            put(store, names, source, hashes)
        for source, page in ((KV, 12), (SWA, 5)):
            keys = names.keys(source, hashes)
            assert keys is not None
            spot = store.pin_batch(keys[page : page + 1])
            store.mapping[int(spot.offsets[0]) : int(spot.offsets[0]) + 64] = 0
            store.unpin(spot.slots)
        assert pins.lookup("r", hashes, {SWA: 2}) == [1, 2, 3, 4, 5, 8, 9, 10, 11, 12]
        assert pins.corrupt == 2
        assert pinned(store) == 12 + 11
        pins.clear()
        for source in (KV, SWA):
            put(store, names, source, hashes)
        assert pins.lookup("r", hashes, {SWA: 2})[-1] == PAGES


# ---- the end of promises ---------------------------------------------------------------------------------------------


def test_twenty_requests_aborted_between_lookup_and_load_leave_no_pin(store: KvStore) -> None:
    """SGLang drops its hit marker and tells nobody; the next step's poll releases the pins."""
    names, hashes = Names(), chain(11)
    markers: dict[str, int] = {}
    pins = make(names, store)
    pins.markers = markers
    put(store, names, KV, hashes)
    for i in range(20):
        assert pins.lookup(f"r{i}", hashes, {})
        markers[f"r{i}"] = i
    pins.end_of_step()
    assert len(pins) == 20
    markers.clear()
    pins.end_of_step()
    assert len(pins) == 0
    assert pins.swept == 20
    assert pinned(store) == 0


def test_a_hit_that_the_ranks_did_not_share_is_released_at_once(store: KvStore) -> None:
    names, hashes = Names(), chain(12)
    pins = make(names, store)
    pins.markers = {}
    put(store, names, KV, hashes[:3])
    assert pins.lookup("r", hashes, {})
    assert pinned(store) == 3
    pins.matched("r")
    assert pinned(store) == 0


def test_a_request_matched_again_without_a_question_has_everything(store: KvStore) -> None:
    """SGLang leaves its marker behind then; the other requests' promises stay."""
    names, hashes = Names(), chain(13)
    pins = make(names, store)
    pins.markers = {"r": 1, "s": 1}
    put(store, names, KV, hashes[:3])
    for rid in "rs":
        for _ in range(2):
            assert pins.lookup(rid, hashes, {})
            pins.matched(rid)
    assert len(pins) == 2
    pins.matched("r")
    assert pins.take("r", {KV: hashes[:3]}) is None
    taken = pins.take("s", {KV: hashes[:3]})
    assert taken is not None
    store.unpin(taken[KV].slots)


def test_nobody_waits_for_a_request_that_is_not_asked_about(store: KvStore) -> None:
    """Also where SGLang's marker is left behind. The limit is counted in steps, which all ranks count alike."""
    names, hashes = Names(), chain(14)
    pins = make(names, store)
    pins.markers = {"r": 1, "s": 2}
    put(store, names, KV, hashes)
    pins.lookup("r", hashes, {})
    pins.lookup("s", hashes, {})
    for _ in range(LIFE_STEPS - 1):
        pins.end_of_step()
    pins.lookup("s", hashes, {})
    pins.end_of_step()
    assert pins.take("r", {KV: hashes}) is None
    taken = pins.take("s", {KV: hashes})
    assert taken is not None
    store.unpin(taken[KV].slots)
    assert pinned(store) == 0


# ---- histories -------------------------------------------------------------------------------------------------------


class Histories(RuleBasedStateMachine):
    """Random questions, takes, evictions and ends: what is pinned is what was answered, and it is always loadable."""

    def __init__(self) -> None:
        super().__init__()
        self.exit = contextlib.ExitStack()

    @initialize()
    def begin(self) -> None:
        self.store = self.exit.enter_context(temporary_store("pin-histories"))
        self.names = Names()
        self.pins = make(self.names, self.store, SWA)
        self.markers: dict[str, int] = {}
        self.pins.markers = self.markers
        self.chains = [chain(seed) for seed in range(2)]
        self.promised: dict[str, tuple[list[str], list[int], int]] = {}
        self.loading: list[np.ndarray[Any, Any]] = []

    @rule(which=st.integers(0, 1), source=st.sampled_from([KV, SWA]), pages=some_pages)
    def store_pages(self, which: int, source: str, pages: set[int]) -> None:
        put(self.store, self.names, source, [self.chains[which][page] for page in sorted(pages)])

    @rule(which=st.integers(0, 1), first=st.integers(0, PAGES), end=st.integers(0, PAGES))
    def store_stretch(self, which: int, first: int, end: int) -> None:
        for source in (KV, SWA):
            put(self.store, self.names, source, self.chains[which][first:end])

    @rule(which=st.integers(0, 1), source=st.sampled_from([KV, SWA]), pages=some_pages)
    def evict(self, which: int, source: str, pages: set[int]) -> None:
        if pages:
            removable(self.store, self.names, source, [self.chains[which][page] for page in sorted(pages)])

    @rule(
        rid=st.sampled_from("ab"),
        which=st.integers(0, 1),
        first=st.integers(0, 6),
        n=st.integers(1, PAGES),
        window=st.integers(1, 5),
    )
    def lookup(self, rid: str, which: int, first: int, n: int, window: int) -> None:
        hashes = self.chains[which][first : first + n]
        there = {}
        for source in (KV, SWA):
            keys = self.names.keys(source, hashes)
            assert keys is not None
            there[source] = set(np.flatnonzero(self.store.exists(keys)).tolist())
        windows = {SWA: min(window, len(hashes))}
        answer = self.pins.lookup(rid, hashes, windows)
        assert answer == restorable(there, len(hashes), windows)
        self.promised.pop(rid, None)
        self.markers.pop(rid, None)
        if answer:
            self.promised[rid] = (hashes, answer, windows[SWA])
            self.markers[rid] = 1

    @rule(rid=st.sampled_from("ab"), pick=st.integers(0, 100))
    def take(self, rid: str, pick: int) -> None:
        if rid not in self.promised:
            assert self.pins.take(rid, {KV: self.chains[0][:1]}) is None
            return
        hashes, answer, window = self.promised.pop(rid)
        length = answer[pick % len(answer)]
        taken = self.pins.take(rid, {KV: hashes[:length], SWA: hashes[max(0, length - window) : length]})
        assert taken is not None
        self.loading += [part.slots for part in taken.values()]
        self.markers.pop(rid)

    @rule()
    def loads_end(self) -> None:
        for slots in self.loading:
            self.store.unpin(slots)
        self.loading.clear()

    @rule(rid=st.sampled_from("ab"))
    def abort(self, rid: str) -> None:
        self.markers.pop(rid, None)
        self.promised.pop(rid, None)

    @rule()
    def step(self) -> None:
        self.pins.end_of_step()
        assert len(self.pins) == len(self.promised)
        if not self.promised and not self.loading:
            assert pinned(self.store) == 0

    @invariant()
    def what_was_promised_stays(self) -> None:
        for hashes, answer, window in getattr(self, "promised", {}).values():
            for source, pages in ((KV, hashes[: answer[-1]]), (SWA, hashes[max(0, answer[-1] - window) : answer[-1]])):
                keys = self.names.keys(source, pages)
                assert keys is not None
                assert self.store.exists(keys).all()

    def teardown(self) -> None:
        if hasattr(self, "pins"):
            self.loads_end()
            self.pins.clear()
            assert pinned(self.store) == 0
        self.exit.close()


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)


def test_what_was_named_while_names_changed_is_not_promised(store: KvStore) -> None:
    """A promise that only this rank could not keep would part it from the others: only misses are agreed on."""
    rank, other, hashes = Starting(), Names(), chain(40, 8)
    put(store, other, KV, hashes)
    pins = make(rank, store)
    assert pins.lookup("r", hashes, {}) == []
    assert pins.lookup("r", hashes, {})[-1] == 8
    assert pins.take("r", {KV: hashes}) is not None
