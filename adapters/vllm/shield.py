"""What keeps an engine running whatever goes wrong in kvplug: an error costs the cache, never a request."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from kvplug.errors import KvplugError

T = TypeVar("T")
U = TypeVar("U")


class Shield:
    """Calls that may fail. The first error is said, in one loud line; each is counted, and switches kvplug off."""

    def __init__(self, logger: logging.Logger, switch_off: Callable[[], None] = lambda: None) -> None:
        self.counts: Counter[str] = Counter()
        """What to add to kvplug's counters."""
        self._logger, self._switch_off = logger, switch_off
        self._said = False

    def __call__(self, what: str, call: Callable[..., T], otherwise: U, *args: Any) -> T | U:
        """What ``call`` answers, or ``otherwise`` if it raises; ``what`` it was is for the log."""
        try:
            return call(*args)
        except Exception as error:
            if not self._said and isinstance(error, KvplugError):
                self._logger.warning("kvplug: OFF: %s", error)
            elif not self._said:
                self._logger.exception("kvplug: OFF, an error in %s; the engine runs on without kvplug", what)
            self._said = True
            self.counts["hook_errors"] += 1
            self._switch_off()
            return otherwise

    def take_counts(self) -> Counter[str]:
        """The counts since the last call."""
        counts, self.counts = self.counts, Counter()
        return counts
