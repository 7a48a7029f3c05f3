"""``sglang serve`` on a free loopback port, with its scheduler (one process for each rank) and its detokenizer."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import http.client
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import psutil

from tests.lab.env import free_port
from tests.lab.models import ModelSpec
from tests.lab.process import BOOT_S, EXIT_S, REPLY_S, LabProcess
from tests.sglang_lab.env import MAIN, EngineError, base_env
from tests.sglang_lab.models import serving_arguments
from tests.sglang_lab.zygote import fork_server, may_fork

__all__ = ["HICACHE_ARGUMENTS", "PAGE", "SERVE_ARGUMENTS", "Answer", "Mode", "SglangServer"]

Mode = Literal["linker", "hicache", "auto"]

PAGE = 64
"""Tokens in a page of the lab's servers, unless a test says otherwise."""

SERVE_ARGUMENTS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--dtype", "float32", "--random-seed", "0"),
    *("--max-total-tokens", "8192", "--max-running-requests", "8", "--context-length", "4096"),
    *("--skip-server-warmup", "--enable-metrics", "--sleep-on-idle"),
)
HICACHE_ARGUMENTS = (
    *("--hicache-ratio", "2", "--hicache-io-backend", "direct", "--hicache-mem-layout", "page_first_direct"),
)
"""How SGLang's host cache works where the device is the CPU."""

LINE = 400
"""Characters of a line of the log that are shown with an error."""

ENTRY = "import sys; sys.argv[0] = 'sglang'; from sglang.cli.main import main; main()"


@dataclasses.dataclass
class Answer:
    """One answer of a :class:`SglangServer`. Times in seconds.

    ``cached``: prompt tokens that were not computed; ``details``: the same by where they came from, in SGLang's words.
    ``margin``: least distance in log-probability to the runner-up over all tokens, where it was asked for.
    """

    tokens: list[int]
    ttft_s: float
    total_s: float
    prompt_tokens: int
    cached: int
    details: dict[str, Any]
    margin: float | None = None
    finish: dict[str, Any] | None = None


