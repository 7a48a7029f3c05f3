"""Frames: what is sent is what comes back, and everything else is refused before memory is taken for it."""

from __future__ import annotations

import tracemalloc
from typing import Any

import msgspec
import numpy as np
import pytest

from kvplug.errors import ProtocolError
from kvplug.rdma.control import protocol as p

PARTS = 3


def answer(n: int = 4, found: int = 3, **changes: Any) -> p.Leased:
    """A right answer for ``n`` keys, but for ``changes``."""
    fields: dict[str, Any] = {
        "lease": 5,
        "seconds": 3.0,
        "codes": p.raw(np.array([0] * found + [-1] * (n - found)), np.int8),
        "offsets": p.raw(np.arange(found) * 4096, np.int64),
        "gens": p.raw(np.arange(found), np.int64),
        "siblings": p.raw(np.full(found, (3 << 7) | 2), np.uint16),
        "part_counts": p.raw(np.full(found, PARTS), np.uint8),
        "part_nbytes": p.raw(np.tile([100, 64, 7], found), np.int64),
        "part_sums": p.raw(np.arange(found * PARTS), np.int64),
    }
    return p.Leased(**(fields | changes))


MESSAGES = [
    p.Hello("data", True, b"n" * 32, "127.0.0.1:1", b"t" * 16),
    p.Challenge(False, b"n" * 32, b"h" * 16),
    p.Proof(),
    p.Welcome(2.5, 4096, ("tcp", "verbs")),
    p.Lookup(b"k" * 64, 1.5, True),
    answer(),
    p.Extend(3, 1.0),
    p.Extended(0.0),
    p.Release((1, 2, 3)),
    p.Released(2),
    p.Stats(),
    p.StatsReply({"reads": 5}, 1, 4096),
    p.GetTicket(),
    p.Ticket(b"t" * 16),
    p.Failed("lease"),
    p.Read(7, p.raw(np.arange(5), np.uint32)),
    p.ReadStart(1 << 40),
    p.Offer(b"k" * 64, p.raw(np.array([5, 6]), np.int64), b"h" * 16, ("10.0.0.7:9410",)),
    p.Offered(bytes(2)),
    p.OpenQueue(p.QueueEnd(17, 1 << 23, b"g" * 16, 3, 5, 16), 1, (5, 6)),
    p.QueueOpened(p.QueueEnd(18, 0, b"g" * 16, 0, 3, 1), 0, 0x7F12_3456_7000, 1 << 40, 1 << 25),
    p.GetRegions(1, 7, p.raw(np.arange(3), np.uint32), 0.5),
    p.RegionKeys(p.raw(np.array([True, False, True]), np.bool_), p.raw(np.arange(3), np.uint32)),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_a_message_comes_back_as_it_was_sent(message: p.Message) -> None:
    header, body = p.encode(message, 77)
    kind, length, request = p.parse_header(header)
    assert (length, request) == (len(body), 77)
    assert p.decode(kind, body) == message


def test_every_kind_has_a_message_here() -> None:
    assert {type(m) for m in MESSAGES} == {message for message, _ in p.KINDS.values()}


def test_the_largest_messages_fit_their_bounds() -> None:
    """Else a batch of the size that is offered could never be answered."""
    n, parts = p.MAX_KEYS, p.MAX_PARTS_A_REPLY
    big = 1 << 62
    end = p.QueueEnd((1 << 24) - 1, (1 << 24) - 1, bytes(16), 65535, 5, 255)
    largest = [
        p.Lookup(bytes(n * 32), 600.0, True),
        p.Leased(
            big, 600.0, bytes(n), bytes(8 * n), bytes(8 * n), bytes(2 * n), bytes(n), bytes(8 * parts), bytes(8 * parts)
        ),
        p.Release((big,) * p.MAX_LEASES_A_REQUEST),
        p.Read(big, bytes(4 * n)),
        p.StatsReply({f"{i:064d}": big for i in range(64)}, big, big),
        p.Hello("control", True, bytes(32), "x" * 256, bytes(16)),
        p.Offer(
            bytes(32 * p.MAX_OFFER_KEYS), bytes(8 * p.MAX_OFFER_KEYS), bytes(16), ("\u20ac" * 256,) * p.MAX_ADDRESSES
        ),
        p.Offered(bytes(p.MAX_OFFER_KEYS)),
        p.OpenQueue(end, 255, ((1 << 24) - 1,) * p.MAX_QUEUES_A_READER),
        p.QueueOpened(end, 255, big, big, big),
        p.GetRegions(255, big, bytes(4 * p.MAX_REGIONS_A_REQUEST), 600.0),
        p.RegionKeys(bytes(p.MAX_REGIONS_A_REQUEST), bytes(4 * p.MAX_REGIONS_A_REQUEST)),
    ]
    for message in largest:
        header, body = p.encode(message, (1 << 64) - 1)
        p.decode(p.parse_header(header)[0], body)


@pytest.mark.parametrize("kind", p.KINDS)
def test_a_length_over_its_kinds_bound_is_refused_before_anything_is_allocated(kind: int) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match="at most"):
            p.parse_header(p.HEADER.pack(p.MAGIC, p.VERSION, kind, p.KINDS[kind][1] + 1, 0))
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (p.HEADER.pack(b"XX", p.VERSION, 5, 10, 0), "begins with"),
        (p.HEADER.pack(p.MAGIC, p.VERSION + 1, 5, 10, 0), "version 2"),
        (p.HEADER.pack(p.MAGIC, p.VERSION, 0, 10, 0), "unknown kind"),
        (p.HEADER.pack(p.MAGIC, p.VERSION, 200, 10, 0), "unknown kind"),
    ],
)
def test_a_header_that_is_none_is_refused(header: bytes, says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        p.parse_header(header)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (5, [b"k" * 32, -1.0, False]),
        (5, [b"k" * 32, 1e9, False]),
        (5, [b"k" * 32, float("nan"), False]),
        (5, [b"k" * 32, 1.0, False, "more"]),
        (5, ["text", 1.0, False]),
        (5, {"keys": b"k"}),
        (1, ["agent", True, b"n" * 32, "x", b""]),
        (1, ["data", True, b"n" * 31, "x", b""]),
        (9, [[1] * 300]),
        (9, [[-1]]),
        (16, [1 << 63, b""]),
        (15, ["because"]),
        (18, [[1 << 24, 0, b"g" * 16, 0, 1, 1], 0, []]),
        (18, [[1, 0, b"g" * 15, 0, 1, 1], 0, []]),
        (18, [[1, 0, b"g" * 16, 0, 6, 1], 0, []]),
        (18, [[1, 0, b"g" * 16, 0, 1, 0], 0, []]),
        (18, [[1, 0, b"g" * 16, 0, 1, 1], 0, [1] * 33]),
        (19, [[1, 0, b"g" * 16, 0, 1, 1], 0, -1, 0, 1 << 25]),
        (19, [[1, 0, b"g" * 16, 0, 1, 1], 0, 0, 0, 4096]),
        (20, [0, 1, b"", -1.0]),
        (20, [256, 1, b"", 1.0]),
    ],
)
def test_a_body_that_does_not_fit_is_refused(kind: int, fields: Any) -> None:
    with pytest.raises(ProtocolError, match="malformed"):
        p.decode(kind, msgspec.msgpack.encode(fields))


