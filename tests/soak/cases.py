"""What is asked, and what an engine without kvplug answers: the same seed makes the same prompts."""

from __future__ import annotations

import concurrent.futures
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.lab.models import VOCAB
from tests.sglang_lab.server import SglangServer
from tests.vllm.common import MIN_MARGIN
from tests.vllm_lab.engine import InProcess

__all__ = ["LONGEST", "Case", "Witness", "make_prompts"]

LONGEST = 1100
"""Most tokens of a prompt."""
FRESH = (30, 480)
"""Tokens, least and most, that a prompt has to itself."""
OUTPUT = (4, 8, 16, 32)
"""How many tokens are asked for."""
ALONE = 0.2
"""Share of the prompts that begin like no other."""


@dataclass(frozen=True)
class Case:
    """A prompt and the greedy answer of an engine without kvplug."""

    number: int
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


def make_prompts(rng: random.Random, count: int, stems: Sequence[Sequence[int]] = ()) -> list[list[int]]:
    """*count* prompts, most of which go on where an earlier one, or one of *stems*, is cut at any token."""
    out: list[list[int]] = []
    while len(out) < count:
        known = [*stems, *out]
        stem = [] if not known or rng.random() < ALONE else list(rng.choice(known))
        cut = rng.choice((len(stem), rng.randint(0, len(stem))))
        fresh = rng.randint(*FRESH)
        if cut + fresh <= LONGEST:
            out.append(stem[:cut] + [rng.randrange(3, VOCAB) for _ in range(fresh)])
    return out


class Witness:
    """One engine of each kind without kvplug. Both boot at once; they are gone after :meth:`cases`."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._vllm = InProcess(model, folder / "witness-vllm.log", pool=None, env={"OMP_NUM_THREADS": "1"})
        self._sglang = SglangServer(model, folder / "witness-sglang.log", pool=None)

    def cases(self, seed: int, count: int) -> dict[str, list[Case]]:
        """For "vllm" and for "sglang": cases whose output never comes near a tie, each asked alone.

        About *count*, less those few. A third of them continue an answer, so what was generated is asked for again.
        """
        try:
            with concurrent.futures.ThreadPoolExecutor(2) as threads:
                jobs = {
                    "vllm": threads.submit(self._all, seed, count, self._ask_vllm),
                    "sglang": threads.submit(self._all, seed, count, self._ask_sglang),
                }
                return {kind: job.result() for kind, job in jobs.items()}
        finally:
            self._vllm.close()
            self._sglang.close()

    @staticmethod
    def _all(seed: int, count: int, ask: object) -> list[Case]:
        rng = random.Random(seed)
        cases: list[Case] = []

        def add(prompts: list[list[int]]) -> None:
            for prompt in prompts:
                tokens, margin = ask(prompt, rng.choice(OUTPUT))  # type: ignore[operator]
                if margin >= MIN_MARGIN:
                    cases.append(Case(len(cases), tuple(prompt), tuple(tokens)))

        first = make_prompts(rng, count - count // 3)
        add(first)
        add(make_prompts(rng, count // 3, [[*case.prompt, *case.tokens] for case in cases]))
        assert len(cases) > count / 2, f"only {len(cases)} of {count} prompts keep clear of a tie"
        return cases

    def _ask_vllm(self, prompt: list[int], tokens: int) -> tuple[list[int], float]:
        (record,) = self._vllm.generate([{"prompt": prompt, "max_tokens": tokens, "logprobs": 2}])
        return record["tokens"], record["margin"]

    def _ask_sglang(self, prompt: list[int], tokens: int) -> tuple[list[int], float]:
        self._sglang.ready()
        answer = self._sglang.generate(prompt, tokens, margin=True)
        assert answer.margin is not None
        return answer.tokens, answer.margin
