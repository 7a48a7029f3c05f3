"""``vllm serve`` on a free loopback port, with its API server, engine core and worker processes."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import http.client
import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.lab.env import EngineError, free_port
from tests.lab.process import BOOT_S, EXIT_S, REPLY_S, LabProcess
from tests.vllm_lab.env import base_env

__all__ = ["SERVE_ARGUMENTS", "Completion", "Server", "parse_metrics"]

SERVE_ARGUMENTS = (
    *("--dtype", "float32", "--enforce-eager", "--block-size", "32", "--max-model-len", "2048"),
    *("--max-num-batched-tokens", "512", "--max-num-seqs", "16", "--num-gpu-blocks-override", "512"),
)
"""The same engine as :data:`LLM_DEFAULTS`, for ``vllm serve``."""


@dataclasses.dataclass
class Completion:
    """One answer of a :class:`Server`. Times in seconds; ``cached`` is vLLM's count of prompt tokens not computed."""

    tokens: list[int]
    ttft_s: float
    total_s: float
    prompt_tokens: int
    cached: int


class Server(LabProcess):
    """``vllm serve`` on loopback."""

    def __init__(
        self,
        model: Path | str,
        log: Path,
        *,
        pool: str | None,
        size: str = "256mib",
        ranks: int = 1,
        matrix: str | None = None,
        env: Mapping[str, str | None] | None = None,
        arguments: Sequence[str] = (),
    ) -> None:
        self.port = free_port()
        environment = base_env(pool=pool, size=size, ranks=ranks, matrix=matrix, env=env)
        command = [
            *[sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)],
            *["--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "m"],
            *["--enable-prompt-tokens-details", "--disable-uvicorn-access-log", *arguments],
        ]
        super().__init__(command, environment, log)

    def ready(self, timeout_s: float = BOOT_S) -> Server:
        """Waits for /health. Raises EngineError when the server ends or the deadline passes first."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise EngineError(f"vllm serve ended with {self.process.returncode}; its log ends:\n{self.log_tail()}")
            with contextlib.suppress(OSError), urllib.request.urlopen(self.url("/health"), timeout=2) as answer:
                if answer.status == 200:
                    self.family()
                    return self
            time.sleep(0.2)
        raise EngineError(f"vllm serve was not healthy within {timeout_s} s; its log ends:\n{self.log_tail()}")

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def complete(
        self,
        prompt: Sequence[int] | str,
        max_tokens: int = 8,
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = REPLY_S,
        **more: Any,
    ) -> Completion:
        """One greedy completion over HTTP, streamed, so that the time to the first token is the client's."""
        body = {
            "model": "m",
            "prompt": list(prompt) if not isinstance(prompt, str) else prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            **more,
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        tokens: list[int] = []
        first = None
        usage: dict[str, Any] = {}
        began = time.perf_counter()
        try:
            connection.request(
                "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json", **(headers or {})}
            )
            answer = connection.getresponse()
            if answer.status != 200:
                raise EngineError(f"HTTP {answer.status}: {answer.read()[:2000]!r}; the log ends:\n{self.log_tail()}")
            for line in answer:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise EngineError(f"{event['error']}; the log ends:\n{self.log_tail()}")
                usage = event.get("usage") or usage
                for choice in event.get("choices", ()):
                    if choice.get("token_ids"):
                        first = first or time.perf_counter()
                        tokens += choice["token_ids"]
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"{type(error).__name__}: {error}; the log ends:\n{self.log_tail()}") from error
        finally:
            connection.close()
        end = time.perf_counter()
        details = usage.get("prompt_tokens_details") or {}
        return Completion(
            tokens=tokens,
            ttft_s=(first or end) - began,
            total_s=end - began,
            prompt_tokens=usage.get("prompt_tokens", 0),
            cached=details.get("cached_tokens") or 0,
        )

    def tokenize(self, text: str) -> list[int]:
        """The model's token ids of a text."""
        body = json.dumps({"model": "m", "prompt": text}).encode()
        request = urllib.request.Request(
            self.url("/tokenize"), data=body, method="POST", headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return list(json.load(answer)["tokens"])

    def complete_many(self, prompts: Sequence[Sequence[int]], max_tokens: int = 8, **more: Any) -> list[Completion]:
        """All at once, one connection each."""
        with concurrent.futures.ThreadPoolExecutor(max(1, len(prompts))) as threads:
            return list(threads.map(lambda p: self.complete(p, max_tokens, **more), prompts))

    def metrics(self) -> dict[str, float]:
        """/metrics, summed over label sets except ``source``: ``vllm:...`` and ``kvplug_...`` samples by name."""
        with urllib.request.urlopen(self.url("/metrics"), timeout=30) as answer:
            return parse_metrics(answer.read().decode())

    def post(self, path: str, body: Any = None, timeout_s: float = 60.0) -> int:
        """POST to an administrative route; answers the HTTP status."""
        data = json.dumps(body).encode() if body is not None else b""
        request = urllib.request.Request(
            self.url(path), data=data, method="POST", headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return int(answer.status)

    def stop(self) -> None:
        """SIGTERM, as an operator would; then waits for the family to be gone."""
        self._note_shm()
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(EXIT_S)
        self.wait_gone()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def parse_metrics(text: str) -> dict[str, float]:
    """Prometheus text to name → value; label sets are summed, except that ``source`` stays in the name."""
    from prometheus_client.parser import text_string_to_metric_families

    out: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith(("vllm:", "kvplug_")) and not sample.name.endswith("_created"):
                source = sample.labels.get("source")
                name = f'{sample.name}{{source="{source}"}}' if source else sample.name
                out[name] = out.get(name, 0.0) + sample.value
    return out
