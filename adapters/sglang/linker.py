"""Linker mode: SGLang's device pages straight to the pool's slots and back, with no second copy on the host.

SGLang drives a linker from its scheduler thread: ``lookup`` while it matches a request's prefix, ``load`` when it
admits the request, ``start_layer_wise_loading`` with the batch, ``finish_layer_wise_loading`` after the forward pass;
and ``offload`` when a part of its prefix tree has been computed. Every rank has a scheduler and a linker of its own,
and they have to decide alike without asking each other. So an answer depends only on the calls that came before, which
are the same on all ranks; on what the pool holds, it depends only where SGLang itself compares the ranks' answers (the
lengths that lookup found, the results of loads and offloads).

A failed load would end its requests. So what lookup promises is pinned first (``pins.py``), and what goes wrong before
is a miss. A linker that can't work is off: it finds nothing and stores nothing, and says why once.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinker

from kvplug.adapters.devices import for_device
from kvplug.adapters.sglang import compat_pools, engine
from kvplug.adapters.sglang.devicepools import KV, MAMBA, DevicePools
from kvplug.adapters.sglang.hostpages import ALL_PAGES, TRAILING_PAGES
from kvplug.adapters.sglang.loads import NO_LOAD, LayerCounter, Loads, QueuedLoad
from kvplug.adapters.sglang.offloads import Ledger, Offload, Offloads, Pages, refuse
from kvplug.adapters.sglang.pins import Pins
from kvplug.adapters.sglang.waits import Waits
from kvplug.adapters.sglang.wants import Part, wanted
from kvplug.config import Config
from kvplug.errors import EngineContractError, KvplugError, PoolError
from kvplug.remote.request import Fetch

DEVICE_PAGES_IF_UNKNOWN = 1024
T = TypeVar("T")


class _Works:
    """What a linker has that is on."""

    def __init__(self, rank: engine.RankEngine, pools: DevicePools, ledger: Ledger, forward_stream: Any) -> None:
        store = rank.store
        if store is None:
            raise PoolError(rank.off_reason or "no pool")
        device = for_device(pools.device, store, pools.layouts)
        if device.describe():
            rank.say(f"kvplug: {device.describe()}")
        self.pools = pools
        self.replicated = pools.replicated
        self.writer = not pools.replicated or rank.facts.tp[0] == 0
        sizes = {name: pool.block_nbytes for name, pool in pools.sources.items()}
        for size in sizes.values():
            store.check_fits([size])  # BlockTooLargeError now, not at the first page
        self.pins = Pins(rank, store, sizes, replicated=self.replicated, verify=rank.config.verify == "always")
        self.loads = Loads(rank, store, pools, device, forward_stream)
        self.offloads = Offloads(rank, store, pools, device, ledger)
        self.device = device


class KvplugLinker(UnifiedCacheLinker):
    """See the module's first lines. All methods are called from SGLang's scheduler thread, and none of them raises."""

    def __init__(
        self,
        server_args: Any,
        params: Any,
        *,
        components: Iterable[Any],
        extra_config: Mapping[str, Any] | None = None,
        forward_stream: Any = None,
    ) -> None:
        """As SGLang constructs a linker from outside its tree; never raises, see :attr:`is_on`.

        Args:
            server_args: SGLang's settings.
            params: what it builds its prefix cache from.
            components: kinds of state that the cache keeps per node.
            extra_config: what :mod:`~kvplug.adapters.sglang.flags` put into ``linker_extra_config``.
            forward_stream: the stream on which the forward pass writes the device's pages.
        """
        self.forward_stream = forward_stream
        self.engine = engine.start("linker", extra_config or {})
        self.pools: dict[PoolName, object] = {}
        self._works: _Works | None = None
        self._waits: Waits | None = None
        self._agree: Callable[[Sequence[bool]], list[bool]] = list  # of one rank, until SGLang has taken the linker
        self._asked: tuple[str, list[str], dict[str, int]] | None = None
        # A request that is matched has its state's slot already where there are such: it must not wait with that.
        components = tuple(components)
        self._may_wait = all(getattr(component, "name", "") != "MAMBA" for component in components)
        self._ledger = Ledger(_most_held(params, self.engine.config))
        self.engine.leave_device = self._leave_device
        self.layer_done_counter = LayerCounter(0)
        try:
            compat_pools.watch_hits()  # also where it is off: ranks that are on count on this one
            if self.engine.off_reason is not None:
                return
            pools = compat_pools.device_pools(params, components)
            works = _Works(self.engine, pools, self._ledger, forward_stream)
            if MAMBA in pools.sources:  # its states do not go through the page pool that SGLang registers this with
                params.req_to_token_pool.register_layer_transfer_counter(works.loads.counter)
            self.engine.begin(pools.describe())
        except KvplugError as error:
            self.engine.off(str(error))
        except Exception as error:  # noqa: BLE001 - the engine must start
            self.engine.caught("starting the linker", error)
            self.engine.off(f"{type(error).__name__}: {error}")
        else:
            self.layer_done_counter = works.loads.counter
            self.pools = {PoolName(name): pool for name, pool in pools.sources.items()}
            self._works = works

    @property
    def is_on(self) -> bool:
        """Whether anything can be found or stored."""
        return self._works is not None

    @property
    def is_attached(self) -> bool:
        """Whether SGLang has taken the linker, and told it of its hits and of the other ranks."""
        return self._waits is not None

    def attached(self, markers: Container[str], agree: Callable[[Sequence[bool]], list[bool]]) -> None:
        """SGLang has taken the linker.

        Args:
            markers: where it keeps, at any time, the requests for which it holds a hit.
            agree: for each of some statements, whether it holds on all ranks, which all ask at the same time.
        """
        works = self._works
        self._agree = agree
        self._waits = Waits(
            agree, can_fetch=works is not None and self.engine.fetcher is not None, may_wait=self._may_wait
        )
        if works is not None:
            works.pins.markers = markers

    def matched(self, rid: str, hit_pages: int) -> None:
        """SGLang has matched a request's prefix, with or without a lookup, and has settled on so many pages."""
        asked, self._asked = self._asked, None
        if self._works is not None:
            self._tried("releasing pins", self._works.pins.matched, None, rid)
        if self._waits is not None:
            lacks = asked is not None and asked[0] == rid and hit_pages < len(asked[1])
            self._waits.matched(rid, lacks, lambda: self._fetch(hit_pages, *asked[1:]) if asked is not None else None)

    def _fetch(self, hit_pages: int, hashes: list[str], windows: dict[str, int]) -> Fetch | None:
        """Begins to fetch what of these pages is not there."""
        works, fetcher = self._works, self.engine.fetcher
        if works is None or fetcher is None:
            return None
        try:
            parts = []
            for source, pool in works.pools.sources.items():
                keys = self.engine.keys(source, hashes, works.replicated)
                if keys is None:
                    return None
                window = windows.get(source)
                policy, trailing = (ALL_PAGES, 1) if window is None else (TRAILING_PAGES, window)
                parts.append(Part(keys, pool.block_nbytes, policy, trailing))
            parts.sort(key=lambda part: part.policy != ALL_PAGES)
            asked = wanted(parts, hit_pages, self.engine.facts.page_size)
            return fetcher.start(asked, tokens_per_s=self.engine.speed.tokens_per_s)
        except Exception as error:  # noqa: BLE001
            self.engine.caught("a fetch", error)
            return None

    def holds_back(self, rid: str, idle: bool) -> bool:
        """Whether SGLang must not admit this request yet; ``idle``: it has nothing else to run."""
        return self._waits is not None and self._waits.holds_back(rid, idle)

    # -- lookup ------------------------------------------------------------------------------------------------------

    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> list[int]:
        """Every prefix length, in pages, that can be restored in full; what they need is pinned on return."""
        works = self._works
        by_source = {str(transfer.name.value): transfer.keys or [] for transfer in transfers}
        hashes = by_source.pop(KV, [])
        self._asked = rid, hashes, {name: len(keys) for name, keys in by_source.items()}
        if works is None:
            return []
        try:
            if not hashes or by_source.keys() | {KV} != works.pools.sources.keys():
                return []
            counts = self.engine.counts
            counts["lookups"] += 1
            lengths = works.pins.lookup(rid, hashes, self._asked[2])
            counts["corrupt_pages"], counts["pins_swept"] = works.pins.corrupt, works.pins.swept
        except Exception as error:  # noqa: BLE001
            self.engine.caught("a lookup", error)
            return []
        return lengths

    # -- loads -------------------------------------------------------------------------------------------------------

    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        """Queues what was promised into device pages; False, and SGLang computes the prefix, if a rank can't.

        SGLang takes every rank's answer to be the same and does not compare them: ranks that differ would compute
        batches of different shapes together. So they agree here, all of them, whatever went wrong on one.
        """
        queued = self._queues_load(rid, transfers)
        (agreed,) = self._agree([queued])
        if queued and not agreed:
            self.cancel_queued_load(rid)
        return agreed

    def _queues_load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        works = self._works
        if works is None:
            return False
        try:
            wanted = {str(transfer.name.value): transfer for transfer in transfers if transfer.keys}
            pages = {
                name: works.pools.sources[name].block_ids(transfer.device_indices) for name, transfer in wanted.items()
            }
            for name, transfer in wanted.items():
                if len(pages[name]) != len(transfer.keys):
                    raise EngineContractError(
                        f"a load from pool {name!r} has {len(pages[name])} pages and {len(transfer.keys)} names"
                    )
            taken = works.pins.take(rid, {name: transfer.keys for name, transfer in wanted.items()})
            if not taken:
                return False
        except Exception as error:  # noqa: BLE001
            self.engine.caught("queueing a load", error)
            self._tried("releasing pins", works.pins.release, None, rid)
            return False
        load = QueuedLoad(pages, taken)
        if not self._tried("queueing a load", works.loads.queue, False, rid, load):
            self._tried("releasing pins", works.loads.drop, None, load)
            return False
        self.engine.counts["hit_pages"] += len(pages.get(KV, ()))
        return True

    def _tried(self, where: str, call: Callable[..., T], otherwise: T, *args: Any) -> T:
        try:
            return call(*args)
        except Exception as error:  # noqa: BLE001
            self.engine.caught(where, error)
            return otherwise

    def cancel_queued_load(self, rid: str) -> bool:
        """Gives up a load that has not begun; whether there was one."""
        return self._works is not None and self._tried("giving a load up", self._works.loads.cancel, True, rid)

    def start_layer_wise_loading(self) -> int:
        """Begins what is queued; the number of the batch, -1 if nothing is queued."""
        return self._works.loads.start() if self._works is not None else NO_LOAD

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        """Waits until the batch writes nothing any more; whether all of it landed."""
        return self._works is None or self._works.loads.finish(counter_index)

    def release_request(self, rid: str) -> None:
        """SGLang has forgotten what it found for a request."""
        if self._works is not None:
            self._tried("releasing pins", self._works.pins.release, None, rid)
        if self._waits is not None:
            self._waits.release(rid)

    # -- offloads ----------------------------------------------------------------------------------------------------

    def offload(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        """Begins to store pages. False: SGLang keeps too many for that already, and may come back to these."""
        some = [transfer for transfer in transfers if transfer.keys]
        num_pages = max((len(transfer.keys) for transfer in some), default=0)
        if not some or not self._ledger.has_room(num_pages):
            self.engine.counts["not_stored:held"] += num_pages
            return False
        offload = Offload(num_pages, self.engine.epoch)
        self._ledger.add(offload)
        try:
            self._begin_offload(offload, some)
        except Exception as error:  # noqa: BLE001
            offload.answer = False
            self.engine.caught("an offload", error)
        return True

    def _begin_offload(self, offload: Offload, transfers: list[PoolTransfer]) -> None:
        works = self._works
        if works is None:
            offload.answer = False
            return
        if not works.writer:  # the rank that stores for all answers for all
            offload.answer = True
            return
        pages = []
        for transfer in transfers:
            source = str(transfer.name.value)
            keys = self.engine.keys(source, transfer.keys, works.replicated)
            if keys is None or source not in works.pools.sources:
                refuse(offload, self._count, "not_now")
                return
            pages.append(Pages(source, keys, transfer.device_indices))
        works.offloads.submit(offload, pages, self.record_offload_ready())

    def _count(self, name: str, number: int) -> None:
        self.engine.counts[name] += number

    def num_completed_offloads(self) -> int:
        """How many offloads, oldest first, have their answer. SGLang asks once per scheduler step."""
        if self._works is not None:
            self._tried("releasing pins", self._works.pins.end_of_step, None)
        return self._ledger.answered()

    def pop_completed_offload(self) -> bool:
        """Takes the oldest offload's answer: whether all of it is in the pool."""
        return self._ledger.take()

    # -- the end -----------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """SGLang empties its cache: nothing is promised, queued or copied any more."""
        self._ledger.give_up()
        if self._waits is not None:
            self._waits.clear()
        works = self._works
        if works is None:
            return
        for what in (works.offloads.quiesce, works.pins.clear, works.loads.reset):
            self._tried("a reset", what, None)

    def _leave_device(self) -> None:
        """The device's memory goes, before SGLang empties its cache: nothing of it is read any more."""
        self._ledger.refuse()
        if self._works is not None:
            self._tried("letting the device's memory go", self._works.offloads.quiesce, None)

    def close(self) -> None:
        """Leaves the pool. Idempotent."""
        self._ledger.give_up()
        works, self._works = self._works, None
        if works is not None:
            try:
                works.pins.clear()
                works.loads.close()
                if works.offloads.close():  # else its copy still writes into the pool's mapping
                    works.device.close()
                else:
                    return
            except Exception as error:  # noqa: BLE001
                self.engine.caught("closing the linker", error)
        self.engine.close()


def _most_held(params: Any, config: Config) -> int:
    """Device pages that SGLang may keep for offloads. Equal on all ranks, whatever becomes of this one."""
    try:
        pages = compat_pools.device_pages(params)
    except Exception:  # noqa: BLE001 - then device_pools() fails as well, and says why
        pages = DEVICE_PAGES_IF_UNKNOWN
    return max(1, int(pages * config.store_hold_share))
