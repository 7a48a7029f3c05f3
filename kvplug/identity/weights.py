"""Which weights a model has, by their content: never by a path, a served name or a tag that can move.

How weights are identified, in the order in which it is tried:

1. dummy weights: by seed and configuration digest;
2. a `weights_id` that the user vouches for;
3. a directory or file: every file that can decide what is loaded, by blake3, and large files of a Hugging Face hub
   snapshot by their blob's name, which is the SHA-256 of its content and needs no reading;
4. a hub repository's name: by its snapshot in the local cache, and without one only at a fixed commit.

What is not among these raises NamespaceError: nothing is cached for such a model.

Hashing can take minutes, hence `WeightsProbe`. What an engine has loaded and what lies on the disk when it is hashed
may differ; `unchanged_since_ns` closes that gap for weights, and `AdapterFiles` for adapters, which come and
go while an engine lives.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from kvplug.errors import NamespaceError
from kvplug.identity.filehash import SETTLED_S, FileStamp, HashCache, hash_file, stamp_of
from kvplug.identity.hub import blob_hash, resolve_snapshot
from kvplug.identity.namespace import WeightsIdentity, digest_of
from kvplug.threads import guarded

__all__ = [
    "AdapterFiles",
    "AdapterProbe",
    "Probe",
    "WeightFiles",
    "WeightsIdentity",
    "WeightsProbe",
    "identify_weights",
]

T = TypeVar("T")

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz", ".tensors")
_OTHER_SUFFIXES = (".json", ".py")
"""Indexes, quantisation and processor settings, scales, and code that a model brings along."""
_TOKENS_ONLY = frozenset(
    (
        "added_tokens.json",
        "chat_template.json",
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    )
)
"""Files that decide tokens, which keys take in anyway, or sampling."""
_SKIPPED_DIRECTORY = re.compile(r"\..*|__pycache__|original|checkpoint-\d+")
"""Never loaded along with the directory that they lie in: hidden ones, a second copy, a trainer's earlier states."""
_MAX_DIRECTORY_DEPTH = 3
_SMALL_FILE_BYTES = 4 << 20
"""Read whatever the hub's cache says about them: people edit cached configurations in place."""
_SHA256_HEX = 64
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
_GGUF_PART = re.compile(r"(.*)(-\d{5}-of-\d{5}\.gguf)")


def identify_weights(
    path_or_repo: str | os.PathLike[str],
    *,
    load_format: str = "auto",
    revision: str | None = None,
    weights_id: str | None = None,
    dummy_seed: int | None = None,
    config_digest: bytes | None = None,
    unchanged_since_ns: int | None = None,
    hub_cache: str | os.PathLike[str] | None = None,
    hash_cache: HashCache | None = None,
    stop: threading.Event | None = None,
) -> WeightsIdentity:
    """Identify a model's weights. May read all of them: see `WeightsProbe`.

    `path_or_repo`: a directory, a file (with its sibling parts, for GGUF), or a hub repository's name.
    `load_format`: only "dummy" matters, with `dummy_seed` and `config_digest` (32 bytes). Otherwise every file that
    any format could load is taken in: too much costs a miss, too little would cost wrong bytes.
    `revision`: of a repository; best the commit that the engine resolved, since a branch can move after the engine has
    read it.
    `weights_id`: the user's word for it; used instead of looking at any file.
    `unchanged_since_ns`: wall clock, in ns, when the engine began to load: a local file changed later is refused, since
    the engine may hold what was there before.
    `hub_cache`: the hub's cache directory if not the usual one.
    `hash_cache`: where hashes are remembered; by default the user's.

    Raises NamespaceError with the reason if the weights cannot be identified.
    """
    if load_format == "dummy":
        return _dummy(dummy_seed, config_digest)
    if weights_id is not None:
        if type(weights_id) is not str or not weights_id.strip():
            raise NamespaceError("weights_id is empty: it must name the weights")
        return WeightsIdentity("user", digest_of(["weights", "user", weights_id]))
    source = _resolve(path_or_repo, revision, hub_cache, "weights")
    if isinstance(source, WeightsIdentity):
        return source
    return _by_content(source, "weights", unchanged_since_ns, hash_cache or HashCache(), stop)[0]


def _dummy(seed: int | None, config_digest: bytes | None) -> WeightsIdentity:
    if type(seed) is not int or type(config_digest) is not bytes or len(config_digest) != 32:
        raise NamespaceError("dummy weights are identified by dummy_seed and the 32 bytes of config_digest")
    return WeightsIdentity("dummy", digest_of(["weights", "dummy", seed, config_digest]))


