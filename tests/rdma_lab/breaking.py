"""What an agent does to its own verbs when it is told to, from within its process. Each stands for a fault there."""

from __future__ import annotations

from typing import Final

from kvplug.rdma.agent.agent import Agent
from kvplug.rdma.verbs.binding import CHANGE_STATE, QueuePair
from kvplug.rdma.verbs.queues import QueueServer

RESET: Final = 0


def _server(agent: Agent) -> QueueServer:
    assert agent._queues is not None, "this agent serves over TCP alone"
    return agent._queues


def _pairs(agent: Agent) -> list[QueuePair]:
    return [pair for of_reader in _server(agent)._queues.values() for pair in of_reader.values()]


def fail_queues(agent: Agent) -> int:
    """All its queue pairs into their error state. How many."""
    pairs = _pairs(agent)
    for pair in pairs:
        pair.fail()
    return len(pairs)


def reset_queues(agent: Agent) -> int:
    """All its queue pairs back to where they know no other end. How many."""
    pairs = _pairs(agent)
    for pair in pairs:
        inner = pair._pair  # type: ignore[attr-defined]
        if type(inner).__module__.startswith("pyverbs"):
            from pyverbs import qp

            state = qp.QPAttr()
            state.qp_state = RESET
            inner.modify(state, CHANGE_STATE)
        else:
            inner.modify(CHANGE_STATE, qp_state=RESET)
    return len(pairs)


def deregister(agent: Agent) -> int:
    """Its memory is no longer readable by anybody, and it does not know. How many regions that was."""
    closed = 0
    for rail in _server(agent).open_devices().all:
        for region in rail.regions._regions:
            if region is not None:
                region.close()
                closed += 1
    return closed


def register(agent: Agent) -> int:
    """The same memory again, under other keys. How many regions."""
    opened = 0
    for rail in _server(agent).open_devices().all:
        regions = rail.regions
        for number, region in enumerate(regions._regions):
            if region is not None:
                regions._regions[number] = None
                regions._ready[number] = False
                opened += 1
    return opened


def queues(agent: Agent) -> int:
    """How many queue pairs it has."""
    return len(_pairs(agent))
