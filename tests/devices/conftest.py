"""Tests marked ``gpu`` need a CUDA device: skipped where there is none, unless they were asked for by name."""

from __future__ import annotations

import os

import pytest

ASKED_ENV = "KVPLUG_TEST_GPU"
"""Set by ``just test-gpu``: then the lack of a GPU is an error."""


def gpu_problem() -> str | None:
    """Why there is no GPU to test with; None if there is one."""
    try:
        import torch
    except ImportError:
        return "there is no torch"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    problem = gpu_problem() if marked else None
    if problem is None:
        return
    if os.environ.get(ASKED_ENV):
        raise pytest.UsageError(f"the tests of CUDA copies need a GPU, and {problem}")
    for item in marked:
        item.add_marker(pytest.mark.skip(reason=f"{problem}: just test-gpu, on a machine with one"))
