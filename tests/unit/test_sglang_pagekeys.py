"""From SGLang's page hashes to the pool's keys."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplug.adapters.sglang.pagekeys import mask, page_keys
from kvplug.errors import EngineContractError
from kvplug.identity.keys import fold

VECTORS = json.loads((Path(__file__).parent.parent / "vectors" / "keys.json").read_text(encoding="utf-8"))
ROOT = b"r" * 32
GOOD = hashlib.sha256(b"a page").hexdigest()


@pytest.mark.parametrize("vector", VECTORS["pages"], ids=lambda v: v["note"])
def test_vectors(vector: dict[str, Any]) -> None:
    masked = mask(bytes.fromhex(vector["root"]), vector["pool"], vector["shard"])
    assert masked.tobytes().hex() == vector["mask"]
    keys = page_keys(vector["hashes"], masked)
    assert [row.tobytes().hex() for row in keys] == vector["keys"]


@given(st.lists(st.binary(min_size=32, max_size=32), unique=True), st.integers(0, 65535))
def test_no_two_pages_share_a_key(pages: list[bytes], shard: int) -> None:
    keys = page_keys([page.hex() for page in pages], mask(ROOT, "kv", shard))
    assert keys.shape == (len(pages), 32)
    assert len({row.tobytes() for row in keys}) == len(pages)
    assert np.array_equal(keys, fold(page_keys([page.hex() for page in pages], mask(ROOT, "kv", 0)), 0, shard))


def test_pools_shards_and_namespaces_have_masks_of_their_own() -> None:
    masks = [
        mask(root, pool, shard).tobytes() for root in (ROOT, b"s" * 32) for pool in ("kv", "swa") for shard in (0, 1)
    ]
    assert len(set(masks)) == len(masks)


@pytest.mark.parametrize(
    "hashes",
    [
        [GOOD[:-1] + "g"],
        [GOOD[:-2]],
        [GOOD + "00"],
        [GOOD[:-1], GOOD + "0"],  # together they have the right length
        [GOOD[:-2] + "  "],
        [""],
        [None],
    ],
)
def test_other_forms_are_refused(hashes: Any) -> None:
    with pytest.raises(EngineContractError, match="SGLang's page hashes"):
        page_keys(hashes, mask(ROOT, "kv", 0))


def test_uppercase_is_the_same_page() -> None:
    masked = mask(ROOT, "kv", 0)
    assert np.array_equal(page_keys([GOOD.upper()], masked), page_keys([GOOD], masked))