class SglangServer(LabProcess):
    """``sglang serve`` on loopback. Starts at once; :meth:`ready` waits.

    ``pool`` None: kvplug is not loaded. ``settings``: more of what ``--kvplug-config`` may hold. ``hicache``: SGLang's
    host cache runs on the CPU with the lab's copies; None: as ``mode`` needs it. ``version``: an SGLang release.
    ``cold``: in interpreters of its own, three times slower, instead of forked from one that has imported SGLang
    already (see ``zygote``); None: only where ``env`` needs that.
    """

    def __init__(
        self,
        model: ModelSpec | Path | str,
        log: Path,
        *,
        pool: str | None,
        mode: Mode = "linker",
        size: str = "256mib",
        settings: Mapping[str, Any] | None = None,
        tp: int = 1,
        page_size: int = PAGE,
        hicache: bool | None = None,
        version: str = MAIN,
        env: Mapping[str, str | None] | None = None,
        arguments: Sequence[str] = (),
        cold: bool | None = None,
    ) -> None:
        self._again = {k: v for k, v in locals().items() if k not in ("self", "__class__", "log")}
        self.port = free_port()
        self.headers: dict[str, str] = {}  # of get and post
        self.tp = tp
        self._ear = Path(tempfile.mkdtemp(prefix="sglang-lab-"))
        hicache = mode != "linker" and pool is not None if hicache is None else hicache
        plugins = (*(["lab_hicache"] if hicache else []), *(["kvplug"] if pool is not None else []))
        self._version = version
        self._cold = not may_fork(env) if cold is None else cold
        command = [
            *["serve", *serving_arguments(model), "--served-model-name", "m"],
            *["--host", "127.0.0.1", "--port", str(self.port), "--page-size", str(page_size), "--tp-size", str(tp)],
            *SERVE_ARGUMENTS,
            *(HICACHE_ARGUMENTS if hicache else ()),
        ]
        if pool is not None:
            config = {"pool": pool, "size": size, "verify": "always", **(settings or {})}
            command += ["--enable-kvplug", "--kvplug-mode", mode, "--kvplug-config", json.dumps(config)]
        environment = base_env(
            version=version, plugins=plugins, tp=tp, env={"LAB_SGLANG_EAR": str(self._ear), **(env or {})}
        )
        super().__init__([*command, *arguments], environment, log)

    def _start(self, command: Sequence[str], env: Mapping[str, str], sink: Any, **popen: Any) -> Any:
        if self._cold:
            return super()._start([sys.executable, "-c", ENTRY, *command], env, sink, **popen)
        return fork_server(command, env, self.log, version=self._version, spares=self.tp + 1)

    def ready(self, timeout_s: float = BOOT_S) -> SglangServer:
        """Waits for /health. Raises EngineError when the server ends or the deadline passes first."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise EngineError(
                    f"sglang serve ended with {self.process.returncode}; its log ends:\n{self.log_tail()}"
                )
            with contextlib.suppress(OSError), urllib.request.urlopen(self.url("/health"), timeout=5) as answer:
                if answer.status == 200:
                    self.family()
                    return self
            time.sleep(0.1)
        raise EngineError(f"sglang serve was not healthy within {timeout_s} s; its log ends:\n{self.log_tail()}")

    def again(self, log: Path | None = None) -> SglangServer:
        """Another server started as this one was: on the same pool, with a port of its own."""
        return SglangServer(log=log or self.log, **self._again)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def roles(self) -> dict[str, int]:
        """Process ids by what SGLang calls the process: "api", "scheduler" or "scheduler_TP0", "detokenizer", ..."""
        out = {"api": self.pid}
        for p in self.family():
            with contextlib.suppress(psutil.Error):
                title = " ".join(p.cmdline()).strip()
                if title.startswith("sglang::"):
                    out[title.removeprefix("sglang::").split()[0]] = p.pid
        return out

    def log_tail(self, lines: int = 40) -> str:
        """Without the rest of long lines: SGLang says all of its settings in one."""
        return "\n".join(line[:LINE] for line in super().log_tail(lines).splitlines())

    def generate(
        self,
        prompt: Sequence[int] | str,
        max_tokens: int = 8,
        *,
        margin: bool = False,
        timeout_s: float = REPLY_S,
        **more: Any,
    ) -> Answer:
        """One greedy completion, streamed, so that the time to the first token is the client's.

        ``more`` goes into the body: ``lora_path``, ``extra_key``, ``cache_salt``, ``rid``, ``sampling_params``...
        Raises EngineError for anything but an answer.
        """
        text = "text" if isinstance(prompt, str) else "input_ids"
        sampling = {
            "temperature": 0,
            "max_new_tokens": max_tokens,
            "ignore_eos": True,
            **more.pop("sampling_params", {}),
        }
        body = {
            text: prompt if isinstance(prompt, str) else list(prompt),
            "sampling_params": sampling,
            "stream": True,
            **more,
        }
        if margin:
            body.update(return_logprob=True, top_logprobs_num=2)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        first = None
        event: dict[str, Any] = {}
        began = time.perf_counter()
        try:
            connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status != 200:
                raise EngineError(f"HTTP {answer.status}: {answer.read()[:2000]!r}; the log ends:\n{self.log_tail()}")
            for line in answer:
                if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise EngineError(f"{event['error']}; the log ends:\n{self.log_tail()}")
                    first = first or time.perf_counter()
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"{type(error).__name__}: {error}; the log ends:\n{self.log_tail()}") from error
        finally:
            connection.close()
        end = time.perf_counter()
        meta = event.get("meta_info") or {}
        return Answer(
            tokens=list(event.get("output_ids") or ()),
            ttft_s=(first or end) - began,
            total_s=end - began,
            prompt_tokens=meta.get("prompt_tokens", 0),
            cached=meta.get("cached_tokens") or 0,
            details=meta.get("cached_tokens_details") or {},
            margin=_margin(meta.get("output_top_logprobs") or ()) if margin else None,
            finish=meta.get("finish_reason"),
        )

    def generate_many(self, prompts: Sequence[Sequence[int]], max_tokens: int = 8, **more: Any) -> list[Answer]:
        """All at once, one connection each."""
        with concurrent.futures.ThreadPoolExecutor(max(1, len(prompts))) as threads:
            return list(threads.map(lambda p: self.generate(p, max_tokens, **more), prompts))

    def get(self, path: str, timeout_s: float = 60.0) -> Any:
        """GET; answers the JSON, or the text where it is none. urllib.error.HTTPError for a status of 400 and above."""
        request = urllib.request.Request(self.url(path), headers=self.headers)
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return _decoded(answer.read())

    def post(self, path: str, body: Any = None, timeout_s: float = 60.0, method: str = "POST") -> Any:
        """The same for POST (or another method), with a body that becomes JSON."""
        request = urllib.request.Request(
            self.url(path),
            data=json.dumps(body).encode() if body is not None else b"",
            method=method,
            headers={"Content-Type": "application/json", **self.headers},
        )
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return _decoded(answer.read())

    def flush(self) -> None:
        """Empties the device's and the host's cache, not the pool. Waits until SGLang is idle enough to do it."""
        deadline = time.monotonic() + EXIT_S
        while True:
            with contextlib.suppress(urllib.error.HTTPError):
                self.post("/flush_cache")
                return
            if time.monotonic() > deadline:
                raise EngineError(f"/flush_cache was refused for {EXIT_S} s; the log ends:\n{self.log_tail()}")
            time.sleep(0.05)

    def metrics(self) -> dict[str, float]:
        """/metrics, summed over labels: ``sglang:...`` and ``kvplug_...`` samples by name."""
        from prometheus_client.parser import text_string_to_metric_families

        out: dict[str, float] = {}
        with urllib.request.urlopen(self.url("/metrics"), timeout=30) as answer:
            for family in text_string_to_metric_families(answer.read().decode()):
                for sample in family.samples:
                    if sample.name.startswith(("sglang:", "kvplug_")) and not sample.name.endswith("_created"):
                        out[sample.name] = out.get(sample.name, 0.0) + sample.value
        return out

    def ask(self, call: str, rank: int = 0, timeout_s: float = 60.0, **arguments: Any) -> Any:
        """Calls ``module:function`` inside the scheduler of *rank* as ``function(scheduler, **arguments)``, on a thread
        beside the scheduler's own. What goes in and comes out is JSON. Raises EngineError with the trace it left."""
        with socket.socket(socket.AF_UNIX) as mouth:
            mouth.settimeout(timeout_s)
            mouth.connect(str(self._ear / f"rank{rank}"))
            with mouth.makefile("rwb") as stream:
                stream.write(json.dumps({"call": call, "arguments": arguments}).encode() + b"\n")
                stream.flush()
                line = stream.readline()
        answer = json.loads(line) if line else {"error": "the scheduler hung up"}
        if "error" in answer:
            raise EngineError(f"{call} on rank {rank}: {answer['error']}")
        return answer["result"]

    def stop(self) -> None:
        """SIGTERM, as an operator would; then waits for the family to be gone."""
        self._note_shm()
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(EXIT_S)
        self.wait_gone()

    def close(self) -> None:
        super().close()
        shutil.rmtree(self._ear, ignore_errors=True)

    def __enter__(self) -> SglangServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _margin(top: Sequence[Any]) -> float:
    """From [[(log-probability, token, text), the runner-up], ...], one entry for each token of the output."""
    return min((entry[0][0] - entry[1][0] for entry in top if entry and len(entry) > 1), default=float("inf"))


def _decoded(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return data.decode(errors="replace")
