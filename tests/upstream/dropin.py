"""Compares the calls that KvStore has under other stores' names with the real ones'.

    python -m tests.upstream.dropin            exit status 1 where an answer is not as recorded
    python -m tests.upstream.dropin --write    record the answers in dropin.toml, and set the table of docs/dropin.md

Wants bench/others_install.sh's environment, libibverbs.so.1 (Mooncake's, also without RDMA), and a Redis or Valkey.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from kvplug import KvStore
from kvplug.shm import layout, segment
from tests.inside import pool_of
from tests.rdma.redis_server import binaries
from tests.upstream import dropin_calls

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RECORDED = HERE / "dropin.toml"
PAGE = ROOT / "docs" / "dropin.md"
PYTHON = ROOT / ".venv" / "others" / "bin" / "python"
BEGIN, END = "<!-- answers: begin -->\n", "<!-- answers: end -->\n"
SYSTEMS = {"kvplug": "KvStore", "mooncake": "Mooncake 0.3.13", "redhare": "redhare 0.6.0"}
ANSWER_S = 300
POOL_BYTES = 64 << 20
HEAD = "# What each store answers, by call: made and checked by dropin.py\n"
EITHER = {("put-twice", "redhare"), ("put-twice-size", "redhare")}
"""Where another system answers now so, now otherwise: what it said of the bytes is left out."""
Answers = dict[str, dict[str, str]]


def said(answer: dict[str, Any]) -> str:
    """An answer in one line."""
    words = [str(answer["codes"])]
    if "then" in answer:
        words.append(f"there then: {answer['then']}")
    if "right" in answer and isinstance(answer["codes"], list) and answer["codes"]:
        words.append(f"right bytes: {answer['right']}")
    return "; ".join(words)


def of_kvplug() -> dict[str, str]:
    """What KvStore answers, on a pool of its own."""
    pool = f"dropin-{os.getpid()}"
    buffer = np.zeros(2 * dropin_calls.ROOM_BYTES, np.uint8)
    try:
        with KvStore(pool, POOL_BYTES) as store:
            store.register_buffer(buffer.ctypes.data, buffer.nbytes)
            told = dropin_calls.answers(store, buffer, list(dropin_calls.CASES))
            pool_of(store).T[layout.H_INDEX_SEQ] += 1  # as a process leaves it that dies while it moves entries
            told[dropin_calls.LAST_CASE] = {"codes": store.batch_is_exist(["b", "c"])}
            pool_of(store).T[layout.H_INDEX_SEQ] += 1
    finally:
        segment.remove_pool(pool, force=True)
    return {case: said(answer) for case, answer in told.items()}


def of_other(system: str, python: Path) -> dict[str, str]:
    """What another system answers. Raises RuntimeError where it does not run."""
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder, "answers.json"), Path(folder, "log")
        with log.open("wb") as out:
            command = [python, dropin_calls.__file__, system, (binaries() or [""])[0], file]
            done = subprocess.run(command, stdout=out, stderr=out, timeout=ANSWER_S, check=False)
        if done.returncode or not file.exists():
            raise RuntimeError(
                f"{system} did not answer all calls (status {done.returncode}): {log.read_text()[-2000:]}"
            )
        told = json.loads(file.read_text())
    for case in told:
        if (case, system) in EITHER:
            told[case] = {"codes": f"{told[case]['codes']}; the bytes of one of them"}
    return {case: said(answer) for case, answer in told.items()}


def recorded() -> Answers:
    """Answers of all systems, by case."""
    return tomllib.loads(RECORDED.read_text())


def table(answers: Answers) -> str:
    """The answers as a table for the page."""
    lines = ["| call | " + " | ".join(SYSTEMS.values()) + " |", "|---" * (len(SYSTEMS) + 1) + "|"]
    for case, by in answers.items():
        what = dropin_calls.CASES[case][0] if case in dropin_calls.CASES else dropin_calls.LAST_CASE_IS
        lines.append("| " + " | ".join([what, *(by[system] for system in SYSTEMS)]) + " |")
    return "\n".join(lines) + "\n"


def page_with(answers: Answers) -> str:
    """The page with this table."""
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    return before + BEGIN + table(answers) + END + rest.split(END)[1]


def write(answers: Answers) -> None:
    """Record the answers, in the file and on the page."""
    lines = [HEAD]
    for case, by in answers.items():
        lines += [f"[{case}]", *(f"{system} = {json.dumps(by[system])}" for system in SYSTEMS), ""]
    RECORDED.write_text("\n".join(lines).rstrip("\n") + "\n")
    PAGE.write_text(page_with(answers))


def main() -> int:
    """Ask all three."""
    arguments = argparse.ArgumentParser(prog="python -m tests.upstream.dropin", description=__doc__.split("\n")[0])
    arguments.add_argument("--write", action="store_true", help="record what is answered now")
    arguments.add_argument("--python", type=Path, default=PYTHON, help="interpreter that has the others")
    options = arguments.parse_args()
    by_system = {"kvplug": of_kvplug()}
    by_system |= {system: of_other(system, options.python) for system in SYSTEMS if system != "kvplug"}
    now = {case: {system: by_system[system][case] for system in SYSTEMS} for case in by_system["kvplug"]}
    if options.write:
        write(now)
    before = recorded()
    other = [
        f"{case}, {system}: {now[case][system]}, recorded: {before.get(case, {}).get(system)}"
        for case in now
        for system in SYSTEMS
        if now[case][system] != before.get(case, {}).get(system)
    ]
    print("\n".join(other) or f"{len(now)} calls, {len(SYSTEMS)} systems: every answer is as recorded")
    return 1 if other else 0


if __name__ == "__main__":
    sys.exit(main())
