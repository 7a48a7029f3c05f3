"""Builds kvplug's Namespace from vLLM's configuration and from what the workers say of their caches."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvplug.adapters.common.modelconfig import plain_hf_config, rope_depends_on_length
from kvplug.adapters.vllm import compat, settings
from kvplug.adapters.vllm.groups import GroupRule
from kvplug.adapters.vllm.jobs import Part, Plan, Rank, RankLayout
from kvplug.config import Config
from kvplug.errors import NamespaceError, UnsupportedEngineError
from kvplug.identity.canonical import Value
from kvplug.identity.namespace import ByteRun, GroupLayout, Namespace, WeightsIdentity, digest_of
from kvplug.identity.weights import WeightsProbe

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_DUMMY_SEED = 1234
"""vLLM fills dummy weights from a seed of its own, whatever the model's seed is."""

_FROM_FILES = frozenset({
    "auto", "bitsandbytes", "dummy", "fastsafetensors", "gguf", "hf", "instanttensor", "mistral", "npcache", "pt",
    "runai_streamer", "runai_streamer_sharded", "safetensors", "sharded_state",
})  # fmt: skip
"""Load formats that take the weights that lie at the model's path, and nothing else."""
_WHOLE_RELOADS = frozenset(("auto", "hf", "safetensors"))
"""Of these, those that read a folder's safetensors files as vLLM's own loader does."""


_ADAPTER_SETTINGS = (
    "lora_dtype", "target_modules", "fully_sharded_loras", "enable_tower_connector_lora",
    "enable_mixed_moe_lora_format", "enable_moe_shared_loras",
)  # fmt: skip
"""Settings that choose which modules an adapter is applied to, in which dtype, and how."""


def plan_parts(rules: Sequence[GroupRule], layouts: dict[Rank, RankLayout]) -> Plan:
    """Which part of a group's slot belongs to which rank. Offsets are filled in by :func:`place_parts`.

    UnsupportedEngineError if tensor-parallel ranks of one pipeline stage differ: such caches can't be told apart by
    their sizes, and nothing is guessed.
    """
    plan: list[dict[Rank, Part]] = []
    for group, rule in enumerate(rules):
        parts: dict[Rank, Part] = {}
        stages: dict[int, Part] = {}
        index = 0
        for rank in sorted(layouts):
            pages = layouts[rank].groups[group]
            first = next(r for r in sorted(layouts) if r[0] == rank[0])
            if pages != layouts[first].groups[group]:
                raise UnsupportedEngineError(f"ranks {first} and {rank} lay out cache group {group} differently")
            nbytes = sum(page.nbytes for page in pages)
            if nbytes == 0:
                continue
            if rule.kind == "mla" and rank[0] in stages:  # every rank holds the same bytes: stored once, read by all
                shared = stages[rank[0]]
                parts[rank] = Part(shared.index, 0, shared.nbytes, writer=False)
                continue
            parts[rank] = stages[rank[0]] = Part(index, 0, nbytes, writer=True)
            index += 1
        if not parts:
            raise UnsupportedEngineError(f"no rank has a layer of cache group {group}")
        plan.append(parts)
    return tuple(plan)


def place_parts(plan: Plan, part_offsets: Any) -> Plan:
    """Fills in where each part lies in its slot; ``part_offsets`` is the pool's own rule: sizes to offsets."""
    placed = []
    for parts in plan:
        sizes = {part.index: part.nbytes for part in parts.values()}
        offsets = part_offsets([sizes[i] for i in range(len(sizes))])
        placed.append({rank: Part(p.index, int(offsets[p.index]), p.nbytes, p.writer) for rank, p in parts.items()})
    return tuple(placed)


def model_configuration(vllm_config: VllmConfig) -> dict[str, Any]:
    """What the model computes, after every override, as plain values."""
    model = vllm_config.model_config
    values = plain_hf_config(model.hf_config)
    stretched = rope_depends_on_length(values)
    return {
        "hf": values,
        "dtype": str(model.dtype),
        "max_model_len": int(model.max_model_len) if stretched else None,  # decides the factors of these kinds of RoPE
        "disable_sliding_window": bool(getattr(model, "disable_sliding_window", False)),
        "architecture": [str(name) for name in model.architectures],
    }


def _quantization(model: Any) -> Any:
    """The method; with what the user says of it beyond the model's own configuration, where there is anything."""
    method = str(model.quantization) if model.quantization else None
    settings = getattr(model, "quantization_config", None)
    # As text with every field in it: str() of a layer kind's leaves the activations out.
    return method if settings is None else {"method": method, "settings": repr(settings)}


def adapter_settings(vllm_config: VllmConfig) -> bytes:
    """Digest of what decides, beside an adapter's files, what this engine makes of it; empty without adapters."""
    config = vllm_config.lora_config
    if config is None:
        return b""
    values = {name: getattr(config, name, None) for name in _ADAPTER_SETTINGS}
    values["target_modules"] = sorted(map(str, values["target_modules"] or ()))
    return digest_of({name: str(value) for name, value in values.items()}, "lora_config")


