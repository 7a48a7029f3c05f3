"""Pages of requests with LoRA adapters are seeded by the adapter's content, wherever that lies and whatever its id."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvplug.adapters.sglang import lora
from kvplug.identity import weights
from tests.lab.models import LLAMA, LoraSpec, lora_dir

SECRET, OTHER = b"s" * 32, b"o" * 32
A, B, C = ("a" * 32, "b" * 32, "c" * 32)


class Rank:
    """One rank's engine, as far as adapters go, alone or with others whose word is given."""

    def __init__(self, secret: bytes = SECRET, others: bool | None = True) -> None:
        self.secret = secret
        self.others = others
        self.said: list[str] = []
        self.topics: list[str] = []

    def ranks_agree(self, topic: str, mine: bytes) -> bool | None:
        self.topics.append(topic)
        return self.others

    def say(self, line: str) -> None:
        self.said.append(line)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No adapter is loaded, and files count as settled at once."""
    monkeypatch.setattr(weights, "SETTLED_S", -60.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lora._loaded.clear()
    yield
    lora._loaded.clear()


def plain(extra_key: str | None, salt: str | None) -> str | None:
    return None if extra_key is None and salt is None else f"plain {extra_key!r} {salt!r}"


def seed(
    extra_key: str | None, salt: str | None = None, secret: bytes = SECRET, rank: Rank | None = None
) -> str | None:
    return lora.seed(extra_key, salt, plain, rank or Rank(secret))


def adapter(folder: Path, weights: bytes) -> str:
    """Always as new files, as shutil.copytree and safetensors write them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return str(folder)


def shared(lora_id: str, rank: Rank | None = None) -> str | None:
    """The seed, if another engine comes to the same."""
    found = seed("x" + lora_id, rank=rank)
    return found if found == seed("x" + lora_id, secret=OTHER) else None


def known(lora_id: str) -> str:
    found = shared(lora_id)
    assert found is not None
    assert len(bytes.fromhex(found)) == 32
    return found


def test_the_same_content_under_any_name_and_id_is_one_adapter(tmp_path: Path) -> None:
    lora.note_load(A, adapter(tmp_path / "one", b"1" * 100))
    lora.note_load(B, adapter(tmp_path / "two", b"1" * 100))
    lora.note_load(C, adapter(tmp_path / "three", b"2" * 100))
    assert known(A) == known(B)
    assert known(A) != known(C)


def test_real_adapters_are_told_apart() -> None:
    lora.note_load(A, str(lora_dir(LLAMA, LoraSpec(seed=1))))
    lora.note_load(B, str(lora_dir(LLAMA, LoraSpec(seed=2))))
    assert known(A) != known(B)


def test_an_adapter_that_is_not_known_has_a_seed_of_this_engine_alone_and_the_reason_is_said(tmp_path: Path) -> None:
    lora.note_load(A, str(tmp_path / "nowhere"))
    lora.note_load(B, None)  # from tensors
    seeds = {seed(i, secret=s) for i in (A, B) for s in (SECRET, OTHER)}
    assert len(seeds) == 4
    rank = Rank()
    for lora_id in (A, B):
        seed(lora_id, rank=rank)
    assert "nowhere: no such file or directory" in rank.said[0]
    assert "tensors" in rank.said[1]


def test_the_next_step_of_a_training_loop_is_another_adapter(tmp_path: Path) -> None:
    """One folder, an id of its own for each step; the first is what was loaded, whatever lies there now."""
    lora.note_load(A, adapter(tmp_path / "policy", b"1" * 100))
    lora.note_copy(A)
    first = known(A)
    lora.note_load(B, adapter(tmp_path / "policy", b"2" * 100))
    lora.note_copy(B)
    assert known(A) == first
    assert known(B) != first


def test_another_adapter_under_the_same_id_is_another_and_that_is_told(tmp_path: Path) -> None:
    """SGLang's own tree may still have pages of the first, and name what follows them by theirs."""
    assert not lora.note_load(A, adapter(tmp_path / "one", b"1" * 100))
    before = known(A)
    assert not lora.note_load(A, str(tmp_path / "one")), "the same once more"
    assert known(A) == before
    assert lora.note_load(A, adapter(tmp_path / "one", b"2" * 100))
    assert known(A) != before


@pytest.mark.parametrize("when", ["before its first copy", "before a later copy"])
def test_an_adapter_whose_files_change_before_sglang_copies_from_them_stays_this_engines_own(
    when: str, tmp_path: Path
) -> None:
    """SGLang maps the files: what is written into them is what it computes with."""
    path = adapter(tmp_path / "one", b"1" * 100)
    lora.note_load(A, path)
    named = when == "before a later copy"
    if named:
        assert not lora.note_copy(A)
        known(A)
    (tmp_path / "one" / "adapter_model.safetensors").write_bytes(b"2" * 99)
    assert lora.note_copy(A) is named, "pages were named by what it was"
    assert shared(A) is None
    rank = Rank()
    seed(A, rank=rank)
    assert "changed since the engine began to load it" in rank.said[0]


def test_a_file_that_changes_before_the_first_request_is_noticed_without_a_copy(tmp_path: Path) -> None:
    lora.note_load(A, adapter(tmp_path / "one", b"1" * 100))
    adapter(tmp_path / "one", b"2" * 100)
    assert shared(A) is None


def test_ranks_that_have_read_different_contents_share_nothing(tmp_path: Path) -> None:
    """Each rank reads by itself, and the files may be replaced in between."""
    path = adapter(tmp_path / "one", b"1" * 100)
    lora.note_load(A, path)
    rank = Rank(others=None)
    assert shared(A, rank) is None, "another rank has not said yet"
    rank.others = True
    assert seed(A, rank=rank) == seed(A, secret=OTHER)
    lora.note_load(B, path)
    rank.others = False
    assert shared(B, rank) is None
    assert "ranks have read different contents" in rank.said[0]
    lora.note_load(A, path)
    lora.tell_ranks(rank)
    assert len(set(rank.topics)) == 3, "each load is a question of its own"


def test_keys_and_salts_keep_apart(tmp_path: Path) -> None:
    lora.note_load(A, adapter(tmp_path / "one", b"1" * 100))
    known(A)
    seeds = [seed(A), seed("x" + A), seed(A, "s"), seed("x" + A, "s"), seed("x"), seed(None, "s"), seed("x", "s")]
    assert len(set(seeds)) == len(seeds)


def test_requests_without_adapter_are_sglangs_own(tmp_path: Path) -> None:
    lora.note_load(A, adapter(tmp_path / "one", b"1" * 100))
    assert seed(None) is None
    assert seed("user") == plain("user", None)
    assert seed("user", "salt") == plain("user", "salt")
    assert lora.is_known("user" + A)
    assert not lora.is_known("user" + B)
