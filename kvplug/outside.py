"""What comes from outside this process, decoded in one place: whatever is wrong with it is one error.

Decoders raise more than their own errors. msgspec's raise UnicodeDecodeError for text that is not UTF-8, RecursionError
for what is nested too deeply and MemoryError for lengths that nobody can hold; int() takes spaces, underscores and the
digits of all scripts; a file of /proc may have any bytes in it. Who decodes here has :class:`DecodeError` to expect,
and nothing else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any, Final, Protocol, TypeVar

from kvplug.errors import DecodeError

__all__ = ["decoded", "decoded_by", "file_text", "json_value", "whole_number"]

T_co = TypeVar("T_co", covariant=True)
V = TypeVar("V")
INT64_MAX: Final = (1 << 63) - 1
MAX_FILE_BYTES: Final = 1 << 20
_NUMBER: Final = re.compile(rb"-?[0-9]{1,19}")
_FAULTS: Final = (ValueError, TypeError, ArithmeticError, LookupError, RecursionError, MemoryError)
"""What decoders are known to raise; msgspec's own errors are ValueErrors."""


class Decoder(Protocol[T_co]):
    """msgspec's, of either format."""

    def decode(self, buf: Any, /) -> T_co:
        """The value of these bytes."""


def decoded(decoder: Decoder[V], raw: bytes | bytearray | memoryview, what: str) -> V:
    """What *decoder* makes of these bytes. Raises DecodeError, which says that they are no *what*."""
    return decoded_by(decoder.decode, raw, what)


def decoded_by(decode: Callable[[Any], V], raw: Any, what: str) -> V:
    """The same with a function. Raises DecodeError."""
    try:
        return decode(raw)
    except _FAULTS as error:
        raise DecodeError(f"{what}: {str(error) or type(error).__name__}") from None


def json_value(text: str | bytes, what: str) -> Any:
    """The value of a JSON text. Raises DecodeError."""
    import json  # late: `kvplug stat` reads none

    return decoded_by(json.loads, text, what)


def whole_number(raw: bytes, what: str) -> int:
    """A whole number in decimal ASCII digits that fits into an int64. Raises DecodeError."""
    number = int(raw) if _NUMBER.fullmatch(raw) else INT64_MAX + 1
    if not -INT64_MAX - 1 <= number <= INT64_MAX:
        raise DecodeError(f"{what}: {raw[:40]!r} is no whole number of 64 bits")
    return number


def file_text(path: str | os.PathLike[str], most_bytes: int = MAX_FILE_BYTES) -> str:
    """The beginning of a file of the system's, such as those in /proc. Bytes that are no text stay what they are, as
    in :func:`os.fsdecode`. Raises OSError, and nothing for what is in it.
    """
    with open(path, "rb") as file:
        return file.read(most_bytes).decode("utf-8", "surrogateescape")
