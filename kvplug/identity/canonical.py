"""A canonical, injective byte encoding of plain values: what namespaces and per-step extras are hashed from.

Two different values never have the same encoding, and one value has one encoding, on every machine and in every
Python version. Serialisers in common use do not promise both: they sort no keys, or give an enum, a Decimal or a
date the encoding of the string that stands for it. So the rules are our own; there are nine of them, and they can be
written in any language in half a page (docs/keys.md). Values of any other type are refused, never `repr()`-ed.

========  ==========================================================================================
value     bytes (`u32` is little-endian; ‖ joins)
========  ==========================================================================================
None      ``N``
False     ``F``
True      ``T``
int       ``i`` ‖ u32 length ‖ decimal ASCII, ``-`` in front if negative, no leading zeros
float     ``d`` ‖ IEEE 754 binary64, little-endian; NaN is refused; -0.0 is not 0.0, and 1.0 is not 1
str       ``s`` ‖ u32 length ‖ UTF-8, not normalised; lone surrogates are refused
bytes     ``b`` ‖ u32 length ‖ the bytes
sequence  ``l`` ‖ u32 number of items ‖ each item's encoding (list and tuple are the same)
mapping   ``m`` ‖ u32 number of entries ‖ key and value encodings, entries ordered by the key's encoded bytes;
          keys are str or int
========  ==========================================================================================
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any, TypeAlias, Union

from kvplug.errors import NamespaceError

__all__ = ["MAX_DEPTH", "Value", "encode"]

Value: TypeAlias = Union[
    bool, int, float, str, bytes, "list[Value]", "tuple[Value, ...]", "Mapping[str, Value]", "Mapping[int, Value]", None
]
"""What can be encoded. Exact types only: a subclass (an enum, a numpy scalar) may mean more than what it equals."""

MAX_DEPTH = 64
"""Deeper nesting is refused; so is a value that contains itself."""

_MAX_INT_BITS = 4096
_U32 = struct.Struct("<I")
_F64 = struct.Struct("<d")


def encode(value: object, path: str = "value") -> bytes:
    """Encode `value` by the rules above.

    `path` is what the value is called in error messages; items are named after it (``config.rope[2]``).

    Raises NamespaceError naming the path of whatever cannot be encoded.
    """
    out: list[bytes] = []
    _encode(value, path, out, 0)
    return b"".join(out)


def _encode(value: Any, path: str, out: list[bytes], depth: int) -> None:
    kind = type(value)
    if value is None:
        out.append(b"N")
    elif value is False:
        out.append(b"F")
    elif value is True:
        out.append(b"T")
    elif kind is int:
        _int(value, path, out)
    elif kind is float:
        if math.isnan(value):
            raise NamespaceError(f"{path}: NaN has no canonical encoding")
        out.append(b"d" + _F64.pack(value))
    elif kind is str:
        try:
            data = value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise NamespaceError(f"{path}: text is not valid Unicode: {error.reason}") from error
        _sized(b"s", data, path, out)
    elif kind is bytes:
        _sized(b"b", value, path, out)
    elif depth >= MAX_DEPTH:
        raise NamespaceError(f"{path}: nested deeper than {MAX_DEPTH} levels, or contains itself")
    elif kind is list or kind is tuple:
        out.append(b"l" + _U32.pack(len(value)))
        for i, item in enumerate(value):
            _encode(item, f"{path}[{i}]", out, depth + 1)
    elif isinstance(value, Mapping):
        _mapping(value, path, out, depth)
    else:
        raise NamespaceError(
            f"{path}: a value of type {kind.__module__}.{kind.__qualname__} cannot be identified; "
            "give plain None, bool, int, float, str, bytes, list, tuple or dict"
        )


def _int(value: int, path: str, out: list[bytes]) -> None:
    if value.bit_length() > _MAX_INT_BITS:
        raise NamespaceError(f"{path}: an integer of more than {_MAX_INT_BITS} bits")
    _sized(b"i", b"%d" % value, path, out)


def _sized(tag: bytes, data: bytes, path: str, out: list[bytes]) -> None:
    if len(data) > 0xFFFFFFFF:
        raise NamespaceError(f"{path}: longer than 4 GiB")
    out.append(tag)
    out.append(_U32.pack(len(data)))
    out.append(data)


def _mapping(value: Mapping[object, object], path: str, out: list[bytes], depth: int) -> None:
    entries: list[tuple[bytes, str, object]] = []
    for key, item in value.items():
        if type(key) is not str and type(key) is not int:
            raise NamespaceError(f"{path}: a key of type {type(key).__qualname__}; keys are str or int")
        entries.append((encode(key, f"{path} (key)"), f"{path}.{key}", item))
    entries.sort(key=lambda entry: entry[0])
    out.append(b"m" + _U32.pack(len(entries)))
    for encoded_key, item_path, item in entries:
        out.append(encoded_key)
        _encode(item, item_path, out, depth + 1)
