"""Sizes in bytes as people write them: ``30gb``, ``512mib``, ``65536``.

``kb mb gb tb`` are powers of 1000 and ``kib mib gib tib`` powers of 1024, as the units are defined; a lone letter
(``30g``) is refused, since half of the tools that take it mean one and half the other.
"""

from __future__ import annotations

import re

__all__ = ["format_size", "parse_size"]

_FACTORS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _FACTORS[_letter + "b"] = 1000**_power
    _FACTORS[_letter + "ib"] = 1024**_power

_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.ASCII)
_MAX_BYTES = 2**62
"""Sizes live in int64 fields of the pool; the rest is head-room for sums."""


def parse_size(text: str | int) -> int:
    """Bytes that *text* stands for. Raises ValueError with what to write instead."""
    if isinstance(text, bool):
        raise ValueError("a size is a number of bytes, not true or false")
    if isinstance(text, int):
        nbytes = text
    else:
        match = _PATTERN.fullmatch(text.lower())
        if match is None:
            raise ValueError("a size is a number and a unit, such as 30gb, 512mib or 65536")
        number, unit = match.groups()
        if unit not in _FACTORS:
            if unit in "kmgt":
                raise ValueError(f"write {number}{unit}b (powers of 1000) or {number}{unit}ib (powers of 1024)")
            raise ValueError(
                f"unknown unit {unit!r}: use b, kb, mb, gb, tb (powers of 1000) or kib, mib, gib, tib (powers of 1024)"
            )
        from decimal import Decimal  # late: most processes read no size

        exact = Decimal(number) * _FACTORS[unit]
        nbytes = int(exact)
        if nbytes != exact:
            raise ValueError(f"{text.strip()} is not a whole number of bytes")
    if nbytes < 0:
        raise ValueError("a size cannot be negative")
    if nbytes > _MAX_BYTES:
        raise ValueError("a size cannot be larger than 2**62 bytes")
    return nbytes


def format_size(nbytes: int) -> str:
    """*nbytes* for people, in powers of 1024: ``5.9 GiB``, ``64 MiB``, ``300 B``."""
    if nbytes < 0:
        return "-" + format_size(-nbytes)
    value, unit = float(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1023.95:
            break
        value, unit = value / 1024, larger
    return f"{value:.1f}".removesuffix(".0") + f" {unit}"
