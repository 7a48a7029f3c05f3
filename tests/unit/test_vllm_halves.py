"""The two halves of the connector around sides that fail, are missing or begin anew: no request waits for ever."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from kvplug.adapters.vllm import compat, worker_half
from kvplug.adapters.vllm.connector import KvplugConnector
from kvplug.adapters.vllm.jobs import Job, RankLayout, StepMetadata, WorkerReport
from kvplug.adapters.vllm.scheduler_half import SchedulerHalf
from kvplug.adapters.vllm.worker import LoadResult
from kvplug.adapters.vllm.worker_half import WorkerHalf

ENGINE = "session"
LAYOUT = RankLayout((0, 0), ENGINE, None)


def broken(*_: object, **__: object) -> Any:
    raise ZeroDivisionError("one that nobody foresaw")


def request(name: str) -> Any:
    return SimpleNamespace(request_id=name)


def output(*ended: str, report: WorkerReport | None = None) -> Any:
    return SimpleNamespace(finished_recving=set(ended), kv_connector_worker_meta=report)


# -- the scheduler's process -------------------------------------------------------------------------------------------


class Scheduler:
    """A scheduler's side that has whatever is asked for, and notes what it is told."""

    engine = ENGINE
    fetches = None

    def __init__(self) -> None:
        self.off = self.loading = self.closed = False
        self.events: list[Any] = []
        self.loads = SimpleNamespace(queued=[], newest=0)
        self.stores = SimpleNamespace(held=0, newest=0)
        self.state = SimpleNamespace(pending={}, counts=Counter(), block_pool=None, manager=None)
        self.adapters_reported = broken

    def matched_tokens(self, one: Any, local: int) -> int | None:
        return 32

    def allocated(self, one: Any, blocks: Any, num_tokens: int) -> None:
        if num_tokens:
            self.loads.newest += 1
            job = Job(self.loads.newest, 0, (), one.request_id)
            self.state.pending[job.job_id] = SimpleNamespace(job=job)
            self.loads.queued.append(job)

    def build(self, scheduled: dict[str, int]) -> StepMetadata:
        jobs, self.loads.queued = tuple(self.loads.queued), []
        self.events.append(dict(scheduled))
        return StepMetadata(step=1, engine=ENGINE, runs_model=bool(scheduled), loads=jobs)

    def reported(self, report: WorkerReport) -> None:
        self.events.append(report)

    def before_reset(self) -> None:
        self.events.append("before reset")

    def quiesced(self) -> None:
        self.events.append("quiesced")

    def reset(self, paused: bool) -> None:
        self.events.append(("reset", paused))

    def go_on_from(self, before: Any) -> None:
        self.events.append(("goes on from", before))

    def switch_off(self) -> None:
        self.off = True

    def close(self) -> None:
        self.closed = True


class Reset:
    """The engine's own, which has whatever is said in loads under way."""

    def __init__(self, *, hopeless: bool = False, quiet: bool = True) -> None:
        self.hopeless, self.quiet = hopeless, quiet
        self.events: list[Any] = []

    def loads(self, awaited: set[str]) -> set[str]:
        return set(awaited)

    def quiesce(self, *newest: int) -> bool:
        self.events.append(("quiesce", newest))
        return self.quiet

    def give_up_loads(self, awaited: set[str]) -> None:
        self.events.append(("give up", set(awaited)))

    def free_deferred(self) -> None:
        self.events.append("free deferred")


def half_of(side: Any) -> SchedulerHalf:
    half = SchedulerHalf(None)
    half.side = side
    return half


def admit(half: SchedulerHalf, *names: str) -> None:
    for name in names:
        assert half.matched_tokens(request(name), 0) == (32, True)
        half.allocated(request(name), SimpleNamespace(blocks=()), 32)


def empty_cache(half: SchedulerHalf, reset: Any) -> None:
    """What the engine does when it gets a call that empties its prefix cache."""
    half.on_cache_reset(reset)
    half._before_cache_reset()
    half.on_cache_reset(None)


