"""What the demo prints where there is no terminal: that it is at work, and a heading over each column."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from bench import demo


def test_a_long_step_says_now_and_then_that_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "QUIET_S", 0.05)
    out = io.StringIO()

    def wait_for_two_lines() -> None:
        deadline = time.monotonic() + 60
        while out.getvalue().count("… engine A starts") < 2 and time.monotonic() < deadline:
            time.sleep(0.01)

    with demo.Steps(Console(file=out)) as steps:
        steps.run("engine A starts", wait_for_two_lines)
    assert out.getvalue().count("… engine A starts") >= 2
    assert "✓ engine A starts" in out.getvalue().splitlines()[-1]
