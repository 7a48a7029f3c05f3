"""Builds kvplug's Namespace from what a scheduler process knows of its engine. The same on all of an engine's ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from blake3 import blake3

from kvplug.adapters.sglang import compat, settings
from kvplug.adapters.sglang.compat import Facts
from kvplug.config import Config
from kvplug.errors import NamespaceError
from kvplug.identity.canonical import Value
from kvplug.identity.namespace import ByteRun, GroupLayout, Namespace, WeightsIdentity, digest_of
from kvplug.identity.weights import WeightsProbe

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
_NOT_RELOADED = (
    "cpu_offload_gb", "enable_elastic_expert_backup", "enable_eplb", "enable_paged_experts", "ep_num_redundant_experts",
    "kt_weight_path", "modelopt_quant", "ple_offload_embedding", "quantize_and_serve", "rl_quant_profile",
    "speculative_algorithm",
)  # fmt: skip
"""Settings with which some weights are of other files, moved, or made of several tensors: a reload may leave those."""


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
    if server.get("modelopt_checkpoint_restore_path") and config.weights_id is None:
        raise NamespaceError(
            "--modelopt-checkpoint-restore-path: the weights are not those at the model's path; "
            "set weights_id to vouch for them"
        )
    strange = sorted(load_formats - _FROM_FILES)
    if strange and config.weights_id is None:
        raise NamespaceError(
            f"--load-format {strange[0]}: the weights are not, or not only, the files at the model's path; "
            "set weights_id to vouch for them"
        )
    draft = probe(str(facts.draft_path), facts.draft_revision, draft_format) if has_draft else None
    return probe(facts.model_path, facts.revision, facts.load_format), draft


def reloaded_from(facts: Facts) -> str | None:
    """Where an update from files reads from that replaces every weight; None where some that decide pages would stay.

    A draft model is not the model's folder's; layers with adapters are put around the model's, of which they have what
    was there then; experts that were rearranged, and weights that were moved to the host, are not all where the loader
    puts them; what is quantized is made of several tensors, some of which SGLang keeps where files have none.
    """
    server = facts.server
    partial = (
        facts.load_format not in compat.WHOLE_RELOADS,
        facts.draft_path,
        facts.lora_enabled,
        facts.model["quantization"],
        *(server.get(name) for name in _NOT_RELOADED),
        int(server.get("offload_group_size") or -1) > 0,
        server.get("init_expert_location", "trivial") != "trivial",
        (server.get("weight_cache_mode") or "off") != "off",
    )
    return None if any(partial) else facts.model_path


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
            "settings": settings.deciding(server),
            "environment": dict(facts.environment),
            "draft_path_is_model": bool(facts.draft_path) and draft is None,
            "draft_path": facts.draft_path if draft is not None and draft.kind == "user" else None,
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
