"""A LoRA adapter's blocks go by the bytes that the engine's workers hold: what they read, when, and what they say.

Both sides without an engine: what a worker notes around the engine's own loads and copies, and what the scheduler makes
of its reports.
"""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from kvplug.adapters.vllm import compat_adapters
from kvplug.adapters.vllm.adapters import HeldAdapters
from kvplug.adapters.vllm.jobs import AdapterLoad, GroupBlocks, Job, Rank, WorkerReport
from kvplug.adapters.vllm.requests import Adapter, LoraIdentities
from kvplug.errors import NamespaceError
from kvplug.identity import weights

ONE, TWO = b"1" * 32, b"2" * 32
ALONE: Rank = (0, 0)
_orders = itertools.count(1)


def lora(name: str, number: int, path: str = "", **more: Any) -> Any:
    return SimpleNamespace(lora_name=name, lora_int_id=number, lora_path=path or f"/{name}", **more)


def report(*loads: tuple[int, bytes | None], rank: Rank = ALONE, held: set[int] | None = None, changes: int = 0) -> Any:
    read = tuple(
        AdapterLoad(rank, number, content, "" if content else "it changed", changes, next(_orders))
        for number, content in loads
    )
    ids = frozenset({n for n, _ in loads} if held is None else held)
    return WorkerReport(adapters=read, held={rank: (next(_orders), ids)})


# ---- the scheduler's side --------------------------------------------------------------------------------------------


def test_an_adapter_is_its_content() -> None:
    """The same content under another name and path is the same adapter; other content is not."""
    known = LoraIdentities({"/a": ONE, "/b": ONE, "/c": TWO}.get)
    assert known(lora("a", 1)) == known(lora("b", 2)) != known(lora("c", 3))


def test_other_settings_make_another_adapter_of_the_same_files() -> None:
    """An engine may apply it to some modules only, or in another dtype."""
    found = {
        LoraIdentities({"/a": ONE}.get, settings=settings)(lora("a", 1)) for settings in (b"", b"q_proj", b"o_proj")
    }
    assert len(found) == 3


def test_the_next_step_of_a_training_loop_is_another_adapter() -> None:
    """Each step writes to one folder and has a name and an id of its own."""
    lies: dict[str, bytes] = {"/policy": ONE}
    known = LoraIdentities(lies.get)
    first = known(lora("step-1", 1, "/policy"))
    known.reported(report((1, ONE)))
    lies["/policy"] = TWO
    second = known(lora("step-2", 2, "/policy"))
    assert first
    assert second
    assert first != second
    known.reported(report((2, TWO), held={1, 2}))
    assert known(lora("step-1", 1, "/policy")) == first, "the workers still hold it"
    assert known(lora("step-2", 2, "/policy")) == second


def test_what_workers_hold_goes_before_what_lies_at_the_path() -> None:
    known = LoraIdentities({"/a": TWO}.get)
    known.reported(report((1, ONE)))
    assert known.find(lora("a", 1)) == Adapter(1, ONE, held=True)


def test_an_adapter_that_was_let_go_is_what_lies_at_the_path_if_that_is_what_it_was() -> None:
    """The engine reads it again when a request needs it. Blocks of both could be in the engine's own cache."""
    lies = {"/a": ONE}
    known = LoraIdentities(lies.get)
    known.reported(report((1, ONE)))
    known.reported(report(held=set()))
    assert known.find(lora("a", 1)) == Adapter(1, ONE, held=False)
    lies["/a"] = TWO
    with pytest.raises(NamespaceError, match="blocks of another content"):
        known(lora("a", 1))
    known.cache_emptied([])
    assert known.find(lora("a", 1)) == Adapter(1, TWO, held=False)


def test_an_id_that_was_read_anew_with_other_content_is_not_cached_until_the_engines_cache_is_empty() -> None:
    """As ``load_inplace`` does; under a path of its own it is told apart by the engine too."""
    known = LoraIdentities({"/new": TWO}.get)
    known.reported(report((1, ONE)))
    before = known(lora("a", 1))
    assert before
    assert known.reported(report((1, TWO), changes=1)) == {1}
    with pytest.raises(NamespaceError, match="blocks of another content"):
        known(lora("a", 1))
    known.cache_emptied([lora("a", 1)])
    after = known(lora("a", 1))
    assert after not in (None, before)
    assert known.changes == {ALONE: 1}


