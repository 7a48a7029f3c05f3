"""The bytes of the weights in memory: whether they are now what they were, after a sleep or a pause.

:func:`sample_of` reads a little of every tensor and tells quickly that they are others. :func:`digest_of` reads all of
them, on the device where they lie, and tells that they are the same. Both are made in the process that has the model,
and mean something only beside another of the same process: the digest's key is drawn when it starts.

The digest of a tensor on the CPU is blake3. Elsewhere it is, for each 4 MiB, two sums of its 32-bit words times random
64-bit numbers, modulo 2^64: two different chunks have the same with a probability of 2^-66 (two words that differ do so
by less than 2^32, so each sum is the same by chance only in at least its upper 33 bits).
"""

from __future__ import annotations

import itertools
import re
import secrets
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeAlias

from blake3 import blake3

SAMPLED_ELEMENTS: Final = 256
"""Of each tensor, spread over it."""
CHUNK_WORDS: Final = 1 << 20
"""So much is read at once: it takes 32 MiB of the device beside the weights."""
_SEED: Final = secrets.randbits(62)
Packed: TypeAlias = Callable[[Any], Any]
"""Of a layer whose weights are in no tensor: the object that has them, and never writes to them; None if unknown."""
_numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
"""Of each such object, a number that no other ever had."""
_next_number = itertools.count()
RAW_BYTES: Final = 1 << 20
"""Shorter tensors are read as they are, from wherever they lie."""
_NOT_WEIGHTS: Final = re.compile(r"kv_cache|lora|[AB]_buffer|topk_indices")
"""In the names of attributes in which layers have what they compute, and adapters, which come and go."""


def tensors_of(model: Any) -> Iterator[tuple[str, Any]]:
    """Names and tensors of a ``torch.nn.Module``: parameters, buffers, and what layers keep beside those."""
    import torch

    seen: set[int] = set()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        seen.add(id(tensor))
        yield name, tensor
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if _NOT_WEIGHTS.search(name):
                continue
            for i, one in enumerate(value if isinstance(value, (tuple, list)) else (value,)):
                if isinstance(one, torch.Tensor) and id(one) not in seen:
                    yield f"{prefix}.{name}.{i}", one


def _scalars(model: Any) -> list[str]:
    """Scales that layers keep as numbers."""
    return [
        f"{prefix}.{name}={value!r}"
        for prefix, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, float)
    ]


def sample_of(model: Any, where: bool = False) -> bytes:
    """16 bytes, of a sample of every tensor; ``where``: and of the addresses of all.

    An update of a model's weights moves practically every element that it touches; this notices a tensor that was
    changed in more than a few places. It is not an identity.
    """
    import torch

    digest = blake3()
    for name, tensor in tensors_of(model):
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // SAMPLED_ELEMENTS)].contiguous().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.data_ptr() if where else ''}\n".encode())
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.digest(length=16)


def digest_of(model: Any, packed: Packed | None = None) -> bytes:
    """32 bytes, of every byte of every tensor, and of the numbers beside them. ValueError if a layer's weights are
    in none, and ``packed`` does not know them.
    """
    digest = blake3(max_threads=blake3.AUTO)
    for prefix, layer in model.named_modules():
        if any(one is not None and one.numel() == 0 and _is_here(one) for one in layer._parameters.values()):
            has = packed(layer) if packed is not None else None
            if has is None:
                raise ValueError(f"{prefix}: the engine keeps these weights in no tensor")
            digest.update(f"{prefix} {_numbers.setdefault(has, next(_next_number))}\n".encode())
    factors: dict[Any, Any] = {}
    for name, tensor in tensors_of(model):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()} {tensor.device.type}\n".encode())
        _add(digest, tensor.detach(), factors)
    digest.update("\n".join(_scalars(model)).encode())
    return digest.digest()


def _add(digest: Any, tensor: Any, factors: dict[Any, Any]) -> None:
    """Adds a tensor's bytes, in the order in which they lie; ``factors``: of each device, once they were needed."""
    import torch

    if tensor.numel() == 0:
        return
    if not tensor.is_contiguous():  # engines keep some transposed
        tensor = tensor.permute(sorted(range(tensor.dim()), key=lambda d: -tensor.stride(d))).contiguous()
    if tensor.dim() == 0:
        tensor = tensor.reshape(1)
    octets = tensor.reshape(-1).view(torch.uint8)
    if _is_here(octets) or octets.numel() < RAW_BYTES:
        digest.update(octets.cpu().numpy())
        return
    device = octets.device
    if device not in factors:
        factors[device] = draw_factors().to(device)
    digest.update(chunk_sums(octets, factors[device]).cpu().numpy().tobytes())


def _is_here(tensor: Any) -> bool:
    """Whether the CPU reads it."""
    return bool(tensor.device.type == "cpu")


def draw_factors() -> Any:
    """(2, CHUNK_WORDS) int64: the same in this process, others in the next."""
    import torch

    draw = torch.Generator().manual_seed(_SEED)
    return torch.randint(-(1 << 63), (1 << 63) - 1, (2, CHUNK_WORDS), dtype=torch.int64, generator=draw)


def chunk_sums(octets: Any, factors: Any) -> Any:
    """(N, 2) int64 for the N chunks of a uint8 tensor of one dimension, where that and the factors lie."""
    import torch

    aligned = octets.storage_offset() % 4 == 0 and octets.data_ptr() % 4 == 0
    whole = octets.numel() // 4 * 4 if aligned else 0
    parts = [octets[:whole].view(torch.int32)] if whole else []
    if whole < octets.numel():
        parts.append(octets[whole:])
    return torch.stack(
        [
            (chunk.to(torch.int64) * factors[:, : chunk.numel()]).sum(1)
            for part in parts
            for chunk in part.split(CHUNK_WORDS)
        ]
    )
