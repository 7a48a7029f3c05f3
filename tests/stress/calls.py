"""Calls with arbitrary arguments: what is wrong is a typed error at the call, and changes nothing.

Each argument is now and then what it should be, and else anything: numbers that no int64 holds, other types, ragged and
huge lists, arrays of other dtypes, orders and lengths, released views, names that UTF-8 can't say. Addresses are those
of memory that is there, or ones that can't be any: a raw address that is wrong but possible ends the process, here as
in C, which is why the calls that take names ask for registered buffers.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Final

import hypothesis
import numpy as np
from hypothesis import HealthCheck
from hypothesis import strategies as st

from kvplug import KvStore
from kvplug.config import Config
from kvplug.errors import KvplugError
from kvplug.shm import segment
from tests.inside import pool_of

BLOCK: Final = 4096
CALLS_AN_EXAMPLE: Final = 20
"""At most, and at least half as many."""
BATCH: Final = 5000
BATCH_TIMEOUT_S: Final = 3600
KEYS: Final = np.random.default_rng(3).integers(0, 256, (6, 32), np.uint8)
SCRATCH: Final = np.zeros((8, BLOCK), np.uint8)
AT: Final = SCRATCH.ctypes.data
NATURAL: Final = (ValueError, TypeError, IndexError, OverflowError)
"""What a KvplugError of a wrong argument is besides, so that callers who know nothing of kvplug catch it as well."""


class Name(str):
    """A str that is none exactly."""

    __slots__ = ()


class Sizes(list[int]):
    """A list that is none exactly."""


def _released() -> memoryview:
    view = memoryview(bytearray(BLOCK))
    view.release()
    return view


def _frozen() -> np.ndarray:
    array = np.zeros(BLOCK, np.uint8)
    array.flags.writeable = False
    return array


ODD: Final = (
    None,
    True,
    False,
    0,
    -1,
    1,
    63,
    1 << 31,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
    1 << 70,
    -(1 << 63),
    -(1 << 70),
    1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\ud800",
    b"",
    b"k" * 31,
    b"k" * 32,
    b"k" * 33,
    bytearray(32),
    Name("n" * 32),
    Sizes([BLOCK]),
    np.float64(2.0),
    np.int8(-3),
    np.uint64((1 << 64) - 1),
    np.bool_(True),
    np.array(5),
    np.zeros(0, np.int64),
    np.zeros(3),
    np.zeros((2, 2), np.int64),
    np.zeros((0, 32), np.uint8),
    np.zeros((2, 32), np.uint16),
    np.asfortranarray(np.ones((4, 32), np.uint8)),
    np.zeros((4, 64), np.uint8)[:, ::2],
    np.array(["a"]),
    np.array([None]),
    np.array([1 << 63], np.uint64),
    [],
    [None],
    [True],
    [[]],
    [[], [1]],
    [1, [2]],
    (),
    {},
    {1: 2},
    set(),
    range(3),
    object(),
    int,
    Ellipsis,
)
odd = st.sampled_from(range(len(ODD))).map(ODD.__getitem__)
made_anew = st.sampled_from(
    (_released, _frozen, lambda: iter(()), lambda: (x for x in (1, 2)), lambda: [BLOCK] * 100_000)
)
wild = st.one_of(odd, made_anew.map(lambda make: make()), st.lists(odd, max_size=4), st.integers(), st.text(max_size=3))


def mostly(right: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """What it should be, three times of four."""
    return st.integers(0, 3).flatmap(lambda n: right if n else wild)


n_keys = st.integers(0, 6)
keys = st.one_of(
    n_keys.map(lambda n: KEYS[:n]), n_keys.map(lambda n: [k.tobytes() for k in KEYS[:n]]), st.just(KEYS[:2])
)
names = st.lists(st.sampled_from(["a", "b", "ä", Name("n"), b"k" * 32]), max_size=4)
buffers = st.one_of(
    n_keys.map(lambda n: SCRATCH[:n]),
    st.lists(st.sampled_from([SCRATCH[0], SCRATCH[1, :100], bytearray(BLOCK), bytes(7), _frozen()]), max_size=4),
    st.just(SCRATCH[:2]),
)
sizes = st.one_of(
    st.lists(st.integers(1, 5000), min_size=1, max_size=4),
    st.lists(st.sampled_from([0, -1, 1, BLOCK, (1 << 62), (1 << 63) - 1, 1 << 40, 1 << 64]), max_size=70),
    st.just(np.array([100, 200], np.int64)),
    st.just(np.array([1 << 63, 1 << 63], np.uint64)),
)
real = st.integers(0, 7).map(lambda i: AT + i * BLOCK)
impossible = st.sampled_from([0, -1, -AT, 1 << 57, (1 << 63) - 1, 1 << 63, -(1 << 63), 1 << 70])
lengths = st.sampled_from([0, 1, 64, BLOCK, -1, -BLOCK, (1 << 63) - 1, (1 << 63) - AT, 1 << 62, 1 << 63, 1 << 70, True])
address_lists = st.lists(st.lists(st.one_of(real, real, impossible), max_size=3), max_size=3)
length_lists = st.lists(st.lists(lengths, max_size=3), max_size=3)
grid = st.tuples(n_keys, st.integers(0, 3)).map(
    lambda shape: AT + np.arange(shape[0] * shape[1], dtype=np.int64).reshape(shape) % 8 * 64
)
grid_lengths = st.one_of(st.lists(st.sampled_from([0, 1, 64, -1, 1 << 41, 1 << 63]), max_size=3), st.just([64, 64]))
slots = st.one_of(
    st.lists(st.integers(-3, 300), max_size=4).map(lambda x: np.array(x, np.int64)),
    st.lists(st.sampled_from([0, 1, -1, 1 << 40, (1 << 63) - 1]), max_size=4),
)
flag = st.booleans()
family = st.tuples(st.integers(-1, 130), st.integers(-1, 130))
part = st.integers(-2, 70)

ARGUMENTS: Final[dict[str, tuple[st.SearchStrategy[Any], ...]]] = {
    "put": (keys, buffers),
    "get_into": (keys, buffers),
    "exists": (keys,),
    "match_prefix": (keys,),
    "touch": (keys,),
    "remove": (keys,),
    "pin": (keys,),
    "reserve": (keys, st.integers(-1, 70_000)),
    "pin_batch": (keys,),
    "reserve_batch": (keys, sizes),
    "unpin": (slots, slots),
    "complete": (slots, slots, part, slots),
    "abort_batch": (slots, slots, flag),
    "acknowledge": (slots, slots),
    "still_writing": (slots, slots),
    "verify_parts": (slots, slots, part),
    "part_offsets": (sizes,),
    "put_fragments": (keys, grid, grid_lengths),
    "get_fragments": (keys, grid, grid_lengths),
    "register_buffer": (st.one_of(real, impossible), lengths),
    "unregister_buffer": (st.one_of(real, impossible),),
    "batch_put_from_multi_buffers": (names, address_lists, length_lists),
    "batch_get_into_multi_buffers": (names, address_lists, length_lists),
    "batch_is_exist": (names,),
}
OPTIONS: Final[dict[str, dict[str, st.SearchStrategy[Any]]]] = {
    "reserve_batch": {"siblings": family},
    "put_fragments": {"siblings": family},
    "pin_batch": {"prefix": flag, "touch": flag},
}
RAW: Final = frozenset({"register_buffer", "put_fragments", "get_fragments"})
"""Their addresses are taken for what they are said to be: nothing but what is there, or can't be."""


