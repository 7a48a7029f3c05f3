"""A seat is where one engine of the soak lives: it is booted, asked, struck down, and booted again."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.lab.env import EngineError
from tests.lab.process import BOOT_S
from tests.sglang_lab.server import SglangServer
from tests.soak.cases import Case
from tests.soak.findings import Findings
from tests.vllm_lab.engine import Server

__all__ = ["STRIKES", "Life", "Seat", "Strike"]

AnyServer = Server | SglangServer

STRIKES: Final = {"all": 5, "worker": 3, "front": 2, "stopped": 2}
"""Ways to be killed, and how often each: the whole engine at once; the process that computes, alone; the one that
listens, alone, with another engine booted while what is left of this one goes; the whole engine after it was stopped
for a while."""

POLL_S: Final = 0.1
METRICS_EVERY_S: Final = 2.0
LINGER_S: Final = 20.0
"""How long the rest of an engine, of which one process was killed, has to end by itself."""
NOT_COMPUTING: Final = ("api", "detokenizer", "tokenizer", "resource_tracker")


@dataclass(frozen=True)
class Strike:
    """How, and for how long stopped before."""

    how: str
    stopped_s: float = 0.0


@dataclass
class Life:
    """One engine from its start to its end. Times by the monotonic clock."""

    number: int
    server: AnyServer
    up: threading.Event = field(default_factory=threading.Event)
    doomed: threading.Event = field(default_factory=threading.Event)
    """Set before anything is killed: what goes wrong after that is explained."""
    over: threading.Event = field(default_factory=threading.Event)
    """Another engine may be booted in this one's place."""
    ready_at: float = 0.0
    computing: list[int] = field(default_factory=list)
    """Process ids of what computes, once it is up."""
    stops: int = 0
    right: int = 0
    asking: set[int] = field(default_factory=set)
    """Threads that wait for an answer."""
    loaded: float = 0.0
    """Blocks or pages that came out of the pool, as the engine's own metrics count them."""


