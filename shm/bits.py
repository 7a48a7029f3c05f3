"""Sets of clients as bits of words: who has pinned a slot, and who is being reaped.

Client ``c`` is bit ``c % 64`` of word ``c // 64``.
"""

from __future__ import annotations

from typing import Any

from kvplug.shm.jit import kernel
from kvplug.shm.layout import MAX_CLIENTS, PIN_WORDS

assert MAX_CLIENTS == 64 * PIN_WORDS


@kernel
def word_of(client: int) -> int:
    """Which word has the client's bit."""
    return client >> 6


@kernel
def bit_of(client: int) -> int:
    """The client's bit in its word. The last one is the sign: by a shift it would be a wrap that LLVM may not see."""
    place = client & 63
    return 1 << place if place != 63 else -0x7FFFFFFFFFFFFFFF - 1


@kernel
def has_bit(bits: Any, client: int) -> bool:
    """Whether the client is in the set."""
    return (bits[client >> 6] >> (client & 63)) & 1 != 0
