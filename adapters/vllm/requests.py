"""What kvplug keeps for each request: its chain of keys, what was offered to it, and how far it is stored."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from kvplug.adapters.devices.base import Int64s
from kvplug.adapters.vllm import compat_requests as compat
from kvplug.adapters.vllm.adapters import ELSEWHERE
from kvplug.adapters.vllm.compat_adapters import lies_elsewhere
from kvplug.adapters.vllm.jobs import AdapterLoad, Rank, WorkerReport
from kvplug.errors import NamespaceError
from kvplug.identity.extras import encode_extras
from kvplug.identity.keys import KeyChain
from kvplug.remote.request import Fetch

if TYPE_CHECKING:
    from vllm.v1.request import Request

_CONTENT_HASH = re.compile(r"(?:.*:)?[0-9a-f]{64,128}")
"""What vLLM's content hashes look like (blake3, sha256 or sha512 in hex, after a LoRA's name where towers have one)."""


_UNKNOWN = b""
"""Stands for a content that can't be told."""


class NotYetKnownError(NamespaceError):
    """What decides the bytes of a request's blocks is being found out; it may be cached later."""


@dataclass(frozen=True)
class Adapter:
    """What a request's adapter is taken for."""

    number: int
    """Its id in the engine."""
    content: bytes
    held: bool
    """Whether the workers have it; else they will read it when the request runs."""


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
    adapter: Adapter | None = None
    """What its chain takes its LoRA adapter for."""
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
        lora_identity: the content identity of an adapter; None while it is not known: NotYetKnownError is raised then.
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
            raise NotYetKnownError(
                "the content of its LoRA adapter is not known yet; its files are being read or were written a moment "
                "ago, and the workers have yet to read them"
            )
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
    """Which LoRA adapter a request's blocks are computed with: adapters of one engine by content.

    What the workers hold under an id is what they say that they have read. Where they hold nothing, they will read what
    lies at the path when the request runs; what lies there now is a forecast, which the worker compares with what it
    reads (:mod:`kvplug.adapters.vllm.adapters`).

    Beside that stands the engine's own prefix cache, which tells adapters apart by name and path, up to 0.30 by name
    alone. Once two contents were computed with under what it takes for one adapter, blocks that a request gets from
    there may be of either; nothing under that name is cached then until the engine's own cache was emptied.
    """

    def __init__(
        self,
        lies_at: Callable[[str], bytes | None],
        *,
        ranks: Iterable[Rank] = ((0, 0),),
        by_name_alone: bool = False,
        settings: bytes = b"",
    ) -> None:
        """
        Args:
            lies_at: digest of the adapter that lies at a path now, None while it is being read; NamespaceError if
                that can't be told.
            ranks: the engine's workers.
            by_name_alone: whether the engine's own prefix cache takes adapters of one name for one adapter.
            settings: what decides, beside an adapter's content, what this engine makes of it.
        """
        self._lies_at = lies_at
        self._ranks = frozenset(ranks)
        self._by_name_alone = by_name_alone
        self._settings = settings
        self._loads: dict[int, dict[Rank, AdapterLoad]] = {}
        self._held: dict[Rank, tuple[int, frozenset[int]]] = {}
        self._users: dict[Any, set[int]] = {}
        self._contents: dict[int, set[bytes]] = {}
        self.changes: dict[Rank, int] = {}
        """Per worker, how many adapters have become others under their ids."""

    def __call__(self, lora: Any) -> bytes | None:
        """32 bytes, or None: not known (yet). NamespaceError, with the reason, if its content can't be told."""
        adapter = self.find(lora)
        return None if adapter is None else self.digest(lora, adapter)

    def digest(self, lora: Any, adapter: Adapter) -> bytes:
        """What goes into a request's keys, 32 bytes."""
        shape = bytes([bool(getattr(lora, "is_3d_lora_weight", False))])
        return blake3(adapter.content + shape + self._settings).digest()

    def find(self, lora: Any) -> Adapter | None:
        """What a request's adapter holds; None while that is not known. NamespaceError if it can't be told."""
        name, number, path = str(lora.lora_name), int(lora.lora_int_id), str(lora.lora_path)
        users = self.used(lora)
        if lies_elsewhere(lora):
            raise NamespaceError(f"LoRA adapter {name}: {ELSEWHERE}")
        content = self._content_held(name, number)
        held = content is not None
        if content is None:
            content = self._lies_at(path)
        if content is None:
            return None
        if {content}.union(*(self._contents.get(user, ()) for user in users)) != {content}:
            raise NamespaceError(
                f"LoRA adapter {name}: the engine's prefix cache holds blocks of another content under its name; "
                "nothing of it is cached until that cache is reset, or until it has a name and path of its own"
            )
        return Adapter(number, content, held)

    def _content_held(self, name: str, number: int) -> bytes | None:
        if any(rank not in self._held or number not in self._held[rank][1] for rank in self._ranks):
            return None
        loads = self._loads.get(number, {})
        if loads.keys() != self._ranks:
            return None
        for load in loads.values():
            if load.content is None:
                raise NamespaceError(f"LoRA adapter {name}: {load.why}")
        contents = {load.content for load in loads.values()}
        if len(contents) != 1:
            raise NamespaceError(f"LoRA adapter {name}: the engine's workers have read different contents")
        return contents.pop()

    def used(self, lora: Any) -> set[int]:
        """A request with this adapter was seen. The ids that the engine's own cache takes for the same adapter."""
        key = str(lora.lora_name) if self._by_name_alone else (str(lora.lora_name), str(lora.lora_path))
        users = self._users.setdefault(key, set())
        users.add(int(lora.lora_int_id))
        return users

    def confirmed(self, adapter: Adapter) -> bool:
        """Whether every worker has read what this adapter was taken for, and nothing else since."""
        loads = self._loads.get(adapter.number, {})
        return loads.keys() == self._ranks and all(load.content == adapter.content for load in loads.values())

    def agrees(self, adapter: Adapter, report: WorkerReport) -> bool:
        """Whether no worker has read anything else than what this adapter was taken for, nor says so in a report, where
        it may stand before what was read later."""
        told = [*self._loads.get(adapter.number, {}).values(), *report.adapters]
        return all(load.content == adapter.content for load in told if load.number == adapter.number)

    def brought(self, adapter: Adapter) -> None:
        """Blocks are loaded from the pool for a request with this adapter; the engine's own cache keeps them."""
        self._contents.setdefault(adapter.number, set()).add(adapter.content)

    def reported(self, report: WorkerReport) -> set[int]:
        """What workers have read. Returns the ids of adapters that are not, or may not be, what they were before."""
        changed = set()
        for load in report.adapters:
            known = self._loads.setdefault(load.number, {})
            newest = known.setdefault(load.rank, load)
            if newest.content != load.content:
                changed.add(load.number)
            if newest.order < load.order:
                known[load.rank] = load
            self._contents.setdefault(load.number, set()).add(_UNKNOWN if load.content is None else load.content)
            self.changes[load.rank] = max(load.changes, self.changes.get(load.rank, 0))
        for rank, (order, held) in report.held.items():
            if order > self._held.get(rank, (0, held))[0]:
                self._held[rank] = order, held
        return changed

    def cache_emptied(self, living: Iterable[Any]) -> None:
        """The engine has emptied its own prefix cache; ``living``: the adapters of requests that go on."""
        self._users.clear()
        self._contents = {
            number: {_UNKNOWN if load.content is None else load.content for load in loads.values()}
            for number, loads in self._loads.items()
            if any(number in held for _, held in self._held.values())
        }
        for lora in living:
            self.used(lora)
