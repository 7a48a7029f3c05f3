"""What a worker knows of jobs: each step's stores begin once, and each load's end is told once, whoever knows of it."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest

from kvplug.adapters.vllm.arrivals import Arrivals, Ended, LoadEnds
from kvplug.adapters.vllm.promises import PromisedLoads


@dataclass
class Job:
    """As much of one as is looked at."""

    job_id: int
    request_id: str | None = None


@dataclass
class Result:
    job: Job
    ok: bool = True
    failed_blocks: set[int] = field(default_factory=set)


def jobs(*names: str, first: int = 1) -> Any:
    return [Job(first + i, name) for i, name in enumerate(names)]


def results(made: Any, **more: Any) -> Any:
    return [Result(job, **more) for job in made]


# -- steps and jobs ----------------------------------------------------------------------------------------------------


def test_a_steps_stores_begin_once() -> None:
    """An empty step is over without wait_for_save on some versions; on others both say that it is."""
    arrivals = Arrivals()
    assert [arrivals.ends(step) for step in (1, 1, 2, 4, 3, 4, 5)] == [True, False, True, True, False, False, True]


def test_a_step_without_kvplug_has_no_stores() -> None:
    """Its number is 0: the scheduler's side could not build it."""
    assert not Arrivals().ends(0)


def test_steps_of_another_engine_in_the_process_are_not_carried_out() -> None:
    arrivals = Arrivals()
    arrivals.engine = "mine"
    arrivals.begins("another")
    assert arrivals.foreign
    assert not arrivals.ends(7)
    arrivals.begins("mine")
    assert not arrivals.foreign
    assert arrivals.ends(1), "another engine's numbers are not this one's"


@pytest.mark.parametrize("other", ["", None])
def test_an_engine_without_kvplug_beside_one_with_it_is_another(other: str | None) -> None:
    """None is a step that has nothing of kvplug's, whoever's it is."""
    arrivals = Arrivals()
    arrivals.engine = "mine"
    arrivals.begins("x")
    arrivals.begins(other)
    assert arrivals.foreign is (other == "")


def test_a_worker_without_kvplug_knows_the_steps_of_its_engine() -> None:
    """It has to tell that their loads have failed."""
    arrivals = Arrivals()
    arrivals.begins("")
    assert not arrivals.foreign
    arrivals.begins("another")
    assert arrivals.foreign


def test_what_was_sent_has_come_when_the_newest_of_both_kinds_has() -> None:
    arrivals = Arrivals()
    assert arrivals.have(0, 0)
    arrivals.loads(jobs("a", "b", first=3))
    assert arrivals.have(4, 0)
    assert not arrivals.have(5, 0)
    assert not arrivals.have(4, 2)
    arrivals.stores(jobs("c", "d", first=1))
    assert arrivals.have(4, 2)
    assert arrivals.have(3, 1)
    assert not arrivals.have(4, 3)


def test_a_job_without_a_number_takes_nothing_back() -> None:
    """A load that was lost before it had one comes as job 0."""
    arrivals = Arrivals()
    arrivals.loads(jobs("a", first=9))
    arrivals.stores(jobs("b", first=10))
    arrivals.loads([Job(0, "c")])  # type: ignore[list-item]
    arrivals.stores([Job(0)])  # type: ignore[list-item]
    assert arrivals.have(9, 10)


# -- ends of loads -----------------------------------------------------------------------------------------------------


def test_a_load_that_ended_is_told_once() -> None:
    ends = LoadEnds()
    made = jobs("a", "b")
    ends.begun(made)
    assert ends.loading
    taken = ends.take(results(made[:1]))
    assert ends.tell(taken, by_block=True) == Ended({"a"}, set(), set())
    assert ends.loading
    assert ends.take(results(made[:1])) == []
    assert ends.tell(ends.take(results(made[1:])), by_block=True) == Ended({"b"}, set(), set())
    assert not ends.loading
    assert ends.tell([], by_block=True) == Ended(set(), set(), set())
    assert ends.take_unreported_jobs() == set(), "the copy threads report it"


def test_a_failed_load_is_told_by_its_blocks_where_the_engine_may_be_told_them() -> None:
    for by_block, expected in (
        (True, Ended({"a", "b"}, set(), {7, 8, 9})),
        (False, Ended({"a", "b"}, {"a", "b"}, set())),
    ):
        ends = LoadEnds()
        first, second = jobs("a", "b")
        ends.begun([first, second])
        ended = results([first], ok=False, failed_blocks={7, 8}) + results([second], ok=False, failed_blocks={9})
        assert ends.tell(ends.take(ended), by_block) == expected


