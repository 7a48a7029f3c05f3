"""What the sub-commands print with: a table fits the terminal; in a pipe a line is as long as it needs to be.

Where output can't be written (a full disk) the command says so in one line and ends with status 1; where nobody reads
it any more (`| head -1`) it ends without a word, as commands do. A stream that was closed from the start takes nothing.
rich is imported where a table is made: most calls in scripts make none.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer

from kvplug.errors import KvplugError

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

__all__ = [
    "CLOSED_PIPE_STATUS",
    "OutputError",
    "cell",
    "complain",
    "emit_json",
    "mention",
    "prepare",
    "say",
    "show",
    "table",
]

PIPE_WIDTH = 100_000
LAST_COLUMN = 14
"""Least width of a column that may be folded, in characters: no word of a pool's state is longer."""
CLOSED_PIPE_STATUS = 128 + 13
"""What a shell reports of a command that SIGPIPE has ended."""


class OutputError(KvplugError):
    """What was to be printed could not be; what the command was to do may be done."""


def prepare() -> None:
    """Before anything is printed: what the locale has no letters for is escaped, and no file becomes stream 0 to 2."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:  # it was closed, and its number would go to the next file
        pass
    os.close(fd)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def _written() -> Iterator[None]:
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        give_up()
        raise typer.Exit(CLOSED_PIPE_STATUS) from None
    except OSError as error:
        give_up()
        raise OutputError(f"the output can't be written: {error.strerror}") from None


def give_up() -> None:
    """What is still to be written goes nowhere, also when the interpreter ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _write(text: str) -> None:
    if sys.stdout is not None:
        sys.stdout.write(text)


def say(text: str) -> None:
    """One line, as it is."""
    with _written():
        _write(text + "\n")


def mention(text: str) -> None:
    """The same, of a process that goes on: not being able to say it is no reason to end."""
    with contextlib.suppress(OutputError, typer.Exit):
        say(text)


def complain(text: str) -> None:
    """One line on stderr."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"kvplug: {text}\n")
        sys.stderr.flush()


def show(renderable: Any) -> None:
    """A table or another rich object.

    In a pipe, and on a terminal too narrow for it: without colours, and without the blanks that pad a column.
    """
    from rich.console import Console
    from rich.measure import Measurement

    with _written():
        if sys.stdout is not None and sys.stdout.isatty():
            terminal = Console(highlight=False, emoji=False)
            wide = terminal.options.update_width(PIPE_WIDTH)
            if Measurement.get(terminal, wide, renderable).minimum <= terminal.width:
                terminal.print(renderable)
                return
        console = Console(highlight=False, emoji=False, width=PIPE_WIDTH, color_system=None)
        with console.capture() as captured:
            console.print(renderable)
        _write("".join(line.rstrip() + "\n" for line in captured.get().splitlines()))


def emit_json(value: Any) -> None:
    """For machines: one JSON document, never coloured or wrapped."""
    with _written():
        _write(json.dumps(value, indent=2) + "\n")


def cell(text: str, style: str = "") -> Text:
    """What stands in a table as it is, whatever rich would make of its brackets."""
    from rich.text import Text

    return Text(text, style=style)


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """A table without lines; the columns in *right* are numbers, and the last one is the one that may be folded."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for at, column in enumerate(columns, start=1):
        last = at == len(columns)
        made.add_column(
            column,
            justify="right" if column in right else "left",
            overflow="fold",
            no_wrap=not last,
            min_width=LAST_COLUMN if last else None,  # rich would fold it to nothing beside wide ones
        )
    return made
