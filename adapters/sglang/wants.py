"""What is asked of other hosts for a prompt's pages, as SGLang's page pools need them.

A prefix can be restored if every one of its pages is there and each side pool has what its hit policy asks for at just
that length: so what another host has is worth as much as the longest such prefix, and only that much is fetched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvplug.adapters.sglang.hostpages import ALL_PAGES, BLOCK_GROUPS, Bools, verdict
from kvplug.adapters.sglang.pagekeys import Keys
from kvplug.remote.request import Plan, Wanted


@dataclass(frozen=True)
class Part:
    """One pool's pages of a prompt. ``policy`` and on: see :func:`~kvplug.adapters.sglang.hostpages.verdict`."""

    keys: Keys
    """(N, 32) uint8, the same N for all pools."""
    nbytes: int
    """Of one page."""
    policy: str = ALL_PAGES
    trailing: int = 1
    block_pages: int = 0
    group_pages: int = 0

    def says(self, found: Bools) -> Bools:
        """bool[pages]: which prefixes this pool can restore, given which of its pages are there."""
        said = verdict(
            self.policy,
            found,
            trailing=self.trailing,
            block_pages=self.block_pages,
            group_pages=self.group_pages,
        )
        return np.ones(len(found), np.bool_) if said.restorable is None else said.restorable

    def needed(self, length: int, found: Bools) -> Bools:
        """bool[pages]: the pages that a prefix of ``length`` pages needs, or can use, of this pool."""
        at = np.arange(len(found))
        out: Bools = at < length
        if self.policy == BLOCK_GROUPS:
            out &= found
        elif self.policy != ALL_PAGES:
            out &= at >= length - max(1, self.trailing)
        return out


def wanted(parts: Sequence[Part], hits: int, page_tokens: int) -> Wanted:
    """What is missing of a prompt of which ``hits`` pages can be restored from this host's pool.

    Args:
        parts: one for each pool with pages of its own, with the same number of keys.
        hits: pages, fewer than there are keys.
        page_tokens: tokens of a page.
    """
    n = len(parts[0].keys)

    def plan(have: Bools) -> Plan:
        found = have.reshape(len(parts), n)
        fits = np.ones(n, np.bool_)
        for part, there in zip(parts, found, strict=True):
            fits &= part.says(there)
        ends = np.flatnonzero(fits)
        length = int(ends[-1]) + 1 if len(ends) else 0
        index = np.flatnonzero(np.concatenate([p.needed(length, f) for p, f in zip(parts, found, strict=True)]))
        return Plan(index, length * page_tokens)

    return Wanted(
        keys=np.concatenate([part.keys for part in parts]),
        nbytes=np.repeat(np.array([part.nbytes for part in parts], np.int64), n),
        plan=plan,
        tokens=(n - hits) * page_tokens,
        first=hits,
    )
