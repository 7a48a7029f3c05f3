"""The same calls of Mooncake's, redhare's and kvplug's store, and what each answered.

    dropin_calls.py SYSTEM SERVER FILE

run by the interpreter that has the system (bench/others_install.sh), with SERVER, a Redis or Valkey binary, for the one
that needs it, writes the answers to FILE as JSON. Imports nothing of kvplug; a test calls :func:`answers` with a
KvStore.

An answer is ``codes``, the list that the call gave back or the name of its exception, ``then``, what was there
afterwards, and for a copy out ``right``: the number of bytes in each fragment that are as they should be.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

BENCH = Path(__file__).resolve().parents[2] / "bench"
ROOM_BYTES = 1 << 20
UNTOUCHED = 255
PATTERN = 251
"""The source's bytes are ascending modulo this: none is UNTOUCHED."""
STEP = 4096
Answer = dict[str, Any]


class Memory:
    """Where blocks come from and go to: the first MiB and the second of one registered buffer."""

    def __init__(self, buffer: Any) -> None:
        self.bytes = buffer
        self.source = int(buffer.ctypes.data)
        self.target = self.source + ROOM_BYTES
        buffer[:ROOM_BYTES] = np.arange(ROOM_BYTES) % PATTERN
        self.strange = np.full(STEP, 7, np.uint8)
        """Registered nowhere."""


class Calls:
    """One store, and the calls on it that are compared."""

    def __init__(self, store: Any, memory: Memory) -> None:
        self.store, self.memory = store, memory
        self._case = ""

    def run(self, case: str) -> Answer:
        """One case; its keys are its own."""
        self._case = case
        answer = CASES[case][1](self)
        return {name: value for name, value in answer.items() if value is not None}

    def name(self, key: Any) -> Any:
        """A key of this case alone."""
        return f"{self._case}/{key}" if isinstance(key, str) and key else key

    def exist(self, *keys: Any) -> Any:
        """What batch_is_exist answers."""
        return self._guarded(lambda: self.store.batch_is_exist([self.name(key) for key in keys]))

    def put(self, keys: list[Any], starts: list[Any], sizes: list[Any], *more: Any) -> Any:
        """What a put of fragments at these places of the source answers."""
        at = [[self.memory.source + s for s in one] for one in starts]
        return self._guarded(
            lambda: self.store.batch_put_from_multi_buffers([self.name(key) for key in keys], at, sizes, *more)
        )

    def get(self, keys: list[Any], sizes: list[list[int]], expected: list[list[int]], *more: Any) -> Answer:
        """A get into fragments of these sizes; ``expected``: where in the source each one's bytes should come from."""
        memory = self.memory
        memory.bytes[ROOM_BYTES : 2 * ROOM_BYTES] = UNTOUCHED
        at: list[list[int]] = []
        for one in sizes:
            used = sum(map(len, at))
            at.append([memory.target + STEP * (used + f) for f in range(len(one))])
        codes = self._guarded(
            lambda: self.store.batch_get_into_multi_buffers([self.name(key) for key in keys], at, sizes, *more)
        )
        right = [
            [self._right(a, n, start) for a, n, start in zip(addrs, ns, starts, strict=True)]
            for addrs, ns, starts in zip(at, sizes, expected, strict=True)
        ]
        return {"codes": codes, "right": right}

    def _right(self, addr: int, nbytes: int, start: int) -> int:
        begin = addr - self.memory.source
        found = self.memory.bytes[begin : begin + nbytes]
        right = int((found == (np.arange(start, start + nbytes) % PATTERN)).sum())
        return right if (self.memory.bytes[begin + nbytes : begin + STEP] == UNTOUCHED).all() else -1

    @staticmethod
    def _guarded(call: Callable[[], Any]) -> Any:
        try:
            return [int(x) for x in call()]
        except Exception as e:  # noqa: BLE001 - which one is what is compared
            return type(e).__name__


def _a_and_b(c: Calls) -> None:
    c.put(["a", "b"], [[5], [1000, 2000]], [[100], [150, 250]])


def _put(keys: list[Any], starts: list[Any], sizes: list[Any], look: list[Any] | None = None) -> Any:
    def case(c: Calls) -> Answer:
        codes = c.put(keys, starts, sizes)
        return {"codes": codes, "then": c.exist(*(look or keys))}

    return case


def _get(keys: list[Any], sizes: list[list[int]], expected: list[list[int]], *more: Any) -> Any:
    def case(c: Calls) -> Answer:
        _a_and_b(c)
        return c.get(keys, sizes, expected, *more)

    return case


