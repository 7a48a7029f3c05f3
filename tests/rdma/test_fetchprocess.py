"""The process that fetches for an engine: it brings what is asked for, may die at any instant, and outlives nobody."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest

from kvplug.rdma.reader.speed import Measured
from kvplug.remote import process as fetch_process
from kvplug.remote.fetcher import Fetcher, Outcome
from kvplug.remote.messages import MAX_FRAME_BYTES, Begun, Channel, ChannelError, Problem, WhoHas
from kvplug.remote.process import FetchProcess
from kvplug.remote.sources import Standing
from tests.pool.conftest import leave_nothing
from tests.rdma.fetch_parts import END_S, FAR_LINK, SPAN, MakeHost, ended, settled, wanted
from tests.rdma.hosts import BLOCK, KEY, Child, Fault, Host, Proxy, keys, put, until
from tests.stopwatch import Stopwatch

MakeReader = Callable[..., Fetcher]


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions wait for the first process as long as these tests do: on a busy machine it takes a while to begin."""
    monkeypatch.setattr(fetch_process, "FIRST_S", END_S)


@pytest.fixture
def make_reader() -> Iterator[MakeReader]:
    """``make_reader(host, *addresses, **settings)``: a fetcher as an engine has it; its process must be gone after."""
    made: list[Fetcher] = []

    def make(host: Host, *addresses: str, **settings: Any) -> Fetcher:
        settings = {"fetch_timeout_s": END_S} | settings
        made.append(Fetcher(host.store, host.config.with_changes(peers=addresses, **settings)))
        return made[-1]

    yield make
    for fetcher in made:
        pid = process_of(fetcher).pid
        fetcher.close()
        assert pid is None or is_gone(pid)


def process_of(fetcher: Fetcher) -> FetchProcess:
    assert isinstance(fetcher._sources, FetchProcess)
    return fetcher._sources


def pid_of(fetcher: Fetcher) -> int:
    """Of its process, once there is one that answers."""
    until(lambda: process_of(fetcher).pid is not None, END_S)
    pid = process_of(fetcher).pid
    assert pid is not None
    return pid


