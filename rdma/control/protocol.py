"""The control protocol: every message, its bounds, and its bytes.

A frame is a header of 16 bytes, a body and, once both ends have proved themselves, a MAC of 16 bytes:

    magic "KP" | version u8 | kind u8 | body length u32 | request id u64      little-endian, unsigned
    body: MessagePack array of the fields of the message that ``kind`` names
    MAC: BLAKE3 keyed with the direction's key over (frame number u64 ‖ header ‖ body), 16 bytes

The kind stands in the header, so that a length is held against its own kind's bound before anything is allocated.
Arrays travel as little-endian bytes; what a message claims about them is checked by :func:`check_leased`.

A reader sends Hello, the agent Challenge, the reader Proof (its first frame with a MAC), the agent Welcome. On a
control connection then come requests and one answer to each, among them those that prepare reads by verbs (OpenQueue,
GetRegions); such reads themselves pass both processes by. On a data connection comes :class:`Read`, answered by
:class:`ReadStart` and the bytes themselves, which no frame surrounds.
"""

from __future__ import annotations

import struct
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from kvplug.errors import DecodeError, ProtocolError
from kvplug.outside import decoded

VERSION: Final = 1
MAGIC: Final = b"KP"
HEADER: Final = struct.Struct("<2sBBIQ")
MAC_BYTES: Final = 16
KEY_BYTES: Final = 32
NONCE_BYTES: Final = 32
TICKET_BYTES: Final = 16
MAX_KEYS: Final = 4096  # in one lookup
MAX_PARTS: Final = 62  # of one block, as in the pool
MAX_PARTS_A_REPLY: Final = 1 << 15
MAX_LEASES_A_REQUEST: Final = 256
MAX_QUEUES_A_READER: Final = 32
MAX_REGIONS_A_REQUEST: Final = 2048
MAX_OFFER_KEYS: Final = 1024
MAX_ADDRESSES: Final = 4
MAX_BLOCK_BYTES: Final = 1 << 34
MAX_LEASE_S: Final = 600.0
PART_ALIGN_BYTES: Final = 64  # parts of a block begin at multiples of this, as in the pool
_TEXT: Final = 256

