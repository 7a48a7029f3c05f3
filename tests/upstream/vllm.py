"""vLLM's own tests of connectors, with kvplug in the place of the connector or of the store that they use.

The tests come from vLLM's source distribution, of the release that is installed. What is put in whose place is in
inside/vllm_with_kvplug.py; models that they ask the hub for are stand-ins (standins.py), so nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from kvplug import KvStore
from kvplug.errors import PoolNotFoundError
from kvplug.shm import segment
from tests.upstream import common, standins

SDIST = common.Sdist("vllm", "0.32.0", "d2c957d5eee3d0985012151315ddc62cbe0cd368fc96a5fc3510438d9dddf2ad")
PACKAGES = ("tblib==3.2.2", "pytest-asyncio==1.5.0")
EXPECTED = common.HERE / "vllm.toml"
POOL = f"upstream-vllm-{os.getpid()}"
LIMIT_S = 3600.0
UNIT = "tests/v1/kv_connector/unit"
CORE = "tests/v1/core"
GROUPS: dict[str, list[str]] = {
    "connectors": [
        f"{UNIT}/test_cache_pollution_prevention.py",
        f"{UNIT}/test_config.py",
        f"{UNIT}/test_error_propagation.py",
        f"{UNIT}/test_handshake_pp_aggregation.py",
        f"{UNIT}/test_hma_auto_config.py",
        f"{UNIT}/test_invalid_blocks_correctness.py",
        f"{UNIT}/test_kv_connector_lifecycle.py",
        f"{UNIT}/test_kv_load_failure_recovery.py",
        f"{UNIT}/test_output_aggregator.py",
        f"{UNIT}/test_remote_decode_lifecycle.py",
        f"{UNIT}/test_remote_prefill_lifecycle.py",
        f"{UNIT}/test_scheduler_kv_connector_override.py",
    ],
    "mooncake store": [
        f"{UNIT}/test_mooncake_store_connector.py",
        f"{UNIT}/test_mooncake_store_coordinator.py",
        f"{UNIT}/test_mooncake_store_hma_e2e.py",
        f"{UNIT}/test_mooncake_store_layout.py",
        f"{UNIT}/test_mooncake_store_scheduler.py",
        f"{UNIT}/test_mooncake_store_worker.py",
    ],
    "offloading": [
        f"{UNIT}/offloading_connector",
        f"{UNIT}/test_simple_cpu_offload_connector.py",
        "tests/v1/kv_offload",
        "tests/v1/simple_kv_offload",
    ],
    "scheduler": [
        f"{CORE}/test_async_scheduler.py",
        f"{CORE}/test_deferred_block_free.py",
        f"{CORE}/test_prefix_caching.py",
        f"{CORE}/test_priority_preemption_bug.py",
        f"{CORE}/test_scheduler.py",
        f"{CORE}/test_swa_inflight_window_free.py",
    ],
    "engines": [
        f"{UNIT}/test_example_connector.py",
        f"{UNIT}/test_multi_connector.py",
        f"{UNIT}/test_offloading_connector.py",
        f"{CORE}/test_reset_prefix_cache_e2e.py",
        f"{CORE}/test_scheduler_e2e.py",
        "tests/v1/engine/test_engine_core.py",
    ],
}
"""Files that one process runs after each other, by what they are about."""


def _folder() -> Path:
    """vLLM's tests without its sources, which would be imported in the installed package's place."""
    target = common.kept() / f"{SDIST.name}-{SDIST.version}-tests"
    if not target.is_dir():
        building = target.with_suffix(f".{os.getpid()}")
        shutil.copytree(common.sources(SDIST) / "tests", building / "tests", symlinks=True)
        shutil.copy(common.sources(SDIST) / "pyproject.toml", building)
        building.rename(target)
    return target


def _environment() -> dict[str, str]:
    own = {
        "PYTHONPATH": os.pathsep.join(map(str, (common.INSIDE, common.ROOT, common.packages("vllm", PACKAGES)))),
        "VLLM_PLUGINS": "kvplug,dummy_kv_connector_plugin",  # the second is one of the tests's own
        "KVPLUG_POOL": POOL,
        "KVPLUG_SIZE": "256mib",
        "HF_HUB_CACHE": str(standins.hub()),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    return {**os.environ, **own}


def _stored() -> common.Outcome:
    """Tests that pass with kvplug OFF would say nothing: a test of our own beside them."""
    try:
        with KvStore(POOL, create=False) as store:
            blocks = store.stats().stored_blocks
    except PoolNotFoundError as error:
        return common.Outcome("failed", str(error))
    return common.Outcome("passed" if blocks else "failed", f"{blocks} blocks were stored")


def main(groups: list[str]) -> int:
    """Run all groups, or those that are named."""
    chosen = [group for group in GROUPS if not groups or group in groups]
    folder, environment = _folder(), _environment()

    def run(group: str) -> dict[str, common.Outcome]:
        arguments = ("-p", "vllm_with_kvplug", "--tb=short")
        found = common.run_tests(group, GROUPS[group], folder, environment, LIMIT_S, *arguments)
        if group == "engines":
            found["engines: kvplug stored their blocks"] = _stored()
        return found

    try:
        outcomes = common.run_groups(chosen, run)
    finally:
        with contextlib.suppress(PoolNotFoundError):
            segment.remove_pool(POOL, force=True)
    return common.report("vllm", outcomes, EXPECTED, [file for group in chosen for file in GROUPS[group]])
