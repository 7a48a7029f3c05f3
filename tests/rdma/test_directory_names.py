"""Names in the directory: the same in every version, told to nobody without the secret, spread evenly."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from kvplug.rdma.directory import directory, names, peers, publisher, resp
from kvplug.rdma.directory.names import BUCKETS, Names
from kvplug.rdma.directory.resp import members, variadic
from tests.rdma.directory_parts import keys


def test_names_stay_what_they_are() -> None:
    """Hosts of two versions share a directory: what is written here must not change without a new domain."""
    made = Names(b"a secret")
    fixed = np.arange(64, dtype=np.uint8).reshape(2, 32)
    assert made.domain == "kvplug:7cecc51207415af0"
    assert [f"{name:016x}" for name in made.of(fixed).tolist()] == ["da9c64360ab36fce", "35d0cb968b7ad1df"]
    assert made.buckets(fixed).tolist() == [9, 2]
    assert made.has("host", "epoch", 3) == "kvplug:7cecc51207415af0:has:host:epoch:3"


def test_a_name_is_a_mac_of_the_key_under_the_secret() -> None:
    some = keys(50, 1)
    made = Names(b"a secret").of(some)
    key = blake3(b"a secret", derive_key_context="kvplug 2026 directory block names").digest()
    expected = [blake3(k.tobytes(), key=key).digest()[:8] for k in some]
    assert [name.tobytes() for name in made] == expected
    assert not np.isin(made, Names(b"another").of(some)).any()
    assert not np.isin(made, Names(None).of(some)).any()


def test_domains_differ_by_secret() -> None:
    assert len({Names(secret).domain for secret in (None, b"", b"a", b"b")}) == 4


@pytest.mark.parametrize("kind", ["random", "counters"])
def test_buckets_are_about_as_large_as_each_other(kind: str) -> None:
    """Also for keys that somebody counts instead of hashing: one set must not hold nearly everything."""
    some = keys(16000, 2)
    if kind == "counters":
        some = np.zeros((16000, 32), np.uint8)
        some.view("<u8")[:, 0] = np.arange(16000)
    sizes = np.bincount(Names(b"a secret").buckets(some), minlength=BUCKETS)
    assert sizes.sum() == 16000
    assert sizes.max() < 3 * 16000 / BUCKETS


def test_a_batch_is_packed_as_the_protocol_says() -> None:
    block = members(np.array([1, 2**64 - 1], np.uint64)).tobytes()
    assert variadic(2, "SADD", "k") + block == (
        b"*4\r\n$4\r\nSADD\r\n$1\r\nk\r\n$8\r\n\1\0\0\0\0\0\0\0\r\n$8\r\n\xff\xff\xff\xff\xff\xff\xff\xff\r\n"
    )


@pytest.mark.parametrize("module", [directory, names, peers, publisher, resp])
def test_no_host_reads_a_clock_that_another_could_have_set_otherwise(module: object) -> None:
    """Deadlines are counted on the monotonic clock, times to live by the server: nothing depends on the date."""
    source = Path(str(module.__file__)).read_text()  # type: ignore[attr-defined]
    tree = ast.parse(source)
    read = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not read & {"time.time", "time.time_ns", "datetime.now", "datetime.datetime"}
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert "datetime" not in imported
