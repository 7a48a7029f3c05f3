"""vLLM's general plugin: names kvplug's connector in an engine's configuration when ``VLLM_PLUGINS`` names kvplug.

vLLM calls :func:`register` in every process, some of which live for a moment; it does next to nothing there. When
``VLLM_PLUGINS`` is not set vLLM loads every plugin that is installed, which is no wish to use kvplug: then only a
``--kv-transfer-config`` that names the connector switches it on. Nothing here ever raises into the engine.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from kvplug import config as settings
from kvplug.adapters.vllm import compat, compat_requests
from kvplug.adapters.vllm.started import STARTED_KEY, started_ns
from kvplug.engines import SUPPORTED
from kvplug.errors import KvplugError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.kvplug")
PLUGIN_NAME = "kvplug"
_said: set[str] = set()


def register() -> None:
    """Entry point of ``vllm.general_plugins``; may be called any number of times."""
    try:
        _register()
    except KvplugError as error:
        _say(f"kvplug: OFF: {error}")
    except Exception:
        logger.exception("kvplug: OFF, an error at start; the engine runs on without kvplug")


def _register() -> None:
    reason = unsupported()
    if reason is not None:
        if wanted_by_environment():
            _say(f"kvplug: OFF: {reason}")
        return
    compat.register_connector()
    compat.after_config_init(configured)


def configured(config: VllmConfig) -> None:
    """A configuration is complete: in the process that runs the engine, and in those that process prompts for it."""
    if wanted_by_environment():
        switch_on(config)
    transfer = config.kv_transfer_config
    if transfer is None or transfer.kv_connector != compat.CONNECTOR_NAME:
        return
    try:
        if not settings.load().trust_mm_ids:
            compat_requests.mark_named_media()
    except Exception as error:
        config.kv_transfer_config = None  # else an image could be taken for another
        logger.exception("kvplug: an error at start")
        _say(f"kvplug: OFF: {type(error).__name__}: {error}")


def wanted_by_environment() -> bool:
    """Whether ``VLLM_PLUGINS`` names kvplug."""
    return PLUGIN_NAME in [name.strip() for name in os.environ.get("VLLM_PLUGINS", "").split(",")]


def unsupported() -> str | None:
    """Why this engine can't be used with kvplug; None if it can."""
    version = compat.version()
    if settings.load().unsupported_engine_ok:
        return None
    if not compat.version_supported(version):
        return (
            f"vLLM {version} is not one that kvplug was written for ({SUPPORTED['vllm']}); "
            "KVPLUG_UNSUPPORTED_ENGINE_OK=1 tries it all the same"
        )
    found = compat.problems()
    return f"vLLM {version} is not as kvplug knows it: {'; '.join(found)}" if found else None


def switch_on(config: VllmConfig) -> None:
    """Names kvplug's connector in a configuration that is complete, unless something speaks against it."""
    try:
        _switch_on(config)
    except KvplugError as error:
        _say(f"kvplug: OFF: {error}")
    except Exception:
        logger.exception("kvplug: OFF, an error at start; the engine runs on without kvplug")


def _switch_on(config: VllmConfig) -> None:
    if config.model_config is None or getattr(config.model_config, "is_submodel_config", False):
        return
    given = config.kv_transfer_config
    if given is not None and given.kv_connector is not None:
        if given.kv_connector != compat.CONNECTOR_NAME:
            _say(f"kvplug: OFF: {compat.who_named_connector(config)}")
        return
    reason = against(config)
    if reason is not None:
        _say(f"kvplug: OFF: {reason}")
        return
    transfer = compat.transfer_config()
    transfer.kv_connector_extra_config[STARTED_KEY] = started_ns()
    config.kv_transfer_config = transfer


def against(config: Any) -> str | None:
    """What in an engine's configuration kvplug can't work with; None if nothing."""
    model = config.model_config
    if getattr(model, "is_encoder_decoder", False):
        return "encoder-decoder models are not supported"
    if getattr(model, "runner_type", "generate") != "generate":
        return f"{model.runner_type} models keep no KV cache worth sharing"
    if getattr(model, "is_attention_free", False) or getattr(model, "is_hybrid", False):
        return "models with Mamba or other recurrent state are not supported"
    problem = compat.config_problem(config)
    if problem is None and not settings.load().unsupported_engine_ok:
        problem = compat.reuse_problem(config)
    return problem


def _say(line: str) -> None:
    if line not in _said:
        _said.add(line)
        logger.warning(line)
