"""Verbs, as far as kvplug needs them: one small interface, behind which pyverbs or ``ibverbs`` does the work.

pyverbs comes with the distribution's rdma-core and fits it; ``ibverbs`` is what pip can install anywhere. Which of the
two it is shows nowhere else. Neither is imported before a verbs path is wanted. Every call raises VerbsError, and
nothing else of the binding's own kinds.

A queue pair has a completion queue to itself, so that both go together, and belongs to one thread at a time. Once
:meth:`QueuePair.close` has returned, its device writes to no memory any more on its behalf.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from kvplug.errors import VerbsError
from kvplug.rdma.control.protocol import I64

U32 = npt.NDArray[np.uint32]
Errors: TypeAlias = Callable[[str], AbstractContextManager[None]]
"""A binding's own: what its calls raise within is a VerbsError that begins with what was being done."""

LOCAL_WRITE: Final = 1
REMOTE_READ: Final = 4
OPCODE_READ: Final = 4
SIGNALED: Final = 2
RC: Final = 2
PORT_ACTIVE: Final = 4
STATE_ERROR: Final = 6
CHANGE_STATE: Final = 1
"""Numbers of the verbs' own, the same in every version."""

STATUSES: Final = {
    0: "success",
    1: "local length error",
    2: "local queue pair error",
    4: "local protection error",
    5: "flushed",
    9: "the other end does not do that",
    10: "the other end's memory can't be read there",
    11: "the other end failed",
    12: "the other end does not answer",
    13: "the other end is not ready",
}
FLUSHED: Final = 5

ACK_TIMEOUT: Final = 14  # 4.096 µs × 2 to this power: 67 ms
RETRIES: Final = 6  # 7 would be for ever; 6 give up after half a second
MIN_RNR_TIMER: Final = 12
HOP_LIMIT: Final = 64
QUEUE_DEPTH: Final = 256
"""Work requests that one queue pair may have under way."""
CHAIN: Final = 64
"""Work requests that are posted in one call."""
MAX_READS: Final = 16
"""READs that one queue pair has on the wire at once, where both devices can."""
NAP_S: Final = (50e-6, 1e-3)
"""Shortest and longest sleep between two looks, where a binding can't wait for completions."""


@dataclasses.dataclass(frozen=True, slots=True)
class Endpoint:
    """What the other end must know of a queue pair. gid: 16 bytes; mtu: the verbs' code, 1 (256 bytes) to 5 (4096)."""

    qpn: int
    psn: int
    gid: bytes
    lid: int
    mtu: int
    reads: int  # how many READs at once it takes part in


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Reads:
    """One-sided READs, in the order in which they are posted. All of length N.

    local, remote: addresses, int64; nbytes: int64; lkeys, rkeys: uint32; signalled: bool.
    """

    local: I64
    remote: I64
    nbytes: I64
    lkeys: U32
    rkeys: U32
    signalled: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.local)


@dataclasses.dataclass(frozen=True, slots=True)
class Port:
    """A port that is active. max_message: bytes of one READ."""

    device: str
    number: int
    lid: int
    mtu: int
    max_message: int
    max_regions: int
    max_reads: int


class Region:
    """Memory that a device may use. The memory must outlive it: nothing here holds it."""

    def __init__(self, region: Any, errors: Errors) -> None:
        """``region``: the binding's own; both have its keys and its end under the same names."""
        self._region, self._errors = region, errors
        self.lkey: int = region.lkey
        self.rkey: int = region.rkey

    def close(self) -> None:
        """Deregister: whoever reads it from elsewhere gets an error from now on."""
        with self._errors("deregister memory"):
            self._region.close()


class QueuePair(abc.ABC):
    """A reliable connection, and a completion queue of its own."""

    qpn: int

    @abc.abstractmethod
    def connect(self, ours: Endpoint, theirs: Endpoint, *, port: int, gid_index: int) -> None:
        """Be ready to read from ``theirs`` and to be read from."""

    @abc.abstractmethod
    def post(self, reads: Reads, first: int, end: int) -> None:
        """Post ``reads[first:end]``, at most CHAIN, as one chain; each is known by its position in ``reads``."""

    @abc.abstractmethod
    def poll(self) -> list[tuple[int, int]]:
        """(position, status) of some that have completed: signalled ones, and all that have failed."""

    @abc.abstractmethod
    def wait(self, timeout_s: float) -> None:
        """Return once something may have completed, or after that time. Other threads run meanwhile."""

    @abc.abstractmethod
    def fail(self) -> None:
        """Put it into its error state: what is under way is given up."""

    @abc.abstractmethod
    def close(self) -> None:
        """Destroy it. Idempotent."""


