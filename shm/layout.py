"""The segment's layout: where every table lies and what each of its words means.

Everything that processes share is a table of little-endian signed 64-bit words, viewed by one int64 array ``T`` that
starts at the segment's first byte; kernels get ``T`` and nothing else. The page order is

    page 0      frozen preamble (never changes between formats) and, from word ``H_BASE``, the header
    tables      clients, slabs, classes, rows, parts, index, events
    data        ``n_slabs`` slabs of ``slab_bytes``

Row *r* describes one slot. A slab has ``rows_per_slab = slab_bytes / min_block`` rows; one that is cut into fewer slots
(its blocks are larger than ``min_block``) leaves ``row_step - 1`` rows unused behind each slot's row, and the part
entries of those rows hold the slot's further parts: room for parts grows with the block, and no row is larger for it.
"""

from __future__ import annotations

import hashlib
from typing import Final, NamedTuple

from kvplug.errors import BlockTooLargeError, ConfigError, PoolFormatError

PAGE_BYTES: Final = 4096
MAGIC: Final = b"KVPLUG\x00\x01"
FORMAT: Final = 3

# ---- frozen preamble, words of page 0: any version of kvplug can read these of any format ----------------------------
P_MAGIC: Final = 0
P_FORMAT: Final = 1
P_LIVE_OFFSET: Final = 2  # file offset of the liveness region: byte i is locked (OFD) while client i lives
P_LIVE_COUNT: Final = 3
P_CREATED_UNIX_NS: Final = 4
P_UUID0: Final = 5
P_UUID1: Final = 6
P_LAYOUT0: Final = 7  # first 8 bytes of the layout hash
PREAMBLE_WORDS: Final = 16

# ---- header: fixed at creation ---------------------------------------------------------------------------------------
H_SEGMENT_BYTES: Final = 16
H_DATA_OFFSET: Final = 17
H_SLAB_BYTES: Final = 18
H_MIN_BLOCK: Final = 19
H_N_SLABS: Final = 20
H_ROWS_PER_SLAB: Final = 21
H_N_ROWS: Final = 22
H_INDEX_CAP: Final = 23
H_MAX_CLIENTS: Final = 24
H_EVENT_CAP: Final = 25
H_POLICY: Final = 26
H_PERSIST: Final = 27  # 0 always, 1 until the last client exits
H_GRACE_NS: Final = 28
H_O_CLIENT: Final = 29
H_O_SLAB: Final = 30
H_O_CLASS: Final = 31
H_O_ROW: Final = 32
H_O_PART: Final = 33
H_O_INDEX: Final = 34
H_O_EVENT: Final = 35

# ---- header: changes, under the pool lock unless said otherwise ------------------------------------------------------
H_DIRTY: Final = 64  # index, free lists or slab lists may be half-changed: rebuild before use
H_RETIRED: Final = 65  # the name no longer leads here
H_HOLDER: Final = 66  # pid inside a section, for messages and tests only
H_TICK: Final = 67  # recency clock; also advanced without the lock (a lost step only makes ties)
H_SESSION_NEXT: Final = 68
H_WATERMARK: Final = 69  # slabs whose memory is reserved
H_INDEX_SEQ: Final = 70  # odd while entries move: a lock-free miss is looked up again
H_EPOCH: Final = 71  # number of rebuilds: event readers start over
H_EVENT_SEQ: Final = 72
H_FREE_SLABS: Final = 73  # head of the list of reserved, unowned slabs (slab + 1)
H_DRAINING: Final = 74  # slab + 1 that is being drained, 0 for none
# counters since creation
H_C_SEALED: Final = 80
H_C_EVICTED: Final = 81
H_C_REMOVED: Final = 82
H_C_ABORTED: Final = 83
H_C_QUARANTINED: Final = 84
H_C_RELEASED: Final = 85
H_C_REBUILDS: Final = 86
H_C_REAPED_CLIENTS: Final = 87
H_C_REAPED_PINS: Final = 88
H_C_REAPED_WRITES: Final = 89
H_C_SLAB_MOVES: Final = 90
H_C_FULL: Final = 91
HEADER_WORDS: Final = 128

