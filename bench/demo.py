"""The demo: three starts of a real vLLM server, one pool.

    ./justw demo                                 a tiny model made here, on the CPU
    MODEL=Qwen/Qwen3-0.6B ./justw demo           that model; on the GPU where there is one

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
import os
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

from kvplug.config import default_size_bytes
from kvplug.sizes import format_size
from kvplug.store import KvStore, PoolStats
from tests.vllm_lab.engine import Completion, EngineError, Server, temporary_pool
from tests.vllm_lab.models import LLAMA_BIG, model_dir

T = TypeVar("T")

TINY_POOL_BYTES = 512 * 1024**2
SEAL_S = 30.0
"""Longest wait for a prompt's blocks to be stored behind the engine's back."""
BOOT_S = 600.0
DOWNLOAD_S = 3600.0
WARM_UP_TOKENS = 300


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table. Tokens are the prompt's; times in seconds."""

    engine: str
    answer: Completion
    computed: int
    own_cache: int
    pool: int


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
            while not stop.wait(0.15):
                words = _last_words(log) if log else ""
                spinner.update(text=Text.assemble(f"{what}  {time.monotonic() - began:.0f} s  ", (words, "dim")))

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
    """The end of a log file's last line, without vLLM's own head of it."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 2000))
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        if lines:
            return lines[-1].rpartition("] ")[2][-70:]
    return ""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is run: the model and how vLLM is to run it."""

    model: str
    arguments: tuple[str, ...]
    env: dict[str, str | None]
    pool_bytes: int
    exact: bool
    """Whether answers are equal between computing and reading (float32)."""


def plan(tokens: int) -> Plan:
    """The tiny model on the CPU, or ``MODEL``, on a GPU where there is one."""
    model = os.environ.get("MODEL")
    room = tokens + 256
    common = ("--max-model-len", str(room), "--enforce-eager")
    gpu = Path("/dev/nvidia0").exists()
    env: dict[str, str | None] = {"KVPLUG_VERIFY": os.environ.get("KVPLUG_VERIFY")}
    if model is None:
        size = min(TINY_POOL_BYTES, default_size_bytes())
        budget = ("--dtype", "float32", "--max-num-batched-tokens", str(room))
        return Plan(str(model_dir(LLAMA_BIG)), (*common, *budget), env, size, exact=True)
    env["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE")
    if gpu:  # two engines at once on one device
        return Plan(model, (*common, "--gpu-memory-utilization", "0.4"), env, default_size_bytes(), exact=False)
    env["VLLM_CPU_KVCACHE_SPACE"] = "4"
    return Plan(model, (*common, "--dtype", "float32"), env, default_size_bytes(), exact=True)


def make_text(words: int) -> str:
    """Made-up words, always the same."""
    rng = random.Random(20)
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    return " ".join("".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(words))


def ask(server: Server, name: str, prompt: list[int], out: int) -> Row:
    """Sends the prompt; what vLLM's own counters say of where its tokens came from."""
    kinds = ("local_compute", "local_cache_hit", "external_kv_transfer")

    def counters() -> list[float]:
        metrics = server.metrics()
        return [metrics.get(f'vllm:prompt_tokens_by_source_total{{source="{kind}"}}', 0.0) for kind in kinds]

    before = counters()
    answer = server.complete(prompt, out, timeout_s=BOOT_S)
    computed, own, pool = (int(b - a) for a, b in zip(before, counters(), strict=True))
    return Row(name, answer, computed, own, pool)


def wait_until_stored(pool: str) -> PoolStats:
    """Waits until nothing is being written; storing happens behind the engine's back."""
    deadline = time.monotonic() + SEAL_S
    with KvStore(pool, create=False) as store:
        while True:
            stats = store.stats()
            if (stats.sealed_blocks and not stats.writing_slots) or time.monotonic() > deadline:
                return dataclasses.replace(stats, sessions=stats.sessions - 1)  # this one's
            time.sleep(0.05)


def perform(the: Plan, tokens: int, out: int, pool: str, folder: Path, steps: Steps) -> tuple[list[Row], PoolStats]:
    """The play in its acts; engines are ended when it is over, whatever happens."""
    with contextlib.ExitStack() as stack:
        rows: list[Row] = []

        def boot(name: str) -> Server:
            server = stack.enter_context(
                Server(
                    the.model,
                    folder / f"{name}.log",
                    pool=pool,
                    size=str(the.pool_bytes),
                    env=the.env,
                    arguments=the.arguments,
                )
            )
            first_time = os.environ.get("MODEL") and not rows
            steps.run(
                f"engine {name} starts (vllm serve, VLLM_PLUGINS=kvplug)",
                lambda: server.ready(DOWNLOAD_S if first_time else BOOT_S),
                server.log,
            )
            # Something else first: the first request of any engine also pays for what an engine does once.
            server.complete(server.tokenize(make_text(WARM_UP_TOKENS)[::-1])[:WARM_UP_TOKENS], 4, timeout_s=BOOT_S)
            return server

        a = boot("A")
        prompt = a.tokenize(make_text(tokens))[:tokens]
        rows.append(steps.run(f"A gets a prompt of {len(prompt)} tokens", lambda: ask(a, "A", prompt, out)))
        steps.run("its blocks are stored", lambda: wait_until_stored(pool))
        rows.append(steps.run("A gets it again", lambda: ask(a, "A again", prompt, out)))
        b = boot("B")
        rows.append(steps.run("B gets the same prompt", lambda: ask(b, "B", prompt, out)))
        steps.run("A is killed: SIGKILL to all of its processes", a.kill_all)
        again = boot("A-restarted")
        rows.append(steps.run("A gets the same prompt", lambda: ask(again, "A, restarted", prompt, out)))
        return rows, wait_until_stored(pool)


def judge(rows: list[Row], *, exact: bool) -> list[str]:
    """What went wrong, in sentences; empty if all is well."""
    control = rows[0] if exact else rows[1]
    wrong = []
    for row in rows[2:]:
        if row.pool == 0:
            wrong.append(f"{row.engine}: nothing was read from the pool")
        if row.answer.tokens != control.answer.tokens:
            wrong.append(f"{row.engine}: the answer differs from that of {control.engine}")
    return wrong


def show(console: Console, rows: list[Row], stats: PoolStats, the: Plan) -> None:
    """The two tables."""
    control = rows[0] if the.exact else rows[1]
    table = Table(title=f"one prompt of {rows[0].answer.prompt_tokens} tokens", title_justify="left")
    for heading in ("engine", "first token", "", "computed", "reused", "from", "equal"):
        table.add_column(heading, justify="left" if heading in ("engine", "from", "equal") else "right")
    for row in rows:
        faster = rows[0].answer.ttft_s / row.answer.ttft_s
        table.add_row(
            row.engine,
            f"{row.answer.ttft_s * 1000:.0f} ms",
            "" if row is rows[0] else f"÷ {faster:.0f}" if faster >= 10 else f"÷ {faster:.1f}",
            str(row.computed),
            str(row.pool + row.own_cache),
            ", ".join(name for name, n in (("the pool", row.pool), ("its own cache", row.own_cache)) if n) or "–",
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
    parser.add_argument("--tokens", type=int, default=6000, help="length of the prompt (default 6000)")
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
                the = steps.run("a model", lambda: plan(arguments.tokens))
                rows, stats = perform(the, arguments.tokens, arguments.out, pool, Path(folder), steps)
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
