"""What the sub-commands print with: a table fits the terminal; in a pipe a line is as long as it needs to be."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["complain", "emit_json", "say", "show", "table"]

PIPE_WIDTH = 400


def say(text: str) -> None:
    """One line, as it is: brackets in it are no markup."""
    Console(highlight=False, soft_wrap=True).print(text, markup=False)


def complain(text: str) -> None:
    """One line on stderr."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"kvplug: {text}", markup=False)


def show(renderable: Any) -> None:
    """A table or another rich object. In a pipe: without colours, and without the blanks that pad a column."""
    if sys.stdout.isatty():
        Console(highlight=False).print(renderable)
        return
    console = Console(highlight=False, width=PIPE_WIDTH, color_system=None)
    with console.capture() as captured:
        console.print(renderable)
    sys.stdout.writelines(line.rstrip() + "\n" for line in captured.get().splitlines())


def emit_json(value: Any) -> None:
    """For machines: one JSON document, never coloured or wrapped."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """A table without lines; the columns in *right* are numbers."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made
