"""What SGLang's side asks other hosts for, and how long a request waits for it; no engine, no other host."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kvplug.adapters.sglang.hostpages import ALL_PAGES, BLOCK_GROUPS, TRAILING_PAGES
from kvplug.adapters.sglang.waits import MAX_KNOWN, Waits
from kvplug.adapters.sglang.wants import Part, wanted
from kvplug.remote.fetcher import Fetch, Outcome, Plan, Wanted

PAGES = 6
DEADLINE_S = 120.0


def part(seed: int, nbytes: int = 100, **more: object) -> Part:
    keys = np.random.default_rng(seed).integers(0, 256, (PAGES, 32), np.uint8)
    return Part(keys, nbytes, **more)  # type: ignore[arg-type]


def have(*rows: str) -> np.ndarray:
    """From a row of 1 and 0 for each pool."""
    return np.array([c == "1" for row in rows for c in row])


def test_a_prefix_without_a_gap_is_what_can_be_used() -> None:
    want = wanted([part(1)], 2, 64)
    assert (want.tokens, want.first) == (4 * 64, 2)
    assert want.keys.shape == (PAGES, 32)
    plan = want.plan(have("111011"))
    assert plan.tokens == 3 * 64
    assert plan.index.tolist() == [0, 1, 2]
    assert want.plan(have("011111")).tokens == 0
    assert want.plan(have("111111")).tokens == PAGES * 64


def test_a_window_is_needed_at_the_end_of_the_prefix_alone() -> None:
    want = wanted([part(1), part(2, 30, policy=TRAILING_PAGES, trailing=2)], 0, 64)
    assert np.asarray(want.nbytes).tolist() == [100] * PAGES + [30] * PAGES
    plan = want.plan(have("111111", "000110"))  # whole prefixes end at 5 pages: there the window is whole
    assert plan.tokens == 5 * 64
    assert plan.index.tolist() == [0, 1, 2, 3, 4, PAGES + 3, PAGES + 4]
    assert want.plan(have("111100", "000110")).tokens == 0
    assert want.plan(have("100000", "100000")).tokens == 64


def test_side_pages_that_decide_nothing_are_taken_along() -> None:
    side = part(2, policy=BLOCK_GROUPS, block_pages=2, group_pages=1)
    plan = wanted([part(1), side], 0, 64).plan(have("111100", "010111"))
    assert plan.tokens == 4 * 64
    assert plan.index.tolist() == [0, 1, 2, 3, PAGES + 1, PAGES + 3]
    every = wanted([part(1), part(2, policy=ALL_PAGES)], 0, 64).plan(have("111100", "110111"))
    assert every.index.tolist() == [0, 1, PAGES, PAGES + 1]


# ---- requests that wait ----------------------------------------------------------------------------------------------


def alone(statements: Sequence[bool]) -> list[bool]:
    return list(statements)


def fetch(budget_s: float = 60.0) -> Fetch:
    keys = np.zeros((1, 32), np.uint8)
    return Fetch(Wanted(keys, 1, lambda _: Plan(np.arange(0), 0), 64), budget_s, moves=False, tokens_per_s=None)


def test_a_request_waits_until_its_fetch_has_ended_and_is_matched_once_more() -> None:
    waits, one = Waits(alone, can_fetch=True), fetch()
    waits.matched("r", True, lambda: one)
    assert waits.holds_back("r", idle=False)
    assert not waits.holds_back("other", idle=False)
    one.progress(64)
    one.end(Outcome.FETCHED)
    assert waits.holds_back("r", idle=False)  # what it was matched with is from before
    waits.matched("r", False, lambda: pytest.fail("asked twice"))
    assert one.unwanted, "what the lookup has pinned stays pinned twice"
    assert not waits.holds_back("r", idle=False)
    waits.matched("r", True, lambda: pytest.fail("asked twice"))


def test_a_request_for_which_nothing_came_goes_on_at_once() -> None:
    waits, one = Waits(alone, can_fetch=True), fetch()
    waits.matched("r", True, [one].pop)
    one.end(Outcome.MISSING)
    assert not waits.holds_back("r", idle=False)
    assert one.unwanted
    kept = weakref.ref(one)
    del one
    assert kept() is None, "the names of a prompt are kept after they are of use"
    waits.matched("r", True, lambda: pytest.fail("asked twice"))
    assert not waits.holds_back("r", idle=False)


def test_no_request_waits_beyond_the_deadline() -> None:
    waits, late = Waits(alone, can_fetch=True), fetch(0.05)
    waits.matched("r", True, lambda: late)
    assert waits.holds_back("r", idle=False)
    time.sleep(0.1)
    assert not waits.holds_back("r", idle=True)


def test_nobody_is_asked_where_all_is_there_or_not_every_rank_could() -> None:
    waits = Waits(alone, can_fetch=True)
    waits.matched("r", False, lambda: pytest.fail("nothing was missing"))
    assert not waits.holds_back("r", idle=False)
    one_is_off = Waits(lambda statements: [False for _ in statements], can_fetch=True)
    one_is_off.matched("r", True, lambda: pytest.fail("a rank takes no part"))
    assert not one_is_off.holds_back("r", idle=False)


class Ranks:
    """Two ranks on a thread each: a statement is agreed on when both have made one, and both make equally many."""

    def __init__(self) -> None:
        self._both = threading.Barrier(2, timeout=DEADLINE_S)
        self._said: list[list[bool]] = [[], []]

    def agree(self, rank: int, statements: Sequence[bool]) -> list[bool]:
        self._said[rank] = list(statements)
        self._both.wait()
        out = [all(pair) for pair in zip(*self._said, strict=True)]
        self._both.wait()
        return out

    def run(self, rank: int, its: Fetch | None, can_fetch: bool) -> list[bool]:
        waits = Waits(lambda statements: self.agree(rank, statements), can_fetch=can_fetch)
        out = []
        for step in range(6):
            waits.matched("r", True, lambda: its)
            out.append(waits.holds_back("r", idle=True))
            if step == 2 and rank == 0 and its is not None:
                its.progress(64)
                its.end(Outcome.FETCHED)
        return out


@pytest.mark.parametrize("both_can", [True, False])
def test_ranks_decide_alike_whatever_their_fetches_do(both_can: bool) -> None:
    """One rank can't fetch this, or nothing at all; the other's takes three steps. Both ask equally often."""
    ranks, slow = Ranks(), fetch()
    with ThreadPoolExecutor(2) as threads:
        runs = [threads.submit(ranks.run, 0, slow, True), threads.submit(ranks.run, 1, None, both_can)]
        one, two = (run.result(DEADLINE_S) for run in runs)
    assert one == two
    assert one == ([True, True, True, True, False, False] if both_can else [False] * 6)


def test_states_that_are_not_in_pages_are_fetched_for_the_next_request() -> None:
    waits, one = Waits(alone, can_fetch=True, may_wait=False), fetch()
    waits.matched("r", True, lambda: one)
    assert not waits.holds_back("r", idle=False)
    waits.matched("r", True, lambda: pytest.fail("asked twice"))
    assert not one.unwanted, "what is under way would be given up"


def test_what_is_remembered_has_a_bound_and_ends_with_the_request() -> None:
    waits, first = Waits(alone, can_fetch=True), fetch()
    waits.matched("first", True, lambda: first)
    for i in range(MAX_KNOWN):
        waits.matched(f"r{i}", True, fetch)
    assert first.unwanted
    assert not waits.holds_back("first", idle=False)
    one = fetch()
    waits.matched("gone", True, lambda: one)
    waits.release("gone")
    assert one.unwanted
    left = fetch()
    waits.matched("left", True, lambda: left)
    waits.clear()
    assert left.unwanted
