"""Requests whose pages are not named by their tokens, extra key and salt alone.

SGLang's page names hold a request's tokens, its extra key and its cache salt. What else decides the bytes goes into the
extra key here, before SGLang's own prefix tree sees the request. That has to come out the same on all ranks of an
engine, or their trees would differ: so only from what a request brings along, never from what is found out meanwhile.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from blake3 import blake3

from kvplug.adapters.sglang import lora
from kvplug.adapters.sglang.engine import RankEngine
from kvplug.adapters.sglang.flags import PRIVATE

_MARK = "kvplug-digest-"


def complete_extra_key(request: Any, engine: RankEngine) -> None:
    """Makes a new request's (``Req``) extra key say what its pages depend on.

    Images that the user names (marked by :data:`PRIVATE`): this engine's own word. Embeddings that replace tokens', and
    bounds between items that do not see each other: a digest of them. Pages of a
    session with images: kept to this engine, since an earlier turn may have named its images by the user's word. An
    extra key that ends like an adapter's id in a request without adapter, or begins like such a digest: made to end or
    begin otherwise, so that nobody can pass off the plain model's pages as others. Two different keys stay different.
    """
    if (request.extra_key or "").lstrip("|").startswith(_MARK):
        request.extra_key = "|" + request.extra_key
    if (request.extra_key or "").startswith(PRIVATE):
        request.extra_key = engine.private_name + request.extra_key.removeprefix(PRIVATE)
    parts = []
    given = getattr(request, "positional_embed_overrides", None)
    if given is not None:
        parts.append(_digest("embeddings", list(given.positions), _plain(given.embeds)))
    bounds = getattr(request, "multi_item_delimiter_indices", None)
    if bounds is not None:
        parts.append(_digest("items", list(bounds), b""))
    if getattr(request, "session", None) is not None and engine.keeps_sessions:
        parts.append(engine.private_name)
    if parts:
        request.extra_key = "".join(parts) + (request.extra_key or "")
    if request.extra_key and request.lora_id is None and lora.is_known(request.extra_key.rstrip("|")):
        request.extra_key += "|"


def _digest(what: str, numbers: list[int], content: bytes) -> str:
    hasher = blake3(what.encode() + np.asarray(numbers, dtype="<i8").tobytes())
    hasher.update(content)
    return f"{_MARK}{hasher.hexdigest()}|"


def _plain(embeddings: Any) -> bytes:
    """A tensor's dtype, shape and bytes."""
    import torch

    tensor = embeddings.detach().cpu().contiguous()
    content: bytes = tensor.view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + content
