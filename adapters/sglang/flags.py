"""How a user switches kvplug on in SGLang, and which of SGLang's own settings that stands for.

``--enable-kvplug``, ``--kvplug-mode`` and ``--kvplug-config`` on the command line, or ``KVPLUG_ENABLE=1`` (with
``KVPLUG_SGLANG_MODE``) in the environment, which is also what ``sglang.Engine(...)`` looks at. Both write the settings
by which SGLang loads a storage backend or a linker of somebody else's.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kvplug.errors import ConfigError, DecodeError
from kvplug.outside import json_value

Mode = Literal["hicache", "linker"]
MODES = ("auto", "hicache", "linker")
ENABLE_ENV = "KVPLUG_ENABLE"
MODE_ENV = "KVPLUG_SGLANG_MODE"
EXTRA_KEY = "kvplug"
"""Entry of the backend's extra configuration that holds :meth:`Options.extra`."""
MAX_CONFIG_BYTES = 1 << 20
PRIVATE = "kvplug-private|"
"""In front of the extra key of a request whose pages must stay with its engine; a scheduler puts the engine's own word
there (``requests.py``), which the process that takes requests in does not know."""
PROCESS_STARTED_NS = time.time_ns()
"""When SGLang loaded its plugins here, which it does before it loads a model."""
PREFETCH_TOKENS = 64
"""Least hit, in tokens, that SGLang reads into its host cache: its default of 256 is for slower storage than memory."""


@dataclass(frozen=True)
class Options:
    """What the user asked for."""

    mode: str = "auto"
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of :class:`kvplug.config.Config` that go over environment and file."""

    def extra(self) -> dict[str, Any]:
        """What the engine's processes are told: the settings, and when loading began.

        Nothing that only one engine may have: SGLang shows its settings, and they may be given to another.
        """
        return {"settings": self.settings, "started_ns": time.time_ns()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds kvplug's flags to SGLang's parser. None by default, so that what was given can be told from what was not."""
    group = parser.add_argument_group("kvplug")
    group.add_argument(
        "--enable-kvplug", action="store_true", help="Share KV caches through kvplug's pool on this host."
    )
    group.add_argument(
        "--kvplug-mode",
        choices=MODES,
        default=None,
        help="hicache: behind SGLang's host cache. linker: between device and pool, with no second copy on the host. "
        "auto, the default: linker where this SGLang has it (0.5.23) and it takes the model, else hicache.",
    )
    group.add_argument(
        "--kvplug-config",
        default=None,
        metavar="JSON|@FILE",
        help='kvplug\'s settings as a JSON object, such as \'{"pool": "a", "size": "30gb"}\', or @file with one.',
    )


def from_arguments(args: Any) -> Options | None:
    """The options in a parsed command line; None if kvplug was not asked for. ConfigError for what does not fit."""
    mode, config = getattr(args, "kvplug_mode", None), getattr(args, "kvplug_config", None)
    if not getattr(args, "enable_kvplug", False) and not switched_on():
        for flag, given in (("--kvplug-mode", mode), ("--kvplug-config", config)):
            if given:
                raise ConfigError(f"{flag} is given without --enable-kvplug: add it, or leave out both")
        return None
    return checked(Options(mode or mode_of_environment(), parse_settings(config)))


def from_environment() -> Options | None:
    """The options in the environment; None if kvplug was not asked for. ConfigError for what does not fit."""
    return checked(Options(mode_of_environment())) if switched_on() else None


def mode_of_environment() -> str:
    """What ``KVPLUG_SGLANG_MODE`` says, or "auto". ConfigError for what is no mode."""
    mode = os.environ.get(MODE_ENV, "").strip().lower() or "auto"
    if mode not in MODES:
        raise ConfigError(f"{MODE_ENV}={mode} is not a mode: set it to one of {', '.join(MODES)}")
    return mode


def switched_on() -> bool:
    """Whether ``KVPLUG_ENABLE`` asks for kvplug. ConfigError for a value that is neither yes nor no."""
    value = os.environ.get(ENABLE_ENV, "").strip().lower()
    if value in ("", "0", "false", "no", "off"):
        return False
    if value in ("1", "true", "yes", "on"):
        return True
    raise ConfigError(f"{ENABLE_ENV}={value} is neither yes nor no: set it to 1 or 0")


