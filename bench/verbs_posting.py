"""What building and posting 2048 READs costs of CPU: kvplug's own way, beside the binding's bare loop of posts.

    python bench/verbs_posting.py [ibverbs|pyverbs ...]

Where there is an RDMA device (a lab guest has one), both are measured on it, a queue pair that reads from itself. Where
there is none, the building alone is: what is left out then is the post itself, one call for 64 READs.
"""

from __future__ import annotations

import mmap
import secrets
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from kvplug.errors import VerbsError
from kvplug.rdma.verbs import binding as b
from kvplug.rdma.verbs.rails import best_gid, gids_of
from kvplug.rdma.verbs.reads import plan

N = 2048
BLOCK = 4096
ROUNDS = 5
DRAIN_S = 60.0


def reads(base: int, lkey: int, rkey: int) -> b.Reads:
    """N blocks that have no neighbours, as the data path would read them."""
    at = np.arange(N, dtype=np.int64) * BLOCK
    planned = plan(at, at[::-1].copy(), np.full(N, BLOCK // 2, np.int64), regions=(1 << 25, 1 << 25), longest=1 << 23)
    assert len(planned) == N
    keys = np.full(N, lkey, np.uint32), np.full(N, rkey, np.uint32)
    return b.Reads(planned.local + base, planned.remote + base, planned.nbytes, *keys, planned.signalled)


def cpu_ms(work: Callable[[], object]) -> float:
    """Milliseconds of this thread's CPU."""
    began = time.thread_time()
    work()
    return (time.thread_time() - began) * 1e3


def post_all(queue: Any, all_reads: b.Reads) -> None:
    """As the data path does, without waiting."""
    for first in range(0, N, b.CHAIN):
        queue.post(all_reads, first, first + b.CHAIN)


def drain(queue: Any) -> None:
    """Until the last one has completed."""
    ends = time.monotonic() + DRAIN_S
    done = 0
    while done < N and time.monotonic() < ends:
        for at, status in queue.poll():
            assert status == 0, f"READ {at}: {b.STATUSES.get(status, status)}"
            done = at + 1
        queue.wait(0.05)
    assert done == N


def bare(name: str, all_reads: b.Reads) -> Callable[[Any], None]:
    """N work requests that were made beforehand, posted one by one: the binding's own limit."""
    columns = (all_reads.local, all_reads.nbytes, all_reads.lkeys, all_reads.remote, all_reads.rkeys)
    rows = list(zip(range(N), *(column.tolist() for column in columns), all_reads.signalled.tolist(), strict=True))
    flags = {True: b.SIGNALED, False: 0}
    made: list[Any] = []
    if name == "ibverbs":
        import ibverbs as ib

        made = [
            ib.SendWR(i, [ib.SGE(at, n, lk)], b.OPCODE_READ, flags[s], far, rk) for i, at, n, lk, far, rk, s in rows
        ]
    else:
        from pyverbs import wr

        for i, at, n, lk, far, rk, s in rows:
            scatter = wr.SGE(at, n, lk)
            made.append(wr.SendWR(wr_id=i, opcode=b.OPCODE_READ, num_sge=1, sg=[scatter], send_flags=flags[s]))
            scatter.close()
            made[-1].set_wr_rdma(rk, far)

    def post(queue: Any) -> None:
        for request in made:
            queue._pair.post_send(request)

    return post


def on_a_device(name: str) -> str:
    """Both, on the first device with a port up. Raises VerbsError: there is none."""
    verbs = b.binding(name)
    for device_name in verbs.devices():
        device = verbs.open(device_name)
        ports = device.ports()
        if ports:
            break
    else:
        raise VerbsError("there is no device with a port up")
    gid = best_gid(gids_of(ports[0]), "")
    memory = np.frombuffer(mmap.mmap(-1, N * BLOCK), np.uint8)
    memory[:] = 1
    region = device.register(int(memory.ctypes.data), len(memory), b.LOCAL_WRITE | b.REMOTE_READ)
    all_reads = reads(int(memory.ctypes.data), region.lkey, region.rkey)
    queue = device.queue_pair(N)
    end = b.Endpoint(queue.qpn, secrets.randbits(24), gid.raw, ports[0].lid, ports[0].mtu, b.MAX_READS)
    queue.connect(end, end, port=ports[0].number, gid_index=gid.index)
    post_bare = bare(name, all_reads)
    ours, limit = [], []
    for _ in range(ROUNDS):
        ours.append(cpu_ms(lambda: post_all(queue, all_reads)))
        drain(queue)
        limit.append(cpu_ms(lambda: post_bare(queue)))
        drain(queue)
    queue.close()
    region.close()
    device.close()
    return (
        f"{name}: build and post {N} READs {min(ours):.2f} ms; bare loop of posts {min(limit):.2f} ms ({device_name})"
    )


def building_alone() -> str:
    """ibverbs without a device: the queue pair's post, with nothing behind it."""
    from kvplug.rdma.verbs import binding_ibverbs as of

    queue = of._QueuePair.__new__(of._QueuePair)
    queue._requests = [of.ib.SendWR(opcode=b.OPCODE_READ) for _ in range(b.CHAIN)]
    queue._pair = SimpleNamespace(post_send=len)
    all_reads = reads(1 << 40, 1, 2)
    took = [cpu_ms(lambda: post_all(queue, all_reads)) for _ in range(ROUNDS)]
    return f"ibverbs: build {N} READs, nothing posted {min(took):.2f} ms (target with the post: 5 ms)"


def main() -> int:
    """Print them."""
    for name in sys.argv[1:] or b.BINDINGS:
        try:
            print(on_a_device(name))
        except VerbsError as e:
            print(f"{name}: {e}")
    try:
        print(building_alone())
    except ImportError as e:
        print(f"ibverbs: {e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
