"""Named steps of the protocol at which a test lets something go wrong. Off unless armed, at the cost of one look.

A point is a step as one end takes it: a frame that it sends or receives (``lookup sent``, ``leased received``), or one
between frames. At a point that is armed, once, after it was passed ``skip`` times:

    delay     a moment
    drop      the frame, or these bytes, go nowhere
    cut       the connection breaks
    corrupt   one bit is another
    kill      SIGKILL for this process
    stop      SIGSTOP for this process

The environment variable ``KVPLUG_PEER_FAULT=POINT:ACTION[:SKIP]`` arms one when the first agent or link of a process is
made, for processes that a test cannot reach otherwise. Faults at bytes that nobody chose are a link's, in the tests.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from kvplug.errors import ConfigError
from kvplug.rdma.control.protocol import KINDS

ENV: Final = "KVPLUG_PEER_FAULT"
DELAY_S: Final = 0.05
ACTIONS: Final = ("delay", "drop", "cut", "corrupt", "kill", "stop")
_OF_A_PROCESS: Final = ("delay", "kill", "stop")

STEPS: Final[dict[str, tuple[str, ...]]] = {
    "dial": ("delay", "drop", "cut", "kill", "stop"),  # reader: before it connects
    "accepted": ("delay", "drop", "cut", "kill", "stop"),  # agent: before anything is said
    "lease granted": _OF_A_PROCESS,  # agent: blocks pinned, the answer not sent
    "first byte sent": ACTIONS,  # agent, of the blocks of one Read
    "half sent": ACTIONS,
    "last byte sent": ACTIONS,
    "reserved": _OF_A_PROCESS,  # reader: slots in writing, nothing read
    "piece received": ACTIONS,  # reader: some blocks are here, the path has not said so
    "check": ("delay", "corrupt", "kill", "stop"),  # reader: before their checksums are compared and they are sealed
}
"""Steps between frames, and what can go wrong there."""
POINTS: Final[dict[str, tuple[str, ...]]] = STEPS | {
    f"{message.__name__.lower()} {way}": ACTIONS for message, _ in KINDS.values() for way in ("sent", "received")
}


@dataclasses.dataclass(slots=True)
class _Fault:
    action: str
    skip: int
    seconds: float


armed: dict[str, _Fault] = {}
"""Looked at by every step; empty outside of tests."""
happened: list[str] = []
"""Points whose faults have happened, in order."""
_mutex = threading.Lock()
_environment_read = False


def arm(point: str, action: str, *, skip: int = 0, seconds: float = DELAY_S) -> None:
    """Let ``action`` happen when this process passes ``point`` for the ``skip + 1``-th time. Raises ConfigError."""
    if point not in POINTS:
        raise ConfigError(f"no step of the protocol is called {point!r}; there are: {', '.join(sorted(POINTS))}")
    if action not in POINTS[point]:
        raise ConfigError(f"{action!r} can't happen at {point!r}; there can: {', '.join(POINTS[point])}")
    armed[point] = _Fault(action, skip, seconds)


def arm_from_environment() -> None:
    """Arm what ``KVPLUG_PEER_FAULT`` names, if it is set; once in a process. Raises ConfigError."""
    global _environment_read
    text = os.environ.get(ENV)
    if not text or _environment_read:
        return
    _environment_read = True
    point, _, rest = text.partition(":")
    action, _, skip = rest.partition(":")
    if skip and not (skip.isascii() and skip.isdigit()):
        raise ConfigError(f"{ENV}={text!r} is not POINT:ACTION[:SKIP]: {skip!r} is no number")
    arm(point, action, skip=int(skip or 0))


def happen(point: str) -> str | None:
    """Delay, die or stop here, if that is armed and due; what else is due is the caller's to do."""
    with _mutex:
        fault = armed.get(point)
        if fault is None:
            return None
        fault.skip -= 1
        if fault.skip >= 0:
            return None
        del armed[point]
        happened.append(point)
    if fault.action == "delay":
        time.sleep(fault.seconds)
    elif fault.action in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if fault.action == "kill" else signal.SIGSTOP)
    else:
        return fault.action
    return None


def meddle(point: str, data: Any, cut: Callable[[], object]) -> bool:
    """What is due at this point, done to writable ``data`` or by ``cut``. True: these bytes go nowhere."""
    action = happen(point)
    if action == "cut":
        cut()
    elif action == "corrupt":
        data[len(data) // 2] ^= 0x10
    return action == "drop"