def _put_twice(start: int, size: int) -> Any:
    def case(c: Calls) -> Answer:
        _a_and_b(c)
        codes = c.put(["a"], [[start]], [[size]])
        return {"codes": codes, "right": c.get(["a"], [[100]], [[5]])["right"]}

    return case


def _twice_in_one(sizes: list[int]) -> Any:
    def case(c: Calls) -> Answer:
        codes = c.put(["a", "a"], [[5], [9]], [[n] for n in sizes])
        return {"codes": codes, "right": c.get(["a"], [[sizes[0]]], [[5]])["right"]}

    return case


def _fourth_of_put(c: Calls) -> Answer:
    config = type(c.store).__module__ == "mooncake.store" and __import__("mooncake.store").store.ReplicateConfig()
    return {"codes": c.put(["a"], [[5]], [[100]], config or object()), "then": c.exist("a")}


def _unregistered_put(c: Calls) -> Answer:
    far = c.memory.strange.ctypes.data - c.memory.source
    return {"codes": c.put(["a", "b"], [[far], [5]], [[100], [100]]), "then": c.exist("a", "b")}


def _unregistered_get(c: Calls) -> Answer:
    _a_and_b(c)
    c.memory.strange[:] = UNTOUCHED
    at = [[int(c.memory.strange.ctypes.data)]]
    codes = c._guarded(lambda: c.store.batch_get_into_multi_buffers([c.name("a")], at, [[100]]))
    return {"codes": codes, "right": [[int((c.memory.strange[:100] == (np.arange(5, 105) % PATTERN)).sum())]]}


def _too_large(c: Calls) -> Answer:
    huge = [[0] * 700, [5]]
    return {"codes": c.put(["a", "b"], huge, [[ROOM_BYTES] * 700, [100]]), "then": c.exist("a", "b")}


def _register(size: int, offset: int = 0) -> Any:
    def case(c: Calls) -> Answer:
        return {"codes": c._guarded(lambda: [c.store.register_buffer(c.memory.source + offset, size)])}

    return case


def _unregister(c: Calls) -> Answer:
    return {"codes": c._guarded(lambda: [c.store.unregister_buffer(c.memory.source + 12345)])}


def _numpy(c: Calls) -> Answer:
    at, size = np.array([[c.memory.source]]), np.array([[100]])
    return {"codes": c._guarded(lambda: c.store.batch_put_from_multi_buffers([c.name("a")], at, size))}


def _names(*names: str) -> Any:
    def case(c: Calls) -> Answer:
        values = ([c.name("a")], [[c.memory.source]], [[100]])
        given = dict(zip(names, values, strict=True))
        return {"codes": c._guarded(lambda: c.store.batch_put_from_multi_buffers(**given))}

    return case


