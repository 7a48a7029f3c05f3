"""The figures that kvplug promises: what each must reach, what was measured, on which machine.

Benchmarks record into ``bench/results/<part>.json``; :func:`collect` puts the parts together, and this module prints
them as a table and writes ``figures.json`` and ``figures.md``. ``python bench/figures.py`` shows what the last runs
left.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

RESULTS: Final = Path(__file__).resolve().parent / "results"
JSON_FILE: Final = "figures.json"
MARKDOWN_FILE: Final = "figures.md"


@dataclasses.dataclass(frozen=True, slots=True)
class Figure:
    """One promise. ``limit`` None: no promise, shown because another figure is read beside it."""

    name: str
    what: str
    unit: str
    limit: float | None
    at_least: bool = False

    def met(self, measured: float) -> bool | None:
        """Whether ``measured`` keeps the promise; None without one."""
        if self.limit is None:
            return None
        return measured >= self.limit if self.at_least else measured <= self.limit

    def target(self) -> str:
        """The limit as people write it."""
        if self.limit is None:
            return ""
        return f"{'≥' if self.at_least else '≤'} {self.limit:g} {self.unit}".rstrip()


def _sized(name: str, what: str, limits: dict[str, float]) -> list[Figure]:
    return [Figure(f"{name}_{size.replace(' ', '')}", f"{what}, {size}", "", x, True) for size, x in limits.items()]


def _lookups() -> list[Figure]:
    return [
        Figure(f"{call}_{found}_{age}", f"{call} of 2048 keys, all {found}, {words}", "ms", 0.5)
        for age, words in (("fresh", "fresh pool"), ("turned", "after 20 turnovers"))
        for call in ("exists", "match_prefix")
        for found in ("hit", "miss")
    ]


def _hit_rates() -> list[Figure]:
    return [
        Figure(f"{trace}_{policy}", f"{words}: hit rate of {policy}", "%", None)
        for trace, words in (
            ("trace_one", "one agent that outgrows the cache"),
            ("trace_six", "six agents by turns"),
            ("trace_given", "trace that was given"),
        )
        for policy in ("tail_first", "lru", "fifo")
    ]


_FETCHES: Final = ("16 KiB", "256 KiB", "2 MiB")

FIGURES: Final = (
    *_sized("get", "second process: get ÷ memcpy", {"256 KiB": 0.90, "2 MiB": 0.95, "32 KiB": 0.75}),
    *_sized("put", "second process: put into a full pool ÷ memcpy", {"256 KiB": 0.75, "2 MiB": 0.80, "32 KiB": 0.55}),
    *_lookups(),
    Figure("hold_p99", "lock hold time, p99, a busy Python thread beside", "ms", 1.0),
    Figure("hold_p99_eight", "lock hold time, p99, eight processes at work", "ms", 1.0),
    Figure("rebuild", "rebuild of 100,000 slots after a death inside a section", "ms", 100.0),
    Figure("rebuild_lookup", "look-up of 256 keys during that rebuild, p99", "ms", None),
    Figure("pin", "look up, pin and release 2048 keys", "ms", 1.5),
    Figure("pin_cold", "the same with cold caches", "ms", 1.5),
    Figure("one_get", "one get of 256 KiB, p50 ÷ its memcpy", "×", 1.6),
    Figure("attach", "attach to a 4 GiB pool", "ms", 50.0),
    Figure("create", "create a 4 GiB pool and store the first block", "ms", 200.0),
    Figure("kernels", "loading the compiled kernels, once in a process", "ms", None),
    Figure("tables", "tables and index ÷ pool, 256 KiB blocks", "%", 1.0),
    Figure("eight_get", "eight processes' get bandwidth ÷ one process's", "", 1.0, True),
    Figure("eight_slowest", "eight processes, gets, puts and pins: slowest call", "ms", 100.0),
    Figure("vllm_ttft", "vLLM: time to first token from a warm pool ÷ computing it", "", 0.2),
    Figure("vllm_unseen", "vLLM: prompts never seen, with kvplug ÷ without", "", 1.03),
    Figure("vllm_step", "vLLM: scheduler's own time in a step that admits no request", "µs", 100.0),
    Figure("sglang_ttft", "SGLang: time to first token from a warm pool ÷ computing it", "", 0.3),
    Figure("sglang_unseen", "SGLang: prompts never seen, with kvplug ÷ without", "", 1.05),
    Figure("sglang_ttft_hicache", "the first of them in hicache mode", "", None),
    Figure("sglang_unseen_hicache", "the second of them in hicache mode", "", None),
    Figure("sglang_lookup", "SGLang, linker mode: lookup of 512 pages, pinned, on the scheduler thread", "ms", 0.5),
    Figure("keys", "key making for 16 tokens, incremental", "µs", 1.0),
    *_sized("fetch", "fetch from a peer by TCP on loopback ÷ one bare stream", dict.fromkeys(_FETCHES, 0.9)),
    Figure("fetch_redhare", "the same, as fast as redhare over TCP; least of three sizes", "×", 1.0, True),
    Figure("fetch_mooncake", "the same, as fast as Mooncake over TCP; least of three sizes", "×", 1.0, True),
    Figure("fetch_lookup", "look up and lease 2048 keys at a peer, round trip", "ms", 3.0),
    Figure(
        "fetch_beside_python", "a thread of the reader that always runs Python: waits for a fetch beside it", "%", None
    ),
    Figure("directory_publish", "directory: a million names written, a second", "thousand", 50.0, True),
    Figure("directory_lookup", "directory: 2048 keys of a million read in one round trip", "ms", 5.0),
    *_hit_rates(),
)
BY_NAME: Final = {f.name: f for f in FIGURES}


def machine() -> str:
    """Processor, cores in use, memory, kernel and accelerators of this machine, in one line."""
    import os
    import platform

    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    family = {"cpu family": "", "model": ""}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in family and not family[name.strip()]:
            family[name.strip()] = value.strip()
    cache = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    last_level = f", L3 {cache.read_text().strip()}" if cache.exists() else ""
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    return (
        f"{model} (family {family['cpu family']} model {family['model']}), {cores} cores{last_level}, {gib:.0f} GiB, "
        f"{gpus or 'no'} GPU, Linux {platform.release().split('-')[0]}, Python {platform.python_version()}"
    )


def record(part: str, name: str, measured: float, *, rounds: int, beside: str = "", note: str = "") -> None:
    """Keep a measured figure. ``beside``: what was measured in the same run for comparison (memcpy, say)."""
    when = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    seen = {"measured": measured, "rounds": rounds, "beside": beside, "note": note, "machine": machine(), "when": when}
    _keep(part, name, seen)


def not_measured(part: str, name: str, why: str) -> None:
    """Say in the figure's row why there is none, and forget an earlier one."""
    _keep(part, name, {"measured": None, "note": why})


