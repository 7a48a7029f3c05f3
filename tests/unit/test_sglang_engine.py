"""One rank of an SGLang engine at a real pool: which keys it gives when, and when it gives none."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvplug.adapters.sglang import compat, engine, plugin
from kvplug.adapters.sglang.engine import RankEngine, Shard
from tests.lab.env import free_port, temporary_pool
from tests.unit.sglang_facts import facts, give

HASHES = [f"{i:064x}" for i in range(3)]
LAYOUT = {"mode": "test"}
WORD = "a" * 32
IDENTIFIED_S = 60.0
DEADLINE_S = 120
Make = Callable[..., RankEngine]


@pytest.fixture(scope="module")
def pool() -> Iterator[str]:
    with temporary_pool("sglangengine") as name:
        yield name


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    (tmp_path / "model.safetensors").write_bytes(b"w" * 100)
    return tmp_path


@pytest.fixture
def make(pool: str, weights: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """``make(word=WORD, began=True, **facts)``: a rank's engine, identified unless told otherwise."""
    made = []

    def one(
        word: str = WORD, began: bool = True, settings: Any = None, process_ns: int | None = None, **changes: Any
    ) -> RankEngine:
        give(monkeypatch, facts(weights, **changes))
        time.sleep(0.01)  # the weights are older than the engine by more than the file system's clock ticks
        monkeypatch.setattr(compat, "engine_word", lambda: word)
        monkeypatch.setattr(engine, "PROCESS_STARTED_NS", time.time_ns() if process_ns is None else process_ns)
        own = {"settings": settings or {"pool": pool, "size": "64mib"}, "started_ns": time.time_ns()}
        made.append(engine.start("linker", {"kvplug": own}))
        if began:
            made[-1].begin(LAYOUT)
            assert made[-1].wait_identified(IDENTIFIED_S)
        return made[-1]

    yield one
    for each in made:
        each.close()
    assert engine.engines() == []


def same(one: Any, two: Any) -> bool:
    assert one is not None
    assert two is not None
    return bool(np.array_equal(one, two))


def test_engines_of_one_model_give_the_same_keys(make: Make) -> None:
    one, two = make(), make("b" * 32)
    keys = one.keys("kv", HASHES)
    assert keys is not None
    assert keys.shape == (3, 32)
    assert keys.dtype == np.uint8
    assert same(keys, two.keys("kv", HASHES))
    assert not same(keys, one.keys("swa", HASHES))
    assert len({row.tobytes() for row in keys}) == 3


def test_other_weights_give_other_keys(make: Make, weights: Path) -> None:
    one = make().keys("kv", HASHES)
    (weights / "model.safetensors").write_bytes(b"v" * 100)
    assert not same(one, make().keys("kv", HASHES))


def test_nothing_is_named_before_the_weights_are_identified(make: Make) -> None:
    rank = make(began=False)
    assert rank.keys("kv", HASHES) is None
    rank.begin(LAYOUT)
    assert rank.wait_identified(IDENTIFIED_S)
    assert rank.keys("kv", HASHES) is not None


def test_ranks_differ_in_the_folded_shard_alone(make: Make) -> None:
    ranks = [make(tp=(tp, 2), pp=(pp, 2)) for pp in range(2) for tp in range(2)]
    assert [rank.shard for rank in ranks] == [Shard(i, 4) for i in range(4)]
    assert [rank.siblings() for rank in ranks] == [(4, i) for i in range(4)]
    first = ranks[0].keys("kv", HASHES)
    for rank in ranks[1:]:
        keys = rank.keys("kv", HASHES)
        assert keys is not None
        assert first is not None
        assert np.array_equal(keys[:, :30], first[:, :30])
        assert np.array_equal(keys[:, 30:].view("<u2") ^ first[:, 30:].view("<u2"), [[rank.shard.index]] * 3)


def test_what_all_ranks_hold_has_one_key_for_each_stage(make: Make) -> None:
    ranks = [make(tp=(tp, 2), pp=(pp, 2)) for pp in range(2) for tp in range(2)]
    keys = [rank.keys("kv", HASHES, replicated=True) for rank in ranks]
    assert [rank.siblings(replicated=True) for rank in ranks] == [(2, 0), (2, 0), (2, 1), (2, 1)]
    assert same(keys[0], keys[1])
    assert same(keys[2], keys[3])
    assert not same(keys[0], keys[2])


