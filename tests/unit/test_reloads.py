"""Which weights a reload from files has brought, and what of it is not believed."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from kvplug.adapters.common.reloads import INDEX, Reloads, contents_of
from kvplug.errors import NamespaceError
from kvplug.identity.weights import WeightFiles, identify_weights

NAMES = ("a", "b")
LONG_AGO = 1_000_000_000
SETTLED_S = 0.1


def folder(path: Path, value: float, names: tuple[str, ...] = NAMES, size: int = 3, config: str = "{}") -> Path:
    path.mkdir(exist_ok=True)
    save_file({name: np.full(size, value, np.float32) for name in names}, path / "model.safetensors")
    (path / "config.json").write_text(config)
    return path


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """Makes folders of weights."""
    return lambda name, *args, **kwargs: folder(tmp_path / name, *args, **kwargs)


@pytest.fixture(autouse=True)
def _finer_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system of the tests ticks every few milliseconds."""
    monkeypatch.setattr("kvplug.identity.weights.SETTLED_S", SETTLED_S)


def settle() -> int:
    """Waits until a further change of what was written can't go unseen; now, in ns."""
    time.sleep(2 * SETTLED_S)
    return time.time_ns()


def reloaded(reloads: Reloads, path: Path, meanwhile: Callable[[], Any] = lambda: None) -> Any:
    """The identity after a reload from there; None if nothing comes of it."""
    reloads.begins(str(path))
    assert reloads.pending is reloads.possible
    meanwhile()
    reloads.ended(True)
    return known(reloads)


def known(reloads: Reloads) -> Any:
    probe = reloads._probe
    return None if probe is None or probe.result(60) is None else reloads.result()


def test_the_last_folder_counts_and_is_known_by_content(make: Callable[..., Path]) -> None:
    start, other = make("start", 1), make("other", 2)
    reloads = Reloads(str(start), settle())
    assert reloads.possible
    assert not reloads.pending
    assert reloads.source == str(start)
    assert reloads.result() is None
    assert reloaded(reloads, other) == identify_weights(other)
    assert reloads.source == str(other), "where the next call reads from that names no folder"
    assert not reloads.pending
    assert reloads.result() is None, "told once"
    assert reloaded(reloads, start) == identify_weights(start) != identify_weights(other)


def test_what_was_changed_or_elsewhere_since_the_call_began_is_not_believed(make: Callable[..., Path]) -> None:
    start, other = make("start", 1), make("other", 2)
    link = start.parent / "link"
    link.symlink_to(start)
    began = settle()

    def rewritten() -> None:
        (start / "model.safetensors").write_bytes((start / "model.safetensors").read_bytes())

    def led_astray() -> None:
        """For a while, which is when the workers read."""
        for target in (other, start):
            link.unlink()
            link.symlink_to(target)

    def away() -> None:
        os.rename(start, start.parent / "for a while")
        os.rename(start.parent / "for a while", start)

    for path, meanwhile in ((start, rewritten), (link, led_astray), (start, away)):
        reloads = Reloads(str(other), began)
        assert reloads.possible
        with pytest.raises(NamespaceError, match="changed while it was read"):
            reloaded(reloads, path, meanwhile)
        assert not reloads.possible, "which tensors were read is not known"
        assert reloaded(reloads, other) is None


def test_what_is_changed_before_it_was_identified_is_not_believed(make: Callable[..., Path]) -> None:
    start = make("start", 1)
    settle()
    files = WeightFiles(start)
    assert files.unchanged()
    folder(start, 2)
    with pytest.raises(NamespaceError, match="changed since the engine began"):
        files.identify()


def test_what_was_written_just_now_could_change_unseen(
    make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    start, other, began = make("start", 1), make("other", 2), settle()
    reloads = Reloads(str(start), began)
    with monkeypatch.context() as coarse:
        coarse.setattr("kvplug.identity.weights.SETTLED_S", 1000.0)
        with pytest.raises(NamespaceError, match="could go unseen"):
            reloaded(reloads, other)
    assert reloads.possible
    assert reloaded(reloads, start) == identify_weights(start)


def test_other_tensors_or_settings_than_the_start_s(make: Callable[..., Path]) -> None:
    start = make("start", 1)
    fewer, config = make("fewer", 2, names=("a",)), make("config", 2, config='{"rope_theta": 2}')
    more, shape = make("more", 2, names=("a", "b", "c")), make("shape", 2, size=4)
    began = settle()
    reloads = Reloads(str(start), began)
    with pytest.raises(NamespaceError, match="has not the same tensors"):
        reloaded(reloads, fewer)
    with pytest.raises(NamespaceError, match=r"config\.json differ"):
        reloaded(reloads, config)
    assert reloaded(reloads, start) == identify_weights(start), "which replaces all of it"
    for path in (more, shape):
        reloads = Reloads(str(start), began)
        with pytest.raises(NamespaceError, match="the files of the start have not"):
            reloaded(reloads, path)
        assert reloaded(reloads, start) is None, "what was more than the start's stays in memory"


def test_a_change_of_another_kind_makes_all_of_it_worthless(make: Callable[..., Path]) -> None:
    start, began = make("start", 1), settle()
    for spoil in (
        lambda one: one.give_up(),
        lambda one: (one.begins(str(start)), one.ended(False)),
        lambda one: one.begins("someone/something"),
        lambda one: one.begins(str(start / "model.safetensors")),
        lambda one: one.begins(None),
    ):
        reloads = Reloads(str(start), began)
        spoil(reloads)
        assert not reloads.possible
        assert reloaded(reloads, start) is None
    reloads = Reloads(str(start), began)
    reloads.begins(str(start))
    reloads.ended(True)
    assert reloads.pending
    reloads.changed()
    assert not reloads.pending
    assert reloads.result() is None
    assert reloaded(reloads, start) == identify_weights(start), "a pause leaves nothing that a reload does not replace"


def test_a_start_that_is_not_known_well_enough(make: Callable[..., Path], tmp_path: Path) -> None:
    start = make("start", 1)
    assert not Reloads(str(start), LONG_AGO).possible, "changed since it was loaded"
    assert not Reloads(str(start), None).possible
    assert not Reloads(None, settle()).possible
    assert not Reloads("someone/something", settle()).possible
    assert not Reloads(str(tmp_path), settle()).possible


@pytest.mark.parametrize(
    "content",
    [b"", b"short", struct.pack("<Q", 1 << 62), struct.pack("<Q", 4) + b"{}{}", struct.pack("<Q", 8) + b'{"a": 1}'],
)
def test_a_file_that_is_no_list_of_tensors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(NamespaceError):
        contents_of(WeightFiles(tmp_path))


def test_files_of_which_an_engine_does_not_read_all(make: Callable[..., Path]) -> None:
    start = make("start", 1)
    whole = contents_of(WeightFiles(start))
    (start / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(NAMES, "model.safetensors")}))
    assert contents_of(WeightFiles(start)) == whole
    (start / INDEX).write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    with pytest.raises(NamespaceError, match="lists other tensors"):
        contents_of(WeightFiles(start))
    (start / INDEX).unlink()
    for name, reason in (("more.safetensors", "is in model.safetensors too"), ("consolidated.safetensors", "original")):
        save_file({"a": np.zeros(3, np.float32)}, start / name)
        with pytest.raises(NamespaceError, match=reason):
            contents_of(WeightFiles(start))
        (start / name).unlink()
