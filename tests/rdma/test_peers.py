"""Peers: from the settings, or from records that only a host with the common secret can have written."""

from __future__ import annotations

import msgspec
import pytest

from kvplug.errors import ConfigError
from kvplug.rdma.directory.names import MAX_RECORD_BYTES, Names
from kvplug.rdma.directory.peers import AllPeers, PeerInfo, StaticPeers, checked_id, from_record, to_record

NAMES = Names(b"a secret")
PEER = PeerInfo(id="pool-1", address="10.0.0.7:9410", epoch="0123456789abcdef")


def test_the_settings_list_without_oneself_and_without_repeats() -> None:
    source = StaticPeers(["b:1", "a:1", "me:1", "b:1"], own_address="me:1")
    assert [peer.address for peer in source.peers()] == ["b:1", "a:1"]
    assert all(peer.epoch == "" for peer in source.peers())


def test_of_two_sources_an_address_counts_once_as_the_first_says() -> None:
    class Found:
        closed = False

        def peers(self) -> tuple[PeerInfo, ...]:
            return (PEER, PeerInfo(id="pool-2", address="c:1", epoch="x"))

        def close(self) -> None:
            self.closed = True

    found = Found()
    both = AllPeers(found, StaticPeers(["10.0.0.7:9410", "d:1"]))
    assert [peer.id for peer in both.peers()] == ["pool-1", "pool-2", "d:1"]
    both.close()
    assert found.closed


def test_a_record_comes_back_as_it_was() -> None:
    assert from_record(to_record(PEER, NAMES), PEER.id, NAMES) == PEER


def test_a_record_of_a_later_version_with_more_in_it_is_taken() -> None:
    more = msgspec.msgpack.encode({**msgspec.structs.asdict(PEER), "paths": ["verbs"]})
    assert from_record(NAMES.seal(more), PEER.id, NAMES) == PEER


def test_a_record_of_an_earlier_version_with_less_in_it_is_taken() -> None:
    less = msgspec.msgpack.encode({"id": PEER.id, "address": PEER.address, "epoch": PEER.epoch})
    found = from_record(NAMES.seal(less), PEER.id, NAMES)
    assert found == PEER
    assert not found.cache_node


@pytest.mark.parametrize("at", range(0, len(to_record(PEER, NAMES)), 5))
def test_a_record_with_any_byte_changed_is_nothing(at: int) -> None:
    record = bytearray(to_record(PEER, NAMES))
    record[at] ^= 1
    assert from_record(bytes(record), PEER.id, NAMES) is None


@pytest.mark.parametrize(
    ("record", "host_id"),
    [
        (to_record(PEER, Names(b"another")), PEER.id),
        (to_record(PEER, Names(None)), PEER.id),
        (to_record(PEER, NAMES), "pool-2"),
        (NAMES.seal(b"\xc1"), PEER.id),
        (NAMES.seal(msgspec.msgpack.encode({"id": "pool-1"})), PEER.id),
        (NAMES.seal(msgspec.msgpack.encode({"id": "pool-1", "address": "a:1", "epoch": "e:*"})), PEER.id),
        (NAMES.seal(msgspec.msgpack.encode({"id": "pool-1", "address": "a:1", "epoch": ""})), PEER.id),
        (NAMES.seal(b"x" * (MAX_RECORD_BYTES + 1)), PEER.id),
        (b"", PEER.id),
        (None, PEER.id),
        (7, PEER.id),
    ],
    ids=[
        "another secret",
        "no secret",
        "another id",
        "no msgpack",
        "fields missing",
        "epoch no name",
        "no epoch",
        "long",
        "empty",
        "none",
        "int",
    ],
)
def test_what_no_host_of_ours_wrote_is_no_peer(record: object, host_id: str) -> None:
    assert from_record(record, host_id, NAMES) is None


@pytest.mark.parametrize("host_id", ["", "a:b", "a b", "é", "x" * 65, "a\n"])
def test_an_id_that_could_be_taken_for_another_key_is_refused(host_id: str) -> None:
    with pytest.raises(ConfigError, match="a host's id is 1 to 64"):
        checked_id(host_id)
