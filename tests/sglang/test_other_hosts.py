"""Two pools of one machine are two hosts: what one's server has computed, the other's reads through an agent."""

from __future__ import annotations

import contextlib
import signal
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest

from tests.lab.env import temporary_pool
from tests.rdma.agent_process import KEY, AgentProcess
from tests.sglang.common import Case, Control, serve
from tests.sglang_lab.server import PAGE, Answer, SglangServer
from tests.vllm.common import attached, eventually

Boot = Callable[..., SglangServer]
WAIT_S = 1.5
SPEED = "tests.sglang.inside_plugin:tokens_per_s"
LATER_S = 2.0
"""How much later than by itself a request may be answered whose prefix other hosts were asked for in vain."""
SOURCE = {"linker": "host", "hicache": "storage"}
RANKS = {"linker": 2, "hicache": 1}


class Hosts(NamedTuple):
    mode: str
    near: SglangServer
    far: SglangServer
    agent: AgentProcess
    far_pool: str

    def ask(self, server: SglangServer, what: str, rank: int = 0, **arguments: Any) -> Any:
        return server.ask(f"tests.sglang.inside_{self.mode}:{what}", rank=rank, **arguments)

    def store(self, cases: Sequence[Case]) -> None:
        """The near host gets all pages of these prompts."""
        serve(self.near, cases)
        for case in cases:
            for rank in range(self.near.tp):
                tokens = list(case.prompt)
                eventually("pages are stored", lambda: all(self.ask(self.near, "there", rank, tokens=tokens)))  # noqa: B023

    def read(self, answers: Sequence[Answer]) -> list[int]:
        """Tokens of each prompt that came from the far host's pool."""
        return [int(answer.details.get(SOURCE[self.mode], 0)) for answer in answers]

    def counted(self, rank: int = 0) -> dict[str, Any]:
        counts: dict[str, Any] = self.far.ask("tests.sglang.inside_plugin:counts_now", rank=rank)
        return counts


@pytest.fixture(scope="module", params=["linker", "hicache"])
def hosts(
    request: pytest.FixtureRequest, boot: Boot, control: Control, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Hosts]:
    mode, log = request.param, tmp_path_factory.mktemp("agent") / "agent.log"
    with temporary_pool("near") as near_pool, temporary_pool("far") as far_pool, contextlib.ExitStack() as stack:
        near = boot(f"near-{mode}", mode=mode, tp=RANKS[mode], pool=near_pool).ready()
        agent = AgentProcess(near_pool, log)
        stack.callback(agent.close)
        others = {"peers": [agent.address], "auth_key": KEY, "fetch_timeout_s": WAIT_S}
        far = boot(f"far-{mode}", mode=mode, tp=RANKS[mode], pool=far_pool, settings=others).ready()
        hosts = Hosts(mode, near, far, agent, far_pool)
        (first,) = control.pick(1, seed=90)
        for server in (near, far):
            for rank in range(RANKS[mode]):
                tokens = list(first.prompt)
                eventually("the weights are known", lambda: hosts.ask(server, "there", rank, tokens=tokens))  # noqa: B023
        yield hosts
        for rank in range(RANKS[mode]):
            assert hosts.counted(rank).get("errors", 0) == 0
        near.close()
        far.close()
        with attached(far_pool) as store:
            store.check_integrity()


@pytest.fixture(scope="module")
def cases(control: Control) -> list[Case]:
    """Each used by one test."""
    return control.pick(12, seed=91)


