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
    """One promise. ``what`` is read alone: it says what is measured, and a ratio says what is divided by what.
    ``limit`` None: no promise, shown because another figure is read beside it.
    """

    name: str
    what: str
    unit: str
    limit: float | None
    at_least: bool = False
    """Whether higher is better, so that the limit is a lower one."""

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

    def better(self) -> str:
        """Which way is good."""
        return "higher" if self.at_least else "lower"


def _sized(name: str, what: str, limits: dict[str, float]) -> list[Figure]:
    """One figure for each size of blocks; ``what`` has ``{}`` where the size stands."""
    return [Figure(f"{name}_{size.replace(' ', '')}", what.format(size), "", x, True) for size, x in limits.items()]


def _lookups() -> list[Figure]:
    return [
        Figure(f"{call}_{found}_{age}", f"`{call}` of 2048 keys, all {there}, {words}: time of the call", "ms", 0.5)
        for age, words in (("fresh", "in a fresh pool"), ("turned", "in a pool that was turned over 20 times"))
        for call in ("exists", "match_prefix")
        for found, there in (("hit", "present"), ("miss", "absent"))
    ]


def _hit_rates() -> list[Figure]:
    return [
        Figure(
            f"{trace}_{policy}", f"{words}, policy `{policy}`: leading blocks found ÷ blocks asked for", "%", None, True
        )
        for trace, words in (
            ("trace_one", "trace of one agent whose context outgrows the pool"),
            ("trace_six", "trace of six agents by turns"),
            ("trace_given", "trace that `KVPLUG_BENCH_TRACE` names"),
        )
        for policy in ("tail_first", "lru", "fifo")
    ]


_FETCHES: Final = ("16 KiB", "256 KiB", "2 MiB")