def test_a_change_of_weights_closes_until_the_flush_and_is_private_after(make: Make) -> None:
    ranks = [make(tp=(tp, 2)) for tp in range(2)]
    other, replica = make("b" * 32, tp=(0, 2)), make(tp=(0, 2), replica="1.0")
    before, epoch = ranks[0].keys("kv", HASHES), ranks[0].epoch
    for rank in (*ranks, other, replica):
        rank.weights_changed("test")
        assert rank.keys("kv", HASHES) is None
    assert ranks[0].epoch > epoch
    for rank in (*ranks, other, replica):
        rank.flushed()
    after = [rank.keys("kv", HASHES) for rank in (*ranks, other, replica)]
    assert not same(before, after[0])
    assert after[0] is not None
    assert after[1] is not None
    assert np.array_equal(after[0][:, :30], after[1][:, :30])  # both ranks came to the same
    assert not same(after[0], after[2])  # another engine did not
    assert not same(after[0], after[3])  # nor did another replica, whose update may have failed
    ranks[0].weights_changed("again")
    ranks[0].flushed()
    assert not same(after[0], ranks[0].keys("kv", HASHES))


def test_a_flush_without_a_change_leaves_the_names(make: Make) -> None:
    rank = make()
    before, epoch = rank.keys("kv", HASHES), rank.epoch
    rank.flushed()
    assert same(before, rank.keys("kv", HASHES))
    assert rank.epoch == epoch


@pytest.mark.parametrize("all_flushed", [True, False])
def test_nothing_is_shared_within_an_update_of_many_calls(make: Make, all_flushed: bool) -> None:
    rank = make()
    before = rank.keys("kv", HASHES)
    rank.update_began()
    for _ in range(2):
        rank.weights_changed("part")
        rank.flushed()
        assert rank.keys("kv", HASHES) is None  # half of the weights are old
    rank.update_ended(all_flushed)
    if not all_flushed:  # somebody has written weights past SGLang
        assert rank.keys("kv", HASHES) is None
        rank.flushed()
    assert not same(before, rank.keys("kv", HASHES))


def test_changes_count_also_before_the_weights_are_identified(make: Make) -> None:
    """A rank that is slow to identify its weights comes to the same names as one that was fast."""
    slow, fast = make(began=False), make()
    before = fast.keys("kv", HASHES)
    for rank in (slow, fast):
        rank.weights_changed("test")
        rank.flushed()
        rank.rotate("test")
    slow.begin(LAYOUT)
    assert slow.wait_identified(IDENTIFIED_S)
    assert same(slow.keys("kv", HASHES), fast.keys("kv", HASHES))
    assert not same(before, fast.keys("kv", HASHES))


def test_rotation_hides_this_engines_pages_and_nobody_elses(make: Make) -> None:
    one, two = make(), make("b" * 32)
    before = one.keys("kv", HASHES)
    one.rotate("test")
    assert not same(before, one.keys("kv", HASHES))
    assert same(before, two.keys("kv", HASHES))


