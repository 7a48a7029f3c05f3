"""A KV connector that promises one block for every request and says a step later that it could not be loaded.

For tests of what happens to others' loads while kvplug is there.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorTransferResults,
    SupportsHMA,
)


class Promised(KVConnectorMetadata):
    """Requests to which a load was promised in this step."""

    def __init__(self, request_ids: set[str]) -> None:
        self.request_ids = request_ids


class LatecomerConnector(KVConnectorBase_V1, SupportsHMA):
    """Both sides in one class, as vLLM has it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ever: set[str] = set()
        self._new: set[str] = set()

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        block = self._vllm_config.cache_config.block_size
        if request.request_id in self._ever or request.num_tokens <= num_computed_tokens + block:
            return 0, False
        return block, True

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens:
            self._ever.add(request.request_id)
            self._new.add(request.request_id)

    def build_connector_meta(self, scheduler_output: Any) -> Promised:
        meta, self._new = Promised(self._new), set()
        return meta

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        return False, None

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        meta = self._connector_metadata
        ended = set(meta.request_ids) if isinstance(meta, Promised) else set()
        return KVConnectorTransferResults(finished_recving=ended, failed_recving=set(ended))

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        pass
