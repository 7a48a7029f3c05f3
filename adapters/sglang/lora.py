"""LoRA adapters by their content.

SGLang seeds the names of a request's pages with its extra key, to which the adapter's id is appended: a random one per
registration, or one made of name and path, never of content. Where pages are named for the outside (and only there:
SGLang's own tree keeps its ids) the id is replaced by the adapter's content.

The content is that of the files as SGLang has read them. It reads an adapter once, when it is registered, and maps what
it can instead of reading it; each time that the adapter gets a place on the device, it copies from there. So the files
are read here before SGLang does (:class:`kvplug.identity.weights.AdapterFiles`) and looked at again after each copy.
All ranks have to come to the same, since each of them reads by itself. What is not known in this way, and adapters that
are no files, get a seed of this engine alone: pages are stored under it, but nobody else finds them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from blake3 import blake3

from kvplug.errors import NamespaceError
from kvplug.identity.weights import AdapterFiles

ID_CHARS = 32


class Engine(Protocol):
    """What an adapter's seed needs of this rank's engine."""

    secret: bytes
    """Known to this engine's ranks alone."""

    def ranks_agree(self, topic: str, mine: bytes) -> bool | None:
        """Whether all ranks say the same of a topic; None until each has said something."""

    def say(self, line: str) -> None:
        """Logs a line once."""


class _Adapter:
    """One adapter as this process has loaded it."""

    def __init__(self, lora_id: str, path: str | None, hub_cache: str | None, turn: int) -> None:
        self.why = ""
        self.turn = turn
        """How often this id was loaded before."""
        self._topic = f"adapter/{lora_id}/{turn}"
        self._files: AdapterFiles | None = None
        self._looked = False
        self._copied = False
        self._agreed = False
        self.shared = False
        """Whether pages were named by the content."""
        if path is None:
            self.why = "an adapter that came as tensors has no files to be known by"
            return
        try:
            self._files = AdapterFiles(path, hub_cache=hub_cache)
        except NamespaceError as error:
            self.why = str(error)

    @property
    def read(self) -> bytes | None:
        """What the files hold; None if that is not known."""
        return None if self._files is None else self._files.identity.digest

    def copied(self) -> None:
        """SGLang has copied it to the device."""
        self._check()
        self._copied = True

    def _check(self) -> None:
        if self._files is None:
            return
        try:
            self._files.check()
        except NamespaceError as error:
            self._files, self.why = None, str(error)

    def digest(self, engine: Engine) -> bytes | None:
        """Its content, or None while, or if, that is not known."""
        if self._files is not None and not self._copied and not (self._looked and self._files.unchanged()):
            self._check()
            self._looked = True
        content = self.read
        if content is None or self._agreed:
            return content
        agreed = engine.ranks_agree(self._topic, content)
        if agreed is False:
            self._files, self.why = None, "this engine's ranks have read different contents"
        self._agreed = bool(agreed)
        return content if agreed else None


_loaded: dict[str, _Adapter] = {}


def note_load(lora_id: str, path: str | None, hub_cache: str | None = None) -> bool:
    """An adapter is about to be loaded, from a path or (None) from tensors.

    Returns whether pages under this id were named by another content before: SGLang's own tree may still have them.
    """
    before = _loaded.get(lora_id)
    now = _loaded[lora_id] = _Adapter(lora_id, path, hub_cache, before.turn + 1 if before is not None else 0)
    return before is not None and before.shared and before.read != now.read


def note_copy(lora_id: str) -> bool:
    """An adapter was copied to the device.

    Returns whether it turned out not to be what pages were named by before.
    """
    adapter = _loaded.get(lora_id)
    if adapter is None:
        return False
    adapter.copied()
    return adapter.shared and adapter.read is None


def tell_ranks(engine: Engine) -> None:
    """Tells the engine's other ranks of all adapters that were loaded, so that the first request finds them agreed."""
    for adapter in list(_loaded.values()):
        adapter.digest(engine)


def is_known(extra_key: str) -> bool:
    """Whether an extra key ends like that of a request with one of the adapters that were loaded here."""
    return extra_key[-ID_CHARS:] in _loaded


def seed(
    extra_key: str | None,
    cache_salt: str | None,
    plain: Callable[[str | None, str | None], str | None],
    engine: Engine,
) -> str | None:
    """What a chain of page names starts from: 64 hexadecimal digits, or None.

    Args:
        extra_key: the user's, with the adapter's id at its end if the request has one.
        cache_salt: the user's.
        plain: SGLang's own function of extra key and salt.
        engine: this rank's.
    """
    adapter = _loaded.get(extra_key[-ID_CHARS:]) if extra_key is not None else None
    if extra_key is None or adapter is None:
        return plain(extra_key, cache_salt)
    content = adapter.digest(engine)
    if content is not None:
        adapter.shared = True
        own = b"content" + content
    else:
        own = b"unknown" + engine.secret + extra_key[-ID_CHARS:].encode()
        if adapter.why:
            engine.say(f"kvplug: pages of a LoRA adapter stay with this engine: {adapter.why}")
    base = plain(extra_key[:-ID_CHARS], cache_salt)
    return blake3(b"kvplug adapter seed 1\0" + own + (base or "").encode()).hexdigest()