class Device(abc.ABC):
    """An opened device with a protection domain: queue pairs and regions of one device belong together."""

    def __init__(self, name: str, errors: Errors) -> None:
        self._name, self._errors = name, errors
        with errors(f"open {name}"):
            self._context, self._domain = self._open(name)

    def ports(self) -> list[Port]:
        """Its active ports."""
        with self._errors(f"ask {self._name} for its ports"):
            return active_ports(self._name, self._context.query_device(), self._context.query_port)

    def register(self, address: int, nbytes: int, access: int) -> Region:
        """Let the device use this memory, whose pages it keeps in place from now on."""
        with self._errors(f"register {nbytes} bytes with {self._name}"):
            return Region(self._register(address, nbytes, access), self._errors)

    @abc.abstractmethod
    def queue_pair(self, depth: int) -> QueuePair:
        """A queue pair for ``depth`` READs under way."""

    def close(self) -> None:
        """Close it, once its regions and queue pairs are closed. Idempotent."""
        with self._errors(f"close {self._name}"):
            self._domain.close()
            self._context.close()

    @abc.abstractmethod
    def _open(self, name: str) -> tuple[Any, Any]:
        """The binding's (context, protection domain) of this device. May raise the binding's own errors."""

    @abc.abstractmethod
    def _register(self, address: int, nbytes: int, access: int) -> Any:
        """The binding's region. May raise the binding's own errors."""


class Binding(abc.ABC):
    """One of the two."""

    name: ClassVar[str]

    @abc.abstractmethod
    def devices(self) -> list[str]:
        """Names of the devices; none where the kernel knows no RDMA."""

    @abc.abstractmethod
    def open(self, name: str) -> Device:
        """Open a device."""


BINDINGS: Final = ("pyverbs", "ibverbs")
"""In the order of preference."""


def binding(wanted: str = "auto") -> Binding:
    """That one, or with "auto" the first that can be imported. Raises VerbsError, which says what is missing."""
    missing = []
    for name in BINDINGS if wanted == "auto" else (wanted,):
        try:
            module = importlib.import_module(f"kvplug.rdma.verbs.binding_{name}")
            found: Binding = module.BINDING
            return found
        except (ImportError, OSError) as e:  # OSError: no libibverbs to open
            missing.append(f"{name}: {e}")
    raise VerbsError(
        f"no binding of the verbs can be imported ({'; '.join(missing)}): pip install 'kvplug[rdma]' and the system's "
        f"libibverbs (Debian: libibverbs1 and ibverbs-providers), or the distribution's python3-pyverbs"
    )


def active_ports(device: str, limits: Any, query: Callable[[int], Any]) -> list[Port]:
    """The ports that ``query`` says are active; both bindings give the verbs' fields under the verbs' names."""
    ports = []
    for number in range(1, limits.phys_port_cnt + 1):
        port = query(number)
        if int(port.state) == PORT_ACTIVE:
            mtu, most = int(port.active_mtu), int(port.max_msg_sz)
            ports.append(Port(device, number, port.lid, mtu, most, limits.max_mr, limits.max_qp_rd_atom))
    return ports


class Napping:
    """How to wait where there is nothing to wait on: short sleeps that grow while nothing comes."""

    def __init__(self) -> None:
        self._nap_s = NAP_S[0]

    def nap(self, timeout_s: float) -> None:
        """Sleep once."""
        time.sleep(max(0.0, min(self._nap_s, timeout_s)))
        self._nap_s = min(2 * self._nap_s, NAP_S[1])

    def awake(self) -> None:
        """Something came."""
        self._nap_s = NAP_S[0]


def open_descriptors() -> set[int]:
    """Descriptors of RDMA devices that this process has open."""
    found = set()
    for entry in os.listdir("/proc/self/fd"):
        try:
            if "/infiniband/" in os.readlink(f"/proc/self/fd/{entry}"):
                found.add(int(entry))
        except OSError:
            continue
    return found
