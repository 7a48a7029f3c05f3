"""Of each load that was promised the engine hears once that it is over, whatever becomes of it; and of no other."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter

import pytest

from kvplug.adapters.vllm.promises import PromisedLoads


def promised(*names: str) -> PromisedLoads:
    """Loads that a step has taken along."""
    loads = PromisedLoads()
    for name in names:
        loads.promise(name)
    assert loads.sent(names) == ()
    return loads


def test_the_ledgers_and_the_shield_need_no_engine() -> None:
    names = ", ".join(f"kvplug.adapters.vllm.{name}" for name in ("promises", "arrivals", "shield"))
    code = f"import sys, {names}; print(sorted({{'vllm', 'numpy', 'torch'}} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.split() == ["[]"]


def test_an_end_is_heard_once() -> None:
    loads = promised("a", "b")
    assert loads.awaited == {"a", "b"}
    assert loads.heard({"a"}) == ({"a"}, 0)
    assert loads.awaited == {"b"}
    assert loads.heard({"a", "b"}) == ({"b"}, 1), "the second end of a load is nothing that the engine may hear"
    assert loads.heard({"b"}) == (set(), 1)


def test_an_end_of_a_load_that_nobody_has_promised_is_not_heard() -> None:
    loads = promised("a")
    assert loads.heard({"a", "x", "y"}) == ({"a"}, 2)
    assert PromisedLoads().heard({"x"}) == (set(), 1)


def test_what_the_workers_report_is_left_as_it_was() -> None:
    """It is vLLM's own set."""
    loads, ended = promised("a"), {"a", "x"}
    loads.heard(ended)
    assert ended == {"a", "x"}


def test_a_load_that_no_step_has_is_lost_and_is_sent_once_in_the_order_of_the_promises() -> None:
    loads = PromisedLoads()
    for name in ("b", "a", "c", "d"):
        loads.promise(name)
    assert loads.sent(["c", None, "x"]) == ("b", "a", "d")
    assert loads.sent([]) == ()
    assert loads.awaited == {"a", "b", "c", "d"}, "its request still waits for its end"
    assert loads.heard({"a", "b", "c", "d"}) == ({"a", "b", "c", "d"}, 0)


def test_a_load_that_a_step_has_is_not_sent_again() -> None:
    loads = promised("a")
    assert loads.sent([]) == ()
    loads.promise("b")
    assert loads.sent([]) == ("b",)


def test_a_step_of_no_promises_loses_nothing() -> None:
    assert PromisedLoads().sent(["a", None]) == ()


def test_a_request_may_be_promised_a_load_again_after_the_end_of_the_first() -> None:
    loads = promised("a")
    loads.heard({"a"})
    loads.promise("a")
    assert loads.sent([]) == ("a",), "the first step's load is not the second's"
    assert loads.heard({"a"}) == ({"a"}, 0)


def test_the_end_of_a_load_that_was_given_up_is_kept_from_the_engine_and_expected() -> None:
    """As when the engine's cache is emptied while it is loaded: it was told then that the load has failed."""
    loads = promised("a", "b")
    loads.give_up()
    assert loads.awaited == set()
    assert loads.is_given_up("a")
    assert loads.is_given_up("b")
    assert loads.heard({"a"}) == (set(), 0)
    assert not loads.is_given_up("a"), "from now on its request may be offered another"
    assert loads.is_given_up("b")
    assert loads.heard({"a", "b"}) == (set(), 1), "a second end is one too many"


def test_what_is_promised_after_others_were_given_up_is_heard() -> None:
    loads = promised("a")
    loads.give_up()
    loads.promise("b")
    assert not loads.is_given_up("b")
    assert loads.sent([]) == ("b",)
    assert loads.heard({"a", "b"}) == ({"b"}, 0)
    loads.promise("a")
    assert loads.sent(["a"]) == ()
    assert loads.heard({"a"}) == ({"a"}, 0)


def test_a_second_reset_gives_up_what_the_first_has_not_known() -> None:
    loads = promised("a")
    loads.give_up()
    loads.promise("b")
    loads.give_up()
    assert loads.heard({"a", "b"}) == (set(), 0)


def test_a_load_that_was_given_up_before_it_was_sent_is_sent_to_fail() -> None:
    """A worker may have it already: only its end says that it has not."""
    loads = PromisedLoads()
    loads.promise("a")
    loads.give_up()
    assert loads.sent([]) == ("a",)
    assert loads.heard({"a"}) == (set(), 0)


def test_whether_any_end_is_to_come_is_known() -> None:
    loads = PromisedLoads()
    assert not loads
    loads.promise("a")
    assert loads
    loads.give_up()
    assert loads
    loads.heard({"a"})
    assert not loads


@pytest.mark.parametrize("seed", range(20))
def test_in_any_order_of_events_each_promise_has_one_end(seed: int) -> None:
    """Jobs get lost, ends come twice, caches are reset; an engine waits for nothing in the end."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    loads, waiting, under_way = PromisedLoads(), set(), []
    fresh: list[str] = []
    told: Counter[str] = Counter()
    made: Counter[str] = Counter()
    for _ in range(400):
        name, event = f"r{rng.randrange(6)}", rng.random()
        if event < 0.4 and name not in waiting and not loads.is_given_up(name):
            loads.promise(name)
            waiting.add(name)
            made[name] += 1
            fresh.append(name)
        elif event < 0.6:
            kept = [one for one in fresh if rng.random() < 0.7]
            lost = loads.sent(kept)
            assert sorted([*kept, *lost]) == sorted(fresh)
            under_way += fresh
            fresh.clear()
        elif event < 0.9 and under_way:
            ended = {under_way.pop(rng.randrange(len(under_way))) for _ in range(rng.randrange(len(under_way)) + 1)}
            heard, strange = loads.heard(ended | {"nobody"})
            assert heard <= waiting, "the engine asserts that it waits for it"
            assert strange == 1
            waiting -= heard
            told.update(heard)
        elif event > 0.97:
            told.update(waiting)
            waiting.clear()
            loads.give_up()
    under_way += [*fresh, *loads.sent([])]
    heard, _ = loads.heard(set(under_way))
    assert heard == waiting
    told.update(heard)
    assert told == made
    assert not loads