def _resolve(
    path_or_repo: str | os.PathLike[str],
    revision: str | None,
    hub_cache: str | os.PathLike[str] | None,
    what: str,
) -> str | WeightsIdentity:
    """A local path, or the identity of something that is named by a fixed commit and does not lie here."""
    name = os.fspath(path_or_repo) if isinstance(path_or_repo, (str, os.PathLike)) else None
    if not name or not isinstance(name, str) or "\0" in name:
        raise NamespaceError(f"{what}: {path_or_repo!r} is no path and no repository's name")
    if os.path.lexists(name):
        return name
    if "://" in name and not name.startswith("hf://"):
        raise NamespaceError(
            f"{_without_secrets(name)}: what lies behind an address can change unnoticed; "
            "set weights_id to vouch for it"
        )
    repo = name.removeprefix("hf://")
    if not _REPO_ID.fullmatch(repo):
        raise NamespaceError(f"{name}: no such file or directory, and not a repository's name")
    snapshot = resolve_snapshot(repo, revision, hub_cache)
    if snapshot is not None:
        return snapshot
    if revision is not None and _COMMIT.fullmatch(revision):
        return WeightsIdentity("remote", digest_of([what, "remote", repo, revision]))
    raise NamespaceError(
        f"{repo}: not in the hub's cache on this machine, and revision {revision!r} is not a fixed commit; "
        "give a commit's hash as revision, or set weights_id"
    )


def _without_secrets(address: str) -> str:
    """An address for messages: no user, password or query."""
    scheme, _, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}".partition("?")[0]


def _by_content(
    source: str, what: str, unchanged_since_ns: int | None, cache: HashCache, stop: threading.Event | None
) -> tuple[WeightsIdentity, dict[str, FileStamp]]:
    """What the files hold, and what each of them is recognised by."""
    try:
        files = _list_files(source)
        if not any(path.endswith(_WEIGHT_SUFFIXES) for path in files.values()):
            raise NamespaceError(f"{source}: no weights ({', '.join(_WEIGHT_SUFFIXES)}) in it")
        before = {name: _stamp(path) for name, path in files.items()}
        contents = [
            [name, _content(path, before[name], unchanged_since_ns, cache, stop)]
            for name, path in sorted(files.items())
        ]
        after = _stamps(source)
    except OSError as error:
        raise NamespaceError(f"{error.filename or source}: {error.strerror}") from error
    if after != before:
        raise NamespaceError(f"{source}: changed while it was read: {_changed(before, after)}")
    return WeightsIdentity("files", digest_of([what, "files", contents])), before


def _stamps(source: str) -> dict[str, FileStamp]:
    return {name: _stamp(path) for name, path in _list_files(source).items()}


def _changed(before: dict[str, FileStamp], after: dict[str, FileStamp]) -> str:
    return ", ".join(sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)))


def _stamp(path: str) -> FileStamp:
    return stamp_of(os.stat(path))


def _content(
    path: str, stamp: FileStamp, unchanged_since_ns: int | None, cache: HashCache, stop: threading.Event | None
) -> str:
    """One file's content hash with its kind in front: "sha256:…" by a hub blob's name, else "blake3:…"."""
    size_bytes, ctime_ns = stamp[2], stamp[4]
    blob = blob_hash(path)
    if blob is None and unchanged_since_ns is not None and ctime_ns > unchanged_since_ns:
        raise NamespaceError(f"{path}: changed after the engine began to load it")
    if blob is not None and len(blob) == _SHA256_HEX and size_bytes > _SMALL_FILE_BYTES:
        return f"sha256:{blob}"
    digest, read = hash_file(path, cache=cache if size_bytes > _SMALL_FILE_BYTES else None, stop=stop)
    if read != stamp:
        raise NamespaceError(f"{path}: changed while it was read")
    return f"blake3:{digest.hex()}"


def _list_files(source: str) -> dict[str, str]:
    """Name to path of every file that may decide what is loaded; names say nothing of where the model lies."""
    if not os.path.isdir(source):
        return _file_parts(source)
    files: dict[str, str] = {}
    _walk(source, "", 0, files)
    return files


def _file_parts(path: str) -> dict[str, str]:
    os.stat(path)  # a dangling link is an error here
    directory, name = os.path.split(path)
    part = _GGUF_PART.fullmatch(name)
    if part is None:
        return {os.path.splitext(name)[1]: path}
    stem = part[1]
    siblings = [_GGUF_PART.fullmatch(entry) for entry in os.listdir(directory or ".")]
    return {match[2]: os.path.join(directory, match[0]) for match in siblings if match is not None and match[1] == stem}