def test_a_load_goes_out_with_the_next_step_and_its_end_comes_once() -> None:
    half = half_of(Scheduler())
    admit(half, "a", "b")
    meta = half.build({"x": 1})
    assert [(job.request_id, job.hopeless) for job in meta.loads] == [("a", False), ("b", False)]
    assert half.build({}).loads == ()
    first = output("a")
    half.output(first)
    assert first.finished_recving == {"a"}
    second = output("a", "b", "nobody")
    half.output(second)
    assert second.finished_recving == {"b"}
    assert half.take_counts() == {"hook_errors": 2}


@pytest.mark.parametrize("method", ["allocated", "build"])
def test_a_load_that_an_error_loses_is_sent_to_fail(method: str, caplog: pytest.LogCaptureFixture) -> None:
    """With the job that the workers' reports are counted by, where there is one; and never a second time."""
    side = Scheduler()
    half = half_of(side)
    setattr(side, method, broken)
    admit(half, "a")
    meta = half.build({"x": 1})
    (job,) = meta.loads
    assert (job.request_id, job.hopeless) == ("a", True)
    assert job.job_id == (0 if method == "allocated" else 1)
    assert meta.engine == ENGINE
    assert side.off
    delattr(side, method)
    assert half.build({"x": 1}).loads == (), "a second time"
    assert side.events[-1] == {}, "a side that is off is told of no request"
    ended = output("a")
    half.output(ended)
    assert ended.finished_recving == {"a"}


def test_a_load_that_is_lost_takes_no_other_along() -> None:
    """Each keeps its own job, and those that the step has are as they were."""
    side = Scheduler()
    half = half_of(side)
    admit(half, "a", "b", "c")
    del side.loads.queued[1]
    meta = half.build({})
    assert [(job.request_id, job.job_id, job.hopeless) for job in meta.loads] == [
        ("a", 1, False),
        ("c", 3, False),
        ("b", 2, True),
    ]


def test_counts_of_the_side_and_of_the_shield_are_told_once() -> None:
    side = Scheduler()
    half = half_of(side)
    side.state.counts.update(lookups=2, hook_errors=1)
    side.matched_tokens = broken  # type: ignore[method-assign]
    assert half.matched_tokens(request("a"), 0) == (0, False)
    assert half.take_counts() == {"lookups": 2, "hook_errors": 2}
    assert half.take_counts() == {}


def test_workers_that_have_nothing_to_say_of_adapters_are_passed_over() -> None:
    side = Scheduler()
    told: list[WorkerReport] = []
    side.adapters_reported = told.append
    report = WorkerReport()
    half_of(side).adapters_loaded([None, report])
    half_of(None).adapters_loaded([report])
    assert told == [report]


def test_a_side_that_is_off_is_told_of_loads_that_were_promised_and_of_nothing_else() -> None:
    side = Scheduler()
    half = half_of(side)
    assert half.matched_tokens(request("a"), 0) == (32, True)
    side.switch_off()
    assert half.matched_tokens(request("b"), 0) == (0, False)
    side_allocated: list[int] = []
    side.allocated = lambda one, blocks, count: side_allocated.append(count)  # type: ignore[method-assign]
    half.allocated(request("b"), SimpleNamespace(blocks=()), 0)
    half.allocated(request("a"), SimpleNamespace(blocks=()), 32)
    assert side_allocated == [32]
    (job,) = half.build({}).loads
    assert job.request_id == "a"


def test_without_a_side_nothing_is_promised_and_what_others_report_is_left_alone() -> None:
    half = half_of(None)
    assert half.matched_tokens(request("a"), 0) == (0, False)
    half.allocated(request("a"), SimpleNamespace(blocks=()), 32)
    meta = half.build({"a": 1})
    assert (meta.loads, meta.engine, meta.step, meta.runs_model) == ((), "", 0, True)
    ended = output("a")
    half.output(ended)
    assert ended.finished_recving == {"a"}
    assert half.take_counts() == {}


