"""Environment variables that may decide a block's bytes: part of the namespace, whatever engine it is.

An engine reads some hundred variables, and the libraries below it as many, between an image's file or a prompt's tokens
and the KV. Which kernel, which decoder of videos, which format of a scale: not one of them shows in the engine's
settings. So what counts is turned round. **Every variable counts that is set and belongs to the engine, or to a library
that computes for it, unless it was looked at and is harmless**: it says where something lies, listens or is logged, how
much room or time there is, or what becomes of logits. A variable that a later release brings counts until somebody has
looked at it, which costs sharing between engines that differ in it, and never a wrong byte.

Values count as they are written: ``1`` and ``true`` part two engines. Replicas are started alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_LIBRARIES = re.compile(
    r"(?:AITER|CUBLAS|CUBLASLT|CUDNN|CUTE|DEEP|DG|DNNL|FA|FLA|FLASHINFER|FLASH_ATTENTION|FMHA|GDN|INKLING|LAMPORT"
    r"|MINIMAX|MKL|MM_SPARSE|MSA|NVIDIA_TF32|ONEDNN|OPENCV|PYTORCH|ROCM_QUICK|TIMM|TORCH|TORCHDYNAMO|TORCHINDUCTOR"
    r"|TRITON|TRTLLM|XFORMERS)_\w+"
)
"""What computes for the engines, by the names that its variables begin with."""
_LIBRARIES_HARMLESS = re.compile(
    r"\w+_(?:ALLOC_CONF|AOT_CACHE|ARCH_LIST|AUTOTUNING_PRINT|CHECK|DIR|DYNAMIC_THREADS|HOME|KEEP_\w+|LIBRARY|NUM_THREADS"
    r"|PATH|REPOSITORY|THREADS|TIMEOUT)"
    r"|\w+_(?:DEBUG|DUMP|LOG|LOGS|PRINT|TRACE|VERBOSE)(?:_\w+)?|TORCH_(?:NCCL|DISTRIBUTED|SHOW|FR|CPP_LOG)_\w+"
    r"|PYTORCH_NVML_\w+|DG_USE_NVIDIA_TOOLS|FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED|MINIMAX_KERNELS_KVOUTER_COUNT_REPLICAS"
    r"|MM_SPARSE_ATTN_AOT_DISABLE|FLASHINFER_DISABLE_VERSION_CHECK|TRITON_PRINT_AUTOTUNING"
)
"""Where they keep what they have compiled, what they log, how many threads compile it."""
_OF_LIBRARIES = frozenset({"FORCE_QWENVL_VIDEO_READER", "VIDEO_MAX_PIXELS", "XHS_VIDEO_JPEG_QUALITY"})
_KUBERNETES = re.compile(r"\w+_(?:SERVICE_(?:HOST|PORT\w*)|PORT(?:_\d+_\w+)?)")
"""What Kubernetes puts into every container of a namespace that has a service named like an engine."""


def names(*groups: str) -> frozenset[str]:
    """Names that are written with spaces between them, in groups of one reason each."""
    return frozenset(name for group in groups for name in group.split())


@dataclass(frozen=True)
class Variables:
    """Which variables count for one engine."""

    prefixes: tuple[str, ...]
    """What the engine's own variables begin with."""
    named: frozenset[str]
    """Those of its own that begin otherwise."""
    harmless: frozenset[str]
    """Those that were looked at and decide no byte."""

    def counts(self, name: str) -> bool:
        """Whether a variable may decide bytes."""
        if name in self.harmless:
            return False
        if name in self.named or name in _OF_LIBRARIES:
            return True
        if name.startswith(self.prefixes):
            return not _KUBERNETES.fullmatch(name)
        return bool(_LIBRARIES.fullmatch(name)) and not _LIBRARIES_HARMLESS.fullmatch(name)

    def deciding(self, environ: Mapping[str, str]) -> dict[str, str]:
        """Those that are set and count, as they are written."""
        return {name: environ[name] for name in sorted(environ) if self.counts(name)}
