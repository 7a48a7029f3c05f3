"""Other systems' programs, driven by the bench beside kvplug: one of them stores, this process reads over TCP.

``others.py SYSTEM SERVER``, run by the interpreter that others_install.sh made. SERVER: a Redis or Valkey binary, for
those that need one. Commands come in as JSON lines, ``[command, arguments]``; each is answered with one line.

What runs here is not ours and listens where it likes, so everything is put into a network namespace that has nothing
but a loopback of its own.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

GIB = 1 << 30
BUFFER_BYTES = GIB // 4
START_S = 30.0
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
PR_SET_PDEATHSIG, SIGKILL = 1, 9
ENDS_WITH_US = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
os.execv(sys.argv[1], sys.argv[1:])
"""
HOST = "127.0.0.1"
WRITER = "writer"

U8 = Any
LIBC = ctypes.CDLL(None, use_errno=True)


def own_network() -> None:
    """Leave every network but a new loopback. Raises OSError where that is not allowed."""
    flags = CLONE_NEWNET if os.geteuid() == 0 else CLONE_NEWUSER | CLONE_NEWNET
    if LIBC.unshare(flags):
        raise OSError(ctypes.get_errno(), "a network namespace of its own is not allowed here")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh14x", b"lo", 0)
        state = struct.unpack("16sh14x", fcntl.ioctl(any_socket, SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", state | IFF_UP))


def start(*command: str, port: int) -> subprocess.Popen[bytes]:
    """Start a server that ends with this process, and wait until it accepts connections."""
    made = subprocess.Popen([sys.executable, "-c", ENDS_WITH_US, *command], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex((HOST, port)) == 0:
                return made
        if made.poll() is not None:
            break
        time.sleep(0.05)
    raise RuntimeError(f"{command[0]} does not answer on port {port}")


def pattern(block: int, rows: int) -> U8:
    """Blocks to store: the same random bytes, the row's number in front."""
    out = np.tile(np.random.default_rng(block).integers(0, 256, block, np.uint8), (rows, 1))
    out[:, :8] = np.arange(rows, dtype=np.int64).view(np.uint8).reshape(rows, 8)
    return out


def cpu_s(pid: int) -> float:
    """CPU time of a process so far, by its clock (clock_getcpuclockid)."""
    return time.clock_gettime((~pid << 3) | 2)


class Redhare:
    """redhare's KvStore: its metadata in Redis, blocks in the memory of the process that stored them."""

    REDIS_PORT = 7379

    @classmethod
    def servers(cls, redis_server: str) -> list[subprocess.Popen[bytes]]:
        options = ("--bind", HOST, "--save", "", "--appendonly", "no", "--dir", tempfile.mkdtemp())
        return [start(redis_server, "--port", str(cls.REDIS_PORT), *options, port=cls.REDIS_PORT)]

    def __init__(self, role: str, address: int) -> None:
        from redhare import KvStore

        # What a reader has of its own can't hold a batch: each read is one from the writer.
        self._store = KvStore(
            redis_url=f"redis://{HOST}:{self.REDIS_PORT}",
            client_id=role,
            data_plane_addr=f"{HOST}:{7400 + (role == WRITER)}",
            hostname=role,  # else the two count as one host
            capacity=GIB // 2 if role == WRITER else GIB // 16,
            transport="tcp",
        )
        self._store.register_buffer(address, BUFFER_BYTES)

    def put(self, names: list[str], addresses: list[int], size: int) -> bool:
        codes = self._store.batch_put_from_multi_buffers(names, [[a] for a in addresses], [[size]] * len(names))
        return not any(codes)

    def get(self, names: list[str], addresses: list[int], size: int) -> bool:
        codes = self._store.batch_get_into_multi_buffers(names, [[a] for a in addresses], [[size]] * len(names))
        return not any(codes)

    def exists(self, names: list[str]) -> bool:
        return self._store.batch_is_exist(names) == [1] * len(names)

    def remove(self, names: list[str]) -> None:
        for name in names:
            self._store.remove(name)


class Mooncake:
    """Mooncake's store: a master that knows what is where, blocks in the segment of the process that stored them."""

    MASTER_PORT, METRICS_PORT = 50051, 50052
    MOST_KEYS = 1024  # 4096 at once all failed after a minute

    @classmethod
    def servers(cls, redis_server: str) -> list[subprocess.Popen[bytes]]:
        master = str(Path(sys.executable).parent / "mooncake_master")
        options = (f"--rpc_address={HOST}", f"--metrics_host={HOST}", f"--metrics_port={cls.METRICS_PORT}")
        return [start(master, f"--rpc_port={cls.MASTER_PORT}", *options, port=cls.MASTER_PORT)]

    def __init__(self, role: str, address: int) -> None:
        from mooncake.store import MooncakeDistributedStore

        self._store = MooncakeDistributedStore()
        segment = GIB // 2 if role == WRITER else 0
        master = f"{HOST}:{self.MASTER_PORT}"
        if self._store.setup(HOST, "P2PHANDSHAKE", segment, GIB // 4, "tcp", "", master):
            raise RuntimeError("Mooncake's setup failed")
        self._store.register_buffer(address, BUFFER_BYTES)

    def put(self, names: list[str], addresses: list[int], size: int) -> bool:
        return not any(self._store.batch_put_from(names, addresses, [size] * len(names)))

    def get(self, names: list[str], addresses: list[int], size: int) -> bool:
        for at in range(0, len(names), self.MOST_KEYS):
            some = names[at : at + self.MOST_KEYS]
            sizes = [size] * len(some)
            if self._store.batch_get_into(some, addresses[at : at + self.MOST_KEYS], sizes) != sizes:
                return False
        return True

    def exists(self, names: list[str]) -> bool:
        return self._store.batch_is_exist(names) == [1] * len(names)

    def remove(self, names: list[str]) -> None:
        self._store.remove_all(True)


SYSTEMS: dict[str, Any] = {"redhare": Redhare, "mooncake": Mooncake}


class Hands:
    """One method per command. ``names`` are those of ``count`` blocks of ``block`` bytes."""

    def __init__(self, system: str, role: str, others: list[subprocess.Popen[Any]]) -> None:
        self._others = [other.pid for other in others]
        self._memory = np.zeros(BUFFER_BYTES, np.uint8)
        self._at = self._memory.ctypes.data
        self._store = SYSTEMS[system](role, self._at)

    def _batch(self, block: int, count: int) -> tuple[list[str], list[int]]:
        return [f"{block}-{i}" for i in range(count)], [self._at + i * block for i in range(count)]

    def put(self, block: int, count: int) -> bool:
        """Store the batch."""
        self._memory[: block * count] = pattern(block, count).ravel()
        return self._store.put(*self._batch(block, count), block)

    def get(self, block: int, count: int) -> dict[str, Any]:
        """Read the batch: seconds, CPU seconds of all processes meanwhile, and whether every byte is right."""
        names, addresses = self._batch(block, count)
        into = self._memory[: block * count]
        into[:] = 0
        used, began = self._cpu_s(), time.perf_counter()
        ok = self._store.get(names, addresses, block)
        seconds, used = time.perf_counter() - began, self._cpu_s() - used
        right = bool(ok and (into.reshape(count, block) == pattern(block, count)).all())
        return {"seconds": seconds, "cpu_s": used, "right": right}

    def _cpu_s(self) -> float:
        return time.process_time() + sum(cpu_s(pid) for pid in self._others)

    def seen(self, block: int, count: int) -> bool:
        """Wait until this process knows of the batch: some tell others of what they have later."""
        deadline = time.monotonic() + START_S
        names = self._batch(block, count)[0]
        while not self._store.exists(names):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def remove(self, block: int, count: int) -> bool:
        """Forget the batch."""
        self._store.remove(self._batch(block, count)[0])
        return True


def answer_with(hands: Hands, elsewhere: dict[str, subprocess.Popen[str]]) -> None:
    """Take commands until standard input ends; those in ``elsewhere`` are another process's to do."""
    for line in sys.stdin:
        command, arguments = json.loads(line)
        if command in elsewhere:
            other = elsewhere[command]
            other.stdin.write(line)
            other.stdin.flush()
            answer = json.loads(other.stdout.readline())
        else:
            answer = getattr(hands, command)(**arguments)
        print(json.dumps(answer), flush=True)


def main(system: str, redis_server: str, role: str = "reader") -> None:
    """Everything of one system."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what others print is no answer
    sys.stdout = os.fdopen(answers, "w")
    LIBC.prctl(PR_SET_PDEATHSIG, SIGKILL)
    if role == WRITER:
        hands = Hands(system, role, [])
        print("true", flush=True)
        answer_with(hands, {})
        os._exit(0)
    own_network()
    servers = SYSTEMS[system].servers(redis_server)
    writer = subprocess.Popen(
        [sys.executable, __file__, system, redis_server, WRITER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    if json.loads(writer.stdout.readline() or "false") is not True:
        raise RuntimeError("the process that stores did not start")
    hands = Hands(system, role, [*servers, writer])
    print("true", flush=True)
    answer_with(hands, {"put": writer, "remove": writer})
    writer.kill()
    for server in servers:
        server.kill()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
