"""Builds kvplug's Namespace from what a scheduler process knows of its engine. The same on all of an engine's ranks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from kvplug.adapters.sglang import compat
from kvplug.adapters.sglang.compat import Facts
from kvplug.canonical import Value
from kvplug.config import Config
from kvplug.errors import NamespaceError
from kvplug.namespace import ByteRun, GroupLayout, Namespace, WeightsIdentity, digest_of
from kvplug.weights import WeightsProbe

_DECIDE_BYTES = (
    "enable_deterministic_inference",
    "enable_fp32_lm_head",
    "fp8_gemm_runner_backend",
    "json_model_override_args",
    "mm_attention_backend",
    "model_impl",
    "moe_runner_backend",
    "rl_on_policy_target",
    "speculative_algorithm",
    "speculative_draft_kv_cache_dtype",
    "torchao_config",
)
"""Settings of SGLang, besides those that have a field of their own, that choose other arithmetic."""
_MAX_SCALES_BYTES = 64 << 20


def probes(facts: Facts, config: Config, started_ns: int | None) -> tuple[WeightsProbe, WeightsProbe | None]:
    """Begins to find out, in the background, which weights the engine has loaded: the model's and its draft model's."""

    def probe(path: str, revision: str | None) -> WeightsProbe:
        return WeightsProbe(
            path,
            load_format=facts.load_format,
            revision=revision,
            weights_id=config.weights_id,
            dummy_seed=compat.dummy_seed(),
            config_digest=digest_of(facts.model, "configuration"),
            unchanged_since_ns=started_ns,
            hub_cache=facts.download_dir,
        )

    draft = None
    if facts.draft_path and facts.draft_path != facts.model_path:
        draft = probe(facts.draft_path, facts.draft_revision)
    return probe(facts.model_path, facts.revision), draft


def build(
    facts: Facts, layout: Mapping[str, Value], weights: WeightsIdentity, draft: WeightsIdentity | None
) -> Namespace:
    """The namespace of an engine; NamespaceError names what can't be identified.

    ``layout``: what the mode that moves the bytes says of how they lie in a block, equal on all ranks.
    """
    server = facts.server
    if facts.cp[1] > 1 or int(server.get("dcp_size") or server.get("attn_dcp_size") or 1) > 1:
        raise NamespaceError("context parallelism is not supported")
    return Namespace(
        weights=weights,
        config_digest=digest_of(facts.model, "configuration"),
        quantization=facts.model["quantization"],
        kv_dtype=facts.kv_dtype,
        kv_scales=_scales(facts),
        draft=draft,
        eagle=facts.is_eagle,
        engine="sglang",
        engine_version=compat.version(),
        device=facts.device,
        attention_backend=dict(sorted(facts.backends.items())),
        cpu_isa=None,
        kv_layout=dict(layout),
        groups=(
            GroupLayout(
                kind="full",
                span_tokens=facts.page_size,
                shards=((ByteRun(layer=facts.kv_pool, nbytes=0),),),
            ),
        ),
        tp=facts.tp[1],
        pp=facts.pp[1],
        cp=1,
        other={
            "settings": {name: _plain(server.get(name)) for name in _DECIDE_BYTES if server.get(name) is not None},
            "draft_path_is_model": bool(facts.draft_path) and draft is None,
            "pp_layer_partition": os.environ.get("SGLANG_PP_LAYER_PARTITION") if facts.pp[1] > 1 else None,
        },
    )


def _scales(facts: Facts) -> Value:
    path = facts.quantization_param_path
    if not path:
        return None
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise NamespaceError(f"the KV scales in {path} can't be read: {error.strerror}") from None
    if len(content) > _MAX_SCALES_BYTES:
        raise NamespaceError(f"the file of KV scales {path} has {len(content)} bytes, which no such file needs")
    return blake3(content).digest()


def _plain(value: Any) -> Value:
    return value if isinstance(value, (bool, int, str)) else str(value)
