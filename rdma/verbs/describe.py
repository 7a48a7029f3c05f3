"""What `kvplug doctor` says about other hosts: whether their agents answer, and what of the verbs is there."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from kvplug.errors import ConfigError, PeerAuthError, PeerError, ProtocolError, VerbsError
from kvplug.outside import file_text
from kvplug.rdma.control.link import Link
from kvplug.rdma.control.protocol import Stats, StatsReply
from kvplug.rdma.verbs.binding import BINDINGS, Binding, binding
from kvplug.rdma.verbs.rails import SYSFS, Gid, best_gid, devices_present, gids_of
from kvplug.sizes import format_size

if TYPE_CHECKING:
    from kvplug.config import Config

CAP_IPC_LOCK = 14
MOST_PEERS = 16
ASK_S = 2.0


class Remark(NamedTuple):
    """One line. fix: what to do, or nothing."""

    status: Literal["ok", "note", "warning", "fault"]
    found: str
    fix: str = ""


def describe_verbs(config: Config, sysfs: Path = SYSFS) -> Iterator[Remark]:
    """What there is. Raises nothing: what can't be had is a remark."""
    wished = config.data_path == "verbs"
    devices = devices_present(sysfs)
    usable = _bindings(config)
    with_what = f"binding: {', '.join(usable) or 'none'}"
    if config.data_path == "tcp":
        yield Remark("note", f"off: data_path = tcp; devices: {', '.join(devices) or 'none'}")
    elif not devices:
        fix = "load the driver of this host's RDMA device, or data_path = auto" if wished else ""
        found = f"no device ({sysfs}): other hosts are read over TCP; {with_what}"
        yield Remark("fault" if wished else "note", found, fix)
    elif not usable:
        try:
            binding(config.verbs_binding)
        except VerbsError as e:
            found, _, fix = str(e).partition("): ")
            yield Remark("fault" if wished else "warning", f"{', '.join(devices)}; {found})", fix)
    else:
        yield from _ports(config, usable[0], devices, sysfs)
        yield from _memlock(config)


def describe_peers(config: Config) -> Iterator[Remark]:
    """Whether each agent that ``peers`` names answers and lets this host in. Raises nothing; takes ASK_S at most."""
    addresses = config.peers[:MOST_PEERS]
    with ThreadPoolExecutor(max(1, len(addresses)), "kvplug-doctor") as threads:
        yield from threads.map(lambda address: _peer(address, config), addresses)
    if len(config.peers) > MOST_PEERS:
        yield Remark("note", f"{len(config.peers) - MOST_PEERS} more were not asked")


def _peer(address: str, config: Config) -> Remark:
    try:
        link = Link(address, config)
        try:
            answer = link.ask(Stats(), StatsReply, time.monotonic() + ASK_S)
        finally:
            link.close()
    except PeerError as error:
        fix = "start `kvplug agent` there, with the same KVPLUG_AUTH_KEY as here, and look at its own log"
        if isinstance(error, PeerAuthError | ProtocolError):  # it is there, and the error says what to do
            fix = "correct the settings of whichever of the two is wrong; the agent's own log has its side of it"
        return Remark("warning", f"{address}: {str(error).removeprefix(f'{address} ')}", fix)
    except ConfigError as error:
        return Remark("fault", f"{address}: {error}", "correct the settings")
    told = " ".join(f"{name} {count}" for name, count in sorted(answer.counters.items()))
    return Remark("ok", f"{address} answers; leases {answer.leases} {told}".rstrip())


def _bindings(config: Config) -> list[str]:
    found = []
    for name in BINDINGS if config.verbs_binding == "auto" else (config.verbs_binding,):
        try:
            found.append(binding(name).name)
        except VerbsError:
            continue
    return found


def _ports(config: Config, by: str, devices: list[str], sysfs: Path) -> Iterator[Remark]:
    bad: Literal["warning", "fault"] = "fault" if config.data_path == "verbs" else "warning"
    wanted = [name for name in devices if not config.verbs_device or name in config.verbs_device]
    up = False
    for name in wanted:
        try:
            text = _port_texts(binding(by), name, sysfs)
        except VerbsError as e:
            fix = "the user needs rights on /dev/infiniband/*; in a container: --device=/dev/infiniband"
            yield Remark(bad, f"{name}, by {by}: {e}", fix)
            continue
        if text:
            up = True
            yield Remark("ok", f"{name}, by {by}: {'; '.join(text)}")
        else:
            yield Remark(bad, f"{name}: no port is active and has an address", "bring its interface up (`rdma link`)")
    if not wanted:
        found = f"none of {', '.join(config.verbs_device)} is here: {', '.join(devices)}"
        yield Remark(bad, found, "correct verbs_device")
    elif not up:
        yield Remark("note", "other hosts are read over TCP")


def _port_texts(verbs: Binding, name: str, sysfs: Path) -> list[str]:
    device = verbs.open(name)
    try:
        texts = []
        for port in device.ports():
            gids: tuple[Gid, ...] = gids_of(port, sysfs)
            if gids:
                gid = best_gid(gids, "")
                address = ":".join(gid.raw.hex()[i : i + 4] for i in range(0, 32, 4))
                texts.append(f"port {port.number}, address {address} (place {gid.index})")
        return texts
    finally:
        device.close()


def _memlock(config: Config) -> Iterator[Remark]:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY or limit >= config.size or _may_lock():
        return
    yield Remark(
        "warning",
        f"this process may lock {format_size(limit)} of memory, and a device locks what it uses of the pool",
        "ulimit -l unlimited (systemd: LimitMEMLOCK=infinity; Docker: --ulimit memlock=-1)",
    )


def _may_lock() -> bool:
    try:
        lines = file_text("/proc/self/status").splitlines()
        return bool(int(next(line for line in lines if line.startswith("CapEff")).split()[1], 16) >> CAP_IPC_LOCK & 1)
    except (OSError, StopIteration, ValueError, IndexError):
        return os.geteuid() == 0
