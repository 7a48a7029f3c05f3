"""A pytest plugin that puts kvplug in the place of what vLLM's tests use.

ExampleConnector, by its name and inside TestExampleConnector     KvplugConnector
the mock connectors                                               KvplugConnector, with the mock's answers to
                                                                  lookups and everything else its own
the Mooncake store that a dictionary stands for                   KvStore, on a real pool
the Mooncake store that a MagicMock stands for                    the same mock; each call must be one that KvStore
                                                                  takes
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Iterator
from typing import Any
from unittest.mock import MagicMock, Mock

CALLS = ("register_buffer", "batch_put_from_multi_buffers", "batch_get_into_multi_buffers", "batch_is_exist")
SCRATCH_BYTES = 4 << 20


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Once, after the modules are there."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    _connectors()
    utils = sys.modules.get("tests.v1.kv_connector.unit.utils")
    if utils is not None:
        _mocks(utils)
    for module in {item.module for item in items}:
        if hasattr(module, "create_mock_connector"):
            module.create_mock_connector = utils.create_mock_connector
        if hasattr(module, "_DictStore"):
            module._DictStore = _store_like(module._DictStore)
    _checked_threads()


def _connectors() -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from kvplug.adapters.vllm.connector import KvplugConnector

    KVConnectorFactory._registry["ExampleConnector"] = lambda: KvplugConnector


def _mocks(utils: Any) -> None:
    from kvplug.adapters.vllm.connector import KvplugConnector

    utils.ExampleConnector = KvplugConnector
    mocked = utils.MockKVConnector

    class KvplugWithLookups(KvplugConnector):
        """kvplug's connector; what a lookup finds is what the test says."""

        def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
            super().__init__(vllm_config, role, kv_cache_config)
            self.lookups = mocked(vllm_config, role, kv_cache_config)

        @property
        def supports_divergent_local_hybrid_hits(self) -> bool:
            return self.lookups.supports_divergent_local_hybrid_hits

        def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> Any:
            return self.lookups.get_num_new_matched_tokens(request, num_computed_tokens)

        def build_connector_meta(self, scheduler_output: Any) -> Any:
            """Tests look for the requests in the mock's; kvplug's is made too."""
            super().build_connector_meta(scheduler_output)
            return self.lookups.build_connector_meta(scheduler_output)

    utils.MockKVConnector = KvplugWithLookups

    made = utils.create_mock_connector

    def create_mock_connector() -> Mock:
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

        config = utils.create_vllm_config(kv_connector="KvplugConnector", kv_role="kv_both")
        real = KvplugConnector(config, KVConnectorRole.SCHEDULER, utils.make_kv_cache_config(16))
        mock = Mock(wraps=real)
        example = made()
        mock.get_external_cache_hit_sources.side_effect = example.get_external_cache_hit_sources.side_effect
        return mock

    utils.create_mock_connector = create_mock_connector


def _store_like(dictionary: type) -> type:
    import numpy as np

    from kvplug import KvStore
    from kvplug.errors import BufferError
    from kvplug.store import _named

    class Names:
        """The names that a store was given and still has."""

        def __init__(self, store: Store) -> None:
            self._store = store
            self._given: dict[str, None] = {}

        def add(self, names: list[str]) -> None:
            self._given |= dict.fromkeys(names)

        def __iter__(self) -> Iterator[str]:
            names = list(self._given)
            return (name for name, there in zip(names, self._store.batch_is_exist(names), strict=True) if there == 1)

        def keys(self) -> list[str]:
            return [name for name in self]  # noqa: C416 - list() asks for the length first

        def __len__(self) -> int:
            return sum(1 for _ in self)

        def __delitem__(self, name: str) -> None:
            assert self._store.remove(_named(self._store.own([name]))).tolist() == [0]

    class Store(KvStore):
        """KvStore as MooncakeDistributedStore: made without arguments, then set up."""

        made = 0

        def __init__(self) -> None:
            super().__init__()
            Store.made += 1
            self._test = f"{os.getpid()}-{Store.made}"
            self._data = Names(self)
            self._scratch = np.zeros(SCRATCH_BYTES, np.uint8)
            self.register_buffer(self._scratch.ctypes.data, SCRATCH_BYTES)

        def setup(self, *_arguments: Any, **_named: Any) -> int:
            return 0

        def own(self, names: list[str]) -> list[str]:
            """Names of this test alone, on the pool that all share."""
            return [f"{self._test}/{name}" for name in names]

        def _real(self, addrs: list[list[int]], sizes: list[list[int]]) -> list[list[int]]:
            """Tests make addresses up, or name a block past the end of their caches: then memory that is there."""
            return [
                [
                    addr if self._is_registered(addr, size) else self._scratch.ctypes.data
                    for addr, size in zip(*both, strict=True)
                ]
                for both in zip(addrs, sizes, strict=True)
            ]

        def _is_registered(self, addr: int, size: int) -> bool:
            try:
                self._registered.check(np.array([addr]), np.array([size]))
            except BufferError:
                assert size <= SCRATCH_BYTES
                return False
            return True

        def batch_is_exist(self, keys: Any) -> list[int]:
            return super().batch_is_exist(self.own(keys))

        def batch_put_from_multi_buffers(
            self, keys: Any, addrs: Any, sizes: Any, *more: Any, **named: Any
        ) -> list[int]:
            codes = super().batch_put_from_multi_buffers(
                self.own(keys), self._real(addrs, sizes), sizes, *more, **named
            )
            self._data.add([key for key, code in zip(keys, codes, strict=True) if code == 0])
            return codes

        def batch_get_into_multi_buffers(
            self, keys: Any, addrs: Any, sizes: Any, *more: Any, **named: Any
        ) -> list[int]:
            return super().batch_get_into_multi_buffers(self.own(keys), self._real(addrs, sizes), sizes, *more, **named)

    assert {name for name in vars(dictionary) if not name.startswith("__")} <= {"setup", *CALLS}
    return Store


def _checked_threads() -> None:
    """Each thread of vLLM's Mooncake worker that is made with a mock calls it as KvStore can be called."""
    module = sys.modules.get("vllm.distributed.kv_transfer.kv_connector.v1.mooncake.store.worker")
    for name in ("KVCacheStoreSendingThread", "KVCacheStoreRecvingThread"):
        made = getattr(module, name, None)
        if made is not None:
            made.__init__ = _checking(made.__init__)


def _checking(init: Any) -> Any:
    signature = inspect.signature(init)

    @functools.wraps(init)
    def checked(self: Any, *arguments: Any, **named: Any) -> None:
        store = signature.bind(self, *arguments, **named).arguments["store"]
        if isinstance(store, MagicMock):
            for call in CALLS:
                _takes(getattr(store, call), call)
        init(self, *arguments, **named)

    return checked


def _takes(mock: Any, call: str) -> None:
    from kvplug import KvStore

    signature = inspect.signature(getattr(KvStore, call))

    def check(_mock: Any, *arguments: Any, **named: Any) -> None:
        signature.bind(None, *arguments, **named)

    type(mock)._mock_check_sig = check  # a mock's class is its own; this is how autospec does it