def test_a_right_answer_is_taken_apart() -> None:
    blocks = p.check_leased(answer(), 4)
    assert blocks.nbytes.tolist() == [128 + 64 + 7] * 3
    assert blocks.part_starts.tolist() == [0, 3, 6]


WRONG = {
    "too few codes": {"codes": bytes(3)},
    "a code that is none": {"codes": p.raw(np.array([0, 0, 0, 1]), np.int8)},
    "more found than described": {"codes": bytes(4)},
    "half an offset": {"offsets": bytes(20)},
    "an offset below zero": {"offsets": p.raw(np.array([-1, 0, 0]), np.int64)},
    "an offset past everything": {"offsets": p.raw(np.array([(1 << 62) + 1, 0, 0]), np.int64)},
    "no parts": {"part_counts": bytes(3), "part_nbytes": b"", "part_sums": b""},
    "too many parts": {"part_counts": bytes([63, 1, 1]), "part_nbytes": bytes(65 * 8), "part_sums": bytes(65 * 8)},
    "a part of no bytes": {"part_nbytes": bytes(9 * 8)},
    "a part of less": {"part_nbytes": p.raw(np.full(9, -5), np.int64)},
    "a part larger than any": {"part_nbytes": p.raw(np.full(9, 1 << 40), np.int64)},
    "a sum too few": {"part_sums": bytes(8 * 8)},
    "a sibling that is not among them": {"siblings": p.raw(np.full(3, (1 << 7) | 2), np.uint16)},
    "more siblings than there are": {"siblings": p.raw(np.full(3, 1 << 14), np.uint16)},
    "blocks without a lease": {"lease": 0},
}


@pytest.mark.parametrize("what", WRONG)
def test_an_answer_whose_claims_do_not_fit_together_is_refused(what: str) -> None:
    with pytest.raises(ProtocolError):
        p.check_leased(answer(**WRONG[what]), 4)


def test_a_lease_on_nothing_is_refused() -> None:
    with pytest.raises(ProtocolError):
        p.check_leased(p.Leased(7, 1.0, p.raw(np.full(4, -1), np.int8), b"", b"", b"", b"", b"", b""), 4)
