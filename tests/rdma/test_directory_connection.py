"""The connection to the directory's server: the real one's doors, and answers that no real one gives."""

from __future__ import annotations

import random
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kvplug.errors import ConfigError, DirectoryError
from kvplug.rdma.directory import resp
from kvplug.rdma.directory.directory import Directory
from kvplug.rdma.directory.names import Names
from kvplug.rdma.directory.resp import Connection, Endpoint, ServerError, command
from tests.rdma.redis_server import RedisServer
from tests.stopwatch import Stopwatch

PASSWORD = "p@ss/w:rd"
QUOTED = "p%40ss%2Fw%3Ard"


def soon(seconds: float = 20.0) -> float:
    return time.monotonic() + seconds


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    made = RedisServer(password=PASSWORD)
    yield made
    made.close()


# ---- where and as whom


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://10.0.0.9", Endpoint("10.0.0.9", 6379)),
        ("valkey://h:7000/3", Endpoint("h", 7000, database=3)),
        ("rediss://u:p%40@h:1", Endpoint("h", 1, tls=True, username="u", password="p@")),
        ("rediss://h/1?ca=/etc/ca.pem", Endpoint("h", 6379, database=1, tls=True, tls_ca="/etc/ca.pem")),
        ("redis://:pw@[::1]:5/0", Endpoint("::1", 5, password="pw")),
        ("unix:///run/r.sock?db=2", Endpoint("", 6379, path="/run/r.sock", database=2)),
    ],
)
def test_urls_mean_what_they_say(url: str, expected: Endpoint) -> None:
    assert Endpoint.parse(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        "",
        "10.0.0.9:6379",
        "http://h",
        "redis://",
        "redis://h/x",
        "redis://h:99999",
        "redis://h/-1",
        "unix://",
        "redis://h?db=3",
        "redis://h?ca=x",
    ],
)
def test_an_url_that_is_none_is_refused_and_not_quoted(url: str) -> None:
    with pytest.raises(ConfigError, match="directory_url must be") as caught:
        Endpoint.parse(url.replace("//", "//me:hunter2@", 1))
    assert "hunter2" not in str(caught.value)


def test_a_password_is_never_shown() -> None:
    endpoint = Endpoint.parse("redis://me:hunter2@h:1/2")
    assert "hunter2" not in f"{endpoint} {endpoint!r}"


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("unix:///s", True),
        ("redis://localhost", True),
        ("redis://127.0.0.3", True),
        ("redis://[::1]", True),
        ("redis://10.0.0.1", False),
        ("redis://localhost.example", False),
    ],
)
def test_what_stays_on_this_host_is_known(url: str, local: bool) -> None:
    assert Endpoint.parse(url).is_local is local


def test_the_right_password_opens_and_a_wrong_one_says_so(server: RedisServer) -> None:
    Connection.open(Endpoint.parse(f"redis://:{QUOTED}@127.0.0.1:{server.port}"), soon()).close()
    Connection.open(Endpoint.parse(f"redis://default:{QUOTED}@127.0.0.1:{server.port}"), soon()).close()
    with pytest.raises(ServerError, match="WRONGPASS"):
        Connection.open(Endpoint.parse(f"redis://:wrong@127.0.0.1:{server.port}"), soon())
    with pytest.raises(ServerError, match="NOAUTH"):
        Connection.open(Endpoint.parse(f"redis://127.0.0.1:{server.port}"), soon())


def test_databases_are_apart_and_a_unix_socket_will_do(server: RedisServer) -> None:
    first = Connection.open(Endpoint.parse(f"redis://:{QUOTED}@127.0.0.1:{server.port}/1"), soon())
    second = Connection.open(Endpoint("", 0, path=server.socket_path, database=2, password=PASSWORD), soon())
    assert first.call(soon(), command("SET", "k", "v"), command("GET", "k")) == [b"OK", b"v"]
    assert second.call(soon(), command("GET", "k"), command("DBSIZE")) == [None, 0]
    first.close()
    second.close()


def test_answers_of_every_kind_are_read(server: RedisServer) -> None:
    c = Connection.open(Endpoint.parse(f"redis://:{QUOTED}@127.0.0.1:{server.port}"), soon())
    answers = c.call(
        soon(),
        command("RPUSH", "l", "a", b"\0\r\n"),
        command("LRANGE", "l", 0, -1),
        command("GET", "l"),
        command("NOSUCH"),
        command("SMEMBERS", "none"),
        command("PING"),
    )
    assert answers[:2] == [2, [b"a", b"\0\r\n"]]
    assert [type(a) for a in answers[2:4]] == [ServerError, ServerError]
    assert isinstance(answers[2], ServerError)
    assert answers[2].kind == "WRONGTYPE"
    assert answers[4:] == [[], b"PONG"]
    names = np.random.default_rng(1).integers(0, 1 << 63, 5000, np.uint64)
    c.send([resp.variadic(5000, "SADD", "s"), resp.members(names).tobytes(), command("SMEMBERS", "s")], soon())
    assert c.read(soon()) == 5000
    assert set(np.asarray(c.read_names(soon())).tolist()) == set(names.tolist())
    c.send([resp.variadic(5000, "SMISMEMBER", "s"), resp.members(names + np.uint64(1)).tobytes()], soon())
    flags = c.read_flags(5000, soon())
    assert not isinstance(flags, ServerError)
    assert int(flags.sum()) == int(np.isin(names + np.uint64(1), names).sum())
    c.send([command("SADD", "t", "not eight"), command("SMEMBERS", "t")], soon())
    assert c.read(soon()) == 1
    with pytest.raises(DirectoryError, match="not 8 bytes"):
        c.read_names(soon())
    c.close()


