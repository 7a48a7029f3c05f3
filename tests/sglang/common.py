"""What the tests of real SGLang servers share: prompts with a known answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.lab.models import ModelSpec
from tests.sglang_lab.server import PAGE, Answer, SglangServer
from tests.vllm.common import MIN_MARGIN, make_prompts

__all__ = ["PROMPT_TOKENS", "TOKENS", "Case", "Control", "agree", "pick", "serve"]

TOKENS = 8
"""Tokens of an answer, unless a test says otherwise."""
PROMPT_TOKENS = (6 * PAGE, 10 * PAGE)
"""Least and most tokens of a prompt, unless a test says otherwise."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A prompt and what SGLang without kvplug answers; ``more``: what else goes into the request."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    more: tuple[tuple[str, Any], ...] = ()

    @property
    def whole(self) -> int:
        """Tokens in pages that can be had from a cache: whole ones, with one token left to compute."""
        return (len(self.prompt) - 1) // PAGE * PAGE


def pick(
    witness: SglangServer,
    count: int,
    seed: int,
    *,
    max_tokens: int = TOKENS,
    tokens: tuple[int, int] = PROMPT_TOKENS,
    shared: int = 0,
    **more: Any,
) -> list[Case]:
    """Prompts of which the greedy answer never comes near a tie, with that answer, computed without any cache.

    *tokens*: least and most of a prompt, the first *shared* of which are the same in all. *more*: of the request.
    """
    cases: list[Case] = []
    for prompt in make_prompts(2 * count + 4, seed, tokens=tokens, shared=shared):
        witness.flush()
        answer = witness.generate(prompt, max_tokens, margin=True, **more)
        assert answer.cached == 0
        if answer.margin is not None and answer.margin >= MIN_MARGIN:
            cases.append(Case(tuple(prompt), tuple(answer.tokens), tuple(more.items())))
        if len(cases) == count:
            return cases
    raise AssertionError(f"only {len(cases)} of the prompts keep clear of a tie, {count} are needed")


class Control:
    """A server without kvplug: the witness for what a request must answer. Started when first asked."""

    def __init__(self, model: ModelSpec, log: Path, **arguments: Any) -> None:
        self._model, self._log, self._arguments = model, log, arguments
        self._server: SglangServer | None = None

    @property
    def server(self) -> SglangServer:
        if self._server is None:
            self._server = SglangServer(self._model, self._log, pool=None, **self._arguments).ready()
        return self._server

    def pick(self, count: int, seed: int, **more: Any) -> list[Case]:
        """See :func:`pick`."""
        return pick(self.server, count, seed, **more)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()


def agree(cases: Sequence[Case], answers: Sequence[Answer]) -> None:
    """Every answer has exactly the expected tokens; else says which differ, and from where on."""
    assert len(cases) == len(answers)
    wrong = []
    for i, (case, answer) in enumerate(zip(cases, answers, strict=True)):
        if tuple(answer.tokens) != case.tokens:
            at = next((k for k, (x, y) in enumerate(zip(case.tokens, answer.tokens, strict=False)) if x != y), -1)
            wrong.append(f"answer {i} ({len(case.prompt)} tokens, cached: {answer.details}): differs from token {at}")
    assert not wrong, "answers differ from SGLang's without kvplug:\n" + "\n".join(wrong)


def serve(server: SglangServer, cases: Iterable[Case]) -> list[Answer]:
    """The cases one after another, each with the right answer."""
    cases = list(cases)
    answers = [server.generate(case.prompt, len(case.tokens), **dict(case.more)) for case in cases]
    agree(cases, answers)
    return answers