# ---- client rows -----------------------------------------------------------------------------------------------------
CLIENT_WORDS: Final = 16
C_STATE: Final = 0
C_PID: Final = 1
C_SESSION: Final = 2
C_STARTED_NS: Final = 3  # unix time
C_PINS: Final = 4  # slots whose pin bit this client has set
C_RESERVED: Final = 5  # WRITING and QUARANTINED slots that this client's session owes, counted at this client
C_HITS: Final = 6  # written by its client alone, without the lock
C_MISSES: Final = 7
C_READ_BYTES: Final = 8
C_WRITTEN_BYTES: Final = 9
C_CORRUPT: Final = 10
C_THREAD_ERRORS: Final = 11  # of the whole process, as kvplug.threads counts them
C_DEAD_THREADS: Final = 12
CLIENT_FREE: Final = 0
CLIENT_LIVE: Final = 1
CLIENT_DEAD: Final = 2  # its process is gone, its session is not: pins and reservations stay
MAX_CLIENTS: Final = 128  # two words of pin bits; eight TP=8 engines need 72
PIN_WORDS: Final = 2

# ---- slabs -----------------------------------------------------------------------------------------------------------
SLAB_WORDS: Final = 12
S_STATE: Final = 0
S_STRIDE: Final = 1  # bytes from slot to slot
S_NSLOTS: Final = 2
S_ROW_STEP: Final = 3
S_CLASS: Final = 4
S_FREE_HEAD: Final = 5  # row + 1
S_FREE_COUNT: Final = 6
S_PREV: Final = 7  # slab + 1, in the class's list of slabs with room
S_NEXT: Final = 8
S_LISTED: Final = 9
SLAB_UNRESERVED: Final = 0
SLAB_FREE: Final = 1
SLAB_OWNED: Final = 2
SLAB_DRAINING: Final = 3

# ---- size classes: one per stride in use -----------------------------------------------------------------------------
CLASS_WORDS: Final = 4
K_STRIDE: Final = 0
K_HEAD: Final = 1  # slab + 1
K_SLABS: Final = 2
MAX_CLASSES: Final = 64

# ---- slot rows -------------------------------------------------------------------------------------------------------
ROW_WORDS: Final = 12
R_WORD: Final = 0  # state in the low 3 bits, generation above: the row's only commit
R_KEY: Final = 1  # four words
R_SIZE: Final = 5  # from below: payload bytes (40 bits), parts (6), which sibling it is (7), siblings - 1 (7)
R_DONE: Final = 6  # bit per finished part
R_SESSION: Final = 7  # who writes
R_TICK: Final = 8
R_PIN: Final = 9  # two words of client bits
R_NEXT: Final = 11  # FREE: row + 1 of the next free slot; QUARANTINED: free after this CLOCK_MONOTONIC ns;
#                     WRITING: the reserving client's row
FREE: Final = 0
WRITING: Final = 1
SEALED: Final = 2
QUARANTINED: Final = 3
STATE_MASK: Final = 7
GEN_SHIFT: Final = 3
SIZE_MASK: Final = (1 << 40) - 1
SIZE_BITS: Final = 40
PARTS_MASK: Final = 63
MAX_PARTS: Final = 62
SIBLING_SHIFT: Final = 46
SIBLING_BITS: Final = 7
SIBLING_MASK: Final = (1 << SIBLING_BITS) - 1
SIBLING_KEY_SHIFT: Final = 48  # where a sibling's number stands in a key's last word: its last two bytes
MAX_SIBLINGS: Final = 1 << SIBLING_BITS
PART_ALIGN_BYTES: Final = 64

# ---- parts, index, events --------------------------------------------------------------------------------------------
PART_WORDS: Final = 2
PART_NBYTES: Final = 0
PART_XXH3: Final = 1  # bits of the checksum
INDEX_WORDS: Final = 1  # row + 1 in the low 32 bits, tag above; 0 = empty
EVENT_WORDS: Final = 8  # sequence number (written last), kind, row, generation, key
E_SEALED: Final = 1
E_EVICTED: Final = 2
E_CLEARED: Final = 3
MAX_ROWS: Final = (1 << 31) - 2

DEFAULT_MIN_BLOCK_BYTES: Final = 16 * 1024
SLAB_MIN_BYTES: Final = 1 << 20
SLAB_MAX_BYTES: Final = 256 << 20
SLABS_WANTED: Final = 32