def test_tls_checks_the_servers_certificate(tmp_path: Path) -> None:
    if not (shutil.which("openssl") and shutil.which("redis-server")):
        pytest.skip("needs openssl, and a redis-server that speaks TLS")
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    made += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", tmp_path / "key", "-out", tmp_path / "cert"]
    subprocess.run(made, check=True, capture_output=True, timeout=60)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    tls = ["--tls-port", str(port), "--tls-cert-file", str(tmp_path / "cert"), "--tls-key-file", str(tmp_path / "key")]
    server = RedisServer(shutil.which("redis-server"), *tls, "--tls-ca-cert-file", tls[3], "--tls-auth-clients", "no")
    try:
        url = f"rediss://127.0.0.1:{port}"
        c = Connection.open(Endpoint.parse(f"{url}/0?ca={tmp_path}/cert"), soon())
        assert c.call(soon(), command("PING")) == [b"PONG"]
        c.close()
        with pytest.raises(OSError, match="certificate verify failed"):
            Connection.open(Endpoint.parse(url), soon())
        with pytest.raises((OSError, DirectoryError)):
            Connection.open(Endpoint.parse(f"rediss://127.0.0.1:{server.port}"), soon(1.0))
    finally:
        server.close()


# ---- a stranger at the other end


class Stranger:
    """Listens where the server should be, and says what a test makes it say."""

    def __init__(self, talk: Callable[[socket.socket], None]) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.endpoint = Endpoint("127.0.0.1", self._listening.getsockname()[1])
        self._talk = talk
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listening.accept()
                threading.Thread(target=self._one, args=(sock,), daemon=True).start()
            except OSError:
                return

    def _one(self, sock: socket.socket) -> None:
        with sock:
            try:
                self._talk(sock)
            except OSError:
                return

    def close(self) -> None:
        self._listening.close()


def test_an_answer_in_drops_does_not_outlast_the_deadline() -> None:
    """Each byte comes well within a time-out for one receive; the deadline is for all of them."""

    def drip(sock: socket.socket) -> None:
        sock.recv(1000)
        for _ in range(400):
            sock.sendall(b"x")
            time.sleep(0.05)

    stranger = Stranger(drip)
    watch = Stopwatch()
    with pytest.raises(TimeoutError):
        Connection.open(stranger.endpoint, soon(0.5))
    assert watch.took_s() < 5
    stranger.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"$9999999999\r\n",
        b"$-2\r\n",
        b"*99999999999\r\n",
        b"*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n:1\r\n",
        b":\r\n",
        b"\r\n",
        b"x" * 100_000,
        b"%1\r\n+a\r\n+b\r\n",
    ],
    ids=["http", "huge", "below", "many", "deep", "no number", "nothing", "long line", "resp3"],
)
def test_what_no_server_says_is_refused(answer: bytes) -> None:
    near, far = socket.socketpair()
    with near, far:
        far.sendall(answer)
        far.shutdown(socket.SHUT_WR)
        with pytest.raises((DirectoryError, ConnectionError)):
            Connection(near).read(soon())


def test_random_bytes_raise_what_is_expected_and_take_no_memory() -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    pieces = [b"*", b"$", b":", b"+", b"-", b"\r\n", b"1", b"7", b"-1", b"99", b"\0", b"*2\r\n", b"$8\r\n12345678\r\n"]
    for _ in range(600):
        noise = b"".join(rng.choice([*pieces, rng.randbytes(3)]) for _ in range(rng.randrange(1, 30)))
        for read in ("read", "read_names", "read_flags"):
            near, far = socket.socketpair()
            with near, far:
                far.sendall(noise)
                far.shutdown(socket.SHUT_WR)
                c = Connection(near)
                try:
                    for _ in range(40):
                        getattr(c, read)(*((2,) if read == "read_flags" else ()), soon())
                except (OSError, DirectoryError):
                    pass
                else:
                    raise AssertionError(f"{noise!r} was taken for 40 answers")


def test_a_reader_that_talks_to_a_stranger_knows_nothing_and_goes_on() -> None:
    stranger = Stranger(lambda sock: sock.sendall(b"+PONG\r\n" + b"*1\r\n$3\r\nabc\r\n" * 50) or time.sleep(1))
    reader = Directory(stranger.endpoint, Names(b"a secret"), ttl_s=1, timeout_s=1.0)
    deadline = soon()
    while reader.stats().failures < 2:
        assert time.monotonic() < deadline
        assert not reader.lookup(np.zeros((3, 32), np.uint8)).have.any()
        time.sleep(0.01)
    assert reader.peers() == ()
    reader.close()
    stranger.close()
