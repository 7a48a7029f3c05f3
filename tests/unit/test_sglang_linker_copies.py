"""The linker's copies: layers in their order, answers in theirs, and nothing sealed or used that was given up."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kvplug.adapters.devices.base import ByteRuns, Int64s, UInt64s  # noqa: E402
from kvplug.adapters.devices.cpu import CpuCopy  # noqa: E402
from kvplug.adapters.sglang import loads as loads_module  # noqa: E402
from kvplug.adapters.sglang import offloads as offloads_module  # noqa: E402
from kvplug.adapters.sglang.devicepools import KV, MAMBA, SWA, DevicePools, LayerBuffer, lay_out  # noqa: E402
from kvplug.adapters.sglang.loads import NO_LOAD, Loads, QueuedLoad  # noqa: E402
from kvplug.adapters.sglang.offloads import Ledger, Offload, Offloads, Pages  # noqa: E402
from kvplug.adapters.sglang.pins import Pins  # noqa: E402
from kvplug.errors import Code, EngineContractError, UnsupportedEngineError  # noqa: E402
from kvplug.store import KvStore  # noqa: E402
from kvplug.threads import troubles  # noqa: E402
from tests.unit.test_sglang_linker_pins import Names, chain, temporary_store  # noqa: E402

PAGE = 4
DEVICE_PAGES = 12
LAYERS = 4


class Rank(Names):
    """What the copies need of a rank's engine."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.said: list[str] = []
        self.errors: list[BaseException] = []

    def siblings(self, replicated: bool = False) -> tuple[int, int]:
        return 1, 0

    def say(self, line: str, level: int = 0) -> None:
        self.said.append(line)

    def caught(self, where: str, error: BaseException) -> None:
        self.errors.append(error)


class GatedCopy(CpuCopy):
    """The real copies, one at a time through a gate that a test holds."""

    def __init__(self) -> None:
        self.gate = threading.Semaphore(0)
        self.begun = 0
        self.open = True
        super().__init__()  # copies nothing, twice
        self.open, self.begun = False, 0

    def _pass(self) -> None:
        self.begun += 1
        if not self.open:
            assert self.gate.acquire(timeout=120)

    def store(self, runs: ByteRuns, block_ids: Int64s, dst: Int64s, after: Any) -> UInt64s:
        self._pass()
        return super().store(runs, block_ids, dst, after)

    def load(self, runs: ByteRuns, src: Int64s, block_ids: Int64s, after: Any) -> None:
        self._pass()
        super().load(runs, src, block_ids, after)


def buffers(seed: int) -> dict[str, list[LayerBuffer]]:
    """A model with every kind of pool: layers 0, 2, 3 of full attention (K and V), 1 windowed, 2 with a state."""
    torch.manual_seed(seed)
    rows = DEVICE_PAGES * PAGE

    def random(*shape: int) -> Any:
        return torch.randint(-128, 127, shape, dtype=torch.int8)

    full = [LayerBuffer(layer, random(rows, 2, 40), PAGE) for layer in (0, 2, 3) for _ in "kv"]
    window = [LayerBuffer(1, random(DEVICE_PAGES, 300), 1), LayerBuffer(1, random(rows, 3, 8), PAGE)]
    return {KV: full, SWA: window, MAMBA: [LayerBuffer(2, random(2, DEVICE_PAGES, 77)[0], 1)]}


SPANS = {KV: PAGE, SWA: PAGE, MAMBA: 1}


def tokens(pages: Sequence[int], span: int = PAGE) -> Any:
    """SGLang's index tensor for device pages."""
    return (torch.tensor(pages)[:, None] * span + torch.arange(span)).reshape(-1)


