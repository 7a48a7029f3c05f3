"""The first process that needs the pool's code compiles it, and says so, since that takes a while."""

from __future__ import annotations

import fcntl
import logging
import re
from typing import Any

import pytest
from numba import njit

from kvplug.shm import jit
from tests.kernels import NUMBA_ONLY

pytestmark = NUMBA_ONLY


def plain_njit(*, nogil: bool, cache: bool = False) -> Any:
    if cache:
        raise RuntimeError("cannot cache function: no locator available")
    return njit(nogil=nogil)


@pytest.mark.parametrize("is_kept", [True, False], ids=["a place to keep it", "no place to keep it"])
@pytest.mark.parametrize("every_s", [0.0, 3600.0])
def test_compiling_is_said_how_far_it_is_and_how_long_it_took(
    is_kept: bool, every_s: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(jit, "njit", plain_njit)
    monkeypatch.setattr(jit, "_entries", [])
    monkeypatch.setattr(jit, "_not_kept", [])
    monkeypatch.setattr(jit, "PROGRESS_EVERY_S", every_s)

    @jit.entry("i(i)")
    def one(x: int) -> int:
        return x + 1

    @jit.entry("i(i)")
    def two(x: int) -> int:
        return x + 2

    @jit.entry("i(i)")
    def three(x: int) -> int:
        return x + 3

    if is_kept:
        jit._not_kept.clear()
    with caplog.at_level(logging.WARNING, "kvplug"):
        jit.warm_up()
        jit.warm_up()
    assert (one(1), two(1), three(1)) == (2, 3, 4)
    begun, *further, ended = [record.getMessage() for record in caplog.records]
    assert begun.startswith("compiling the pool's inner loops, 3 of them: a minute on a quiet machine")
    assert ("NUMBA_CACHE_DIR" in begun) != is_kept
    assert [line.rsplit(" ", 2)[0] for line in further] == ["compiling the pool's inner loops: 2 of 3 after"] * (
        every_s == 0
    )
    assert re.fullmatch(r"compiled the pool's inner loops in \d+ s", ended)


def test_who_waits_for_another_process_that_compiles_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(jit, "njit", plain_njit)
    monkeypatch.setattr(jit, "_entries", [])
    monkeypatch.setattr(jit, "_not_kept", [])
    monkeypatch.setattr(jit, "WAIT_SAID_AFTER_S", 0.0)
    monkeypatch.setattr(jit, "COMPILE_TIMEOUT_S", 0.3)

    @jit.entry("i(i)")
    def one(x: int) -> int:
        return x + 1

    with open(jit.__file__) as held, caplog.at_level(logging.WARNING, "kvplug"):
        fcntl.flock(held, fcntl.LOCK_EX)  # as another process holds it
        jit.warm_up()
    assert one(1) == 2, "after the deadline it goes on without the lock"
    assert caplog.records[0].getMessage().startswith("another process compiles the pool's inner loops: waiting for it")