def test_a_load_is_waited_for_after_its_side_has_gone() -> None:
    """The workers report it still."""
    half = half_of(Scheduler())
    admit(half, "a")
    half.close()
    assert half.side is None
    (job,) = half.build({}).loads
    assert (job.request_id, job.hopeless) == ("a", True)
    ended = output("a", "b")
    half.output(ended)
    assert ended.finished_recving == {"a"}


def test_a_report_that_breaks_the_side_costs_no_end(caplog: pytest.LogCaptureFixture) -> None:
    side = Scheduler()
    half = half_of(side)
    admit(half, "a")
    half.build({})
    side.reported = broken  # type: ignore[method-assign]
    ended = output("a", report=WorkerReport())
    half.output(ended)
    assert ended.finished_recving == {"a"}
    assert half.take_counts() == {"hook_errors": 1}


def test_a_reset_while_loading_gives_up_the_loads_and_keeps_their_ends_from_the_engine() -> None:
    side, reset = Scheduler(), Reset()
    half = half_of(side)
    admit(half, "a")
    half.build({})
    side.stores.newest = 7
    empty_cache(half, reset)
    assert reset.events == [("quiesce", (1, 7)), ("give up", {"a"}), "free deferred"]
    assert side.events[-2:] == ["before reset", "quiesced"]
    assert half.matched_tokens(request("a"), 0) == (0, False), "its end can't be told from another's"
    ended = output("a")
    half.output(ended)
    assert ended.finished_recving == set()
    assert half.matched_tokens(request("a"), 0) == (32, True)
    assert half.take_counts() == {"hook_errors": 0}


def test_a_reset_that_can_not_be_leaves_loads_as_they_are() -> None:
    """The engine answers that it could not empty its cache; until it can, loads and stores go on."""
    side, reset = Scheduler(), Reset(hopeless=True)
    half = half_of(side)
    admit(half, "a")
    half.build({})
    empty_cache(half, reset)
    assert reset.events == []
    assert "before reset" not in side.events
    ended = output("a")
    half.output(ended)
    assert ended.finished_recving == {"a"}


def test_copies_that_do_not_end_are_waited_for_after_the_reset(caplog: pytest.LogCaptureFixture) -> None:
    side, reset = Scheduler(), Reset(quiet=False)
    half = half_of(side)
    admit(half, "a")
    half.build({})
    empty_cache(half, reset)
    assert reset.events == [("quiesce", (1, 0))], "blocks that are copied to are not freed"
    assert "quiesced" not in side.events
    ended = output("a")
    half.output(ended)
    assert ended.finished_recving == {"a"}


def test_a_reset_with_nothing_under_way_asks_no_worker() -> None:
    side, reset = Scheduler(), Reset()
    half = half_of(side)
    empty_cache(half, reset)
    assert reset.events == ["free deferred"]
    assert side.events == ["before reset"]


def test_a_reset_while_stores_are_held_waits_for_them() -> None:
    side, reset = Scheduler(), Reset()
    side.stores.held = 3
    empty_cache(half_of(side), reset)
    assert reset.events == [("quiesce", (0, 0)), ("give up", set()), "free deferred"]
    assert side.events == ["before reset", "quiesced"]


def test_a_cache_that_is_emptied_by_no_call_lets_go_of_what_is_held_and_of_no_load() -> None:
    side = Scheduler()
    half = half_of(side)
    admit(half, "a")
    half.build({})
    empty_cache(half, None)
    assert side.events[-1] == "before reset"
    assert not side.off
    ended = output("a")
    half.output(ended)
    assert ended.finished_recving == {"a"}


def test_a_pause_is_told_from_a_users_reset() -> None:
    side = Scheduler()
    half = half_of(side)
    half.on_pause(True)
    half.reset()
    half.on_pause(False)
    half.reset()
    assert side.events == [("reset", True), ("reset", False)]


class Start:
    """Begins the sides that it was given, one after the other."""

    def __init__(self, *sides: Any) -> None:
        self.sides = list(sides)

    def begin(self, *_: Any) -> Any:
        return self.sides.pop(0)


