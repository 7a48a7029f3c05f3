"""One rank of an SGLang engine at the pool: its store, its shard, and the namespace that is in force.

**Namespace in force.** Nothing may be looked up or stored until the weights are identified, which happens in the
background; nor after a change of weights until SGLang has flushed its own cache, since until then requests may build
on pages that the old weights made. After that the engine has a private namespace of its own, which all its ranks work
out alike, until its weights are known again (``weights.py``). ``epoch`` counts these changes; work that was begun in
another epoch is dropped.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from kvplug import config as configuration
from kvplug.adapters.common.prefill import PrefillSpeed
from kvplug.adapters.sglang import compat, lora, namespace
from kvplug.adapters.sglang.compat import Facts
from kvplug.adapters.sglang.flags import EXTRA_KEY, PRIVATE, PROCESS_STARTED_NS
from kvplug.adapters.sglang.metrics import Publisher
from kvplug.adapters.sglang.pagekeys import Keys, mask, page_keys
from kvplug.adapters.sglang.weights import Look, Weights, cannot_tell
from kvplug.config import Config
from kvplug.errors import KvplugError, NamespaceError, UnsupportedEngineError
from kvplug.identity.canonical import Value
from kvplug.identity.namespace import Namespace, WeightsIdentity
from kvplug.store import KvStore
from kvplug.threads import guarded

if TYPE_CHECKING:
    from kvplug.remote.fetcher import Fetcher

logger = logging.getLogger("sglang.kvplug")
POLL_S = 0.05
MOST_POLL_S = 1.0
"""Between two looks at whether the weights are known again."""
AGREE_S = 3600.0
"""Longest wait until all ranks have said what they have read; a rank without kvplug never does."""


@dataclass(frozen=True)
class Shard:
    """Which part of a page this rank holds: ``index`` of ``count``."""

    index: int
    count: int


class RankEngine:
    """See the module's first lines. Thread-safe; :meth:`keys` is called from SGLang's own threads."""

    def __init__(self, mode: str, extra: Mapping[str, Any], before: RankEngine | None = None) -> None:
        """Attaches to the pool. Never raises: what stands in the way is in :attr:`off_reason`, and was said.

        ``before``: this rank's engine until it left the pool, whose weights may have changed since the start.
        """
        self.mode = mode
        self.counts: Counter[str] = Counter()
        self.off_reason: str | None = None
        self.epoch = 0
        self.store: KvStore | None = None
        self.fetcher: Fetcher | None = None
        """What asks other hosts; None where the settings name none."""
        self.leave_device: Callable[[], None] | None = None
        """Ends what reads the device's pages, which are about to go; None where only SGLang itself reads them."""
        self.speed = PrefillSpeed()
        """How fast this rank computes prompts; measured only where there is a fetcher."""
        self.config: Config = Config.defaults()
        self.shard = Shard(0, 1)
        self.replicated_shard = Shard(0, 1)
        self.secret = bytes(32)
        self.private_name = PRIVATE
        self.keeps_sessions = False
        self.layout: dict[str, Value] | None = None
        self._measures = False
        self._lock = threading.RLock()
        self._loaded: Namespace | None = None
        self._namespace: Namespace | None = None
        """Of the weights as they were loaded, and in force; None until those are identified."""
        self._masks: dict[tuple[str, bool], Keys] = {}
        self._unflushed: bool = before is not None and before._unflushed
        self._clean = False
        """Whether the last change was a sleep, and SGLang's cache held nothing but what known weights had made."""
        self._updating: bool = before is not None and before._updating
        self._weights: Weights = before._weights if before is not None else Weights()
        self._identities: tuple[WeightsIdentity, WeightsIdentity | None] | None = (
            before._identities if before is not None else None
        )
        self._rotations: int = before._rotations if before is not None else 0
        self._identified = threading.Event()
        self._closed = threading.Event()
        self._publisher: Publisher | None = None
        self._said: set[str] = set()
        try:
            self._start(extra, before)
        except KvplugError as error:
            self.off(str(error))
        except Exception as error:
            logger.exception("kvplug: an error at start")
            self.off(f"{type(error).__name__}: {error}")

    def _start(self, extra: Mapping[str, Any], before: RankEngine | None) -> None:
        if not compat.have_context():
            raise UnsupportedEngineError(
                "this engine was started without --enable-kvplug or KVPLUG_ENABLE=1, so kvplug does not know its model"
            )
        if (lost := compat.lost_hooks()) is not None:
            raise UnsupportedEngineError(lost)
        own = dict(extra.get(EXTRA_KEY) or {})
        self.config = configuration.load(**dict(own.get("settings") or {}))
        self.facts = compat.facts() if before is None else _as_started(compat.facts(), before)
        _refuse(self.facts, self.config)
        if (replaced := compat.weights_replaced()) is not None:
            raise UnsupportedEngineError(
                f"the weights were replaced ({replaced}) before kvplug was attached, so which they are is not known; "
                "start the engine again"
            )
        self.secret = blake3(f"{compat.engine_word()} {self.facts.replica}".encode() + b"kvplug engine").digest()
        self.private_name = f"{PRIVATE[:-1]}-{self._word('name', 0).hex()}|"
        self.keeps_sessions = self.facts.is_multimodal and not self.config.trust_mm_ids
        # Settings may be another engine's, which was started later: no file may have changed since this process began.
        self._started_ns = min(int(own.get("started_ns") or PROCESS_STARTED_NS), PROCESS_STARTED_NS)
        if not self._weights.changes:
            self._weights = Weights(namespace.reloaded_from(self.facts), self._started_ns)
        (tp, tps), (cp, cps), (pp, pps) = self.facts.tp, self.facts.cp, self.facts.pp
        self.shard = Shard((pp * cps + cp) * tps + tp, pps * cps * tps)
        self.replicated_shard = Shard(pp * cps + cp, pps * cps)
        self.store = KvStore(config=self.config)
        if self.config.asks_other_hosts:
            from kvplug.remote.fetcher import Fetcher  # with all that engines of one host have no use for

            self.fetcher = Fetcher(self.store, self.config)
        self._measures = self.fetcher is not None
        self._publisher = Publisher(self.counts, self.facts.server, self.gather_counts)

    # -- how fast it computes ----------------------------------------------------------------------------------------

    def step_begins(self, scheduler: Any, batch: Any) -> None:
        """SGLang is about to compute a batch."""
        if self._measures:
            try:
                step = compat.step_begins(scheduler, batch)
                if step is not None:
                    self.speed.began(*step)
            except Exception as error:  # noqa: BLE001
                self._measure_no_more(error)

    def step_ended(self, batch: Any) -> None:
        """SGLang has a batch's results."""
        if self._measures:
            try:
                self.speed.ended(compat.step_of(batch))
            except Exception as error:  # noqa: BLE001
                self._measure_no_more(error)

    def _measure_no_more(self, error: Exception) -> None:
        self._measures = False
        self.speed = PrefillSpeed()  # unknown again: every fetch is tried
        self.caught("measuring how fast prompts are computed", error)

    # -- what the modes call -----------------------------------------------------------------------------------------

    def begin(self, layout: Mapping[str, Value]) -> None:
        """The mode knows how its bytes lie in a block (equal on all ranks): the weights are identified from now on."""
        with self._lock:
            if self.off_reason is not None or self.layout is not None:
                return
            self.layout = dict(layout)
        self.say(
            f"kvplug: ON in {self.mode} mode, pool {self.config.pool}, rank {self.shard.index} of {self.shard.count}; "
            "pages are shared as soon as the weights are identified",
            logging.INFO,
        )
        lora.tell_ranks(self)
        identify = guarded("kvplug-identify", self._identify, "this engine's pages are not shared")
        threading.Thread(target=identify, name="kvplug-identify", daemon=True).start()
        if self._weights.pending:
            self._wait_known()

    def keys(self, pool: str, hashes: Sequence[str], replicated: bool = False) -> Keys | None:
        """Keys of pages in one of SGLang's page pools, on this rank.

        Args:
            pool: the pool's name, such as ``"kv"`` or ``"swa"``.
            hashes: SGLang's page hashes.
            replicated: every rank of a stage holds the same bytes, so that there is one key for all.

        Returns:
            (N, 32) uint8, or None while nothing may be looked up or stored.
        """
        masked = self._masks.get((pool, replicated))
        if masked is None:
            masked = self._make_mask(pool, replicated)
            if masked is None:
                return None
        return page_keys(hashes, masked)

    def siblings(self, replicated: bool = False) -> tuple[int, int]:
        """(count, index) of the parts that a page has on all ranks, for :meth:`KvStore.reserve_batch`."""
        shard = self.replicated_shard if replicated else self.shard
        return shard.count, shard.index

    def ranks_agree(self, topic: str, mine: bytes) -> bool | None:
        """Whether all ranks of this engine say the same of a topic; None until each has said something."""
        return compat.ranks_agree(topic, mine)

    def gather_counts(self) -> None:
        """Adds what the fetcher has counted to :attr:`counts`."""
        if self.fetcher is not None:
            self.counts.update(self.fetcher.take_counts())

    def wait_identified(self, timeout_s: float) -> bool:
        """Whether the weights are known, or never will be, within this time. For tests and the demo."""
        return self._identified.wait(timeout_s)

    def off(self, reason: str) -> None:
        """From now on nothing is looked up or stored; said once."""
        with self._lock:
            if self.off_reason is not None:
                return
            self.off_reason = reason
            self._masks = {}  # no new epoch: what was promised before is still right, and other ranks count on it
        self._identified.set()
        self.say(f"kvplug: OFF: {reason}", logging.ERROR)

    def say(self, line: str, level: int = logging.WARNING) -> None:
        """Logs a line once."""
        if line not in self._said:
            self._said.add(line)
            logger.log(level, line)

    def caught(self, where: str, error: BaseException) -> None:
        """An error that must not reach the engine: counted, and logged the first time at each place."""
        self.counts["errors"] += 1
        if where not in self._said:
            self._said.add(where)
            logger.error("kvplug: %s failed; the engine goes on without it", where, exc_info=error)

    @property
    def left(self) -> bool:
        """Whether this engine has left the pool."""
        return self._closed.is_set()

    def leave(self) -> None:
        """Leaves the pool, for SGLang was told to do without. Changes of weights are still noted, for :func:`start`:
        SGLang goes on with the pages that it has, and may be told to use the pool again. Idempotent."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
            self.off_reason = self.off_reason or "closed"
            self._forget()
            store, self.store = self.store, None
        if self.fetcher is not None:
            self.fetcher.close()
        if self._publisher is not None:
            self._publisher.close()
        if store is not None:
            store.close()

    def close(self) -> None:
        """Leaves the pool for good. Idempotent."""
        self.leave()
        self._weights.close()
        forget(self)

    # -- changes -----------------------------------------------------------------------------------------------------

    def weights_changed(self, why: str) -> None:
        """Weights are about to change: nothing is looked up or stored until SGLang has flushed its cache."""
        self._new_weights(why, self._weights.changed)

    def reload_began(self, why: str, folder: str | None) -> None:
        """The same, by reading files; ``folder``: where all of the weights are, None if that is not known."""
        self._new_weights(why, lambda: self._weights.reload_begins(folder))

    def _new_weights(self, why: str, note: Callable[[], None]) -> None:
        with self._lock:
            self._clean = note == self._weights.only_slept and not self._unflushed and self._weights.in_memory_are_known
            note()
            self._unflushed = True
            self._rename()
        self.counts["weight_changes"] += 1
        logger.info("kvplug: weights change (%s); nothing is shared until the cache is flushed", why)

    def reload_ended(self, whole: bool) -> None:
        """The call that has read weights from files is over; ``whole``: SGLang says that it has read them all."""
        change = self._weights.changes
        try:
            self._weights.reload_ended(whole)
        except NamespaceError as error:
            self._not_known(str(error))
        if not whole:
            self._not_known("SGLang has not read all of them")
        self._wait_or_tell(change)

    def _wait_or_tell(self, change: int) -> None:
        if not self._weights.pending:
            cannot_tell(change, self.ranks_agree)
        elif not self._closed.is_set():
            self._wait_known()

    def sleep_begins(self, look: Look, loses: bool) -> None:
        """SGLang takes the weights off the device; ``loses``: and throws them away."""
        if self.off_reason is None and not (self.facts.draft_path or self.facts.server.get("speculative_algorithm")):
            self._weights.before(look, loses)

    def wakes_up(self, why: str) -> None:
        """Weights are about to be on the device again."""
        self._new_weights(why, self._weights.only_slept)

    def sleep_ended(self, look: Look) -> None:
        """They are there, or others: no request has run since they were taken away."""
        change = self._weights.changes
        self._weights.after(look)
        self._wait_or_tell(change)

    def update_began(self) -> None:
        """Weights will be changed by several calls, and are no model's in between."""
        self.weights_changed("begin_weight_update")
        with self._lock:
            self._updating = True

    def update_ended(self, all_flushed: bool) -> None:
        """The last of them; ``all_flushed``: each of the others was followed by a flush if the user wanted one."""
        if not all_flushed:  # somebody else has written the weights meanwhile
            self.weights_changed("end_weight_update")
        with self._lock:
            self._updating = False
            self._forget()

    def flushed(self) -> None:
        """SGLang has emptied its own cache."""
        with self._lock:
            if not self._unflushed:
                return
            self._unflushed = False
            self._forget()
            known = self._weights.known
        if known:
            self._say_known()
            return
        logger.warning(
            "kvplug: the cache was flushed after a change of weights; this engine's pages are its own, and it shares "
            "with no other, until %s",
            self._way_back(),
        )

    def rotate(self, why: str) -> None:
        """This engine's pages so far are hidden from it; they stay there for others."""
        with self._lock:
            self._rotations += 1
            self.counts["rotations"] += 1
            self._rename()
        logger.warning(
            "kvplug: the engine's pages so far are hidden from it (%s); it shares with no other until it is "
            "started again",
            why,
        )

    def _word(self, kind: str, number: int) -> bytes:
        """32 bytes that all ranks of this engine, and nobody else, come to alike."""
        return blake3(self.secret + f"{kind} {number}".encode()).digest()

    def _way_back(self) -> str:
        """What has to happen before this engine shares with others again."""
        restart = "it is started again"
        if self._rotations or self.off_reason is not None or not self._weights.can_come_back:
            return restart
        if self._weights.pending:
            return "the files that its weights were read from are identified"
        return f"update_weights_from_disk has read its weights from a folder of known files, or {restart}"

    def _rename(self) -> None:
        """The namespace in force is another one from now on."""
        self._forget()
        if self._loaded is not None:
            named = self._weights.named(self._loaded, lambda change: self._word("weights", change))
            if self._rotations:
                named = named.rotated(self._word("rotation", self._rotations))
            self._namespace = named

    def _forget(self) -> None:
        self.epoch += 1
        self._masks = {}

    def _make_mask(self, pool: str, replicated: bool) -> Keys | None:
        with self._lock:
            closed = self._unflushed or self._updating or self.off_reason is not None
            if self._namespace is None or closed:
                return None
            shard = self.replicated_shard if replicated else self.shard
            masked = self._masks[(pool, replicated)] = mask(self._namespace.digest(), pool, shard.index)
            return masked

    def _identify(self) -> None:
        """Waits, on a thread of its own, until the weights that were loaded at the start are known."""
        try:
            found = self._identities or self._probed()
            if found is None or self.layout is None:
                return
            loaded = namespace.build(self.facts, self.layout, *found)
            with self._lock:
                self._identities, self._loaded = found, loaded
                self._rename()
                known = self._namespace
            assert known is not None
            self.say(f"kvplug: sharing as {known.describe()}", logging.INFO)
            self._identified.set()
        except NamespaceError as error:
            self.off(str(error))
        except Exception as error:
            logger.exception("kvplug: an error while the weights were being identified")
            self.off(f"{type(error).__name__}: {error}")

    def _probed(self) -> tuple[WeightsIdentity, WeightsIdentity | None] | None:
        """The model's weights and its draft model's; None if this engine has left the pool meanwhile."""
        probe, draft = namespace.probes(self.facts, self.config, self._started_ns)
        try:
            found = None
            while found is None and not self._closed.is_set():
                found = probe.result(POLL_S)
            other = None
            while draft is not None and other is None and not self._closed.is_set():
                other = draft.result(POLL_S)
        finally:
            probe.stop()
            if draft is not None:
                draft.stop()
        return None if found is None else (found, other)

    # -- weights that are known again --------------------------------------------------------------------------------

    def _wait_known(self) -> None:
        change = self._weights.changes

        def wait() -> None:
            self._wait_for(change)

        recognise = guarded("kvplug-recognise", wait, "this engine shares with no other")
        threading.Thread(target=recognise, name="kvplug-recognise", daemon=True).start()

    def _wait_for(self, change: int) -> None:
        """Waits, on a thread of its own, until what this change has brought is known on all ranks, or never will be."""
        pause, same, deadline = POLL_S, None, time.monotonic() + AGREE_S
        try:
            while same is None and not self._closed.wait(pause):
                same = self._weights.look(change, self.ranks_agree)
                pause = min(2 * pause, MOST_POLL_S)
                if same is None and time.monotonic() >= deadline:
                    raise NamespaceError(f"after {AGREE_S:.0f} s not all ranks have said what they have read")
        except NamespaceError as error:
            self._weights.give_up(change)
            cannot_tell(change, self.ranks_agree)
            self._not_known(str(error))
        except Exception as error:  # noqa: BLE001
            self.caught("recognising the weights", error)
        if same is None or self._closed.is_set() or self._weights.changes != change:
            return
        if not same:
            self._not_known("this engine's ranks have not all read the same")
            return
        with self._lock:
            if self._clean and self._weights.changes == change:
                self._unflushed = False
            self._rename()
            flushed = not self._unflushed
        self.counts["weights_known_again"] += 1
        if flushed:
            self._say_known()

    def _say_known(self) -> None:
        if self._namespace is not None and not self._rotations:
            logger.info("kvplug: the weights are known again; sharing as %s", self._namespace.describe())

    def _not_known(self, reason: str) -> None:
        logger.warning(
            "kvplug: the weights that were read again are not known: %s; this engine shares with no other until %s",
            reason,
            self._way_back(),
        )