def _keep(part: str, name: str, seen: dict[str, Any]) -> None:
    if name not in BY_NAME:
        raise KeyError(f"{name} is no figure; see FIGURES")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{part}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept[name] = seen
    path.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


def collect() -> list[dict[str, Any]]:
    """Every figure with its target and what was last measured (``None`` if it was not), in the order of FIGURES."""
    kept: dict[str, dict[str, Any]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        if path.name != JSON_FILE and isinstance(part := json.loads(path.read_text()), dict):
            kept |= {k: v for k, v in part.items() if k in BY_NAME}
    rows = []
    for f in FIGURES:
        seen = kept.get(f.name, {})
        measured = seen.get("measured")
        met = None if measured is None else f.met(measured)
        rows.append(
            {
                "name": f.name,
                "what": f.what,
                "target": f.target(),
                "unit": f.unit,
                "measured": measured,
                "verdict": {True: "PASS", False: "FAIL", None: ""}[met],
                **{k: seen.get(k, "") for k in ("beside", "rounds", "note", "machine", "when")},
            }
        )
    return rows


def _shown(row: dict[str, Any]) -> str:
    x = row["measured"]
    if x is None:
        return "not measured"
    digits = 0 if x >= 100 else 1 if x >= 10 else 2 if x >= 0.1 else 3
    return f"{x:.{digits}f} {row['unit']}".rstrip()


def print_table(console: Console | None = None) -> None:
    """The figures as a table on the terminal."""
    table = Table(title="Figures", caption=machine(), caption_justify="left")
    for name, how in (
        ("what", "left"),
        ("target", "right"),
        ("measured", "right"),
        ("", "left"),
        ("in the same run", "left"),
    ):
        table.add_column(name, justify=how, overflow="fold")  # type: ignore[arg-type]
    colour = {"PASS": "[green]PASS[/]", "FAIL": "[bold red]FAIL[/]", "": ""}
    for row in collect():
        beside = "; ".join(x for x in (row["beside"], row["note"]) if x)
        table.add_row(row["what"], row["target"], _shown(row), colour[row["verdict"]], beside)
    (console or Console()).print(table)


def write() -> None:
    """``figures.json`` for programs, ``figures.md`` for README."""
    rows = collect()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / JSON_FILE).write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    lines = ["| what | at least / at most | measured | | in the same run |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['what']} | {r['target']} | {_shown(r)} | {r['verdict']} | {r['beside']} |"
        for r in rows
        if r["measured"] is not None
    ]
    machines = sorted({r["machine"] for r in rows if r["machine"]})
    when = max((r["when"] for r in rows if r["when"]), default="")
    lines += ["", f"`just bench`, {when} UTC, on: {'; '.join(machines)}."]
    (RESULTS / MARKDOWN_FILE).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write()
    print_table()
    sys.exit(any(r["verdict"] == "FAIL" for r in collect()))
