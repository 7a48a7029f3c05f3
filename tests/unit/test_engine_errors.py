"""Whose fault an error is: an engine that kvplug can't work with, one that breaks its contract, or a device."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kvplug import errors  # noqa: E402
from kvplug.adapters.devices import device_of, for_device  # noqa: E402
from kvplug.adapters.sglang.devicepools import KV, LayerBuffer, SourcePool, lay_out  # noqa: E402
from kvplug.adapters.sglang.hostpages import HostPages, flat_addresses, host_pages, verdict  # noqa: E402
from kvplug.adapters.sglang.pagekeys import mask, page_keys  # noqa: E402
from kvplug.adapters.vllm.layout import group_bytes, tensor_runs  # noqa: E402

KINDS = (errors.UnsupportedEngineError, errors.EngineContractError, errors.DeviceError)
HINT = "; please report this with the engine's version"


def pool() -> SourcePool:
    return lay_out({KV: [LayerBuffer(0, torch.zeros(16, 8), 4)]}, {KV: 4}, 1, replicated=False).sources[KV]


def host_pool(addresses: int = 1) -> Any:
    return SimpleNamespace(get_page_buffer_meta=lambda indices: ([0] * addresses, [8]), kv_buffer=object(), page_size=4)


def pages() -> HostPages:
    return host_pages("kv", host_pool(), replicated=False)


AT_START: dict[str, Callable[[], object]] = {
    "layers on several devices": lambda: device_of([torch.zeros(4), torch.empty(4, device="meta")]),
    "a model without full attention": lambda: lay_out({}, {}, 1, replicated=False),
    "a layer that is not dense": lambda: lay_out(
        {KV: [LayerBuffer(0, torch.zeros(48, 4, 8)[:, :, :4], 4)]}, {KV: 4}, 1, replicated=False
    ),
    "a host pool without addresses": lambda: host_pages("kv", host_pool(2), replicated=False),
    "a layer without a tensor": lambda: group_bytes(["layer"], {}),
    "a tensor that repeats its bytes": lambda: tensor_runs(torch.zeros(4, 1).expand(4, 8)),
}

WHILE_RUNNING: dict[str, Callable[[], object]] = {
    "indices of half a page": lambda: pool().block_ids(torch.arange(6)),
    "indices out of order": lambda: pool().block_ids(torch.tensor([0, 1, 2, 3, 4, 6, 5, 7])),
    "a page beyond the pool": lambda: pool().block_ids(torch.arange(16, 20)),
    "fewer host indices than pages": lambda: pages().fragments(torch.arange(4), 2),
    "no host indices": lambda: pages().fragments(None, 1),
    "a page that is not contiguous": lambda: flat_addresses([torch.zeros(4), torch.zeros(4, 4)[:, 0]]),
    "an unknown hit policy": lambda: verdict("of_tomorrow", np.ones(3, bool)),
    "a page hash of another form": lambda: page_keys(["00" * 32, "00"], mask(b"root", "kv", 0)),
}


def raised(call: Callable[[], object]) -> errors.KvplugError:
    with pytest.raises(errors.KvplugError) as found:
        call()
    return found.value


@pytest.mark.parametrize("what", AT_START)
def test_what_an_engine_starts_with_is_unsupported(what: str) -> None:
    assert type(raised(AT_START[what])) is errors.UnsupportedEngineError


@pytest.mark.parametrize("what", WHILE_RUNNING)
def test_what_an_engine_asks_while_it_runs_breaks_its_contract(what: str) -> None:
    error = raised(WHILE_RUNNING[what])
    assert type(error) is errors.EngineContractError
    said = str(error)
    assert said.endswith(HINT)
    assert said.count(HINT) == 1
    assert str(pickle.loads(pickle.dumps(error))) == said


def test_the_values_are_named() -> None:
    """Which page it was, and what was found there."""
    assert "page 1 of 2, from 4 on" in str(raised(WHILE_RUNNING["indices out of order"]))
    assert "page 1 of 2 has 16 bytes on cpu" in str(raised(WHILE_RUNNING["a page that is not contiguous"]))
    assert "one is '00'" in str(raised(WHILE_RUNNING["a page hash of another form"]))


def test_a_device_without_copies_is_the_devices_fault() -> None:
    store: Any = None  # it is not looked at
    assert type(raised(lambda: for_device("xpu:0", store, []))) is errors.DeviceError
    assert issubclass(errors.DeviceCopyError, errors.DeviceError)


@pytest.mark.parametrize("kind", KINDS)
def test_who_catches_one_kind_catches_no_other(kind: type[errors.KvplugError]) -> None:
    assert [other for other in KINDS if issubclass(other, kind)] == [kind]
    assert issubclass(kind, errors.KvplugError)