def test_off_is_said_once_and_for_good(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    rank = make()
    with caplog.at_level(logging.WARNING):
        rank.off("the first reason")
        rank.off("another")
    assert [r.getMessage() for r in caplog.records if "OFF" in r.getMessage()] == ["kvplug: OFF: the first reason"]
    rank.flushed()
    assert rank.keys("kv", HASHES) is None
    assert rank.off_reason == "the first reason"


@pytest.mark.parametrize(
    ("changes", "settings", "words"),
    [
        ({"is_multimodal": True, "one_tokenizer": False}, {}, "several tokenizer processes"),
        ({"is_multimodal": True, "server": {"enable_mm_global_cache": True}}, {}, "--enable-mm-global-cache"),
        ({"is_multimodal": True, "server": {"trust_mm_content_hashes": True}}, {}, "--trust-mm-content-hashes"),
        ({"is_multimodal": True, "is_generation": False}, {}, "a multimodal model that embeds"),
        ({"server": {"dllm_algorithm": "LowConfidence"}}, {}, "diffusion language models"),
        ({"server": {"enable_return_routed_experts": True}}, {}, "--enable-return-routed-experts"),
        ({"server": {"enable_return_indexer_topk": True}}, {}, "--enable-return-indexer-topk"),
        ({"server": {"elastic_ep_backend": "mooncake"}}, {}, "--elastic-ep-backend"),
        ({"server": {"forward_hooks": [{}]}}, {}, "--forward-hooks"),
        ({"server": {"uno_lora_path": "/x"}}, {}, "--uno-lora-path"),
        ({"lora_enabled": True, "rust_tree": True}, {}, "LoRA with SGLang's Rust prefix tree"),
        ({}, {"size": "30g"}, "write 30gb"),
        ({}, {"siez": "30gb"}, "siez"),
    ],
)
def test_what_cant_work_is_off_and_says_why(
    make: Make, monkeypatch: pytest.MonkeyPatch, pool: str, changes: Any, settings: Any, words: str
) -> None:
    monkeypatch.setattr(compat, "wide_image_names", lambda: True)
    rank = make(began=False, settings={"pool": pool, "size": "64mib", **settings}, **changes)
    rank.begin(LAYOUT)
    assert words in (rank.off_reason or "")
    assert rank.keys("kv", HASHES) is None


def test_images_need_wide_names_and_users_may_vouch_for_them(
    make: Make, monkeypatch: pytest.MonkeyPatch, pool: str
) -> None:
    monkeypatch.setattr(compat, "wide_image_names", lambda: False)
    assert "multimodal models need SGLang 0.5.23" in (make(began=False, is_multimodal=True).off_reason or "")
    monkeypatch.setattr(compat, "wide_image_names", lambda: True)
    assert make(is_multimodal=True).keys("kv", HASHES) is not None
    vouched = {"pool": pool, "size": "64mib", "trust_mm_ids": True}
    assert make(is_multimodal=True, is_generation=False, settings=vouched).keys("kv", HASHES) is not None


def test_weights_that_changed_since_the_start_turn_it_off(make: Make, weights: Path) -> None:
    rank = make(began=False)
    (weights / "model.safetensors").write_bytes(b"x" * 100)
    rank.begin(LAYOUT)
    assert rank.wait_identified(IDENTIFIED_S)
    assert rank.off_reason is not None
    assert rank.keys("kv", HASHES) is None


def test_settings_of_an_engine_that_was_started_later_vouch_for_nothing(make: Make, weights: Path) -> None:
    """Attached with them, an engine takes files for its weights only if they are as they were at its own start."""
    process_ns = time.time_ns()
    time.sleep(0.02)
    (weights / "model.safetensors").write_bytes(b"x" * 100)
    rank = make(process_ns=process_ns)
    assert rank.off_reason is not None
    assert rank.keys("kv", HASHES) is None


def test_weights_that_were_replaced_before_it_was_attached_are_unknown(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "_weights_replaced", None)
    assert make().keys("kv", HASHES) is not None
    for each in engine.engines():
        each.close()
    plugin.before_weight_change("check_weights", None, SimpleNamespace(action="checksum"))
    assert make().keys("kv", HASHES) is not None  # that only looks
    for each in engine.engines():
        each.close()
    plugin.around_disk_update(lambda *_: None, None)
    rank = make(began=False)
    rank.begin(LAYOUT)
    assert "weights were replaced (update_weights_from_disk) before kvplug was attached" in (rank.off_reason or "")
    assert rank.keys("kv", HASHES) is None


RANK = """
import sys
import torch.distributed as dist
from kvplug.adapters.sglang import compat
port, rank = int(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
print(compat.engine_word(), compat.engine_word())
dist.barrier()
dist.destroy_process_group()
"""


def test_the_ranks_of_an_engine_agree_on_a_word_that_no_other_engine_has() -> None:
    """Real process groups, as SGLang's ranks have one; asked again, it is the same word."""
    assert compat.problems(compat.CALLED) == []
    ranks = []
    for port in (free_port(), free_port()):
        for rank in range(2):
            command = [sys.executable, "-c", RANK, str(port), str(rank)]
            ranks.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    try:
        said = [rank.communicate(timeout=DEADLINE_S)[0].split() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * 4
    one, two = said[0][0], said[2][0]
    assert said == [[one] * 2, [one] * 2, [two] * 2, [two] * 2]
    assert one != two
    assert len(bytes.fromhex(one)) == 16


def test_without_hooks_it_is_off(pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "_context", None)
    rank = engine.start("hicache", {"kvplug": {"settings": {"pool": pool}}})
    assert "without --enable-kvplug or KVPLUG_ENABLE=1" in (rank.off_reason or "")
    rank.close()


def test_closing_twice_leaves_once(make: Make) -> None:
    rank = make()
    store = rank.store
    rank.close()
    rank.close()
    assert rank.store is None
    assert rank not in engine.engines()
    assert rank.keys("kv", HASHES) is None
    assert store is not None