FIGURES: Final = (
    *_sized(
        "get",
        "`get` by a second process, {} blocks: bandwidth ÷ memcpy's",
        {"256 KiB": 0.90, "2 MiB": 0.95, "32 KiB": 0.75},
    ),
    *_sized(
        "put",
        "`put` into a full pool by a second process, {} blocks: bandwidth ÷ memcpy's",
        {"256 KiB": 0.75, "2 MiB": 0.80, "32 KiB": 0.55},
    ),
    *_lookups(),
    Figure("hold_p99", "pool's lock, a busy Python thread beside: time held, p99", "ms", 1.0),
    Figure("hold_p99_eight", "pool's lock, eight processes at work: time held, p99", "ms", 1.0),
    Figure("rebuild", "rebuild of 100,000 slots after a process died inside a locked section: time", "ms", 100.0),
    Figure("rebuild_lookup", "lookup of 256 keys while 100,000 slots are rebuilt: time, p99", "ms", None),
    Figure("pin", "look up, pin and release 2048 keys, warm caches: time", "ms", 1.5),
    Figure("pin_cold", "look up, pin and release 2048 keys, cold caches: time", "ms", 1.5),
    Figure("one_get", "one `get` of a 256 KiB block: median time ÷ memcpy's", "×", 1.6),
    Figure("attach", "attach to a pool of 4 GiB: time", "ms", 50.0),
    Figure("create", "create a pool of 4 GiB and store the first block: time", "ms", 200.0),
    Figure("kernels", "load the compiled kernels, once in a process: time", "ms", None),
    Figure(
        "start_first_use",
        "first use after an installation, compiled library beside numba: CPU time ÷ CPU time",
        "",
        0.02,
    ),
    Figure(
        "start_ready",
        "fresh process until its first `put` and `get`, compiled library beside numba: time ÷ time",
        "",
        0.25,
    ),
    Figure(
        "start_memory",
        "fresh process after its first `get`, memory beyond numpy's, compiled library beside numba: MiB ÷ MiB",
        "",
        0.25,
    ),
    *(
        Figure(f"native_{name}", f"{what}, compiled library beside numba: time ÷ time", "", 1.0)
        for name, what in (
            ("get", "one `get` of a 256 KiB block"),
            ("exists", "`exists` of 2048 keys"),
            ("match", "`match_prefix` of 2048 keys"),
            ("get_many", "`get` of 64 blocks of 256 KiB"),
            ("put_many", "`remove` and `put` of 64 blocks of 256 KiB"),
            ("pin", "256 keys pinned and released"),
            ("hold", "pool's lock under these calls, time held, median"),
        )
    ),
    Figure("stat_cpu", "`kvplug stat` from the shell, in a pipe: CPU time", "s", 0.15),
    Figure("start_vllm", "vLLM's first start in a fresh container: time with kvplug ÷ without", "", 1.02),
    Figure("start_sglang", "SGLang's first start in a fresh container: time with kvplug ÷ without", "", 1.02),
    Figure("tables", "tables and index, 256 KiB blocks: their memory ÷ the pool's", "%", 1.0),
    Figure("eight_get", "`get` by eight processes at once: bandwidth together ÷ one process's alone", "", 1.0, True),
    Figure("eight_slowest", "eight processes get, put and pin: time of the slowest call", "ms", 100.0),
    Figure("vllm_ttft", "vLLM, time to first token: prompt read from a warm pool ÷ computed", "", 0.2),
    Figure("vllm_unseen", "vLLM, whole request, prompt never seen: time with kvplug ÷ without", "", 1.03),
    Figure(
        "vllm_step", "vLLM, step that admits no request: time in kvplug on the scheduler's thread, median", "µs", 100.0
    ),
    Figure(
        "sglang_ttft", "SGLang in linker mode, time to first token: prompt read from a warm pool ÷ computed", "", 0.3
    ),
    Figure(
        "sglang_unseen", "SGLang in linker mode, whole request, prompt never seen: time with kvplug ÷ without", "", 1.05
    ),
    Figure(
        "sglang_ttft_hicache",
        "SGLang in hicache mode, time to first token: prompt read from a warm pool ÷ computed",
        "",
        None,
    ),
    Figure(
        "sglang_unseen_hicache",
        "SGLang in hicache mode, whole request, prompt never seen: time with kvplug ÷ without",
        "",
        None,
    ),
    Figure(
        "sglang_lookup",
        "SGLang in linker mode, 512 pages looked up and pinned: time on the scheduler's thread",
        "ms",
        0.5,
    ),
    Figure("keys", "keys of 16 more tokens of a prompt: time to make them", "µs", 1.0),
    *_sized(
        "fetch",
        "fetch from an agent over TCP on loopback, {} blocks: bandwidth ÷ one plain TCP stream's",
        dict.fromkeys(_FETCHES, 0.9),
    ),
    Figure(
        "fetch_redhare",
        "fetch over TCP on loopback: bandwidth ÷ redhare's, least of three block sizes",
        "×",
        1.0,
        True,
    ),
    Figure(
        "fetch_mooncake",
        "fetch over TCP on loopback: bandwidth ÷ Mooncake's, least of three block sizes",
        "×",
        1.0,
        True,
    ),
    Figure("fetch_lookup", "look up and lease 2048 keys at an agent on this machine: round trip", "ms", 3.0),
    Figure(
        "fetch_beside_python",
        "busy Python thread in an engine that fetches: time it waits for the GIL ÷ time of the fetch",
        "%",
        None,
    ),
    Figure("directory_publish", "a million names written to the directory: names a second", "thousand", 50.0, True),
    Figure("directory_lookup", "2048 keys looked up in a directory of a million: round trip", "ms", 5.0),
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
                "better": f.better(),
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


HEAD: Final = ("| what | better | target | measured | | in the same run |", "|---|---|---|---|---|---|")


def line(row: dict[str, Any]) -> str:
    """A row of :func:`collect` in Markdown, under :data:`HEAD`."""
    shown = (row["what"], row["better"], row["target"], _shown(row), row["verdict"], row["beside"])
    return f"| {' | '.join(shown)} |"


def print_table(console: Console | None = None) -> None:
    """The figures as a table on the terminal."""
    table = Table(title="Figures", caption=machine(), caption_justify="left")
    for name, how in (
        ("what", "left"),
        ("better", "left"),
        ("target", "right"),
        ("measured", "right"),
        ("", "left"),
        ("in the same run", "left"),
    ):
        table.add_column(name, justify=how, overflow="fold")  # type: ignore[arg-type]
    colour = {"PASS": "[green]PASS[/]", "FAIL": "[bold red]FAIL[/]", "": ""}
    for row in collect():
        beside = "; ".join(x for x in (row["beside"], row["note"]) if x)
        table.add_row(row["what"], row["better"], row["target"], _shown(row), colour[row["verdict"]], beside)
    (console or Console()).print(table)


def write() -> None:
    """``figures.json`` for programs, ``figures.md`` for ``docs/figures.md``."""
    rows = collect()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / JSON_FILE).write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    lines = [*HEAD, *(line(r) for r in rows if r["measured"] is not None)]
    machines = sorted({r["machine"] for r in rows if r["machine"]})
    when = max((r["when"] for r in rows if r["when"]), default="")
    lines += ["", f"`just bench`, {when} UTC, on: {'; '.join(machines)}."]
    (RESULTS / MARKDOWN_FILE).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write()
    print_table()
    sys.exit(any(r["verdict"] == "FAIL" for r in collect()))
