"""Promises of kvplug.identity.weights: weights are known by content, and what is not known for certain is refused."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvplug.errors import NamespaceError
from kvplug.identity import filehash, weights
from kvplug.identity.filehash import HashCache
from kvplug.identity.weights import AdapterFiles, AdapterProbe, WeightsIdentity, WeightsProbe, identify_weights
from tests.stopwatch import Stopwatch

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = "f" * 40
LARGE_BYTES = 5 << 20
"""Beyond what is read whatever a hub's blob is called."""
UNREADABLY_LARGE_BYTES = 200 << 30
"""A sparse file of this size takes half a minute to hash: where a test ends in time, it was not read."""


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


def make_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"one")
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"two")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    (folder / "config.json").write_text("{}")
    (folder / "modeling_own.py").write_text("x = 1")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def sparse(path: Path, nbytes: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(nbytes)
    return path


def make_hub(cache: Path, blobs: dict[str, tuple[str, int | bytes]], commit: str = COMMIT) -> Path:
    """A hub cache as its library lays it out: file name to (blob name, size of a sparse blob or its bytes)."""
    repo = cache / "models--org--name"
    (repo / "refs").mkdir(parents=True, exist_ok=True)
    (repo / "refs" / "main").write_text(commit)
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name, (blob, content) in blobs.items():
        target = repo / "blobs" / blob
        if isinstance(content, int):
            sparse(target, content)
        else:
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(content)
        (snapshot / name).symlink_to(Path("../../blobs") / blob)
    return snapshot


# local files


def test_a_copy_elsewhere_under_another_name_is_the_same_model(model: Path, tmp_path: Path) -> None:
    copy = make_model(tmp_path / "served-as-something-else" / "v2")
    assert identify_weights(model) == identify_weights(copy) == identify_weights(str(model) + "/")
    link = tmp_path / "link"
    link.symlink_to(model)
    assert identify_weights(link) == identify_weights(model)


CHANGES: list[Callable[[Path], object]] = [
    lambda m: (m / "model-00001-of-00002.safetensors").write_bytes(b"onE"),
    lambda m: (m / "model-00002-of-00002.safetensors").write_bytes(b"two "),
    lambda m: (m / "model-00002-of-00002.safetensors").unlink(),
    lambda m: (m / "model-00002-of-00002.safetensors").rename(m / "model-00003-of-00003.safetensors"),
    lambda m: (m / "model.safetensors.index.json").write_text("{}"),
    lambda m: (m / "config.json").write_text('{"rope_theta": 1}'),
    lambda m: (m / "modeling_own.py").write_text("x = 2"),
    lambda m: (m / "more.bin").write_bytes(b""),
    lambda m: (m / "more.gguf").write_bytes(b"x"),
    lambda m: (m / "preprocessor_config.json").write_text("{}"),
    lambda m: ((m / "part").mkdir(), (m / "part" / "model.safetensors").write_bytes(b"x")),
]


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_decides_what_is_loaded_changes_the_identity(model: Path, change: Callable[[Path], object]) -> None:
    before = identify_weights(model)
    change(model)
    assert identify_weights(model) != before


@pytest.mark.parametrize(
    "change",
    [
        lambda m: (m / "tokenizer.json").write_text("[]"),
        lambda m: (m / "README.md").write_text("hello"),
        lambda m: os.utime(m / "config.json"),
        lambda m: ((m / ".cache").mkdir(), (m / ".cache" / "x.safetensors").write_bytes(b"x")),
        lambda m: ((m / "checkpoint-500").mkdir(), (m / "checkpoint-500" / "x.safetensors").write_bytes(b"x")),
    ],
)
def test_what_decides_nothing_does_not(model: Path, change: Callable[[Path], object]) -> None:
    before = identify_weights(model)
    change(model)
    assert identify_weights(model) == before


def test_a_single_file_is_known_by_content_and_gguf_parts_belong_together(tmp_path: Path) -> None:
    for name, content in (("a.gguf", b"1"), ("b.gguf", b"1"), ("c.gguf", b"2"), ("a.pt", b"1")):
        (tmp_path / name).write_bytes(content)
    one, same, other, format_ = (identify_weights(tmp_path / name) for name in ("a.gguf", "b.gguf", "c.gguf", "a.pt"))
    assert one == same
    assert len({one, other, format_}) == 3
    for part in (1, 2):
        (tmp_path / f"big-0000{part}-of-00002.gguf").write_bytes(b"x")
    first = tmp_path / "big-00001-of-00002.gguf"
    before = identify_weights(first)
    (tmp_path / "big-00002-of-00002.gguf").write_bytes(b"y")
    assert identify_weights(first) != before


def dangling(m: Path) -> Path:
    (m / "model-00002-of-00002.safetensors").unlink()
    (m / "model-00002-of-00002.safetensors").symlink_to("nowhere")
    return m


def circular(m: Path) -> Path:
    (m / "loop.bin").symlink_to("loop.bin")
    return m


def fifo(m: Path) -> Path:
    os.mkfifo(m / "pipe.safetensors")
    return m


def device(m: Path) -> Path:
    (m / "zero.bin").symlink_to("/dev/zero")
    return m


def empty(m: Path) -> Path:
    (m / "empty").mkdir()
    return m / "empty"


def no_weights(m: Path) -> Path:
    for path in m.glob("*.safetensors"):
        path.unlink()
    return m


@pytest.mark.parametrize("spoil", [dangling, circular, fifo, device, empty, no_weights, lambda m: m / "missing.bin"])
def test_what_cannot_be_read_is_refused_in_time(model: Path, spoil: Callable[[Path], Path]) -> None:
    source = spoil(model)
    watch = Stopwatch()
    with pytest.raises(NamespaceError) as info:
        identify_weights(source)
    assert str(model) in str(info.value)
    assert watch.took_s() < 5


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_refused(model: Path) -> None:
    (model / "model-00001-of-00002.safetensors").chmod(0)
    with pytest.raises(NamespaceError, match="Permission denied"):
        identify_weights(model)


@pytest.mark.parametrize("bad", ["", "a\0b", b"/tmp", None, 7, "a/b/c", "../x", "/no/such/path"])
def test_what_is_no_path_and_no_repository_is_refused(bad: Any) -> None:
    with pytest.raises(NamespaceError):
        identify_weights(bad)


def test_a_file_that_changed_after_the_engine_began_to_load_is_refused(model: Path) -> None:
    later = time.time_ns() + 10**9
    assert identify_weights(model, unchanged_since_ns=later) == identify_weights(model)
    began = time.time_ns() - 10**10
    for name in model.iterdir():
        os.utime(name, ns=(0, 0))  # rsync and cp -p restore mtime; ctime tells
    with pytest.raises(NamespaceError, match="after the engine began to load"):
        identify_weights(model, unchanged_since_ns=began)


def test_a_file_that_comes_while_others_are_read_is_noticed(model: Path) -> None:
    class Meanwhile(threading.Event):
        def is_set(self) -> bool:
            (model / "late.safetensors").write_bytes(b"x")
            return False

    with pytest.raises(NamespaceError, match=r"changed while it was read: late\.safetensors"):
        identify_weights(model, stop=Meanwhile())


# hub snapshots

SHA = "ab" * 32


def test_a_large_blob_is_known_by_its_name_and_not_read(tmp_path: Path) -> None:
    snapshot = make_hub(tmp_path / "hub", {"model.safetensors": (SHA, UNREADABLY_LARGE_BYTES)})
    one = identify_weights(snapshot)
    elsewhere = make_hub(tmp_path / "other", {"model.safetensors": (SHA, UNREADABLY_LARGE_BYTES)}, OTHER_COMMIT)
    assert identify_weights(elsewhere) == one
    changed = make_hub(tmp_path / "third", {"model.safetensors": ("cd" * 32, UNREADABLY_LARGE_BYTES)})
    assert identify_weights(changed) != one


@pytest.mark.parametrize("name", ["12" * 20, "12" * 32])
def test_a_small_file_edited_in_place_is_noticed(tmp_path: Path, name: str) -> None:
    snapshot = make_hub(tmp_path / "hub", {"model.safetensors": (SHA, LARGE_BYTES), "config.json": (name, b"{}")})
    before = identify_weights(snapshot)
    (snapshot / "config.json").write_text('{"a": 2}')
    assert identify_weights(snapshot) != before


def link_out(hub: Path, snapshot: Path) -> None:
    sparse(hub.parent / "blobs" / SHA, LARGE_BYTES)
    (snapshot / "model.safetensors").symlink_to(hub.parent / "blobs" / SHA)


def link_to_another_folder(hub: Path, snapshot: Path) -> None:
    sparse(snapshot.parents[1] / "files" / SHA, LARGE_BYTES)
    (snapshot / "model.safetensors").symlink_to(f"../../files/{SHA}")


def odd_name(hub: Path, snapshot: Path) -> None:
    sparse(snapshot.parents[1] / "blobs" / (SHA + ".incomplete"), LARGE_BYTES)
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{SHA}.incomplete")


def short_name(hub: Path, snapshot: Path) -> None:
    sparse(snapshot.parents[1] / "blobs" / SHA[:40], LARGE_BYTES)
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{SHA[:40]}")


def link_to_a_link(hub: Path, snapshot: Path) -> None:
    real = sparse(hub.parent / "elsewhere", LARGE_BYTES)
    (snapshot.parents[1] / "blobs").mkdir()
    (snapshot.parents[1] / "blobs" / SHA).symlink_to(real)
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{SHA}")


def plain_file(hub: Path, snapshot: Path) -> None:
    sparse(snapshot / "model.safetensors", LARGE_BYTES)


@pytest.mark.parametrize(
    "lie",
    [link_out, link_to_another_folder, odd_name, short_name, link_to_a_link, plain_file],
    ids=lambda f: f.__name__,
)
def test_a_link_that_only_looks_like_a_blob_is_read(tmp_path: Path, lie: Callable[[Path, Path], None]) -> None:
    snapshot = make_hub(tmp_path / "hub", {})
    lie(tmp_path / "hub", snapshot)
    local = sparse(tmp_path / "local" / "model.safetensors", LARGE_BYTES).parent
    assert identify_weights(snapshot) == identify_weights(local)


def test_the_same_link_outside_snapshots_is_read(tmp_path: Path) -> None:
    sparse(tmp_path / "repo" / "blobs" / SHA, LARGE_BYTES)
    folder = tmp_path / "repo" / "models" / "v1"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").symlink_to(f"../../blobs/{SHA}")
    local = sparse(tmp_path / "local" / "model.safetensors", LARGE_BYTES).parent
    assert identify_weights(folder) == identify_weights(local)


@pytest.mark.parametrize("where", ["HF_HUB_CACHE", "HF_HOME", "argument", "XDG_CACHE_HOME"])
def test_a_repository_is_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    below = {"HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub"}.get(where, "")
    snapshot = make_hub(tmp_path / "base" / below, {"model.safetensors": (SHA, LARGE_BYTES)})
    hub_cache = tmp_path / "base" if where == "argument" else None
    if hub_cache is None:
        monkeypatch.setenv(where, str(tmp_path / "base"))
    expected = identify_weights(snapshot)
    assert identify_weights("org/name", hub_cache=hub_cache) == expected
    assert identify_weights("org/name", revision=COMMIT, hub_cache=hub_cache) == expected
    assert identify_weights("hf://org/name", revision="main", hub_cache=hub_cache) == expected


@pytest.mark.parametrize("revision", [None, "main", "v1", "0123abc", "../../../etc", "/etc/passwd", "a//b"])
def test_a_repository_that_is_not_here_needs_a_fixed_commit(tmp_path: Path, revision: str | None) -> None:
    with pytest.raises(NamespaceError):
        identify_weights("org/name", revision=revision, hub_cache=tmp_path)


def test_a_fixed_commit_of_a_repository_that_is_not_here_identifies_it(tmp_path: Path) -> None:
    made = {
        identify_weights(repo, revision=revision, hub_cache=tmp_path)
        for repo in ("org/name", "org/other")
        for revision in (COMMIT, OTHER_COMMIT)
    }
    assert len(made) == 4
    assert identify_weights("hf://org/name", revision=COMMIT, hub_cache=tmp_path) in made


@pytest.mark.parametrize("address", ["s3://bucket/model", "https://user:secret@host/model?token=secret", "gs://x"])
def test_an_address_is_refused_whatever_its_revision_and_its_secrets_are_not_told(address: str) -> None:
    with pytest.raises(NamespaceError, match="weights_id") as info:
        identify_weights(address, revision=COMMIT)
    assert "secret" not in str(info.value)


# what is told and not read


def test_weights_id_is_the_users_word(model: Path) -> None:
    made = identify_weights("s3://bucket/model", weights_id="prod-7")
    assert made == identify_weights(model, weights_id="prod-7")
    assert made != identify_weights(model, weights_id="prod-8")
    assert made != identify_weights(model)
    for bad in ("", "  ", 7):
        with pytest.raises(NamespaceError):
            identify_weights(model, weights_id=bad)  # type: ignore[arg-type]


def test_dummy_weights_are_known_by_seed_and_configuration_even_with_a_weights_id(model: Path) -> None:
    def dummy(seed: Any, config: Any) -> WeightsIdentity:
        return identify_weights(
            model, load_format="dummy", dummy_seed=seed, config_digest=config, weights_id="the real ones"
        )

    assert dummy(0, b"a" * 32) == dummy(0, b"a" * 32)
    assert len({dummy(0, b"a" * 32), dummy(1, b"a" * 32), dummy(0, b"b" * 32)}) == 3
    for seed, config in ((None, b"a" * 32), (0, None), (0, b"a"), (True, b"a" * 32)):
        with pytest.raises(NamespaceError):
            dummy(seed, config)


# adapters


def make_adapter(folder: Path, rank: int = 8, weights: bytes = b"w") -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


def test_an_adapter_is_known_by_weights_and_configuration_not_by_name(tmp_path: Path) -> None:
    one = AdapterFiles(make_adapter(tmp_path / "a")).identity
    assert AdapterFiles(make_adapter(tmp_path / "b")).identity == one
    assert AdapterFiles(make_adapter(tmp_path / "c", rank=16)).identity != one
    assert AdapterFiles(make_adapter(tmp_path / "d", weights=b"v")).identity != one
    assert identify_weights(tmp_path / "a") != one, "an adapter's identity is none of a model's"


def test_what_is_no_adapter_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(NamespaceError, match=r"adapter_config\.json"):
        AdapterFiles(model)
    adapter = make_adapter(tmp_path / "a")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(NamespaceError, match="no weights"):
        AdapterFiles(adapter)
    with pytest.raises(NamespaceError):
        AdapterFiles("org/lora", hub_cache=tmp_path)
    with pytest.raises(NamespaceError, match="not in the hub's cache"):
        AdapterFiles("org/lora", revision=COMMIT, hub_cache=tmp_path)


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as settled at once, as if the file system's clock ticked finely."""
    monkeypatch.setattr(weights, "SETTLED_S", -60.0)


@pytest.mark.parametrize("way", ["replaced", "in place", "same size and time", "another file", "gone"])
def test_an_adapter_that_is_changed_after_it_was_read_is_not_taken_for_what_it_was(
    way: str, tmp_path: Path, settled: None
) -> None:
    """Between reading here and the engine's last copy from the files: each is a change, and said."""
    folder = make_adapter(tmp_path / "a", weights=b"w" * 100)
    file = folder / "adapter_model.safetensors"
    files = AdapterFiles(folder)
    assert files.settled
    assert files.unchanged()
    assert files.check() == files.identity
    before = file.stat()
    time.sleep(0.02)  # the next tick of the file system's clock
    if way == "replaced":
        (tmp_path / "new").write_bytes(b"v" * 100)
        os.replace(tmp_path / "new", file)
    elif way == "another file":
        (folder / "adapter_model.bin").write_bytes(b"v")
    elif way == "gone":
        file.unlink()
    else:
        with file.open("r+b") as inside:
            inside.write(b"v" * 100)
        if way == "same size and time":
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not files.unchanged()
    with pytest.raises(NamespaceError, match="since the engine began to load it"):
        files.check()


def test_an_adapter_that_was_written_a_moment_ago_is_read_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change on the same tick of the file system's clock leaves no sign: here none ever does."""
    monkeypatch.setattr(weights, "stamp_of", lambda status: (0, 0, status.st_size, 1 << 62, 0))
    monkeypatch.setattr(filehash, "stamp_of", weights.stamp_of)
    folder = make_adapter(tmp_path / "a", weights=b"w" * 100)
    files = AdapterFiles(folder)
    assert not files.settled
    assert files.check() == files.identity
    (folder / "adapter_model.safetensors").write_bytes(b"v" * 100)
    assert files.unchanged(), "nothing to see"
    with pytest.raises(NamespaceError, match="since the engine began to load it"):
        files.check()


def test_an_adapter_of_the_hub_that_moves_to_another_commit_is_another(tmp_path: Path, settled: None) -> None:
    """What an engine downloads while it loads is not what was there before."""
    for commit, blob in ((COMMIT, "a" * 64), (OTHER_COMMIT, "b" * 64)):
        blobs = {"adapter_config.json": ("c" * 40, b"{}"), "adapter_model.safetensors": (blob, LARGE_BYTES)}
        make_hub(tmp_path, blobs, commit)
        if commit == COMMIT:
            files = AdapterFiles("org/name", hub_cache=tmp_path)
            assert files.check() == files.identity
    assert not files.unchanged()
    with pytest.raises(NamespaceError, match="another snapshot"):
        files.check()
    assert AdapterFiles("org/name", hub_cache=tmp_path).identity != files.identity


# in the background


def test_a_probe_answers_none_while_it_reads_and_stops_when_told(tmp_path: Path) -> None:
    folder = sparse(tmp_path / "m" / "model.safetensors", UNREADABLY_LARGE_BYTES).parent
    probe = WeightsProbe(folder)
    watch = Stopwatch()
    assert probe.result() is None
    assert probe.result(0.05) is None
    probe.stop()
    with pytest.raises(NamespaceError, match="stopped"):
        probe.result(20)
    assert watch.took_s() < 10


def test_a_probe_gives_what_the_call_gives(model: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    probes = WeightsProbe(model), WeightsProbe(model, weights_id="x")
    results = [probe.result(30) for probe in probes]
    assert results == [identify_weights(model), identify_weights(model, weights_id="x")]
    files = AdapterProbe(adapter).result(30)
    assert files is not None
    assert files.identity == AdapterFiles(adapter).identity
    assert probes[0].result() == results[0], "asking again gives the same"


def test_a_probe_that_fails_says_so_each_time(tmp_path: Path) -> None:
    for probe in (WeightsProbe(tmp_path / "nothing"), AdapterProbe(tmp_path)):
        for _ in range(2):
            with pytest.raises(NamespaceError):
                probe.result(30)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_probe_that_ends_by_an_error_of_its_own_does_not_wait_forever() -> None:
    with pytest.raises(NamespaceError, match="unexpected"):
        WeightsProbe("org/name", hub_cache=7).result(30)  # type: ignore[arg-type]


def test_large_files_are_remembered_and_small_ones_are_not(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    sparse(folder / "model.safetensors", LARGE_BYTES)
    (folder / "config.json").write_text("{}")
    cache = HashCache(tmp_path / "hashes", settled_s=0)
    time.sleep(0.02)  # past the tick of the file system's clock
    identify_weights(folder, hash_cache=cache)
    assert len(json.loads(Path(cache.path).read_text())["files"]) == 1