def test_what_another_host_has_is_read(hosts: Hosts, cases: list[Case]) -> None:
    """One by one, all at once, and then from the far host's own pool, for which nobody is asked."""
    some = cases[:4]
    hosts.store(some)
    assert hosts.read(serve(hosts.far, some[:2])) == [case.whole for case in some[:2]]
    answers = hosts.far.generate_many([case.prompt for case in some[2:]], len(some[0].tokens))
    assert [tuple(answer.tokens) for answer in answers] == [case.tokens for case in some[2:]]
    assert hosts.read(answers) == [case.whole for case in some[2:]]
    for rank in range(hosts.far.tp):
        assert hosts.counted(rank)["fetched_blocks"] >= sum(case.whole // PAGE for case in some)
    before = hosts.counted()["fetches"]
    hosts.far.flush()
    assert hosts.read(serve(hosts.far, some)) == [case.whole for case in some]
    assert hosts.counted()["fetches"] == before
    metrics = eventually(
        "fetches are on /metrics", lambda: (m := hosts.far.metrics()).get("kvplug_fetched_bytes_total") and m
    )
    assert metrics["kvplug_fetches_total"] > 0


def test_what_is_computed_faster_than_it_comes_is_not_asked_for(hosts: Hosts, cases: list[Case]) -> None:
    """The speed is measured on every rank; one that is made up, beyond any link's, ends the fetching."""
    case, unseen = cases[10:12]
    hosts.store([case])
    assert hosts.read(serve(hosts.far, [unseen])) == [0], "nobody has it"
    measured = [hosts.far.ask(SPEED, rank=rank) for rank in range(hosts.far.tp)]
    assert all(10 < speed < 1e6 for speed in measured), measured
    before = [hosts.counted(rank).get("fetch_not_worth_it", 0) for rank in range(hosts.far.tp)]
    try:
        for rank in range(hosts.far.tp):
            hosts.far.ask(SPEED, rank=rank, pretend=1e12)
        assert hosts.read(serve(hosts.far, [case])) == [0]
    finally:
        for rank, speed in enumerate(measured):
            hosts.far.ask(SPEED, rank=rank, pretend=speed)
            hosts.far.ask(SPEED, rank=rank)
    after = [hosts.counted(rank).get("fetch_not_worth_it", 0) for rank in range(hosts.far.tp)]
    assert all(b > a for a, b in zip(before, after, strict=True)), (before, after)


def test_what_only_one_rank_can_fetch_is_computed(hosts: Hosts, cases: list[Case]) -> None:
    """The near host lacks a page, of rank 1's where there are two: SGLang takes the least of what all ranks find."""
    case, last = cases[4], hosts.near.tp - 1
    hosts.store([case])
    tokens = list(case.prompt)
    if last:
        held = hosts.ask(hosts.near, "hold", rank=0, tokens=tokens)
    assert hosts.ask(hosts.near, "remove", rank=last, tokens=tokens, pages=[3]) == [0]
    if last:
        hosts.ask(hosts.near, "let_go", rank=0, slots=held)
        assert all(hosts.ask(hosts.near, "there", rank=0, tokens=tokens))
    assert hosts.read(serve(hosts.far, [case])) == [3 * PAGE]


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_an_agent_that_does_not_answer_costs_little(hosts: Hosts, cases: list[Case], how: str) -> None:
    """The prompts are computed, and equal; how much later: no more than a request waits for other hosts."""
    alone, asked = {"stopped": (cases[5:6], cases[6:8]), "killed": (cases[8:9], cases[9:10])}[how]
    ordinary = statistics.median(hosts.near.generate(case.prompt, len(case.tokens)).total_s for case in alone)
    hosts.store(asked)
    hosts.agent.process.send_signal(signal.SIGSTOP if how == "stopped" else signal.SIGKILL)
    try:
        answers = serve(hosts.far, asked)
    finally:
        if how == "stopped":
            hosts.agent.process.send_signal(signal.SIGCONT)
    assert hosts.read(answers) == [0] * len(asked)
    assert all(answer.total_s < ordinary + LATER_S for answer in answers), (ordinary, answers)
    with attached(hosts.far_pool) as store:
        eventually("no pin is left", lambda: store.stats().pinned_slots == 0)
        eventually("nothing is in writing", lambda: store.stats().writing_slots == 0)