NAMED_LATER: Final = frozenset({"PART_NBYTES", "PART_XXH3"})
"""Names that segments of this format were made without: in no hash until the next format."""

assert (FORMAT, PART_NBYTES, PART_XXH3) == (3, 0, 1), "NAMED_LATER is of format 3"
assert R_KEY + 4 == R_SIZE
assert R_PIN + PIN_WORDS == R_NEXT == ROW_WORDS - 1
assert max(FREE, WRITING, SEALED, QUARANTINED) <= STATE_MASK == (1 << GEN_SHIFT) - 1
assert SIZE_MASK == (1 << SIZE_BITS) - 1
assert SIZE_BITS + PARTS_MASK.bit_length() == SIBLING_SHIFT
assert min(PARTS_MASK, 62) >= MAX_PARTS, "a part's bit in R_DONE is never the sign"
assert SIBLING_SHIFT + 2 * SIBLING_BITS <= 63, "nor is a sibling's in R_SIZE"
assert MAX_SIBLINGS == SIBLING_MASK + 1 <= 1 << 16, "a sibling's number has two bytes of the key"
assert max(PART_NBYTES, PART_XXH3) < PART_WORDS
assert max(H_O_EVENT, H_C_FULL) < HEADER_WORDS <= PAGE_BYTES // 8


def layout_hash() -> int:
    """64 bits over the name and value of every constant above: two builds that disagree on any refuse each other."""
    names = sorted(
        k
        for k, v in globals().items()
        if k.isupper() and isinstance(v, int) and not k.startswith("DEFAULT") and k not in NAMED_LATER
    )
    text = ";".join(f"{n}={globals()[n]}" for n in names)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def sibling_bits(count: int, index: int) -> int:
    """What a row's size word says of a block that is number ``index`` of ``count`` siblings; :class:`ConfigError`."""
    if not (1 <= count <= MAX_SIBLINGS and 0 <= index < count):
        raise ConfigError(f"block {index} of {count} siblings: there are 1 to {MAX_SIBLINGS}, numbered from 0")
    return ((count - 1) << SIBLING_BITS | index) << SIBLING_SHIFT


def _pow2_at_least(n: int) -> int:
    return 1 << max(0, (n - 1).bit_length())


