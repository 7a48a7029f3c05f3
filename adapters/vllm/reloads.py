"""What a call of ``reload_weights`` reads: of a folder, all that :mod:`kvplug.adapters.common.reloads` can trust."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

Arguments: TypeAlias = tuple[Sequence[Any], Mapping[str, Any]]
"""Positional and named arguments of a call."""


def folder_of(args: Sequence[Any], kwargs: Mapping[str, Any], last: str) -> str | None:
    """The path that ``reload_weights``, called so, reads; ``last``: where weights were read from before it.

    None if it does not, or not only, read files as they were saved.
    """
    names = ("weights_iterator", "weights_path", "is_checkpoint_format")
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    path = given.pop("weights_path", None)
    iterator, as_saved = given.pop("weights_iterator", None), given.pop("is_checkpoint_format", True)
    if iterator is not None or as_saved is not True or given or len(args) > len(names):
        return None
    if not isinstance(path, (str, os.PathLike, type(None))):
        return None
    folder = last if path is None else os.fspath(path)
    return folder if isinstance(folder, str) else None
