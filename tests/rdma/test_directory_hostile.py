"""A directory that others write to, or that is none: look-ups answer, the reader lives, the next host is seen."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import msgspec
import numpy as np
import pytest

from kvplug.errors import DirectoryError
from kvplug.rdma.directory import directory as directory_module
from kvplug.rdma.directory.directory import Directory, describe_server
from kvplug.rdma.directory.names import Names
from kvplug.rdma.directory.peers import PeerInfo, to_record
from kvplug.rdma.directory.publisher import Publisher
from kvplug.rdma.directory.resp import Connection, Endpoint
from kvplug.threads import troubles
from tests.rdma.directory_parts import SECRET, a_host, a_pool, a_reader, ids, is_settled, keys, put, wait_for
from tests.rdma.redis_server import RedisServer

SEED: Final = int(os.environ.get("KVPLUG_TEST_SEED", "20261128"))
NAMES: Final = Names(SECRET)
LOOKUPS: Final = 300
ENOUGH: Final = 40
"""Connections that the server was asked on, over which it answered wrongly."""


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    made = RedisServer()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def no_thread_has_met_anything_unforeseen() -> Iterator[None]:
    before = troubles()
    yield
    assert troubles() == before


RECORDS: Final[dict[str, bytes]] = {
    "text that is not UTF-8": NAMES.seal(b"\x82\xa2id\xa2\xff\xfe\xa7address\xa1a"),
    "nested too deeply": NAMES.seal(b"\x91" * 2000),
    "no map": NAMES.seal(msgspec.msgpack.encode([1, 2])),
    "an address that nobody can dial": to_record(PeerInfo("bad", "nobody:port", "e1"), NAMES),
    "a length beyond all bounds": NAMES.seal(b"\xdf\xff\xff\xff\xff"),
    "no seal": b"x",
    "nothing": b"",
}


@pytest.mark.parametrize("what", RECORDS)
def test_a_record_that_cant_be_read_is_counted_and_passed_over(server: RedisServer, what: str) -> None:
    witness = server.witness()
    witness.flushall()
    with a_reader(server) as reader:
        assert reader.wait_ready(30)
        witness.sadd(NAMES.members, "bad", b"\xff\xfe\x00 no id", b"x" * 500)
        witness.set(NAMES.host("bad"), RECORDS[what])
        wait_for(lambda: reader.stats().bad_records >= 2, "the record was looked at")
        assert ids(reader) == set()
        with a_host(server, "good") as (store, told):
            put(store, keys(20, 1))
            wait_for(lambda: is_settled(store, told, server) and ids(reader) == {"good"}, "a host that comes later")
            hits = reader.lookup(keys(20, 1))
            assert hits.known
            assert int(hits.have.sum()) == 20
            assert reader.stats().failures == 0


def test_a_record_that_goes_bad_while_it_is_asked_for_costs_that_host_only(server: RedisServer) -> None:
    """The records come again with each look-up."""
    witness = server.witness()
    witness.flushall()
    with a_host(server, "good") as (store, told), a_reader(server) as reader:
        put(store, keys(20, 1))
        wait_for(lambda: is_settled(store, told, server) and ids(reader) == {"good"})
        reader._thread.end(0.0)
        reader._closed = True  # its thread polls no more: what the look-up itself reads is what counts
        reader._wake.set()
        wait_for(lambda: not reader._thread.is_alive())
        reader._peers = (*reader._peers, PeerInfo("bad", "h:1", "e"))
        witness.set(NAMES.host("bad"), RECORDS["text that is not UTF-8"])
        with contextlib.closing(Connection.open(Endpoint.parse(server.url), time.monotonic() + 20)) as c:
            reader._drop(reader._asking)
            reader._asking = c
            hits = reader.lookup(keys(20, 1))
        assert hits.known
        assert [peer.id for peer in hits.peers] == ["good"]
        assert int(hits.have.sum()) == 20


# ---- what is no Redis, or has gone mad


class Answering:
    """Takes whole commands off a connection as Redis does, and answers each by ``answer(command, number)``."""

    def __init__(self, answer: Callable[[list[bytes], random.Random], bytes], drip: bool = False) -> None:
        self._answer, self._drip = answer, drip
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listening.getsockname()[1]}/0"
        self.asked = 0
        self.connections = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listening.accept()
                self.connections += 1
                threading.Thread(target=self._one, args=(sock, self.connections), daemon=True).start()

    def _one(self, sock: socket.socket, number: int) -> None:
        rng = random.Random(SEED + number)
        with sock, contextlib.suppress(OSError, ValueError, EOFError):
            stream = sock.makefile("rb")
            while head := stream.readline():
                command = []
                for _ in range(int(head[1:])):
                    size = int(stream.readline()[1:])
                    command.append(stream.read(size))
                    stream.read(2)
                said = b"+PONG\r\n" if command[0] == b"PING" else self._answer(command, rng)
                self.asked += command[0] != b"PING"
                if said == b"hang up":
                    return
                if self._drip and command[0] != b"PING":
                    for byte in said:
                        sock.sendall(bytes([byte]))
                        time.sleep(0.002)
                else:
                    sock.sendall(said)

    def close(self) -> None:
        self._listening.close()


def right(command: list[bytes], members: tuple[bytes, ...] = (b"a", b"b")) -> bytes:
    """What a real one answers to a reader, with two hosts that have everything."""
    if command[0] == b"SMEMBERS":
        return b"*%d\r\n" % len(members) + b"".join(b"$%d\r\n%b\r\n" % (len(m), m) for m in members)
    if command[0] == b"MGET":
        ids_ = [key.rsplit(b":", 1)[1].decode() for key in command[1:]]
        records = [to_record(PeerInfo(i, "127.0.0.1:1", "e1"), NAMES) for i in ids_]
        return b"*%d\r\n" % len(records) + b"".join(b"$%d\r\n%b\r\n" % (len(r), r) for r in records)
    if command[0] == b"SMISMEMBER":
        return b"*%d\r\n" % (len(command) - 2) + b":1\r\n" * (len(command) - 2)
    return b":1\r\n"


WRONG: Final[dict[str, Callable[[list[bytes], random.Random], bytes]]] = {
    "a number": lambda command, rng: b":7\r\n",
    "nothing": lambda command, rng: b"$-1\r\n",
    "no array": lambda command, rng: b"*-1\r\n",
    "text": lambda command, rng: b"$2\r\nhi\r\n",
    "an empty array": lambda command, rng: b"*0\r\n",
    "an array of numbers": lambda command, rng: b"*3\r\n:1\r\n:2\r\n:3\r\n",
    "arrays in arrays": lambda command, rng: b"*1\r\n" * 4 + b":1\r\n",
    "arrays without end": lambda command, rng: b"*1\r\n" * 5000,
    "one entry too few": lambda command, rng: right(command, (b"a",)) if command[0] == b"SMEMBERS" else b"*1\r\n:1\r\n",
    "one entry too many": lambda command, rng: b"*4\r\n" + b"$-1\r\n" * 4,
    "records that are numbers": lambda command, rng: b"*2\r\n:1\r\n:2\r\n" if command[0] == b"MGET" else right(command),
    "an error": lambda command, rng: b"-ERR no\xff\xfe\r\n",
    "errors in place of entries": lambda command, rng: b"*2\r\n-ERR a\r\n-ERR b\r\n",
    "digits of another script": lambda command, rng: "*\u0662\r\n".encode(),
    "a count with an underscore": lambda command, rng: b"*0_2\r\n$1\r\na\r\n$1\r\nb\r\n",
    "a huge array": lambda command, rng: b"*4194304\r\n",
    "a number beyond all bounds": lambda command, rng: b"*" + b"9" * 4000 + b"\r\n",
    "a huge text": lambda command, rng: b"$1048576\r\n" + b"x" * 5000,
    "a text beyond all bounds": lambda command, rng: b"$9223372036854775807\r\n",
    "a length below nothing": lambda command, rng: b"$-7\r\n",
    "a text of another length": lambda command, rng: b"*2\r\n$1\r\nabc\r\n$1\r\nb\r\n",
    "half an answer": lambda command, rng: right(command)[: len(right(command)) // 2],
    "half an answer and the end": lambda command, rng: b"hang up",
    "a line without end": lambda command, rng: b"+" + b"x" * 10000,
    "an answer of RESP3": lambda command, rng: b"%1\r\n+a\r\n+b\r\n",
    "a web server's": lambda command, rng: b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "noise": lambda command, rng: rng.randbytes(rng.randrange(1, 200)),
    "noise in the right form": lambda command, rng: _nearly(right(command), rng),
}


def _nearly(answer: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(answer))
        answer = answer[:at] + rng.choice([b"", rng.randbytes(1), b"\r\n", b"*", b"$", b"9"]) + answer[at + 1 :]
    return answer


def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_module, "BACKOFF_S", (0.01,))
    monkeypatch.setattr(directory_module, "EXCHANGE_S", 0.3)
    monkeypatch.setattr(directory_module, "CONNECT_S", 5.0)


@pytest.mark.parametrize("what", WRONG)
def test_lookups_never_raise_whatever_the_server_answers(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both the thread's questions and those of look-ups, each of which is answered wrongly."""
    no_pauses(monkeypatch)
    print(f"seed {SEED}")
    wrong = WRONG[what]
    goes_wrong = ["everything"]

    def answer(command: list[bytes], rng: random.Random) -> bytes:
        is_lookup = command[0] == b"SMISMEMBER" or (command[0] == b"MGET" and "records" in goes_wrong[0])
        return wrong(command, rng) if goes_wrong[0] == "everything" or (is_lookup and goes_wrong[0]) else right(command)

    strange = Answering(answer)
    reader = Directory(Endpoint.parse(strange.url), NAMES, ttl_s=0.05, timeout_s=0.2)
    try:
        for goes_wrong[0] in ("everything", "the answers of look-ups", "the records of look-ups"):
            asked = strange.asked
            until = time.monotonic() + 60
            while strange.asked < asked + 6 and time.monotonic() < until:
                hits = reader.lookup(keys(40, 1))
                assert hits.have.shape == (len(hits.peers), 40)
                assert len(hits.leading()) == len(hits.peers)
                time.sleep(0.005)
            assert strange.asked >= asked + 6
            assert reader._thread.is_alive()
            assert reader._thread.restarts == 0
        goes_wrong[0] = ""
        wait_for(lambda: reader.lookup(keys(40, 1)).have.any(), "it is believed again once it answers rightly")
    finally:
        reader.close()
        strange.close()


