"""What is wanted of other hosts, by the groups' rules."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kvplug.adapters.vllm.fetches import planner
from kvplug.adapters.vllm.groups import GroupRule
from kvplug.adapters.vllm.hits import longest_hit, needed
from kvplug.remote.fetcher import leading

FULL, WIDE, WINDOW, CHUNK = (
    GroupRule("full", 16),
    GroupRule("full", 32),
    GroupRule("sliding", 16, 50),
    GroupRule("chunked", 32, 64),
)


def test_a_group_that_needs_its_whole_prefix_gets_the_leading_blocks() -> None:
    """The rule for a single group is the general one."""
    plan = planner([FULL], [10], 32, 192)
    for n in range(11):
        have = np.arange(10) < n
        have[n + 1 :] = True
        ours, general = leading(16)(have), plan(have)
        assert (ours.tokens, ours.index.tolist()) == (general.tokens, general.index.tolist())


@pytest.mark.parametrize("rules", [[FULL, WINDOW], [WINDOW, WIDE], [CHUNK, FULL], [WINDOW], [FULL, WIDE, CHUNK]])
def test_what_is_wanted_is_what_the_longest_hit_takes(rules: list[GroupRule]) -> None:
    """Every block that the hit needs and no other, in the order of their tokens, whatever there is."""
    rng = random.Random(20261125)
    for _ in range(200):
        local = 64 * rng.randrange(3)
        limit = local + 64 * rng.randrange(1, 8)
        counts = [limit // rule.span - local // rule.span for rule in rules]
        have = np.array([rng.random() < 0.85 for _ in range(sum(counts))])
        plan = planner(rules, counts, local, limit)(have)
        present = np.split(have, np.cumsum(counts)[:-1])
        hit = longest_hit(rules, present, local, limit)
        assert plan.tokens == hit - local
        assert have[plan.index].all()
        starts = np.cumsum(counts) - counts
        expected, ends = [], {}
        for rule, start in zip(rules, starts.tolist(), strict=True):
            for block in needed(rule, hit, local):
                at = block - local // rule.span + start
                expected.append(at)
                ends[at] = (block + 1) * rule.span
        assert sorted(plan.index.tolist()) == sorted(expected)
        order = [ends[at] for at in plan.index.tolist()]
        assert order == sorted(order)
