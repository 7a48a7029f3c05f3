"""The demo: three starts of a real server, one pool.

    ./justw demo                                 vLLM with a tiny model made here, on the CPU
    MODEL=Qwen/Qwen3-0.6B ./justw demo           that model; on the GPU where there is one
    ./justw demo --engine sglang                 SGLang on the CPU; --mode hicache for its other way

Engine A gets a long prompt and computes it. Engine B starts beside it and gets the same. A is killed with SIGKILL,
starts again, and gets it again. The table says where each engine had the prompt's tokens from, and whether the
answers are equal. Ends with 0 if B and the restarted A read from the pool and answered the same, else with 1.

Answers are compared with A's first one in float32. In half precision a greedy answer may differ between a prompt that
is computed and one that is read from a cache, vLLM's own cache included; they are then compared with what A answers
when it reads the prompt from its own cache, which is the same schedule.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from bench.demo_engines import Asked, Sglang, Show, Vllm
from kvplug.sizes import format_size
from kvplug.store import KvStore, PoolStats
from tests.lab.env import EngineError, temporary_pool
from tests.lab.process import LabProcess

T = TypeVar("T")

SEAL_S = 30.0
"""Longest wait for a prompt's blocks to be stored behind the engine's back."""
WARM_UP_TOKENS = 300
QUIET_S = 20.0
"""Where there is no terminal: how long a step may last before a line says that it does."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    engine: str
    answer: Asked


class Steps:
    """The steps so far with their times, the running one with a spinner and the engine's latest words."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._done: list[Text] = []
        self._live = Live(console=console, refresh_per_second=8, transient=False) if console.is_terminal else None
        self._log: Path | None = None

    def __enter__(self) -> Steps:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.update(Group(*self._done))
            self._live.stop()

    def run(self, what: str, call: Callable[[], T], log: Path | None = None) -> T:
        """Does one step; *log*: a file whose last line is shown while it runs."""
        began = time.monotonic()
        stop = threading.Event()
        spinner = Spinner("dots", text=what)

        def tell() -> None:
            while not stop.wait(0.15 if self._live else QUIET_S):
                words = _last_words(log) if log else ""
                text = Text.assemble(f"{what}  {time.monotonic() - began:.0f} s  ", (words, "dim"))
                if self._live:
                    spinner.update(text=text)
                else:
                    self._console.print(Text.assemble("… ", text))

        if self._live:
            self._live.update(Group(*self._done, spinner))
        threading.Thread(target=tell, daemon=True).start()
        try:
            answer = call()
        finally:
            stop.set()
        line = Text.assemble(("✓ ", "green"), what, (f"  {time.monotonic() - began:.1f} s", "dim"))
        self._done.append(line)
        if self._live:
            self._live.update(Group(*self._done))
        else:
            self._console.print(line)
        return answer


def _last_words(log: Path) -> str:
    """The end of a log file's last line, without the engine's own head of it."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 2000))
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        if lines:
            return lines[-1].rpartition("] ")[2][-70:]
    return ""


def make_text(words: int) -> str:
    """Made-up words, always the same."""
    rng = random.Random(20)
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    return " ".join("".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(words))


def wait_until_stored(pool: str) -> PoolStats:
    """Waits until nothing is being written; storing happens behind the engine's back."""
    deadline = time.monotonic() + SEAL_S
    with KvStore(pool, create=False) as store:
        while True:
            stats = store.stats()
            if (stats.sealed_blocks and not stats.writing_slots) or time.monotonic() > deadline:
                return stats._replace(sessions=stats.sessions - 1)  # this one's
            time.sleep(0.05)


def perform(the: Show, tokens: int, out: int, pool: str, folder: Path, steps: Steps) -> tuple[list[Row], PoolStats]:
    """The play in its acts; engines are ended when it is over, whatever happens."""
    with contextlib.ExitStack() as stack:
        rows: list[Row] = []

        def boot(name: str) -> LabProcess:
            server = stack.enter_context(the.start(folder / f"{name}.log", pool, tokens))
            steps.run(f"engine {name} starts ({the.command})", lambda: the.ready(server, first=not rows), server.log)
            # Something else first: the first request of any engine also pays for what an engine does once.
            the.ask(server, the.tokenize(server, make_text(WARM_UP_TOKENS)[::-1])[:WARM_UP_TOKENS], 4)
            return server

        def ask(what: str, name: str, server: LabProcess) -> None:
            rows.append(Row(name, steps.run(what, lambda: the.ask(server, prompt, out))))

        a = boot("A")
        prompt = the.tokenize(a, make_text(tokens))[:tokens]
        ask(f"A gets a prompt of {len(prompt)} tokens", "A", a)
        steps.run("its blocks are stored", lambda: wait_until_stored(pool))
        ask("A gets it again", "A again", a)
        b = boot("B")
        ask("B gets the same prompt", "B", b)
        steps.run("A is killed: SIGKILL to all of its processes", a.kill_all)
        ask("A gets the same prompt", "A, restarted", boot("A-restarted"))
        return rows, wait_until_stored(pool)


