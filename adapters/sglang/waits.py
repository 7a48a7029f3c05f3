"""Linker mode: requests that wait a moment because another host may have their prompt.

A lookup runs on SGLang's scheduler thread and asks nobody. Where it finds less than the whole prompt, the rest is
wanted of other hosts in the background, and SGLang, which matches a request's prefix anew in every step in which it
might admit it, is kept from admitting it until that has ended or its deadline has passed; others go first. Then the
request is matched once more, and what came is an ordinary hit.

**Alike on all ranks.** Each rank fetches its own pages, as fast as it can; that a request waits, and that it has waited
long enough, is agreed on: by what SGLang itself has made equal (whether it asked, and the length it settled on), and by
one small reduction in each step for each request that waits. A rank whose kvplug is off takes part in that as well.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvplug.remote.request import Fetch, Outcome

MAX_KNOWN = 1024
"""Requests of which it is remembered that they have waited, or need not."""
PAUSE_S = 0.001
"""How long a step lasts in which nothing can run but requests wait: the threads that fetch need the interpreter."""
Begin = Callable[[], Fetch | None]
"""Begins to fetch what a request lacks; None where this rank can't."""


@dataclass
class _Waiting:
    fetch: Fetch | None
    over: bool = False


class Waits:
    """The requests of one rank that wait. Used from SGLang's scheduler thread alone."""

    def __init__(
        self, agree: Callable[[Sequence[bool]], list[bool]], *, can_fetch: bool, may_wait: bool = True
    ) -> None:
        """``agree``: for each of some statements, whether it holds on all ranks, which all ask at the same time.
        ``may_wait``: without it, what is fetched is for the next request."""
        self._agree = agree
        self._can_fetch = can_fetch
        self._may_wait = may_wait
        self._on: bool | None = None
        self._known: OrderedDict[str, _Waiting] = OrderedDict()

    def matched(self, rid: str, lacks: bool, begin: Begin) -> None:
        """SGLang has matched a request's prefix. ``lacks``, alike on all ranks: the pool was asked, and had not all."""
        if self._on is None:
            (self._on,) = self._agree([self._can_fetch])
        known = self._known.get(rid)
        if known is not None:
            if known.over and known.fetch is not None and known.fetch.done:  # the lookup just now has pinned what came
                known.fetch.release()
                known.fetch = None
        elif self._on and lacks:
            self._known[rid] = _Waiting(begin(), over=not self._may_wait)
            if len(self._known) > MAX_KNOWN:
                self._drop(next(iter(self._known)))

    def holds_back(self, rid: str, idle: bool) -> bool:
        """Whether SGLang must not admit this request in this step. ``idle``: it has nothing else to run."""
        known = self._known.get(rid)
        if known is None or known.over:
            return False
        if idle and known.fetch is not None and not known.fetch.done:
            time.sleep(PAUSE_S)
        over, useless = self._agree([known.fetch is None or known.fetch.done, not _brought(known.fetch)])
        known.over = over
        if over and useless and known.fetch is not None:  # nobody looks it up again, and it knows all names of a prompt
            known.fetch.release()
            known.fetch = None
        return not (over and useless)

    def release(self, rid: str) -> None:
        """The request is gone."""
        self._drop(rid)

    def clear(self) -> None:
        """Nobody waits any more."""
        for rid in list(self._known):
            self._drop(rid)

    def _drop(self, rid: str) -> None:
        known = self._known.pop(rid, None)
        if known is not None and known.fetch is not None:
            known.fetch.release()


def _brought(fetch: Fetch | None) -> bool:
    """Whether another lookup may find more than the last one."""
    return fetch is not None and (fetch.tokens > 0 or fetch.outcome is Outcome.PRESENT)
