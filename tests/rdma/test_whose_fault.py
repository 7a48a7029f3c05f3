"""An agent that can't be talked to: what is wrong is said, and what to do about it, for every way that it can be."""

from __future__ import annotations

import contextlib
import http.server
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from kvplug.errors import ConfigError, PeerAuthError, PeerError, PeerTimeoutError
from kvplug.rdma.control.protocol import HEADER, MAGIC, VERSION, Proof
from kvplug.rdma.control.wire import Connection
from kvplug.rdma.verbs.describe import describe_peers
from tests.rdma.hosts import Host, until
from tests.rdma.redis_server import RedisServer

MakeHost = Callable[..., Host]
OTHER_KEY: Final = "another key for the tests of kvplug"
PATIENCE_S: Final = 60.0
RAW: Final = ("Errno", "endpoint is not connected", "SSL:", "_ssl.c", "ALERT_")
"""Words of the system's that no user can do anything with."""


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """TLS settings of hosts: good, of another CA, expired, of another name, for servers only, with a passphrase."""
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*arguments: object) -> None:
        subprocess.run(["openssl", *map(str, arguments)], cwd=folder, check=True, capture_output=True, timeout=60)

    for ca in ("ca", "other"):
        openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", 2,
                "-subj", f"/CN={ca}", "-keyout", f"{ca}.key", "-out", f"{ca}.pem")  # fmt: skip
    here = "subjectAltName=IP:127.0.0.1,DNS:localhost\n"
    kinds = {
        "good": ("ca", here, 2),
        "stranger": ("other", here, 2),
        "expired": ("ca", here, -1),
        "elsewhere": ("ca", "subjectAltName=DNS:elsewhere.example\n", 2),
        "servers only": ("ca", here + "extendedKeyUsage=serverAuth\n", 2),
    }
    made: dict[str, dict[str, str]] = {}
    for name, (ca, extensions, days) in kinds.items():
        (folder / "extensions").write_text(extensions)
        openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                "-subj", "/CN=host", "-keyout", f"{name}.key", "-out", f"{name}.csr")  # fmt: skip
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", f"{ca}.pem", "-CAkey", f"{ca}.key", "-CAcreateserial",
                "-days", days, "-extfile", "extensions", "-out", f"{name}.pem")  # fmt: skip
        made[name] = {key: str(folder / f"{name}.{end}") for key, end in (("tls_cert", "pem"), ("tls_key", "key"))}
        made[name]["tls_ca"] = str(folder / "ca.pem")
    openssl("ec", "-in", "good.key", "-aes256", "-passout", "pass:secret", "-out", "locked.key")
    made["locked"] = made["good"] | {"tls_key": str(folder / "locked.key")}
    made["another's key"] = made["good"] | {"tls_key": made["stranger"]["tls_key"]}
    return made


def told(reader: Host, address: str, kind: type[PeerError]) -> str:
    """What the reader says of the agent there, and what doctor says: neither may need a look into a book of errors."""
    config = reader.config.with_changes(peer_timeout_s=PATIENCE_S)
    with pytest.raises(PeerError) as caught:
        reader.peer(address, peer_timeout_s=PATIENCE_S).stats(PATIENCE_S)
    text = str(caught.value)
    assert isinstance(caught.value, kind), f"{type(caught.value).__name__}: {text}"
    (remark,) = describe_peers(config.with_changes(peers=(address,)))
    for said in (text, remark.found):
        assert not [word for word in RAW if word in said], said
    assert remark.status == "warning"
    assert remark.fix.startswith("start `kvplug agent`") != issubclass(kind, PeerAuthError)
    return text


AGENT_REFUSES: Final = {
    "stranger": r"refuses this host's certificate, whose CA is not in its tls_ca",
    "expired": r"refuses this host's certificate, which has expired",
    "servers only": r"refuses this host's certificate.*use",
}


@pytest.mark.parametrize("who", AGENT_REFUSES)
def test_an_agent_that_refuses_the_readers_certificate_says_why(
    make_host: MakeHost, tls: dict[str, dict[str, str]], who: str
) -> None:
    owner, reader = make_host(**tls["good"]), make_host(**tls[who])
    agent = owner.agent()
    for _ in range(5):  # the refusal comes while the reader is writing, or after that
        with pytest.raises(PeerAuthError, match=AGENT_REFUSES[who]):
            reader.peer(agent.address, peer_timeout_s=PATIENCE_S).stats(PATIENCE_S)
    told(reader, agent.address, PeerAuthError)
    until(lambda: agent.counters()["auth_failures"] >= 6)
    assert owner.peer(agent.address).stats(PATIENCE_S).leases == 0