def is_gone(pid: int) -> bool:
    """Whether a process has ended, whoever still has to take note of it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_it_brings_what_another_host_has_and_is_gone_afterwards(make_host: MakeHost, make_reader: MakeReader) -> None:
    here, there = make_host(), make_host(**FAR_LINK)
    of = keys(200, 1)
    put(there.store, of[:150], BLOCK)
    fetcher = make_reader(here, there.agent().address)
    fetch = fetcher.start(wanted(of))
    assert ended(fetch) is Outcome.FETCHED
    assert fetch.tokens == 150 * SPAN
    assert here.holds(of) == 150
    assert here.store.stats().pinned_slots == 150
    fetch.release()
    assert ended(fetcher.start(wanted(keys(3, 2)))) is Outcome.MISSING
    counts = fetcher.take_counts()
    assert (counts["fetched_blocks"], counts["fetched_bytes"], counts["fetch_misses"]) == (150, 150 * BLOCK, 1)
    pid = pid_of(fetcher)
    fetcher.close()
    assert is_gone(pid)
    fetcher.close()
    settled(here)


def test_its_measurements_come_along(make_host: MakeHost, make_reader: MakeReader) -> None:
    here, there = make_host(), make_host(**FAR_LINK)
    of = keys(60, 3)
    put(there.store, of, BLOCK)
    address = there.agent().address
    process = process_of(make_reader(here, address))
    (found,), silent = process.who_has(of, time.monotonic() + END_S)
    assert found[0].address == address
    assert found[1].all()
    assert not silent
    assert found[0].speed.bytes_per_s is None, "nothing was read yet"
    codes, standing = process.fetch(address, of, time.monotonic() + END_S)
    assert not codes.any()
    assert standing is not None
    assert not standing.is_down
    assert (standing.speed.bytes_per_s or 0) > 1e6
    assert 0 < (standing.speed.round_trip_s or 0) < END_S


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_killed_in_mid_read_it_costs_what_had_not_arrived(
    make_host: MakeHost, make_reader: MakeReader, proxy: Proxy, number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    here, there = make_host(), make_host(**FAR_LINK, agent_advertise=proxy.address)
    of = keys(200, 4)
    put(there.store, of, BLOCK)
    proxy.upstream = there.agent().address
    fetcher = make_reader(here, proxy.address, peer_connections=1)
    pid = pid_of(fetcher)
    proxy.fault = Fault("delay", 1, to_agent=False, at=100 * BLOCK, act=lambda: os.kill(pid, number))
    fetch = fetcher.start(wanted(of), timeout_s=END_S)
    assert ended(fetch) is Outcome.TIMEOUT
    assert time.monotonic() < fetch.deadline, "noticed, not waited for"
    assert is_gone(pid)
    assert fetch.tokens == here.holds(of) * SPAN
    fetch.release()
    settled(here)  # what it was writing is reclaimed, as of any process that died
    assert any("was lost" in record.getMessage() for record in caplog.records)
    proxy.fault = None

    def fetched() -> bool:  # by another one, which is not started at once
        again = fetcher.start(wanted(of))
        outcome = ended(again)
        again.release()
        return outcome in (Outcome.FETCHED, Outcome.PRESENT)

    until(fetched, END_S)
    assert here.holds(of) == 200
    assert pid_of(fetcher) != pid


def test_stopped_it_holds_nobody_beyond_the_deadline(
    make_host: MakeHost, make_reader: MakeReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_process, "LATE_S", 0.2)
    here, there = make_host(lock_timeout_s=0.5), make_host()
    of = keys(20, 5)
    put(there.store, of, BLOCK)
    fetcher = make_reader(here, there.agent().address)
    pid = pid_of(fetcher)
    os.kill(pid, signal.SIGSTOP)
    fetch = fetcher.start(wanted(of), timeout_s=0.3)
    assert fetch.wait(END_S)
    assert time.monotonic() >= fetch.deadline
    fetch.release()
    assert ended(fetch) in (Outcome.TIMEOUT, Outcome.GIVEN_UP)
    until(lambda: is_gone(pid), END_S)
    until(lambda: ended(fetcher.start(wanted(of))) in (Outcome.FETCHED, Outcome.PRESENT), END_S)
    assert here.holds(of) == 20


@pytest.mark.parametrize("has_heirs", [False, True], ids=["alone", "with forked children"])
def test_an_engine_that_is_killed_takes_it_along(make_host: MakeHost, has_heirs: bool) -> None:
    here = make_host()
    near, far = Pipe()

    def body() -> None:
        fetcher = Fetcher(here.store, here.config.with_changes(peers=("127.0.0.1:1",)))
        pid = pid_of(fetcher)
        heir = 0
        if has_heirs and (heir := os.fork()) == 0:  # it has copies of the sockets, which keep them open
            time.sleep(3 * END_S)  # longer than anybody waits: else its own end would hang up
            os._exit(0)
        far.send((pid, heir))
        time.sleep(END_S)

    with Child(body) as child:
        far.close()
        assert near.poll(END_S)
        pid, heir = near.recv()
        assert not is_gone(pid)
        child.signal(signal.SIGKILL)
        child.wait()
    try:
        until(lambda: is_gone(pid), END_S)
    finally:
        if heir:
            os.kill(heir, signal.SIGKILL)


def test_closing_ends_what_is_under_way_and_leaves_nothing(
    make_host: MakeHost, make_reader: MakeReader, proxy: Proxy
) -> None:
    here, there = make_host(peer_timeout_s=60.0), make_host(**FAR_LINK, agent_advertise=proxy.address)
    of = keys(100, 6)
    put(there.store, of, BLOCK)
    proxy.upstream = there.agent().address
    fetcher = make_reader(here, proxy.address, peer_connections=1)
    fault = proxy.fault = Fault("stall", 1, to_agent=False, at=50 * BLOCK)
    fetches = [fetcher.start(wanted(of)), fetcher.start(wanted(keys(3, 7)))]
    assert fault.happened.wait(END_S)
    pid = pid_of(fetcher)
    fetcher.close()
    assert is_gone(pid)
    assert all(fetch.outcome in (Outcome.TIMEOUT, Outcome.GIVEN_UP, Outcome.MISSING) for fetch in fetches)
    assert not fetcher._under_way
    settled(here)


def test_closed_while_it_is_being_started(make_host: MakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a process nor a waiting question stays."""
    monkeypatch.setattr(fetch_process, "PROGRAM", "import time; time.sleep(60)")
    here = make_host()
    process = FetchProcess(here.store, here.config.with_changes(peers=("127.0.0.1:1",)), 1)
    until(lambda: process._coming is not None, END_S)
    coming = process._coming
    assert coming is not None
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(process.who_has(keys(1, 8), time.monotonic() + END_S)))
    asking.start()
    process.close()
    asking.join(END_S)
    assert answers == [([], True)]
    assert is_gone(coming.pid)


@pytest.mark.parametrize("python", ["/nonexistent/python", None, __file__])
def test_where_none_can_be_started_nobody_answers(
    make_host: MakeHost,
    make_reader: MakeReader,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    python: str | None,
) -> None:
    monkeypatch.setattr(sys, "executable", python)
    fetcher = make_reader(make_host(), "127.0.0.1:1")
    outcomes = {ended(fetcher.start(wanted(keys(3, 9 + i)))) for i in range(5)}
    assert outcomes == {Outcome.TIMEOUT}
    said = [record.getMessage() for record in caplog.records if "could be started" in record.getMessage()]
    assert 1 <= len(said) <= 3, "tried less and less often"
    assert (python or "sys.executable") in said[0]
    assert fetcher.take_counts()["fetch_timeouts"] == 5