class Side:
    """One engine's device memory, its linker's copies, and their queues."""

    def __init__(self, store: KvStore, seed: int, device: CpuCopy, most_pages: int = 100) -> None:
        self.rank = Rank()
        self.store = store
        self.buffers = buffers(seed)
        self.pools: DevicePools = lay_out(self.buffers, SPANS, LAYERS, replicated=False)
        sizes = {name: pool.block_nbytes for name, pool in self.pools.sources.items()}
        self.pins = Pins(self.rank, store, sizes, replicated=False, verify=True)
        self.ledger = Ledger(most_pages)
        self.loads = Loads(self.rank, store, self.pools, device)  # type: ignore[arg-type]
        self.offloads = Offloads(self.rank, store, self.pools, device, self.ledger)  # type: ignore[arg-type]

    def offload(self, source: str, hashes: Sequence[str], pages: Sequence[int]) -> Offload:
        keys = self.rank.keys(source, hashes)
        assert keys is not None
        offload = Offload(len(hashes), self.rank.epoch)
        self.ledger.add(offload)
        self.offloads.submit(offload, [Pages(source, keys, tokens(pages, SPANS[source]))], [])
        return offload

    def load(self, rid: str, hashes: list[str], pages: dict[str, list[int]]) -> None:
        """Promises, takes and queues: full attention's pages of all hashes, the windowed sources' of the last ones."""
        assert self.pins.lookup(rid, hashes, {SWA: len(pages[SWA]), MAMBA: 1})[-1] == len(hashes)
        taken = self.pins.take(rid, {name: hashes[len(hashes) - len(ids) :] for name, ids in pages.items()})
        assert taken is not None
        ids = {name: self.pools.sources[name].block_ids(tokens(some, SPANS[name])) for name, some in pages.items()}
        self.loads.queue(rid, QueuedLoad(ids, taken))

    def page(self, source: str, page: int) -> list[Any]:
        """The bytes of a page, buffer by buffer."""
        return [b.tensor[page * b.rows_per_page : (page + 1) * b.rows_per_page].clone() for b in self.buffers[source]]

    def exists(self, source: str, hashes: Sequence[str]) -> list[bool]:
        keys = self.rank.keys(source, hashes)
        assert keys is not None
        answer: list[bool] = self.store.exists(keys).tolist()
        return answer

    def close(self) -> None:
        self.ledger.give_up()
        self.offloads.close()
        self.loads.close()
        self.pins.clear()
        if self.rank.errors:
            raise self.rank.errors[0]


