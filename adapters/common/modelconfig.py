"""A model's Hugging Face configuration as plain values: what decides a model's numbers, without where it came from."""

from __future__ import annotations

import json
from typing import Any

_NOT_CONTENT = frozenset(
    {"_name_or_path", "name_or_path", "transformers_version", "_commit_hash", "_attn_implementation_autoset"}
)
"""Entries that say where a configuration came from, not what it computes."""


def plain_hf_config(hf_config: Any) -> dict[str, Any]:
    """All values of a ``transformers`` configuration, defaults included, after the engine's overrides."""
    plain: dict[str, Any] = _without(json.loads(hf_config.to_json_string(use_diff=False)))
    return plain


def rope_depends_on_length(plain: dict[str, Any]) -> bool:
    """Whether the greatest length that an engine serves decides this model's RoPE factors."""
    rope = json.dumps([plain.get("rope_scaling"), plain.get("rope_parameters")])
    return any(word in rope for word in ("longrope", '"su"', "dynamic"))


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without(item) for key, item in value.items() if key not in _NOT_CONTENT}
    if isinstance(value, list):
        return [_without(item) for item in value]
    return value
