"""A process group of the lab's own: started, watched, killed one process at a time or whole, and left without trace."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.lab.env import ROOT, SHM

__all__ = ["BOOT_S", "EXIT_S", "REPLY_S", "LabProcess"]

BOOT_S = 420.0
"""Longest wait for an engine to come up. Idle cores need 3 to 60 s; a loaded machine several times that."""
REPLY_S = 180.0
EXIT_S = 20.0
TRACKER_S = 3.0


class LabProcess:
    """A process group of ours with a log file, and everything that it needs to go away without trace."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log: Path, **popen: Any) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._seen_shm: set[str] = set()
        self._family: dict[int, psutil.Process] = {}
        with log.open("ab") as sink:
            self.process = self._start(command, env, sink, **popen)
        self.started = time.monotonic()

    def _start(self, command: Sequence[str], env: Mapping[str, str], sink: Any, **popen: Any) -> Any:
        """Starts the first process, at the head of a session of its own; answers a ``Popen`` or what acts like one."""
        return subprocess.Popen(
            list(command),
            env=dict(env),
            cwd=str(ROOT),
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **popen,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def family(self) -> list[psutil.Process]:
        """This process and all its living descendants; those seen once are remembered, also when orphaned."""
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.pid)
            for p in [root, *root.children(recursive=True)]:
                self._family.setdefault(p.pid, p)
        return [p for p in self._family.values() if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def roles(self) -> dict[str, int]:
        """Process ids by what vLLM calls the process: "api", "EngineCore", "Worker_TP0", "DPCoordinator", ..."""
        out = {"api": self.pid}
        for p in self.family():
            with contextlib.suppress(psutil.Error):
                title = " ".join(p.cmdline()).strip()
                if "VLLM::" in title:
                    out[title.split("VLLM::", 1)[1].split()[0]] = p.pid
        return out

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log_text().splitlines()[-lines:])

    def kill(self, pid: int | None = None) -> None:
        """SIGKILL to one process (default: the first), and to nothing else."""
        self._note_shm()
        target = self.pid if pid is None else pid
        with contextlib.suppress(ProcessLookupError):
            os.kill(target, signal.SIGKILL)
        if target == self.pid:
            self.process.wait(EXIT_S)

    def kill_all(self) -> None:
        """SIGKILL to the whole family at once, as a container that is taken away."""
        self._note_shm()
        family = self.family()
        # Python's resource trackers hold no engine state; left alone they unlink semaphores and end by themselves.
        trackers = [p for p in family if _is_tracker(p)]
        for p in family:
            if p not in trackers:
                with contextlib.suppress(psutil.NoSuchProcess):
                    p.kill()
        psutil.wait_procs(family, timeout=TRACKER_S)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        psutil.wait_procs(family, timeout=EXIT_S)
        self.process.wait(EXIT_S)

    def wait_gone(self, timeout_s: float = EXIT_S) -> list[psutil.Process]:
        """Waits for the whole family to end; answers those that are still there."""
        return list(psutil.wait_procs(self.family(), timeout=timeout_s)[1])

    def close(self) -> None:
        """Ends everything and unlinks what vLLM left in /dev/shm. The pool is not touched: it outlives engines."""
        self.kill_all()
        for path in self._seen_shm:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def _note_shm(self) -> None:
        """Remembers files in /dev/shm that the family has open or mapped, except pools."""
        for p in self.family():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{p.pid}/maps").read_text().splitlines():
                    self._note_path(line.split(maxsplit=5)[-1])
            with contextlib.suppress(OSError):
                for fd in os.listdir(f"/proc/{p.pid}/fd"):
                    with contextlib.suppress(OSError):
                        self._note_path(os.readlink(f"/proc/{p.pid}/fd/{fd}"))

    def _note_path(self, path: str) -> None:
        if path.startswith(f"{SHM}/") and not path.startswith(f"{SHM}/kvplug.") and not path.endswith(" (deleted)"):
            self._seen_shm.add(path)


def _is_tracker(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return any("resource_tracker" in part for part in process.cmdline())
    return False
