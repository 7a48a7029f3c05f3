"""Makes the pictures of the documentation out of text, with Python alone.

    python docs/images/make.py            writes them, as `just pictures` does
    python docs/images/make.py --check    says whether they are what it would write; ends with 1 if not

``overview.svg`` is drawn from ``overview.txt``. ``first-token.svg`` is plotted from the table in ``../figures.md``, so
that no figure stands in two places. Each picture has a background of its own and colours for light and dark.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

HERE = Path(__file__).resolve().parent
FIGURES = HERE.parent / "figures.md"
TITLE_PX, SMALL_PX = 14, 13
BOLD_EM, GLYPH_EM = 0.62, 0.56
"""Mean width of a glyph of the widest font named below, in titles and in other words: what is wider than its box by
that is an error."""
LINE_PX = 19
STYLE = """
  text { font: 14px system-ui, "Segoe UI", "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; fill: #1f2328 }
  .title { font-weight: 600 }
  .small { font-size: 13px; fill: #59636e }
  .paper { fill: #ffffff; stroke: #d1d9e0 }
  .group { fill: #f6f8fa; stroke: #d1d9e0 }
  .box { fill: #ffffff; stroke: #818b98 }
  .pool { fill: #ddf4e4; stroke: #2da44e }
  .line { fill: none; stroke: #59636e; stroke-width: 1.5 }
  .head { fill: #59636e }
  .optional { stroke-dasharray: 5 4 }
  .with { fill: #2da44e }
  .without { fill: #b6bfc9 }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc }
    .small { fill: #9198a1 }
    .paper { fill: #0d1117; stroke: #3d444d }
    .group { fill: #151b23; stroke: #3d444d }
    .box { fill: #0d1117; stroke: #656c76 }
    .pool { fill: #12361f; stroke: #3fb950 }
    .line { stroke: #9198a1 }
    .head { fill: #9198a1 }
    .with { fill: #3fb950 }
    .without { fill: #4a525c }
  }
"""


class PictureError(ValueError):
    """A text from which no picture can be made: what is wrong with it, and where."""


@dataclass(frozen=True)
class Box:
    """A rectangle with words; x and y are its upper left corner, in pixels."""

    kind: str
    x: int
    y: int
    width: int
    height: int
    words: tuple[str, ...]


def picture(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    """A whole SVG. ``title`` is what screen readers say."""
    paper = f'<rect class="paper" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>'
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        paper,
        *parts,
        "</svg>",
        "",
    ])  # fmt: skip


def text(x: float, y: float, words: str, *, kind: str = "", anchor: str = "middle") -> str:
    """One line of words; y is its base line."""
    of_kind = f' class="{kind}"' if kind else ""
    return f'<text{of_kind} x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words, quote=False)}</text>'


# -- the drawing -------------------------------------------------------------------------------------------------


def drawing(description: str) -> str:
    """The SVG that a description in the form of ``overview.txt`` stands for."""
    size, boxes, arrows = (0, 0), dict[str, Box](), list[tuple[str, str, str, str]]()
    for number, line in enumerate(description.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        head, *words = (part.strip() for part in line.split("|"))
        kind, *rest = head.split()
        try:
            if kind == "size":
                size = int(rest[0]), int(rest[1])
            elif kind in ("group", "box", "pool"):
                x, y, width, height = map(int, rest[1:])
                boxes[rest[0]] = _fitting(Box(kind, x, y, width, height, tuple(words)))
            elif kind in ("arrow", "both", "dashed"):
                arrows.append((kind, rest[0], rest[1], " ".join(words)))
                assert {rest[0], rest[1]} <= boxes.keys(), "an arrow between boxes that are not there"
            else:
                raise PictureError(f"{kind!r} is no kind of line")
        except (ValueError, IndexError, AssertionError) as error:
            raise PictureError(f"line {number}, {line!r}: {error}") from error
    parts = [part for box in boxes.values() for part in _drawn(box)]
    for kind, start, end, words in arrows:
        parts += _arrow(kind, boxes[start], boxes[end], words)
    return picture(*size, "Engines of one host on one pool, and what other hosts have", parts)


def _fitting(box: Box) -> Box:
    for i, words in enumerate(box.words):
        if len(words) * (SMALL_PX * GLYPH_EM if i else TITLE_PX * BOLD_EM) > box.width - 8:
            raise PictureError(f"{words!r} is wider than its box of {box.width} pixels")
    if box.kind != "group" and len(box.words) * LINE_PX > box.height - 8:
        raise PictureError(f"{len(box.words)} lines are higher than their box of {box.height} pixels")
    return box


def _drawn(box: Box) -> Iterator[str]:
    yield (
        f'<rect class="{box.kind}" x="{box.x}" y="{box.y}" width="{box.width}" height="{box.height}" '
        f'rx="{10 if box.kind == "group" else 6}"/>'
    )
    if box.kind == "group":
        yield text(box.x + 20, box.y + 26, box.words[0], kind="title", anchor="start")
        return
    top = box.y + (box.height - len(box.words) * LINE_PX) / 2 + 14
    for i, words in enumerate(box.words):
        yield text(box.x + box.width / 2, top + i * LINE_PX, words, kind="small" if i else "title")


def _arrow(kind: str, start: Box, end: Box, words: str) -> Iterator[str]:
    """A line across the gap between two boxes, in the middle of what they have side by side."""
    left, right = max(start.x, end.x), min(start.x + start.width, end.x + end.width)
    upper, lower = max(start.y, end.y), min(start.y + start.height, end.y + end.height)
    if left < right:
        down = start.y < end.y
        a = (left + right) / 2, float(start.y + start.height if down else start.y)
        b = a[0], float(end.y if down else end.y + end.height)
        label = text(a[0] + 10, (a[1] + b[1]) / 2 + 5, words, kind="small", anchor="start")
    elif upper < lower:
        across = start.x < end.x
        a = float(start.x + start.width if across else start.x), (upper + lower) / 2
        b = float(end.x if across else end.x + end.width), a[1]
        label = text((a[0] + b[0]) / 2, a[1] - 9, words, kind="small")
    else:
        raise PictureError(f"no straight line from {start.words[0]!r} to {end.words[0]!r}")
    optional = " optional" if kind == "dashed" else ""
    yield f'<path class="line{optional}" d="M{a[0]:g} {a[1]:g} L{b[0]:g} {b[1]:g}"/>'
    yield _head(a, b)
    if kind == "both":
        yield _head(b, a)
    if words:
        yield label


def _head(a: tuple[float, float], b: tuple[float, float]) -> str:
    """An arrow's head at ``b``."""
    sign = (b[0] > a[0]) - (b[0] < a[0]), (b[1] > a[1]) - (b[1] < a[1])
    back, side = (b[0] - 9 * sign[0], b[1] - 9 * sign[1]), (5 * sign[1], 5 * sign[0])
    corners = (b, (back[0] + side[0], back[1] + side[1]), (back[0] - side[0], back[1] - side[1]))
    return f'<path class="head" d="M{" L".join(f"{x:g} {y:g}" for x, y in corners)} Z"/>'


# -- the plot ----------------------------------------------------------------------------------------------------

ROWS = (
    (
        "Time to first token, prompt in the pool; 100 % is computing it",
        "time to first token: prompt read from a warm pool ÷ computed",
    ),
    (
        "Time of a whole request, prompt never seen; 100 % is without kvplug",
        "whole request, prompt never seen: time with kvplug ÷ without",
    ),
)
"""Heading of the plot, and the end of the rows in the table that stand under it."""
LEFT_PX, BAR_PX, RIGHT_PX = 205, 420, 290
PITCH_PX = 26


def measured(table: str, ending: str) -> list[tuple[str, float, str]]:
    """(who, ratio, what stands beside it) of each row of ``docs/figures.md`` that ends so."""
    found = []
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 6 and cells[0].endswith(ending):
            found.append((cells[0].removesuffix(", " + ending), float(cells[3]), cells[5]))
    if not found:
        raise PictureError(f"figures.md has no row that ends with {ending!r}")
    return found


def plot(table: str) -> str:
    """Times with kvplug as bars against the same without it."""
    parts: list[str] = []
    y = 30
    for heading, ending in ROWS:
        parts.append(text(20, y, heading, kind="title", anchor="start"))
        y += 14
        for who, ratio, beside in measured(table, ending):
            with_it, without = re.findall(r"\d+ ms", beside)
            parts += [
                text(LEFT_PX - 10, y + 15, who, anchor="end"),
                f'<rect class="without" x="{LEFT_PX}" y="{y}" width="{BAR_PX}" height="20" rx="2"/>',
                f'<rect class="with" x="{LEFT_PX}" y="{y}" width="{BAR_PX * ratio:.0f}" height="20" rx="2"/>',
                text(
                    LEFT_PX + BAR_PX * max(1.0, ratio) + 12,
                    y + 15,
                    f"{100 * ratio:.3g} %: {with_it} instead of {without}",
                    anchor="start",
                ),
            ]
            y += PITCH_PX
        y += 26
    for x, kind, words in ((20, "with", "with kvplug"), (140, "without", "100 %; shorter is better")):
        parts += [
            f'<rect class="{kind}" x="{x}" y="{y - 11}" width="14" height="14" rx="2"/>',
            text(x + 22, y + 1, words, kind="small", anchor="start"),
        ]
    return picture(
        LEFT_PX + BAR_PX + RIGHT_PX,
        y + 18,
        "Times with kvplug, as shares of computing the prompt and of a request without kvplug",
        parts,
    )


def made() -> dict[Path, str]:
    """Every picture as it should be."""
    return {
        HERE / "overview.svg": drawing((HERE / "overview.txt").read_text(encoding="utf-8")),
        HERE / "first-token.svg": plot(FIGURES.read_text(encoding="utf-8")),
    }


def main(arguments: Sequence[str]) -> int:
    """Writes the pictures, or with ``--check`` compares them."""
    stale = [path for path, svg in made().items() if not path.exists() or path.read_text(encoding="utf-8") != svg]
    for path in stale:
        if "--check" in arguments:
            sys.stderr.write(f"{path.name} is not what make.py makes: python docs/images/make.py\n")
        else:
            path.write_text(made()[path], encoding="utf-8")
    return int("--check" in arguments and bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
