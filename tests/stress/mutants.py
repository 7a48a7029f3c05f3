"""Bugs put in on purpose: each breaks one promise, and the stress run has to notice every one of them.

The packages are copied, one piece of text is replaced, and the run is started on the copy. A mutant that survives says
that the run is blind there. numba compiles the copies; with ``KVPLUG_KERNELS=native`` a library is made of each.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from kvplug.shm import native

ROOT: Final = Path(__file__).resolve().parents[2]
RUN_TIMEOUT_S: Final = 420


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A replacement: ``old`` stands exactly once in ``file``."""

    file: str
    old: str
    new: str
    breaks: str


_COMPLETE: Final = "        codes[i] = STALE\n        r = row_at(T, row)\n"

MUTANTS: Final[dict[str, Mutant]] = {
    "no_second_look": Mutant(
        "shm/read.py",
        "if load_acquire(base + 8 * (r + R_WORD)) != word:\n            continue",
        "if False:\n            continue",
        "a read is not compared with the generation it began at",
    ),
    "no_pin_reaping": Mutant(
        "shm/reap.py",
        "T[r + R_PIN + w] &= ~gone",
        "T[r + R_PIN + w] &= -1",
        "pins of the dead stay",
    ),
    "no_write_reaping": Mutant(
        "shm/reap.py",
        "if T[r + R_WORD] & STATE_MASK == WRITING:",
        "if False:",
        "unfinished slots of the dead stay",
    ),
    "reaped_too_soon": Mutant(
        "shm/reap.py",
        "        if not alive:\n            bits",
        "        if True:\n            bits",
        "a session is reaped while one of its processes still writes",
    ),
    "dirty_never_set": Mutant(
        "shm/write.py",
        "    dirty(T, L)\n    cls = class_of(T, stride)",
        "    cls = class_of(T, stride)",
        "a death inside a section goes unnoticed",
    ),
    "dirty_cleared_early": Mutant(
        "shm/write.py",
        "    fail(L, RESERVE_WORD)\n",
        "    clean(T, L)\n    fail(L, RESERVE_WORD)\n",
        "the tables are called whole before they are",
    ),
    "freed_on_abort": Mutant(
        "shm/write.py",
        "        if writers_done:\n",
        "        if True:\n",
        "a slot is free while a late copy still writes to it",
    ),
    "shared_pin_bit": Mutant(
        "shm/pins.py",
        "            counts[row] -= 1\n            if counts[row] == 0:",
        "            counts[row] -= 1\n            if True:",
        "the first of two releases takes the pin away",
    ),
    "evicts_pinned": Mutant(
        "shm/evict.py",
        "        if T[r + R_PIN + w] != 0:\n            return True",
        "        if False:\n            return True",
        "a pinned block is evicted, removed and drained away",
    ),
    "forgets_siblings": Mutant(
        "shm/evict.py",
        "        if which == 0:\n            return 0",
        "        if True:\n            return 0",
        "a victim leaves its siblings behind",
    ),
    "takes_pinned_siblings": Mutant(
        "shm/evict.py",
        " and not is_pinned(T, sibling):",
        ":",
        "a pinned block goes with its sibling",
    ),
    "victim_not_checked": Mutant(
        "shm/write.py",
        "same = T[r + R_WORD] == word and T[r + R_TICK] == tick and is_slot_of(T, row, cls) and not is_pinned(T, row)",
        "same = True",
        "a victim that was found without the lock is believed",
    ),
    "sealed_too_soon": Mutant(
        "shm/write.py",
        "    if T[row_at(T, row) + R_DONE] != (1 << n_parts) - 1:",
        "    if T[row_at(T, row) + R_DONE] == 0:",
        "a block is readable before all its parts are written",
    ),
    "no_checksum": Mutant(
        "shm/write.py",
        "(row + part) * PART_WORDS + PART_XXH3] = checksum",
        "(row + part) * PART_WORDS + PART_XXH3] = 0",
        "the checksum is not kept",
    ),
    "rebuild_forgets": Mutant(
        "shm/rebuild.py",
        "for slab in range(n_slabs - 1, -1, -1):",
        "for slab in range(n_slabs - 1, 0, -1):",
        "a rebuild leaves out a slab",
    ),
    "index_hole": Mutant(
        "shm/index.py",
        "if ((j - home) & mask) >= ((j - i) & mask):",
        "if False:",
        "a deletion cuts off the entries behind it",
    ),
    "stale_completion": Mutant(
        "shm/write.py",
        _COMPLETE
        + "        if T[r + R_WORD] != ((gens[i] << GEN_SHIFT) | WRITING):\n            continue\n        n_parts",
        _COMPLETE + "        if T[r + R_WORD] & STATE_MASK != WRITING:\n            continue\n        n_parts",
        "a late writer seals the slot's next block",
    ),
    "child_keeps_lock": Mutant(
        "shm/liveness.py",
        "            os.close(fd)  # closes a copy",
        "            pass  # closes a copy",
        "a child keeps its dead parent's lock and liveness",
    ),
}


