"""Multi-head latent attention: one latent cache, the same on every rank, stored once.

vLLM's CPU kernels for it answer differently in a batch than alone, and when they continue from cached blocks than when
they compute them: also without kvplug, which is why vLLM turns its own prefix cache off there. So kvplug is off there
too, until the user insists; and the control is vLLM itself with its own prefix cache forced on: the same schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.lab.models import MLA, model_dir
from tests.vllm.common import attached, eventually, make_prompts, storable
from tests.vllm_lab.engine import InProcess

BLOCK = 16
"""What vLLM's CPU kernel for MLA is built for."""
LLM = {"block_size": BLOCK, "max_num_batched_tokens": 2048, "tensor_parallel_size": 2}
PROMPTS = make_prompts(4, 95)


def ask(prompt: list[int]) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": 16}


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """vLLM alone: its answers when it computes a prompt, and when it continues from its own cached blocks."""
    log = tmp_path_factory.mktemp("mla-control") / "engine.log"
    with InProcess(model_dir(MLA), log, pool=None, force_prefix_caching=True, **LLM) as engine:
        computed = engine.each([ask(p) for p in PROMPTS])
        continued = engine.each([ask(p) for p in PROMPTS])
    assert [r["local"] for r in continued] == [storable(len(p), BLOCK) for p in PROMPTS]
    return {"computed": computed, "continued": continued}


def test_kvplug_stays_off_where_vllm_turns_prefix_caching_off(
    start: Callable[..., InProcess],
) -> None:
    engine = start("off", MLA, **{**LLM, "tensor_parallel_size": 1}).ready()
    assert "kvplug: OFF" in engine.log_text()
    first, second = (engine.each([ask(p) for p in PROMPTS]) for _ in range(2))
    assert [r["tokens"] for r in first] == [r["tokens"] for r in second]
    assert [r["external"] for r in first + second] == [0] * 2 * len(PROMPTS)


def test_the_latent_is_stored_once_and_read_by_both_ranks(
    start: Callable[..., InProcess], control: dict[str, list[dict[str, Any]]], pool: str
) -> None:
    insist = {"KVPLUG_UNSUPPORTED_ENGINE_OK": "1"}
    cold, warm = (start(name, MLA, env=insist, **LLM) for name in ("cold", "warm"))
    # Page by page at once: without a prefix cache of its own the engine gives a finished request's blocks away.
    pages = []
    for prompt, computed in zip(PROMPTS, control["computed"], strict=True):
        (record,) = cold.each([ask(prompt)])
        assert record["tokens"] == computed["tokens"]
        pages.append(cold.do("pages", block_ids=_full(prompt, record)))
    with attached(pool) as store:
        blocks = sum(len(p) // BLOCK for p in PROMPTS)
        eventually("all is sealed", lambda: store.stats().sealed_blocks >= blocks)
        one_copy = BLOCK * (512 + 64) * 4 * MLA.layers
        sizes = {c.stride_bytes for c in store.stats().classes if c.sealed_blocks}
        assert max(sizes) < 2 * one_copy, "two copies of the same bytes"
    for prompt, stored, continued in zip(PROMPTS, pages, control["continued"], strict=True):
        assert stored[0] == stored[1], "both ranks hold the same latent"
        (record,) = warm.each([ask(prompt)])
        assert record["external"] == storable(len(prompt), BLOCK)
        assert warm.do("pages", block_ids=_full(prompt, record)) == stored
        assert record["tokens"] == continued["tokens"]


def _full(prompt: list[int], record: dict[str, Any]) -> list[list[int]]:
    return [ids[: storable(len(prompt), BLOCK) // BLOCK] for ids in record["block_ids"]]
