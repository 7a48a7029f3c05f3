"""The hybrid rule against its definition, tried out one length after the other."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kvplug.adapters.vllm.groups import GroupRule
from kvplug.adapters.vllm.hits import common_span, longest_hit, most_tokens, needed

FULL = GroupRule("full", 16)


def by_definition(rules: list[GroupRule], present: list[np.ndarray], local: int, limit: int) -> int:
    """Every length from the longest down: each token that the next one attends to must be in a block that is there."""
    for hit in range(limit, local, -1):
        if any(hit % rule.span for rule in rules):
            continue
        for rule, have in zip(rules, present, strict=True):
            if rule.kind == "sliding":
                first = max(0, hit - rule.window + 1)
            elif rule.kind == "chunked":
                first = hit - hit % rule.window
            else:
                first = 0
            blocks = {token // rule.span for token in range(max(first, local), hit)}
            base = local // rule.span
            if not all(block - base < len(have) and have[block - base] for block in blocks):
                break
        else:
            return hit
    return local


def test_longest_hit_is_what_the_definition_says() -> None:
    """4000 random pools: spans that differ, windows off and on block edges, gaps, tokens that are there already."""
    seed = random.SystemRandom().randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    partial = 0
    for _ in range(4000):
        rules = []
        for _ in range(rng.randint(1, 3)):
            kind = rng.choice(["full", "mla", "sliding", "chunked"])
            window = None if kind in ("full", "mla") else rng.randint(1, 90)
            rules.append(GroupRule(kind, rng.choice([4, 8, 16]), window))
        step = common_span(rules)
        num_tokens = rng.randint(1, 200)
        limit = most_tokens(num_tokens, step)
        local = min(limit, rng.choice([0, 0, step, 3 * step]))
        odds = rng.choice([0.5, 0.9, 1.0])
        present = [
            np.array([rng.random() < odds for _ in range(max(0, limit // r.span - local // r.span))], dtype=bool)
            for r in rules
        ]
        expected = by_definition(rules, present, local, limit)
        partial += local < expected < limit
        assert longest_hit(rules, present, local, limit) == expected, (rules, present, local, limit)
    assert partial > 100, "the random pools hardly ever gave a partial hit: this test tests nothing"


def test_a_sliding_group_needs_only_its_window() -> None:
    """Blocks before the window may be gone; one inside it may not."""
    rules = [FULL, GroupRule("sliding", 16, 32)]
    have = np.ones(8, dtype=bool)
    windowed = np.array([False] * 5 + [True] * 3)
    assert longest_hit(rules, [have, windowed], 0, 128) == 128
    windowed[6] = False
    assert longest_hit(rules, [have, windowed], 0, 128) == 0


def test_a_chunked_group_needs_its_own_chunk_only() -> None:
    """At the first token of a chunk nothing is needed; further on everything since the chunk's start."""
    rule = GroupRule("chunked", 16, 64)
    assert needed(rule, 64, 0) == range(4, 4)
    assert needed(rule, 96, 0) == range(4, 6)
    assert longest_hit([rule], [np.zeros(6, dtype=bool)], 0, 96) == 64


def test_a_token_is_left_to_compute() -> None:
    """A prompt that ends on a block's edge keeps its last block to itself: something must be left to sample from."""
    assert most_tokens(128, 128) == 0
    assert most_tokens(129, 128) == 128
    assert most_tokens(1, 16) == 0


@pytest.mark.parametrize("window", [1, 15, 16, 17, 31, 32, 33, 64])
def test_first_needed_block_holds_the_oldest_token_that_is_attended_to(window: int) -> None:
    """The next token after N attends to tokens N - window + 1 to N."""
    rule = GroupRule("sliding", 16, window)
    for computed in range(0, 256, 16):
        oldest = max(0, computed - window + 1)
        assert rule.first_needed(computed) == oldest // 16
