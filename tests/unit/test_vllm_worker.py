"""The copy threads of a worker: whatever goes wrong in one, its job is over and the next one is done."""

from __future__ import annotations

import time
from typing import Any

import pytest

pytest.importorskip("vllm")

from kvplug.adapters.vllm.jobs import Job
from kvplug.adapters.vllm.worker import LoadResult, WorkerSide
from kvplug.threads import troubles

WAIT_S = 60.0


class Device:
    """Of a worker that is given no blocks."""

    chunk_bytes = 1

    def mark(self) -> None:
        return None

    def close(self) -> None:
        return None


class Store:
    """As much of one as a worker asks for without blocks."""

    class config:
        verify = "never"

    def close(self) -> None:
        return None


def test_an_error_that_nobody_foresaw_ends_no_copy_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy fails, and saying so fails too: both jobs are reported, and the thread goes on."""
    before = troubles().errors
    said: list[str] = []

    def warn(text: str) -> None:
        said.append(text)
        raise ArithmeticError("one that nobody foresaw")

    worker: Any = WorkerSide(Store(), Device(), [], None, warn)  # type: ignore[arg-type]
    inner = worker._over
    for number, kind in enumerate(("load", "store")):
        failed: list[int] = []

        def over(job: Job, *, ok: bool, counts: Any, bad: Any = None, failed: list[int] = failed) -> None:
            if not failed:
                failed.append(1)
                raise LookupError("while a job ended")
            inner(job, ok=ok, counts=counts, bad=bad)

        monkeypatch.setattr(worker, "_over", over)
        jobs = tuple(Job(10 * number + i, 0, ()) for i in range(2))
        for job in jobs:
            (worker.submit_loads if kind == "load" else worker.submit_stores)((job,), {})
        deadline = time.monotonic() + WAIT_S
        reported: set[int] = set()
        loaded: list[LoadResult] = []
        while len(reported) < 2 or (kind == "load" and len(loaded) < 2):
            assert time.monotonic() < deadline, (reported, loaded)
            report = worker.take_report()
            reported |= set(report.done) if report else set()
            loaded += worker.take_loaded(wait=False)
            time.sleep(0.01)
        assert [result.ok for result in loaded] == [False, True][: len(loaded)]
        assert troubles().errors[f"kvplug-{kind}"] == before.get(f"kvplug-{kind}", 0) + 1
    assert len(said) == 2
    assert worker.drain()
    worker.close()
