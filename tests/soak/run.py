"""`just soak`: a vLLM engine and two SGLang engines on one pool, under load and kills. See tests/soak/README.md."""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

NICE = 5
COUNTED = (
    *("right", "lost", "given_up", "mid_request", "stops", "lingered", "checks"),
    *("stored", "evicted", "reaped_pins", "reaped_writes", "rebuilds"),
)


def main() -> int:
    """Exit status 0: nothing was found, and enough was done (or, with --defect, what was put in was found)."""
    from tests.soak.defects import DEFECTS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="of load, from when all engines are up")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--kills-per-minute", type=float, default=3.0)
    parser.add_argument("--clients", type=int, default=3, help="requests under way at each engine")
    parser.add_argument("--cases", type=int, default=60, help="different prompts")
    parser.add_argument("--logs", type=Path, default=None, help="keep the engines' logs in this folder")
    parser.add_argument("--defect", choices=DEFECTS, default=None, help="put a fault in; ends when it is found")
    args = parser.parse_args()
    seed = random.SystemRandom().getrandbits(31) if args.seed is None else args.seed

    from tests.soak.control import Settings, run

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing is left running

    with contextlib.ExitStack() as stack:
        folder = args.logs or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvplug-soak-")))
        load = (args.minutes, args.kills_per_minute, args.clients, args.cases)
        findings = run(Settings(seed, *load, folder, args.defect))
    c = findings.counts
    seats = [name.removeprefix("kills_") for name in c if name.startswith("kills_")]
    print(" ".join(f"{name}: kills={c[f'kills_{name}']} reused={c[f'reused_{name}']}" for name in seats))
    print(" ".join(f"{name}={c[name]}" for name in COUNTED), f"slowest={findings.slowest_s:.1f} s")
    print(findings.summary(seed))
    if args.defect:
        print(f"{'found' if c['wrong'] else 'SURVIVED'}: {DEFECTS[args.defect]}")
        return 0 if c["wrong"] else 1
    short = [f"{name} was never killed" for name in seats if not c[f"kills_{name}"]]
    short += [f"{name} read nothing from the pool after its kills" for name in seats if not c[f"reused_{name}"]]
    if not c["evicted"]:
        short.append("nothing was evicted")
    if short:
        print("too little: " + "; ".join(short))
    return 1 if findings.bad or short else 0


if __name__ == "__main__":
    os.nice(NICE)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
