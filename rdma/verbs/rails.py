"""The RDMA devices of this host, opened for one pool: a *rail* is an active port with what a read over it needs.

All readers of one process share the rails of their pool, so that its memory is registered once; an agent has its own.

A forked child must not touch what its parent has opened, not even by cleaning up: where its finalisers would close
devices that are not its own, they find /dev/null.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import os
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvplug.errors import DecodeError, VerbsError
from kvplug.outside import decoded_by, file_text
from kvplug.rdma.blocks import U8
from kvplug.rdma.verbs.binding import LOCAL_WRITE, MAX_READS, Device, Endpoint, Port, binding, open_descriptors
from kvplug.rdma.verbs.regions import Regions, region_bytes

if TYPE_CHECKING:
    from kvplug.config import Config

SYSFS: Final = Path("/sys/class/infiniband")
MAX_GIDS: Final = 1024
EMPTY_GIDS: Final = 16
"""So many empty places in a row end a port's table: what is in it stands at its beginning."""
NO_GID: Final = bytes(16)


@dataclasses.dataclass(frozen=True, slots=True)
class Gid:
    """An address of a port: its place in the port's table, 16 bytes, and whether it is one of RoCE v2."""

    index: int
    raw: bytes
    routable_kind: bool


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Rail:
    """One active port."""

    device: Device
    port: Port
    gids: tuple[Gid, ...]
    regions: Regions
    number: int
    """Of the device: ports of one share its regions."""

    def endpoint(self, qpn: int, near: str) -> tuple[Endpoint, int]:
        """(what the other end must know of this queue pair, index of its GID). ``near``: this host's IP to it."""
        gid = best_gid(self.gids, near)
        reads = max(1, min(MAX_READS, self.port.max_reads))
        return Endpoint(qpn, secrets.randbits(24), gid.raw, self.port.lid, self.port.mtu, reads), gid.index


def devices_present(sysfs: Path = SYSFS) -> list[str]:
    """Names of the RDMA devices that the kernel has; nothing is imported or opened."""
    try:
        return sorted(entry.name for entry in sysfs.iterdir())
    except OSError:
        return []


def gids_of(port: Port, sysfs: Path = SYSFS) -> tuple[Gid, ...]:
    """The addresses that a port has."""
    folder = sysfs / port.device / "ports" / str(port.number)
    found: list[Gid] = []
    empty = 0
    for index in range(MAX_GIDS):
        try:
            raw = decoded_by(bytes.fromhex, file_text(folder / "gids" / str(index)).strip().replace(":", ""), "a GID")
        except OSError:
            break
        except DecodeError:
            raw = NO_GID
        if raw == NO_GID or len(raw) != len(NO_GID):
            empty += 1
            if empty == EMPTY_GIDS:
                break
            continue
        empty = 0
        kind = ""
        with contextlib.suppress(OSError):  # InfiniBand's have none
            kind = file_text(folder / "gid_attrs" / "types" / str(index)).strip()
        found.append(Gid(index, raw, kind != "IB/RoCE v1"))
    return tuple(found)


def best_gid(gids: tuple[Gid, ...], near: str) -> Gid:
    """The address to be known by: the one that control goes over, else one that is routed, else any."""

    def worth(gid: Gid) -> tuple[bool, bool, bool, bool, int]:
        address = ipaddress.IPv6Address(gid.raw)
        plain = str(address.ipv4_mapped or address)
        is_link_local = address.is_link_local
        return gid.routable_kind, plain == near, address.ipv4_mapped is not None, not is_link_local, -gid.index

    return max(gids, key=worth)


class Rails:
    """All rails of one pool in this process."""

    def __init__(self, config: Config, memory: U8, access: int) -> None:
        """Open the devices of the settings. Raises VerbsError, which says what is missing."""
        verbs = binding(config.verbs_binding)
        names = verbs.devices()
        wanted = [name for name in names if not config.verbs_device or name in config.verbs_device]
        if not wanted:
            which = f"none of {', '.join(config.verbs_device)}" if config.verbs_device else "no RDMA device"
            raise VerbsError(f"there is {which} here; the kernel has {', '.join(names) or 'none'}")
        self.binding = verbs.name
        self._devices: list[tuple[Device, Regions]] = []
        self.all: list[Rail] = []
        try:
            for number, name in enumerate(wanted):
                with _guarded():
                    device = verbs.open(name)
                ports = device.ports()
                most = min((port.max_regions for port in ports), default=0)
                regions = Regions(device, memory, access, each_bytes=region_bytes(len(memory), most))
                self._devices.append((device, regions))
                for port in ports:
                    gids = gids_of(port)
                    if gids:
                        self.all.append(Rail(device, port, gids, regions, number))
            if not self.all:
                raise VerbsError(f"no port of {', '.join(wanted)} is active and has an address")
        except VerbsError:
            self.close()
            raise

    def close(self) -> None:
        """Deregister and close. Idempotent."""
        devices, self._devices = self._devices, []
        for device, regions in devices:
            with contextlib.suppress(VerbsError):  # the kernel takes back what is left, with the process at the latest
                regions.close()
                device.close()


# ---- shared by the readers of a process ------------------------------------------------------------------------------

_mutex = threading.Lock()
_shared: dict[tuple[int, int, str, tuple[str, ...]], tuple[Rails, int]] = {}


def _key(config: Config, memory: U8) -> tuple[int, int, str, tuple[str, ...]]:
    return int(memory.ctypes.data), len(memory), config.verbs_binding, config.verbs_device


def borrow(config: Config, memory: U8) -> Rails:
    """The rails of this process for writing into this pool; :func:`give_back` ends it. Raises VerbsError."""
    key = _key(config, memory)
    with _mutex:
        rails, users = _shared.get(key, (None, 0))
        if rails is None:
            rails = Rails(config, memory, LOCAL_WRITE)
        _shared[key] = rails, users + 1
        return rails


def give_back(config: Config, memory: U8) -> None:
    """Done with them; the last one closes the devices."""
    key = _key(config, memory)
    with _mutex:
        rails, users = _shared.pop(key)
        if users > 1:
            _shared[key] = rails, users - 1
            return
    rails.close()


_descriptors: set[int] = set()
_parents: list[Rails] = []
"""In a forked child: kept alive, never used."""


@contextlib.contextmanager
def _guarded() -> Iterator[None]:
    """What is opened here is not a forked child's."""
    before = open_descriptors()
    yield
    _descriptors.update(open_descriptors() - before)


def _in_a_child() -> None:
    global _mutex
    _mutex = threading.Lock()
    here = open_descriptors() & _descriptors
    if here:
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for descriptor in here:
            os.dup2(nothing, descriptor, inheritable=False)
        os.close(nothing)
    _descriptors.clear()
    _parents.extend(rails for rails, _ in _shared.values())
    _shared.clear()


os.register_at_fork(after_in_child=_in_a_child)
