"""Ten thousand frames that nobody should send: refused, counted, nothing read, and the agent serves on."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
from collections.abc import Callable

import numpy as np
import psutil
import pytest

from kvplug.errors import Code, PeerError
from kvplug.rdma.control import protocol as p
from kvplug.rdma.control.auth import shared_key
from kvplug.rdma.control.wire import FrameMac
from tests.rdma.handshakes import admitted, dial, frame, half_way, is_hung_up_on
from tests.rdma.hosts import BLOCK, Host, keys, put, until
from tests.stopwatch import Stopwatch

FRAMES = 10_000
SEED = int(os.environ.get("KVPLUG_TEST_SEED", "20251124"))
GROWTH_BYTES = 64 << 20


def some_message(rng: random.Random) -> p.Message:
    """One of the protocol's, with what a fuzzer puts into it."""
    number = rng.choice([0, 1, 7, 1 << 31, 1 << 62])
    sizes = p.raw(np.full(2, rng.choice([number, 1, BLOCK])), np.int64)
    at = rng.choice([("127.0.0.1:1",), ("127.0.0.1:2",)])
    end = p.QueueEnd(rng.randrange(1 << 24), rng.randrange(1 << 24), rng.randbytes(16), 0, rng.randrange(1, 6), 16)
    return rng.choice(
        [
            p.Hello("control", True, rng.randbytes(32), "127.0.0.1:1"),
            p.Hello("data", True, rng.randbytes(32), "127.0.0.1:1", rng.randbytes(16)),
            p.Challenge(True, rng.randbytes(32), rng.randbytes(16)),
            p.Proof(),
            p.Welcome(1.0, 1, ("tcp",)),
            p.Lookup(rng.randbytes(rng.choice([0, 1, 31, 32, 64, 33])), 1.0),
            p.Leased(number, 1.0, b"", b"", b"", b"", b"", b"", b""),
            p.Extend(number, 600.0),
            p.Release(tuple(rng.randrange(1 << 62) for _ in range(rng.randrange(9)))),
            p.Stats(),
            p.GetTicket(),
            p.Read(number, rng.randbytes(rng.choice([0, 3, 4, 40]))),
            p.ReadStart(number),
            p.Offer(rng.randbytes(64), sizes, bytes(16), at),
            p.Offer(rng.randbytes(64), rng.choice([b"", bytes(15), sizes]), bytes(16), at),
            p.Offered(rng.randbytes(3)),
            p.OpenQueue(end, rng.randrange(256), tuple(rng.randrange(1 << 24) for _ in range(rng.randrange(4)))),
            p.QueueOpened(end, 0, number, number, 1 << 25),
            p.GetRegions(rng.randrange(3), number, rng.randbytes(rng.choice([0, 3, 4, 40])), 600.0),
            p.RegionKeys(rng.randbytes(3), rng.randbytes(12)),
            p.Failed("busy"),
        ]
    )


def bad_bytes(rng: random.Random, mac_bytes: int) -> bytes:
    """A frame, mangled, or one that is out of place; in the place of its MAC, noise."""
    whole = frame(some_message(rng), rng.randbytes(mac_bytes))
    kind = rng.randrange(6)
    if kind == 0:
        return rng.randbytes(rng.randrange(1, 400))
    if kind == 1:
        return whole[: rng.randrange(len(whole))]
    if kind == 2:
        at = rng.randrange(len(whole))
        return whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :]
    if kind == 3:  # a length that its kind does not allow
        number = rng.choice(list(p.KINDS))
        return p.HEADER.pack(p.MAGIC, p.VERSION, number, rng.randrange(p.KINDS[number][1] + 1, 1 << 32), 1) + b"x" * 64
    if kind == 4:  # a right header, a body of noise
        number = rng.choice(list(p.KINDS))
        length = rng.randrange(min(p.KINDS[number][1], 200) + 1)
        return p.HEADER.pack(p.MAGIC, p.VERSION, number, length, 1) + rng.randbytes(length + mac_bytes)
    return whole


