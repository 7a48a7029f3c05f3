"""Which prefixes a side pool can restore: against the definition, spelled out page by page."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplug.adapters.sglang.hostpages import ALL_PAGES, BLOCK_GROUPS, TRAILING_PAGES, leading, verdict
from kvplug.errors import EngineContractError

FOUND = st.lists(st.booleans(), max_size=24)


def restorable(found: list[bool], needed: list[range]) -> list[bool]:
    return [all(found[page] for page in pages) for pages in needed]


@given(FOUND)
def test_all_pages_needs_every_page_of_the_prefix(found: list[bool]) -> None:
    said = verdict(ALL_PAGES, np.array(found, bool))
    want = restorable(found, [range(n) for n in range(1, len(found) + 1)])
    assert said.restorable is not None
    assert said.restorable.tolist() == want
    assert said.covered == sum(want) == leading(np.array(found, bool))


@given(FOUND, st.integers(0, 6))
def test_trailing_pages_needs_the_window_before_the_end(found: list[bool], trailing: int) -> None:
    said = verdict(TRAILING_PAGES, np.array(found, bool), trailing=trailing)
    want = restorable(found, [range(max(0, n - max(1, trailing)), n) for n in range(1, len(found) + 1)])
    assert said.restorable is not None
    assert said.restorable.tolist() == want
    assert said.covered == max((n for n, ok in enumerate(want, 1) if ok), default=0)


@given(FOUND, st.integers(0, 5), st.integers(0, 5))
def test_block_groups_counts_leading_whole_blocks_and_decides_nothing(
    found: list[bool], block_pages: int, group_pages: int
) -> None:
    said = verdict(BLOCK_GROUPS, np.array(found, bool), block_pages=block_pages, group_pages=group_pages)
    assert said.restorable is None
    blocks = 0
    if 0 < group_pages <= block_pages:
        ends = range(block_pages, len(found) + 1, block_pages)
        whole = [all(found[end - group_pages : end]) for end in ends]
        blocks = next((i for i, ok in enumerate(whole) if not ok), len(whole))
    assert said.covered == blocks * block_pages


def test_another_policy_is_refused() -> None:
    with pytest.raises(EngineContractError, match="of_tomorrow"):
        verdict("of_tomorrow", np.ones(3, bool))
