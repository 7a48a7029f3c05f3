"""`just stress`: kill processes on a small full pool and count what went wrong. See tests/stress/README.md."""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # last: a mutated copy on PYTHONPATH comes first

KILLS_A_FAILPOINT = 20
KILLS_IN_LOCK = 300
FULL_RUN = 2000


def main() -> int:
    """Exit status 0: nothing went wrong (or, with --mutant, what was put in on purpose was found)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=FULL_RUN)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--actors", type=int, default=4)
    parser.add_argument("--json", default=None, help="also write the report here")
    parser.add_argument("--mutant", default=None, help="a bug from tests/stress/mutants.py, `all`, or `list`")
    parser.add_argument("--stop-at-first", action="store_true")
    parser.add_argument("--interrupts", type=int, default=0, help="instead: so many exceptions out of signal handlers")
    parser.add_argument("--calls", type=int, default=0, help="instead: so many calls with arbitrary arguments")
    args = parser.parse_args()
    seed = random.SystemRandom().getrandbits(31) if args.seed is None else args.seed
    if args.interrupts:
        return interrupted(args.interrupts, seed)
    if args.calls:
        return called(args.calls, seed)
    if args.mutant:
        from tests.stress import mutants

        return mutants.main(args.mutant, kills=args.kills, seed=seed, actors=args.actors)
    from tests.stress import control

    expected = os.environ.get("KVPLUG_TEST_EXPECT")
    if expected and not str(control.actors.failpoints.__file__).startswith(expected):
        raise SystemExit(
            f"the mutated copy in {expected} is not what was imported: {control.actors.failpoints.__file__}"
        )
    with tempfile.TemporaryDirectory(prefix="kvplug-stress-") as scratch:
        r = control.run(
            kills=args.kills, seed=seed, n_actors=args.actors, stop_at_first=args.stop_at_first, scratch=scratch
        )
    for note in r.notes:
        print("!", note)
    from kvplug.shm import failpoints

    print("kills per failpoint: " + " ".join(f"{name}={r.at[name]}" for name in failpoints.NAMES))
    print(
        f"at random instants={r.random_kills} inside the lock={r.inside_lock} stopped holders={r.stopped_holders} "
        f"parents of orphans={r.orphans} rebuilds={r.rebuilds} reaped pins={r.reaped_pins} "
        f"reaped writes={r.reaped_writes} slab moves={r.slab_moves} evictions={r.evictions}"
    )
    print(
        f"calls={r.calls} blocks read and compared={r.hits} slowest call={r.slowest_ms:.0f} ms "
        f"tables found broken={r.broken_tables} groups parted={r.parted} other={r.other} stumbles={r.stumbles}"
    )
    print(
        f"kills={r.kills} wrong_bytes={r.wrong_bytes} leaked_slots={r.leaked_slots} leaked_pins={r.leaked_pins} "
        f"hung={r.hung} seed={seed}"
    )
    if args.json:
        Path(args.json).write_text(json.dumps({**vars(r), "at": dict(r.at)}, indent=1))
    short = []
    if args.kills >= FULL_RUN:
        short = [name for name in failpoints.NAMES if r.at[name] < KILLS_A_FAILPOINT]
        if r.inside_lock < KILLS_IN_LOCK:
            short.append(f"inside the lock ({r.inside_lock} of {KILLS_IN_LOCK})")
        if short:
            print("too few kills at: " + ", ".join(short))
    return 1 if r.violations or r.stumbles or short or r.kills < args.kills else 0


def interrupted(n: int, seed: int) -> int:
    """Half of the exceptions at random instants, half at instructions in turn."""
    from tests.stress import interrupts

    random_ones = interrupts.at_random(f"stress-{os.getpid()}-r", n - n // 2, seed)
    stride = max(1, interrupts.INSTRUCTIONS * 2 // n)
    each = interrupts.at_every_instruction(f"stress-{os.getpid()}-e", stride=stride, offset=seed % stride)
    for note in (*random_ones.notes, *each.notes):
        print("!", note)
    failed, leaked = random_ones.failed + each.failed, random_ones.leaked + each.leaked
    print(
        f"interrupts={random_ones.interrupts + each.interrupts} at random instants={random_ones.interrupts} "
        f"at instructions={each.interrupts} failed={failed} leaked={leaked} seed={seed}"
    )
    return 1 if failed or leaked or random_ones.interrupts + each.interrupts < n // 2 else 0


def called(n: int, seed: int) -> int:
    """Arbitrary arguments: typed errors, nothing changed."""
    from tests.stress import calls

    def said(tally: calls.Tally) -> None:
        print(f"{tally.calls} of {n}", file=sys.stderr, flush=True)

    tally = calls.run(f"stress-{os.getpid()}-c", n, seed, said)
    for note in tally.notes:
        print("!", note)
    print(f"calls={tally.calls} refused={tally.refused} failed={len(tally.notes)} seed={seed}")
    return 1 if tally.notes or tally.calls < n else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