def test_lookups_never_raise_over_many_random_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    no_pauses(monkeypatch)
    print(f"seed {SEED}")
    strange = Answering(lambda command, rng: rng.choice([*WRONG.values(), lambda c, r: right(c)])(command, rng))
    with contextlib.closing(Directory(Endpoint.parse(strange.url), NAMES, ttl_s=0.05, timeout_s=0.1)) as reader:
        for _ in range(LOOKUPS):
            assert reader.lookup(keys(40, 1)).have.shape[1] == 40
            time.sleep(0.002)
        wait_for(lambda: strange.connections > ENOUGH)
        assert reader._thread.is_alive()
    strange.close()


def test_a_server_that_answers_byte_by_byte_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    no_pauses(monkeypatch)
    strange = Answering(lambda command, rng: right(command), drip=True)
    with contextlib.closing(Directory(Endpoint.parse(strange.url), NAMES, ttl_s=0.05, timeout_s=0.1)) as reader:
        wait_for(lambda: reader.stats().failures > 3)
        assert not reader.lookup(keys(40, 1)).have.any()
        assert reader._thread.is_alive()
    strange.close()


@pytest.mark.parametrize("what", WRONG)
def test_a_publisher_lives_whatever_the_server_answers(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvplug.rdma.directory.publisher.BACKOFF_S", (0.01,))
    monkeypatch.setattr("kvplug.rdma.directory.publisher.EXCHANGE_S", 0.3)
    monkeypatch.setattr("kvplug.rdma.directory.publisher.READ_BACK_S", 0.3)
    strange = Answering(WRONG[what])
    with a_pool() as store:
        put(store, keys(5, 1))
        where = Endpoint.parse(strange.url)
        told = Publisher(store.feed(), where, NAMES, host_id="h", address="h.test:1", ttl_s=0.3)
        told.start()
        wait_for(lambda: strange.asked >= 6)
        assert told.is_alive
        told.stop()
    strange.close()


@pytest.mark.parametrize("what", WRONG)
def test_doctor_says_what_answers(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvplug.config import load

    monkeypatch.setattr(directory_module, "EXCHANGE_S", 0.3)
    strange = Answering(WRONG[what])
    config: Any = load(directory_url=strange.url)
    with contextlib.suppress(OSError, DirectoryError):
        assert isinstance(describe_server(config), str)
    strange.close()


@pytest.mark.parametrize("host", ["a..b", "x" * 70, "nobody.invalid"])
def test_a_name_that_nobody_can_have_is_a_directory_that_cant_be_reached(host: str) -> None:
    """Python's resolver raises UnicodeError for some of them."""
    reader = Directory(Endpoint(host, 6379), NAMES, ttl_s=0.3, timeout_s=0.1)
    wait_for(lambda: reader.stats().failures)
    assert not reader.lookup(np.zeros((3, 32), np.uint8)).known
    assert reader._thread.is_alive()
    reader.close()
