"""Weights that a living engine has read from files again: which they are, so that it may share once more.

**What is trusted.** A reload from a folder that has been carried out wherever the engine computes, while nothing else
has touched the weights there, has replaced every tensor that the first load brought, if the files have the same tensors
by name, type and shape: engines only warn of those that are missing, and keep what was there. Everything beside the
tensors that a start would read there (configuration, processors, code) has to be what it was at the start, since a
reload does not read it. And the files must not have changed from before the call on until they are identified
(:class:`kvplug.identity.weights.WeightFiles`).

Whatever else changes weights (over a network, from a trainer's memory, a function of the user's own, a sleep, a call
that has failed) may leave something that no reload from files replaces. After it, nothing is known until a restart,
but for a sleep that turns out to have left every byte as it was (:mod:`kvplug.adapters.common.weightbytes`).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from kvplug.errors import NamespaceError
from kvplug.identity.namespace import WeightsIdentity
from kvplug.identity.weights import Probe, WeightFiles
from kvplug.outside import json_value

MAX_HEADER_BYTES = 256 << 20
"""Longest list of tensors in a file of weights; a longer one is none."""
INDEX = "model.safetensors.index.json"

Tensor: TypeAlias = tuple[str, str, tuple[int, ...]]
"""Name, dtype, shape."""


@dataclass(frozen=True)
class Contents:
    """What a folder has to have in common with the one of the start."""

    tensors: frozenset[Tensor]
    others: frozenset[tuple[str, bytes]]
    """Name and hash of each file that decides something beside the tensors."""


class Reloads:
    """Finds out, in the background, which weights the last reload has brought. Not thread-safe."""

    def __init__(self, source: str | None, loading_since_ns: int | None) -> None:
        """``source``: where the engine has read its weights from at its start; None: no reload can be known.
        ``loading_since_ns``: wall clock, in ns, before it did; what was changed since is not what it has read."""
        self._source = source or ""
        self._start: Contents | None = None
        self._before: Contents | None = None
        """What :meth:`same_again` goes back to."""
        if source is not None and loading_since_ns is not None and os.path.isdir(source):
            try:
                files = WeightFiles(source)
                if files.newest_ns < loading_since_ns:
                    self._start = contents_of(files)
                if not files.unchanged():
                    self._start = None
            except NamespaceError:
                self._start = None
        self._reading: WeightFiles | None = None
        self._probe: Probe[WeightsIdentity] | None = None

    @property
    def possible(self) -> bool:
        """Whether a reload can lead back to what other engines share."""
        return self._start is not None

    @property
    def pending(self) -> bool:
        """Whether a reload is under way, or what it has brought is being identified or not told yet."""
        return self._reading is not None or self._probe is not None

    @property
    def source(self) -> str:
        """Where weights were read from last; empty if that is not known."""
        return self._source

    def changed(self) -> None:
        """Weights were changed since: what the last reload has brought is not what is in memory."""
        probe, self._probe, self._reading = self._probe, None, None
        if probe is not None:
            probe.stop()

    def give_up(self) -> None:
        """Something may have been changed that no reload replaces."""
        self.changed()
        self._before = self._start or self._before
        self._start = None

    def same_again(self) -> None:
        """Nothing was changed since: every byte in memory is what it was before what looked like a change."""
        self.changed()
        self._start = self._start or self._before

    def begins(self, folder: str | None) -> None:
        """A reload is about to read this folder; None: not a folder, or not that alone."""
        self.changed()
        if folder is None or not self.possible or not os.path.isdir(folder):
            self.give_up()
            return
        self._source = folder
        try:
            self._reading = WeightFiles(folder)
        except NamespaceError:
            self.give_up()

    def ended(self, whole: bool) -> None:
        """The reload is over; NamespaceError if what it has brought can't be told.

        ``whole``: as is known, it has been carried out, and nothing else has changed weights meanwhile.
        """
        files, self._reading = self._reading, None
        if files is None or self._start is None:
            return
        if not whole:
            self.give_up()
            return
        try:
            now = contents_of(files)
        except NamespaceError:
            self.give_up()
            raise
        if not files.unchanged():
            self.give_up()
            raise NamespaceError(f"{files.folder}: changed while it was read")
        if not now.tensors <= self._start.tensors:
            self.give_up()
            raise NamespaceError(f"{files.folder} has tensors that the files of the start have not")
        if now.tensors != self._start.tensors:
            raise NamespaceError(
                f"{files.folder} has not the same tensors as the files of the start, so some in memory are older"
            )
        if now.others != self._start.others:
            names = sorted({name for name, _ in now.others ^ self._start.others})
            raise NamespaceError(
                f"{files.folder}: {', '.join(names)} differ from the start's, and a reload does not read them"
            )
        self._probe = Probe(files.identify, "kvplug-weights")

    def result(self) -> WeightsIdentity | None:
        """The identity, once; None before it is known. NamespaceError, once, if it can't be told."""
        if self._probe is None:
            return None
        try:
            identity = self._probe.result()
        except NamespaceError:
            self._probe = None
            raise
        if identity is not None:
            self._probe = None
        return identity


def contents_of(files: WeightFiles) -> Contents:
    """What an engine's loader reads of a folder; NamespaceError if that can't be told by safetensors files."""
    found: dict[str, str] = {}
    tensors: set[Tensor] = set()
    try:
        for path in sorted(Path(files.folder).glob("*.safetensors")):
            if path.name.startswith("consolidated"):
                raise NamespaceError(f"{path}: the original format, of which engines read other files")
            for name, entry in _header(path).items():
                if name == "__metadata__":
                    continue
                if name in found:
                    raise NamespaceError(f"{path}: {name} is in {found[name]} too")
                found[name] = path.name
                tensors.add((str(name), str(entry["dtype"]), tuple(int(size) for size in entry["shape"])))
        index = Path(files.folder, INDEX)
        if index.is_file() and json_value(index.read_bytes(), INDEX)["weight_map"] != found:
            raise NamespaceError(f"{index}: lists other tensors than the files beside it have")
        others = frozenset(files.others(INDEX).items())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, struct.error, RecursionError) as error:
        raise NamespaceError(f"{files.folder}: what it holds can't be read: {error}") from error
    if not tensors:
        raise NamespaceError(f"{files.folder}: no safetensors files")
    return Contents(frozenset(tensors), others)


def _header(path: Path) -> Mapping[str, Any]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{path.name} begins with no list of tensors")
        header: Mapping[str, Any] = json_value(file.read(length), f"the list of tensors of {path.name}")
    return header