CASES: dict[str, tuple[str, Callable[[Calls], Answer]]] = {
    "put": ("put two keys, of one fragment and of two", _put(["a", "b"], [[5], [9, 3000]], [[100], [150, 250]])),
    "put-again": ("put a key that is there", _put_twice(5, 100)),
    "put-again-bytes": ("… with other bytes", _put_twice(9, 100)),
    "put-again-size": ("… with another size", _put_twice(5, 200)),
    "put-twice": ("put one key twice in a call, other bytes", _twice_in_one([100, 100])),
    "put-twice-size": ("… other sizes", _twice_in_one([100, 200])),
    "put-config": ("put with a fourth argument", _fourth_of_put),
    "put-empty-fragment": ("put fragments of 0 and 100 bytes", _put(["a"], [[9, 5]], [[0, 100]])),
    "put-no-byte": ("put a key of one empty fragment, and another key", _put(["a", "b"], [[5], [5]], [[0], [100]])),
    "put-no-fragment": ("put a key without fragments, and another", _put(["a", "b"], [[], [5]], [[], [100]])),
    "put-too-large": ("put a block larger than the store, and another key", _too_large),
    "put-fewer-addresses": ("put 2 keys, 1 list of addresses", _put(["a", "b"], [[5]], [[100], [100]])),
    "put-fewer-sizes": ("put 2 keys, 1 list of sizes", _put(["a", "b"], [[5], [5]], [[100]])),
    "put-fewer-keys": ("put 1 key, 2 lists of each", _put(["a"], [[5], [5]], [[100], [100]])),
    "put-uneven": (
        "put 2 keys, one with 2 addresses and 1 size",
        _put(["a", "b"], [[5, 9], [5]], [[100], [100]]),
    ),
    "put-unregistered": ("put from memory that is not registered, and another key", _unregistered_put),
    "put-empty-name": ("put under the empty name, and another", _put(["", "b"], [[5], [5]], [[100], [100]])),
    "put-nothing": ("put no keys", lambda c: {"codes": c.put([], [], [])}),
    "put-numpy": ("put with arrays for addresses and sizes", _numpy),
    "put-float": ("put with a size that is a float", _put(["a"], [[5]], [[10.0]])),
    "put-negative": ("put with a negative size", _put(["a"], [[5]], [[-5]])),
    "put-names-redhare": ("put with keys=, addrs=, sizes=", _names("keys", "addrs", "sizes")),
    "put-names-mooncake": (
        "put with keys=, all_buffer_ptrs=, all_sizes=",
        _names("keys", "all_buffer_ptrs", "all_sizes"),
    ),
    "get": (
        "get two keys that are there and one that is not",
        _get(["a", "b", "c"], [[100], [150, 250], [10]], [[5], [1000, 2000], [0]]),
    ),
    "get-fourth": ("get with a fourth argument", _get(["a"], [[100]], [[5]], True)),
    "get-larger": ("get 100 bytes into 300", _get(["a"], [[300]], [[5]])),
    "get-larger-fragments": ("get 100 bytes into 60, 60 and 10", _get(["a"], [[60, 60, 10]], [[5, 65, 0]])),
    "get-smaller": (
        "get 100 bytes into 60, and another key",
        _get(["a", "b"], [[60], [150, 250]], [[5], [1000, 2000]]),
    ),
    "get-twice": ("get one key twice in a call", _get(["a", "a"], [[100], [100]], [[5], [5]])),
    "get-empty-first": ("get 100 bytes into 0 and 100", _get(["a"], [[0, 100]], [[0, 5]])),
    "get-empty-middle": ("get 100 bytes into 50, 0 and 50", _get(["a"], [[50, 0, 50]], [[5, 0, 55]])),
    "get-no-fragment": (
        "get into no fragments, and another key",
        _get(["a", "b"], [[], [150, 250]], [[], [1000, 2000]]),
    ),
    "get-unregistered": ("get into memory that is not registered", _unregistered_get),
    "get-nothing": ("get no keys", lambda c: c.get([], [], [])),
    "get-fewer-sizes": (
        "get 2 keys, 1 list of each",
        lambda c: (_a_and_b(c), {"codes": c.get(["a", "b"], [[100]], [[5]])["codes"]})[1],
    ),
    "exist": (
        "look for one key that is there, twice, and for one that is not",
        lambda c: (_a_and_b(c), {"codes": c.exist("a", "a", "c")})[1],
    ),
    "exist-nothing": ("look for no keys", lambda c: {"codes": c.exist()}),
    "exist-bytes": ("look for a key of 32 bytes", lambda c: {"codes": c.exist(b"k" * 32)}),
    "exist-none": ("look for the key None", lambda c: {"codes": c.exist(None)}),
    "exist-surrogate": ("look for a name that UTF-8 can't spell", lambda c: {"codes": c.exist("\ud800")}),
    "register-again": ("register the same memory again", _register(1 << 21)),
    "register-inside": ("register a part of it too", _register(1000, 100)),
    "register-nothing": ("register 0 bytes", _register(0)),
    "unregister-unknown": ("unregister what is not registered", _unregister),
}
"""What each case is, and how it is done."""
LAST_CASE = "exist-no-index"
LAST_CASE_IS = "look for two keys when what knows of all keys is gone"
"""Look-ups when what knows of all keys is gone: done last, by :func:`main` and by the test, each in its way."""


def answers(store: Any, buffer: Any, cases: list[str]) -> dict[str, Answer]:
    """What ``store`` answers; ``buffer``, uint8[2 MiB or more], is registered with it."""
    calls = Calls(store, Memory(buffer))
    return {case: calls.run(case) for case in cases}


def main(system: str, server: str, file: str) -> None:
    """Start the system's servers and its store, make all calls, write down the answers."""
    sys.path.insert(0, str(BENCH))
    import others

    others.LIBC.prctl(others.PR_SET_PDEATHSIG, others.SIGKILL)
    others.own_network()
    servers = others.SYSTEMS[system].servers(server)
    buffer = np.zeros(others.BUFFER_BYTES, np.uint8)
    store = others.SYSTEMS[system](others.WRITER, buffer.ctypes.data)._store
    told = {}
    for case in CASES:
        if case == "unregister-unknown" and not hasattr(store, "unregister_buffer"):
            told[case] = {"codes": "no such call"}
            continue
        told |= answers(store, buffer, [case])
        Path(file).write_text(json.dumps(told))
    for one in servers:
        one.kill()
        one.wait()
    told[LAST_CASE] = {"codes": Calls(store, Memory(buffer)).exist("b", "c")}
    Path(file).write_text(json.dumps(told))
    os._exit(0)  # neither ends well without its servers


if __name__ == "__main__":
    main(*sys.argv[1:])
