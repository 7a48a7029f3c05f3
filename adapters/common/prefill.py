"""How fast an engine computes prompts: what a fetch from another host has to be faster than."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable

TELLING_TOKENS = 64
"""A step that computes less of prompts says more about the cost of a step than about prefill."""
CHUNK_TOKENS = 16
"""A request of which a step computes fewer tokens is generating."""
SPEED_WEIGHT = 0.3
"""Of the newest step in the average."""


class PrefillSpeed:
    """How many tokens a second this engine computes, from steps that compute many."""

    def __init__(self) -> None:
        self.tokens_per_s: float | None = None
        """None before the first such step."""
        self._steps: deque[tuple[int, float, int]] = deque()
        self._last_end = 0.0

    def began(self, step: int, scheduled: Iterable[int]) -> bool:
        """A step was scheduled, with so many tokens of each request; whether its end is of interest."""
        prompts = tokens = 0
        for n in scheduled:
            tokens += n
            prompts += n if n >= CHUNK_TOKENS else 0
        if prompts < TELLING_TOKENS or 2 * prompts < tokens:
            return False
        self._steps.append((step, time.monotonic(), tokens))
        return True

    def ended(self, step: int) -> None:
        """The engine has this step's results. Steps may overlap: one begins for real when the one before has ended."""
        now = time.monotonic()
        while self._steps and self._steps[0][0] <= step:
            number, began, tokens = self._steps.popleft()
            if number == step and now > (began := max(began, self._last_end)):
                speed, old = tokens / (now - began), self.tokens_per_s
                self.tokens_per_s = speed if old is None else old + SPEED_WEIGHT * (speed - old)
        self._last_end = now
