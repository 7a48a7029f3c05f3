"""Hosts of one machine: a network namespace each, on a switch of their own, with addresses that nobody else can reach.

Nothing of the machine's own network is touched: the switch is a bridge in a namespace too. Needs root and iproute2.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess

__all__ = ["Network", "cannot"]

INSTALL = "bash tests/hosts/install.sh"


def cannot() -> str | None:
    """Why there can be no namespaces here; None if there can. Raises AssertionError where a tool is missing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "tc"):
        assert shutil.which(tool), f"no {tool} here, which belongs to iproute2: {INSTALL}"
    probe = f"kvplug{os.getpid()}p"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False, timeout=30)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False, timeout=30)
    return f"root may make no network namespaces here: {made.stderr.strip()}" if made.returncode else None


class Network:
    """``hosts`` of them, numbered from 0; host *i* has the address 10.77.0.*i+1*."""

    def __init__(self, hosts: int) -> None:
        self._name = f"kvplug{os.getpid()}"
        self._switch = f"{self._name}sw"
        self._hosts = hosts
        try:
            self._ip("netns", "add", self._switch)
            self._in_switch("link", "add", "br0", "type", "bridge")
            self._in_switch("link", "set", "br0", "up")
            for i in range(hosts):
                self._ip("netns", "add", self.namespace(i))
                here = ("-n", self.namespace(i))
                self._ip(*here, "link", "set", "lo", "up")
                self._ip(*here, "link", "add", "eth0", "type", "veth", "peer", f"port{i}", "netns", self._switch)
                self._ip(*here, "address", "add", f"{self.address(i)}/24", "dev", "eth0")
                self._ip(*here, "link", "set", "eth0", "up")
                self._in_switch("link", "set", f"port{i}", "master", "br0", "up")
        except BaseException:
            self.close()
            raise

    def namespace(self, host: int) -> str:
        """Its name."""
        return f"{self._name}h{host}"

    def address(self, host: int) -> str:
        """Its address, which is there in its namespace only."""
        return f"10.77.0.{host + 1}"

    def inside(self, host: int) -> list[str]:
        """What a command is appended to, to be run on this host."""
        return ["ip", "netns", "exec", self.namespace(host)]

    def slow_down(self, host: int, mbit_s: int) -> None:
        """What this host sends leaves at that rate."""
        shape = ["root", "tbf", "rate", f"{mbit_s}mbit", "burst", "256kb", "latency", "100ms"]
        _run([*self.inside(host), "tc", "qdisc", "replace", "dev", "eth0", *shape])

    def cut(self, host: int) -> None:
        """Nothing passes to or from this host any more, and nobody is told."""
        self._in_switch("link", "set", f"port{host}", "nomaster")

    def restore(self, host: int) -> None:
        """As before the cut."""
        self._in_switch("link", "set", f"port{host}", "master", "br0")

    def close(self) -> None:
        """Remove everything."""
        for name in [*(self.namespace(i) for i in range(self._hosts)), self._switch]:
            with contextlib.suppress(AssertionError):
                self._ip("netns", "del", name)

    def _in_switch(self, *arguments: str) -> None:
        self._ip("-n", self._switch, *arguments)

    def _ip(self, *arguments: str) -> None:
        _run(["ip", *arguments])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"