def _as_started(facts: Facts, before: RankEngine) -> Facts:
    """An update from files has changed where they say that the weights were loaded from."""
    started = getattr(before, "facts", None)
    if started is None:
        return facts
    same = {name: getattr(started, name) for name in ("model_path", "revision", "load_format")}
    server = {**facts.server, **{name: started.server.get(name) for name in ("model_path", "load_format")}}
    return dataclasses.replace(facts, server=server, **same)


def _refuse(facts: Facts, config: Config) -> None:
    """UnsupportedEngineError for what kvplug can't work with."""
    if facts.is_multimodal and not compat.wide_image_names():
        raise UnsupportedEngineError(
            f"multimodal models need SGLang 0.5.23: in {compat.version()} an image is 30 bits of a page's name"
        )
    if facts.is_multimodal and not config.trust_mm_ids:
        _refuse_media(facts)
    if facts.server.get("dllm_algorithm"):
        raise UnsupportedEngineError("diffusion language models: their cache is not named by tokens alone")
    for name in ("enable_return_routed_experts", "enable_return_indexer_topk"):
        if facts.server.get(name):
            raise UnsupportedEngineError(
                f"--{name.replace('_', '-')}: answers list what was chosen for each prompt token, which SGLang keeps "
                "beside its device pages, and pages from the pool come without it"
            )
    if facts.server.get("elastic_ep_backend"):
        raise UnsupportedEngineError("--elastic-ep-backend: pages depend on which experts are alive")
    if facts.server.get("forward_hooks"):
        raise UnsupportedEngineError("--forward-hooks: what they do to the model's numbers is not known here")
    if facts.server.get("uno_lora_path"):
        raise UnsupportedEngineError("--uno-lora-path: that adapter's content is not known here")
    if facts.lora_enabled and facts.rust_tree:
        raise UnsupportedEngineError(
            "LoRA with SGLang's Rust prefix tree: it names adapters by their path; "
            "unset SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND, or set it to python"
        )