def _round_up(n: int, to: int) -> int:
    return -(-n // to) * to


class Geometry(NamedTuple):
    """Sizes and word offsets of one segment; all that follows from pool size, slab size and smallest block."""

    segment_bytes: int
    data_offset: int
    slab_bytes: int
    min_block: int
    n_slabs: int
    rows_per_slab: int
    n_rows: int
    index_cap: int
    event_cap: int
    o_client: int
    o_slab: int
    o_class: int
    o_row: int
    o_part: int
    o_index: int
    o_event: int

    @property
    def data_bytes(self) -> int:
        return self.n_slabs * self.slab_bytes

    @classmethod
    def plan(
        cls, pool_bytes: int, *, min_block: int = DEFAULT_MIN_BLOCK_BYTES, slab_bytes: int | None = None
    ) -> Geometry:
        """Lay out a pool whose segment is at most ``pool_bytes`` bytes, tables included.

        Raises :class:`ConfigError` when a size is out of range.
        """
        if min_block < 4096 or min_block & (min_block - 1):
            raise ConfigError(f"min_block is {min_block} bytes; it must be a power of two of at least 4096")
        if slab_bytes is None:
            slab_bytes = min(SLAB_MAX_BYTES, max(SLAB_MIN_BYTES, _pow2_at_least(pool_bytes // SLABS_WANTED + 1) // 2))
        if slab_bytes < min_block or slab_bytes % PAGE_BYTES or slab_bytes % min_block:
            raise ConfigError(f"slab is {slab_bytes} bytes; it must be a multiple of min_block ({min_block})")
        n_slabs = pool_bytes // slab_bytes
        while n_slabs > 0:
            g = cls._lay_out(n_slabs, slab_bytes, min_block)
            if g.segment_bytes <= pool_bytes:
                return g
            n_slabs -= max(1, (g.segment_bytes - pool_bytes) // slab_bytes)
        raise ConfigError(
            f"a pool of {pool_bytes} bytes has no room for one slab of {slab_bytes} bytes and its tables; set a "
            f"smaller slab (KVPLUG_SLAB) or a larger KVPLUG_SIZE: the smallest size with this slab is "
            f"{cls._lay_out(1, slab_bytes, min_block).segment_bytes} bytes"
        )

    @classmethod
    def _lay_out(cls, n_slabs: int, slab_bytes: int, min_block: int) -> Geometry:
        rows_per_slab = slab_bytes // min_block
        n_rows = n_slabs * rows_per_slab
        if n_rows > MAX_ROWS:
            raise ConfigError(
                f"{n_rows} slots are more than the index can name; set a larger min_block (now {min_block})"
            )
        index_cap = _pow2_at_least(n_rows + n_rows // 2)
        event_cap = min(1 << 16, max(1 << 8, _pow2_at_least(n_rows) // 8))
        word = HEADER_WORDS
        offsets = []
        for count, width in (
            (MAX_CLIENTS, CLIENT_WORDS),
            (n_slabs, SLAB_WORDS),
            (MAX_CLASSES, CLASS_WORDS),
            (n_rows, ROW_WORDS),
            (n_rows, PART_WORDS),
            (index_cap, INDEX_WORDS),
            (event_cap, EVENT_WORDS),
        ):
            word = _round_up(word, 8)
            offsets.append(word)
            word += count * width
        data_offset = _round_up(word * 8, PAGE_BYTES)
        end = data_offset + n_slabs * slab_bytes
        return cls(
            end, data_offset, slab_bytes, min_block, n_slabs, rows_per_slab, n_rows, index_cap, event_cap, *offsets
        )

    @classmethod
    def from_header(cls, words: list[int]) -> Geometry:
        """Read back from the first ``HEADER_WORDS`` words; :class:`PoolFormatError` if that is no layout of ours."""
        n_slabs, slab_bytes, min_block = words[H_N_SLABS], words[H_SLAB_BYTES], words[H_MIN_BLOCK]
        if not (0 < n_slabs < 1 << 24 and 4096 <= min_block <= slab_bytes <= 1 << 34) or slab_bytes % min_block:
            raise PoolFormatError(
                f"header says {n_slabs} slabs of {slab_bytes} bytes, smallest block {min_block}: not a pool"
            )
        try:
            g = cls._lay_out(n_slabs, slab_bytes, min_block)
        except ConfigError as e:
            raise PoolFormatError(f"header describes an impossible pool: {e}") from e
        for name, at in HEADER_OF_GEOMETRY.items():
            want = getattr(g, name)
            if words[at] != want:
                raise PoolFormatError(f"header says {name}={words[at]}, this version lays it out at {want}")
        return g

    def stride(self, payload_bytes: int, n_parts: int) -> int:
        """Bytes from slot to slot for blocks of ``payload_bytes`` in ``n_parts``; :class:`BlockTooLargeError`."""
        s = max(_round_up(payload_bytes, PAGE_BYTES), n_parts * self.min_block, self.min_block)
        if s > self.slab_bytes:
            raise BlockTooLargeError(
                f"a block of {payload_bytes} bytes in {n_parts} part(s) needs {s} bytes; a slab of this pool has "
                f"{self.slab_bytes}. Remove the pool and create it with a larger slab (KVPLUG_SLAB) or size "
                f"(KVPLUG_SIZE)"
            )
        return s


HEADER_OF_GEOMETRY: Final = {
    "segment_bytes": H_SEGMENT_BYTES,
    "data_offset": H_DATA_OFFSET,
    "slab_bytes": H_SLAB_BYTES,
    "min_block": H_MIN_BLOCK,
    "n_slabs": H_N_SLABS,
    "rows_per_slab": H_ROWS_PER_SLAB,
    "n_rows": H_N_ROWS,
    "index_cap": H_INDEX_CAP,
    "event_cap": H_EVENT_CAP,
    "o_client": H_O_CLIENT,
    "o_slab": H_O_SLAB,
    "o_class": H_O_CLASS,
    "o_row": H_O_ROW,
    "o_part": H_O_PART,
    "o_index": H_O_INDEX,
    "o_event": H_O_EVENT,
}