class Seat:
    """Boots an engine, and another one whenever it was killed, until :meth:`leave`."""

    def __init__(
        self,
        name: str,
        boot: Callable[[Path], AnyServer],
        loaded_metric: str,
        cases: list[Case],
        findings: Findings,
        folder: Path,
    ) -> None:
        self.name = name
        self.cases = cases
        self.findings = findings
        self._boot = boot
        self._metric = loaded_metric
        self._folder = folder
        self._leaving = threading.Event()
        self._strikers: list[threading.Thread] = []
        self.lives: list[Life] = []
        self.kills = 0
        self._thread = threading.Thread(target=self._run, name=f"seat-{name}", daemon=True)
        self._thread.start()

    # -- what clients see --------------------------------------------------------------------------------------------

    @property
    def life(self) -> Life | None:
        """The engine that can be asked now."""
        life = self.lives[-1] if self.lives else None
        return life if life is not None and life.up.is_set() and not life.doomed.is_set() else None

    @property
    def boots(self) -> bool:
        """Whether an engine is on its way up."""
        life = self.lives[-1] if self.lives else None
        return life is not None and not life.up.is_set() and not life.doomed.is_set()

    def wait_up(self, timeout_s: float) -> Life | None:
        """The engine that can be asked, as soon as there is one."""
        deadline = time.monotonic() + timeout_s
        while (life := self.life) is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return life

    @property
    def reused(self) -> float:
        """Blocks or pages that engines of this seat, but for the first, have read from the pool."""
        return sum(life.loaded for life in self.lives[1:])

    # -- the engine's lives ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._leaving.is_set():
            number = len(self.lives)
            life = Life(number, self._boot(self._folder / f"{self.name}-{number}.log"))
            self.lives.append(life)
            try:
                life.server.ready(BOOT_S)
            except EngineError as error:
                if not life.doomed.is_set():
                    if not self._leaving.is_set():
                        self.findings.find("unexplained", f"{self.name} #{number} did not start: {error}")
                    life.server.close()
                    continue
            if not life.doomed.is_set():
                life.ready_at = time.monotonic()
                life.computing = [
                    pid for role, pid in life.server.roles().items() if not role.startswith(NOT_COMPUTING)
                ]
                life.up.set()
                took = life.ready_at - life.server.started
                self.findings.say(f"{self.name} #{number} is up after {took:.0f} s")
                self._attend(life)
            if life.doomed.is_set():
                life.over.wait()
            elif not self._leaving.is_set():
                self.findings.find(
                    "unexplained",
                    f"{self.name} #{number} ended by itself with {life.server.process.returncode}; its log ends:\n"
                    f"{life.server.log_tail()}",
                )
                life.up.clear()
                life.server.close()

    def _attend(self, life: Life) -> None:
        """Until the engine is doomed, dead, or not wanted any more."""
        told = time.monotonic()
        while not (life.doomed.is_set() or self._leaving.is_set()):
            if life.server.process.poll() is not None:
                return
            if time.monotonic() - told > METRICS_EVERY_S:
                self.look(life)
                told = time.monotonic()
            time.sleep(POLL_S)

    def look(self, life: Life) -> None:
        """Notes what the engine has read from the pool so far."""
        with contextlib.suppress(OSError, ValueError, EngineError):
            life.loaded = life.server.metrics().get(self._metric, life.loaded)

    # -- kills -------------------------------------------------------------------------------------------------------

    def strike(self, strike: Strike) -> None:
        """Kills the engine that lives now, booting or not; returns at once."""
        life = self.lives[-1]
        if life.doomed.is_set():
            return
        life.doomed.set()
        if strike.how != "front":  # at once: what led here, such as a copy under way, is over in a millisecond
            self._signal(life.computing, signal.SIGSTOP if strike.how == "stopped" else signal.SIGKILL)
        self.kills += 1
        self.findings.add("kills")
        self.findings.add("mid_request", bool(life.asking))
        thread = threading.Thread(target=self._strike, args=(life, strike), name=f"strike-{self.name}", daemon=True)
        self._strikers.append(thread)
        thread.start()

    def _strike(self, life: Life, strike: Strike) -> None:
        server, when = life.server, "serving" if life.up.is_set() else "booting"
        try:
            if strike.how == "stopped":
                self._signal([p.pid for p in server.family()], signal.SIGSTOP)
                time.sleep(strike.stopped_s)
            self.findings.say(
                f"{self.name} #{life.number}: SIGKILL to {strike.how} while {when}; "
                f"{life.right} right answers, {life.loaded:.0f} blocks from the pool"
            )
            if strike.how == "worker" and life.computing:
                self._linger(life)
            elif strike.how == "front":
                server.family()
                server.kill()
                life.over.set()
                self._linger(life)
            server.kill_all()
        finally:
            life.over.set()
            server.close()

    def _linger(self, life: Life) -> None:
        left = life.server.wait_gone(LINGER_S)
        if left:
            names = ", ".join(str(p.pid) for p in left)
            self.findings.say(f"{self.name} #{life.number}: {names} did not end within {LINGER_S:.0f} s; killed")
            self.findings.add("lingered")

    def pause(self, seconds: float, *, everything: bool) -> None:
        """Stops the engine, or only what computes in it, for a while; returns when it goes on."""
        life = self.life
        if life is None:
            return
        life.stops += 1
        self.findings.add("stops")
        self.findings.say(f"{self.name} #{life.number}: SIGSTOP for {seconds:.1f} s")
        family = [p.pid for p in life.server.family()]
        try:
            self._signal(family if everything else life.computing, signal.SIGSTOP)
            time.sleep(seconds)
        finally:
            self._signal(family, signal.SIGCONT)

    @staticmethod
    def _signal(pids: list[int], number: int) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    # -- the end -----------------------------------------------------------------------------------------------------

    def leave(self, *, kindly: bool) -> None:
        """Ends the engine by SIGTERM or by SIGKILL, and boots no other."""
        self._leaving.set()
        if self.boots:
            self.lives[-1].server.kill_all()  # ready() is waiting for it
        self._thread.join(BOOT_S)
        life = self.lives[-1]
        if kindly and life.up.is_set() and not life.doomed.is_set():
            life.server.stop()
        life.server.close()
        for thread in self._strikers:
            thread.join(LINGER_S * 3)
