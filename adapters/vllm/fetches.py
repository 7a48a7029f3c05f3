"""Prefixes that another host has, on the scheduler's side: while one is being fetched its request is asked about later.

Once in a request's life, when the pool gives less than the whole prefix, the rest is wanted of other hosts. Until that
has ended, or its deadline has passed, the scheduler hears "ask again" and goes on with other requests; then the pool is
looked up once more, and what came is an ordinary hit. The scheduler's thread sends nothing and waits for nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvplug.adapters.common.prefill import PrefillSpeed
from kvplug.adapters.devices.base import Int64s
from kvplug.adapters.vllm.groups import GroupRule
from kvplug.adapters.vllm.hits import Bools, longest_hit, most_tokens, needed
from kvplug.adapters.vllm.loads import Loads
from kvplug.adapters.vllm.requests import Record
from kvplug.adapters.vllm.state import EngineState
from kvplug.remote.request import Plan, Planner, Wanted

if TYPE_CHECKING:
    from kvplug.remote.fetcher import Fetcher


class Fetches:
    """The fetches of one engine's requests."""

    def __init__(self, state: EngineState, loads: Loads, fetcher: Fetcher) -> None:
        self._state, self._loads, self._fetcher = state, loads, fetcher
        self.speed = PrefillSpeed()
        self.waiting = 0
        """Requests that were told to be asked about again since the last step."""

    def lookup(self, record: Record, local: int) -> int | None:
        """As :meth:`Loads.lookup`; None: ask again."""
        fetch = record.fetch
        if fetch is None:
            found = self._loads.lookup(record, local)
            if record.fetch_tried or not self._start(record, local, found):
                return found
            fetch = record.fetch
        if fetch is not None and not fetch.done:
            self.waiting += 1
            return None
        self._loads.give_back(record)
        record.miss = None
        found = self._loads.lookup(record, local)
        record.drop_fetch()  # its pins have kept in place what the lookup has pinned now
        return found

    def _start(self, record: Record, local: int, found: int) -> bool:
        """Whether a fetch was begun."""
        state = self._state
        limit = most_tokens(len(record.tokens), state.span)
        if limit <= local + found or local % state.span:
            return False
        keys = self._loads.keys(record, local, limit)
        sizes = [np.full(len(one), sum(state.part_nbytes[group])) for group, one in enumerate(keys)]
        wanted = Wanted(
            keys=np.concatenate(keys),
            nbytes=np.concatenate(sizes),
            plan=planner(state.rules, [len(one) for one in keys], local, limit),
            tokens=limit - local - found,
            first=found // state.rules[0].span,
        )
        record.fetch_tried = True
        record.fetch = self._fetcher.start(wanted, tokens_per_s=self.speed.tokens_per_s)
        if record.fetch.outcome is not None:  # it was no use asking anybody
            record.drop_fetch()
            return False
        return True

    def gather_counts(self) -> None:
        """Adds the fetcher's counters to the engine's."""
        self._state.counts.update(self._fetcher.take_counts())

    def close(self) -> None:
        """Ends every fetch."""
        self._fetcher.close()


def planner(rules: list[GroupRule], counts: list[int], local: int, limit: int) -> Planner:
    """What a hit takes, by the groups' rules, of keys that are each group's blocks from token ``local`` on.

    Args:
        counts: keys of each group, one group after the other.
    """
    cuts = np.cumsum(counts)[:-1].tolist()
    starts = [0, *cuts]

    def plan(have: Bools) -> Plan:
        hit = longest_hit(rules, np.split(have, cuts), local, limit)
        blocks: list[Int64s] = []
        ends: list[Int64s] = []
        for rule, start in zip(rules, starts, strict=True):
            wanted = needed(rule, hit, local)
            at = np.arange(wanted.start, wanted.stop)
            blocks.append(at - local // rule.span + start)
            ends.append((at + 1) * rule.span)
        order = np.argsort(np.concatenate(ends), kind="stable")
        return Plan(np.concatenate(blocks)[order], hit - local)

    return plan
