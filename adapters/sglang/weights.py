"""Which weights are in this rank's memory: those of the start, some that nobody knows, or others that are known.

``update_weights_from_disk`` of a folder leads from the second to the third, see :mod:`kvplug.adapters.common.reloads`
for what of it is trusted. So does a sleep after which every byte is what it was before it, see
:mod:`kvplug.adapters.common.weightbytes`. A page that one rank has computed holds what the weights of all
ranks have made: a rank where the load has failed, or has read other files, would spoil the pages of the others. So each
rank finds out by itself what it has, tells the others in the store of their process group, and goes by it only when all
have said the same of the same change. None waits for another with anything but a thread of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from kvplug.adapters.common.reloads import Reloads
from kvplug.identity.namespace import Namespace, WeightsIdentity

AS_STARTED = WeightsIdentity("start", bytes(32))
"""Those of the start, whichever they are."""
UNKNOWN = b"unknown"
"""What a rank says that can't tell what it has read."""
Look = Callable[["bytes | None"], "tuple[bytes, bytes] | None"]
"""What is in memory: a sample, and the digest of all if it is the one given or none is. None: that can't be read."""
Agree = Callable[[str, bytes], "bool | None"]
"""Tells the other ranks what this one says of a topic: whether all say the same; None until each has said something."""


@dataclass(frozen=True)
class _Seen:
    """What was in memory while it was known which weights these are."""

    sample: bytes
    whole: bytes
    identity: WeightsIdentity


class Weights:
    """See the module's first lines. Thread-safe."""

    def __init__(self, source: str | None = None, loading_since_ns: int | None = None) -> None:
        """As loaded at the start; see :class:`~kvplug.adapters.common.reloads.Reloads` for the arguments."""
        self.changes = 0
        """How often weights were changed; the same on all ranks."""
        self._lock = threading.Lock()
        self._reloads = Reloads(source, loading_since_ns)
        self._read: WeightsIdentity | None = None
        self._known: WeightsIdentity | None = None
        """What the last change has brought: to this rank, as it has found out, and to all ranks, as they agree."""
        self._seen: _Seen | None = None

    @property
    def can_come_back(self) -> bool:
        """Whether a reload from a folder can lead back to what other engines share."""
        with self._lock:
            return self._reloads.possible

    @property
    def known(self) -> bool:
        """Whether what the last change has brought is known, and the same on all ranks."""
        with self._lock:
            return self._known is not None

    @property
    def in_memory_are_known(self) -> bool:
        """Whether they are those of the start, or others that are known."""
        with self._lock:
            return not self.changes or self._known is not None

    @property
    def pending(self) -> bool:
        """Whether what the last change has brought may still turn out to be known, with nothing more to be done."""
        with self._lock:
            return self._known is None and (self._reloads.pending or self._read is not None)

    def changed(self) -> None:
        """Weights are about to change, in a way of which something may stay when they are read from files again."""
        with self._lock:
            self._seen = None
            self._count()
            self._reloads.give_up()

    def reload_begins(self, folder: str | None) -> None:
        """SGLang is about to read weights from files; ``folder``: where all of them are, None if that is not known."""
        with self._lock:
            self._seen = None
            self._count()
            self._reloads.begins(folder)

    def before(self, look: Look, loses: bool) -> None:
        """A sleep begins, after which weights may be what they are: that can be told if they are known now.

        ``loses``: they will be thrown away, and with them what layers keep in no tensor.
        """
        with self._lock:
            known = self._known if self.changes else AS_STARTED
            found = None if known is None or loses else look(None)
            self._seen = None if known is None or found is None else _Seen(*found, known)

    def after(self, look: Look) -> bool:
        """The sleep is over, which counted as a change. Whether every byte of the weights is what it was before it;
        then they are known again as soon as that is so on all ranks.
        """
        with self._lock:
            seen, self._seen = self._seen, None
            if seen is None or look(seen.sample) != (seen.sample, seen.whole):
                return False
            self._reloads.same_again()
            self._read = seen.identity
            return True

    def only_slept(self) -> None:
        """A sleep counts as a change until it is known what came of it."""
        with self._lock:
            self._count()
            self._reloads.give_up()

    def _count(self) -> None:
        self.changes += 1
        self._read = self._known = None

    def reload_ended(self, whole: bool) -> None:
        """That is over; ``whole``: SGLang says that this rank has them all. NamespaceError if they can't be told."""
        with self._lock:
            self._reloads.ended(whole)

    def look(self, change: int, agree: Agree) -> bool | None:
        """Whether what this change has brought is known now, and the same on all ranks; None while that may come.

        NamespaceError, once, if this rank can't tell. Reads no file.
        """
        with self._lock:
            if change != self.changes:
                return False
            self._read = self._read or self._reloads.result()
            read = self._read
        if read is None:
            return None
        agreed = agree(topic(change), read.kind.encode() + read.digest)
        with self._lock:
            if change != self.changes:
                return False
            if agreed:
                self._known = read
            elif agreed is False:
                self._read = None
            return agreed

    def give_up(self, change: int) -> None:
        """What this change has brought is not waited for any more."""
        with self._lock:
            if change == self.changes:
                self._read = None

    def named(self, loaded: Namespace, word: Callable[[int], bytes]) -> Namespace:
        """The namespace of what is in memory.

        Args:
            loaded: that of the weights as they were loaded at the start.
            word: 32 bytes for the number of a change that all ranks of this engine, and nobody else, come to alike.
        """
        with self._lock:
            if self._known is not None:
                return loaded if self._known == AS_STARTED else loaded.identified(self._known)
            return loaded.private(word(self.changes)) if self.changes else loaded

    def close(self) -> None:
        """Nothing more is to be found out. Idempotent."""
        with self._lock:
            self._reloads.changed()


def topic(change: int) -> str:
    """What ranks speak of when they say what this change has brought."""
    return f"weights/{change}"


def cannot_tell(change: int, agree: Agree) -> None:
    """Tells the other ranks that this one does not know what this change has brought, so that they do not wait."""
    agree(topic(change), UNKNOWN)
