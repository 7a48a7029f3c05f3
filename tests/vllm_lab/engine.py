"""Runs real vLLM engines for tests, the benches and the demo, and leaves nothing of them behind.

Two ways to run one:

* :class:`InProcess`: ``LLM()`` in a process of its own behind ``driver.py``'s line protocol. Starts in seconds, can be
  stepped, shows block ids and device bytes. Scheduler and (with one rank) worker are the same process.
* :class:`Server`: ``vllm serve`` on a free loopback port, with its API server, engine core and worker processes.

Both start in their own process group without waiting (``ready()`` waits, with a deadline), so that several can start at
once, and both are context managers that kill the group and unlink what it left in /dev/shm. A pool belongs to the test:
:func:`temporary_pool` names one and removes it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import glob
import http.client
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

__all__ = [
    "BOOT_S",
    "Completion",
    "EngineError",
    "InProcess",
    "Server",
    "base_env",
    "matrix_path",
    "temporary_pool",
]

ROOT = Path(__file__).resolve().parents[2]
BOOT_S = 240.0
"""Longest wait for an engine to come up. Idle cores need 3 to 60 s; a loaded machine several times that."""
REPLY_S = 180.0
EXIT_S = 20.0
SHM = Path("/dev/shm")

_pool_numbers = itertools.count()


class EngineError(RuntimeError):
    """The engine did not start, answered with an error, or is gone. The message ends with the end of its log."""


@contextlib.contextmanager
def temporary_pool(name: str = "lab") -> Iterator[str]:
    """A pool name that nobody else has; what is found under it is unlinked at the end."""
    pool = f"{name}-{os.getpid()}-{next(_pool_numbers)}"
    try:
        yield pool
    finally:
        remove_pool(pool)


def remove_pool(pool: str) -> None:
    """Unlinks every file of this pool from /dev/shm (exactly this name: pools of others are left alone)."""
    for path in glob.glob(f"{glob.escape(str(SHM / f'kvplug.{pool}'))}.*"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def pool_files(pool: str) -> list[Path]:
    """The pool's files in /dev/shm, largest first: the first one is the segment."""
    found = [Path(p) for p in glob.glob(f"{glob.escape(str(SHM / f'kvplug.{pool}'))}.*")]
    return sorted(found, key=lambda p: p.stat().st_size, reverse=True)


def matrix_path(version: str) -> Path | None:
    """Folder of another vLLM release that ``install.sh`` put beside the main one, or None where it is missing."""
    folder = Path(sys.prefix) / "matrix" / version
    return folder if (folder / ".complete").exists() else None