def test_a_load_that_failed_without_a_block_is_told_by_its_request() -> None:
    """As one that could not be kept: the engine would take it for loaded else."""
    ends = LoadEnds()
    made = jobs("a")
    ends.begun(made)
    assert ends.tell(ends.take(results(made, ok=False)), by_block=True) == Ended({"a"}, {"a"}, set())


def test_blocks_of_a_load_that_ended_well_are_not_told() -> None:
    ends = LoadEnds()
    made = jobs("a")
    ends.begun(made)
    assert ends.tell(ends.take(results(made, failed_blocks={1})), by_block=True) == Ended({"a"}, set(), set())


def test_a_load_that_nobody_carries_out_is_told_as_failed_to_both() -> None:
    ends = LoadEnds()
    ends.lost([*jobs("a", "b", first=5), Job(9)])  # type: ignore[list-item]
    assert not ends.loading
    assert ends.tell([], by_block=True) == Ended({"a", "b"}, {"a", "b"}, set())
    assert ends.tell([], by_block=True) == Ended(set(), set(), set())
    assert ends.take_unreported_jobs() == {5, 6, 9}
    assert ends.take_unreported_jobs() == set()


def test_what_was_lost_and_what_has_ended_are_told_together() -> None:
    ends = LoadEnds()
    made = jobs("a", "b")
    ends.begun(made)
    ends.lost(jobs("c", first=3))
    ended = ends.take(results(made[:1]) + results(made[1:], ok=False, failed_blocks={4}))
    assert ends.tell(ended, by_block=True) == Ended({"a", "b", "c"}, {"c"}, {4})


def test_loads_that_were_given_up_are_told_as_failed_and_their_results_never() -> None:
    """A second end would stand for another rank's. The copy threads have reported the jobs."""
    ends = LoadEnds()
    made = jobs("a", "b")
    ends.begun(made)
    ends.give_up()
    assert not ends.loading
    assert ends.tell([], by_block=True) == Ended({"a", "b"}, {"a", "b"}, set())
    assert ends.take(results(made)) == []
    assert ends.tell([], by_block=True) == Ended(set(), set(), set())
    assert ends.take_unreported_jobs() == set()


def test_a_request_is_loaded_again_after_its_first_load_was_given_up() -> None:
    ends = LoadEnds()
    ends.begun(jobs("a"))
    ends.give_up()
    ends.tell([], by_block=True)
    again = jobs("a", first=2)
    ends.begun(again)
    assert ends.tell(ends.take(results(again)), by_block=True) == Ended({"a"}, set(), set())


def test_a_result_of_a_job_that_was_never_begun_is_not_told() -> None:
    """Some of a step's loads may have got to the copy threads before an error lost the step."""
    ends = LoadEnds()
    made = jobs("a", "b")
    ends.lost(made)
    assert ends.take(results(made)) == []


@pytest.mark.parametrize("seed", range(20))
def test_whatever_goes_wrong_in_ranks_the_engine_hears_each_end_once(seed: int) -> None:
    """As vLLM counts: a load is over when as many ends were told of it as there are ranks, whoever has told them."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    world = 3
    loads, ranks = PromisedLoads(), [LoadEnds() for _ in range(world)]
    copying: list[list[Any]] = [[] for _ in ranks]
    told: Counter[str] = Counter()
    heard: Counter[str] = Counter()
    number = 0

    def step(new: list[str], wrong: float) -> None:
        nonlocal number
        for name in new:
            loads.promise(name)
        sent = [name for name in new if rng.random() > wrong]
        lost = loads.sent(sent)
        made = []
        for name in [*sent, *lost]:
            number += 1
            made.append(Job(number, name))
        failed = set()
        for ends, copies in zip(ranks, copying, strict=True):
            if made and rng.random() < wrong:
                ends.lost(made)  # type: ignore[arg-type]
                copies += made[: rng.randrange(len(made) + 1)]  # some had got to the copy threads
            else:
                ends.begun(made)  # type: ignore[arg-type]
                copies += made
            over = [copies.pop(rng.randrange(len(copies))) for _ in range(rng.randrange(len(copies) + 1))]
            if rng.random() < wrong:
                copies.clear()
                ends.give_up()
                over = []
            ended = ends.tell(ends.take(results(over, ok=rng.random() > wrong)), by_block=False)
            assert ended.failed <= ended.finished
            failed |= ended.failed
            told.update(ended.finished)
        done = {name for name, count in told.items() if count == world}
        assert max(told.values(), default=0) <= world
        for name in done:
            del told[name]
        wanted, strange = loads.heard(done)
        assert (wanted, strange) == (done, 0)
        heard.update(wanted)

    for i in range(100):
        step([f"r{i}.{j}" for j in range(rng.randrange(3))], 0.2)
    deadline = 1000
    while loads and deadline:
        step([], 0.0)
        deadline -= 1
    assert not loads, "a request waits for ever"
    assert set(heard.values()) == {1}
