"""Multi-head latent attention: one latent cache, the same on every rank, stored once.

vLLM's plain kernels for it on a CPU answer differently in a batch than alone, and when they continue from cached blocks
than when they compute them: also without kvplug, which is why vLLM turns its own prefix cache off there. So kvplug is
off there too, until the user insists; and the control is vLLM itself with its own prefix cache forced on: the same
schedule. Where the CPU has AMX, vLLM has kernels that continue, in bfloat16 alone; there kvplug is on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.lab.env import temporary_pool
from tests.lab.models import MLA, model_dir
from tests.vllm.common import attached, eventually, make_prompts, storable
from tests.vllm_lab.engine import InProcess

LLM = {"max_num_batched_tokens": 2048, "tensor_parallel_size": 2}
PLAIN = {"attention_backend": "CPU_MLA", "dtype": "float32", "block_size": 16}
AMX = {"attention_backend": "AMX_MLA", "dtype": "bfloat16", "block_size": 32}
"""Each with the block size that its kernels are built for."""
HAS_AMX = torch.cpu._is_amx_tile_supported()
PROMPTS = make_prompts(4, 95)


def ask(prompt: list[int]) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": 16}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(PLAIN, id="plain"),
        pytest.param(AMX, id="amx", marks=pytest.mark.skipif(not HAS_AMX, reason="this CPU has no AMX")),
    ],
)
def kernels(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Engine arguments that choose vLLM's kernels."""
    chosen: dict[str, Any] = request.param
    return chosen


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory, kernels: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """vLLM alone: its answers when it computes a prompt, and when it continues from its own cached blocks."""
    log = tmp_path_factory.mktemp("mla-control") / "engine.log"
    with InProcess(model_dir(MLA), log, pool=None, force_prefix_caching=True, **LLM, **kernels) as engine:
        computed = engine.each([ask(p) for p in PROMPTS])
        continued = engine.each([ask(p) for p in PROMPTS])
    assert [r["local"] for r in continued] == [storable(len(p), kernels["block_size"]) for p in PROMPTS]
    return {"computed": computed, "continued": continued}


def test_kvplug_stays_off_where_vllm_turns_prefix_caching_off(
    start: Callable[..., InProcess],
) -> None:
    engine = start("off", MLA, **{**LLM, "tensor_parallel_size": 1}, **PLAIN).ready()
    assert "kvplug: OFF" in engine.log_text()
    first, second = (engine.each([ask(p) for p in PROMPTS]) for _ in range(2))
    assert [r["tokens"] for r in first] == [r["tokens"] for r in second]
    assert [r["external"] for r in first + second] == [0] * 2 * len(PROMPTS)


def test_the_latent_is_stored_once_and_read_by_both_ranks(
    tmp_path: Path, control: dict[str, list[dict[str, Any]]], kernels: dict[str, Any]
) -> None:
    arguments = {**LLM, **kernels, "env": {"KVPLUG_UNSUPPORTED_ENGINE_OK": "1"} if kernels is PLAIN else {}}
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(temporary_pool("mla"))
        cold, warm = (
            stack.enter_context(InProcess(model_dir(MLA), tmp_path / f"{name}.log", pool=pool, **arguments))
            for name in ("cold", "warm")
        )
        # Page by page at once: without a prefix cache of its own the engine gives a finished request's blocks away.
        pages = []
        for prompt, computed in zip(PROMPTS, control["computed"], strict=True):
            (record,) = cold.each([ask(prompt)])
            assert record["tokens"] == computed["tokens"]
            pages.append(cold.do("pages", block_ids=_full(prompt, record, kernels["block_size"])))
        _stored_once(pool, kernels)
        for prompt, stored, continued in zip(PROMPTS, pages, control["continued"], strict=True):
            assert stored[0] == stored[1], "both ranks hold the same latent"
            (record,) = warm.each([ask(prompt)])
            assert record["external"] == storable(len(prompt), kernels["block_size"])
            assert warm.do("pages", block_ids=_full(prompt, record, kernels["block_size"])) == stored
            assert record["tokens"] == continued["tokens"]


def _stored_once(pool: str, kernels: dict[str, Any]) -> None:
    """Whether all prompts get there, and no block has room for two ranks' bytes."""
    with attached(pool) as store:
        block, itemsize = kernels["block_size"], 4 if kernels is PLAIN else 2
        blocks = sum(len(p) // block for p in PROMPTS)
        eventually("all is sealed", lambda: store.stats().sealed_blocks >= blocks)
        one_copy = block * (512 + 64) * itemsize * MLA.layers
        sizes = {c.stride_bytes for c in store.stats().classes if c.sealed_blocks}
        assert max(sizes) < 2 * one_copy, "two copies of the same bytes"


def _full(prompt: list[int], record: dict[str, Any], block: int) -> list[list[int]]:
    return [ids[: storable(len(prompt), block) // block] for ids in record["block_ids"]]
