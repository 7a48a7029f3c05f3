"""A short soak, and what it judges by."""

from __future__ import annotations

import importlib.util
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sglang_lab.env import installed
from tests.soak.cases import LONGEST, make_prompts
from tests.soak.load import judge

RUN = Path(__file__).resolve().parent / "run.py"
NOT_HERE = importlib.util.find_spec("vllm") is None or not installed()
NEEDED = "no engines here: tests/vllm_lab/install.sh .venv, then tests/sglang_lab/install.sh .venv"
RUN_S = 840
END_S = 60


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.full
@pytest.mark.timeout(RUN_S + END_S + 30)
@pytest.mark.skipif(NOT_HERE, reason=NEEDED)
def test_three_engines_on_one_pool_answer_right_whatever_is_killed() -> None:
    command = [sys.executable, RUN, "--minutes=1.25", "--kills-per-minute=3.2", "--cases=30", "--clients=2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as soak:
        try:
            said, _ = soak.communicate(timeout=RUN_S)
        except subprocess.TimeoutExpired:
            soak.send_signal(signal.SIGTERM)  # it ends its engines
            said, _ = soak.communicate(timeout=END_S)
        finally:
            soak.kill()
    assert soak.returncode == 0, said
    assert "wrong=0 unexplained=0 hung=0 kills=4 violations=0 leaked=0" in said


@pytest.mark.parametrize(
    ("got", "doomed", "verdict"),
    [
        ([7, 8, 9], False, "right"),
        ([7, 8, 9], True, "right"),
        ([7, 8], True, "lost"),
        ([], True, "lost"),
        ([7, 8], False, "wrong"),
        ([], False, "wrong"),
        ([7, 1, 9], False, "wrong"),
        ([7, 1], True, "wrong"),
        ([7, 8, 9, 1], True, "wrong"),
    ],
)
def test_a_kill_explains_an_answer_that_ends_early_and_no_other_token(
    got: list[int], doomed: bool, verdict: str
) -> None:
    assert judge([7, 8, 9], got, doomed=doomed) == verdict


def test_prompts_share_beginnings_of_many_lengths() -> None:
    prompts = make_prompts(random.Random(3), 60)
    assert max(map(len, prompts)) <= LONGEST
    shared = set()
    for i, prompt in enumerate(prompts):
        for other in prompts[:i]:
            at = next((k for k, (x, y) in enumerate(zip(prompt, other, strict=False)) if x != y), None)
            shared.add(min(len(prompt), len(other)) if at is None else at)
    assert len(shared) > 20
    assert max(shared) > LONGEST / 3
    assert make_prompts(random.Random(3), 60) == prompts, "a seed decides all"
