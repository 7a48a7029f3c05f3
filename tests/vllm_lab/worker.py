"""What the lab adds to vLLM's workers (``worker_extension_cls``): reading the device's KV blocks, byte by byte.

Imported inside the engine's worker processes, so it imports nothing of vLLM at the top and nothing of kvplug at all:
it is the witness, and must not share code with what it testifies about.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np


class LabWorker:
    """Methods mixed into the worker class; reached through ``collective_rpc`` by name, once per rank."""

    model_runner: Any
    rank: int

    def lab_pid(self) -> int:
        """Process id of this rank's worker."""
        return os.getpid()

    def lab_warm_up(self) -> None:
        """A dummy run. With eager execution the CPU worker leaves it out, though it is where a later pipeline stage
        gets its input buffers; without it the first step of a pipeline fails."""
        self.model_runner.profile_run()

    def lab_pages(self, block_ids: list[list[int]]) -> list[list[list[str]]]:
        """SHA-256 of each device page, as ``[group][position in block_ids[group]][layer of the group]``.

        A page is one layer's share of one block, as raw bytes, whatever they mean. Null blocks (id 0) give "".
        """
        return [
            [[hashlib.sha256(page).hexdigest() for page in pages] if pages else [""] for pages in group]
            for group in self._pages(block_ids)
        ]

    def lab_dump(self, block_ids: list[list[int]], folder: str) -> int:
        """Writes each page to ``folder/r<rank>.g<group>.p<position>.l<layer>``; answers how many were written."""
        count = 0
        for g, group in enumerate(self._pages(block_ids)):
            for p, pages in enumerate(group):
                for layer, page in enumerate(pages):
                    (Path(folder) / f"r{self.rank}.g{g}.p{p}.l{layer}").write_bytes(page)
                    count += 1
        return count

    def _pages(self, block_ids: list[list[int]]) -> list[list[list[bytes]]]:
        runner = self.model_runner
        config = runner.kv_cache_config
        layers = runner.vllm_config.compilation_config.static_forward_context
        out: list[list[list[bytes]]] = []
        for group, ids in zip(config.kv_cache_groups, block_ids, strict=True):
            tensors = [_tensor(layers[name]) for name in group.layer_names]
            out.append([[_page(t, b, config.num_blocks) for t in tensors] if b else [] for b in ids])
        return out


def _tensor(layer: Any) -> Any:
    """The layer's KV tensor; older releases keep a list with one entry per virtual engine."""
    cache = layer.kv_cache
    return cache[0] if isinstance(cache, (list, tuple)) else cache


def _page(tensor: Any, block: int, num_blocks: int) -> bytes:
    """Bytes of one block of one layer. The backend may split a block into several kernel blocks, one after another."""
    import torch

    per_block, rest = divmod(tensor.shape[0], num_blocks)
    if rest:
        raise ValueError(f"a KV tensor of shape {tuple(tensor.shape)} does not divide into {num_blocks} blocks")
    rows = tensor[block * per_block : (block + 1) * per_block].contiguous()
    data: np.ndarray[Any, Any] = rows.view(torch.uint8).cpu().numpy()
    return data.tobytes()
