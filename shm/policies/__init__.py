"""Eviction policies, one file each, chosen by name."""

from __future__ import annotations

from kvplug.errors import ConfigError
from kvplug.shm.policies.base import Policy
from kvplug.shm.policies.fifo import Fifo
from kvplug.shm.policies.lru import Lru
from kvplug.shm.policies.tail_first import TailFirst

_ALL: tuple[type[Policy], ...] = (TailFirst, Lru, Fifo)


def by_name(name: str) -> Policy:
    """The policy called ``name``; ConfigError if there is none."""
    for policy in _ALL:
        if policy.name == name:
            return policy()
    raise ConfigError(f"no eviction policy is called {name!r}; there are: {', '.join(p.name for p in _ALL)}")


def by_number(number: int) -> Policy:
    """The policy that a segment names; ConfigError if this version does not know it."""
    for policy in _ALL:
        if policy.number == number:
            return policy()
    raise ConfigError(f"the pool uses eviction policy number {number}, which this version does not know")