def judge(rows: list[Row], *, exact: bool) -> list[str]:
    """What went wrong, in sentences; empty if all is well."""
    control = rows[0] if exact else rows[1]
    wrong = []
    for row in rows[2:]:
        if row.answer.pool == 0:
            wrong.append(f"{row.engine}: nothing was read from the pool")
        if row.answer.tokens != control.answer.tokens:
            wrong.append(f"{row.engine}: the answer differs from that of {control.engine}")
    return wrong


def show(console: Console, rows: list[Row], stats: PoolStats, the: Show) -> None:
    """The two tables."""
    control = rows[0] if the.exact else rows[1]
    table = Table(title=f"one prompt of {rows[0].answer.prompt_tokens} tokens", title_justify="left")
    for heading in ("engine", "first token", "faster by", "computed", "reused", "from", "equal"):
        table.add_column(heading, justify="left" if heading in ("engine", "from", "equal") else "right")
    for row in rows:
        faster = rows[0].answer.ttft_s / row.answer.ttft_s
        table.add_row(
            row.engine,
            f"{row.answer.ttft_s * 1000:.0f} ms",
            "" if row is rows[0] else f"÷ {faster:.0f}" if faster >= 10 else f"÷ {faster:.1f}",
            str(row.answer.computed),
            str(row.answer.pool + row.answer.own_cache),
            _origin(row.answer),
            _equality(row, rows[0], control),
        )
    console.print()
    console.print(table)
    figures = Table(title=f"the pool {stats.pool}", title_justify="left", show_header=False)
    for name, value in (
        ("size", format_size(stats.size_bytes)),
        ("blocks in it", f"{stats.sealed_blocks} ({format_size(stats.sealed_bytes)})"),
        ("stored / evicted", f"{stats.stored_blocks} / {stats.evicted_blocks} blocks"),
        ("engines attached now", str(stats.sessions)),
        ("of the killed one, reclaimed", f"{stats.reaped_clients} processes, {stats.reaped_pins} pins"),
        ("corrupt blocks met", str(stats.corrupt_blocks)),
    ):
        figures.add_row(name, value)
    console.print(figures)


def _origin(answer: Asked) -> str:
    return ", ".join(name for name, n in (("the pool", answer.pool), ("its own cache", answer.own_cache)) if n) or "–"


def _equality(row: Row, first: Row, control: Row) -> str:
    if row is first:
        return "–"
    if row.answer.tokens == first.answer.tokens:
        return "[green]yes[/]"
    if row is control:
        return "no (rounding)"
    return f"yes, to {control.engine}" if row.answer.tokens == control.answer.tokens else "[bold red]NO[/]"


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM cleans up as Ctrl-C does."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--engine", choices=("vllm", "sglang"), default="vllm", help="which engine (default vllm)")
    parser.add_argument(
        "--mode", choices=("linker", "hicache", "auto"), default="auto", help="of SGLang (default auto)"
    )
    parser.add_argument("--tokens", type=int, help="length of the prompt (default: 6000 for vLLM, 3000 for SGLang)")
    parser.add_argument("--out", type=int, default=24, help="tokens to generate (default 24)")
    arguments = parser.parse_args()
    console = Console()
    began = time.monotonic()
    with (
        terminated_as_interrupted(),
        tempfile.TemporaryDirectory(prefix="kvplug-demo-") as folder,
        temporary_pool("demo") as pool,
    ):
        try:
            with Steps(console) as steps:
                make = {"vllm": Vllm, "sglang": lambda: Sglang(arguments.mode)}[arguments.engine]
                the: Show = steps.run("a model", make)
                tokens = arguments.tokens or the.prompt_tokens
                rows, stats = perform(the, tokens, arguments.out, pool, Path(folder), steps)
        except EngineError as error:
            console.print(Panel(Text(str(error)), title="an engine failed", border_style="red"))
            return 1
        except KeyboardInterrupt:
            console.print("interrupted; the engines are ended and the pool is removed")
            return 130
    show(console, rows, stats, the)
    wrong = judge(rows, exact=the.exact)
    for line in wrong:
        console.print(f"[bold red]{line}[/]")
    if not wrong:
        speed = rows[0].answer.ttft_s / rows[-1].answer.ttft_s
        took = time.monotonic() - began
        console.print(f"\nThe killed engine came back warm: its first token {speed:.0f} × sooner. {took:.0f} s in all.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
