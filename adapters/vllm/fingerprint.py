"""A look at the weights that a worker holds, cheap enough to be taken before and after a call that may change them."""

from __future__ import annotations

from typing import Any

from blake3 import blake3

SAMPLED_ELEMENTS = 256


def weights_fingerprint(worker: Any) -> bytes:
    """In a worker: a digest of a sample of every parameter and buffer, spread over each. 16 bytes.

    An update of a model's weights moves practically every element that it touches; this notices a tensor that was
    changed in more than a few places. It is not an identity.
    """
    import torch

    digest = blake3()
    model = worker.get_model() if hasattr(worker, "get_model") else worker.worker.get_model()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // SAMPLED_ELEMENTS)].contiguous().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.data_ptr()}".encode())
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.digest(length=16)