def test_up_to_0_30_a_name_is_one_adapter_wherever_it_lies() -> None:
    """The engine's own cache says so there; later releases tell adapters apart by path as well."""
    for by_name, expected in ((True, None), (False, True)):
        known = LoraIdentities({"/a": ONE, "/b": TWO}.get, by_name_alone=by_name)
        assert known(lora("a", 1, "/a"))
        known.reported(report((1, ONE)))
        if expected:
            assert known(lora("a", 2, "/b"))
            continue
        with pytest.raises(NamespaceError, match="under its name"):
            known(lora("a", 2, "/b"))
        known.reported(report((2, TWO), held={1, 2}))
        with pytest.raises(NamespaceError, match="under its name"):
            known(lora("a", 1, "/a"))


def test_an_id_used_under_two_names_fills_the_engines_cache_for_both() -> None:
    """The worker runs what it holds under the id, whatever the request calls it."""
    known = LoraIdentities({"/b": TWO}.get)
    known.reported(report((1, ONE)))
    assert known.find(lora("b", 1)) == Adapter(1, ONE, held=True)
    known.reported(report((2, TWO), held={1, 2}))
    with pytest.raises(NamespaceError, match="blocks of another content"):
        known(lora("b", 2))


def test_workers_that_hold_different_contents_are_no_adapter() -> None:
    """They load one after the other, and the files may be replaced in between."""
    ranks: tuple[Rank, ...] = ((0, 0), (0, 1))
    known = LoraIdentities(lambda _: None, ranks=ranks)
    known.reported(report((1, ONE), rank=ranks[0]))
    assert known(lora("a", 1)) is None, "one worker has not said yet"
    assert not known.confirmed(Adapter(1, ONE, held=True))
    known.reported(report((1, TWO), rank=ranks[1]))
    with pytest.raises(NamespaceError, match="different contents"):
        known(lora("a", 1))


def test_why_an_adapter_is_not_known_is_said_each_in_its_own_words() -> None:
    known = LoraIdentities(lambda _: None)
    assert known(lora("reading", 1)) is None
    known.reported(report((2, None)))
    with pytest.raises(NamespaceError, match="LoRA adapter changed: it changed"):
        known(lora("changed", 2))


def test_blocks_from_the_pool_count_as_what_the_engine_has_computed_with() -> None:
    """They stay in its cache although the worker then read something else."""
    known = LoraIdentities({"/a": ONE}.get)
    forecast = known.find(lora("a", 1))
    assert forecast == Adapter(1, ONE, held=False)
    known.brought(forecast)
    known.reported(report((1, TWO)))
    assert not known.agrees(forecast, WorkerReport())
    with pytest.raises(NamespaceError, match="blocks of another content"):
        known(lora("a", 1))


def test_what_a_step_brings_along_may_be_older_than_what_a_worker_said_when_it_was_asked() -> None:
    """Where steps overlap, an adapter is loaded ahead while a step's output is still to be taken in."""
    known = LoraIdentities({}.get)
    known.reported(report((1, ONE)))
    taken = known.find(lora("a", 1))
    assert taken
    step = report((1, TWO), held={1}, changes=1)
    asked = report((1, ONE), held={1, 2}, changes=2)
    assert known.reported(asked) == set()
    assert known.agrees(taken, asked)
    assert known.reported(step) == {1}, "some of the blocks were computed with it"
    assert not known.agrees(taken, step)
    assert known.changes == {ALONE: 2}
    known.cache_emptied([])
    assert known.find(lora("a", 1)) == Adapter(1, ONE, held=True), "that is what the worker has now"
    assert known.find(lora("b", 2)) is None
    known.reported(report((2, TWO), held={1, 2}))
    assert known.find(lora("b", 2)) == Adapter(2, TWO, held=True)


def test_an_adapter_whose_weights_lie_elsewhere_is_not_known_by_its_path() -> None:
    """Up to 0.31 a request may name a folder of tensorized weights; only the configuration lies at the path then."""
    known = LoraIdentities({"/a": ONE}.get)
    assert known(lora("a", 1, tensorizer_config_dict=None))
    with pytest.raises(NamespaceError, match="tensorizer_config_dict"):
        known(lora("a", 1, tensorizer_config_dict={"tensorizer_dir": "/other"}))


