"""Pages of requests with LoRA adapters are seeded by the adapter's content, wherever that lies and whatever its id."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvplug.adapters.sglang import lora
from tests.vllm_lab.models import LLAMA, LoraSpec, lora_dir

SECRET, OTHER = b"s" * 32, b"o" * 32
A, B, C = ("a" * 32, "b" * 32, "c" * 32)
DEADLINE_S = 60.0


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    lora._loaded.clear()
    yield
    lora._loaded.clear()


def plain(extra_key: str | None, salt: str | None) -> str | None:
    return None if extra_key is None and salt is None else f"plain {extra_key!r} {salt!r}"


def seed(extra_key: str | None, salt: str | None = None, secret: bytes = SECRET) -> str | None:
    return lora.seed(extra_key, salt, plain, secret, None)


def adapter(folder: Path, weights: bytes) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text('{"r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(weights)
    time.sleep(0.01)  # older than the load by more than the file system's clock ticks
    return str(folder)


def known(lora_id: str) -> str:
    """The seed once the adapter's content is known, which another engine would come to as well."""
    deadline = time.monotonic() + DEADLINE_S
    while seed("x" + lora_id) != seed("x" + lora_id, secret=OTHER):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    found = seed("x" + lora_id)
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


def test_until_it_is_known_a_seed_is_this_engines_own(tmp_path: Path) -> None:
    lora.note_load(A, str(tmp_path / "nowhere"))
    lora.note_load(B, None)  # from tensors
    seeds = {seed(i, secret=s) for i in (A, B) for s in (SECRET, OTHER)}
    assert len(seeds) == 4
    time.sleep(0.2)
    assert seeds == {seed(i, secret=s) for i in (A, B) for s in (SECRET, OTHER)}


def test_another_adapter_under_the_same_id_is_another(tmp_path: Path) -> None:
    path = adapter(tmp_path / "one", b"1" * 100)
    lora.note_load(A, path)
    before = known(A)
    adapter(tmp_path / "one", b"2" * 100)
    assert known(A) == before  # what was loaded
    lora.note_load(A, path)
    assert known(A) != before


def test_an_adapter_that_changed_after_its_load_stays_this_engines_own(tmp_path: Path) -> None:
    path = adapter(tmp_path / "one", b"1" * 100)
    lora.note_load(A, path)
    adapter(tmp_path / "one", b"2" * 100)
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        assert seed(A) != seed(A, secret=OTHER)
        time.sleep(0.02)


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
