"""What kvplug knows of a cache group: its kind of attention, and which blocks a hit needs from it.

A group's block covers ``span`` tokens. A hit of N tokens needs, of each group, the blocks from the first one that the
next token's attention can reach up to N: all of them for full attention, those of the last window for sliding
windows, those from N's own chunk on for chunked-local attention.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GroupRule:
    """One cache group of a model."""

    kind: str
    """"full", "mla", "sliding" or "chunked"."""
    span: int
    """Tokens that one block covers."""
    window: int | None = None
    """Tokens: the sliding window, or the chunk. None for full attention and MLA."""

    @property
    def whole_prefix(self) -> bool:
        """Whether a hit needs every block before it."""
        return self.kind in ("full", "mla")

    def skipped_tokens(self, computed: int) -> int:
        """Tokens before ``computed`` that no later token attends to."""
        if self.kind == "sliding":
            assert self.window is not None
            return max(0, computed - self.window + 1)
        if self.kind == "chunked":
            assert self.window is not None
            return computed // self.window * self.window
        return 0

    def first_needed(self, computed: int) -> int:
        """Index of the first block that a hit of ``computed`` tokens needs; the last is ``computed // span - 1``."""
        return self.skipped_tokens(computed) // self.span
