"""An emulated machine with Soft-RoCE: boots, runs one command, hands back its exit status and output, and is gone.

    with Guest(folder) as guest:
        guest.start("rdma link")
        ended = guest.wait(deadline_s=60)

The guest sees this machine's files, read-only, under its own names (the checkout and .venv among them), and a memory
file system of its own over them; ``folder`` is what both may write, /out in the guest. QEMU ends with the ``with``,
at the deadline, and when this process dies, however it dies. The only way from one guest to another is a pair of unix
sockets in the folder that both were given as ``link``; neither leads anywhere else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parents[1]
LAB: Final = Path(os.environ.get("KVPLUG_RDMA_LAB", ROOT / ".venv" / "rdma_lab"))
KERNEL_LINE: Final = "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off nokaslr no_timer_check clocksource=hpet"
"""panic=-1 and -no-reboot: a guest whose kernel fails ends at once. hpet: it says its own rate, where a kernel
measures that of others, and wrong, by as much as nine times, on a machine that is busy while it boots."""
PROCESSOR: Final = "max,la57=off,smap=off,smep=off,umip=off,avx2=off"
"""Those four double the time that an emulated kernel takes. And QEMU 7.2 gets AVX2 wrong: numpy alone, sorting small
arrays in threads, ends in a segmentation fault within a minute."""
POLL_S: Final = 0.1


@dataclasses.dataclass(frozen=True)
class Link:
    """One end of a cable between two guests."""

    folder: Path
    end: int  # 0 or 1

    @property
    def address(self) -> str:
        """Of the guest at this end."""
        return f"10.8.0.{self.end + 1}"

    def device(self) -> list[str]:
        """QEMU's arguments. Datagrams over unix sockets: nothing can reach them but the other guest."""
        ours, theirs = (self.folder / f"link{end}" for end in (self.end, 1 - self.end))
        return [
            "-netdev", f"dgram,id=n,local.type=unix,local.path={ours},remote.type=unix,remote.path={theirs}",
            "-device", f"virtio-net-pci,netdev=n,mac=52:54:00:00:00:0{self.end + 1}",
        ]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a guest's command ended. status: its exit status; None: it did not come to an end, and ``why`` says more."""

    status: int | None
    log: str
    why: str = ""


class Guest:
    """One boot of one machine."""

    def __init__(self, folder: Path, *, link: Link | None = None, cpus: int = 2, memory: str = "3G") -> None:
        self.folder, self._link, self._cpus, self._memory = folder, link, cpus, memory
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, command: str) -> None:
        """Boot, and run this bash script. Raises FileNotFoundError when the lab is not installed."""
        image = LAB / "guest.cpio.gz"
        if not image.exists():
            raise FileNotFoundError(f"{image} is not there: bash {HERE.relative_to(ROOT)}/install.sh .venv makes it")
        (kernel,) = (LAB / "kernel" / "boot").glob("vmlinuz-*")
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("status", "log"):
            (self.folder / name).unlink(missing_ok=True)
        end = self._link.end if self._link else ""
        head = f". {LAB}/env.sh\ncd {ROOT}\nLAB_END={end} . {HERE}/inside.sh\n"
        (self.folder / "command").write_text(f"set -e\n{head}set +e\n{command}\n")
        shares = [
            "-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap",
            "-virtfs", f"local,path={LAB}/root,mount_tag=extra,security_model=none,readonly=on",
            "-virtfs", f"local,path={self.folder},mount_tag=out,security_model=none",
        ]  # fmt: skip
        console = (self.folder / "console").open("wb")
        with console:
            # setpriv: the emulator dies with whoever started it, even if that is killed.
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64",
                 "-accel", "tcg,thread=multi", "-cpu", PROCESSOR, "-machine", "q35",
                 "-m", self._memory, "-smp", str(self._cpus),
                 "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio",
                 "-device", "virtio-rng-pci",
                 *(self._link.device() if self._link else ["-nic", "none"]),
                 "-kernel", str(kernel), "-initrd", str(image), "-append", KERNEL_LINE, *shares],
                stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    @property
    def log(self) -> str:
        """What the command has said so far."""
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / "log").read_text(errors="replace")
        return ""

    @property
    def is_running(self) -> bool:
        """Whether the machine is up."""
        return self._process is not None and self._process.poll() is None

    def wait(self, deadline_s: float, *, tell: bool = False) -> Ended:
        """Wait for the command's end, then end the machine. ``tell``: pass its output on as it comes."""
        assert self._process is not None, "it was not started"
        ends = time.monotonic() + deadline_s
        told = 0
        over = False
        status = self.folder / "status"
        while not over:
            over = status.exists() or not self.is_running or time.monotonic() >= ends
            if tell and len(log := self.log) > told:
                sys.stdout.write(log[told:])
                sys.stdout.flush()
                told = len(log)
            if not over:
                time.sleep(POLL_S)
        if status.exists():
            ended = Ended(int(status.read_text()), self.log)
        elif self.is_running:
            ended = Ended(None, self.log, f"it had not ended after {deadline_s:g} s; console: {self._console()}")
        else:
            ended = Ended(None, self.log, f"the machine ended without it; console: {self._console()}")
        self.stop()
        return ended

    def _console(self) -> str:
        return (self.folder / "console").read_text(errors="replace")[-1500:]

    def stop(self) -> None:
        """End the machine at once. Idempotent."""
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(10)

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
