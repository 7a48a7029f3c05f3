"""KvStore: the SDK, and what the engine adapters stand on.

    store = KvStore(pool="kvplug", size="30gb")
    store.put(keys, buffers)          # codes: 0 stored, 1 already there, <0 a reason
    store.get_into(keys, buffers)     # codes: 0 copied, -1 missing, …

Keys are ``bytes`` of length 32 or an (N, 32) uint8 array; buffers anything with the buffer protocol, numpy arrays or
CPU tensors. Wrong input raises a typed error (:mod:`kvplug.errors`) before anything was changed; a full pool, a
missing block or a busy lock never raise: they are codes, one per key.

*Raw addresses* (:meth:`KvStore.put_fragments`, :meth:`KvStore.get_fragments`, registered buffers) are taken at their
word. Refused is what no process has: addresses at or below zero or past 2**57, lengths below zero or above 2**40.
Whether memory is mapped there, is the caller's, stays for the call and may be written to, nobody can see: a wrong
address ends the process, or overwrites what lies there. The calls under other stores' names take addresses only inside
of registered buffers.

An exception from a signal handler may end any call: what the call had taken is given back. Slots that were read from
:meth:`KvStore.pin_batch` or :meth:`KvStore.reserve_batch` are the caller's, at the latest until :meth:`KvStore.close`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from kvplug import config as configuration
from kvplug.buffers import RegisteredRanges, addresses, equal_fragments, fragments, is_whole, one_each
from kvplug.config import Config
from kvplug.errors import BufferError, Code, ConfigError, KeyFormatError
from kvplug.handles import PinnedBlocks, Reservation
from kvplug.identity.keys import as_key_array
from kvplug.shm import copy as copies
from kvplug.shm.attach import PoolOptions
from kvplug.shm.batch import part_sizes
from kvplug.shm.failpoints import WRITE_COPY, fail
from kvplug.shm.feed import MAX_EVENTS, BlockFeed
from kvplug.shm.forecast import Forecast
from kvplug.shm.layout import MAX_PARTS, sibling_bits
from kvplug.shm.pool import Pool, SlotBatch, part_offsets
from kvplug.shm.rows import BlockParts
from kvplug.shm.stats import PoolStats, pool_stats

__all__ = ["BlockFeed", "BlockParts", "Forecast", "KvStore", "PoolStats", "SlotBatch"]

Keys = Sequence[bytes] | npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]
I8 = npt.NDArray[np.int8]

PUT_CHUNK_BYTES: Final = (
    32 << 20
)  # in writing at a time, so that a batch larger than a small pool still goes through it
PUT_CHUNK_KEYS: Final = 1024


_INT64: Final = np.dtype(np.int64)


def _words(keys: Keys) -> I64:
    """Keys as int64 (N, 4): what the kernels take."""
    words: I64 = as_key_array(keys).view(_INT64)
    return words if words.flags.aligned else words.copy()


def _ints(*arrays: Any) -> list[I64]:
    """int64, contiguous, aligned and writable, as compiled calls want them: copied only if they are not.

    Raises BufferError unless they are integers, one-dimensional, and all of one length.
    """
    out = []
    for values in arrays:
        try:
            array = np.asarray(values)
        except (TypeError, ValueError, OverflowError) as e:
            raise BufferError(f"slots, generations and checksums are arrays of integers: {e}") from e
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise BufferError(
                f"slots, generations and checksums are arrays of integers of one dimension, not {array.dtype} of shape "
                f"{array.shape}"
            )
        if array.dtype == np.uint64:  # its bits are what counts
            array = array.view(np.int64)
        out.append(np.require(array, np.int64, ["C", "A", "W"]))
    if len({len(array) for array in out}) > 1:
        raise BufferError(f"arrays of one length were expected, not of {' and '.join(str(len(one)) for one in out)}")
    return out


def _flag(value: Any, name: str) -> bool:
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise ConfigError(f"{name} is True or False, not {value!r:.40}")


def _part(part: Any) -> int:
    """The number of a part; -1, which no block has, for one that none can have. Raises ConfigError."""
    if not is_whole(part):
        raise ConfigError(f"a part has a whole number, not {part!r:.40}")
    return int(part) if 0 <= part < MAX_PARTS else -1


def _family(siblings: Any) -> tuple[int, int]:
    if isinstance(siblings, (tuple, list)) and len(siblings) == 2 and all(map(is_whole, siblings)):
        count, index = int(siblings[0]), int(siblings[1])
        sibling_bits(count, index)
        return count, index
    raise ConfigError(f"siblings are given as (count, index), not {siblings!r:.40}")


def options_of(config: Config) -> PoolOptions:
    """The part of the configuration that the pool needs."""
    return PoolOptions(
        size=config.size,
        min_block=config.min_block,
        slab=config.slab,
        policy=config.policy,
        until_last_exit=config.persist == "until-last-exit",
        quarantine_grace_s=config.quarantine_grace_s,
        lock_timeout_s=config.lock_timeout_s,
        pin_budget_share=config.pin_budget_share,
        reserve_budget_share=config.reserve_budget_share,
        verify=config.verify == "always",
        prefault=config.prefault,
    )


class KvStore:
    """One attached store. Thread-safe; a copy that a fork made attaches anew on its first use."""

    def __init__(
        self,
        pool: str | None = None,
        size: int | str | None = None,
        *,
        config: Config | None = None,
        create: bool = True,
        _join: tuple[bytes, int] | None = None,
    ) -> None:
        """Attach to the pool, or create it.

        Args:
            pool: its name (default: the configuration's).
            size: bytes or a size like ``"30gb"``; counts only where this call creates the pool.
            config: settings; default: environment over file over defaults (:func:`kvplug.config.load`).
            create: False: raise PoolNotFoundError instead of creating.
        """
        settings = config or configuration.load()
        changes = {k: v for k, v in (("pool", pool), ("size", size)) if v is not None}
        self.config: Config = settings.with_changes(**changes) if changes else settings
        pool_uuid, session = _join or (None, 0)
        self._pool = Pool(
            self.config.pool, options_of(self.config), create=create, session=session, pool_uuid=pool_uuid
        )
        self._registered = RegisteredRanges()

    @classmethod
    def from_config(cls) -> KvStore:
        """A store as the environment and the configuration file say."""
        return cls()

    @classmethod
    def join(cls, token: str, *, config: Config | None = None) -> KvStore:
        """Join the session of the store that has this :attr:`token`: an engine's scheduler and workers are one."""
        try:
            name, hexed, session = token.rsplit(":", 2)
            joined = (bytes.fromhex(hexed), int(session))
        except (ValueError, AttributeError, TypeError) as e:
            raise ConfigError(f"{token!r:.100} is not the token of a store (pool:uuid:session)") from e
        return cls(name, config=config, create=False, _join=joined)

    # ---- who and where -----------------------------------------------------------------------------------------------

    @property
    def pool_name(self) -> str:
        """Name of the pool."""
        return self._pool.name

    @property
    def pool_uuid(self) -> bytes:
        """The pool's identity, 16 bytes: another one after it was removed and created again."""
        return self._pool.segment.uuid

    @property
    def created_pool(self) -> bool:
        """Whether it was this store that created the pool."""
        return self._pool.segment.is_new

    @property
    def is_current(self) -> bool:
        """Whether the pool's name still leads to this pool: False once it was removed (`kvplug rm`) or replaced."""
        return self._pool.is_current

    @property
    def session_id(self) -> int:
        """This store's session: never used for another one of this pool."""
        return self._pool.session

    @property
    def token(self) -> str:
        """What another process of this engine hands to :meth:`join`."""
        return f"{self._pool.name}:{self.pool_uuid.hex()}:{self._pool.session}"

    @property
    def base_address(self) -> int:
        """Address of the mapping in this process; slot offsets count from it."""
        return self._pool.base_address

    @property
    def mapping(self) -> npt.NDArray[np.uint8]:
        """The whole segment as uint8."""
        return self._pool.segment.memory

    @property
    def data_offset(self) -> int:
        """Where the first slab begins, in bytes from the mapping's start; slabs lie one after another to its end."""
        return self._pool.geometry.data_offset

    @property
    def slab_bytes(self) -> int:
        """Bytes of a slab. No slot lies in two, so no block is larger."""
        return self._pool.geometry.slab_bytes

    @property
    def data_bytes(self) -> int:
        """Bytes that the pool has for blocks: all slabs together."""
        return self._pool.geometry.data_bytes

    def open_segment(self) -> int:
        """A descriptor of the pool's file, on a description of its own: the caller closes it. Raises PoolError."""
        return self._pool.segment.open_again()

    # ---- copies in and out -------------------------------------------------------------------------------------------

    def put(self, keys: Keys, buffers: Any) -> I8:
        """Store each buffer under its key: 0 stored, 1 already there, negative: not stored, and why (:class:`Code`).

        A batch is taken to be in the order of a prefix, head first. Raises KeyFormatError, BufferError,
        BlockTooLargeError.
        """
        words = _words(keys)
        addrs, nbytes, _keep = addresses(buffers, len(words), writable=False)
        return self._put(
            words, nbytes, lambda part, dst, size, sums: copies.copy_hash_batch(dst, addrs[part], size, sums)
        )

    def _put(self, words: I64, nbytes: I64, copy: Any, siblings: tuple[int, int] = (1, 0)) -> I8:
        n = len(words)
        codes = np.full(n, Code.FULL, np.int8)
        if n == 0:
            return codes
        pool = self._pool
        for size in np.unique(nbytes):
            pool.stride(int(size))  # refuse before anything is stored
        # Half of what may be in writing: a chunk finds room beside another thread's.
        budget = pool.writing_budget_bytes // 2
        first = pool.take_ticks(n)
        starts = np.flatnonzero(np.append(True, nbytes[1:] != nbytes[:-1]))
        for begin, end in zip(starts.tolist(), [*starts[1:].tolist(), n], strict=True):
            size = int(nbytes[begin])
            step = max(1, min(PUT_CHUNK_KEYS, PUT_CHUNK_BYTES // size, budget // pool.stride(size)))
            for at in range(begin, end, step):
                part = np.arange(at, min(at + step, end))
                codes[part] = self._put_chunk(words[part], part, size, copy, siblings, (first, n, at))
        again = codes == Code.IN_PROGRESS
        if again.any():  # a duplicate within the batch waited for its twin
            codes[again] = np.where(pool.exists(words[again]), np.int8(Code.EXISTS), np.int8(Code.IN_PROGRESS))
        return codes

    def _put_chunk(
        self, words: I64, part: I64, size: int, copy: Any, siblings: tuple[int, int], dated: tuple[int, int, int]
    ) -> I8:
        pool = self._pool
        b = pool.reserve(words, (size,), siblings=siblings, dated=dated)
        ok = np.flatnonzero(b.codes == Code.OK)
        if not len(ok):
            pool.finish(b.holding)
            return b.codes
        try:
            slots, gens, offsets = (array[ok] for array in b.arrays())
            sums = np.empty(len(ok), np.int64)
            copy(part[ok], pool.base_address + offsets, b.nbytes[ok], sums)
            fail(pool.L, WRITE_COPY)
            b.codes[ok] = pool.complete(slots, gens, sums, part=0)
            pool.finish(b.holding)
        except BaseException:
            pool.give_back(b)
            raise
        pool.count_written(len(ok) * size)
        return b.codes

    def get_into(self, keys: Keys, buffers: Any) -> I8:
        """Copy each key's block into its buffer: 0 copied, -1 missing, -5 corrupt (dropped), -6 other size.

        A buffer whose code is not 0 may have been written to. Raises KeyFormatError, BufferError.
        """
        words = _words(keys)
        addrs, nbytes, _keep = addresses(buffers, len(words), writable=True)
        return self._pool.get_into(words, one_each(len(words)), addrs, nbytes)[0]

    def exists(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Whether each key has a sealed block now."""
        return self._pool.exists(_words(keys))

    def match_prefix(self, keys: Keys) -> int:
        """Number of leading keys that have a sealed block now."""
        return self._pool.match_prefix(_words(keys))

    def touch(self, keys: Keys) -> None:
        """Date the blocks of a prefix, head first, as used just now."""
        self._pool.touch(_words(keys))

    def remove(self, keys: Keys) -> I8:
        """Free these blocks: 0 removed, -1 missing, -10 pinned by somebody, -2 being written.

        Siblings (:meth:`reserve_batch`) go with them; one that is pinned stays, and changes no code.
        """
        return self._pool.remove(_words(keys))

    # ---- in place ----------------------------------------------------------------------------------------------------

    def pin(self, keys: Keys) -> PinnedBlocks:
        """Keep these blocks in place and give read-only views: ``with store.pin(keys) as blocks: blocks[i]``."""
        return PinnedBlocks(self._pool, self._pool.pin(_words(keys)))

    def reserve(self, keys: Keys, nbytes: int) -> Reservation:
        """Slots of ``nbytes`` to be written in place: ``r.views[i][:] = …; r.seal()`` or ``r.abort()``.

        As a context manager it aborts what was not sealed. Raises KeyFormatError, BlockTooLargeError, and ConfigError
        unless ``nbytes`` is a whole number of at least 1.
        """
        return Reservation(self._pool, self._pool.reserve(_words(keys), [nbytes]))

    # ---- what adapters use -------------------------------------------------------------------------------------------

    def pin_batch(self, keys: Keys, *, prefix: bool = False, touch: bool = True) -> SlotBatch:
        """Pin and locate blocks; ``prefix``: only the leading hits. Release by :meth:`unpin`.

        Without ``touch`` it is no use of them: their turn to be evicted stays what it was.
        """
        return self._pool.pin(_words(keys), prefix=_flag(prefix, "prefix"), touch=_flag(touch, "touch"))

    def unpin(self, slots: I64, gens: I64 | None = None) -> None:
        """Release one pin of each slot (negative entries are passed over). Never blocks: queued if the lock is busy."""
        self._pool.unpin(_ints(slots)[0])

    def reserve_batch(
        self, keys: Keys, part_nbytes: Sequence[int] | I64, *, siblings: tuple[int, int] = (1, 0)
    ) -> SlotBatch:
        """A slot with ``len(part_nbytes)`` parts for each key that is not there yet.

        ``siblings``: (count, index) of blocks that are worth nothing without each other, as the ranks of an engine
        store them: when one is evicted, removed or dropped, so are the others, unless they are pinned or being
        written. Sibling *j* of *i* has the same key with i ^ j XORed into its last two bytes, u16 little-endian, as
        :func:`kvplug.identity.keys.fold` numbers shards. Raises ConfigError unless 0 <= index < count <= 128.
        """
        return self._pool.reserve(_words(keys), part_nbytes, siblings=_family(siblings))

    @staticmethod
    def part_offsets(part_nbytes: Sequence[int] | I64) -> I64:
        """Offset of each part inside a slot (64-byte aligned), int64[P]."""
        return part_offsets(part_sizes(part_nbytes))[0]

    def check_fits(self, part_nbytes: Sequence[int] | I64) -> None:
        """Refuse blocks with these parts now if no slot of this pool can hold one, as a reservation would.

        Raises BlockTooLargeError, ConfigError.
        """
        self._pool.measure(part_nbytes)

    def parts_of(self, batch: SlotBatch) -> BlockParts:
        """The parts of the blocks of ``batch``, those whose code is OK, in order; of a reservation without checksums.

        To be asked while their pins or reservations stand.
        """
        return self._pool.parts_of(batch.arrays()[0][batch.codes == Code.OK])

    def complete(self, slots: I64, gens: I64, part: int, checksums: npt.NDArray[Any]) -> I8:
        """Part ``part`` is written: record its XXH3 (uint64[N] or its bits); the last part seals.

        Codes: OK, PENDING, STALE, TIMEOUT (queued).
        """
        return self._pool.complete(*_ints(slots, gens, checksums), part=_part(part))

    def complete_checked(self, slots: I64, gens: I64, offsets: I64, nbytes: I64, checksums: I64) -> I8:
        """All parts of these slots are written: seal those whose bytes have these checksums.

        offsets (from the mapping's start), nbytes, checksums (XXH3, its bits): int64[N, P]. Codes: OK, CORRUPT, STALE,
        TIMEOUT (queued). Raises BufferError: arrays that do not fit together.
        """
        rows, lives = _ints(slots, gens)
        at, lengths, expected = (np.array(one, np.int64).ravel() for one in (offsets, nbytes, checksums))
        if len({len(slots) * offsets.shape[-1], len(at), len(lengths), len(expected)}) > 1:
            raise BufferError(
                f"{len(slots)} slots and parts of shapes {offsets.shape}, {nbytes.shape}, {checksums.shape}"
            )
        return self._pool.complete_checked(rows, lives, at, lengths, expected)

    def abort_batch(self, slots: I64, gens: I64, writers_done: bool) -> I8:
        """Give up reservations; without ``writers_done`` the slots stay quarantined until :meth:`acknowledge`."""
        return self._pool.abort(*_ints(slots, gens), writers_done=_flag(writers_done, "writers_done"))

    def acknowledge(self, slots: I64, gens: I64) -> I8:
        """Every possible writer of these given-up slots is done."""
        return self._pool.acknowledge(*_ints(slots, gens))

    def still_writing(self, slots: I64, gens: I64) -> npt.NDArray[np.bool_]:
        """Whether these reservations still stand. No lock."""
        return self._pool.still_writing(*_ints(slots, gens))

    def verify_parts(self, slots: I64, gens: I64, part: int) -> I8:
        """Compare a part of pinned blocks with its checksum: OK, CORRUPT, STALE."""
        rows, lives = _ints(slots, gens)
        return self._pool.verify_part(rows, lives, _part(part))

    # ---- scatter and gather ------------------------------------------------------------------------------------------

    def put_fragments(self, keys: Keys, addrs: Any, nbytes: Any, *, siblings: tuple[int, int] = (1, 0)) -> I8:
        """Store for each key its F fragments, one after another. Codes as of :meth:`put`.

        addrs: integers (N, F), addresses of readable memory of this process: nobody checks them, the caller answers for
        them. nbytes: (N, F), or (F,) if they are the same for every key; a fragment may be empty, a block not.
        ``siblings``: see :meth:`reserve_batch`. Raises KeyFormatError, BufferError, BlockTooLargeError, ConfigError.
        """
        words = _words(keys)
        return self._put_pieces(words, equal_fragments(addrs, nbytes, len(words)), _family(siblings))

    def get_fragments(self, keys: Keys, addrs: Any, nbytes: Any) -> I8:
        """Copy each key's block into its F fragments, the way back of :meth:`put_fragments`, without the lock.

        Codes as of :meth:`get_into`; fragments whose code is not 0 may have been written to. Raises KeyFormatError,
        BufferError.
        """
        words = _words(keys)
        offsets, at, sizes = equal_fragments(addrs, nbytes, len(words))
        _sums(offsets, sizes)
        return self._pool.get_into(words, offsets, at, sizes)[0]

    def _put_pieces(self, words: I64, pieces: tuple[I64, I64, I64], siblings: tuple[int, int]) -> I8:
        offsets, addrs, sizes = pieces

        def copy(part: I64, dst: I64, _size: I64, sums: I64) -> None:
            picked, at = _pick(offsets, part)
            copies.gather_multi(at, addrs[picked], sizes[picked], dst, sums)

        return self._put(words, _sums(offsets, sizes), copy, siblings)

    # ---- the same, under the names that connectors know --------------------------------------------------------------
    # What these answer beside Mooncake's and redhare's calls of the same names: docs/dropin.md.

    def register_buffer(self, addr: int, nbytes: int) -> int:
        """Vouch for memory whose raw addresses the ``multi_buffers`` calls may use. 0; raises BufferError."""
        self._registered.add(addr, nbytes)
        return 0

    def unregister_buffer(self, addr: int) -> int:
        """Withdraw a registered buffer. 0; raises BufferError."""
        self._registered.remove(addr)
        return 0

    def batch_put_from_multi_buffers(
        self,
        keys: Sequence[str | bytes],
        addrs: Sequence[Sequence[int]],
        sizes: Sequence[Sequence[int]],
        config: object = None,
    ) -> list[int]:
        """Store for each key its fragments, one after another. 0 for a key that is there now, else a negative Code.

        Code.SIZE: its fragments have no byte, or more than a slab of this pool; the other keys are stored. Of equal
        keys the first counts. ``config`` is how other stores are told where copies go: accepted, without effect, since
        a pool keeps one. Raises BufferError, and nothing is stored, for lists that differ in length and for a
        fragment outside of every registered buffer; KeyFormatError.
        """
        words = _words(_named(keys))
        pieces = fragments(addrs, sizes, len(words))
        self._registered.check(*pieces[1:])
        nbytes = _totals(pieces[0], pieces[2])
        codes = np.full(len(words), Code.SIZE, np.int8)
        fits = np.flatnonzero((nbytes > 0) & (nbytes <= self.slab_bytes))
        if len(fits) < len(words):
            picked, offsets = _pick(pieces[0], fits)
            pieces = offsets, pieces[1][picked], pieces[2][picked]
        codes[fits] = self._put_pieces(words[fits], pieces, (1, 0))
        done: list[int] = np.where(codes == Code.EXISTS, 0, codes).tolist()
        return done

    def batch_get_into_multi_buffers(
        self,
        keys: Sequence[str | bytes],
        addrs: Sequence[Sequence[int]],
        sizes: Sequence[Sequence[int]],
        prefer_alloc_in_same_node: bool = False,
    ) -> list[int]:
        """Copy each key's block into its fragments, one after another. The block's bytes, or a negative Code.

        Fragments may have more room than the block: what is behind it stays as it was. Code.SIZE: they have less.
        ``prefer_alloc_in_same_node`` is accepted, without effect: a pool is in this host's memory. Raises as
        :meth:`batch_put_from_multi_buffers`, before anything was copied.
        """
        words = _words(_named(keys))
        offsets, at, nbytes = fragments(addrs, sizes, len(words))
        self._registered.check(at, nbytes)
        codes, copied = self._pool.get_into(words, offsets, at, nbytes, exact=False)
        out: list[int] = np.where(codes == Code.OK, copied, codes).tolist()
        return out

    def batch_is_exist(self, keys: Sequence[str | bytes]) -> list[int]:
        """1 there, 0 not, -1: can't be said, while the index is made anew after a death, or in a removed pool."""
        there: list[int] = self._pool.look_up(_words(_named(keys))).tolist()
        return there

    # ---- what changes ------------------------------------------------------------------------------------------------

    def feed(self, *, max_events: int = MAX_EVENTS) -> BlockFeed:
        """What is sealed and removed in the pool from now on, by anybody, and what it has. For one thread."""
        return BlockFeed(self._pool, max_events=max_events)

    def forecast(self) -> Forecast:
        """Which blocks will be evicted next, and which of those are worth keeping. For one thread."""
        return self._pool.forecast()

    # ---- upkeep ------------------------------------------------------------------------------------------------------

    def stats(self) -> PoolStats:
        """The pool's figures now: a frozen snapshot, taken without the lock."""
        return pool_stats(self._pool)

    def check_integrity(self, *, deep: bool = True) -> None:
        """Raise IntegrityError unless every invariant of the pool holds; ``deep``: and every block has its checksum."""
        self._pool.check_integrity(deep=deep)

    def close(self) -> None:
        """Release all pins and leave the pool, which stays for others. Idempotent.

        A block that somebody still has a view of keeps its pin, and this client its row, until the last view is gone.
        """
        self._pool.close()

    def __enter__(self) -> KvStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _named(keys: Sequence[str | bytes]) -> list[bytes]:
    """32-byte keys of names: other stores' keys are strings; a name's key is its BLAKE3 under a tag of its own."""
    try:
        if isinstance(keys, (str, bytes, bytearray, memoryview)):
            raise TypeError("it is one name")
        iter(keys)
    except TypeError as e:
        raise KeyFormatError(f"keys must be a list of names, not {type(keys).__name__} ({e}); give [key]") from e
    out = []
    for i, key in enumerate(keys):
        if isinstance(key, bytes) and len(key) == 32:
            out.append(key)
        elif isinstance(key, str):
            try:
                name = str.encode(key)
            except UnicodeEncodeError as e:
                raise KeyFormatError(f"key {i}, {key!r:.40}, can't be written as UTF-8: {e.reason}") from e
            out.append(blake3(b"kvplug.named-key\0" + name).digest())
        else:
            raise KeyFormatError(f"key {i} is {type(key).__name__} {key!r:.40}; it must be a str or 32 bytes")
    return out


def _totals(offsets: I64, sizes: I64) -> I64:
    """Bytes of each key's fragments together."""
    total = np.concatenate(([0], np.cumsum(sizes)))
    nbytes: I64 = total[offsets[1:]] - total[offsets[:-1]]
    return nbytes


def _sums(offsets: I64, sizes: I64) -> I64:
    """The same. Raises BufferError for a key without a byte."""
    nbytes = _totals(offsets, sizes)
    if len(nbytes) and int(nbytes.min()) <= 0:
        raise BufferError(f"the fragments of key {int(nbytes.argmin())} have {int(nbytes.min())} bytes together")
    return nbytes


def _pick(offsets: I64, part: I64) -> tuple[I64, I64]:
    """(indices of the fragments of ``part``, their own offsets)."""
    counts = offsets[part + 1] - offsets[part]
    at = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
    picked = np.arange(int(at[-1]), dtype=np.int64) + np.repeat(offsets[part] - at[:-1], counts)
    return picked, at
