"""Errors of kvplug's own never reach the engine; they are said once, and counted each time."""

from __future__ import annotations

import logging

import pytest

from kvplug.adapters.vllm.shield import Shield
from kvplug.errors import ConfigError

LOGGER = logging.getLogger("kvplug-test-shield")


def broken(*_: object) -> None:
    raise ZeroDivisionError("one that nobody foresaw")


def refused() -> None:
    raise ConfigError("what a user can read")


def test_a_call_that_goes_well_is_as_without_a_shield(caplog: pytest.LogCaptureFixture) -> None:
    off: list[int] = []
    shield = Shield(LOGGER, lambda: off.append(1))
    assert shield("a sum", lambda a, b: a + b, None, 1, 2) == 3
    assert shield("nothing", lambda: None, 5) is None
    assert (off, dict(shield.counts), caplog.records) == ([], {}, [])


def test_an_error_is_counted_each_time_said_once_and_switches_off(caplog: pytest.LogCaptureFixture) -> None:
    off: list[int] = []
    shield = Shield(LOGGER, lambda: off.append(1))
    assert shield("a step", broken, "otherwise", 1) == "otherwise"
    assert shield("a step", refused, 7) == 7
    (record,) = caplog.records
    assert record.getMessage() == "kvplug: OFF, an error in a step; the engine runs on without kvplug"
    assert record.exc_info is not None
    assert off == [1, 1]
    assert shield.take_counts() == {"hook_errors": 2}
    assert shield.take_counts() == {}


def test_an_error_that_kvplug_foresaw_is_said_in_its_own_words(caplog: pytest.LogCaptureFixture) -> None:
    shield = Shield(LOGGER)
    assert shield("start", refused, None) is None
    assert shield("start", broken, None) is None
    (record,) = caplog.records
    assert (record.getMessage(), record.exc_info) == ("kvplug: OFF: what a user can read", None)


def test_what_ends_the_engine_itself_goes_through() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Shield(LOGGER)("a step", interrupted, None)
