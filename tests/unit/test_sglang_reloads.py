"""A rank whose weights SGLang has read from files again: when it shares once more, and when it must not."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from kvplug.adapters.sglang import compat, engine
from kvplug.adapters.sglang.engine import RankEngine
from kvplug.errors import NamespaceError
from kvplug.identity.weights import WeightFiles
from tests.lab.env import temporary_pool
from tests.unit.sglang_facts import facts, give
from tests.vllm.common import eventually

HASHES = [f"{i:064x}" for i in range(3)]
DISK = "update_weights_from_disk"
IDENTIFIED_S = 60.0
SETTLED_S = 0.1
SAID = "the weights are known again; sharing as"


def folder(path: Path, value: float, names: tuple[str, ...] = ("a", "b")) -> Path:
    path.mkdir(exist_ok=True)
    save_file({name: np.full(8, value, np.float32) for name in names}, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    return path


@pytest.fixture(scope="module")
def pool() -> Iterator[str]:
    with temporary_pool("sglangreloads") as name:
        yield name


@pytest.fixture
def start(tmp_path: Path) -> Path:
    return folder(tmp_path / "start", 1)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return folder(tmp_path / "other", 2)


@pytest.fixture(autouse=True)
def _finer_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system of the tests ticks every few milliseconds."""
    monkeypatch.setattr("kvplug.identity.weights.SETTLED_S", SETTLED_S)


Boot = Callable[..., RankEngine]


def UNREADABLE(_sample: bytes | None) -> None:
    """A look at the weights in memory that can't be had."""


class Memory:
    """Weights in memory, as they are looked at."""

    def __init__(self) -> None:
        self.value, self.read = b"start", 0

    def __call__(self, sample: bytes | None) -> tuple[bytes, bytes]:
        found = self.value[:1]
        self.read += sample in (None, found)
        return found, self.value if sample in (None, found) else b""


@pytest.fixture
def boot(pool: str, start: Path, other: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Boot]:
    """``boot(path=start, word=..., began=True, **facts)``: an engine's rank whose weights were loaded from there."""
    made: list[RankEngine] = []
    time.sleep(2 * SETTLED_S)

    def one(path: Path = start, word: str = "a" * 32, began: bool = True, **changes: Any) -> RankEngine:
        give(monkeypatch, facts(path, **changes))
        monkeypatch.setattr(compat, "engine_word", lambda: word)
        monkeypatch.setattr(engine, "PROCESS_STARTED_NS", time.time_ns())
        own = {"settings": {"pool": pool, "size": "64mib"}, "started_ns": time.time_ns()}
        made.append(engine.start("linker", {"kvplug": own}))
        if began:
            begin(made[-1])
        return made[-1]

    yield one
    for each in made:
        each.close()
    assert engine.engines() == []


def begin(rank: RankEngine) -> None:
    rank.begin({"mode": "test"})
    assert rank.wait_identified(IDENTIFIED_S)
    assert rank.off_reason is None


def name(rank: RankEngine) -> bytes | None:
    """Of some pages, without the shard; None while nothing may be looked up or stored."""
    keys = rank.keys("kv", HASHES)
    return None if keys is None else keys[:, :30].tobytes()


def update(*ranks: RankEngine, path: Path | str | None, whole: bool = True, flush: bool = True) -> None:
    """What SGLang does in :data:`DISK`."""
    for rank in ranks:
        rank.reload_began(DISK, None if path is None else str(path))
        assert name(rank) is None
        if flush:
            rank.flushed()
        rank.reload_ended(whole)


def back(rank: RankEngine) -> None:
    eventually("the weights are known again", lambda: rank._weights.known, IDENTIFIED_S)


def settled(rank: RankEngine) -> None:
    """Waits until nothing is under way that could lead back."""
    eventually("nothing is being identified", lambda: not rank._weights.pending, IDENTIFIED_S)


