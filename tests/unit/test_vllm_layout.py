"""Byte runs of a block: what is copied is the block's bytes, all of them and no others."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kvplug.adapters.devices.base import ByteRuns  # noqa: E402
from kvplug.adapters.devices.cpu import CpuCopy  # noqa: E402
from kvplug.adapters.vllm.layout import group_bytes, merge, tensor_runs  # noqa: E402
from kvplug.errors import UnsupportedEngineError  # noqa: E402


def filled(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    count = int(np.prod(shape))
    return torch.arange(count, dtype=torch.float64).to(dtype).reshape(shape)


LAYOUTS = {
    "dense": lambda: filled(5, 2, 8, 16),
    "half precision": lambda: filled(5, 2, 8, 16, dtype=torch.bfloat16),
    "tokens before heads": lambda: filled(5, 8, 2, 16).transpose(1, 2),
    "page padded at its end": lambda: filled(5, 300)[:, :256].unflatten(1, (2, 8, 16)),
    "keys and values apart": lambda: filled(2, 5, 8, 16).transpose(0, 1),
    "layers interleaved in a block": lambda: filled(5, 3, 2, 8, 16)[:, 1],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_block_goes_to_a_slot_and_back_unchanged(name: str) -> None:
    """Blocks 4, 0, 2 to a slot and back into blocks 1, 3, 0 of zeroed memory; the other blocks stay zero."""
    source = LAYOUTS[name]()
    storage = torch.zeros(len(source.untyped_storage()) // source.element_size(), dtype=source.dtype)
    target = storage.as_strided(source.shape, source.stride(), source.storage_offset())
    runs = group_bytes(["layer"], {"layer": source}).runs
    assert runs.part_nbytes == source[0].numel() * source.element_size()
    slots = np.zeros((3, runs.part_nbytes), dtype=np.uint8)
    addresses = np.array([slot.ctypes.data for slot in slots], dtype=np.int64)
    copy = CpuCopy()
    sums = copy.store(runs, np.array([4, 0, 2]), addresses, copy.mark())
    assert len(set(sums.tolist())) == 3
    back = group_bytes(["layer"], {"layer": target}).runs
    copy.load(back, addresses, np.array([1, 3, 0]), copy.mark())
    for theirs, ours in ((4, 1), (0, 3), (2, 0)):
        assert torch.equal(source[theirs], target[ours])
    assert not target[2].any()
    assert not target[4].any()


def test_runs_that_follow_each_other_are_joined() -> None:
    """Layers side by side in a block are one copy; the bytes and their order stay the same."""
    assert merge([(100, 64, 10), (110, 64, 6), (200, 64, 4), (204, 32, 4)]) == [
        (100, 64, 16),
        (200, 64, 4),
        (204, 32, 4),
    ]


def test_layers_that_share_a_cache_are_copied_once() -> None:
    """Two names of one tensor are one run."""
    cache = filled(5, 2, 8, 16)
    both = group_bytes(["a", "b"], {"a": cache, "b": cache})
    assert both.part_nbytes == cache[0].numel() * 4
    assert [page.layer for page in both.pages] == ["a"]


def test_a_layout_in_many_pieces_is_refused() -> None:
    """A block that is scattered over hundreds of pieces is not one that kvplug knows."""
    with pytest.raises(UnsupportedEngineError, match="pieces"):
        tensor_runs(filled(4, 128, 3, 2)[:, :, :, 0])


def test_a_layer_without_a_tensor_is_refused() -> None:
    """Nothing is guessed about a layer whose cache the engine did not register."""
    with pytest.raises(UnsupportedEngineError, match="no cache tensor"):
        group_bytes(["a"], {})


def test_no_runs_no_bytes() -> None:
    """A pipeline stage without a layer of the group has no part in its slots."""
    assert ByteRuns.of([]).part_nbytes == 0