def wait_for(what: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture(scope="module")
def store() -> Iterator[KvStore]:
    with temporary_store("linker-copies", verify="always") as one:
        yield one


@pytest.fixture
def gated() -> GatedCopy:
    return GatedCopy()


@pytest.fixture
def two(store: KvStore, gated: GatedCopy) -> Iterator[tuple[Side, Side]]:
    """(an engine that has stored four pages of every source, one whose copies go through the gate)."""
    one, other = Side(store, 1, CpuCopy()), Side(store, 2, gated)
    yield one, other
    gated.open = True
    gated.gate.release(100)
    one.close()
    other.close()
    assert store.stats().pinned_slots == 0


def fill(side: Side, hashes: list[str], pages: Sequence[int]) -> None:
    for source in SPANS:
        side.offload(source, hashes, pages)
    wait_for(lambda: side.ledger.answered() == 3)
    assert [side.ledger.take() for _ in SPANS] == [True] * 3


# ---- loads -----------------------------------------------------------------------------------------------------------


def test_pages_come_back_whole_and_nothing_else_is_written(two: tuple[Side, Side], gated: GatedCopy) -> None:
    """From pages 7, 1, 4, 9 of one engine to pages 2, 3, 8, 5 of another; windows and states only the last ones."""
    one, other = two
    gated.open = True
    hashes = chain(100, 4)
    fill(one, hashes, [7, 1, 4, 9])
    before = {source: [other.page(source, page) for page in range(DEVICE_PAGES)] for source in SPANS}
    other.load("r", hashes, {KV: [2, 3, 8, 5], SWA: [10, 11], MAMBA: [6]})
    index = other.loads.start()
    assert other.loads.finish(index)
    expected = {KV: {2: 7, 3: 1, 8: 4, 5: 9}, SWA: {10: 4, 11: 9}, MAMBA: {6: 9}}
    for source, mapping in expected.items():
        for page in range(DEVICE_PAGES):
            right = one.page(source, mapping[page]) if page in mapping else before[source][page]
            assert all(torch.equal(a, b) for a, b in zip(other.page(source, page), right, strict=True)), (source, page)
    assert other.rank.counts["loaded_pages"] == 7


def test_layers_land_in_order_and_are_waited_for_one_by_one(two: tuple[Side, Side], gated: GatedCopy) -> None:
    """Layer 0 may be read when it is there, whatever the later ones do; all requests of a batch share each copy."""
    one, other = two
    hashes = chain(101, 4)
    fill(one, hashes, [0, 1, 2, 3])
    other.load("r", hashes, {KV: [2, 3, 8, 5], SWA: [10], MAMBA: [6]})
    other.load("s", hashes[:2], {KV: [0, 1], SWA: [4], MAMBA: [7]})
    index = other.loads.start()
    counter = other.loads.counter
    counter.set_consumer(index)
    landed: list[int] = []

    def forward() -> None:
        for layer in range(LAYERS):
            counter.wait_until(layer)
            landed.append(layer)

    thread = threading.Thread(target=forward)
    thread.start()
    begun = 0
    for layer, copies in enumerate((1, 1, 2, 1)):  # layer 2 has a state as well
        for _ in range(copies):
            begun += 1
            wait_for(partial(lambda n: gated.begun == n, begun))
            assert landed == list(range(layer)), "a layer was given before it was there"
            gated.gate.release()
        wait_for(partial(lambda n: len(landed) == n, layer + 1))
        for theirs, ours in ((2, 8), (0, 0)):
            at = [i for i, buffer in enumerate(other.buffers[KV]) if buffer.layer == layer]
            right, got = one.page(KV, theirs), other.page(KV, ours)
            assert all(torch.equal(right[i], got[i]) for i in at)
    thread.join()
    assert other.loads.finish(index)
    assert gated.begun == begun


def test_finish_does_not_return_while_a_copy_writes(
    two: tuple[Side, Side], gated: GatedCopy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the deadline the forward pass goes on and the load is given up before its next layer; the verdict waits."""
    monkeypatch.setattr(loads_module, "LOAD_TIMEOUT_S", 0.05)
    one, other = two
    hashes = chain(102, 4)
    fill(one, hashes, [0, 1, 2, 3])
    other.load("r", hashes, {KV: [2, 3, 8, 5], SWA: [10], MAMBA: [6]})
    index = other.loads.start()
    other.loads.counter.set_consumer(index)
    other.loads.counter.wait_until(3)
    verdict: list[bool] = []
    thread = threading.Thread(target=lambda: verdict.append(other.loads.finish(index)))
    thread.start()
    time.sleep(0.2)
    assert not verdict
    assert gated.begun == 1
    gated.gate.release()
    thread.join(10)
    assert verdict == [False]
    assert gated.begun == 1, "no further layer was begun"


def test_weights_that_change_during_a_load_fail_no_request(two: tuple[Side, Side], gated: GatedCopy) -> None:
    """SGLang aborts the requests of a load that fails; without kvplug they would run through the change."""
    one, other = two
    hashes = chain(103, 4)
    fill(one, hashes, [0, 1, 2, 3])
    other.load("r", hashes, {KV: [2, 3, 8, 5], SWA: [10], MAMBA: [6]})
    index = other.loads.start()
    wait_for(lambda: gated.begun == 1)
    other.rank.epoch += 1
    gated.open = True
    gated.gate.release()
    assert other.loads.finish(index)
    for near, far in enumerate([2, 3, 8, 5]):
        assert all(torch.equal(*pair) for pair in zip(one.page(KV, near), other.page(KV, far), strict=True))
    other.rank.epoch -= 1


def test_cancelled_and_reset_loads_leave_no_pin(two: tuple[Side, Side], store: KvStore) -> None:
    one, other = two
    hashes = chain(104, 4)
    fill(one, hashes, [0, 1, 2, 3])
    for rid in "rs":
        other.load(rid, hashes, {KV: [2, 3, 8, 5], SWA: [10], MAMBA: [6]})
    assert other.loads.cancel("r")
    assert not other.loads.cancel("r")
    assert store.stats().pinned_slots == 6
    other.loads.reset()
    assert store.stats().pinned_slots == 0
    assert other.loads.start() == NO_LOAD
    assert other.loads.finish(NO_LOAD)
    other.loads.counter.wait_until(3)  # nothing is loaded: returns at once


# ---- offloads --------------------------------------------------------------------------------------------------------


def test_answers_come_in_the_order_of_the_questions(two: tuple[Side, Side], gated: GatedCopy) -> None:
    """Also when a later one has its answer first."""
    _, side = two
    hashes = chain(105, 4)
    side.offload(KV, hashes[:2], [0, 1])
    refused = Offload(1, 0)
    side.ledger.add(refused)
    refused.answer = False
    side.offload(KV, hashes[2:], [2, 3])
    wait_for(lambda: gated.begun == 1)
    assert side.ledger.answered() == 0
    gated.gate.release()
    wait_for(lambda: gated.begun == 2)
    assert side.ledger.answered() == 2
    assert side.ledger.take() is True
    assert side.ledger.take() is False
    gated.gate.release()
    wait_for(lambda: side.ledger.answered() == 1)
    assert side.ledger.take() is True


def test_what_is_stored_is_not_stored_again(two: tuple[Side, Side], gated: GatedCopy) -> None:
    one, other = two
    hashes = chain(106, 4)
    fill(one, hashes[:3], [0, 1, 2])
    gated.open = True
    other.offload(KV, hashes, [0, 1, 2, 3])
    wait_for(lambda: other.ledger.answered() == 1)
    assert other.ledger.take() is True
    assert (other.rank.counts["already_stored_pages"], other.rank.counts["stored_pages"]) == (3, 1)
    other.offload(KV, hashes, [0, 1, 2, 3])
    wait_for(lambda: other.ledger.answered() == 1)
    assert other.ledger.take() is True
    assert gated.begun == 1


@pytest.mark.parametrize("how", ["reset", "reset that can't wait", "weights change"])
def test_what_was_given_up_during_the_copy_is_never_sealed(
    two: tuple[Side, Side], gated: GatedCopy, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """SGLang hands the pages to others at once: what the copy reads from then on may be anybody's."""
    monkeypatch.setattr(offloads_module, "RESET_TIMEOUT_S", 0.05 if how == "reset that can't wait" else 10)
    _, side = two
    hashes = chain(107 + len(how), 4)
    side.offload(KV, hashes, [0, 1, 2, 3])
    wait_for(lambda: gated.begun == 1)
    if how == "weights change":
        side.rank.epoch += 1
        gated.gate.release()
        wait_for(lambda: side.ledger.answered() == 1)
        assert side.ledger.take() is False
        side.rank.epoch -= 1
    else:
        side.ledger.give_up()
        if how == "reset":
            gated.gate.release()
        side.offloads.quiesce()
        assert side.ledger.answered() == 0
        gated.gate.release()
        wait_for(lambda: side.rank.counts["not_stored:given_up"])
    assert side.exists(KV, hashes) == [False] * 4
    side.store.check_integrity()
    gated.open = True
    side.offload(KV, hashes, [0, 1, 2, 3])
    wait_for(lambda: side.ledger.answered() == 1)
    assert side.ledger.take() is True, "the slots were given back"


def test_a_full_pool_is_an_answer(gated: GatedCopy) -> None:
    """What is pinned by somebody else can't make room: not stored, said so, nothing waits."""
    gated.open = True
    with temporary_store("full-linker", pin_budget_share=1.0) as store:
        side = Side(store, 3, gated)
        hashes = chain(120, 60_000)
        nbytes = side.pools.sources[KV].block_nbytes
        keys = side.rank.keys(KV, hashes)
        assert keys is not None
        batch = store.reserve_batch(keys, [nbytes])
        full = int((batch.codes == Code.OK).sum())
        assert full < len(keys)
        side.offload(KV, chain(121, 4), [0, 1, 2, 3])
        wait_for(lambda: side.ledger.answered() == 1)
        assert side.ledger.take() is False
        assert sum(n for name, n in side.rank.counts.items() if name.startswith("not_stored:")) == 4
        store.abort_batch(batch.slots, batch.gens, writers_done=True)
        side.close()


def test_device_pages_are_held_only_up_to_a_share() -> None:
    """Counted until SGLang takes the answer. One alone is always let in, or a long prompt would never be stored."""
    ledger = Ledger(10)
    assert ledger.has_room(50)
    big, small = Offload(8, 0), Offload(2, 0)
    ledger.add(big)
    assert not ledger.has_room(3)
    assert ledger.has_room(2)
    ledger.add(small)
    small.answer = True
    assert not ledger.has_room(1)
    assert ledger.answered() == 0
    big.answer = False
    assert ledger.answered() == 2
    assert [ledger.take(), ledger.take()] == [False, True]
    assert ledger.has_room(10)


# ---- where a page's bytes lie ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("indices", "reason"),
    [
        (torch.arange(3), "no pages"),
        (torch.arange(1, 5), "aligned"),
        (torch.tensor([0, 1, 3, 2]), "aligned"),
        (torch.arange(DEVICE_PAGES * PAGE, DEVICE_PAGES * PAGE + PAGE), f"pages {DEVICE_PAGES}"),
        (torch.arange(-PAGE, 0), "pages -1"),
    ],
)
def test_indices_that_are_no_pages_are_refused(indices: Any, reason: str) -> None:
    pool = lay_out(buffers(4), SPANS, LAYERS, replicated=False).sources[KV]
    with pytest.raises(EngineContractError, match=reason):
        pool.block_ids(indices)


def test_a_block_is_its_layers_one_after_another() -> None:
    """What one layer needs is one range of the block, and the ranges make up the block."""
    pools = lay_out(buffers(5), SPANS, LAYERS, replicated=False)
    for pool in pools.sources.values():
        at = 0
        for layer in pool.layers:
            if layer is not None:
                assert layer.offset == at
                at += layer.runs.part_nbytes
        assert at == pool.block_nbytes
    assert [layer is not None for layer in pools.sources[KV].layers] == [True, False, True, True]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (lambda: LayerBuffer(0, torch.zeros(48, 4, 8)[:, :, :4], PAGE), "not dense"),
        (lambda: LayerBuffer(0, torch.zeros(48, 8)[:, :4], PAGE), "do not lie together"),
        (lambda: LayerBuffer(0, torch.zeros(1, 8).expand(48, 8), 1), "do not lie together"),
        (lambda: LayerBuffer(0, torch.zeros(48, 0), 1), "do not lie together"),
        (lambda: LayerBuffer(9, torch.zeros(48, 8), PAGE), "layers 0 to 9 of 4"),
    ],
)
def test_buffers_that_are_not_plain_are_refused(bad: Callable[[], LayerBuffer], reason: str) -> None:
    with pytest.raises(UnsupportedEngineError, match=reason):
        lay_out({KV: [LayerBuffer(0, torch.zeros(48, 8), PAGE), bad()]}, {KV: PAGE}, LAYERS, replicated=False)


