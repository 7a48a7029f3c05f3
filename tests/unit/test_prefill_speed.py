"""How fast an engine is thought to compute prompts."""

from __future__ import annotations

import pytest

from kvplug.adapters.common import prefill
from kvplug.adapters.common.prefill import PrefillSpeed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the time is; tests set it."""
    now = [100.0]
    monkeypatch.setattr(prefill.time, "monotonic", lambda: now[0])
    return now


def test_speed_is_tokens_over_the_time_that_their_step_took(clock: list[float]) -> None:
    speed = PrefillSpeed()
    assert speed.tokens_per_s is None
    assert speed.began(1, [500])
    clock[0] += 0.5
    speed.ended(1)
    assert speed.tokens_per_s == pytest.approx(1000.0)
    clock[0] += 60.0  # an idle engine is not a slow one
    assert speed.began(2, [500])
    clock[0] += 0.25
    speed.ended(2)
    assert speed.tokens_per_s == pytest.approx(1300.0)


def test_steps_that_overlap_are_not_counted_twice(clock: list[float]) -> None:
    """Scheduled at once, computed one after the other."""
    speed = PrefillSpeed()
    for step in (1, 2, 3):
        assert speed.began(step, [400, 100])
    for step in (1, 2, 3):
        clock[0] += 0.5
        speed.ended(step)
        assert speed.tokens_per_s == pytest.approx(1000.0)


def test_steps_of_few_tokens_and_steps_that_nobody_reported_say_nothing(clock: list[float]) -> None:
    speed = PrefillSpeed()
    assert not speed.began(1, [3])
    assert not speed.began(1, [1] * 200), "two hundred requests that generate"
    assert not speed.began(1, [64, *[1] * 100])
    assert speed.began(2, [500])
    assert speed.began(3, [500])
    clock[0] += 1.0
    speed.ended(3)
    assert speed.tokens_per_s == pytest.approx(500.0)
    speed.ended(4)
    assert speed.tokens_per_s == pytest.approx(500.0)
