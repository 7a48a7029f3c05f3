"""The SDK's keys: a namespace and tokens in, the 32 bytes that name a block out. ``kvplug.identity`` makes them.

This is the name that programs import; kvplug itself goes to the rooms (tests/unit/test_house.py).
"""

from __future__ import annotations

from kvplug.identity.extras import encode_extras
from kvplug.identity.keys import (
    KEY_BYTES,
    MIN_STEP_TOKENS,
    STEP_TOKENS,
    KeyArray,
    KeyChain,
    StepExtras,
    as_key_array,
    block_keys,
    fold,
    root,
    step_for_spans,
)
from kvplug.identity.namespace import ByteRun, GroupLayout, Namespace, WeightsIdentity, digest_of

__all__ = [
    "KEY_BYTES",
    "MIN_STEP_TOKENS",
    "STEP_TOKENS",
    "ByteRun",
    "GroupLayout",
    "KeyArray",
    "KeyChain",
    "Namespace",
    "StepExtras",
    "WeightsIdentity",
    "as_key_array",
    "block_keys",
    "digest_of",
    "encode_extras",
    "fold",
    "root",
    "step_for_spans",
]