def test_layouts_that_differ_are_described_differently() -> None:
    """The description goes into the namespace: blocks that lie otherwise must never be found."""

    def described(*some: LayerBuffer, span: int = PAGE) -> Any:
        return lay_out({KV: list(some)}, {KV: span}, LAYERS, replicated=False).describe()

    k, v = torch.zeros(48, 2, 8), torch.zeros(48, 2, 4)
    plain = described(LayerBuffer(0, k, PAGE), LayerBuffer(0, v, PAGE))
    assert plain == described(LayerBuffer(0, torch.zeros(96, 2, 8), PAGE), LayerBuffer(0, v, PAGE))
    for other in (
        described(LayerBuffer(0, v, PAGE), LayerBuffer(0, k, PAGE)),
        described(LayerBuffer(0, k, PAGE), LayerBuffer(1, v, PAGE)),
        described(LayerBuffer(0, k.half(), PAGE), LayerBuffer(0, v, PAGE)),
        described(LayerBuffer(0, k, 2), LayerBuffer(0, v, 2), span=2),
        described(LayerBuffer(0, torch.zeros(48, 8, 2), PAGE), LayerBuffer(0, v, PAGE)),
    ):
        assert other != plain


def test_states_are_numbered_one_by_one() -> None:
    pool = lay_out(buffers(6), SPANS, LAYERS, replicated=False).sources[MAMBA]
    assert pool.block_ids(torch.tensor([5, 2, 11])).tolist() == [5, 2, 11]
    assert np.asarray(pool.runs.nbytes).tolist() == [77]


# ---- the threads themselves ------------------------------------------------------------------------------------------


class Faulty(Counter[str]):
    """Figures of a rank whose next change of one of them fails."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.failed = name, False

    def __setitem__(self, name: str, value: int) -> None:
        if name == self.name and not self.failed:
            self.failed = True
            raise ArithmeticError("one that nobody foresaw")
        super().__setitem__(name, value)


def test_an_error_that_nobody_foresaw_ends_no_copy_thread(two: tuple[Side, Side], gated: GatedCopy) -> None:
    """Neither the one that stores nor the one that loads: what comes next is stored and loaded."""
    one, other = two
    gated.open = True
    before = troubles().errors
    one.rank.counts = Faulty("store_ns")
    fill(one, chain(900, 2), [7, 1])
    other.rank.counts = Faulty("load_ns")
    for rid, hashes in (("a", chain(900, 2)), ("b", chain(900, 2))):
        other.load(rid, hashes, {KV: [2, 3], SWA: [10, 11], MAMBA: [6]})
        assert other.loads.finish(other.loads.start())
    for name in ("kvplug-store", "kvplug-load"):
        assert troubles().errors[name] == before.get(name, 0) + 1
    assert one.offloads._thread.is_alive()
    assert other.loads._thread.is_alive()
