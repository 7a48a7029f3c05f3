"""What a step's key takes in besides its tokens: LoRA, salt, multimodal content, prompt embeddings."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping

from kvplug.errors import NamespaceError
from kvplug.identity.canonical import Value, encode

__all__ = ["encode_extras"]

_TAG_LORA, _TAG_SALT, _TAG_MM, _TAG_EMBEDS, _TAG_OTHER = 1, 2, 3, 4, 5


def encode_extras(
    *,
    lora: bytes | None = None,
    cache_salt: str | None = None,
    mm: Iterable[tuple[bytes | str | int, ...]] = (),
    prompt_embeds: bytes | None = None,
    other: Mapping[str, Value] | None = None,
) -> bytes:
    """The extras of one step: canonical bytes, empty if there are none; different extras never encode alike.

    `lora`: the adapter's content identity, at every step of the request or, since keys are chained, at step 0 only;
    all engines that share must do the same, and kvplug's adapters give both LoRA and salt at step 0.
    `cache_salt`: the tenant's salt.
    `mm`: one tuple for each multimodal item that reaches into the step: its content hash (never a counter), the offset
    of its first placeholder relative to the step's first token (negative if it began before), and further integers or
    strings if they matter. Their order does not matter.
    `prompt_embeds`: a digest of the step's prompt embeddings.
    `other`: anything else, by name.

    Layout: for each that is present, in this order, tag u8 (1..5) ‖ u32 length ‖ canonical encoding.
    Raises NamespaceError for a value that cannot be encoded.
    """
    out: list[bytes] = []
    if lora is not None:
        out.append(_record(_TAG_LORA, _typed(lora, bytes, "lora")))
    if cache_salt is not None:
        out.append(_record(_TAG_SALT, _typed(cache_salt, str, "cache_salt")))
    items = sorted(encode(tuple(item), f"mm[{i}]") for i, item in enumerate(mm))
    if items:
        # the encoding of a list whose items are ordered by their encodings
        out.append(_record(_TAG_MM, b"l" + struct.pack("<I", len(items)) + b"".join(items)))
    if prompt_embeds is not None:
        out.append(_record(_TAG_EMBEDS, _typed(prompt_embeds, bytes, "prompt_embeds")))
    if other:
        out.append(_record(_TAG_OTHER, encode(other, "other")))
    return b"".join(out)


def _typed(value: object, kind: type, name: str) -> bytes:
    if type(value) is not kind:
        raise NamespaceError(f"{name} must be {kind.__name__}, not {type(value).__name__}")
    return encode(value, name)


def _record(tag: int, payload: bytes) -> bytes:
    return struct.pack("<BI", tag, len(payload)) + payload