def build(mutant: Mutant, into: Path) -> None:
    """A copy of the packages, as they are installed, with the bug in it."""
    ignore = shutil.ignore_patterns("__pycache__", "*.nb?", "*.so")
    shutil.copytree(ROOT / "kvplug", into / "kvplug", ignore=ignore)  # follows its links: shm and all
    path = into / "kvplug" / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.file} has {text.count(mutant.old)} times, not once: {mutant.old!r}")
    path.write_text(text.replace(mutant.old, mutant.new))


def hunt(name: str, *, kills: int, seed: int, actors: int) -> tuple[bool, str, float]:
    """(found, the first thing that was noticed, seconds) of a run on a mutant."""
    with tempfile.TemporaryDirectory(prefix=f"kvplug-mutant-{name}-") as folder:
        build(MUTANTS[name], Path(folder))
        environment = {native.ENV: "numba", **os.environ, "PYTHONPATH": folder, "KVPLUG_TEST_EXPECT": folder}
        if environment[native.ENV] == "native":
            command = [sys.executable, "-m", "kvplug.shm.build", "--level=best"]
            subprocess.run(command, env=environment, cwd=folder, check=True)  # a module is looked for here first
        began = time.monotonic()
        command = [
            sys.executable,
            str(ROOT / "tests/stress/run.py"),
            f"--kills={kills}",
            f"--seed={seed}",
            f"--actors={actors}",
            "--stop-at-first",
        ]
        try:
            done = subprocess.run(
                command,
                env=environment,
                capture_output=True,
                text=True,
                timeout=RUN_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return True, f"hung for {RUN_TIMEOUT_S} s", float(RUN_TIMEOUT_S)
    said = [line[2:] for line in done.stdout.splitlines() if line.startswith("! ")]
    notes = [note for note in said if not note.startswith("stumble")]  # an actor's own fault would be no find
    if not notes and "kills=" not in done.stdout:
        raise SystemExit(
            f"the run on mutant {name} did not come to its end:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        )
    return bool(notes), notes[0] if notes else "survived", time.monotonic() - began


def main(name: str, *, kills: int, seed: int, actors: int) -> int:
    """Run one mutant, or all. Exit status 0: each was found."""
    if name == "list":
        for mutant_name, mutant in MUTANTS.items():
            print(f"{mutant_name}: {mutant.breaks}")
        return 0
    names = list(MUTANTS) if name == "all" else [name]
    if name != "all" and name not in MUTANTS:
        print(f"no mutant is called {name!r}; there are: {', '.join(MUTANTS)}")
        return 2
    survivors = 0
    for one in names:
        found, what, took = hunt(one, kills=kills, seed=seed, actors=actors)
        survivors += not found
        print(
            f"{'found   ' if found else 'SURVIVED'} {one} in {took:.0f} s ({MUTANTS[one].breaks}): {what[:200]}",
            flush=True,
        )
    print(f"mutants={len(names)} found={len(names) - survivors} survived={survivors} seed={seed}")
    return 1 if survivors else 0