def weights_source(vllm_config: VllmConfig) -> str:
    """Where the engine reads its weights from: a folder, a repository's name, an address."""
    model = vllm_config.model_config
    return str(getattr(model, "model_weights", "") or model.model)


def reloaded_from(vllm_config: VllmConfig) -> str | None:
    """Where a reload reads from that replaces every weight; None where some of what decides blocks would stay.

    A draft model, adapters and rearranged experts are not reloaded; what is quantized is made of several tensors, some
    of which vLLM keeps where files have none.
    """
    load = vllm_config.load_config.load_format
    if str(getattr(load, "value", load)) not in _WHOLE_RELOADS:
        return None
    partial = (
        vllm_config.lora_config,
        vllm_config.speculative_config,
        vllm_config.model_config.quantization,
        getattr(vllm_config.parallel_config, "enable_eplb", False),
    )
    return None if any(partial) else weights_source(vllm_config)


def weights_probe(vllm_config: VllmConfig, config: Config, loading_since_ns: int | None) -> WeightsProbe:
    """Begins to find out, in the background, which weights the engine has loaded; NamespaceError if nothing tells."""
    model, load = vllm_config.model_config, vllm_config.load_config
    source = weights_source(vllm_config)
    load_format = str(getattr(load.load_format, "value", load.load_format))
    if config.weights_id is None and load_format not in _FROM_FILES:
        raise NamespaceError(
            f"--load-format {load_format}: the weights are not, or not only, the files at the model's path; "
            "set weights_id to vouch for them"
        )
    if config.weights_id is None and compat.uses_modelscope() and not os.path.lexists(source):
        raise NamespaceError(
            f"VLLM_USE_MODELSCOPE: {source} names a repository of ModelScope, and another one of the Hugging Face hub; "
            "give the folder that it lies in, or set weights_id to vouch for the weights"
        )
    return WeightsProbe(
        source,
        load_format=load_format,
        revision=getattr(model.hf_config, "_commit_hash", None) or model.revision,
        weights_id=config.weights_id,
        dummy_seed=_DUMMY_SEED,
        config_digest=digest_of(model_configuration(vllm_config), "configuration"),
        unchanged_since_ns=loading_since_ns,
        hub_cache=load.download_dir,
    )


def build(
    vllm_config: VllmConfig,
    rules: Sequence[GroupRule],
    layouts: dict[Rank, RankLayout],
    kv_layout: str | None,
    weights: WeightsIdentity,
    environment: Mapping[str, str],
) -> Namespace:
    """The namespace of an engine; NamespaceError names what can't be identified.

    ``environment``: the variables that count (:data:`kvplug.adapters.vllm.environment.VARIABLES`), as they were when
    the engine was made: it sets some itself later on.
    """
    cache, model, parallel = vllm_config.cache_config, vllm_config.model_config, vllm_config.parallel_config
    configuration = model_configuration(vllm_config)
    kv_dtype = str(cache.cache_dtype)
    if kv_dtype == "auto":
        kv_dtype = str(model.dtype).removeprefix("torch.")
    if getattr(cache, "calculate_kv_scales", False):
        raise NamespaceError("KV scales are computed while running (calculate_kv_scales)")
    ranks = sorted(layouts)
    facts = {(layouts[rank].device, layouts[rank].isa, layouts[rank].backends) for rank in ranks}
    if len({fact[:2] for fact in facts}) != 1:
        raise NamespaceError(f"ranks run on different devices: {sorted(map(str, facts))}")
    first = layouts[ranks[0]]
    groups = tuple(
        GroupLayout(
            kind=rule.kind,
            span_tokens=rule.span,
            shards=tuple(
                tuple(ByteRun(page.layer, page.nbytes) for page in layouts[rank].groups[group]) for rank in ranks
            ),
            window_tokens=rule.window,
        )
        for group, rule in enumerate(rules)
    )
    shapes = sorted({page.shape for rank in ranks for group in layouts[rank].groups for page in group})
    backends: dict[str, Value] = {f"pp{rank[0]}": list(layouts[rank].backends) for rank in ranks}
    layout: dict[str, Value] = {"name": str(kv_layout), "pages": list(shapes)}
    return Namespace(
        weights=weights,
        config_digest=digest_of(configuration, "configuration"),
        quantization=_quantization(model),
        kv_dtype=kv_dtype,
        kv_scales=None,
        draft=None,
        eagle=False,
        engine="vllm",
        engine_version=compat.version(),
        device=first.device,
        attention_backend=backends,
        cpu_isa=first.isa,
        kv_layout=layout,
        groups=groups,
        tp=int(parallel.tensor_parallel_size),
        pp=int(parallel.pipeline_parallel_size),
        cp=1,
        other={"settings": settings.deciding(vllm_config), "environment": dict(environment)},
    )
