"""How fast a peer is, as measured by what was really fetched: one round trip, and bytes in a second.

Both are running averages in which recent measurements count most. What was measured long ago counts as unknown, since a
link that was slow for a moment would otherwise never be tried again.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from typing import Final

WEIGHT: Final = 0.3
"""Of the newest measurement in the average."""
KNOWN_FOR_S: Final = 30.0
TELLING_BYTES: Final = 1 << 20
"""Less than this says more about round trips than about bandwidth."""


class Average:
    """A running average that is forgotten after a while without measurements. Thread-safe."""

    def __init__(self) -> None:
        self._value = 0.0
        self._until = 0.0
        self._mutex = threading.Lock()

    def note(self, value: float) -> None:
        """A measurement."""
        with self._mutex:
            now = time.monotonic()
            known = now < self._until
            self._value = (1 - WEIGHT) * self._value + WEIGHT * value if known else value
            self._until = now + KNOWN_FOR_S

    @property
    def value(self) -> float | None:
        """The average, None if nothing was measured lately."""
        with self._mutex:
            return self._value if time.monotonic() < self._until else None


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """How fast a peer is, as of some moment; None: not known."""

    round_trip_s: float | None
    """Seconds of a look-up."""
    bytes_per_s: float | None
    """Bandwidth of a fetch."""

    def seconds_for(self, nbytes: int) -> float | None:
        """How long a fetch of so many bytes is expected to take, None if unknown."""
        return None if self.bytes_per_s is None else (self.round_trip_s or 0.0) + nbytes / self.bytes_per_s


class Speed:
    """One peer's."""

    def __init__(self) -> None:
        self._round_trip_s = Average()
        self._bytes_per_s = Average()

    @property
    def now(self) -> Measured:
        """As measured lately."""
        return Measured(self._round_trip_s.value, self._bytes_per_s.value)

    def note_round_trip(self, seconds: float) -> None:
        """A look-up took so long."""
        self._round_trip_s.note(seconds)

    def note_read(self, nbytes: int, seconds: float) -> None:
        """So many bytes took so long to be read, checked and sealed."""
        if nbytes >= TELLING_BYTES and seconds > 0:
            self._bytes_per_s.note(nbytes / seconds)