def _walk(directory: str, prefix: str, depth: int, files: dict[str, str]) -> None:
    with os.scandir(directory) as entries:
        for entry in entries:
            name = prefix + entry.name
            if entry.is_dir():
                if depth < _MAX_DIRECTORY_DEPTH and not _SKIPPED_DIRECTORY.fullmatch(entry.name):
                    _walk(entry.path, name + "/", depth + 1, files)
            elif entry.name.endswith(_WEIGHT_SUFFIXES) or (
                entry.name.endswith(_OTHER_SUFFIXES) and entry.name not in _TOKENS_ONLY
            ):
                files[name] = entry.path


class AdapterFiles:
    """The files of a LoRA adapter, from before an engine reads them until it has taken what it needs from them.

    Made before the engine reads them, which reads them all; then :meth:`check`, after each time that the engine has
    copied from them, says whether what it has copied is what was read here. An engine may map the files instead of
    reading them, and copy much later; what is written into them meanwhile is what it then copies.

    Files that were written a moment ago can change without a sign: file systems stamp changes with a clock that ticks
    every few milliseconds, some every two seconds. Such files are read once more at the check.
    """

    def __init__(
        self,
        path_or_repo: str | os.PathLike[str],
        *,
        revision: str | None = None,
        hub_cache: str | os.PathLike[str] | None = None,
        hash_cache: HashCache | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        """Reads the adapter. The arguments and errors of `identify_weights`; a directory without adapter_config.json
        is refused."""
        self._cache = hash_cache or HashCache()
        self._named = path_or_repo, revision, hub_cache
        self._source = self._find()
        self.identity = self._read(stop)
        """What they hold; its digest goes into the extras of a step."""

    def _find(self) -> str:
        source = _resolve(*self._named, "adapter")
        if isinstance(source, WeightsIdentity):
            raise NamespaceError(f"{self._named[0]}: not in the hub's cache on this machine")
        return source

    def _read(self, stop: threading.Event | None) -> WeightsIdentity:
        if not os.path.isfile(os.path.join(self._source, "adapter_config.json")):
            raise NamespaceError(f"{self._source}: no adapter_config.json, so not a LoRA adapter")
        began_ns = time.time_ns()
        identity, self._files = _by_content(self._source, "adapter", None, self._cache, stop)
        self.settles_ns = max(max(stamp[3:]) for stamp in self._files.values()) + int(SETTLED_S * 1e9)
        """Wall clock, in ns, from when on a further change of these files can't go unseen."""
        self.settled = began_ns > self.settles_ns
        """Whether they were read after that."""
        return identity

    def unchanged(self) -> bool:
        """Whether the same files are there, as far as can be told without reading them."""
        try:
            return self._find() == self._source and _stamps(self._source) == self._files
        except (OSError, NamespaceError):
            return False

    def check(self) -> WeightsIdentity:
        """What the files have held all the time since they were first read; NamespaceError if they have changed."""
        before, known = self.identity, self._files
        try:
            now = _stamps(self._source)
        except OSError as error:
            raise NamespaceError(f"{error.filename or self._source}: {error.strerror}") from error
        if self._find() != self._source:
            raise NamespaceError(f"{self._named[0]}: another snapshot since the engine began to load it")
        if now != known:
            raise NamespaceError(f"{self._source}: changed since the engine began to load it: {_changed(known, now)}")
        if not self.settled and (self._read(None) != before or self._files != known):
            raise NamespaceError(f"{self._source}: changed since the engine began to load it")
        return before


class WeightFiles:
    """The files of a model's folder, from before an engine reads them again until their content is known.

    Made before the engine reads them, which reads nothing but what files are recognised by: :meth:`unchanged`, asked
    when the engine has read them, and :meth:`identify`, which reads them all, compare that.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """NamespaceError if `folder` is none, or has no files that count."""
        self.folder = os.fspath(folder)
        began_ns = time.time_ns()
        try:
            self._files, self._way = _stamps(self.folder), self._ways()
        except OSError as error:
            raise NamespaceError(f"{error.filename or self.folder}: {error.strerror}") from error
        if not self._files:
            raise NamespaceError(f"{self.folder}: nothing in it that a model is loaded from")
        self.newest_ns = max(max(stamp[3:]) for stamp in self._files.values())
        """Wall clock, in ns, of the last change of any of them; a file system's clock may tick rarely."""
        self._settled = began_ns > self.newest_ns + int(SETTLED_S * 1e9)

    def _ways(self) -> dict[str, FileStamp]:
        """The folder and every symbolic link on the way to one of its files: other files may lie there for a while."""
        ways = {self.folder: _stamp(self.folder)}
        seen: set[str] = set()
        ahead = [os.path.join(os.getcwd(), path) for path in (self.folder, *_list_files(self.folder).values())]
        while ahead:
            path = ahead.pop()
            while path not in seen:
                seen.add(path)
                if os.path.islink(path):
                    ways["link " + path] = stamp_of(os.lstat(path))
                    ahead.append(os.path.join(os.path.dirname(path), os.readlink(path)))
                path = os.path.dirname(path)
        return ways

    def unchanged(self) -> bool:
        """Whether the same files lie there, in the same places, as far as can be told without reading them."""
        try:
            return _stamps(self.folder) == self._files and self._ways() == self._way
        except OSError:
            return False

    def others(self, *but: str) -> dict[str, bytes]:
        """blake3 (32 bytes) of each file that decides something and holds no weights, except those named."""
        try:
            files = _list_files(self.folder)
        except OSError as error:
            raise NamespaceError(f"{error.filename or self.folder}: {error.strerror}") from error
        return {
            name: hash_file(path)[0]
            for name, path in files.items()
            if not name.endswith(_WEIGHT_SUFFIXES) and name not in but
        }

    def identify(self, stop: threading.Event | None = None) -> WeightsIdentity:
        """What the files have held all the time since this object was made; the identity that `identify_weights` gives.

        Raises NamespaceError if they have changed, or were written so shortly before that a further change could not
        be told.
        """
        identity, files = _by_content(self.folder, "weights", None, HashCache(), stop)
        if files != self._files:
            raise NamespaceError(
                f"{self.folder}: changed since the engine began to load it: {_changed(self._files, files)}"
            )
        if not self._settled:
            raise NamespaceError(
                f"{self.folder}: written less than {SETTLED_S:g} s before the engine began to load it, so a change "
                "meanwhile could go unseen"
            )
        return identity


class Probe(Generic[T]):
    """Identification in a daemon thread of its own; it never keeps a process from ending."""

    def __init__(self, identify: Callable[[threading.Event], T], name: str) -> None:
        self._stop = threading.Event()
        self._done = threading.Event()
        # What result() says if the thread ends by an error of ours, which is in the log with its traceback.
        self._outcome: T | NamespaceError = NamespaceError(f"{name}: ended by an unexpected error")
        self._identify = identify
        run = guarded(name, self._run, "these weights count as not identified")
        self._thread = threading.Thread(target=run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._outcome = self._identify(self._stop)
        except NamespaceError as error:
            self._outcome = error
        finally:
            self._done.set()

    def result(self, timeout: float = 0.0) -> T | None:
        """What was found, or None if it is not known within `timeout` seconds; raises NamespaceError if it failed."""
        if not self._done.wait(timeout):
            return None
        if isinstance(self._outcome, NamespaceError):
            raise self._outcome
        return self._outcome

    def stop(self) -> None:
        """Give up; returns at once. `result` then raises NamespaceError, unless it was known already."""
        self._stop.set()


class WeightsProbe(Probe[WeightsIdentity]):
    """`identify_weights` in the background."""

    def __init__(
        self,
        path_or_repo: str | os.PathLike[str],
        *,
        load_format: str = "auto",
        revision: str | None = None,
        weights_id: str | None = None,
        dummy_seed: int | None = None,
        config_digest: bytes | None = None,
        unchanged_since_ns: int | None = None,
        hub_cache: str | os.PathLike[str] | None = None,
        hash_cache: HashCache | None = None,
    ) -> None:
        def identify(stop: threading.Event) -> WeightsIdentity:
            return identify_weights(
                path_or_repo,
                load_format=load_format,
                revision=revision,
                weights_id=weights_id,
                dummy_seed=dummy_seed,
                config_digest=config_digest,
                unchanged_since_ns=unchanged_since_ns,
                hub_cache=hub_cache,
                hash_cache=hash_cache,
                stop=stop,
            )

        super().__init__(identify, "kvplug-weights")


class AdapterProbe(Probe[AdapterFiles]):
    """`AdapterFiles` of what lies at a path now, read in the background."""

    def __init__(
        self,
        path_or_repo: str | os.PathLike[str],
        *,
        hub_cache: str | os.PathLike[str] | None = None,
        hash_cache: HashCache | None = None,
    ) -> None:
        def read(stop: threading.Event) -> AdapterFiles:
            return AdapterFiles(path_or_repo, hub_cache=hub_cache, hash_cache=hash_cache, stop=stop)

        super().__init__(read, "kvplug-adapter")
