"""LoRA adapters by their content.

SGLang seeds the names of a request's pages with its extra key, to which the adapter's id is appended: a random one per
registration, or one made of name and path, never of content. Where pages are named for the outside (and only there:
SGLang's own tree keeps its ids) the id is replaced by the adapter's content. Until that is known, and for adapters that
are no files, a seed of this engine alone is used: pages are stored under it, but nobody else finds them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from blake3 import blake3

from kvplug.errors import NamespaceError
from kvplug.weights import AdapterProbe

ID_CHARS = 32


class _Adapter:
    """One adapter as this process has loaded it."""

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._began_ns = time.time_ns()
        self._probe: AdapterProbe | None = None
        self._digest: bytes | None = None
        self._lock = threading.Lock()

    def digest(self, hub_cache: str | None) -> bytes | None:
        """Its content, or None while, or if, that is not known. The first call begins to read it."""
        if self._digest is not None or self._path is None:
            return self._digest
        with self._lock:
            if self._probe is None:
                self._probe = AdapterProbe(self._path, hub_cache=hub_cache, unchanged_since_ns=self._began_ns)
        try:
            identity = self._probe.result()
        except NamespaceError:
            return None
        self._digest = identity.digest if identity is not None else None
        return self._digest


_loaded: dict[str, _Adapter] = {}


def note_load(lora_id: str, path: str | None) -> None:
    """An adapter is about to be loaded, from a path or (None) from tensors; one of the same id is forgotten."""
    _loaded[lora_id] = _Adapter(path)


def begin_reading(hub_cache: str | None) -> None:
    """Reads all adapters in the background that were loaded, so that the first request finds what they have stored."""
    for adapter in list(_loaded.values()):
        adapter.digest(hub_cache)


def is_known(extra_key: str) -> bool:
    """Whether an extra key ends like that of a request with one of the adapters that were loaded here."""
    return extra_key[-ID_CHARS:] in _loaded


def seed(
    extra_key: str | None,
    cache_salt: str | None,
    plain: Callable[[str | None, str | None], str | None],
    secret: bytes,
    hub_cache: str | None,
) -> str | None:
    """What a chain of page names starts from: 64 hexadecimal digits, or None.

    Args:
        extra_key: the user's, with the adapter's id at its end if the request has one.
        cache_salt: the user's.
        plain: SGLang's own function of extra key and salt.
        secret: known to this engine's ranks alone.
        hub_cache: where the hub's files are.
    """
    adapter = _loaded.get(extra_key[-ID_CHARS:]) if extra_key is not None else None
    if extra_key is None or adapter is None:
        return plain(extra_key, cache_salt)
    content = adapter.digest(hub_cache)
    own = b"content" + content if content is not None else b"unknown" + secret + extra_key[-ID_CHARS:].encode()
    base = plain(extra_key[:-ID_CHARS], cache_salt)
    return blake3(b"kvplug adapter seed 1\0" + own + (base or "").encode()).hexdigest()
