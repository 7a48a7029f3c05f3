"""The race of ``races.py`` with the CPU's copies, where nothing overtakes: it shows that the race itself is right."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")

from kvplug.adapters.devices.base import ByteRuns
from kvplug.adapters.devices.cpu import CpuCopy
from tests.devices.races import BLOCKS, Race
from tests.devices.test_cpu import SLAB_BYTES, rig_of


def test_copies_in_order_pass() -> None:
    out = Race(rig_of(CpuCopy(), SLAB_BYTES), 4096).run(50)
    assert out.wrong == 0, out
    assert out.rounds == 50


class Early(CpuCopy):
    """Copies as if they had been made before the engine's step: what a missing wait comes to."""

    def __init__(self, race: dict[str, Any], what: str) -> None:
        self.what = ""
        super().__init__()
        self.race, self.what = race, what

    def store(self, runs: ByteRuns, block_ids: Any, dst: Any, after: Any) -> Any:
        hashes = super().store(runs, block_ids, dst, after)
        if self.what == "store":
            race = self.race["race"]
            race.words_of(int(race.slots[0]))[:] -= 1
        return hashes

    def load(self, runs: ByteRuns, src: Any, block_ids: Any, after: Any) -> None:
        super().load(runs, src, block_ids, after)
        if self.what == "load":
            race = self.race["race"]
            race.witness[0][0] = race.layers[0][BLOCKS - 1]


@pytest.mark.parametrize(("what", "found"), [("store", "stale_stores"), ("load", "overtaken_reads")])
def test_a_copy_that_came_too_early_is_noticed(what: str, found: str) -> None:
    box: dict[str, Any] = {}
    box["race"] = race = Race(rig_of(Early(box, what), SLAB_BYTES), 4096)
    assert getattr(race.run(5), found) == 5
