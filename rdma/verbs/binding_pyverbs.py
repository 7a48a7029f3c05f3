"""The verbs by pyverbs, which comes with the distribution's rdma-core.

It keeps the GIL while it posts and polls, gives one completion for each call below, and its waiting for an event would
keep the GIL too: so a thread looks again and again, asleep in between, and few work requests are signalled. Its work
requests and their scatter lists hold memory that is freed by exactly one ``close`` each, and a list belongs to its
request once it was given to it: they are made for each chain and closed after it, in that order and once.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Any, Final

from pyverbs import addr, cq, device, mr, pd, qp, wr
from pyverbs.pyverbs_error import PyverbsError

from kvplug.errors import VerbsError
from kvplug.rdma.verbs import binding as b


@contextlib.contextmanager
def _errors(what: str) -> Iterator[None]:
    try:
        yield
    except PyverbsError as e:
        raise VerbsError(f"{what}: {_why(e)}") from None
    except (ValueError, TypeError, OverflowError) as e:
        raise VerbsError(f"{what}: {e}") from None


def _why(error: PyverbsError) -> str:
    code = getattr(error, "error_code", None)
    return f"{error.args[0] if error.args else error}{f' ({os.strerror(code)})' if code and code > 0 else ''}"


class _QueuePair(b.QueuePair):
    def __init__(self, context: Any, domain: Any, depth: int) -> None:
        with _errors(f"a queue pair for {depth} work requests"):
            self._completions = cq.CQ(context, depth + b.CHAIN, None, None, 0)
            room = qp.QPCap(max_send_wr=depth, max_recv_wr=1, max_send_sge=1, max_recv_sge=1)
            wanted = qp.QPInitAttr(qp_type=b.RC, scq=self._completions, rcq=self._completions, cap=room, sq_sig_all=0)
            self._pair = qp.QP(domain, wanted)
        self.qpn = self._pair.qp_num
        self._napping = b.Napping()

    def connect(self, ours: b.Endpoint, theirs: b.Endpoint, *, port: int, gid_index: int) -> None:
        with _errors(f"connect queue pair {ours.qpn} with {theirs.qpn}"):
            text = theirs.gid.hex()
            gid = addr.GID(":".join(text[i : i + 4] for i in range(0, 32, 4)))
            route = addr.GlobalRoute(dgid=gid, sgid_index=gid_index, hop_limit=b.HOP_LIMIT)
            state = qp.QPAttr(port_num=port)
            state.ah_attr = addr.AHAttr(dlid=theirs.lid, gr=route, is_global=1, port_num=port)
            state.qp_access_flags = b.REMOTE_READ
            state.path_mtu = min(ours.mtu, theirs.mtu)
            state.dest_qp_num, state.rq_psn, state.sq_psn = theirs.qpn, theirs.psn, ours.psn
            state.max_rd_atomic = state.max_dest_rd_atomic = min(ours.reads, theirs.reads)
            state.min_rnr_timer = b.MIN_RNR_TIMER
            state.timeout, state.retry_cnt, state.rnr_retry = b.ACK_TIMEOUT, b.RETRIES, b.RETRIES
            self._pair.to_rts(state)

    def post(self, reads: b.Reads, first: int, end: int) -> None:
        part = slice(first, end)
        chain: list[Any] = []
        following: Any = None
        try:
            # From the last to the first, since each names the one behind it.
            for i, local, nbytes, lkey, remote, rkey, signalled in zip(
                range(end - 1, first - 1, -1),
                reads.local[part].tolist()[::-1],
                reads.nbytes[part].tolist()[::-1],
                reads.lkeys[part].tolist()[::-1],
                reads.remote[part].tolist()[::-1],
                reads.rkeys[part].tolist()[::-1],
                reads.signalled[part].tolist()[::-1],
                strict=True,
            ):
                scatter = wr.SGE(local, nbytes, lkey)
                following = wr.SendWR(
                    wr_id=i,
                    opcode=b.OPCODE_READ,
                    num_sge=1,
                    sg=[scatter],
                    send_flags=b.SIGNALED if signalled else 0,
                    next_wr=following,
                )
                scatter.close()  # it was copied
                following.set_wr_rdma(rkey, remote)
                chain.append(following)
            with _errors(f"post {len(chain)} READs"):
                self._pair.post_send(following)
        finally:
            for request in chain:
                request.close()

    def poll(self) -> list[tuple[int, int]]:
        with _errors("poll"):
            done = [(one.wr_id, int(one.status)) for one in self._completions.poll(b.CHAIN)[1]]
        if done:
            self._napping.awake()
        return done

    def wait(self, timeout_s: float) -> None:
        self._napping.nap(timeout_s)

    def fail(self) -> None:
        with _errors("give up a queue pair"):
            state = qp.QPAttr()
            state.qp_state = b.STATE_ERROR
            self._pair.modify(state, b.CHANGE_STATE)

    def close(self) -> None:
        with _errors("destroy a queue pair"):
            self._pair.close()
            self._completions.close()


class _Device(b.Device):
    def _open(self, name: str) -> tuple[Any, Any]:
        context = device.Context(name=name)
        return context, pd.PD(context)

    def _register(self, address: int, nbytes: int, access: int) -> Any:
        return mr.MR(self._domain, nbytes, access, address=address)

    def queue_pair(self, depth: int) -> b.QueuePair:
        return _QueuePair(self._context, self._domain, depth)


class _Pyverbs(b.Binding):
    name = "pyverbs"

    def devices(self) -> list[str]:
        try:
            found = device.get_device_list()
        except PyverbsError as e:
            if getattr(e, "error_code", None) == errno.ENOSYS:
                return []
            raise VerbsError(f"list the RDMA devices: {_why(e)}") from None
        return sorted(one.name.decode() for one in found)

    def open(self, name: str) -> b.Device:
        return _Device(name, _errors)


BINDING: Final = _Pyverbs()
