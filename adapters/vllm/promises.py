"""The loads that were promised to the engine, in the scheduler's process: a request waits for its own until it ends.

The engine waits for ever for a load that nobody reports, and asserts that it waits for each one that is reported. So
of every load it hears exactly once that it is over, whatever became of it. A promise goes this way::

    promised ──▶ sent with a step ──▶ heard: the engine hears that it is over
        │                         └──▶ given up: the engine has been told so ──▶ heard: that is kept from the engine
        └──▶ lost, no step has it: a load that fails is sent in its place

Nothing of vLLM is needed here, and nothing of the pool. Requests go by their ids; a request has one load at a time.
"""

from __future__ import annotations

from collections.abc import Iterable


class PromisedLoads:
    """Which requests wait for a load, and of which one that was given up the workers have yet to report."""

    def __init__(self) -> None:
        self._owed: dict[str, None] = {}
        """Whose load no step has taken along yet, in the order of the promises."""
        self._awaited: set[str] = set()
        """Whose load the engine waits for."""
        self._given_up: set[str] = set()
        """Whose load the engine takes for over, while its end is still to come."""

    def __bool__(self) -> bool:
        """Whether the end of any load is still to come."""
        return bool(self._awaited or self._given_up)

    @property
    def awaited(self) -> set[str]:
        """Requests for whose load the engine waits."""
        return self._awaited

    def is_given_up(self, request_id: str) -> bool:
        """Whether a load of this request was given up and is not reported yet. Another one can't be told from it."""
        return request_id in self._given_up

    def promise(self, request_id: str) -> None:
        """The engine has allocated blocks, and the request waits until they are loaded."""
        self._owed[request_id] = None
        self._awaited.add(request_id)

    def sent(self, loads: Iterable[str | None]) -> tuple[str, ...]:
        """A step takes along these requests' loads. Answers the requests whose load is lost: no step has it.

        They must be sent a load that fails, with this very step; they are not answered again.
        """
        if not self._owed:
            return ()
        for request_id in loads:
            self._owed.pop(request_id or "", None)
        lost = tuple(self._owed)
        self._owed.clear()
        return lost

    def heard(self, ended: set[str]) -> tuple[set[str], int]:
        """The workers report the end of these requests' loads.

        Returns:
            The ends that the engine waits for: any other, or one that it has heard of, would be the engine's own end.
            And how many of the others were not to be expected.
        """
        wanted = ended & self._awaited
        strange = len(ended - self._awaited - self._given_up)
        self._awaited -= ended
        self._given_up -= ended
        return wanted, strange

    def give_up(self) -> None:
        """The engine was told that every load it waits for is over; no worker copies any more."""
        self._given_up |= self._awaited
        self._awaited.clear()
