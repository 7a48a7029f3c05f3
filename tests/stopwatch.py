"""How long something took, less the time that a busy machine kept from it.

A test may promise that nothing was waited for; it may not promise how fast or how idle the machine is. So what the
kernel says it withheld is taken off: the time in which some process was ready and had no CPU, or waited for memory or a
disk (pressure stall information, /proc/pressure, in microseconds since boot), and what a hypervisor gave to others
(steal, /proc/stat). On a quiet machine that is next to nothing, and the bound holds what it says. What is waited for in
vain has no deadline of its own but :data:`LONG_S`: only a hang gets there.
"""

from __future__ import annotations

import os
import time
from typing import Final

LONG_S: Final = 120.0
"""Longer than any machine that passes this suite takes for one step of a test."""
_TICKS: Final = os.sysconf("SC_CLK_TCK")


def _withheld_s() -> float:
    """Seconds since boot; counts only what this kernel tells."""
    total = 0.0
    for resource in ("cpu", "memory", "io"):
        try:
            with open(f"/proc/pressure/{resource}") as told:
                total += int(told.readline().rsplit("total=", 1)[1]) / 1e6
        except (OSError, IndexError, ValueError):  # a kernel without it, or a container that hides it
            continue
    with open("/proc/stat") as told:
        total += int(told.readline().split()[8]) / _TICKS
    return total


class Stopwatch:
    """Runs from when it is made."""

    def __init__(self) -> None:
        self._withheld = _withheld_s()
        self._began = time.monotonic()

    def wall_s(self) -> float:
        """Seconds by the clock."""
        return time.monotonic() - self._began

    def took_s(self) -> float:
        """Seconds by the clock, less those that the machine withheld; at most what the code itself needed."""
        return max(0.0, self.wall_s() - (_withheld_s() - self._withheld))
