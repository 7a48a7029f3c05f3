"""A plugin of SGLang's: what older releases lack without an accelerator, and an ear in every scheduler.

The ear is a Unix socket, one for each rank, in the folder that ``LAB_SGLANG_EAR`` names. A line of JSON that comes in,
``{"call": "module:function", "arguments": {...}}``, is answered by what that function returns when it is called, on a
thread of its own, with the scheduler first.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import socket
import threading
import traceback
import types
from pathlib import Path
from typing import Any

EAR = "LAB_SGLANG_EAR"
ATTENTION = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"


KERNELS = (
    "fused_gdn_gating_cpu",
    "fused_sigmoid_gating_delta_rule_update_cpu",
    "chunk_gated_delta_rule_cpu",
    "fused_sigmoid_mul_cpu",
)
"""Operators of ``sgl_kernel`` that SGLang's modules look up when they are imported."""


def install() -> None:
    """Called by SGLang in each of its processes, before anything of the engine is made."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    _unpinned_memory()
    _named_kernels()
    _paged_allocation()
    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.__init__", _before_scheduler, HookType.BEFORE)
    for method in ("forward_extend", "forward_decode"):
        HookRegistry.register(f"{ATTENTION}.{method}", _windowed_attention, HookType.AROUND)
    if os.environ.get(EAR):
        HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.__init__", _listen, HookType.AFTER)


def _before_scheduler(*args: Any, **kwargs: Any) -> None:
    from sglang.srt.models.deepseek_common import attention_backend_handler as handler

    from sglang_lab import short_conv

    short_conv.install()
    # Latent attention in plain torch works on the latent itself; SGLang would unfold it for a prefill.
    handler.AttentionBackendRegistry.register("torch_native", lambda *_: handler.AttnForwardMethod.MLA)


def _windowed_attention(
    original: Any, backend: Any, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, *args: Any, **kwargs: Any
) -> Any:
    """Attention by plain torch writes a layer with a sliding window to that layer's own pool, and reads from it by the
    places of the other pool. Here it reads by the right ones."""
    rest = (q, k, v, layer, forward_batch, *args)
    pool, places = backend.token_to_kv_pool, backend.req_to_token_pool
    if not (backend.use_sliding_window_kv_pool and pool.layers_mapping[layer.layer_id][1]):
        return original(backend, *rest, **kwargs)
    translated = pool.translate_loc_from_full_to_swa(places.req_to_token)
    backend.req_to_token_pool = types.SimpleNamespace(req_to_token=translated)
    try:
        return original(backend, *rest, **kwargs)
    finally:
        backend.req_to_token_pool = places


def _listen(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    from sglang.srt.distributed.parallel_state import get_tensor_model_parallel_rank

    path = Path(os.environ[EAR]) / f"rank{get_tensor_model_parallel_rank()}"
    path.unlink(missing_ok=True)
    ear = socket.socket(socket.AF_UNIX)
    ear.bind(str(path))
    ear.listen(4)
    threading.Thread(target=_hear, args=(ear, scheduler), name="sglang-lab-ear", daemon=True).start()
    return result


def _hear(ear: socket.socket, scheduler: Any) -> None:
    while True:
        caller, _ = ear.accept()
        with caller, caller.makefile("rwb") as stream:
            try:
                asked = json.loads(stream.readline())
                module, _, name = asked["call"].partition(":")
                found = getattr(importlib.import_module(module), name)
                answer = {"result": found(scheduler, **asked["arguments"])}
            except Exception:  # noqa: BLE001 - the caller is told
                answer = {"error": traceback.format_exc()}
            try:
                stream.write(json.dumps(answer).encode() + b"\n")
            except OSError:  # the caller has gone
                continue


def _unpinned_memory() -> None:
    """Memory can't be pinned without an accelerator: torch refuses, where there would be nothing to do."""
    import torch

    def unpinned(make: Any) -> Any:
        @functools.wraps(make)
        def made(*args: Any, **kwargs: Any) -> Any:
            kwargs.pop("pin_memory", None)
            return make(*args, **kwargs)

        return made

    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    for maker in ("zeros", "empty", "tensor"):
        setattr(torch, maker, unpinned(getattr(torch, maker)))


def _named_kernels() -> None:
    import sgl_kernel
    import torch

    for name in KERNELS:
        if not hasattr(torch.ops.sgl_kernel, name):
            setattr(torch.ops.sgl_kernel, name, getattr(sgl_kernel, name))


class _Launched:
    """Stands where a Triton kernel is: launched as ``kernel[grid](...)``, and is a function."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def __getitem__(self, grid: Any) -> Any:
        return self._function


def _paged_allocation() -> None:
    """Before 0.5.22 the page allocator had no way without Triton."""
    import torch
    from sglang.srt.mem_cache.allocator import paged

    if hasattr(paged, "alloc_decode_naive"):
        return

    def extend(prefix_lens: Any, seq_lens: Any, last_loc: Any, free: Any, out: Any, _bs: int, page_size: int) -> None:
        if not free.numel():  # the caller sees to it, after the launch
            free = torch.zeros(1, dtype=torch.int64)
        paged.alloc_extend_naive(prefix_lens, seq_lens, last_loc, free, out, page_size, "cpu")

    def decode(seq_lens: Any, last_loc: Any, free: Any, out: Any, _bs: int, page_size: int) -> None:
        fresh = (seq_lens - 1) % page_size == 0
        rank = torch.cumsum(fresh.to(torch.int64), 0) - fresh.to(torch.int64)
        pages = free if free.numel() else torch.zeros(1, dtype=torch.int64)
        out.copy_(torch.where(fresh, pages[rank.clamp(max=pages.numel() - 1)] * page_size, last_loc + 1))

    paged.alloc_extend_kernel = _Launched(functools.wraps(paged.alloc_extend_naive)(extend))
    paged.alloc_decode_kernel = _Launched(decode)
