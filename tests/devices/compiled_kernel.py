"""Compiles the kernel for small runs, for which no GPU is needed: a child of ``test_interpreter.py``."""

from __future__ import annotations

import itertools

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvplug.adapters.devices.kernels import _TYPES, PIECE_BYTES, WARPS, _move

CHIPS = (80, 90, 100)
"""Ampere, Hopper, Blackwell."""


def main() -> None:
    """One word per variant that was compiled."""
    tables, numbers = ("jobs", "table"), ("first", "count", "total", "pieces")
    signature = dict.fromkeys(tables, "*i64") | dict.fromkeys(numbers, "i32")
    for chip, (word, kind), to_slots in itertools.product(CHIPS, _TYPES.items(), (True, False)):
        constants = {"TYPE": kind, "LANES": PIECE_BYTES // word, "TO_SLOTS": to_slots}
        source = ASTSource(_move, signature | dict.fromkeys(constants, "constexpr"), constants)
        made = triton.compile(source, target=GPUTarget("cuda", chip, 32), options={"num_warps": WARPS})
        assert made.asm["cubin"]
        print(f"sm_{chip}:{word}:{to_slots}", flush=True)


if __name__ == "__main__":
    main()
