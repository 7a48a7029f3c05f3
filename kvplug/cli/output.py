"""What the sub-commands print with: a table fits the terminal; in a pipe a line is as long as it needs to be.

Where output can't be written (a full disk) the command says so in one line and ends with status 1; where nobody reads
it any more (`| head -1`) it ends without a word, as commands do. A stream that was closed from the start takes nothing.
Tables are laid out here: a library for it takes longer to import than `kvplug stat` takes for the rest.
"""

from __future__ import annotations

import contextlib
import os
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any, Final

from kvplug.errors import KvplugError

__all__ = [
    "CLOSED_PIPE_STATUS",
    "OutputError",
    "Table",
    "cell",
    "complain",
    "emit_json",
    "mention",
    "prepare",
    "say",
    "show",
    "table",
    "width",
]

LAST_COLUMN: Final = 14
"""Least width of a column that may be folded, in characters: no word of a pool's state is longer."""
GAP: Final = "  "
USUAL_WIDTH: Final = 80
STYLES: Final = {"bold": "1", "dim": "2", "green": "32", "yellow": "33", "cyan": "36", "bold red": "1;31"}
"""As terminals know them (ECMA-48, select graphic rendition)."""
Cell = list[tuple[str, str]]
"""Lines of a table's cell: (text, style)."""
CLOSED_PIPE_STATUS: Final = 128 + 13
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
        raise SystemExit(CLOSED_PIPE_STATUS) from None
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
    with contextlib.suppress(OutputError, SystemExit):
        say(text)


def complain(text: str) -> None:
    """One line on stderr."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"kvplug: {text}\n")
        sys.stderr.flush()


def emit_json(value: Any) -> None:
    """For machines: one JSON document, never coloured or wrapped."""
    import json

    with _written():
        _write(json.dumps(value, indent=2) + "\n")


def width() -> int:
    """Columns of the terminal, or what COLUMNS says."""
    with contextlib.suppress(ValueError):
        if (told := int(os.environ.get("COLUMNS", ""))) > 0:
            return told
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.get_terminal_size(sys.stdout.fileno()).columns or USUAL_WIDTH
    return USUAL_WIDTH


def _takes_colours() -> bool:
    """Whether the terminal does, and its user wants them (https://no-color.org)."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") not in ("dumb", "unknown")


def show(made: Table) -> None:
    """A table.

    In a pipe, and on a terminal too narrow for it: each row in one line, without colours.
    """
    with _written():
        fits = sys.stdout is not None and sys.stdout.isatty() and made.least_width <= width()
        _write(made.text(width(), coloured=_takes_colours()) if fits else made.text())


def cell(text: str, style: str = "") -> Cell:
    """What stands in a table, line by line. What would move the terminal's cursor is escaped."""
    return [(_printable(line), style) for line in text.split("\n")]


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _columns(text: str) -> int:
    """How many a text takes on a terminal."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in ("W", "F") else 1 for c in text
    )


def _folded(text: str, most: int) -> Iterator[str]:
    """Lines of at most so many columns, broken between words."""
    line = ""
    for word in text.split(" "):
        longer = f"{line} {word}" if line else word
        if line and _columns(longer) > most:
            yield line
            longer = word
        line = longer
    yield line


class Table:
    """Columns without lines between them; the last one may be folded."""

    def __init__(self, columns: tuple[str, ...], right: tuple[str, ...]) -> None:
        self._right = [column in right for column in columns]
        self._rows: list[list[Cell]] = [[cell(column, "bold") for column in columns]]

    def add_row(self, *cells: str | Cell) -> None:
        """One for each column."""
        self._rows.append([cell(one) if isinstance(one, str) else one for one in cells])

    def _texts(self, at: int) -> Iterator[str]:
        return (text for row in self._rows for text, _ in row[at])

    def _widths(self) -> list[int]:
        return [max(map(_columns, self._texts(at))) for at in range(len(self._right))]

    @property
    def least_width(self) -> int:
        """Of all columns together, when the last is folded as far as its words allow."""
        *others, last = self._widths()
        word = max(_columns(word) for text in self._texts(-1) for word in text.split(" "))
        return sum(others) + len(GAP) * len(others) + min(last, max(word, LAST_COLUMN))

    def text(self, most: int | None = None, *, coloured: bool = False) -> str:
        """What is printed; *most*: columns of the terminal, at least :attr:`least_width`."""
        *others, last = widths = self._widths()
        if most is not None:
            widths[-1] = min(last, most - sum(others) - len(GAP) * len(others))
        return "".join(line + "\n" for row in self._rows for line in self._lines(row, widths, coloured))

    def _lines(self, row: list[Cell], widths: list[int], coloured: bool) -> Iterator[str]:
        folded = [(part, style) for text, style in row[-1] for part in _folded(text, widths[-1])]
        cells = [*row[:-1], folded]
        for at in range(max(map(len, cells))):
            line = ""
            for one, most, right in zip(cells, widths, self._right, strict=True):
                text, style = one[at] if at < len(one) else ("", "")
                blanks = " " * (most - _columns(text))
                painted = f"\x1b[{STYLES[style]}m{text}\x1b[0m" if coloured and style and text else text
                line += (blanks + painted if right else painted + blanks) + GAP
            yield line.rstrip()


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """A table without rows yet; the columns in *right* are numbers."""
    return Table(columns, right)