# ---- a worker's side -------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(weights, "SETTLED_S", -60.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Worker:
    """A worker's adapters, as vLLM's LoRA manager goes about with them."""

    def __init__(self) -> None:
        self.held = HeldAdapters(ALONE)
        self.listed: set[int] = set()

    def load(self, number: int, path: Path | None) -> None:
        self.held.reads(number, str(path) if path else None, lambda: self.listed)
        self.listed.add(number)
        self.held.copied(number)

    def news(self) -> list[tuple[int, bytes | None]]:
        told = self.held.add_to(None)
        return [(load.number, load.content) for load in told.adapters] if told is not None else []

    def refuses(self, number: int, content: bytes, later: bool = True, changes: int = 0, blocks: Any = (7, 8)) -> bool:
        ids = np.array(blocks)
        groups = (GroupBlocks(0, ids, ids, ids, ids),)
        return self.held.refuses(Job(1, 0, groups, "r", False, {ALONE: changes}, (number, content, later)))


def write(folder: Path, byte: bytes) -> Path:
    """Always as new files: an engine may hold the old ones mapped."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(byte * 100)
    return folder


def test_a_worker_tells_what_it_has_read_once(tmp_path: Path) -> None:
    worker = Worker()
    worker.load(1, write(tmp_path / "policy", b"1"))
    worker.load(2, write(tmp_path / "policy", b"2"))
    (one, first), (two, second) = worker.news()
    assert (one, two) == (1, 2)
    assert first
    assert second
    assert first != second
    assert worker.news() == []
    worker.held.copied(2)
    assert worker.news() == []
    worker.listed.discard(1)
    told = worker.held.add_to(None)
    assert told is not None
    assert told.held[ALONE][1] == {2}


def test_files_that_change_between_the_engines_read_and_its_copy_are_nothing_that_is_known(tmp_path: Path) -> None:
    """The engine maps them: what is written until it copies is what it computes with."""
    worker, folder = Worker(), write(tmp_path / "a", b"1")
    worker.held.reads(1, str(folder), lambda: worker.listed)
    write(folder, b"2")
    worker.held.copied(1)
    told = worker.held.add_to(None)
    assert told is not None
    (load,) = told.adapters
    assert load.content is None
    assert "changed since the engine began to load it: adapter_" in load.why


def test_files_that_change_before_they_are_copied_again_make_the_adapter_another(tmp_path: Path) -> None:
    worker, folder = Worker(), write(tmp_path / "a", b"1")
    worker.load(1, folder)
    ((_, content),) = worker.news()
    assert content is not None
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        file.write(b"2" * 100)
        os.fsync(file.fileno())
    worker.held.copied(1)
    assert worker.news() == [(1, None)]
    assert worker.refuses(1, content)


def test_what_can_not_be_read_is_said(tmp_path: Path) -> None:
    worker = Worker()
    worker.load(1, tmp_path)
    told = worker.held.add_to(None)
    assert told is not None
    assert told.adapters[0].content is None
    assert "no adapter_config.json" in told.adapters[0].why


def test_files_that_the_engine_could_not_use_are_not_what_it_holds(tmp_path: Path) -> None:
    """As when an adapter is loaded in place of another, and its rank is too high: the engine keeps the other."""
    worker = Worker()
    worker.load(1, write(tmp_path / "a", b"1"))
    ((_, content),) = worker.news()
    worker.held.reads(1, str(write(tmp_path / "b", b"2")), lambda: worker.listed)
    worker.held.not_read(1)
    worker.held.copied(1)
    assert worker.news() == []
    assert content is not None
    assert not worker.refuses(1, content)


def test_weights_that_lie_elsewhere_are_nothing_that_is_known() -> None:
    worker = Worker()
    worker.load(1, None)
    told = worker.held.add_to(None)
    assert told is not None
    assert told.adapters[0].content is None
    assert "tensorizer" in told.adapters[0].why


def test_an_adapter_that_is_replaced_before_a_loaded_request_runs_is_noticed(tmp_path: Path) -> None:
    """The worker held what the load was made for; it is let go and read again, or replaced in place."""
    worker, folder = Worker(), write(tmp_path / "a", b"1")
    worker.load(1, folder)
    ((_, content),) = worker.news()
    assert content is not None
    assert not worker.refuses(1, content)
    worker.load(1, write(folder, b"2"))
    assert worker.held.contradicted() == {7, 8}
    job = Job(1, 0, (), "r", False, {ALONE: 0}, (1, content, False))
    assert worker.held.spoils(job), "where nothing can be taken back, the load fails when it is over"
    assert not worker.held.spoils(Job(2, 0, (), "r"))


def test_nothing_is_kept_of_adapters_that_the_engine_has_let_go(tmp_path: Path) -> None:
    worker = Worker()
    for number in range(1, 6):
        worker.load(number, write(tmp_path / "policy", b"%d" % number))
        worker.listed &= {number}
        worker.news()
    assert set(worker.held._files) == {5}


def test_a_dummy_of_a_warm_up_is_no_adapter() -> None:
    worker = Worker()
    worker.held.copied(1)
    assert worker.news() == []


def test_jobs_that_were_made_for_another_content_are_refused(tmp_path: Path) -> None:
    worker, folder = Worker(), write(tmp_path / "a", b"1")
    worker.load(1, folder)
    ((_, content),) = worker.news()
    assert content is not None
    assert not worker.refuses(1, content)
    assert worker.refuses(1, TWO)
    store = Job(2, 0, (), adapter_changes={ALONE: 0})
    assert not worker.held.refuses(store)
    worker.load(1, write(folder, b"2"))
    assert worker.held.refuses(store), "some of its blocks may be of either"
    assert not worker.held.refuses(Job(3, 0, ())), "no adapter's blocks"


def test_blocks_brought_for_an_adapter_that_turns_out_another_are_called_wrong(tmp_path: Path) -> None:
    """The engine then throws away what the request has computed and begins again."""
    worker, folder = Worker(), write(tmp_path / "a", b"1")
    worker.load(1, folder)
    ((_, content),) = worker.news()
    assert content is not None
    worker.listed.clear()
    assert worker.refuses(1, content, later=False), "with such models nothing can be taken back"
    assert not worker.refuses(1, content)
    worker.load(1, folder)
    assert worker.held.contradicted() == set()
    worker.listed.clear()
    assert not worker.refuses(1, content, blocks=(5, 6))
    worker.load(1, write(folder, b"2"))
    assert worker.held.contradicted() == {5, 6}
    assert worker.held.contradicted() == set()


# ---- where vLLM reads and copies -------------------------------------------------------------------------------------


def test_the_engines_own_loads_and_copies_are_seen_each_for_its_engine(tmp_path: Path) -> None:
    """On vLLM's own managers. Two engines of one process may have the same ids."""
    from vllm.lora.model_manager import AdapterLRUCache, LoRAModelManager
    from vllm.lora.request import LoRARequest
    from vllm.lora.worker_manager import WorkerLoRAManager

    assert compat_adapters.adapter_problems() == []
    seen: list[tuple[Any, ...]] = []
    mine, other = SimpleNamespace(), SimpleNamespace()

    def copied(number: int) -> None:
        seen.append(("copied", number))

    def reads(number: int, path: str | None, listed: Any) -> None:
        seen.append(("reads", number, path, set(listed())))

    def not_read(number: int) -> None:
        seen.append(("not read", number))

    connector = object()
    compat_adapters.on_adapters(SimpleNamespace(lora_config=mine), reads, not_read, copied)
    try:
        for config in (other, mine):
            models = object.__new__(LoRAModelManager)
            models.lora_config = config  # type: ignore[assignment]
            models.supported_lora_modules, models.packed_modules_mapping = [], {}
            models._registered_adapters = AdapterLRUCache(4, lambda _: None)
            models._registered_adapters[7] = SimpleNamespace(id=7)  # type: ignore[assignment]
            models._active_adapters, models.lora_index_to_id, models.modules = {}, [None], {}  # type: ignore[assignment]
            worker = object.__new__(WorkerLoRAManager)
            worker.lora_config, worker._adapter_manager = config, models  # type: ignore[assignment]
            worker.max_position_embeddings = 8
            with pytest.raises(Exception, match="nowhere"):
                worker._load_adapter(LoRARequest("a", 7, str(tmp_path / "nowhere")))
            assert models.activate_adapter(7)
            assert not models.activate_adapter(7), "it has its place already"
        assert seen == [("reads", 7, str(tmp_path / "nowhere"), {7}), ("not read", 7), ("copied", 7)]
        seen.clear()
        elsewhere = lora("a", 8, str(tmp_path), tensorizer_config_dict={"tensorizer_dir": "/other"})
        with pytest.raises(Exception, match="No adapter found"):
            worker._load_adapter(elsewhere)
        assert seen == [("reads", 8, None, {7}), ("not read", 8)]
    finally:
        compat_adapters.forget_adapters(connector, copied)
    assert models.lora_index_to_id == [7]
    models._active_adapters.clear()
    models.lora_index_to_id = [None]
    assert models.activate_adapter(7)
    assert len(seen) == 2, "nobody asks any more"
