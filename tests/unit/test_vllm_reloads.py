"""What a call of vLLM's ``reload_weights`` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvplug.adapters.vllm.reloads import folder_of


@pytest.mark.parametrize(
    ("args", "kwargs", "found"),
    [
        ((), {}, "last"),
        ((), {"weights_path": "x"}, "x"),
        ((None, "x"), {}, "x"),
        ((), {"weights_path": Path("x"), "is_checkpoint_format": True}, "x"),
        ((iter(()),), {}, None),
        ((), {"weights_iterator": iter(()), "weights_path": "x"}, None),
        ((), {"is_checkpoint_format": False}, None),
        ((), {"weights_path": 7}, None),
        ((), {"an_argument_of_a_later_release": 1}, None),
        ((None, "x", True, 1), {}, None),
    ],
)
def test_what_a_reload_reads(args: Any, kwargs: Any, found: str | None) -> None:
    assert folder_of(args, kwargs, "last") == found