def base_env(
    *,
    pool: str | None,
    size: str = "256mib",
    ranks: int = 1,
    matrix: str | None = None,
    env: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The environment of one engine: nothing of the caller's KVPLUG_*/VLLM_* settings, no network, quiet.

    ``pool`` None: kvplug is not loaded. ``ranks``: processes that compute; each gets its own cores where there are
    enough. ``matrix``: another vLLM version out of the version matrix.
    """
    out = {k: v for k, v in os.environ.items() if not k.startswith(("KVPLUG_", "VLLM_"))}
    path = [str(ROOT)]
    if matrix is not None:
        folder = matrix_path(matrix)
        if folder is None:
            raise EngineError(f"vLLM {matrix} is not installed: run tests/vllm_lab/install.sh")
        path.insert(0, str(folder))
    out.update(
        PYTHONPATH=os.pathsep.join(path),
        PYTHONUNBUFFERED="1",
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
        VLLM_NO_USAGE_STATS="1",
        DO_NOT_TRACK="1",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_HOST_IP="127.0.0.1",
        VLLM_PLUGINS="",
        OMP_WAIT_POLICY="PASSIVE",
    )
    if ranks > 1:
        out["VLLM_CPU_OMP_THREADS_BIND"] = _core_split(ranks)
    if pool is not None:
        out.update(VLLM_PLUGINS="kvplug", KVPLUG_POOL=pool, KVPLUG_SIZE=size, KVPLUG_VERIFY="always")
    out.update(env or {})
    return out


def _core_split(ranks: int) -> str:
    """VLLM_CPU_OMP_THREADS_BIND: the allowed cores dealt out in equal runs, or all on the same where they are few."""
    cores = sorted(os.sched_getaffinity(0))
    each = max(1, len(cores) // ranks)
    shares = [[cores[(r * each + i) % len(cores)] for i in range(each)] for r in range(ranks)]
    return "|".join(",".join(map(str, share)) for share in shares)


class _Process:
    """A process group of ours with a log file, and everything that it needs to go away without trace."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log: Path, **popen: Any) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._seen_shm: set[str] = set()
        self._family: dict[int, psutil.Process] = {}
        with log.open("ab") as sink:
            self.process = subprocess.Popen(
                list(command),
                env=dict(env),
                cwd=str(ROOT),
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **popen,
            )
        self.started = time.monotonic()

    @property
    def pid(self) -> int:
        return self.process.pid

    def family(self) -> list[psutil.Process]:
        """This process and all its living descendants; those seen once are remembered, also when orphaned."""
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.pid)
            for p in [root, *root.children(recursive=True)]:
                self._family.setdefault(p.pid, p)
        return [p for p in self._family.values() if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def roles(self) -> dict[str, int]:
        """Process ids by what vLLM calls the process: "api", "EngineCore", "Worker_TP0", "DPCoordinator", ..."""
        out = {"api": self.pid}
        for p in self.family():
            with contextlib.suppress(psutil.Error):
                title = " ".join(p.cmdline()).strip()
                if "VLLM::" in title:
                    out[title.split("VLLM::", 1)[1].split()[0]] = p.pid
        return out

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log_text().splitlines()[-lines:])

    def kill(self, pid: int | None = None) -> None:
        """SIGKILL to one process (default: the first), and to nothing else."""
        self._note_shm()
        target = self.pid if pid is None else pid
        with contextlib.suppress(ProcessLookupError):
            os.kill(target, signal.SIGKILL)
        if target == self.pid:
            self.process.wait(EXIT_S)

    def kill_all(self) -> None:
        """SIGKILL to the whole family at once, as a container that is taken away."""
        self._note_shm()
        family = self.family()
        for p in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                p.kill()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        psutil.wait_procs(family, timeout=EXIT_S)
        self.process.wait(EXIT_S)

    def wait_gone(self, timeout_s: float = EXIT_S) -> list[psutil.Process]:
        """Waits for the whole family to end; answers those that are still there."""
        return list(psutil.wait_procs(self.family(), timeout=timeout_s)[1])

    def close(self) -> None:
        """Ends everything and unlinks what vLLM left in /dev/shm. The pool is not touched: it outlives engines."""
        self.kill_all()
        for path in self._seen_shm:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def _note_shm(self) -> None:
        """Remembers files in /dev/shm that the family has open or mapped, except pools."""
        for p in self.family():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{p.pid}/maps").read_text().splitlines():
                    self._note_path(line.split(maxsplit=5)[-1])
            with contextlib.suppress(OSError):
                for fd in os.listdir(f"/proc/{p.pid}/fd"):
                    with contextlib.suppress(OSError):
                        self._note_path(os.readlink(f"/proc/{p.pid}/fd/{fd}"))

    def _note_path(self, path: str) -> None:
        if path.startswith(f"{SHM}/") and not path.startswith(f"{SHM}/kvplug.") and not path.endswith(" (deleted)"):
            self._seen_shm.add(path)


class InProcess(_Process):
    """``LLM()`` behind a line protocol. Methods of ``driver.Driver`` are called through :meth:`do`."""

    def __init__(
        self,
        model: Path | str,
        log: Path,
        *,
        pool: str | None,
        size: str = "256mib",
        matrix: str | None = None,
        env: Mapping[str, str] | None = None,
        **llm: Any,
    ) -> None:
        ranks = llm.get("tensor_parallel_size", 1) * llm.get("pipeline_parallel_size", 1)
        environment = base_env(pool=pool, size=size, ranks=ranks, matrix=matrix, env=env)
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        read_fd, write_fd = os.pipe()
        try:
            super().__init__(
                [sys.executable, "-m", "tests.vllm_lab.driver", str(write_fd)],
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
        if self.process.poll() is None and self._info is not None:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self.exit()
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


LLM_DEFAULTS: dict[str, Any] = dict(
    dtype="float32",
    enforce_eager=True,
    block_size=32,
    max_model_len=2048,
    max_num_batched_tokens=512,
    max_num_seqs=16,
    num_gpu_blocks_override=512,
    disable_log_stats=False,
    seed=0,
)
"""float32 because in bf16 a greedy output differs between a hit and no hit even with vLLM's own prefix cache."""


@dataclasses.dataclass
class Completion:
    """One answer of a :class:`Server`. Times in seconds; ``cached`` is vLLM's count of prompt tokens not computed."""

    tokens: list[int]
    ttft_s: float
    total_s: float
    prompt_tokens: int
    cached: int


class Server(_Process):
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
        env: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
    ) -> None:
        self.port = _free_port()
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


SERVE_ARGUMENTS = (
    *("--dtype", "float32", "--enforce-eager", "--block-size", "32", "--max-model-len", "2048"),
    *("--max-num-batched-tokens", "512", "--max-num-seqs", "16", "--num-gpu-blocks-override", "512"),
)
"""The same engine as :data:`LLM_DEFAULTS`, for ``vllm serve``."""


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


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
