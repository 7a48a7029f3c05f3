"""Whatever bytes come from outside, the one function that decodes them raises its own error and no other."""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from kvplug import hostmem
from kvplug.config import load
from kvplug.errors import ConfigError, DecodeError, ProtocolError
from kvplug.identity.filehash import HashCache
from kvplug.outside import decoded, decoded_by, file_text, json_value, whole_number
from kvplug.rdma.control import protocol
from kvplug.rdma.directory.names import Names
from kvplug.rdma.directory.peers import PeerInfo, from_record, to_record
from kvplug.rdma.verbs.rails import gids_of
from kvplug.remote.messages import Channel, ChannelError

SEED: Final = int(os.environ.get("KVPLUG_TEST_SEED", "20261128"))
ROUNDS: Final = 4000
NOT_UTF8: Final = b"\xa2\xff\xfe"
DEEP: Final = 100_000
EVIL: Final[dict[str, bytes]] = {
    "text that is not UTF-8": NOT_UTF8,
    "a list of lists of lists": b"\x91" * DEEP + b"\x00",
    "maps in maps": b"\x81\x01" * DEEP + b"\x00",
    "a list of four billion": b"\xdd\xff\xff\xff\xff",
    "a map of four billion": b"\xdf\xff\xff\xff\xff",
    "text of four gigabytes": b"\xdb\xff\xff\xff\xff",
    "a key that can't be hashed": b"\x81\x81\x01\x02\x03",
    "a time that is none": b"\xc7\x0c\xff" + b"\xff" * 12,
    "a surrogate": b"\xa3\xed\xa0\x80",
    "nothing": b"",
    "a byte that begins nothing": b"\xc1",
}
"""Of MessagePack."""


def noise(rng: random.Random, like: bytes) -> bytes:
    """Bytes that are nearly right, or not at all."""
    kind = rng.randrange(5)
    if kind == 0:
        return rng.randbytes(rng.randrange(60))
    if kind == 1:
        return like[: rng.randrange(len(like) + 1)]
    if kind == 2:
        return like + rng.randbytes(rng.randrange(1, 9))
    at = rng.randrange(len(like)) if like else 0
    if kind == 3:
        return like[:at] + rng.choice(list(EVIL.values()))[:4000] + like[at + 1 :]
    return like[:at] + bytes([rng.randrange(256)]) + like[at + 1 :]


@pytest.mark.parametrize("what", EVIL)
@pytest.mark.parametrize("of", [Any, list[str], dict[str, int], PeerInfo], ids=str)
def test_messagepack_of_every_bad_kind_is_one_error(what: str, of: Any) -> None:
    with pytest.raises(DecodeError, match="a record"):
        decoded(msgspec.msgpack.Decoder(of), EVIL[what], "a record")


@pytest.mark.parametrize("text", ["[" * DEEP, '{"a":' * DEEP, "1" * 5000, b'"\xff"', "nul", "", b"\xff\xfe\x00"])
def test_json_of_every_bad_kind_is_one_error(text: str | bytes) -> None:
    with pytest.raises(DecodeError):
        json_value(text, "a file")
    with pytest.raises(DecodeError):
        decoded(msgspec.json.Decoder(), text.encode() if isinstance(text, str) else text, "a file")


@pytest.mark.parametrize("error", [MemoryError, OverflowError, RecursionError, KeyError, UnicodeError, TypeError])
def test_what_a_decoder_raises_is_one_error(error: type[Exception]) -> None:
    def decode(_: bytes) -> None:
        raise error

    with pytest.raises(DecodeError, match="words"):
        decoded_by(decode, b"", "words")


@pytest.mark.parametrize(
    "raw", [b"", b"-", b"+5", b" 7", b"7 ", b"1_0", b"0x1", "\u0663".encode(), b"\xb2", b"1" * 19 + b"0", b"9" * 5000]
)
def test_whole_numbers_are_ascii_digits_of_64_bits(raw: bytes) -> None:
    with pytest.raises(DecodeError):
        whole_number(raw, "a size")


@pytest.mark.parametrize("number", [0, -1, 7, (1 << 63) - 1, -(1 << 63)])
def test_whole_numbers_are_read(number: int) -> None:
    assert whole_number(b"%d" % number, "a size") == number


# ---- every place that decodes, with bytes that are nearly right


def frames() -> dict[int, bytes]:
    made = [
        protocol.Welcome(1.0, 1, ("tcp",)),
        protocol.Hello("control", True, bytes(32), "127.0.0.1:1"),
        protocol.Offer(bytes(32), bytes(8), bytes(16), ("127.0.0.1:1",)),
        protocol.StatsReply({"looks": 1}, 0, 0),
        protocol.Failed("busy"),
        protocol.Release((1, 2)),
    ]
    encoded = [protocol.encode(message, 1) for message in made]
    return {protocol.parse_header(header)[0]: body for header, body in encoded}


def test_frames_are_messages_or_protocol_errors() -> None:
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    right = frames()
    for _ in range(ROUNDS):
        kind = rng.choice(list(right))
        try:
            protocol.decode(kind, noise(rng, right[kind]))
        except ProtocolError:
            continue
    for kind in protocol.KINDS:
        for body in EVIL.values():
            with pytest.raises(ProtocolError):
                protocol.decode(kind, body)