def parse_settings(text: str | None) -> dict[str, Any]:
    """A JSON object, or ``@file`` with one. ConfigError says what is wrong with it."""
    if text is None or not text.strip():
        return {}
    source = "--kvplug-config"
    if text.startswith("@"):
        path = Path(os.path.expanduser(text[1:]))  # Path's raises where there is no such user
        source = f"--kvplug-config {text}"
        try:
            with path.open("rb") as file:
                text = file.read(MAX_CONFIG_BYTES + 1).decode()
        except (OSError, ValueError) as error:
            raise ConfigError(f"{source}: the file can't be read: {error}") from None
        if len(text) > MAX_CONFIG_BYTES:
            raise ConfigError(f"{source}: the file is larger than {MAX_CONFIG_BYTES} bytes")
    try:
        value = json_value(text, "its text")
    except DecodeError as error:
        raise ConfigError(f'{source} is not JSON: {error}. It is an object such as {{"size": "30gb"}}') from None
    if not isinstance(value, dict):
        raise ConfigError(f'{source} is a JSON {type(value).__name__}; an object such as {{"size": "30gb"}} is needed')
    return value


def checked(options: Options) -> Options:
    """The same options, if their settings fit the schema; ConfigError if not."""
    from kvplug import config as configuration

    configuration.load(**options.settings)
    return options


MODULES: dict[Mode, str] = {
    "linker": "kvplug.adapters.sglang.linker",
    "hicache": "kvplug.adapters.sglang.storage",
}
"""What SGLang imports in each mode."""


def settings_for(mode: Mode, options: Options) -> dict[str, Any]:
    """SGLang's own settings that switch kvplug on in this mode."""
    extra = {EXTRA_KEY: options.extra()}
    if mode == "linker":
        return {
            "enable_unified_cache_external_linker": True,
            "unified_cache_external_linker_backend": "dynamic",
            "unified_cache_external_linker_config": {
                "linker": "KvplugLinker",
                "linker_module_path": MODULES[mode],
                "linker_extra_config": extra,
            },
        }
    return {
        "enable_hierarchical_cache": True,
        "hicache_storage_backend": "dynamic",
        "hicache_storage_backend_extra_config": json.dumps({
            "backend_name": "kvplug",
            "module_path": MODULES[mode],
            "class_name": "KvplugStorage",
            "interface_v1": 1,
            "prefetch_threshold": PREFETCH_TOKENS,
            **extra,
        }),
    }  # fmt: skip


def extra_of(settings: Any) -> dict[str, Any] | None:
    """What :meth:`Options.extra` put into settings (ServerArgs); None if they do not name kvplug."""
    linker = getattr(settings, "unified_cache_external_linker_config", None)
    text = getattr(settings, "hicache_storage_backend_extra_config", None)
    extra = linker.get("linker_extra_config") if isinstance(linker, dict) else None
    if extra is None and isinstance(text, str) and f'"{EXTRA_KEY}"' in text:
        try:
            extra = json_value(text, EXTRA_KEY)
        except DecodeError:
            return None
    found = extra.get(EXTRA_KEY) if isinstance(extra, dict) else None
    return found if isinstance(found, dict) else None


def host_cache_wanted(given: Any) -> bool:
    """Whether the user has asked for SGLang's host cache, to which kvplug then adds a storage backend."""
    return bool(getattr(given, "enable_hierarchical_cache", False))


def conflict(given: Any, mode: Mode) -> str | None:
    """What among the user's settings (ServerArgs) stands in the way; None if nothing.

    Only what would be overridden, or would make kvplug useless without anybody noticing: settings that SGLang refuses
    together are found when it works them out.
    """
    if getattr(given, "disable_radix_cache", False):
        return "--disable-radix-cache leaves no prefix cache to share"
    if getattr(given, "dllm_algorithm", None):
        return "--dllm-algorithm: a diffusion model's cache is not named by tokens alone"
    if getattr(given, "disaggregation_mode", None) == "decode":
        return "--disaggregation-mode decode: such an engine computes no prompts"
    for name in ("enable_lmcache", "enable_flexkv", "radix_cache_backend"):
        if getattr(given, name, None):
            return f"--{name.replace('_', '-')} takes the place that kvplug would need"
    storage = getattr(given, "hicache_storage_backend", None)
    if storage is not None:
        return f"--hicache-storage-backend {storage} is set already"
    if getattr(given, "enable_unified_cache_external_linker", False):
        return "--enable-unified-cache-external-linker is set already"
    if mode == "linker" and host_cache_wanted(given):
        return "--enable-hierarchical-cache and the linker exclude each other; take --kvplug-mode hicache"
    return None
