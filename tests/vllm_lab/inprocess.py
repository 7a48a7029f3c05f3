"""``LLM()`` in a process of its own, told what to do line by line."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from tests.lab.env import EngineError
from tests.lab.process import BOOT_S, EXIT_S, REPLY_S, LabProcess
from tests.vllm_lab.env import base_env

__all__ = ["LLM_DEFAULTS", "InProcess"]

LLM_DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": 32,
    "max_model_len": 2048,
    "max_num_batched_tokens": 512,
    "max_num_seqs": 16,
    "num_gpu_blocks_override": 512,
    "disable_log_stats": False,
    "seed": 0,
}
"""float32 because in bf16 a greedy output differs between a hit and no hit even with vLLM's own prefix cache."""


class InProcess(LabProcess):
    """``LLM()`` behind a line protocol. Methods of ``driver.Driver`` are called through :meth:`do`."""

    def __init__(
        self,
        model: Path | str,
        log: Path,
        *,
        pool: str | None,
        size: str = "256mib",
        matrix: str | None = None,
        env: Mapping[str, str | None] | None = None,
        inside: Sequence[str] = (),
        **llm: Any,
    ) -> None:
        """Starts the engine; *inside*: a command that the engine's own is appended to."""
        ranks = llm.get("tensor_parallel_size", 1) * llm.get("pipeline_parallel_size", 1)
        environment = base_env(pool=pool, size=size, ranks=ranks, matrix=matrix, env=env)
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        read_fd, write_fd = os.pipe()
        try:
            super().__init__(
                [*inside, sys.executable, "-m", "tests.vllm_lab.driver", str(write_fd)],
                environment,
                log,
                stdin=subprocess.PIPE,
                pass_fds=[write_fd],
            )
        except BaseException:
            os.close(read_fd)
            raise
        finally:
            os.close(write_fd)
        self._replies = os.fdopen(read_fd, "rb", buffering=0)
        self._buffer = b""
        self._info: dict[str, Any] | None = None
        self._send({"model": str(model), **LLM_DEFAULTS, **llm})

    def ready(self, timeout_s: float = BOOT_S) -> InProcess:
        """Waits until the engine stands. Raises EngineError with the reason otherwise."""
        if self._info is None:
            self._info = self._receive(timeout_s)
        return self

    @property
    def info(self) -> dict[str, Any]:
        """What ``Driver.info`` said at the start: version, connector, block_size, groups, worker_pids, ..."""
        self.ready()
        assert self._info is not None
        return self._info

    def do(self, name: str, *, reply_s: float = REPLY_S, **arguments: Any) -> Any:
        """Calls one method of the driver and waits for its answer."""
        self.ask(name, **arguments)
        return self.answer(reply_s)

    def ask(self, name: str, **arguments: Any) -> None:
        """Sends a call without waiting: two engines can be asked at once."""
        self.ready()
        self._send({"do": name, **arguments})

    def answer(self, reply_s: float = REPLY_S) -> Any:
        """The answer to the oldest :meth:`ask` that has none yet."""
        return self._receive(reply_s)

    def generate(self, requests: Sequence[Mapping[str, Any]], **more: Any) -> list[dict[str, Any]]:
        """All requests at once; see ``Driver.add`` for their keys and ``Driver._take`` for the records' keys."""
        return self.do("generate", requests=list(requests), **more)  # type: ignore[no-any-return]

    def each(self, requests: Sequence[Mapping[str, Any]], **more: Any) -> list[dict[str, Any]]:
        """One request after the other."""
        return self.do("each", requests=list(requests), **more)  # type: ignore[no-any-return]

    def exit(self) -> int:
        """Asks the engine to end by itself, and answers its exit status."""
        self._send({"do": "exit"})
        self.family()
        status = self.process.wait(EXIT_S)
        self.wait_gone()
        return status

    def close(self) -> None:
        """Ends it at once; an orderly :meth:`exit` takes seconds, and nothing of the engine's is worth keeping."""
        super().close()
        self._replies.close()
        if self.process.stdin:
            with contextlib.suppress(OSError):
                self.process.stdin.close()

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, message: Mapping[str, Any]) -> None:
        stdin: IO[bytes] | None = self.process.stdin
        assert stdin is not None
        stdin.write(json.dumps(message).encode() + b"\n")
        stdin.flush()

    def _receive(self, timeout_s: float) -> Any:
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0:
                raise EngineError(f"no answer within {timeout_s} s; its log ends:\n{self.log_tail()}")
            if select.select([self._replies], [], [], min(left, 1.0))[0]:
                chunk = self._replies.read(1 << 20)
                if not chunk:
                    raise EngineError(f"the engine is gone; its log ends:\n{self.log_tail()}")
                self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        message = json.loads(line)
        if "error" in message:
            raise EngineError(f"{message['error']}\nits log ends:\n{self.log_tail(15)}")
        return message["ok"]