def test_records_are_peers_or_nothing() -> None:
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    names = Names(b"a secret")
    right = names.unseal(to_record(PeerInfo("h", "10.0.0.7:9410", "e1"), names))
    assert right is not None
    assert from_record(names.seal(right), "h", names) is not None
    for body in [*EVIL.values(), *(noise(rng, right) for _ in range(ROUNDS))]:
        found = from_record(names.seal(body), "h", names)
        assert found is None or isinstance(found, PeerInfo)
        from_record(body, "h", names)
    for reply in (None, 7, "text", [], b"", b"\x00" * 16):
        assert from_record(reply, "h", names) is None


@pytest.mark.parametrize("address", ["", "h", "h:", ":1", "h:x", "h:99999999", "h:\u0663", "h\0:1", "a b:1", "h:-1"])
def test_a_record_whose_address_nobody_can_dial_is_no_record(address: str) -> None:
    names = Names(b"a secret")
    assert from_record(to_record(PeerInfo("h", address, "e1"), names), "h", names) is None


def test_words_of_the_process_that_fetches_are_words_or_channel_errors() -> None:
    for body in EVIL.values():
        near, far = socket.socketpair()
        far.sendall(len(body).to_bytes(4, "little") + body)
        far.close()
        channel = Channel(near)
        with pytest.raises(ChannelError, match="no word"):
            channel.receive()
        channel.close()


@pytest.mark.parametrize("content", [b'{"a":' * DEEP, b'"\xff"', b"[" * DEEP, b"", b"\x00" * 100])
def test_a_cache_of_hashes_that_is_no_cache_is_empty(tmp_path: Path, content: bytes) -> None:
    tmp_path.chmod(0o700)
    cache = HashCache(tmp_path)
    path = Path(cache.path)
    path.write_bytes(content)
    path.chmod(0o600)
    assert cache.get((1, 2, 3, 4, 5)) is None
    assert cache.put((1, 2, 3, 4, 5), bytes(32))
    assert cache.get((1, 2, 3, 4, 5)) == bytes(32)


# ---- files of the system and settings


def test_files_of_the_system_may_have_any_bytes(tmp_path: Path) -> None:
    """The name of a control group, or of a process, is bytes."""
    group = tmp_path / "sys/fs/cgroup" / os.fsdecode(b"b\xffd")
    group.mkdir(parents=True)
    (group / "memory.max").write_text("1000000\n")
    (group / "memory.current").write_bytes(b"\xff\xfe")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_bytes(b"0::/b\xffd\n")
    (tmp_path / "proc/meminfo").write_bytes(b"\xff\nMemTotal: 9000000 kB\nMemAvailable: \xd9\xa3 kB\n")
    found = hostmem.memory(tmp_path)
    assert found.limit_bytes == 1_000_000
    print(found.source.encode())  # it can be shown
    assert file_text(tmp_path / "proc/self/cgroup") == os.fsdecode(b"0::/b\xffd\n")


def test_addresses_of_a_device_that_are_none_are_passed_over(tmp_path: Path) -> None:
    from kvplug.rdma.verbs.binding import Port

    folder = tmp_path / "d0/ports/1/gids"
    folder.mkdir(parents=True)
    (folder / "0").write_bytes(b"\xff\xffzz")
    (folder / "1").write_text("fe80:0000:0000:0000:0000:0000:0000:0001\n")
    fields: dict[str, Any] = dict.fromkeys(Port.__dataclass_fields__, 1) | {"device": "d0", "number": 1}
    assert [gid.index for gid in gids_of(Port(**fields), tmp_path)] == [1]


@pytest.mark.parametrize("content", [b"a = " + b"[" * 5000, b'pool = "\xff"', b"\x00", b"pool = 1e", b"\xef\xbb\xbf["])
def test_a_settings_file_that_is_none_is_a_config_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    monkeypatch.setenv("KVPLUG_CONFIG", str(path))
    with pytest.raises(ConfigError, match="can't be used"):
        load()


@pytest.mark.parametrize("name", ["KVPLUG_AUTH_KEY", "KVPLUG_POOL", "KVPLUG_PEERS", "KVPLUG_DIRECTORY_URL"])
def test_a_variable_that_is_not_utf8_is_a_config_error(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, os.fsdecode(b"redis://\xff\xfe:1 and sixteen more of them"))
    with pytest.raises(ConfigError, match=f"{name}.*not UTF-8"):
        load()


DECODES: Final = ("json.loads", "json.load", "json.decode", "msgpack.decode", "tomllib.load", "tomllib.loads")


def test_nothing_is_decoded_elsewhere() -> None:
    """The kind: a decoder's own call outside of kvplug.outside. What an engine made itself is not from outside."""
    root = Path(__file__).resolve().parents[2]
    own = {"kvplug/outside.py", "adapters/common/modelconfig.py", "adapters/vllm/namespace.py"}
    sources = [path for folder in ("kvplug", "shm", "rdma", "adapters") for path in (root / folder).rglob("*.py")]
    wrong = []
    for path in sources:
        name = os.fspath(path.relative_to(root))
        if name in own or name.startswith(("kvplug/shm", "kvplug/rdma", "kvplug/adapters")):
            continue
        text = path.read_text()
        wrong += [f"{name}: {call}" for call in (*DECODES, "_DECODER.decode", "_decoder.decode") if f"{call}(" in text]
    assert not wrong, "\n".join(wrong)