def test_read_again_from_known_files_it_shares_again(
    boot: Boot, other: Path, start: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rank = boot()
    shared, of_other = name(boot(word="b" * 32)), name(boot(other, word="c" * 32))
    assert name(rank) == shared != of_other
    with caplog.at_level(logging.INFO):
        for path, expected in ((start, shared), (other, of_other), (start, shared)):
            caplog.clear()
            epoch = rank.epoch
            update(rank, path=path)
            back(rank)
            eventually("the names are those of its content", lambda expected=expected: name(rank) == expected)
            assert rank.epoch > epoch
            eventually("that is said, once", lambda: len([line for line in caplog.messages if SAID in line]) == 1)
            assert len([line for line in caplog.messages if "it shares with no other, until the files" in line]) == 1
    eventually("all are counted", lambda: rank.counts["weights_known_again"] == 3)
    assert rank.counts["weight_changes"] == 3


def test_nothing_is_shared_before_the_flush_that_may_come_late(boot: Boot, caplog: pytest.LogCaptureFixture) -> None:
    rank = boot()
    shared = name(rank)
    with caplog.at_level(logging.INFO):
        update(rank, path=rank.facts.model_path, flush=False)
        back(rank)
        eventually("that is counted", lambda: rank.counts["weights_known_again"])
        assert name(rank) is None, "old pages may still be on the device"
        assert not [line for line in caplog.messages if SAID in line]
        rank.flushed()
        assert name(rank) == shared
        assert len([line for line in caplog.messages if SAID in line]) == 1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda rank: rank.weights_changed("update_weights_from_tensor"),
        lambda rank: rank.update_began() or rank.update_ended(True),
        lambda rank: update(rank, path=rank.facts.model_path, whole=False),
        lambda rank: update(rank, path=None),
        lambda rank: update(rank, path="/missing"),
    ],
)
@pytest.mark.parametrize("began", [True, False])
def test_after_another_change_no_files_lead_back(
    boot: Boot, caplog: pytest.LogCaptureFixture, spoil: Callable[[RankEngine], Any], began: bool
) -> None:
    rank = boot(began=began)
    shared = name(boot(word="b" * 32))
    spoil(rank)
    rank.flushed()
    update(rank, path=rank.facts.model_path)
    settled(rank)
    if not began:
        begin(rank)
    assert name(rank) not in (None, shared)
    assert "it shares with no other, until it is started again" in caplog.messages[-1]


def test_a_reload_under_way_is_worth_nothing_after_another_change(boot: Boot) -> None:
    rank = boot()
    shared = name(rank)
    rank.reload_began(DISK, rank.facts.model_path)
    rank.weights_changed("update_weights_from_tensor")
    rank.reload_ended(True)
    rank.flushed()
    settled(rank)
    assert name(rank) not in (None, shared)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, threading.Event]]:
    """Identification of a folder that was read again waits for its event, by folder."""
    events: dict[str, threading.Event] = {}
    plain = WeightFiles.identify

    def identify(files: WeightFiles, stop: threading.Event | None = None) -> Any:
        event = events.get(files.folder)
        assert event is None or event.wait(IDENTIFIED_S)
        return plain(files, stop)

    monkeypatch.setattr(WeightFiles, "identify", identify)
    yield events
    for event in events.values():
        event.set()


def test_of_updates_in_quick_succession_the_last_counts(
    boot: Boot, start: Path, other: Path, held: dict[str, threading.Event]
) -> None:
    rank = boot()
    of_other = name(boot(other, word="b" * 32))
    held[str(start)] = threading.Event()
    update(rank, path=start)
    assert rank._weights.pending
    update(rank, path=other)
    back(rank)
    eventually("the names are the last one's", lambda: name(rank) == of_other)
    held[str(start)].set()
    time.sleep(3 * engine.POLL_S)
    assert name(rank) == of_other


def test_files_that_change_before_they_are_identified(
    boot: Boot, start: Path, held: dict[str, threading.Event], caplog: pytest.LogCaptureFixture
) -> None:
    rank = boot()
    shared = name(rank)
    held[str(start)] = threading.Event()
    update(rank, path=start)
    folder(start, 3)
    held[str(start)].set()
    settled(rank)
    assert name(rank) not in (None, shared)
    assert "not known" in caplog.text
    assert "changed since the engine began to load it" in caplog.text
    assert "until update_weights_from_disk has read its weights from a folder" in caplog.text
    time.sleep(2 * SETTLED_S)
    update(rank, path=start)
    back(rank)
    eventually("its names are the new content's", lambda: name(rank) == name(boot(start, word="b" * 32)) != shared)


