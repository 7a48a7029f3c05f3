"""Compute that writes blocks while they are stored and reads them while they are loaded, and what would go wrong.

Each round the engine's stream is kept busy, then writes a pattern into some blocks, takes a mark and asks for their
store; meanwhile it goes on: other blocks are read into a witness, after which a load of something else into the very
same blocks is asked for. So a store that does not wait finds the pattern of an earlier round, and a load that does not
wait is found in the witness. Rounds follow each other without a pause, on two copy threads, as an engine's steps do.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from kvplug.adapters.devices.base import ByteRuns, DeviceCopy
from kvplug.shm.copy import hash_batch
from tests.devices.conformance import Rig

LAYERS = 3
STORED = 8
LOADED = 8
BLOCKS = STORED + LOADED
BYSTANDERS = 4
"""Blocks that compute goes on writing while copies of the others run."""
AFTERWARDS = 8
"""How often in a round."""
ROUND_S = 120.0
DELAY_CYCLES = 4_000_000
"""How long the engine's stream is kept busy before it writes: some two milliseconds, in which a copy thread that does
not wait has long begun."""


@dataclass
class Outcome:
    """What went wrong in how many rounds."""

    rounds: int = 0
    stale_stores: int = 0
    """Slots that held the bytes of another round, or of several."""
    overtaken_reads: int = 0
    """Blocks that compute found loaded before it had read them."""
    lost_loads: int = 0
    """Blocks that did not hold what was loaded."""
    wrong_checksums: int = 0
    touched_bystanders: int = 0
    """Blocks that nobody copied and that did not hold what compute wrote."""
    errors: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> int:
        """Of anything."""
        copies = self.stale_stores + self.lost_loads + self.wrong_checksums + self.touched_bystanders
        return copies + self.overtaken_reads + len(self.errors)


class _Thread:
    """A copy thread as the adapters have them: takes calls in order, and hands back what became of each."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def begin(self, call: Callable[[], Any]) -> None:
        self._calls.put(call)

    def answer(self) -> Any:
        return self._answers.get(timeout=ROUND_S)

    def end(self) -> None:
        self._calls.put(None)
        self._thread.join(ROUND_S)

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                self._answers.put(call())
            except Exception as error:  # noqa: BLE001 - told to the test
                self._answers.put(error)


def _eagerly(work: Callable[[], None]) -> None:
    work()


class Race:
    """Blocks of a few layers on the device, and slots for them."""

    def __init__(self, rig: Rig, run_bytes: int, *, compute: Callable[[Callable[[], None]], None] = _eagerly) -> None:
        """
        Args:
            rig: copies on trial, and where their memory is.
            run_bytes: of a layer of a block; a multiple of 8.
            compute: carries out what the engine gives its device; as it is by default, or out of a graph.
        """
        self.rig = rig
        self.words = run_bytes // 8
        blocks = BLOCKS + BYSTANDERS
        self.layers = [torch.zeros((blocks, self.words), dtype=torch.int64, device=rig.device) for _ in range(LAYERS)]
        self.witness = [torch.zeros((LOADED, self.words), dtype=torch.int64, device=rig.device) for _ in range(LAYERS)]
        self.pattern = torch.zeros(1, dtype=torch.int64, device=rig.device)
        self.runs = ByteRuns.of([(layer.data_ptr(), run_bytes, run_bytes) for layer in self.layers])
        self.part = self.runs.part_nbytes
        rng = np.random.default_rng()
        self.slots = rig.slots(self.part, STORED + LOADED, rng)
        self.addresses = rig.host.ctypes.data + self.slots
        self.compute = compute

    def step(self) -> None:
        """One forward pass: late, it writes the blocks to be stored and reads those that are about to be loaded."""
        if self.rig.device != "cpu":
            torch.cuda._sleep(DELAY_CYCLES)
        for layer, witness in zip(self.layers, self.witness, strict=True):
            layer[:STORED] = self.pattern
            witness.copy_(layer[STORED:BLOCKS])

    def go_on(self) -> None:
        """What the engine's stream does while the copies run."""
        for _ in range(AFTERWARDS):
            for layer in self.layers:
                layer[BLOCKS:] += 1

    def words_of(self, at: int) -> np.ndarray:
        """A slot's content."""
        return self.rig.host[at : at + self.part].view(np.int64)

    def run(self, rounds: int) -> Outcome:
        """So many rounds; what went wrong in them."""
        out, copy = Outcome(), self.rig.copy
        stores, loads = _Thread("race-store"), _Thread("race-load")
        written, read = np.arange(STORED), np.arange(STORED, BLOCKS)
        own, other = self.addresses[:STORED], self.addresses[STORED:]
        for number in range(1, rounds + 1):
            for at in self.slots[STORED:].tolist():
                self.words_of(at)[:] = -number
            self.pattern.fill_(number)
            self.compute(self.step)
            after = copy.mark()
            stores.begin(lambda after=after: copy.store(self.runs, written, own, after))
            loads.begin(lambda after=after: copy.load(self.runs, other, read, after))
            self.go_on()
            stored, loaded = stores.answer(), loads.answer()
            out.errors += [repr(answer) for answer in (stored, loaded) if isinstance(answer, Exception)]
            if out.errors:
                break
            self.look(number, stored, out)
            out.rounds += 1
        stores.end()
        loads.end()
        return out

    def look(self, number: int, sums: np.ndarray, out: Outcome) -> None:
        """Both copies of a round have ended."""
        found = [self.words_of(at) for at in self.slots[:STORED].tolist()]
        out.stale_stores += sum(bool((words != number).any()) for words in found)
        hashes = _sums_of(self.addresses[:STORED], self.part)
        out.wrong_checksums += int((hashes != sums).sum())
        for layer, witness in zip(self.layers, self.witness, strict=True):
            out.overtaken_reads += int((witness != 1 - number).any(dim=1).sum())  # what the round before had loaded
            out.lost_loads += int((layer[STORED:BLOCKS] != -number).any(dim=1).sum())
            out.touched_bystanders += int((layer[BLOCKS:] != AFTERWARDS * number).any(dim=1).sum())


def _sums_of(addresses: np.ndarray, nbytes: int) -> np.ndarray:
    """Checksums of slots as they are now."""
    out = np.empty(len(addresses), np.int64)
    hash_batch(addresses, np.full(len(addresses), nbytes), out)
    return out.view(np.uint64)


def without_waits(copy: Any) -> DeviceCopy:
    """The same copies, which don't wait for their marks. For showing that the race notices."""
    copy._await = lambda lane, after: None
    return copy
