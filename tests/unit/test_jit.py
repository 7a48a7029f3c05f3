"""The first process that needs the pool's code compiles it, and says so, since that takes a while."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from kvplug.shm import jit


@pytest.mark.parametrize("is_kept", [True, False], ids=["a place to keep it", "no place to keep it"])
def test_compiling_is_said_once(
    is_kept: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = jit.njit

    def njit(*, nogil: bool, cache: bool = False) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return plain(nogil=nogil)

    monkeypatch.setattr(jit, "njit", njit)
    monkeypatch.setattr(jit, "_entries", [])
    monkeypatch.setattr(jit, "_not_kept", [])

    @jit.entry("i(i)")
    def one(x: int) -> int:
        return x + 1

    @jit.entry("i(i)")
    def two(x: int) -> int:
        return x + 2

    if is_kept:
        jit._not_kept.clear()
    with caplog.at_level(logging.WARNING, "kvplug"):
        jit.warm_up()
        jit.warm_up()
    assert (one(1), two(1)) == (2, 3)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("compiling the pool's inner loops")
    assert ("NUMBA_CACHE_DIR" in message) != is_kept
