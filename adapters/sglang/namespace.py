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
    "bf16_gemm_backend",
    "boundary_reduction",
    "deepep_dispatcher_output_dtype",
    "disable_shared_experts_fusion",
    "dsa_decode_backend",
    "dsa_prefill_backend",
    "dsa_topk_backend",
    "enable_amd_monokernel",
    "enable_decoder_swa_bounded_replay",
    "enable_deepseek_v4_fp4_indexer",
    "enable_deterministic_inference",
    "enable_encoder_swa_bounded_replay",
    "enable_fp32_lm_head",
    "enable_hisparse",
    "enable_int8_mamba_checkpoint",
    "enable_lean_attention",
    "enable_mamba_cache_stochastic_rounding",
    "enable_mis",
    "enable_multi_layer_eagle",
    "enable_nvidia_megakernel",
    "enable_page_major_kv_layout",
    "enable_precise_embedding_interpolation",
    "enable_quant_communications",
    "enable_tf32_matmul",
    "enable_unified_memory",
    "enable_w4a4_mxfp4_megamoe",
    "experts_shared_outer_loras",
    "flashinfer_mxfp4_moe_precision",
    "fp4_gemm_runner_backend",
    "fp8_gemm_runner_backend",
    "hisparse_config",
    "is_embedding",
    "json_model_override_args",
    "kt_method",
    "kt_num_gpu_experts",
    "kt_weight_path",
    "linear_attn_backend",
    "linear_attn_prefill_backend",
    "lora_backend",
    "lora_strict_loading",
    "lora_target_modules",
    "mamba_backend",
    "mamba_cache_philox_rounds",
    "mamba_radix_cache_strategy",
    "mamba_ssm_dtype",
    "mm_attention_backend",
    "model_impl",
    "model_loader_extra_config",
    "modelopt_quant",
    "moe_a2a_backend",
    "moe_runner_backend",
    "prefill_kv_cache_dequant_dtype",
    "qsa_indexer_dtype",
    "quantize_and_serve",
    "rl_on_policy_target",
    "rl_quant_profile",
    "speculative_algorithm",
    "speculative_attention_mode",
    "speculative_draft_attention_backend",
    "speculative_draft_kv_cache_dtype",
    "speculative_draft_model_quantization",
    "speculative_draft_sink_size",
    "speculative_draft_window_size",
    "triton_attention_reduce_in_fp32",
)
"""Settings of SGLang, besides those that have a field of their own, that choose other arithmetic or another layout. A
release has not all of them; which it has is decided by the version, which is in the namespace too."""
_FROM_FILES = frozenset(
    {
        "auto",
        "bitsandbytes",
        "dummy",
        "expert_pack",
        "fastsafetensors",
        "gguf",
        "instanttensor",
        "jax",
        "layered",
        "mistral",
        "npcache",
        "presharded",
        "pt",
        "runai_streamer",
        "safetensors",
        "sharded_state",
    }
)
"""Load formats that take the weights that lie at the model's path, and nothing else."""
_MAX_SCALES_BYTES = 64 << 20


def probes(facts: Facts, config: Config, started_ns: int | None) -> tuple[WeightsProbe, WeightsProbe | None]:
    """Begins to find out, in the background, which weights the engine has loaded: the model's and its draft model's."""

    server = facts.server
    load_formats = {facts.load_format}

    def probe(path: str, revision: str | None, load_format: str) -> WeightsProbe:
        return WeightsProbe(
            path,
            load_format=load_format,
            revision=revision,
            weights_id=config.weights_id,
            dummy_seed=compat.dummy_seed(),
            config_digest=digest_of(facts.model, "configuration"),
            unchanged_since_ns=started_ns,
            hub_cache=facts.download_dir,
        )

    draft_format = str(server.get("speculative_draft_load_format") or facts.load_format)
    has_draft = bool(facts.draft_path) and facts.draft_path != facts.model_path
    if has_draft:
        load_formats.add(draft_format)
        if draft_format == "dummy":
            raise NamespaceError("a draft model with dummy weights: its configuration is not known here")
    shared = str(server.get("weight_cache_mode") or "off")
    if shared != "off" and config.weights_id is None:
        raise NamespaceError(f"--weight-cache-mode {shared}: weights come from another process; set weights_id")
    strange = sorted(load_formats - _FROM_FILES)
    if strange and config.weights_id is None:
        raise NamespaceError(
            f"--load-format {strange[0]}: the weights are not, or not only, the files at the model's path; "
            "set weights_id to vouch for them"
        )
    draft = probe(str(facts.draft_path), facts.draft_revision, draft_format) if has_draft else None
    return probe(facts.model_path, facts.revision, facts.load_format), draft


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
            "model_package": os.environ.get("SGLANG_EXTERNAL_MODEL_PACKAGE") or None,
            "draft_path_is_model": bool(facts.draft_path) and draft is None,
            "draft_path": facts.draft_path if draft is not None and draft.kind == "user" else None,
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