READER_REFUSES: Final = {
    "stranger": r"CA of the other end's certificate is not in this host's tls_ca",
    "expired": r"other end's certificate has expired: renew it",
    "elsewhere": r"does not name the address that was dialled.*subjectAltName",
}


@pytest.mark.parametrize("who", READER_REFUSES)
def test_a_reader_that_refuses_the_agents_certificate_says_why(
    make_host: MakeHost, tls: dict[str, dict[str, str]], who: str
) -> None:
    agent = make_host(**tls[who]).agent()
    with pytest.raises(PeerAuthError, match=READER_REFUSES[who]):
        make_host(**tls["good"]).peer(agent.address).stats(PATIENCE_S)
    told(make_host(**tls["good"]), agent.address, PeerAuthError)


def test_the_agents_log_says_who_was_refused_and_why(
    make_host: MakeHost, tls: dict[str, dict[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    agent = make_host(**tls["good"]).agent()
    with pytest.raises(PeerAuthError):
        make_host(**tls["stranger"]).peer(agent.address).stats(PATIENCE_S)
    until(lambda: "is not in this host's tls_ca" in caplog.text, PATIENCE_S)
    assert "no TLS with 127.0.0.1:" in caplog.text


def test_tls_at_one_end_only_is_said_at_both(make_host: MakeHost, tls: dict[str, dict[str, str]]) -> None:
    plain, secret = make_host(), make_host(**tls["good"])
    assert "tls_cert, tls_key and tls_ca" in told(plain, secret.agent().address, PeerAuthError)
    assert "tls_cert, tls_key and tls_ca" in told(secret, plain.agent().address, PeerAuthError)


@pytest.mark.parametrize("which", ["locked", "another's key"])
def test_files_that_can_not_be_used_are_named_and_no_passphrase_is_waited_for(
    make_host: MakeHost, tls: dict[str, dict[str, str]], which: str
) -> None:
    with pytest.raises(ConfigError, match=r"\.key.*without a passphrase"):
        make_host(**tls[which]).agent()


def send_on_and_on(connection: Connection) -> None:
    """What is sent first may still be taken by the kernel."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        connection.send(Proof(), 0, deadline)


@pytest.mark.parametrize("how", ["at once", "when it has read"])
def test_who_hangs_up_after_the_handshake_is_not_told_to_look_at_his_certificates(
    tls: dict[str, dict[str, str]], how: str
) -> None:
    """A process that ends in mid-session: no agent has refused anybody, and no setting is wrong."""
    files = tls["good"]
    ours, theirs = (ssl.SSLContext(kind) for kind in (ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER))
    ours.load_verify_locations(files["tls_ca"])
    theirs.load_cert_chain(files["tls_cert"], files["tls_key"])

    def hang_up(sock: socket.socket) -> None:
        with sock:
            if how == "at once":  # without a word: the kernel answers what comes with a reset
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                sock.recv(1)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        serving = threading.Thread(
            target=lambda: hang_up(theirs.wrap_socket(listening.accept()[0], server_side=True)), daemon=True
        )
        serving.start()
        dialled = socket.create_connection(listening.getsockname(), timeout=PATIENCE_S)
        sock = ours.wrap_socket(dialled, server_hostname="127.0.0.1")
        connection = Connection(sock, listening.getsockname())  # the other end may be gone by now
        try:
            with pytest.raises(PeerError) as caught:
                send_on_and_on(connection)
            assert not isinstance(caught.value, PeerAuthError), caught.value
            assert not [word for word in ("TLS", "tls_", *RAW) if word in str(caught.value) and word != "Errno"]
        finally:
            connection.close()
            serving.join(PATIENCE_S)


# ---- keys, versions, names


def test_another_key_is_said(make_host: MakeHost) -> None:
    text = told(make_host(auth_key=OTHER_KEY), make_host().agent().address, PeerAuthError)
    assert "the same KVPLUG_AUTH_KEY" in text


def test_a_key_at_one_end_only_is_said(make_host: MakeHost) -> None:
    assert "only one of the two has a key" in told(make_host(auth_key=None), make_host().agent().address, PeerAuthError)


class Something:
    """Listens, and does with each connection what a test says."""

    def __init__(self, talk: Callable[[socket.socket], Any]) -> None:
        self._talk = talk
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listening.accept()
                threading.Thread(target=self._one, args=(sock,), daemon=True).start()

    def _one(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            self._talk(sock)

    def close(self) -> None:
        self._listening.close()


@pytest.fixture
def something() -> Iterator[Callable[[Callable[[socket.socket], Any]], str]]:
    made: list[Something] = []

    def make(talk: Callable[[socket.socket], Any]) -> str:
        made.append(Something(talk))
        return made[-1].address

    yield make
    for one in made:
        one.close()


def test_another_version_of_the_protocol_is_said(make_host: MakeHost, something: Any) -> None:
    header = HEADER.pack(MAGIC, VERSION + 1, 2, 0, 0)
    address = something(lambda sock: (sock.recv(1 << 12), sock.sendall(header), sock.recv(1)))
    text = told(make_host(), address, PeerAuthError)
    assert f"version {VERSION + 1}" in text
    assert "one version of kvplug on all hosts" in text


def test_who_hangs_up_at_once_is_said(make_host: MakeHost, tls: dict[str, dict[str, str]], something: Any) -> None:
    address = something(lambda sock: sock.recv(1 << 12))
    assert "hung up before it had said who it is" in told(make_host(), address, PeerAuthError)
    assert "hung up while TLS was being agreed on" in told(make_host(**tls["good"]), address, PeerAuthError)


def test_who_says_nothing_is_said(make_host: MakeHost, tls: dict[str, dict[str, str]], something: Any) -> None:
    address = something(lambda sock: time.sleep(PATIENCE_S))
    for reader in (make_host(peer_timeout_s=0.5), make_host(peer_timeout_s=0.5, **tls["good"])):
        with pytest.raises(PeerTimeoutError, match="took the connection"):
            reader.peer(address).stats(PATIENCE_S)


def test_nobody_there_is_said(make_host: MakeHost) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(PeerError, match="can't be reached"):
            make_host().peer(address).stats(PATIENCE_S)
        (remark,) = describe_peers(make_host().config.with_changes(peers=(address,)))
        assert remark.fix.startswith("start `kvplug agent` there")


@pytest.mark.parametrize("address", ["a..b:1", "nobody.invalid:9410"])
def test_a_name_that_nobody_has_is_said(make_host: MakeHost, address: str) -> None:
    with pytest.raises(PeerError, match="nobody knows the address"):
        make_host().peer(address, peer_timeout_s=PATIENCE_S).stats(PATIENCE_S)


# ---- something else has that port


def test_a_web_server_is_known(make_host: MakeHost, tls: dict[str, dict[str, str]]) -> None:
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    web.RequestHandlerClass.log_message = lambda *_: None  # type: ignore[method-assign, assignment]
    threading.Thread(target=web.serve_forever, daemon=True).start()
    address = f"127.0.0.1:{web.server_address[1]}"
    try:
        assert "does not speak TLS" in told(make_host(**tls["good"]), address, PeerAuthError)
    finally:
        web.shutdown()
        web.server_close()


@pytest.mark.parametrize(
    ("said", "known_as"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "speaks HTTP; name the address of a `kvplug agent`"),
        (b"-ERR Protocol error: unbalanced\r\n", "as Redis does; its address belongs into directory_url"),
        (b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n", "speaks SSH"),
        (b"\x15\x03\x03\x00\x02\x02\x46 and more", "speaks TLS"),
        (b"-ERR\r\n", "as Redis does"),
        (b"anything else at all, of no protocol", "does not speak this protocol"),
    ],
)
def test_what_answers_in_an_agents_place_is_known(
    make_host: MakeHost, something: Any, said: bytes, known_as: str
) -> None:
    address = something(lambda sock: (sock.recv(1 << 12), sock.sendall(said), len(said) < 16 or sock.recv(1)))
    text = told(make_host(), address, PeerAuthError)
    assert known_as in text
    assert "no agent that this host can talk to" in text


def test_a_redis_in_an_agents_place_costs_a_deadline_at_most(make_host: MakeHost, tls: Any) -> None:
    server = RedisServer()
    try:
        for settings in ({}, tls["good"]):
            reader = make_host(peer_timeout_s=0.5, **settings)
            with pytest.raises(PeerError, match=r"took the connection|no TLS with|hung up|as Redis does"):
                reader.peer(f"127.0.0.1:{server.port}").stats(PATIENCE_S)
    finally:
        server.close()


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"*1\r\n$4\r\nPING\r\n" * 3])
def test_an_agent_says_who_took_it_for_something_else(
    make_host: MakeHost, said: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    agent = make_host().agent()
    host, _, port = agent.address.rpartition(":")
    with socket.create_connection((host, int(port))) as sock:
        sock.sendall(said)
        until(lambda: "refused" in caplog.text, PATIENCE_S)
    assert ("HTTP" if said.startswith(b"GET") else "directory_url") in caplog.text


def test_a_name_in_peers_that_is_the_directory(tmp_path: Path) -> None:
    """A setting that is no address is refused where it is given, not when it is dialled."""
    from kvplug.config import load

    with pytest.raises(ConfigError, match="host:port"):
        load(peers=("redis://10.0.0.1:6379",))
