"""One run of the soak: who boots, asks, kills and checks."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal

from kvplug.config import Config
from kvplug.errors import IntegrityError, LockTimeoutError
from kvplug.store import KvStore
from tests.inside import pool_of
from tests.lab.env import temporary_pool
from tests.lab.models import LLAMA, LLAMA_OTHER, model_dir
from tests.lab.process import BOOT_S
from tests.sglang_lab.server import SglangServer
from tests.soak import load
from tests.soak.cases import Case, Witness
from tests.soak.defects import Defect, Zeros
from tests.soak.findings import Findings
from tests.soak.seats import STRIKES, AnyServer, Seat, Strike
from tests.vllm_lab.engine import SERVE_ARGUMENTS, Server

__all__ = ["Settings", "run"]

MIB_PER_CASE: Final = 1.2
"""Size of the pool. A case has about 1 MiB of KV that no other case has, in each of the three engines' namespaces."""
VLLM_BLOCKS: Final = "96"
SGLANG_TOKENS: Final = "2560"
HICACHE_RATIO: Final = "1.1"
"""What an engine itself keeps: too little for its cases, so that it goes back to the pool all the time."""
CHECK_EVERY_S: Final = 3.0
LOCK_S: Final = 30.0
QUIET_S: Final = 20.0
IN_BOOT: Final = 0.08
"""Share of the kills that may fall on an engine while it boots."""
PATIENCE_S: Final = 15.0
MID_REQUEST: Final = 0.8
"""Share of the others that fall while an answer is awaited."""
MID_COPY: Final = 0.6
"""Share of all that fall while a block of the pool is pinned or written, by whomever."""
COPY_S: Final = 3.0
STOPPED_S: Final = (0.3, 4.0)
AFTERWARDS: Final = 6
"""Cases that every engine answers once all kills are over, at least."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run is told."""

    seed: int
    minutes: float
    kills_per_minute: float
    clients: int
    cases: int
    folder: Path
    defect: Defect | None = None


def run(settings: Settings) -> Findings:
    """From beginning to end; nothing is left running."""
    findings = Findings()

    def died(args: Any) -> None:
        trace = "".join(traceback.format_exception(args.exc_type, args.exc_value, args.exc_traceback))
        findings.find("unexplained", f"a thread of the soak's own, {args.thread.name}, ended: {trace}")

    before, threading.excepthook = threading.excepthook, died
    try:
        with temporary_pool("soak") as pool:
            _Run(settings, findings, pool).run()
    finally:
        threading.excepthook = before
    return findings