def beginning(*sides: Any) -> SchedulerHalf:
    half = SchedulerHalf(None)
    half._start = Start(*sides)  # type: ignore[assignment]
    return half


def test_layouts_that_are_told_again_begin_nothing() -> None:
    first = Scheduler()
    half = beginning(first)
    for _ in range(2):
        half.layouts({(0, 0): LAYOUT})
        assert half.side is first  # type: ignore[comparison-overlap]


def test_other_layouts_begin_a_side_that_goes_on_from_the_one_before() -> None:
    first, second = Scheduler(), Scheduler()
    half = beginning(first, second)
    half.layouts({(0, 0): LAYOUT})
    half.layouts({(0, 0): RankLayout((0, 0), "another", None)})
    assert half.side is second  # type: ignore[comparison-overlap]
    assert first.closed
    assert second.events == [("goes on from", first)]


def test_other_layouts_while_workers_load_switch_kvplug_off(caplog: pytest.LogCaptureFixture) -> None:
    """Workers read from slots that are pinned for them."""
    first = Scheduler()
    half = beginning(first)
    half.layouts({(0, 0): LAYOUT})
    first.loading = True
    half.layouts({(0, 0): RankLayout((0, 0), "another", None)})
    assert half.side is first  # type: ignore[comparison-overlap]
    assert (first.off, first.closed) == (True, False)


def test_what_another_connector_tells_begins_nothing() -> None:
    half = beginning(Scheduler())
    half.layouts({(0, 0): LAYOUT, (0, 1): object()})
    assert half.side is None


# -- a worker's process ------------------------------------------------------------------------------------------------


class Worker:
    """A worker's side; loads are over when the test says so."""

    changes_seen = 3

    def __init__(self) -> None:
        self.adapters: Any = None
        self.over: list[LoadResult] = []
        self.report: WorkerReport | None = None
        self.events: list[Any] = []
        self.drains = True

    def submit_loads(self, jobs: tuple[Job, ...], plan: Any) -> None:
        self.events.append(("loads", [job.job_id for job in jobs]))

    def submit_stores(self, jobs: tuple[Job, ...], plan: Any) -> None:
        self.events.append(("stores", [job.job_id for job in jobs]))

    def take_loaded(self, wait: bool) -> list[LoadResult]:
        over, self.over = self.over, []
        return over

    def look_again(self, result: LoadResult) -> None:
        self.events.append(("looks again", result.job.job_id))

    def take_report(self) -> WorkerReport | None:
        report, self.report = self.report, None
        return report

    def drain(self) -> bool:
        self.events.append("drain")
        return self.drains

    def quiesce(self) -> bool:
        self.events.append("quiesce")
        return True


def worker_of(side: Any, *, by_block: bool = True) -> WorkerHalf:
    half = WorkerHalf(None, None)
    half.side = side
    half._by_block = by_block
    if side is not None:
        half._arrivals.engine = ENGINE
    return half


def step(number: int, *loads: str, first: int = 1, stores: tuple[int, ...] = (), **more: Any) -> StepMetadata:
    more.setdefault("engine", ENGINE)
    return StepMetadata(
        step=number,
        runs_model=more.pop("runs_model", True),
        loads=tuple(Job(first + i, 0, (), name) for i, name in enumerate(loads)),
        stores=tuple(Job(job_id, 0, ()) for job_id in stores),
        **more,
    )


def run(half: WorkerHalf, meta: StepMetadata) -> tuple[set[str], set[str], set[int], WorkerReport | None]:
    """What vLLM does in a step: (finished, failed, invalid, report)."""
    half.step_begins(meta)
    if meta.runs_model:
        half.step_written(meta)
    results = half.results(meta, set())
    return (
        set(results.finished_recving or ()),
        set(results.failed_recving or ()),
        half.take_invalid(),
        half.report(meta),
    )