I64 = npt.NDArray[np.int64]
I8 = npt.NDArray[np.int8]
Nonce = Annotated[bytes, Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
Text = Annotated[str, Meta(max_length=_TEXT)]
Id = Annotated[int, Meta(ge=0, le=(1 << 62))]
Seconds = Annotated[float, Meta(ge=0, le=MAX_LEASE_S)]


class Message(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """Root of all messages."""


class QueueEnd(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """One end of a reliable connection of the verbs."""

    qpn: Annotated[int, Meta(ge=0, lt=1 << 24)]
    psn: Annotated[int, Meta(ge=0, lt=1 << 24)]
    gid: Annotated[bytes, Meta(min_length=16, max_length=16)]
    lid: Annotated[int, Meta(ge=0, lt=1 << 16)]
    mtu: Annotated[int, Meta(ge=1, le=5)]  # 256 bytes << (mtu - 1)
    reads: Annotated[int, Meta(ge=1, le=255)]  # at once, on the wire


class Hello(Message):
    """Reader: who I am, whom I mean to reach, and a number never used before."""

    role: Literal["control", "data"]
    keyed: bool
    nonce: Nonce
    target: Text  # ip:port that was dialled
    ticket: Annotated[bytes, Meta(max_length=TICKET_BYTES)] = b""


class Challenge(Message):
    """Agent: who I am, and a number of mine."""

    keyed: bool
    nonce: Nonce
    host: Annotated[bytes, Meta(min_length=16, max_length=16)]  # the pool's identity


class Proof(Message):
    """Reader: the first frame with a MAC."""


class Welcome(Message):
    """Agent: its first frame with a MAC, and what it offers."""

    lease_s: Seconds
    max_keys: Annotated[int, Meta(ge=1, le=MAX_KEYS)]
    paths: Annotated[tuple[Annotated[str, Meta(max_length=16)], ...], Meta(max_length=8)]
    cache_node: bool = False  # it takes offers


class Lookup(Message):
    """Reader: which of these keys have you? Keep those in place for me. ``keys``: N × 32 bytes.

    For no seconds: nothing is kept, and what is there has the code that says so (BUDGET).
    """

    keys: Annotated[bytes, Meta(max_length=MAX_KEYS * KEY_BYTES)]
    seconds: Seconds
    prefix: bool = False  # only the leading ones
    touch: bool = True  # False: no use of them, their turn to be evicted stays what it was


class Leased(Message):
    """Agent: what is there, and where. Arrays of the M keys whose code is 0, in order; P parts in all."""

    lease: Id  # 0: none
    seconds: Seconds
    codes: Annotated[bytes, Meta(max_length=MAX_KEYS)]  # int8[N]
    offsets: Annotated[bytes, Meta(max_length=MAX_KEYS * 8)]  # int64[M], from the segment's start
    gens: Annotated[bytes, Meta(max_length=MAX_KEYS * 8)]  # int64[M]
    siblings: Annotated[bytes, Meta(max_length=MAX_KEYS * 2)]  # uint16[M]: (count - 1) << 7 | index
    part_counts: Annotated[bytes, Meta(max_length=MAX_KEYS)]  # uint8[M]
    part_nbytes: Annotated[bytes, Meta(max_length=MAX_PARTS_A_REPLY * 8)]  # int64[P]
    part_sums: Annotated[bytes, Meta(max_length=MAX_PARTS_A_REPLY * 8)]  # int64[P]: bits of XXH3


class Extend(Message):
    """Reader: keep this lease for so long from now."""

    lease: Id
    seconds: Seconds


class Extended(Message):
    """Agent: the lease ends so many seconds from now; 0: it has ended."""

    seconds: Seconds


class Release(Message):
    """Reader: I am done with these."""

    leases: Annotated[tuple[Id, ...], Meta(max_length=MAX_LEASES_A_REQUEST)]


class Released(Message):
    """Agent: how many of them were still held."""

    count: Id


class Stats(Message):
    """Reader: your figures, please."""


class StatsReply(Message):
    """Agent: counters since it started."""

    counters: Annotated[dict[Annotated[str, Meta(max_length=64)], int], Meta(max_length=64)]
    leases: Id
    leased_bytes: Id


class GetTicket(Message):
    """Reader: let me open a data connection."""


class Ticket(Message):
    """Agent: good for one data connection, for a short while. Its key follows from this connection's."""

    ticket: Annotated[bytes, Meta(min_length=TICKET_BYTES, max_length=TICKET_BYTES)]


class OpenQueue(Message):
    """Reader: here is a queue pair of mine, make one that it can read from. ``rail``: number of my device.

    ``instead``: queue pairs of yours whose other end is gone.
    """

    queue: QueueEnd
    rail: Annotated[int, Meta(ge=0, le=255)]
    instead: Annotated[tuple[Annotated[int, Meta(ge=0, lt=1 << 24)], ...], Meta(max_length=MAX_QUEUES_A_READER)] = ()


class QueueOpened(Message):
    """Agent: it is connected with this one. The segment's memory is known to ``device`` under these addresses."""

    queue: QueueEnd
    device: Annotated[int, Meta(ge=0, le=255)]
    base: Id  # address of the segment
    nbytes: Id
    region_bytes: Annotated[int, Meta(ge=1 << 20, le=1 << 62)]  # the last region may be shorter


class GetRegions(Message):
    """Reader: the keys of these regions, in which blocks of my lease lie. Wait for them no longer than that."""

    device: Annotated[int, Meta(ge=0, le=255)]
    lease: Id
    regions: Annotated[bytes, Meta(max_length=MAX_REGIONS_A_REQUEST * 4)]  # uint32[K]
    seconds: Seconds


class RegionKeys(Message):
    """Agent: which of them can be read by now, and by which key."""

    ready: Annotated[bytes, Meta(max_length=MAX_REGIONS_A_REQUEST)]  # bool[K]
    rkeys: Annotated[bytes, Meta(max_length=MAX_REGIONS_A_REQUEST * 4)]  # uint32[K]


class Failed(Message):
    """Agent: not done, and why: a code that the reader knows a sentence for."""

    code: Literal["version", "keyed", "target", "busy", "ticket", "request", "lease", "pool", "stranger"]


class Read(Message):
    """Reader, on a data connection: send me these blocks of the lease, one after another."""

    lease: Id
    blocks: Annotated[bytes, Meta(max_length=MAX_KEYS * 4)]  # uint32[K], positions in the lease


class ReadStart(Message):
    """Agent: so many bytes follow."""

    nbytes: Id


class Offer(Message):
    """Reader, to a cache node: I am about to evict these; read them if you want them.

    ``host`` and ``addresses`` say which of the hosts that the node knows this is: it dials none that it does not know.
    """

    keys: Annotated[bytes, Meta(max_length=MAX_OFFER_KEYS * KEY_BYTES)]  # N × 32 bytes, head of a prefix first
    nbytes: Annotated[bytes, Meta(max_length=MAX_OFFER_KEYS * 8)]  # int64[N]
    host: Annotated[bytes, Meta(min_length=16, max_length=16)]  # identity of the pool that has them
    addresses: Annotated[tuple[Text, ...], Meta(max_length=MAX_ADDRESSES)]  # of its agent, as others may name it


class Offered(Message):
    """Cache node: OK: I shall read it; EXISTS: I have it; BUDGET: not now. Nobody waits for what comes of it."""

    codes: Annotated[bytes, Meta(max_length=MAX_OFFER_KEYS)]  # int8[N]


KINDS: Final[dict[int, tuple[type[Message], int]]] = {
    1: (Hello, 512),
    2: (Challenge, 128),
    3: (Proof, 8),
    4: (Welcome, 256),
    5: (Lookup, MAX_KEYS * KEY_BYTES + 64),
    6: (Leased, MAX_KEYS * 20 + MAX_PARTS_A_REPLY * 16 + 256),
    7: (Extend, 64),
    8: (Extended, 64),
    9: (Release, MAX_LEASES_A_REQUEST * 9 + 64),
    10: (Released, 64),
    11: (Stats, 8),
    12: (StatsReply, 64 * 80),
    13: (GetTicket, 8),
    14: (Ticket, 64),
    15: (Failed, 32),
    16: (Read, MAX_KEYS * 4 + 64),
    17: (ReadStart, 64),
    18: (OpenQueue, 256),
    19: (QueueOpened, 128),
    20: (GetRegions, MAX_REGIONS_A_REQUEST * 4 + 64),
    21: (RegionKeys, MAX_REGIONS_A_REQUEST * 5 + 64),
    24: (Offer, MAX_OFFER_KEYS * (KEY_BYTES + 8) + MAX_ADDRESSES * (4 * _TEXT + 8) + 64),
    25: (Offered, MAX_OFFER_KEYS + 16),
}
"""Kind: (message, most bytes of its body)."""
_KIND_OF: Final = {message: kind for kind, (message, _) in KINDS.items()}
_DECODERS: Final = {kind: msgspec.msgpack.Decoder(message) for kind, (message, _) in KINDS.items()}
_ENCODER: Final = msgspec.msgpack.Encoder()
M = TypeVar("M", bound=Message)


def encode(message: Message, request: int) -> tuple[bytes, bytes]:
    """(header, body) of a message."""
    kind = _KIND_OF[type(message)]
    body = _ENCODER.encode(message)
    most = KINDS[kind][1]
    if len(body) > most:
        raise ProtocolError(f"a {type(message).__name__} of {len(body)} bytes; the protocol has at most {most}")
    return HEADER.pack(MAGIC, VERSION, kind, len(body), request), body


STRANGERS: Final[dict[bytes, str]] = {
    b"\x16\x03": "the other end begins TLS, which this end is not set up for; set tls_cert, tls_key and tls_ca on both "
    "hosts, or on neither",
    b"\x15\x03": "the other end speaks TLS, which this end is not set up for; set tls_cert, tls_key and tls_ca on both "
    "hosts, or on neither",
    b"HT": "the other end speaks HTTP; name the address of a `kvplug agent`",
    b"GE": "the other end speaks HTTP, and this is no web server",
    b"PO": "the other end speaks HTTP, and this is no web server",
    b"-E": "the other end speaks as Redis does; its address belongs into directory_url, the agent's into peers",
    b"-N": "the other end speaks as Redis does; its address belongs into directory_url, the agent's into peers",
    b"*1": "the other end speaks as a client of Redis does; directory_url is the address of a Redis or Valkey",
    b"*2": "the other end speaks as a client of Redis does; directory_url is the address of a Redis or Valkey",
    b"*3": "the other end speaks as a client of Redis does; directory_url is the address of a Redis or Valkey",
    b"SS": "the other end speaks SSH; name the address of a `kvplug agent`",
}
"""Who begins so is known, and what to do about it."""


class StrangerError(ProtocolError):
    """Whoever is at the other end speaks something else."""


class WrongVersionError(ProtocolError):
    """The other end speaks another version of the protocol."""


def check_magic(header: bytes) -> None:
    """Raises StrangerError if the first bytes of a frame are somebody else's; it may have come in part only."""
    magic = header[: len(MAGIC)]
    if magic != MAGIC:
        raise StrangerError(
            f"a frame begins with {magic!r}, not {MAGIC!r}: "
            f"{STRANGERS.get(magic, 'whoever that is does not speak this protocol')}"
        )


def parse_header(header: bytes) -> tuple[int, int, int]:
    """(kind, bytes of the body, request id). Raises ProtocolError, before anything is allocated for the body."""
    check_magic(header)
    _, version, kind, length, request = HEADER.unpack(header)
    if version != VERSION:
        raise WrongVersionError(f"the other end speaks version {version} of the protocol, this one {VERSION}")
    known = KINDS.get(kind)
    if known is None:
        raise ProtocolError(f"a frame of unknown kind {kind}")
    if length > known[1]:
        raise ProtocolError(f"a {known[0].__name__} of {length} bytes; the protocol has at most {known[1]}")
    return kind, length, request


def decode(kind: int, body: bytes | bytearray | memoryview) -> Message:
    """The message of a body. Raises ProtocolError."""
    try:
        return decoded(_DECODERS[kind], body, f"a malformed {KINDS[kind][0].__name__}")
    except DecodeError as e:
        raise ProtocolError(str(e)) from None


def expect(message: Message, wanted: type[M]) -> M:
    """The message, if it is of this type. Raises ProtocolError."""
    if not isinstance(message, wanted):
        raise ProtocolError(f"a {type(message).__name__} where a {wanted.__name__} was due")
    return message


def array(raw: bytes, dtype: Any) -> npt.NDArray[Any]:
    """An array of its own from little-endian bytes. Raises ProtocolError if they are no whole number of entries."""
    kind = np.dtype(dtype).newbyteorder("<")
    if len(raw) % kind.itemsize:
        raise ProtocolError(f"{len(raw)} bytes are no array of {kind.itemsize}-byte entries")
    return np.frombuffer(raw, kind).astype(dtype)


def raw(values: npt.NDArray[Any], dtype: Any) -> bytes:
    """Little-endian bytes of an array."""
    return np.ascontiguousarray(values, np.dtype(dtype).newbyteorder("<")).tobytes()


class LeasedBlocks(msgspec.Struct, frozen=True):
    """A :class:`Leased` whose arrays were checked against each other.

    codes: int8[N]; the others for the M keys with code 0: offsets, gens, nbytes (payload), siblings, part_counts,
    part_starts (first part in the two arrays of parts): int64[M]; part_nbytes, part_sums: int64[P].
    """

    codes: I8
    offsets: I64
    gens: I64
    nbytes: I64
    siblings: I64
    part_counts: I64
    part_starts: I64
    part_nbytes: I64
    part_sums: I64


def payload_nbytes(part_counts: I64, part_nbytes: I64) -> I64:
    """Bytes of each block from the first part's beginning to the last one's end, int64[M]."""
    if not len(part_counts):
        return np.empty(0, np.int64)
    starts = np.cumsum(part_counts) - part_counts
    padded = -(-part_nbytes // PART_ALIGN_BYTES) * PART_ALIGN_BYTES
    last = starts + part_counts - 1
    total: I64 = np.add.reduceat(padded, starts) - padded[last] + part_nbytes[last]
    return total


def check_leased(message: Leased, n_keys: int) -> LeasedBlocks:
    """The arrays of an answer, once all that it claims fits together. Raises ProtocolError."""
    codes = array(message.codes, np.int8)
    found = int((codes == 0).sum())
    offsets, gens = array(message.offsets, np.int64), array(message.gens, np.int64)
    siblings = array(message.siblings, np.uint16).astype(np.int64)
    counts = array(message.part_counts, np.uint8).astype(np.int64)
    part_nbytes, part_sums = array(message.part_nbytes, np.int64), array(message.part_sums, np.int64)
    parts = int(counts.sum())
    lengths = (len(codes), len(offsets), len(gens), len(siblings), len(counts), len(part_nbytes), len(part_sums))
    if lengths != (n_keys, found, found, found, found, parts, parts):
        raise ProtocolError(f"an answer for {n_keys} keys, {found} found, has arrays of {lengths} entries")
    if bool((codes > 0).any()) or (found > 0) != (message.lease > 0):
        raise ProtocolError(f"an answer with lease {message.lease} for {found} blocks and codes up to {codes.max()}")
    if found:
        if int(counts.min()) < 1 or int(counts.max()) > MAX_PARTS:
            raise ProtocolError(f"a block of {counts.min()} to {counts.max()} parts; there are 1 to {MAX_PARTS}")
        if int(part_nbytes.min()) < 1 or int(part_nbytes.max()) > MAX_BLOCK_BYTES:
            raise ProtocolError(f"a part of {part_nbytes.min()} to {part_nbytes.max()} bytes")
        if bool(((siblings & 127) > (siblings >> 7)).any()) or int(siblings.max()) >= 1 << 14:
            raise ProtocolError("a block that is not among its siblings")
    nbytes = payload_nbytes(counts, part_nbytes)
    if found and (int(offsets.min()) < 0 or int(offsets.max()) > 1 << 62 or int(nbytes.max()) > MAX_BLOCK_BYTES):
        raise ProtocolError("a block that lies outside any pool")
    starts = (np.cumsum(counts) - counts).astype(np.int64)
    return LeasedBlocks(codes, offsets, gens, nbytes, siblings, counts, starts, part_nbytes, part_sums)