class _Run:
    def __init__(self, settings: Settings, findings: Findings, pool: str) -> None:
        self.settings, self.findings, self.pool = settings, findings, pool
        self.rng = random.Random(settings.seed)
        self.seats: list[Seat] = []
        self.size = f"{round(settings.cases * MIB_PER_CASE)}mib"
        self.store = KvStore(config=Config.defaults().with_changes(pool=pool, size=self.size, verify="always"))

    def run(self) -> None:
        try:
            self._check("before anything")  # and what it is compiled from is loaded
            self._take_seats()
            self._soak()
            self._afterwards()
            self._quiet("with all engines idle", clients=None)
            for seat in self.seats:
                seat.leave(kindly=self.rng.random() < 0.5)
            self._quiet("with all engines gone", clients=1)
            self._check("at the end")
            stats = self.store.stats()
            self.findings.counts.update(
                evicted=stats.evicted_blocks,
                stored=stats.stored_blocks,
                reaped_pins=stats.reaped_pins,
                reaped_writes=stats.reaped_writes,
                rebuilds=stats.rebuilds,
            )
        finally:
            for seat in self.seats:
                with contextlib.suppress(Exception):
                    seat.leave(kindly=False)
            self.store.close()

    # -- beginning ---------------------------------------------------------------------------------------------------

    def _take_seats(self) -> None:
        model, other, s = model_dir(LLAMA), model_dir(LLAMA_OTHER), self.settings
        witness = Witness(model, s.folder)
        cases = witness.cases(s.seed, s.cases)
        third = cases["sglang"]
        if s.defect == "identity":  # the third engine has other weights, and passes them off for the second's
            third = Witness(other, s.folder).cases(s.seed, s.cases)["sglang"]
        self.findings.say(f"cases: {len(cases['vllm'])} for vLLM, {len(cases['sglang'])} for SGLang")
        verify = "never" if s.defect == "zeros" else "always"
        alike = {"weights_id": "the same"} if s.defect == "identity" else {}

        def vllm(log: Path) -> AnyServer:
            return Server(
                model,
                log,
                pool=self.pool,
                size=self.size,
                env={"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "KVPLUG_VERIFY": verify},
                arguments=[*SERVE_ARGUMENTS, "--num-gpu-blocks-override", VLLM_BLOCKS],
            )

        def sglang(path: Path, mode: Literal["linker", "hicache"]) -> Callable[[Path], AnyServer]:
            return lambda log: SglangServer(
                path,
                log,
                pool=self.pool,
                mode=mode,
                size=self.size,
                settings={"verify": verify, **alike},
                arguments=["--max-total-tokens", SGLANG_TOKENS, "--hicache-ratio", HICACHE_RATIO],
            )

        blocks, pages = "kvplug_loaded_blocks_total", "kvplug_loaded_pages_total"
        self._seat("vllm", vllm, blocks, cases["vllm"])
        self._seat("linker", sglang(model, "linker"), pages, cases["sglang"])
        if s.defect == "identity":
            self._seat("other", sglang(other, "linker"), pages, third)
        else:
            self._seat("hicache", sglang(model, "hicache"), pages, third)

    def _seat(self, name: str, boot: Callable[[Path], AnyServer], metric: str, cases: list[Case]) -> None:
        self.seats.append(Seat(name, boot, metric, cases, self.findings, self.settings.folder))

    # -- the soak itself ---------------------------------------------------------------------------------------------

    def _soak(self) -> None:
        s, over, found = self.settings, threading.Event(), threading.Event()
        for seat in self.seats:
            if seat.wait_up(BOOT_S) is None:
                raise RuntimeError(f"{seat.name} did not come up within {BOOT_S} s")
        clients = [
            threading.Thread(
                target=load.client, args=(seat, self.rng.getrandbits(32), over), name=f"client-{seat.name}"
            )
            for seat in self.seats
            for _ in range(s.clients)
        ]
        until = time.monotonic() + s.minutes * 60
        spoil = Zeros(self.store, self.findings) if s.defect == "zeros" else None
        for thread in clients:
            thread.start()
        killer = threading.Thread(target=self._kill, args=(until, found), name="killer")
        killer.start()
        try:
            while (time.monotonic() < until or killer.is_alive()) and not found.is_set():
                if spoil is not None:
                    spoil.some()
                else:
                    self._check("under load")
                time.sleep(CHECK_EVERY_S)
                if s.defect and self.findings.counts["wrong"]:
                    found.set()
        finally:
            found.set()
            over.set()
        for thread in [killer, *clients]:
            thread.join(load.HUNG_S * 2)
            if thread.is_alive():
                self.findings.find("hung", f"{thread.name} did not end")
        self._told()

    def _kill(self, until: float, found: threading.Event) -> None:
        """The kills, and as many stops, each at a random instant of a stretch of its own."""
        began = time.monotonic()
        number = max(1, round(self.settings.minutes * self.settings.kills_per_minute))
        stretch = (until - began) / number
        plan: list[tuple[float, Strike | None]] = []
        for i in range(number):
            how = self.rng.choices(list(STRIKES), list(STRIKES.values()))[0]
            plan.append((began + (i + self.rng.random()) * stretch, Strike(how, self.rng.uniform(*STOPPED_S))))
            plan.append((began + (i + self.rng.random()) * stretch, None))
        turns: list[Seat] = []
        for at, strike in sorted(plan, key=lambda entry: entry[0]):
            if found.wait(max(0.0, at - time.monotonic())):
                return
            if strike is None:
                self.rng.choice(self.seats).pause(self.rng.uniform(*STOPPED_S), everything=self.rng.random() < 0.5)
                continue
            turns = turns or self.rng.sample(self.seats, len(self.seats))
            seat = self._target(turns, found)
            if seat is None:
                return
            if seat in turns:
                turns.remove(seat)
            if self.rng.random() < MID_COPY:
                self._await_copy()
            seat.strike(strike)

    def _target(self, turns: list[Seat], found: threading.Event) -> Seat | None:
        """Whose turn it is to be killed: an engine at work, or, now and then, one that boots. Anybody, if those whose
        turn it is are long in coming."""
        booting, mid_request = self.rng.random() < IN_BOOT, self.rng.random() < MID_REQUEST
        began = time.monotonic()
        while not found.wait(0.02):
            waited = time.monotonic() - began
            for seat in self.seats if waited > PATIENCE_S else turns:
                life = seat.life
                if life is not None and life.right and (life.asking or not mid_request):
                    return seat
                if booting and seat.boots:
                    return seat
            if waited > BOOT_S:
                self.findings.find("unexplained", f"no engine has answered anything for {waited:.0f} s")
                break
        return None

    def _await_copy(self) -> None:
        """Until somebody reads or writes a block, for a while."""
        deadline = time.monotonic() + COPY_S
        while time.monotonic() < deadline:
            stats = self.store.stats()
            if stats.pinned_slots or stats.writing_slots:
                return
            time.sleep(0.0005)

    def _afterwards(self) -> None:
        """Everybody is up again, answers right, one request at a time, and reads from the pool."""
        for seat in self.seats:
            life = seat.wait_up(BOOT_S)
            if life is None:
                self.findings.find("unexplained", f"{seat.name} is not up {BOOT_S} s after the last kill")
                continue
            for number, case in enumerate(self.rng.sample(seat.cases * 2, len(seat.cases) * 2)):
                load.ask_once(seat, life, case)
                seat.look(life)
                if number >= AFTERWARDS and (seat.reused or not seat.kills):
                    break
        for seat in self.seats:
            self.findings.counts[f"kills_{seat.name}"] = seat.kills
            self.findings.counts[f"reused_{seat.name}"] = round(seat.reused)

    # -- checks ------------------------------------------------------------------------------------------------------

    def _check(self, when: str) -> None:
        """The pool's invariants and all checksums. An engine that is stopped may hold the lock for a while."""
        deadline = time.monotonic() + LOCK_S
        while True:
            try:
                self.store.check_integrity()
                self.findings.add("checks")
            except LockTimeoutError as error:
                if time.monotonic() < deadline:
                    time.sleep(0.05)
                    continue
                self.findings.find("violations", f"{when}: for {LOCK_S} s {error}; {self.store.stats()}")
            except IntegrityError as error:
                self.findings.find("violations", f"{when}: {error}")
            return

    def _quiet(self, when: str, *, clients: int | None) -> None:
        """Nothing is pinned, half-written or given up; and, if that is given, so many clients are attached."""
        pool, deadline = pool_of(self.store), time.monotonic() + QUIET_S
        while True:
            pool.reap()
            pool.release_expired()
            s = self.store.stats()
            slots = s.pinned_slots + s.writing_slots + s.quarantined_slots
            extra = 0 if clients is None else s.clients - clients
            if not slots and not extra:
                return
            if time.monotonic() > deadline:
                self.findings.find(
                    "leaked",
                    f"{when}: {s.pinned_slots} pinned, {s.writing_slots} writing, {s.quarantined_slots} quarantined "
                    f"slots, {s.clients - 1} clients are left",
                    slots + extra,
                )
                return
            time.sleep(0.1)

    def _told(self) -> None:
        for seat in self.seats:
            self.findings.say(f"{seat.name}: {len(seat.lives)} lives, {seat.kills} kills")