def test_ten_thousand_bad_frames(make_host: Callable[..., Host]) -> None:
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    owner, reader = make_host(cache_node=True, peers=("127.0.0.1:1",)), make_host()
    put(owner.store, keys(8, 1), BLOCK)
    agent = owner.agent()
    memory = psutil.Process().memory_info().rss
    sent = connections = 0
    for round_ in range(FRAMES):
        if sent >= FRAMES:
            break
        stage = round_ % 4
        with contextlib.suppress(OSError, PeerError):
            connection = dial(agent.address)
            connections += 1
            mac: FrameMac | None = None
            if stage == 2:  # after Hello and Challenge
                half_way(connection, shared_key(owner.config))
            elif stage == 3:  # one who has the key, and sends noise with right MACs
                connection.close()
                connection, session = admitted(owner, agent.address)
                connections += 1
                mac = FrameMac(session.to_agent)
                mac.next(*p.encode(p.Proof(), 0))
            burst = rng.randrange(1, 12)
            payload = b""
            for _ in range(burst):
                bad = bad_bytes(rng, 16 if mac is None else 0)
                sent += 1
                if mac is not None and len(bad) >= p.HEADER.size:
                    header, body = bad[: p.HEADER.size], bad[p.HEADER.size :]
                    header = header[:4] + len(body).to_bytes(4, "little") + header[8:]
                    bad = header + body + mac.next(header, body)
                payload += bad
            connection.sock.sendall(payload)
            connection.sock.shutdown(socket.SHUT_WR)
            connection.sock.settimeout(5)
            while connection.sock.recv(1 << 16):
                pass
        connection.close()
    assert sent >= FRAMES
    until(lambda: not agent._connections)
    counters = agent.counters()
    ended = sum(counters.get(x, 0) for x in ("protocol_errors", "auth_failures", "closed", "timed_out", "broken"))
    assert ended == connections, f"seed {SEED}: {connections} connections, {counters}"
    assert counters["protocol_errors"] > 100, counters
    assert counters["auth_failures"] > 100, counters
    assert counters.get("keys_leased", 0) == 0, f"seed {SEED}: {counters}"
    assert "bytes_sent" not in counters, f"seed {SEED}: {counters}"
    assert agent.leases.held() == (0, 0)
    assert counters["offers"] > 0, "offers that are right in form were among them"
    assert counters["offers_of_strangers"] > 0
    assert counters.get("keys_taken", 0) == 0
    assert owner.store.stats().sealed_blocks == 8
    assert psutil.Process().memory_info().rss - memory < GROWTH_BYTES
    assert (reader.peer(agent.address).fetch(keys(8, 1)) == Code.OK).all()
    until(lambda: owner.store.stats().pinned_slots == 0)


def header(kind: int, length: int) -> bytes:
    return p.HEADER.pack(p.MAGIC, p.VERSION, kind, length, 1)


SINGLE = {
    "an oversized frame": (header(5, p.KINDS[5][1] + 1), "protocol_errors"),
    "a frame of four gigabytes": (header(5, (1 << 32) - 1) + bytes(1 << 16), "protocol_errors"),
    "a truncated header": (header(11, 1)[:9], "timed_out"),
    "a truncated frame": (frame(p.Lookup(bytes(320), 1.0))[:100], "timed_out"),
    "random bytes": (random.Random(SEED).randbytes(4096), "protocol_errors"),
}
"""What is sent, and then nothing more; under what it is counted."""


@pytest.mark.parametrize("is_known", [False, True], ids=["a stranger", "one who has the key"])
@pytest.mark.parametrize("what", SINGLE)
def test_one_bad_frame_is_refused_and_counted_and_nothing_is_read(
    make_host: Callable[..., Host], what: str, is_known: bool
) -> None:
    sent, counted = SINGLE[what]
    owner, reader = make_host(), make_host()
    put(owner.store, keys(8, 1), BLOCK)
    agent = owner.agent()
    connection = admitted(owner, agent.address)[0] if is_known else dial(agent.address)
    memory = psutil.Process().memory_info().rss
    connection.sock.sendall(sent)
    until(lambda: agent.counters().get(counted) == 1)
    assert is_hung_up_on(connection)
    assert psutil.Process().memory_info().rss - memory < GROWTH_BYTES
    assert "lookups" not in agent.counters()
    assert "bytes_sent" not in agent.counters()
    until(lambda: not agent._connections)
    assert (reader.peer(agent.address).fetch(keys(8, 1)) == Code.OK).all()


def test_who_says_nothing_or_drips_is_hung_up_on_and_holds_up_nobody(make_host: Callable[..., Host]) -> None:
    owner, reader = make_host(), make_host()
    put(owner.store, keys(8, 1), BLOCK)
    agent = owner.agent()
    silent = [dial(agent.address) for _ in range(40)]
    dripping = dial(agent.address)
    ended = threading.Event()

    def drip() -> None:
        with contextlib.suppress(OSError):
            for byte in frame(p.Hello("control", True, bytes(32), agent.address)):
                dripping.sock.sendall(bytes([byte]))
                if ended.wait(0.1):
                    return

    thread = threading.Thread(target=drip)
    thread.start()
    watch = Stopwatch()
    assert (reader.peer(agent.address).fetch(keys(8, 1)) == Code.OK).all()
    assert watch.took_s() < 10  # one after another they would be waited for 80 s
    until(lambda: agent.counters().get("timed_out", 0) >= 41)
    ended.set()
    thread.join(5)
    for connection in (*silent, dripping):
        connection.close()


def test_random_bytes_in_place_of_an_agent_are_a_miss(make_host: Callable[..., Host]) -> None:
    """The reader's side of the same: whatever answers, it is a miss, in time."""
    rng = np.random.default_rng(SEED)
    reader = make_host(peer_timeout_s=0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        stop = threading.Event()

        def answer() -> None:
            while not stop.is_set():
                with contextlib.suppress(OSError):
                    sock, _ = listener.accept()
                    with sock:
                        sock.sendall(rng.bytes(int(rng.integers(1, 300))))
                        sock.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=answer)
        thread.start()
        for _ in range(50):
            peer = reader.peer(f"127.0.0.1:{listener.getsockname()[1]}")
            watch = Stopwatch()
            assert (peer.fetch(keys(8, 1)) == Code.TIMEOUT).all()
            assert watch.took_s() < 1.5
        stop.set()
        thread.join(5)
