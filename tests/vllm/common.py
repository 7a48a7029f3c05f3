"""What the tests of real engines share: prompts with a known answer, and a look into the pool from outside."""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import random
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from kvplug.store import KvStore
from tests.lab.env import pool_files
from tests.lab.models import VOCAB, ModelSpec, lora_dir, model_dir
from tests.vllm_lab.engine import InProcess

__all__ = [
    "BLOCK",
    "Case",
    "Control",
    "agree",
    "attached",
    "eventually",
    "make_prompts",
    "requests",
    "storable",
    "zero_pages",
]

BLOCK = 32
"""Tokens in a block of the lab's engines: the smallest span that vLLM's CPU attention takes."""

MIN_MARGIN = 1e-3
"""Least distance, in log-probability, between the token that was chosen and the runner-up along a whole expected
output. Rounding that depends on the batch schedule moves logits by about 1e-5 in float32, a hundred times less."""

SETTLE_S = 15.0
"""Longest wait for what happens in the background: sealing, releasing, reclaiming."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A request and the tokens that an engine without kvplug answers it with."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    salt: str | None = None
    lora: str | None = None

    def request(self, **more: Any) -> dict[str, Any]:
        """The request in the driver's form."""
        out: dict[str, Any] = {"prompt": list(self.prompt), "max_tokens": len(self.tokens), **more}
        if self.salt is not None:
            out.setdefault("salt", self.salt)
        if self.lora is not None:
            out.setdefault("lora", self.lora)
        return out


class Control:
    """An engine without kvplug: the witness for what a request must answer. Started when first asked."""

    def __init__(self, model: ModelSpec, log: Path, **llm: Any) -> None:
        self._model, self._log, self._llm = model, log, llm
        self._engine: InProcess | None = None

    @property
    def engine(self) -> InProcess:
        if self._engine is None:
            self._engine = InProcess(model_dir(self._model), self._log, pool=None, **self._llm)
        return self._engine

    def pick(self, prompts: Iterable[Sequence[int]], count: int, max_tokens: int = 16, lora: Any = None) -> list[Case]:
        """The first *count* of these prompts whose greedy output never comes near a tie, with that output.

        Each runs alone in an engine whose cache was emptied. *lora*: a ``LoraSpec``, or None for the plain model.
        """
        adapter = str(lora_dir(self._model, lora)) if lora is not None else None
        cases: list[Case] = []
        for prompt in prompts:
            case = Case(tuple(prompt), (0,) * max_tokens, lora=adapter)
            self.engine.do("reset")
            (record,) = self.engine.each([case.request(logprobs=2)])
            assert record["cached"] == 0
            if record["margin"] >= MIN_MARGIN:
                cases.append(dataclasses.replace(case, tokens=tuple(record["tokens"])))
            if len(cases) == count:
                return cases
        raise AssertionError(f"only {len(cases)} of the prompts keep clear of a tie, {count} are needed")

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()


def make_prompts(count: int, seed: int, *, tokens: tuple[int, int] = (150, 500), shared: int = 0) -> list[list[int]]:
    """Random prompts of *tokens* (least, most) token ids; the first *shared* ids are the same in all of them."""
    rng = random.Random(seed)
    head = [rng.randrange(3, VOCAB) for _ in range(shared)]
    return [head + [rng.randrange(3, VOCAB) for _ in range(rng.randint(*tokens) - shared)] for _ in range(count)]


def requests(cases: Iterable[Case], **more: Any) -> list[dict[str, Any]]:
    """The cases in the driver's form."""
    return [case.request(**more) for case in cases]


def storable(tokens: int, block: int = BLOCK) -> int:
    """Most tokens of a prompt of that length that can be offered: whole blocks, and one token left to compute."""
    return (tokens - 1) // block * block


def agree(cases: Sequence[Case], records: Sequence[dict[str, Any]]) -> None:
    """Every record has exactly the expected tokens; else says which differ, and from where on."""
    assert len(cases) == len(records)
    wrong = []
    for i, (case, record) in enumerate(zip(cases, records, strict=True)):
        if tuple(record["tokens"]) != case.tokens:
            at = next((k for k, (x, y) in enumerate(zip(case.tokens, record["tokens"], strict=False)) if x != y), -1)
            wrong.append(
                f"request {i} ({len(case.prompt)} tokens, {record['external']} from the pool, {record['local']} from "
                f"the device, {record['preemptions']} preemptions): differs from token {at}"
            )
    assert not wrong, "outputs differ from the engine's without kvplug:\n" + "\n".join(wrong)


@contextlib.contextmanager
def attached(pool: str) -> Any:
    """A store of the test's own on an existing pool."""
    store = KvStore(pool, create=False)
    try:
        yield store
    finally:
        store.close()


def eventually(what: str, check: Callable[[], Any], timeout_s: float = SETTLE_S) -> Any:
    """Asks until the answer is true; fails with *what* and the last answer after the deadline."""
    deadline = time.monotonic() + timeout_s
    while True:
        answer = check()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what} (last answer: {answer!r})"
        time.sleep(0.05)


def zero_pages(pool: str, pages: Iterable[Path]) -> int:
    """Overwrites with zeros, behind everybody's back, the places in the pool that hold exactly these files' bytes.

    Answers how many were found. The segment is searched for the bytes themselves: nothing of kvplug helps.
    """
    segment = pool_files(pool)[0]
    found = 0
    with segment.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        for page in pages:
            data = page.read_bytes()
            at = memory.find(data)
            while at >= 0:
                memory[at : at + len(data)] = bytes(len(data))
                found += 1
                at = memory.find(data, at + len(data))
    return found