def test_fewer_tensors_leave_old_ones_until_all_are_read_again(
    boot: Boot, start: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fewer = folder(tmp_path / "fewer", 1, names=("a",))
    time.sleep(2 * SETTLED_S)
    rank = boot()
    shared = name(rank)
    update(rank, path=fewer)
    assert not rank._weights.pending
    assert "has not the same tensors" in caplog.text
    assert name(rank) not in (None, shared)
    update(rank, path=start)
    back(rank)
    eventually("all were replaced", lambda: name(rank) == shared)


@pytest.mark.parametrize("first", ["the start", "the update"])
def test_an_update_while_the_start_s_weights_are_being_identified(
    boot: Boot, start: Path, other: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    of_other = name(boot(other, word="b" * 32))
    go_on = threading.Event()
    plain = RankEngine._probed

    def probed(rank: RankEngine) -> Any:
        assert go_on.wait(IDENTIFIED_S)
        return plain(rank)

    monkeypatch.setattr(RankEngine, "_probed", probed)
    rank = boot(began=False)
    rank.begin({"mode": "test"})
    update(rank, path=other)
    if first == "the update":
        back(rank)
    assert name(rank) is None
    go_on.set()
    assert rank.wait_identified(IDENTIFIED_S)
    back(rank)
    eventually("its names are the update's", lambda: name(rank) == of_other)


class Ranks:
    """What the ranks of one engine have said to each other, as in the store of their process group."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.said: dict[str, dict[int, bytes]] = {}

    def join(self, rank: RankEngine, index: int) -> None:
        def agree(topic: str, mine: bytes) -> bool | None:
            said = self.said.setdefault(topic, {})
            said[index] = mine
            return set(said.values()) == {mine} if len(said) == self.count else None

        rank.ranks_agree = agree  # type: ignore[method-assign]


@pytest.fixture
def pair(boot: Boot) -> list[RankEngine]:
    """Two ranks of one engine."""
    ranks, store = [boot(tp=(tp, 2)) for tp in range(2)], Ranks(2)
    for index, rank in enumerate(ranks):
        store.join(rank, index)
    assert name(ranks[0]) == name(ranks[1])
    return ranks


def test_no_rank_comes_back_before_all_have_read_the_same(pair: list[RankEngine], start: Path) -> None:
    shared = name(pair[0])
    update(pair[0], path=start)
    time.sleep(5 * engine.POLL_S)
    own = name(pair[0])
    assert own not in (None, shared), "the other's weights may still be anything"
    update(pair[1], path=start)
    for rank in pair:
        back(rank)
        eventually("all have said the same", lambda rank=rank: name(rank) == shared)


def test_a_rank_that_says_nothing_is_not_waited_for_without_end(
    pair: list[RankEngine], start: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engine, "AGREE_S", 5 * engine.POLL_S)
    shared, (one, two) = name(pair[0]), pair
    update(one, path=start)
    settled(one)
    assert name(one) not in (None, shared)
    eventually("that is said", lambda: "not all ranks have said what they have read" in caplog.text)
    two.reload_began(DISK, str(start))
    two.flushed()
    two.reload_ended(True)
    settled(two)
    assert name(two) not in (None, shared), "the first one has said that it can't tell"


@pytest.mark.parametrize("how", ["failed", "other files", "changed files", "untold"])
def test_where_one_rank_has_not_read_the_same_none_comes_back(
    pair: list[RankEngine],
    start: Path,
    other: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    how: str,
) -> None:
    shared, (one, two) = name(pair[0]), pair
    if how == "changed files":
        with monkeypatch.context() as broken:
            broken.setattr(WeightFiles, "identify", _raises)
            update(two, path=start)
            settled(two)
    update(one, path=start)
    if how == "untold":
        two.reload_began(DISK, str(start))
        two.flushed()
    elif how != "changed files":
        update(two, path=other if how == "other files" else start, whole=how != "failed")
    if how == "untold":
        time.sleep(5 * engine.POLL_S)
        assert one._weights.pending
    else:
        settled(one)
        settled(two)
        eventually("that is said", lambda: "this engine's ranks have not all read the same" in caplog.text)
    assert name(one) == name(two)
    assert name(one) not in (None, shared)
    if how in ("other files", "changed files"):
        update(one, two, path=start)
        for rank in pair:
            back(rank)
            eventually("they have come back", lambda rank=rank: name(rank) == shared)


def _raises(*_: Any) -> Any:
    raise NamespaceError("changed while it was read")


def test_a_rotation_stays(boot: Boot, start: Path, caplog: pytest.LogCaptureFixture) -> None:
    rank = boot()
    shared = name(rank)
    rank.rotate("test")
    rotated = name(rank)
    with caplog.at_level(logging.INFO):
        update(rank, path=start)
        back(rank)
        eventually("that is counted", lambda: rank.counts["weights_known_again"])
    assert name(rank) == rotated != shared
    assert SAID not in caplog.text
    assert "it shares with no other, until it is started again" in caplog.text


@pytest.mark.parametrize("when", ["before", "while"])
def test_one_that_leaves_the_pool_and_comes_again_goes_by_what_was_read_last(
    boot: Boot, start: Path, other: Path, held: dict[str, threading.Event], when: str
) -> None:
    """SGLang then says that the weights were loaded from the last folder; the start's may be gone."""
    rank, of_other = boot(), name(boot(other, word="b" * 32))
    if when == "while":
        held[str(other)] = threading.Event()
    rank.leave()
    update_away(rank, other)
    for file in start.iterdir():
        file.unlink()
    again = boot(other)
    assert again is not rank
    if when == "while":
        assert name(again) not in (None, of_other)
        held[str(other)].set()
    back(again)
    eventually("its names are the last folder's", lambda: name(again) == of_other)


def update_away(rank: RankEngine, path: Path) -> None:
    rank.reload_began(DISK, str(path))
    rank.flushed()
    rank.reload_ended(True)
    assert name(rank) is None


def test_what_is_no_whole_reload_stays_alone(boot: Boot, start: Path, caplog: pytest.LogCaptureFixture) -> None:
    rank = boot(lora_enabled=True)
    shared = name(rank)
    update(rank, path=start)
    assert not rank._weights.pending
    assert name(rank) not in (None, shared)
    assert "it shares with no other, until it is started again" in caplog.text


# ---- the same bytes --------------------------------------------------------------------------------------------------


def sleep(*ranks: RankEngine, memories: list[Memory], value: bytes, loses: bool = False) -> None:
    """What SGLang does when it releases memory and resumes it."""
    for rank, memory in zip(ranks, memories, strict=True):
        rank.sleep_begins(memory, loses)
        rank.flushed()
        rank.wakes_up("resume_memory_occupation")
        assert name(rank) is None
        memory.value = value
        rank.sleep_ended(memory)


def test_after_a_sleep_that_keeps_every_byte_it_shares_again(boot: Boot) -> None:
    rank, memory = boot(), Memory()
    shared = name(rank)
    for times in range(1, 4):
        sleep(rank, memories=[memory], value=b"start")
        eventually("it shares", lambda: name(rank) == shared)
        assert memory.read == 2 * times, "all is read once before and once after"
    assert rank.counts["weights_known_again"] == 3


@pytest.mark.parametrize("value", [b"other", b"s but not the same"])
def test_other_bytes_do_not_lead_back_and_neither_do_the_first_ones_after_them(boot: Boot, value: bytes) -> None:
    """Others are told by their sample, where that is another."""
    rank, memory = boot(), Memory()
    shared = name(rank)
    sleep(rank, memories=[memory], value=value)
    assert memory.read == (1 if value == b"other" else 2)
    for again in (b"start", b"start"):
        rank.flushed()
        settled(rank)
        assert name(rank) not in (None, shared)
        sleep(rank, memories=[memory], value=again)


@pytest.mark.parametrize("what", ["thrown away", "unreadable", "a draft", "another change", "a reload", "old pages"])
def test_a_sleep_that_is_not_known_to_leave_all_as_it_was(boot: Boot, start: Path, what: str) -> None:
    facts = {"draft_path": str(start)} if what == "a draft" else {}
    rank, memory = boot(**facts), Memory()
    shared = name(rank)
    if what == "old pages":  # of other weights, which SGLang has not flushed
        rank.weights_changed("update_weights_from_tensor")
    rank.sleep_begins(UNREADABLE if what == "unreadable" else memory, what == "thrown away")
    if what == "another change":
        rank.weights_changed("update_weights_from_tensor")
    if what == "a reload":
        rank.reload_began(DISK, None)
        rank.reload_ended(True)
    rank.wakes_up("resume_memory_occupation")
    rank.sleep_ended(memory)
    rank.flushed()
    settled(rank)
    assert name(rank) not in (None, shared)


def test_pages_of_a_sleep_in_doubt_are_not_looked_up_before_a_flush(boot: Boot) -> None:
    rank, memory = boot(), Memory()
    sleep(rank, memories=[memory], value=b"other")
    settled(rank)
    assert name(rank) is None
    rank.flushed()
    assert name(rank) is not None


@pytest.mark.parametrize("same", [True, False])
def test_ranks_share_again_only_if_all_have_the_same_bytes(pair: list[RankEngine], same: bool) -> None:
    shared, memories = name(pair[0]), [Memory(), Memory()]
    sleep(pair[0], memories=memories[:1], value=b"start")
    assert name(pair[0]) is None, "not before the other has said so"
    sleep(pair[1], memories=memories[1:], value=b"start" if same else b"other")
    for rank in pair:
        settled(rank)
        if same:
            eventually("it shares", lambda rank=rank: name(rank) == shared)
        else:
            assert name(rank) is None
            rank.flushed()
            assert name(rank) not in (None, shared)


def test_of_weights_from_other_files_the_bytes_count_too(boot: Boot, other: Path) -> None:
    rank, memory = boot(), Memory()
    update(rank, path=other)
    back(rank)
    of_other = eventually("it shares", lambda: name(rank))
    sleep(rank, memories=[memory], value=b"start")
    eventually("it shares as before", lambda: name(rank) == of_other)