def _refuse_media(facts: Facts) -> None:
    """UnsupportedEngineError where nobody can tell what an image is, or what became of it."""
    if not facts.is_generation:
        raise UnsupportedEngineError(
            "a multimodal model that embeds or scores: SGLang takes no extra key with its requests, so images that "
            "users name can't be kept within this engine; trust_mm_ids vouches for their names"
        )
    if not facts.one_tokenizer:
        raise UnsupportedEngineError(
            "a multimodal model whose requests come in through several tokenizer processes, gRPC, encoders "
            "elsewhere, or a server that was started without kvplug: whether images are named by their content "
            "can't be seen; trust_mm_ids vouches for it"
        )
    if facts.server.get("enable_mm_global_cache"):
        raise UnsupportedEngineError(
            "--enable-mm-global-cache: images may be encoded by another engine, with other weights or settings; "
            "trust_mm_ids vouches for it"
        )
    if facts.server.get("trust_mm_content_hashes"):
        raise UnsupportedEngineError(
            "--trust-mm-content-hashes names images by the user's word; trust_mm_ids lets other engines believe it"
        )


# ---- the engines of this process -------------------------------------------------------------------------------------

_engines: list[RankEngine] = []


def start(mode: str, extra: Mapping[str, Any]) -> RankEngine:
    """A rank's engine, at work or off. It goes on where one that has left the pool was."""
    before = next((each for each in _engines if each.left), None)
    engine = RankEngine(mode, extra, before)
    if before is not None:
        forget(before)
    _engines.append(engine)
    return engine


def forget(engine: RankEngine) -> None:
    """Takes a closed engine off the list."""
    if engine in _engines:
        _engines.remove(engine)


def engines() -> list[RankEngine]:
    """All of this process: one, at work or off, or one that has left the pool and may be told to come back."""
    return list(_engines)
