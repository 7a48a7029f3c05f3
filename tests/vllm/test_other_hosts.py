"""Two engines on two pools, which are two hosts to everything here: what one has computed, the other one reads.

``near`` computes and is served by an agent of its own; ``far`` has the near agent among its peers.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.hosts.agents import other_host
from tests.lab.env import temporary_pool
from tests.vllm.common import BLOCK, Case, Control, agree, attached, eventually, make_prompts, requests, storable
from tests.vllm_lab.engine import InProcess


@pytest.fixture(scope="module")
def hosts(
    start: Callable[..., InProcess], control: Control, pool: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("agents")
    with temporary_pool("vllmfar") as far_pool, contextlib.ExitStack() as stack:
        near = start("near").ready()
        host = stack.enter_context(other_host(pool, folder / "agent.log"))
        far = start("far", pool=far_pool, env=host.settings)
        assert control.engine
        far.ready()
        yield {"near": near, "far": far, "agent": host.agent, "far_pool": far_pool}
        far.close()


@pytest.fixture(scope="module")
def cases(control: Control) -> list[Case]:
    return control.pick(make_prompts(14, 71, tokens=(600, 1200)), 12)


def fill(hosts: dict[str, Any], cases: list[Case], pool: str) -> None:
    """The near host has these cases' blocks."""
    agree(cases, hosts["near"].each(requests(cases)))
    with attached(pool) as store:
        eventually("all is sealed", lambda: store.stats().writing_slots == 0)


def nothing_left(hosts: dict[str, Any]) -> None:
    with attached(hosts["far_pool"]) as store:
        eventually("no pin is left", lambda: store.stats().pinned_slots == 0)
        eventually("nothing is in writing", lambda: store.stats().writing_slots == 0)
        store.check_integrity()


def test_what_the_other_host_has_is_read_and_answers_the_same(
    hosts: dict[str, Any], cases: list[Case], pool: str
) -> None:
    """First one by one, then again from the far host's own pool, for which nobody is asked."""
    mine = cases[:4]
    fill(hosts, mine, pool)
    far = hosts["far"]
    before = far.do("metrics")
    records = far.each(requests(mine))
    agree(mine, records)
    blocks = sum(storable(len(case.prompt)) // BLOCK for case in mine)
    assert [r["external"] for r in records] == [storable(len(case.prompt)) for case in mine]
    after = far.do("metrics")
    assert after["kvplug_fetched_blocks_total"] - before["kvplug_fetched_blocks_total"] == blocks
    assert after["kvplug_fetched_tokens_total"] - before["kvplug_fetched_tokens_total"] == blocks * BLOCK
    assert after["kvplug_fetched_bytes_total"] > before["kvplug_fetched_bytes_total"]
    assert after["kvplug_fetches_total"] - before["kvplug_fetches_total"] == len(mine)
    far.do("reset")
    again = far.each(requests(mine))
    agree(mine, again)
    assert [r["external"] for r in again] == [storable(len(case.prompt)) for case in mine]
    assert far.do("metrics")["kvplug_fetches_total"] == after["kvplug_fetches_total"]
    nothing_left(hosts)


def test_requests_for_one_prefix_at_once_move_it_once(hosts: dict[str, Any], cases: list[Case], pool: str) -> None:
    """Beside requests that nobody has, which go on meanwhile."""
    mine, fresh = cases[4:6], cases[8:10]
    fill(hosts, mine, pool)
    far = hosts["far"]
    before = far.do("metrics")
    agree([*mine, *fresh, *mine], far.generate(requests([*mine, *fresh, *mine])))
    after = far.do("metrics")
    blocks = sum(storable(len(case.prompt)) // BLOCK for case in mine)
    assert after["kvplug_fetched_blocks_total"] - before["kvplug_fetched_blocks_total"] == blocks
    assert after["kvplug_fetch_misses_total"] > before["kvplug_fetch_misses_total"]
    nothing_left(hosts)


def test_a_request_that_is_aborted_while_it_waits_leaves_nothing(
    hosts: dict[str, Any], cases: list[Case], pool: str
) -> None:
    mine = cases[6:7]
    fill(hosts, mine, pool)
    far, agent = hosts["far"], hosts["agent"]
    agent.signal(signal.SIGSTOP)
    try:
        states = far.do("abort_mid_load", requests=requests(mine), delay_s=0.05)
        assert states == ["WAITING"], "it was waiting for the other host"
        assert far.do("step") == 0, "nothing is left to wait for"
    finally:
        agent.signal(signal.SIGCONT)
    nothing_left(hosts)


def test_a_stopped_agent_costs_time_and_nothing_else(hosts: dict[str, Any], cases: list[Case], pool: str) -> None:
    mine = cases[7:8]
    fill(hosts, mine, pool)
    far, agent = hosts["far"], hosts["agent"]
    time.sleep(1.0)  # whatever the test before has made of the peer
    agent.signal(signal.SIGSTOP)
    records = far.each(requests(mine))
    agree(mine, records)
    assert records[0]["external"] == 0
    nothing_left(hosts)
    agent.signal(signal.SIGCONT)


@pytest.mark.parametrize("what", ["reset", "weights"])
def test_what_is_no_longer_right_is_not_waited_for(
    hosts: dict[str, Any], cases: list[Case], pool: str, what: str
) -> None:
    """The near host has it, and while the far one waits for it, it must not use it any more."""
    far, agent, case = hosts["far"], hosts["agent"], cases[10 if what == "reset" else 11]
    fill(hosts, [case], pool)
    agent.signal(signal.SIGSTOP)
    try:
        names = far.do("add", requests=requests([case]))
        assert far.do("step") == 1
        if what == "reset":
            far.do("reset", external=True)
        else:
            far.do("set_weight_version", version="2")
    finally:
        agent.signal(signal.SIGCONT)
    (record,) = far.do("wait", names=names)
    agree([case], [record])
    assert record["external"] == 0
    nothing_left(hosts)


def test_an_agent_that_is_killed_is_a_miss(hosts: dict[str, Any], cases: list[Case]) -> None:
    hosts["agent"].close()
    agree(cases[8:10], hosts["far"].each(requests(cases[8:10])))
    nothing_left(hosts)