def test_one_that_never_answers_is_not_waited_for_by_every_request(
    make_host: MakeHost, make_reader: MakeReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_process, "PROGRAM", "import time; time.sleep(60)")
    monkeypatch.setattr(fetch_process, "FIRST_S", 0.5)
    fetcher = make_reader(make_host(), "127.0.0.1:1")
    watch = Stopwatch()
    assert {ended(fetcher.start(wanted(keys(3, 30 + i)))) for i in range(20)} == {Outcome.TIMEOUT}
    assert watch.took_s() < END_S / 2, "each would have waited to its deadline"


def test_one_that_dies_while_nobody_asks_is_noticed(make_host: MakeHost, make_reader: MakeReader) -> None:
    fetcher = make_reader(make_host(), "127.0.0.1:1")
    pid = pid_of(fetcher)
    os.kill(pid, signal.SIGKILL)
    until(lambda: process_of(fetcher).pid is None, END_S)
    assert not Path(f"/proc/{pid}").exists(), "not even its exit status is left"


def test_without_standard_streams(make_host: MakeHost) -> None:
    """As a daemon has it that closed them: what is opened next has their numbers."""
    here, there = make_host(), make_host()
    of = keys(5, 31)
    put(there.store, of, BLOCK)
    config = here.config.with_changes(peers=(there.agent().address,), fetch_timeout_s=END_S)

    def body() -> None:
        for fd in range(3):
            os.close(fd)
        fetcher = Fetcher(here.store, config)
        good = ended(fetcher.start(wanted(of))) is Outcome.FETCHED
        fetcher.close()
        os._exit(0 if good else 3)

    with Child(body) as child:
        assert child.wait(END_S) == 0
    assert here.holds(of) == 5


