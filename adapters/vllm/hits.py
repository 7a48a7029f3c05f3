"""The hybrid rule: how long a hit may be when cache groups need different blocks.

A hit of N tokens must leave at least one token to compute, N must be a multiple of every group's span, and each group
must have the blocks that it needs at N (:mod:`kvplug.adapters.vllm.groups`). Blocks of tokens that the engine has
itself (the first ``local`` tokens) need not be in the pool. The longest such N is searched from above.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvplug.adapters.vllm.groups import GroupRule

Bools = npt.NDArray[np.bool_]


def common_span(rules: Sequence[GroupRule]) -> int:
    """Tokens: hits are multiples of this."""
    return math.lcm(*(rule.span for rule in rules))


def most_tokens(num_tokens: int, span: int) -> int:
    """The longest hit that leaves a token to compute."""
    return max(0, (num_tokens - 1) // span * span)


def needed(rule: GroupRule, hit: int, local: int) -> range:
    """Blocks of a group that a hit of ``hit`` tokens takes from the pool, given ``local`` tokens in the engine."""
    return range(max(rule.first_needed(hit), local // rule.span), hit // rule.span)


def longest_hit(rules: Sequence[GroupRule], present: Sequence[Bools], local: int, limit: int) -> int:
    """The longest N in (local, limit] that satisfies every group, or ``local`` if there is none.

    Args:
        rules: one per group.
        present: per group bool[M]: whether the pool has block ``local // span + j``. Beyond M: it has not.
        local: tokens that the engine has already, a multiple of every span.
        limit: the longest hit that may be answered.
    """
    step = common_span(rules)
    candidates = np.arange(limit // step * step, local, -step, dtype=np.int64)
    fits = np.ones(len(candidates), dtype=np.bool_)
    for rule, have in zip(rules, present, strict=True):
        # run[j]: how many blocks that end with block j are there without a gap
        positions = np.arange(1, len(have) + 1, dtype=np.int64)
        gaps = np.where(have, 0, positions)
        run = np.concatenate(([0], positions - np.maximum.accumulate(gaps))) if len(have) else np.zeros(1, np.int64)
        base = local // rule.span
        ends = candidates // rule.span - base  # blocks of the pool before N
        first = np.maximum(_first_needed(rule, candidates), base) - base
        fits &= (ends <= len(have)) & (run[np.minimum(ends, len(have))] >= ends - first)
    return int(candidates[np.argmax(fits)]) if fits.any() else local


def _first_needed(rule: GroupRule, hits: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """:meth:`GroupRule.first_needed` of many hits at once."""
    if rule.window is None:
        return np.zeros_like(hits)
    if rule.kind == "sliding":
        return np.maximum(0, hits - rule.window + 1) // rule.span
    return hits // rule.window * rule.window // rule.span
