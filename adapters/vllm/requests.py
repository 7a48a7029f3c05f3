"""What kvplug keeps for each request: its chain of keys, what was offered to it, and how far it is stored."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from kvplug.adapters.devices.base import Int64s
from kvplug.adapters.vllm import compat_requests as compat
from kvplug.errors import NamespaceError
from kvplug.extras import encode_extras
from kvplug.fetching import Fetch
from kvplug.keys import KeyChain

if TYPE_CHECKING:
    from vllm.v1.request import Request

_CONTENT_HASH = re.compile(r"(?:.*:)?[0-9a-f]{64,128}")
"""What vLLM's content hashes look like (blake3, sha256 or sha512 in hex, after a LoRA's name where towers have one)."""


@dataclass
class GroupPins:
    """Pinned slots of one group for consecutive blocks from ``first`` on: int64[N] each."""

    first: int
    slots: Int64s
    gens: Int64s
    offsets: Int64s


@dataclass
class Offer:
    """A hit that was promised to the engine and is pinned until it is used or given back."""

    local: int
    tokens: int
    """Length of the hit, the engine's own tokens included."""
    num_tokens: int
    """Length of the request when it was asked."""
    pins: list[GroupPins]
    deadline: float


@dataclass(eq=False)
class Record:
    """One request, from the first time that the scheduler asks about it until it is finished."""

    request: Request
    chain: KeyChain | None
    """None: this request is not cached."""
    tokens: list[int]
    """The engine's own list of the request's tokens; it grows as they come. Only confirmed tokens are in it."""
    step_tokens: int
    epoch: int
    offer: Offer | None = None
    miss: tuple[int, int, float] | None = None
    """(local, num_tokens, until): a miss that is not asked again before ``until``."""
    loads: int = 0
    """Loads issued; one for each time that the engine admits the request, so that a load that fails is not repeated."""
    load_failed: bool = False
    """A load failed once; the pool is not asked again for this request."""
    fetch: Fetch | None = None
    """What is being fetched for it from other hosts."""
    fetch_tried: bool = False
    """Other hosts were asked once; they are not asked again for this request."""
    refused: bool = False
    """What decides the bytes of its blocks can't be identified."""
    stored: list[int] = field(default_factory=list)
    """Per group, blocks from the front that need no more storing."""
    due: int = 0
    """Tokens whose whole blocks were to be stored when blocks were last stored; room may not have been for all."""
    next_at: int = 0
    """Computed tokens at which the next block of any group is full."""

    def drop_fetch(self) -> None:
        """Lets go of what is being or was fetched for it."""
        fetch, self.fetch = self.fetch, None
        if fetch is not None:
            fetch.release()

    def step_keys(self, num_tokens: int) -> npt.NDArray[np.uint8]:
        """Keys of all whole steps within the first ``num_tokens`` tokens: (n, 32) uint8."""
        assert self.chain is not None
        known = self.chain.n_tokens
        if num_tokens > known:
            self.chain.extend(self.tokens[known:num_tokens])
        return self.chain.step_keys[: num_tokens // self.step_tokens]


def open_chain(
    request: Request,
    root: bytes,
    step_tokens: int,
    *,
    lora_identity: Callable[[Any], bytes | None],
    trust_mm_ids: bool,
    mm_by_content: bool = True,
) -> KeyChain:
    """The chain of a request's keys; NamespaceError if its contents can't be identified.

    Args:
        lora_identity: the content identity of an adapter, None while (or for ever if) it is not known.
        trust_mm_ids: take users' identifiers of images and sound for their content.
        mm_by_content: whether the engine hashes the content of those that users have not named.
    """
    if request.resumable:
        raise NamespaceError("a streaming session's tokens may be replaced")
    if request.pooling_params is not None:
        raise NamespaceError("a pooling request")
    lora = None
    if request.lora_request is not None:
        lora = lora_identity(request.lora_request)
        if lora is None:
            raise NamespaceError("the LoRA adapter is not identified")
    if request.mm_features and not mm_by_content:
        raise NamespaceError(
            "multimodal inputs are counted, not hashed (mm_processor_cache_gb=0 without prefix caching), come in where "
            "kvplug can't look at them (VLLM_USE_RUST_FRONTEND), or are encoded by another engine (ec_transfer_config)"
        )
    if compat.has_named_media(request) and not trust_mm_ids:
        raise NamespaceError("a multimodal input may be named by the user, not by its content")
    mm = _multimodal_steps(request, step_tokens, trust_mm_ids)
    embeds = _embeds_steps(request, step_tokens)
    expected = (lora is not None) + len(mm.get(0, ())) + bool(request.cache_salt) + (request.prompt_embeds is not None)
    if compat.extra_key_count(request, step_tokens) != expected:
        raise NamespaceError("the engine tells this request's blocks apart by something that kvplug does not know")
    extras = {}
    for step in {0} | mm.keys() | embeds.keys():
        encoded = encode_extras(
            lora=lora if step == 0 else None,
            cache_salt=request.cache_salt or None if step == 0 else None,
            mm=mm.get(step, ()),
            prompt_embeds=embeds.get(step),
        )
        if encoded:
            extras[step] = encoded
    return KeyChain(root, extras or None, step_tokens=step_tokens)


def _multimodal_steps(request: Request, step_tokens: int, trusted: bool) -> dict[int, list[tuple[str | int, ...]]]:
    """Per step the multimodal items that reach into it: (content hash, offset from the step's first token)."""
    steps: dict[int, list[tuple[str | int, ...]]] = {}
    for feature in request.mm_features:
        name = feature.identifier
        if not isinstance(name, str) or not (trusted or _CONTENT_HASH.fullmatch(name)):
            raise NamespaceError("a multimodal input is named by something else than its content")
        start, length = feature.mm_position.offset, feature.mm_position.length
        for step in range(start // step_tokens, (start + length - 1) // step_tokens + 1):
            steps.setdefault(step, []).append((name, start - step * step_tokens))
    return steps


def _embeds_steps(request: Request, step_tokens: int) -> dict[int, bytes]:
    if request.prompt_embeds is None:
        return {}
    mask = request.prompt_is_token_ids
    out = {}
    for step in range((request.num_prompt_tokens + step_tokens - 1) // step_tokens):
        start, end = step * step_tokens, (step + 1) * step_tokens
        kinds = bytes(mask[start:end]) if mask is not None else b""
        out[step] = blake3(compat.embeds_digest(request, start, end) + kinds).digest()
    return out


class LoraIdentities:
    """Identities of adapters by content, found out in the background, each bound to the name it was first seen under.

    An adapter's weights are loaded once per id; a name or id that is given to another adapter, or one that is loaded
    in place, is never cached again in this engine: what the engine then has in memory can't be told from outside.
    """

    def __init__(self, identify: Callable[[str], bytes | None]) -> None:
        self._identify = identify
        self._bound: dict[str, tuple[int, str]] = {}
        self._names: dict[int, str] = {}
        self._tainted: set[str] = set()

    def __call__(self, lora: Any) -> bytes | None:
        """32 bytes, or None: not known (yet). NamespaceError, with the reason, if its content can't be told."""
        name, number, path = str(lora.lora_name), int(lora.lora_int_id), str(lora.lora_path)
        bound = self._bound.setdefault(name, (number, path))
        named = self._names.setdefault(number, name)
        if bound != (number, path) or named != name:
            self._tainted |= {name, named}
        if getattr(lora, "load_inplace", False):
            self._tainted.add(name)
        if name in self._tainted:
            return None
        content = self._identify(path)
        if content is None:
            return None
        shape = bytes([bool(getattr(lora, "is_3d_lora_weight", False))])
        return blake3(content + shape).digest()
