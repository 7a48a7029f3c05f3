"""What is told of the weights in memory: every byte counts, wherever it lies."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from kvplug.adapters.common import weightbytes  # noqa: E402
from kvplug.adapters.common.weightbytes import CHUNK_WORDS, chunk_sums, digest_of, draw_factors, sample_of  # noqa: E402


class Layer(torch.nn.Module):
    """A parameter, a transposed one, a buffer, a plain tensor, a scale, and a cache."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.weight = torch.nn.Parameter(torch.randn(70, 50, generator=draw), requires_grad=False)
        self.transposed = torch.nn.Parameter(
            torch.randn(50, 70, generator=draw).to(torch.bfloat16).t(), requires_grad=False
        )
        self.small = torch.nn.Parameter(torch.arange(3, dtype=torch.int8), requires_grad=False)
        self.register_buffer("scale", torch.tensor(2.0))
        self.absorbed = torch.randn(7, 9, generator=draw)
        self.parts = (torch.randn(3, generator=draw), torch.randn(3, generator=draw))
        self.lora_a_stacked = (torch.zeros(8),)
        self.scale_float = 2.0
        self.kv_cache = torch.zeros(64)


@pytest.fixture
def model() -> Any:
    return torch.nn.Sequential(Layer(), Layer())


@pytest.fixture(params=["cpu", "elsewhere"])
def anywhere(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to a digest: the second is the devices', on the CPU."""
    if request.param == "elsewhere":
        monkeypatch.setattr(weightbytes, "_is_here", lambda tensor: False)
        monkeypatch.setattr(weightbytes, "RAW_BYTES", 0)


CHANGES = {
    "a parameter's last": lambda layer: layer.weight.view(-1)[-1:].mul_(2),
    "a parameter's sign": lambda layer: layer.weight.view(-1)[1234:1235].neg_(),
    "two signs": lambda layer: layer.weight.view(-1)[100:102].neg_(),
    "two that are exchanged": lambda layer: layer.weight[:2].copy_(layer.weight[:2].flip(0)),
    "a transposed one": lambda layer: layer.transposed[3, 4:5].mul_(2),
    "a short one": lambda layer: layer.small[2:].add_(1),
    "a buffer": lambda layer: layer.scale.mul_(2),
    "a plain tensor": lambda layer: layer.absorbed[3, 3:4].mul_(2),
    "one of several": lambda layer: layer.parts[1][2:].mul_(2),
    "a number": lambda layer: setattr(layer, "scale_float", 3.0),
    "its type": lambda layer: setattr(layer, "absorbed", layer.absorbed.view(torch.int32)),
    "its shape": lambda layer: setattr(layer, "absorbed", layer.absorbed.reshape(9, 7)),
    "how it lies": lambda layer: setattr(layer, "absorbed", layer.absorbed.t().contiguous().t()),
}


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("what", CHANGES)
def test_every_byte_counts(model: Any, what: str) -> None:
    before = digest_of(model)
    assert digest_of(model) == before
    CHANGES[what](model[1])
    assert digest_of(model) != before


@pytest.mark.usefixtures("anywhere")
def test_what_is_computed_and_where_it_lies_do_not_count(model: Any) -> None:
    whole, sample = digest_of(model), sample_of(model)
    model[0].kv_cache.add_(1)
    model[0].lora_a_stacked[0].add_(1)
    model[0].weight = torch.nn.Parameter(model[0].weight.clone(), requires_grad=False)
    assert (digest_of(model), sample_of(model)) == (whole, sample)
    at = sample_of(model, where=True)
    model[0].weight = torch.nn.Parameter(model[0].weight.clone(), requires_grad=False)
    assert sample_of(model, where=True) != at


def test_a_sample_tells_an_update(model: Any) -> None:
    before = sample_of(model)
    model[1].weight.mul_(1.001)
    assert sample_of(model) != before


@pytest.mark.parametrize("offset", [0, 1, 4])
def test_each_chunk_has_sums_of_its_own(offset: int) -> None:
    """Two bytes in different chunks, and in the tail that is no word, also where words are not aligned."""
    size = CHUNK_WORDS * 8 + 7
    octets = torch.zeros(size + offset, dtype=torch.uint8)[offset:]
    factors = draw_factors()
    before = chunk_sums(octets, factors)
    seen = {tuple(before.reshape(-1).tolist())}
    for at in (0, CHUNK_WORDS * 4, CHUNK_WORDS * 8, size - 1):
        octets[at] = 1
        now = chunk_sums(octets, factors)
        assert int((now != before).any(1).sum()) == 1, "one chunk is another"
        seen.add(tuple(now.reshape(-1).tolist()))
        octets[at] = 0
    assert len(seen) == 5


def test_weights_that_are_in_no_tensor_are_those_of_the_object_that_has_them(model: Any) -> None:
    model[0].weight = torch.nn.Parameter(torch.zeros(0), requires_grad=False)
    model[0].call = lambda x: x
    with pytest.raises(ValueError, match="0: the engine keeps these weights in no tensor"):
        digest_of(model)
    with pytest.raises(ValueError, match="in no tensor"):
        digest_of(model, lambda layer: None)

    def packed(layer: Any) -> Any:
        return layer.call

    before = digest_of(model, packed)
    assert digest_of(model, packed) == before
    model[0].call = lambda x: x
    assert digest_of(model, packed) != before
