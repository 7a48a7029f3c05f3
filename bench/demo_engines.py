"""The engines that the demo can show: how each is started, asked, and what it says of where a prompt came from."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from kvplug.config import default_size_bytes
from tests.lab.env import EngineError
from tests.lab.models import LLAMA_BIG, ModelSpec, model_dir
from tests.lab.process import LabProcess
from tests.sglang_lab.env import installed
from tests.sglang_lab.server import Mode, SglangServer
from tests.vllm_lab.engine import Server

__all__ = ["BOOT_S", "Asked", "Sglang", "Show", "Vllm"]

BOOT_S = 600.0
DOWNLOAD_S = 3600.0
TINY_POOL_BYTES = 512 * 1024**2
SGLANG_MODEL = ModelSpec(layers=4, hidden=1024, heads=4, kv_heads=4, inter=4096)
"""SGLang's attention on the CPU computes a prompt's whole square, cached or not: so a model with little of it."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """An answer, and where its prompt's tokens came from. Times in seconds."""

    tokens: tuple[int, ...]
    ttft_s: float
    prompt_tokens: int
    computed: int
    own_cache: int
    pool: int


class Show(Protocol):
    """One engine as the demo needs it."""

    command: str
    """What a user would type."""
    prompt_tokens: int
    """Length of the prompt unless another is asked for."""
    exact: bool
    """Whether answers are equal between computing and reading (float32)."""
    pool_bytes: int

    def start(self, log: Path, pool: str, tokens: int) -> LabProcess:
        """Starts a server for prompts of so many tokens, without waiting."""

    def ready(self, server: LabProcess, *, first: bool) -> None:
        """Waits until it answers; the first may have to download its model."""

    def tokenize(self, server: LabProcess, text: str) -> list[int]: ...

    def ask(self, server: LabProcess, prompt: Sequence[int], out: int) -> Asked: ...


def _timeout(*, first: bool) -> float:
    return DOWNLOAD_S if first and os.environ.get("MODEL") else BOOT_S


class Vllm:
    """``vllm serve``: the tiny model on the CPU, or ``MODEL``, on a GPU where there is one."""

    command = "vllm serve, VLLM_PLUGINS=kvplug"
    prompt_tokens = 6000

    def __init__(self) -> None:
        model, gpu = os.environ.get("MODEL"), Path("/dev/nvidia0").exists()
        self.exact = model is None or not gpu
        self.pool_bytes = default_size_bytes() if model else min(TINY_POOL_BYTES, default_size_bytes())
        self._model = model or str(model_dir(LLAMA_BIG))
        self._env: dict[str, str | None] = {"KVPLUG_VERIFY": os.environ.get("KVPLUG_VERIFY")}
        self._arguments: tuple[str, ...] = ("--dtype", "float32")
        if model is not None:
            self._env["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE")
            if gpu:  # two engines at once on one device
                self._arguments = ("--gpu-memory-utilization", "0.4")
            else:
                self._env["VLLM_CPU_KVCACHE_SPACE"] = "4"

    def start(self, log: Path, pool: str, tokens: int) -> Server:
        room = str(tokens + 256)
        arguments = ("--max-model-len", room, "--enforce-eager", *self._arguments)
        if os.environ.get("MODEL") is None:
            arguments = (*arguments, "--max-num-batched-tokens", room)
        size = str(self.pool_bytes)
        return Server(self._model, log, pool=pool, size=size, env=self._env, arguments=arguments)

    def ready(self, server: LabProcess, *, first: bool) -> None:
        assert isinstance(server, Server)
        server.ready(_timeout(first=first))

    def tokenize(self, server: LabProcess, text: str) -> list[int]:
        assert isinstance(server, Server)
        return server.tokenize(text)

    def ask(self, server: LabProcess, prompt: Sequence[int], out: int) -> Asked:
        assert isinstance(server, Server)
        kinds = ("local_compute", "local_cache_hit", "external_kv_transfer")

        def counters() -> list[float]:
            metrics = server.metrics()
            return [metrics.get(f'vllm:prompt_tokens_by_source_total{{source="{kind}"}}', 0.0) for kind in kinds]

        before = counters()
        answer = server.complete(prompt, out, timeout_s=BOOT_S)
        computed, own, pool = (int(b - a) for a, b in zip(before, counters(), strict=True))
        return Asked(tuple(answer.tokens), answer.ttft_s, answer.prompt_tokens, computed, own, pool)


class Sglang:
    """``sglang serve`` on the CPU, with a model made here or with ``MODEL``."""

    exact = True
    prompt_tokens = 3000

    def __init__(self, mode: Mode) -> None:
        if not installed():
            raise EngineError("no SGLang here: tests/sglang_lab/install.sh .venv")
        self._mode: Mode = mode
        self.command = f"sglang serve --enable-kvplug --kvplug-mode {mode}"
        model = os.environ.get("MODEL")
        self.pool_bytes = default_size_bytes() if model else min(TINY_POOL_BYTES, default_size_bytes())
        self._model = model or str(model_dir(SGLANG_MODEL))
        self._env = {"HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE")} if model else {}

    def start(self, log: Path, pool: str, tokens: int) -> SglangServer:
        room = str(tokens + 256)
        return SglangServer(
            self._model,
            log,
            pool=pool,
            mode=self._mode,
            size=str(self.pool_bytes),
            settings={"verify": os.environ.get("KVPLUG_VERIFY", "never")},
            env=self._env,
            arguments=("--context-length", room, "--max-total-tokens", str(2 * tokens + 1024)),
        )

    def ready(self, server: LabProcess, *, first: bool) -> None:
        assert isinstance(server, SglangServer)
        server.ready(_timeout(first=first))

    def tokenize(self, server: LabProcess, text: str) -> list[int]:
        assert isinstance(server, SglangServer)
        return list(server.post("/tokenize", {"model": "m", "prompt": text})["tokens"])

    def ask(self, server: LabProcess, prompt: Sequence[int], out: int) -> Asked:
        assert isinstance(server, SglangServer)
        answer = server.generate(prompt, out, timeout_s=BOOT_S)
        # What a linker brings counts as the host's in SGLang's words; with a host cache, that one's own is told apart.
        own = int(answer.details.get("device") or 0)
        if "storage" in answer.details:
            own += int(answer.details.get("host") or 0)
        computed = answer.prompt_tokens - answer.cached
        return Asked(
            tuple(answer.tokens), answer.ttft_s, answer.prompt_tokens, computed, own, max(0, answer.cached - own)
        )