def test_it_imports_what_the_engine_imports(
    make_host: MakeHost, make_reader: MakeReader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing of the working directory, and a module that only this process's path leads to."""
    elsewhere, cwd = tmp_path / "elsewhere", tmp_path / "cwd"
    for folder in (elsewhere, cwd):
        folder.mkdir()
    for name in ("json", "signal", "numpy", "kvplug"):
        (cwd / f"{name}.py").write_text("raise SystemExit('of the working directory')")
    (elsewhere / "only_here.py").write_text("")
    monkeypatch.chdir(cwd)
    monkeypatch.syspath_prepend(elsewhere)
    needs = fetch_process.PROGRAM.replace("from kvplug", "import only_here\nfrom kvplug")
    monkeypatch.setattr(fetch_process, "PROGRAM", needs)
    here, there = make_host(), make_host()
    of = keys(5, 32)
    put(there.store, of, BLOCK)
    assert ended(make_reader(here, there.agent().address).start(wanted(of))) is Outcome.FETCHED


def test_another_pool_of_that_name_is_not_filled(
    make_host: MakeHost, make_reader: MakeReader, caplog: pytest.LogCaptureFixture
) -> None:
    here = make_host()
    leave_nothing(here.config.pool)
    other = Host(here.config.pool)
    try:
        fetcher = make_reader(here, "127.0.0.1:1")
        assert ended(fetcher.start(wanted(keys(3, 20)))) is Outcome.TIMEOUT
        assert any("could be started" in record.getMessage() for record in caplog.records)
    finally:
        other.close()


def test_an_error_of_its_own_is_counted_and_said(
    make_host: MakeHost, make_reader: MakeReader, caplog: pytest.LogCaptureFixture
) -> None:
    missing = {name: f"/nonexistent/{name}.pem" for name in ("tls_cert", "tls_key", "tls_ca")}
    fetcher = make_reader(make_host(), "127.0.0.1:1", **missing)
    assert ended(fetcher.start(wanted(keys(3, 21)))) is Outcome.GIVEN_UP
    until(lambda: fetcher.take_counts()["fetch_errors"] == 1, END_S)
    until(lambda: any("/nonexistent/tls_c" in str(record.exc_info) for record in caplog.records), END_S)
    assert not is_gone(pid_of(fetcher)), "it goes on"


def test_an_error_that_nobody_foresaw_ends_it_and_the_next_one_goes_on(
    make_host: MakeHost, make_reader: MakeReader, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = "import kvplug.remote.sources as h; h.Holders.who_has = lambda *a: [][1]; " + fetch_process.PROGRAM
    monkeypatch.setattr(fetch_process, "PROGRAM", broken)
    here, there = make_host(), make_host()
    of = keys(5, 24)
    put(there.store, of, BLOCK)
    fetcher = make_reader(here, there.agent().address)
    pid = pid_of(fetcher)
    monkeypatch.undo()
    assert ended(fetcher.start(wanted(of))) is Outcome.GIVEN_UP
    until(lambda: is_gone(pid), END_S)
    until(lambda: fetcher.take_counts()["fetch_errors"] == 1, END_S)
    until(lambda: any("IndexError" in str(record.exc_info) for record in caplog.records), END_S)
    until(lambda: ended(fetcher.start(wanted(of))) in (Outcome.FETCHED, Outcome.PRESENT), END_S)
    assert here.holds(of) == 5


def test_secrets_are_not_where_others_can_read_them(make_host: MakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the settings are those of the engine's process, whatever the environment says by now."""
    here, there = make_host(), make_host()
    of = keys(5, 22)
    put(there.store, of, BLOCK)
    config = here.config.with_changes(peers=(there.agent().address,), fetch_timeout_s=END_S)
    monkeypatch.setenv("KVPLUG_AUTH_KEY", "another key, which nobody here has")
    monkeypatch.setenv("KVPLUG_TLS_CERT", "/one/of/three")
    fetcher = Fetcher(here.store, config)
    monkeypatch.setenv("KVPLUG_NONSENSE", "1")
    assert ended(fetcher.start(wanted(of))) is Outcome.FETCHED
    for file in ("cmdline", "environ"):
        assert KEY.encode() not in Path(f"/proc/{pid_of(fetcher)}/{file}").read_bytes()
    fetcher.close()


def test_ctrl_c_is_the_engines(make_host: MakeHost, make_reader: MakeReader) -> None:
    here, there = make_host(), make_host()
    of = keys(5, 23)
    put(there.store, of, BLOCK)
    fetcher = make_reader(here, there.agent().address)
    pid = pid_of(fetcher)
    os.kill(pid, signal.SIGINT)
    assert ended(fetcher.start(wanted(of))) is Outcome.FETCHED
    assert pid_of(fetcher) == pid


# ---- the channel -----------------------------------------------------------------------------------------------------


@pytest.fixture
def ends() -> Iterator[tuple[Channel, socket.socket]]:
    """One end as a channel, and the other bare."""
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    yield channel, theirs
    channel.close()
    theirs.close()


@pytest.mark.parametrize("n", [0, 1, 32 * 2048, 32 << 18])
def test_words_of_any_length_arrive(ends: tuple[Channel, socket.socket], n: int) -> None:
    near, far = ends[0], Channel(ends[1])
    word = WhoHas(os.urandom(n), 1.5)
    sending = threading.Thread(target=far.send, args=(word, time.monotonic() + END_S))
    sending.start()
    assert near.receive(time.monotonic() + END_S) == word
    sending.join()
    found = Problem("ü" * n)
    sending = threading.Thread(target=far.send, args=(found,))
    sending.start()
    assert near.receive() == found
    sending.join()


def test_words_in_pieces_arrive(ends: tuple[Channel, socket.socket]) -> None:
    near, sock = ends
    ours, theirs = socket.socketpair()
    Channel(ours).send(Problem("word"))
    for byte in theirs.recv(100):
        sock.sendall(bytes([byte]))
        time.sleep(0.001)
    assert near.receive(time.monotonic() + END_S) == Problem("word")
    ours.close()
    theirs.close()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\x03\0\0\0abc", "no word"),
        (b"\0\0\0\0", "no word"),
        ((MAX_FRAME_BYTES + 1).to_bytes(4, "little"), "bytes; there are none above"),
        (b"\x08\0\0\0\x91", "hung up"),
    ],
)
def test_nonsense_is_an_error(ends: tuple[Channel, socket.socket], data: bytes, said: str) -> None:
    near, sock = ends
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)
    with pytest.raises(ChannelError, match=said):
        near.receive(time.monotonic() + END_S)


def test_nobody_waits_longer_than_said(ends: tuple[Channel, socket.socket]) -> None:
    near, _ = ends
    began = time.monotonic()
    with pytest.raises(ChannelError, match="nothing has come"):
        near.receive(began + 0.2)
    assert time.monotonic() >= began + 0.2
    with pytest.raises(ChannelError, match="nothing could be sent"):
        near.send(WhoHas(bytes(64 << 20), 0.0), time.monotonic() + 0.1)


def test_what_is_known_of_a_peer_arrives_as_it_was(ends: tuple[Channel, socket.socket]) -> None:
    from kvplug.remote.messages import Fetched, Found

    near, far = ends[0], Channel(ends[1])
    one, two = Standing("a:1", False, Measured(None, 2e9)), Standing("b:2", True, Measured(0.5, None))
    for word in (
        Found([(one, b"\1\0"), (two, b"")], True),
        Fetched(b"\0\xff", Standing("[::1]:2", True, Measured(None, None))),
        Fetched(b"", None),
        Begun(),
    ):
        far.send(word)
        assert near.receive(time.monotonic() + END_S) == word