@st.composite
def _call(draw: st.DrawFn) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    name = draw(st.sampled_from(sorted(ARGUMENTS)))
    given = tuple(draw(one if name in RAW and i else mostly(one)) for i, one in enumerate(ARGUMENTS[name]))
    options = {key: draw(mostly(one)) for key, one in OPTIONS.get(name, {}).items() if draw(flag)}
    return name, given, options


examples = st.lists(_call(), min_size=CALLS_AN_EXAMPLE // 2, max_size=CALLS_AN_EXAMPLE)


@dataclasses.dataclass
class Tally:
    """What a run did and found."""

    calls: int = 0
    refused: int = 0
    notes: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class _Said:
    """The call as text, made when it is asked for: the longest lists take longer to print than to refuse."""

    name: str
    given: tuple[Any, ...]
    options: dict[str, Any]

    def __str__(self) -> str:
        words = [f"{x!r:.60}" for x in self.given] + [f"{key}={x!r:.60}" for key, x in self.options.items()]
        return f"{self.name}({', '.join(words)})"


class Subject:
    """A small store whose upkeep is stopped, so that only calls change anything."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.store = KvStore(
            config=Config(pool=name, size=1 << 20, slab=1 << 16, min_block=4096, prefault=False, lock_timeout_s=5.0)
        )
        self.store.put(KEYS[:3], SCRATCH[:3])
        self.store.register_buffer(AT, SCRATCH.nbytes)
        pool_of(self.store)._maintenance.stop()

    def words(self) -> np.ndarray:
        """All tables, as they are now."""
        pool = pool_of(self.store)
        return pool.T[: pool.geometry.data_offset // 8].copy()

    def one(self, tally: Tally, name: str, given: tuple[Any, ...], options: dict[str, Any]) -> None:
        """A call; AssertionError says what it did that it must not."""
        before = self.words()
        tally.calls += 1
        said = _Said(name, given, options)
        call: Callable[..., Any] = getattr(self.store, name)
        try:
            answer = call(*given, **options)
        except KvplugError as e:
            refused: KvplugError | None = e
        except Exception as e:
            raise AssertionError(f"{said} raised {type(e).__name__}: {e}") from e
        else:
            refused = None
        if refused is not None:
            tally.refused += 1
            assert isinstance(refused, NATURAL), f"{said} raised {type(refused).__name__}, which is no {NATURAL}"
            assert (self.words() == before).all(), f"{said} raised {type(refused).__name__} and changed the tables"
            return
        if name in ("reserve", "reserve_batch", "pin", "pin_batch"):
            del answer  # unread: given back by the next call
        else:
            self._give_back_registration(name)

    def _give_back_registration(self, name: str) -> None:
        if name in ("register_buffer", "unregister_buffer"):
            self.store.register_buffer(AT, SCRATCH.nbytes)

    def check(self) -> None:
        """The tables are whole, and nothing is held."""
        pool_of(self.store).maintain()
        self.store.check_integrity()
        s = self.store.stats()
        assert (s.pinned_slots, s.writing_slots) == (0, 0), s

    def end(self) -> None:
        """Gone, pool and all."""
        self.store.close()
        segment.remove_pool(self.name, force=True)


def run(name: str, calls: int, seed: int, said: Callable[[Tally], None] = lambda tally: None) -> Tally:
    """So many calls. What was found is in ``notes``, as the smallest example that shows it.

    Batches have a process each: one that ends is a finding and not the end of the run, and hypothesis, which keeps a
    record of every example, does not grow. ``said`` hears of each batch.
    """
    tally = Tally()
    batch = 0
    while tally.calls < calls and not tally.notes:
        count = min(BATCH, calls - tally.calls)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            found = process.submit(run_here, f"{name}-{batch}", count, seed + batch)
            try:
                one = found.result(timeout=BATCH_TIMEOUT_S)
            except BrokenProcessPool:
                one = Tally(notes=[f"the process of the batch with seed {seed + batch} ended"])
        tally.calls += one.calls
        tally.refused += one.refused
        tally.notes += one.notes
        said(tally)
        batch += 1
    return tally


def run_here(name: str, calls: int, seed: int) -> Tally:
    """At least so many calls in this process, fewer if an example shows a fault."""
    tally = Tally()
    subject = Subject(name)

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=math.ceil(calls / (CALLS_AN_EXAMPLE // 2)),
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
    )
    @hypothesis.given(examples)
    def all_of(example: list[tuple[str, tuple[Any, ...], dict[str, Any]]]) -> None:
        if tally.calls >= calls:
            return
        for one in example:
            subject.one(tally, *one)
        subject.check()

    try:
        all_of()
    except AssertionError as e:
        tally.notes.append(str(e))
    finally:
        subject.end()
    return tally
