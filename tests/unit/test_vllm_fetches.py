"""What is wanted of other hosts, by the groups' rules, and how fast the engine is thought to be."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kvplug.adapters.vllm import fetches
from kvplug.adapters.vllm.fetches import PrefillSpeed, planner
from kvplug.adapters.vllm.groups import GroupRule
from kvplug.adapters.vllm.hits import longest_hit, needed
from kvplug.fetching import leading

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


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the time is; tests set it."""
    now = [100.0]
    monkeypatch.setattr(fetches.time, "monotonic", lambda: now[0])
    return now


def test_speed_is_tokens_over_the_time_that_their_step_took(clock: list[float]) -> None:
    speed = PrefillSpeed()
    assert speed.tokens_per_s is None
    assert speed.began(1, [500])
    clock[0] += 0.5
    speed.ended(1)
    assert speed.tokens_per_s == pytest.approx(1000.0)
    clock[0] += 60.0  # an idle engine is not a slow one
    assert speed.began(2, [500])
    clock[0] += 0.25
    speed.ended(2)
    assert speed.tokens_per_s == pytest.approx(1300.0)


def test_steps_that_overlap_are_not_counted_twice(clock: list[float]) -> None:
    """Scheduled at once, computed one after the other."""
    speed = PrefillSpeed()
    for step in (1, 2, 3):
        assert speed.began(step, [400, 100])
    for step in (1, 2, 3):
        clock[0] += 0.5
        speed.ended(step)
        assert speed.tokens_per_s == pytest.approx(1000.0)


def test_steps_of_few_tokens_and_steps_that_nobody_reported_say_nothing(clock: list[float]) -> None:
    speed = PrefillSpeed()
    assert not speed.began(1, [3])
    assert not speed.began(1, [1] * 200), "two hundred requests that generate"
    assert not speed.began(1, [64, *[1] * 100])
    assert speed.began(2, [500])
    assert speed.began(3, [500])
    clock[0] += 1.0
    speed.ended(3)
    assert speed.tokens_per_s == pytest.approx(500.0)
    speed.ended(4)
    assert speed.tokens_per_s == pytest.approx(500.0)
