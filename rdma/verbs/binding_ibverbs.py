"""The verbs by ``ibverbs``, a wheel that opens the system's libibverbs. It posts, polls and waits without the GIL."""

from __future__ import annotations

import contextlib
import errno
import select
from collections.abc import Iterator
from typing import Any, Final

import ibverbs as ib

from kvplug.errors import VerbsError
from kvplug.rdma.verbs import binding as b


@contextlib.contextmanager
def _errors(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise VerbsError(f"{what}: {e.strerror or e}") from None
    except (ValueError, RuntimeError, OverflowError) as e:
        raise VerbsError(f"{what}: {e}") from None


class _QueuePair(b.QueuePair):
    def __init__(self, context: Any, domain: Any, depth: int) -> None:
        with _errors(f"a queue pair for {depth} work requests"):
            self._channel = context.create_comp_channel()
            self._completions = context.create_cq(depth + b.CHAIN, self._channel)
            self._pair = domain.create_qp(
                ib.QPInitAttr(send_cq=self._completions, recv_cq=self._completions, max_send_wr=depth, max_recv_wr=1)
            )
        self.qpn = self._pair.qp_num
        self._requests = [ib.SendWR(opcode=b.OPCODE_READ) for _ in range(b.CHAIN)]
        self._poller = select.poll()
        self._poller.register(self._channel.fd, select.POLLIN)
        self._armed = False

    def connect(self, ours: b.Endpoint, theirs: b.Endpoint, *, port: int, gid_index: int) -> None:
        with _errors(f"connect queue pair {ours.qpn} with {theirs.qpn}"):
            mtu, reads = min(ours.mtu, theirs.mtu), min(ours.reads, theirs.reads)
            remote = ib.QPInfo(theirs.qpn, theirs.psn, theirs.lid, theirs.gid, 1, mtu)
            self._pair.to_init(port, b.REMOTE_READ)
            self._pair.to_rtr(
                remote,
                sgid_index=gid_index,
                mtu=mtu,
                hop_limit=b.HOP_LIMIT,
                min_rnr_timer=b.MIN_RNR_TIMER,
                max_dest_rd_atomic=reads,
            )
            self._pair.to_rts(
                ours.psn, timeout=b.ACK_TIMEOUT, retry_cnt=b.RETRIES, rnr_retry=b.RETRIES, max_rd_atomic=reads
            )

    def post(self, reads: b.Reads, first: int, end: int) -> None:
        # What is posted was copied when post_send returns: the same objects serve again and again.
        part, sge = slice(first, end), ib.SGE
        chain = self._requests[: end - first]
        for i, (request, local, nbytes, lkey, remote, rkey, signalled) in enumerate(
            zip(
                chain,
                reads.local[part].tolist(),
                reads.nbytes[part].tolist(),
                reads.lkeys[part].tolist(),
                reads.remote[part].tolist(),
                reads.rkeys[part].tolist(),
                reads.signalled[part].tolist(),
                strict=True,
            ),
            first,
        ):
            request.wr_id = i
            request.sg_list = [sge(local, nbytes, lkey)]
            request.remote_addr = remote
            request.rkey = rkey
            request.send_flags = b.SIGNALED if signalled else 0
        with _errors(f"post {len(chain)} READs"):
            self._pair.post_send(chain)

    def poll(self) -> list[tuple[int, int]]:
        with _errors("poll"):
            return [(done.wr_id, int(done.status)) for done in self._completions.poll(b.CHAIN)]

    def wait(self, timeout_s: float) -> None:
        with _errors("wait for completions"):
            if not self._armed:
                self._armed = True
                self._completions.req_notify()
                return  # what came before that gives no event: poll once more
            if self._poller.poll(max(0.0, timeout_s * 1e3)):
                self._channel.get_cq_event()
                self._completions.ack_events(1)
                self._armed = False

    def fail(self) -> None:
        with _errors("give up a queue pair"):
            self._pair.modify(b.CHANGE_STATE, qp_state=b.STATE_ERROR)

    def close(self) -> None:
        with _errors("destroy a queue pair"):
            self._pair.close()
            self._completions.close()
            self._channel.close()


class _Device(b.Device):
    def _open(self, name: str) -> tuple[Any, Any]:
        found = [device for device in ib.get_device_list() if device.name == name]
        if not found:
            raise VerbsError(f"there is no RDMA device {name}")
        context = found[0].open()
        return context, context.alloc_pd()

    def _register(self, address: int, nbytes: int, access: int) -> Any:
        return self._domain.reg_mr(address, nbytes, access)

    def queue_pair(self, depth: int) -> b.QueuePair:
        return _QueuePair(self._context, self._domain, depth)


class _Ibverbs(b.Binding):
    name = "ibverbs"

    def devices(self) -> list[str]:
        try:
            return sorted(device.name for device in ib.get_device_list())
        except OSError as e:
            if e.errno == errno.ENOSYS:
                return []
            raise VerbsError(f"list the RDMA devices: {e.strerror or e}") from None

    def open(self, name: str) -> b.Device:
        return _Device(name, _errors)


BINDING: Final = _Ibverbs()
