"""Faults put in on purpose: a soak that does not find them is blind."""

from __future__ import annotations

from typing import Literal

import numpy as np

from kvplug.errors import Code
from kvplug.store import KvStore
from tests.inside import pool_of
from tests.soak.findings import Findings

__all__ = ["DEFECTS", "Defect", "Zeros"]

Defect = Literal["zeros", "identity"]
DEFECTS: dict[Defect, str] = {
    "zeros": "sealed blocks are overwritten with zeros, and the engines do not verify",
    "identity": "two engines with different weights say that they have the same, so that they share their keys",
}


class Zeros:
    """Overwrites blocks of a living pool behind everybody's back."""

    def __init__(self, store: KvStore, findings: Findings) -> None:
        self._store, self._findings = store, findings
        self._events = pool_of(store).events(max_events=1 << 14)

    def some(self) -> None:
        """Every block that was sealed since the last time and is still there."""
        keys = np.unique(self._events.read().keys, axis=0)
        if not len(keys):
            return
        batch = self._store.pin_batch(keys)
        there = np.flatnonzero(batch.codes == Code.OK)
        for at, nbytes in zip(batch.offsets[there].tolist(), batch.nbytes[there].tolist(), strict=True):
            self._store.mapping[at : at + nbytes] = 0
        self._store.unpin(batch.slots)
        self._findings.add("zeroed", len(there))