def test_a_steps_loads_begin_before_it_and_its_stores_after_it() -> None:
    side = Worker()
    half = worker_of(side)
    meta = step(1, "a", stores=(5,))
    half.step_begins(meta)
    assert side.events == [("loads", [1])]
    for _ in range(2):
        half.step_written(meta)
    assert side.events == [("loads", [1]), ("stores", [5])]


def test_an_empty_steps_stores_begin_though_vllm_does_not_say_that_it_is_over() -> None:
    side = Worker()
    run(worker_of(side), step(1, stores=(5,), runs_model=False))
    assert side.events == [("stores", [5])]


def test_a_load_that_ends_is_told_with_the_next_step() -> None:
    side = Worker()
    half = worker_of(side)
    meta = step(1, "a", "b")
    assert run(half, meta) == (set(), set(), set(), None)
    side.over = [LoadResult(meta.loads[0], ok=True), LoadResult(meta.loads[1], ok=False, failed_blocks={7})]
    side.report = WorkerReport(done=Counter({1: 1, 2: 1}))
    report = side.report
    assert run(half, step(2)) == ({"a", "b"}, set(), {7}, report)
    assert half.take_invalid() == set()


@pytest.mark.parametrize("there", [True, False])
def test_loads_that_can_not_begin_are_told_as_failed(there: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Also where kvplug is off in this worker: the scheduler's side may not know that yet."""
    side = Worker()
    side.submit_loads = broken  # type: ignore[method-assign]
    half = worker_of(side if there else None)
    finished, failed, invalid, report = run(half, step(1, "a", "b", engine=ENGINE if there else ""))
    assert (finished, failed, invalid) == ({"a", "b"}, {"a", "b"}, set())
    assert report is not None
    assert (report.done, report.failed) == (Counter({1: 1, 2: 1}), {1, 2})
    assert run(half, step(2, engine=ENGINE if there else "")) == (set(), set(), set(), None)


def test_results_that_can_not_be_had_are_given_up_once_no_copy_runs(caplog: pytest.LogCaptureFixture) -> None:
    side = Worker()
    half = worker_of(side)
    meta = step(1, "a")
    run(half, meta)
    side.take_loaded = broken  # type: ignore[method-assign]
    side.drains = False
    assert run(half, step(2))[:2] == (set(), set()), "a copy may write still to blocks that would be others'"
    side.drains = True
    assert run(half, step(3))[:2] == ({"a"}, {"a"})
    del side.take_loaded
    side.over = [LoadResult(meta.loads[0], ok=True)]
    assert run(half, step(4))[:2] == (set(), set()), "a second end would stand for another rank's"


def test_a_load_that_can_not_be_looked_at_again_has_failed(caplog: pytest.LogCaptureFixture) -> None:
    """It is over all the same, and so are those that ended with it."""
    side = Worker()
    half = worker_of(side)
    meta = step(1, "a", "b")
    run(half, meta)
    side.over = [LoadResult(job, ok=True, failed_blocks={int(job.job_id)}) for job in meta.loads]

    def look_again(result: LoadResult) -> None:
        if result.job.request_id == "a":
            broken()

    side.look_again = look_again  # type: ignore[method-assign]
    assert run(half, step(2))[:3] == ({"a", "b"}, {"a"}, set())


def test_nothing_is_waited_for_where_nothing_is_loaded(caplog: pytest.LogCaptureFixture) -> None:
    side = Worker()
    side.take_loaded = broken  # type: ignore[method-assign]
    assert run(worker_of(side), step(1)) == (set(), set(), set(), WorkerReport(counts=Counter(hook_errors=1)))
    assert side.events == []


def test_a_load_that_began_before_an_error_lost_its_step_ends_once(caplog: pytest.LogCaptureFixture) -> None:
    side = Worker()
    half = worker_of(side)
    side.submit_loads = broken  # type: ignore[method-assign]
    meta = step(1, "a")
    assert run(half, meta)[:2] == ({"a"}, {"a"})
    side.over = [LoadResult(meta.loads[0], ok=True)]
    assert run(half, step(2))[:2] == (set(), set())


def test_a_step_that_runs_no_model_is_not_over_at_once_while_requests_wait_for_other_hosts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unless a load has ended, which the engine had better hear of."""
    slept: list[float] = []
    monkeypatch.setattr(worker_half, "time", SimpleNamespace(sleep=slept.append))
    side = Worker()
    half = worker_of(side)
    meta = step(1, "a", runs_model=False, waits=True)
    run(half, meta)
    assert slept == [worker_half.EMPTY_STEP_S]
    side.over = [LoadResult(meta.loads[0], ok=True)]
    run(half, step(2, runs_model=False, waits=True))
    run(half, step(3, runs_model=False))
    run(half, step(4, waits=True))
    assert len(slept) == 1


def test_a_report_that_can_not_be_had_is_not_the_end(caplog: pytest.LogCaptureFixture) -> None:
    side = Worker()
    half = worker_of(side)
    side.take_report = broken  # type: ignore[method-assign]
    report = run(half, step(4, timed=True))[3]
    assert report == WorkerReport(ran=4, counts=Counter(hook_errors=1)), (
        "and the error is counted where all counters are"
    )
    del side.take_report
    assert run(half, step(5, timed=True))[3] == WorkerReport(ran=5), "once"


def test_a_step_of_another_engine_is_nobodys_here() -> None:
    """It shares what vLLM has once for a process; what this worker has to tell waits for a step of its own engine."""
    side = Worker()
    half = worker_of(side)
    meta = step(1, "a")
    run(half, meta)
    side.over = [LoadResult(meta.loads[0], ok=False, failed_blocks={7})]
    assert run(half, step(9, "x", engine="another", stores=(3,), timed=True)) == (set(), set(), set(), None)
    assert side.events == [("loads", [1])]
    assert run(half, step(2))[:3] == ({"a"}, set(), {7})


def test_blocks_that_vllm_has_not_asked_for_are_told_once_the_step_is_its_engines() -> None:
    side = Worker()
    half = worker_of(side)
    meta = step(1, "a")
    run(half, meta)
    side.over = [LoadResult(meta.loads[0], ok=False, failed_blocks={7})]
    half.step_begins(step(2))
    half.results(step(2), set())
    half.step_begins(step(5, engine="another"))
    assert half.take_invalid() == set()
    half.step_begins(step(3))
    assert half.take_invalid() == {7}


def test_blocks_are_told_with_their_own_step_or_not_at_all() -> None:
    """Later they may be others'."""
    side = Worker()
    half = worker_of(side)
    meta = step(1, "a")
    run(half, meta)
    side.over = [LoadResult(meta.loads[0], ok=False, failed_blocks={7})]
    half.results(meta, set())
    half.results(step(2), set())
    assert half.take_invalid() == set()


def test_blocks_of_an_adapter_that_became_another_are_told_as_not_loaded() -> None:
    side, over = Worker(), []
    side.adapters = SimpleNamespace(contradicted=lambda: {4, 5}, finished=over.append)
    half = worker_of(side)
    half.step_begins(step(1))
    half.results(step(1), {"gone"})
    assert half.take_invalid() == {4, 5}
    assert over == [{"gone"}]


def test_copies_end_for_a_reset_when_every_job_that_was_sent_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_half, "ARRIVAL_TIMEOUT_S", 0.05)
    side = Worker()
    half = worker_of(side)
    run(half, step(1, "a", stores=(2,)))
    side.events.clear()
    assert half.quiesce(1, 2)
    assert not half.quiesce(3, 2)
    assert not half.quiesce(1, 4)
    assert side.events == ["quiesce"]
    run(half, step(2, "b", first=3, stores=(4,)))
    assert half.quiesce(3, 4)


