"""What can be told from a Hugging Face hub cache on disk, without its library and without the network.

models--ORG--NAME/refs/main                    the commit that a branch or tag led to last
models--ORG--NAME/snapshots/COMMIT/FILE    ->  ../../blobs/HASH
models--ORG--NAME/blobs/HASH                   SHA-256 for large (LFS) files, git's SHA-1 for small ones
"""

from __future__ import annotations

import os
import re
import stat

from kvplug.errors import NamespaceError

__all__ = ["blob_hash", "hub_cache_directory", "resolve_snapshot"]

_BLOB_NAME = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REF_MAX_BYTES = 256


def hub_cache_directory() -> str:
    """Where the hub's cache lies, by the environment variables that its library goes by."""
    for name, below in (("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub")):
        base = os.environ.get(name)
        if base:
            return os.path.join(os.path.expanduser(base), below) if below else os.path.expanduser(base)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "huggingface", "hub")


def resolve_snapshot(repo: str, revision: str | None, cache: str | os.PathLike[str] | None = None) -> str | None:
    """The snapshot's directory of a repository ("org/name") in the cache, or None if it is not there.

    `revision`: a commit, branch or tag; None is "main". Raises NamespaceError for a revision that leads out of refs/.
    """
    base = os.fspath(cache) if cache is not None else hub_cache_directory()
    folder = os.path.join(base, "models--" + repo.replace("/", "--"))
    commit = revision or "main"
    if not _COMMIT.fullmatch(commit):
        if commit.startswith("/") or any(part in ("", ".", "..") for part in commit.split("/")):
            raise NamespaceError(f"{repo}: {commit!r} is no name of a revision")
        try:
            with open(os.path.join(folder, "refs", commit), "rb") as file:
                commit = file.read(_REF_MAX_BYTES).decode("ascii", "replace").strip()
        except OSError:
            return None
        if not _COMMIT.fullmatch(commit):
            return None
    snapshot = os.path.join(folder, "snapshots", commit)
    return snapshot if os.path.isdir(snapshot) else None


def blob_hash(path: str) -> str | None:
    """The content hash in the name of the blob that a snapshot's file is a link to, 64 or 40 hex digits; else None.

    None unless the link leads in one step from snapshots/COMMIT/ into blobs/ of the same repository, to a plain file
    with such a name: a link that only looks alike proves nothing about its content.
    """
    try:
        target = os.readlink(path)
        blob = os.path.join(os.path.realpath(os.path.dirname(os.path.abspath(path))), target)
        folder = os.path.realpath(os.path.dirname(blob))
        plain = stat.S_ISREG(os.lstat(blob).st_mode)
    except OSError:
        return None
    repo, name = os.path.dirname(folder), os.path.basename(blob)
    below = os.path.relpath(os.path.realpath(os.path.dirname(os.path.abspath(path))), repo).split(os.sep)
    in_snapshot = len(below) >= 2 and below[0] == "snapshots" and _COMMIT.fullmatch(below[1]) is not None
    return (
        name if plain and os.path.basename(folder) == "blobs" and in_snapshot and _BLOB_NAME.fullmatch(name) else None
    )
