"""One rank, one group: what is loaded is what was stored, and what is answered is what would have been without kvplug.

The module's engines, in this order: ``cold`` finds an empty pool and fills it; ``warm`` is fresh when the pool is full;
``trusting`` is a third that does not check what it reads. Tests that change an engine for good come last.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.kernels import LIBRARY_ONLY
from tests.lab.models import LLAMA, LLAMA_OTHER, model_dir
from tests.vllm.common import (
    BLOCK,
    Case,
    Control,
    agree,
    attached,
    eventually,
    make_prompts,
    requests,
    storable,
    zero_pages,
)
from tests.vllm_lab.engine import InProcess

COUNT = 12


@pytest.fixture(scope="module")
def engines(start: Callable[..., InProcess], control: Control) -> dict[str, InProcess]:
    """Booted together: two cores, and most of a boot is waiting for imports."""
    out = {"cold": start("cold"), "warm": start("warm")}
    assert control.engine  # a third at the same time
    for engine in out.values():
        engine.ready()
    return out


@pytest.fixture(scope="module")
def cases(control: Control) -> list[Case]:
    """Prompts of 5 to 15 blocks; the first half shares its first four blocks."""
    half = COUNT // 2
    prompts = make_prompts(half + 2, 1, shared=4 * BLOCK) + make_prompts(half + 4, 2)
    return control.pick(prompts[:half], half - 1) + control.pick(prompts[half + 2 :], half + 1)


@pytest.fixture(scope="module")
def filled(engines: dict[str, InProcess], cases: list[Case], pool: str) -> dict[str, Any]:
    """The pool after ``cold`` has answered every case, and the digests of the pages that it computed."""
    cold = engines["cold"]
    records = cold.each(requests(cases))
    blocks = len({case.prompt[: (i + 1) * BLOCK] for case in cases for i in range(len(case.prompt) // BLOCK)})
    with attached(pool) as store:
        eventually("every full block of a prompt is sealed", lambda: store.stats().sealed_blocks >= blocks)
    pages = [
        cold.do("pages", block_ids=_full_blocks(case, record)) for case, record in zip(cases, records, strict=True)
    ]
    return {"records": records, "pages": pages}


def _full_blocks(case: Case, record: dict[str, Any]) -> list[list[int]]:
    """Block ids of the record that hold nothing but prompt tokens that can be offered."""
    return [ids[: storable(len(case.prompt)) // BLOCK] for ids in record["block_ids"]]


def test_the_connector_is_switched_on_by_the_environment_alone(engines: dict[str, InProcess], pool: str) -> None:
    info = engines["cold"].info
    assert info["connector"] == "KvplugConnector"
    assert info["connector_module"].startswith("kvplug.adapters.vllm")
    assert info["load_failure_policy"] == "recompute"
    lines = [line for line in engines["cold"].log_text().splitlines() if "kvplug: ON" in line]
    assert len(lines) == 1, "one loud line at the start"
    assert pool in lines[0]


@LIBRARY_ONLY
def test_neither_a_compiler_nor_what_other_hosts_are_asked_with_is_imported_where_it_is_of_no_use(
    engines: dict[str, InProcess], filled: dict[str, Any], control: Control
) -> None:
    assert filled["records"], "blocks were stored"
    assert engines["cold"].ready().do("info")["imported"] == control.engine.do("info")["imported"]


def test_a_cold_engine_answers_as_one_without_kvplug(filled: dict[str, Any], cases: list[Case]) -> None:
    agree(cases, filled["records"])
    assert filled["records"][-1]["external"] == 0


def test_a_fresh_engine_on_a_warm_pool_answers_the_same_from_the_pool(
    engines: dict[str, InProcess], filled: dict[str, Any], cases: list[Case]
) -> None:
    """The first one alone, so that nothing but the pool can have given it its prefix; then bytes, page by page."""
    warm = engines["warm"]
    for i, case in enumerate(cases):
        warm.do("reset")
        (record,) = warm.each([case.request()])
        agree([case], [record])
        assert (record["external"], record["local"]) == (storable(len(case.prompt)), 0)
        assert warm.do("pages", block_ids=_full_blocks(case, record)) == filled["pages"][i], (
            f"request {i}: a page that was loaded differs from the page that was stored"
        )


def test_a_batch_of_requests_at_once_answers_the_same(
    engines: dict[str, InProcess], filled: dict[str, Any], cases: list[Case]
) -> None:
    warm = engines["warm"]
    warm.do("reset")
    records = warm.generate(requests(cases))
    agree(cases, records)
    assert all(r["external"] + r["local"] == storable(len(c.prompt)) for c, r in zip(cases, records, strict=True))
    assert sum(r["external"] for r in records) > 0


def test_local_hits_are_not_loaded_again(
    engines: dict[str, InProcess], filled: dict[str, Any], cases: list[Case]
) -> None:
    records = engines["warm"].each(requests(cases))
    agree(cases, records)
    assert [r["external"] for r in records] == [0] * len(cases)


def test_a_longer_prompt_continues_from_the_pools_prefix(
    engines: dict[str, InProcess], filled: dict[str, Any], cases: list[Case], control: Control
) -> None:
    rng = random.Random(5)
    longer = [[*case.prompt, *(rng.randrange(3, 2048) for _ in range(100))] for case in cases[:6]]
    picked = control.pick(longer, 4)
    warm = engines["warm"]
    warm.do("reset")
    for case in picked:
        (record,) = warm.each([case.request()])
        agree([case], [record])
    assert record["external"] >= 4 * BLOCK


def test_vllms_counters_of_external_hits_are_right(
    engines: dict[str, InProcess], filled: dict[str, Any], cases: list[Case]
) -> None:
    warm = engines["warm"]
    warm.do("reset")
    before = warm.do("metrics")
    records = warm.each(requests(cases))
    after = warm.do("metrics")

    def grew(name: str) -> float:
        return float(after[name] - before.get(name, 0.0))

    external, local = sum(r["external"] for r in records), sum(r["local"] for r in records)
    assert grew("vllm:external_prefix_cache_hits_total") == external > 0
    assert grew("vllm:external_prefix_cache_queries_total") == sum(len(c.prompt) for c in cases) - local
    assert grew('vllm:prompt_tokens_by_source_total{source="external_kv_transfer"}') == external
    assert grew("kvplug_hit_tokens_total") == external
    assert grew("kvplug_load_failures_total") == 0


def test_what_a_finished_request_stored_is_sealed_though_the_engine_idles(
    engines: dict[str, InProcess], pool: str, control: Control
) -> None:
    """Nothing steps an in-process engine after its last request: whoever writes the last part has to seal."""
    (case,) = control.pick(make_prompts(3, 31), 1)
    with attached(pool) as store:
        before = store.stats().sealed_blocks
        (record,) = engines["cold"].each([case.request()])
        agree([case], [record])
        blocks = len(case.prompt) // BLOCK
        eventually("the idle engine's blocks are sealed", lambda: store.stats().sealed_blocks >= before + blocks)
        assert store.stats().writing_slots == 0
    (record,) = engines["warm"].each([case.request()])
    agree([case], [record])
    assert record["external"] == storable(len(case.prompt))


def test_a_salt_is_a_wall(engines: dict[str, InProcess], control: Control) -> None:
    """The same prompt under two salts and under none: a hit only under the same, also across engines."""
    (plain,) = control.pick(make_prompts(3, 32), 1)
    cold, warm = engines["cold"], engines["warm"]
    full = storable(len(plain.prompt))
    for salt in ("tenant-a", "tenant-b", None):
        (record,) = cold.each([plain.request(salt=salt)])
        agree([plain], [record])
        assert (record["external"], record["local"]) == (0, 0), f"salt {salt!r} read what another salt stored"
    for salt in ("tenant-b", None, "tenant-a"):
        (record,) = warm.each([plain.request(salt=salt)])
        agree([plain], [record])
        assert (record["external"], record["local"]) == (full, 0), f"salt {salt!r} does not find its own"
    (record,) = warm.each([plain.request(salt="tenant-c")])
    assert (record["external"], record["local"]) == (0, 0)


def test_an_abort_in_mid_load_leaves_no_pin_and_no_block(
    engines: dict[str, InProcess], pool: str, control: Control
) -> None:
    """Long prompts, aborted at many instants after their load was issued."""
    warm, cold = engines["warm"], engines["cold"]
    prompts = make_prompts(4, 33, tokens=(1500, 1900))
    cold.each([{"prompt": p, "max_tokens": 1} for p in prompts])
    (after,) = control.pick(make_prompts(3, 34), 1)
    warm.do("reset")
    free = warm.do("free_blocks")
    states: list[str] = []
    for i in range(24):
        states += warm.do(
            "abort_mid_load",
            requests=[{"prompt": prompts[(i + k) % 4], "max_tokens": 4} for k in range(1 + i % 2)],
            delay_s=(i % 6) * 0.0005,
        )
        warm.do("reset")
    assert states.count("WAITING_FOR_REMOTE_KVS") >= 8, f"too few aborts fell into a load: {states}"
    (record,) = warm.each([after.request()])  # steps the engine, so that what has ended is taken in
    agree([after], [record])
    with attached(pool) as store:
        eventually("no pin is left", lambda: store.stats().pinned_slots == 0)
        store.check_integrity()
    eventually("no device block is left", lambda: warm.do("free_blocks") == free)
    records = warm.each([{"prompt": p, "max_tokens": 1} for p in prompts])
    assert all(r["external"] + r["local"] == storable(len(p)) for p, r in zip(prompts, records, strict=True))


def test_resetting_the_device_cache_keeps_the_pool_and_resetting_the_connector_leaves_others_alone(
    engines: dict[str, InProcess], control: Control
) -> None:
    (case,) = control.pick(make_prompts(3, 35), 1)
    cold, warm = engines["cold"], engines["warm"]
    full = storable(len(case.prompt))
    agree([case], cold.each([case.request()]))
    assert cold.do("reset")
    (record,) = cold.each([case.request()])
    assert record["external"] == full
    assert cold.do("reset", external=True)
    (record,) = cold.each([case.request()])
    agree([case], [record])
    assert (record["external"], record["local"]) == (0, 0), "this engine asked for its cache to be forgotten"
    (record,) = warm.each([case.request()])
    agree([case], [record])
    assert record["external"] == full, "another engine's hits are not this one's to forget"


def test_a_zeroed_block_shows_in_the_output_unless_reads_are_verified(
    engines: dict[str, InProcess], start: Callable[..., InProcess], pool: str, control: Control, tmp_path: Path
) -> None:
    """Proves that hits are real: an engine that does not check takes the zeros, one that checks computes instead."""
    trusting = start("trusting", env={"KVPLUG_VERIFY": "never"})
    warm = engines["warm"]
    # Stored by ``warm``: ``cold`` has left the common namespace in the test above.
    (case,) = control.pick(make_prompts(3, 36, tokens=(300, 400)), 1)
    (record,) = warm.each([case.request()])
    agree([case], [record])
    full = storable(len(case.prompt))
    (clean,) = trusting.each([case.request()])
    agree([case], [clean])
    assert clean["external"] == full
    ids = _full_blocks(case, record)
    (count,) = warm.do("dump", block_ids=ids, folder=str(tmp_path))
    assert count == len(ids[0]) * LLAMA.layers
    victims = [path for path in sorted(tmp_path.iterdir()) if ".p3." in path.name]
    assert zero_pages(pool, victims) == LLAMA.layers, "each page of the block lies in the pool once, byte for byte"

    trusting.do("reset")
    (fooled,) = trusting.each([case.request()])
    assert fooled["external"] == full
    assert tuple(fooled["tokens"]) != case.tokens, "the zeroed block was read, so the output must be another"

    before = warm.do("metrics")
    warm.do("reset")
    (checked,) = warm.each([case.request()])
    agree([case], [checked])
    after = warm.do("metrics")
    for name in ("kvplug_corrupt_blocks_total", "kvplug_load_failures_total"):
        assert after[name] == before[name] + 1
    warm.do("reset")
    agree([case], warm.each([case.request()]))
    assert warm.do("metrics")["kvplug_corrupt_blocks_total"] == after["kvplug_corrupt_blocks_total"], "found out once"


@pytest.mark.parametrize("way", ["reload_weights", "set_weight_version"])
def test_changed_weights_in_a_living_engine_hit_nothing_old(
    engines: dict[str, InProcess], control: Control, way: str
) -> None:
    """The prompt is in the pool under the old weights, and the device cache is emptied by hand, as RL loops do."""
    warm = engines["warm"]
    (case,) = control.pick(make_prompts(3, 40 + len(way)), 1)
    warm.each([case.request()])
    warm.do("reset")
    (record,) = warm.each([case.request()])
    if way == "reload_weights":
        assert record["external"] == storable(len(case.prompt)), "it would have been a hit"
        control.engine.do("reload_weights", path=str(model_dir(LLAMA_OTHER)))
        try:
            (case,) = control.pick([case.prompt], 1)
        finally:
            control.engine.do("reload_weights", path=str(model_dir(LLAMA)))
        warm.do("reload_weights", path=str(model_dir(LLAMA_OTHER)))
    else:
        warm.do("set_weight_version", version="step-2")
    warm.do("reset")
    (record,) = warm.each([case.request()])
    assert record["external"] == 0, "blocks of the old weights were read"
    if way == "reload_weights":
        agree([case], [record])


def test_an_engine_whose_weights_are_known_again_shares_again(
    engines: dict[str, InProcess], filled: dict[str, Any], cases: list[Case], control: Control, tmp_path: Path
) -> None:
    """After a change of weights, never before."""
    warm, (case, other) = engines["warm"], cases[:2]
    shared, before = storable(len(case.prompt)), _known(warm)
    warm.do("reload_weights", path=str(model_dir(LLAMA)))
    assert warm.do("reset")

    def hit() -> bool:
        assert warm.do("reset")
        (record,) = warm.each([case.request()])
        agree([case], [record])
        return bool(record["external"] == shared)

    eventually("the files are identified and what others stored is found", hit)
    assert _known(warm) == before + 1

    warm.do("pause_and_resume")
    (record,) = warm.each([other.request()])
    agree([other], [record])
    assert record["external"] == storable(len(other.prompt)), "no weight was changed in the pause"

    partial = tmp_path / "partial"
    shutil.copytree(model_dir(LLAMA_OTHER), partial)
    (weights,) = partial.glob("*.safetensors")
    tensors = load_file(weights)
    del tensors["model.norm.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    warm.do("reload_weights", path=str(partial))
    eventually("that is said", lambda: _asked(warm) and f"{partial} has not the same tensors" in warm.log_text())
    assert _known(warm) == before + 2, "once after the reload, once after the pause"

    warm.do("pause_and_resume")
    warm.do("reload_weights", path=str(model_dir(LLAMA)))
    eventually("the files are identified", lambda: _asked(warm) and _known(warm) == before + 3)
    (record,) = warm.each([case.request()])
    agree([case], [record])
    assert record["external"] == shared, "nothing was cached since the pause, so no reset is needed"


def _known(engine: InProcess) -> float:
    return float(engine.do("metrics")["kvplug_weights_known_again_total"])


def _asked(engine: InProcess) -> bool:
    """A request that no block comes of: with one that begins kvplug looks whether it knows the weights."""
    engine.each([{"prompt": list(range(10, 20)), "max_tokens": 1}])
    return True


def test_sigkill_of_the_engine_in_full_flight_then_restart_and_hit(
    engines: dict[str, InProcess], start: Callable[..., InProcess], filled: dict[str, Any], cases: list[Case], pool: str
) -> None:
    cold = engines["cold"]
    burst = [{"prompt": p, "max_tokens": 64} for p in make_prompts(16, 50)]
    cold.ask("generate", requests=burst)
    with attached(pool) as store:
        before = store.stats().stored_blocks
        eventually("the engine is at work", lambda: store.stats().stored_blocks > before)
        cold.kill()
        again = start("again").ready()
        eventually("what the dead engine was writing is reclaimed", lambda: store.stats().writing_slots == 0)
        eventually("what the dead engine had pinned is released", lambda: store.stats().pinned_slots == 0)
        store.check_integrity()
    records = again.each(requests(cases))
    agree(cases, records)
    assert records[0]["external"] == storable(len(cases[0].prompt))
    assert all(r["external"] + r["local"] == storable(len(c.prompt)) for c, r in zip(cases, records, strict=True))