def test_jobs_that_an_error_kept_from_beginning_have_come(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody waits for them."""
    side = Worker()
    side.submit_loads = side.submit_stores = broken  # type: ignore[method-assign]
    half = worker_of(side)
    run(half, step(1, "a", stores=(2,)))
    assert half.quiesce(1, 2)


def test_an_error_while_copies_are_ended_means_that_they_have_not(caplog: pytest.LogCaptureFixture) -> None:
    side = Worker()
    side.quiesce = broken  # type: ignore[method-assign]
    assert not worker_of(side).quiesce(0, 0)
    assert worker_of(None).quiesce(9, 9), "without kvplug nothing is copied"


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[Any]]:
    """A worker's start that begins with the given side; what it was called with."""
    monkeypatch.setattr(compat, "ranks", lambda: (0, 0))

    def begins(side: Any) -> list[Any]:
        calls: list[Any] = []

        def start(_config: Any, _caches: Any, caches: Any, _warn: Any) -> Any:
            calls.append(caches)
            return LAYOUT, side

        monkeypatch.setattr("kvplug.adapters.vllm.boot.worker_start", start)
        return calls

    return begins


def test_a_second_engine_in_the_process_is_refused_and_the_first_goes_on(alone: Callable[[Any], list[Any]]) -> None:
    side = Worker()
    calls = alone(side)
    half = WorkerHalf(None, None)
    half.register({"layer": 1}, is_only=True)
    assert (half.layout, half.side) == (LAYOUT, side)
    half.register({"layer": 2}, is_only=True)
    assert half.layout is not None
    assert half.layout.token is None
    assert half.layout.refusal is not None
    assert "a process of its own" in half.layout.refusal
    assert calls == [{"layer": 1}]
    run(half, step(1, "a"))
    assert side.events == [("loads", [1])]


def test_a_worker_that_was_closed_begins_no_copy() -> None:
    """And tells that its loads have failed."""
    side = Worker()
    closed: list[int] = []
    side.close = lambda: closed.append(1)  # type: ignore[attr-defined]
    half = worker_of(side)
    for _ in range(2):
        half.close()
    assert closed == [1]
    assert run(half, step(1, "a"))[:2] == ({"a"}, {"a"})
    assert side.events == []


def test_beside_other_connectors_a_worker_does_nothing(
    alone: Callable[[Any], list[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    calls = alone(Worker())
    half = WorkerHalf(None, None)
    half.register({}, is_only=False)
    assert (half.layout, half.side, calls) == (None, None, [])


# -- both --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", KVConnectorRole)
def test_calls_for_the_other_process_find_nothing_to_do(role: KVConnectorRole, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connector has both halves, and its process only ever uses one: the other answers as one without kvplug."""
    monkeypatch.setattr("kvplug.adapters.vllm.scheduler_half._scheduler_start", lambda _: None)
    config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_load_failure_policy="recompute"),
        lora_config=None,
        max_concurrent_batches=1,
    )
    connector = KvplugConnector(config, role, None)
    try:
        assert connector.get_num_new_matched_tokens(request("a"), 0) == (0, False)
        assert connector.request_finished(request("a"), []) == (False, None)
        assert connector.reset_cache()
        meta = connector.build_connector_meta(SimpleNamespace(num_scheduled_tokens={"a": 1}))
        connector.bind_connector_metadata(meta)
        connector.wait_for_save()
        results = connector.get_transfer_results(set())
        assert not results.finished_recving
        assert not results.failed_recving
        assert connector.get_block_ids_with_load_errors() == set()
        assert connector.build_connector_worker_meta() is None
        assert connector.get_kv_connector_stats() is None
        assert connector.get_handshake_metadata() is None
        assert connector.adapters_report() is None
        assert connector.weight_changes_seen() == 0
        assert connector.quiesce(1, 1)
    finally:
        connector.shutdown()


def test_an_engine_that_would_fail_requests_whose_load_failed_is_set_to_compute_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvplug.adapters.vllm.scheduler_half._scheduler_start", lambda _: None)
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("vllm.kvplug"), "warning", lambda text, *_: said.append(text))
    transfer = SimpleNamespace(kv_load_failure_policy="fail")
    SchedulerHalf(None).begin(SimpleNamespace(kv_transfer_config=transfer))
    assert transfer.kv_load_failure_policy == "recompute"
    assert len(said) == 1
