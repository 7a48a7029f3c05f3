"""Which of vLLM's settings decide a block's bytes: all but those that were looked at, release by release.

They are fields of the configuration's classes, named ``Class.field`` here. A field, or a class, that a later release
brings counts until it has been looked at; ``tests/unit/test_settings.py`` names it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kvplug.adapters.common.environment import names
from kvplug.adapters.common.settings import as_text

if TYPE_CHECKING:
    from vllm.config import VllmConfig

HARMLESS_CLASSES = names(
    # Logs, measurements, deadlines, what happens to logits and after them, ways of moving KV and weights.
    "FaultToleranceConfig KVEventsConfig KVTransferConfig LoggingConfig ObservabilityConfig ProfilerConfig "
    "ReasoningConfig StructuredOutputsConfig WatchdogConfig WatermarkConfig WeightTransferConfig",
    # Refused where they would count, or only some of their kinds are taken, which propose tokens.
    "AuxOutputConfig DiffusionConfig ECTransferConfig HiSparseConfig PoolerConfig SpeculativeConfig",
    # Where weights lie; the device, which has a field of its own.
    "DeviceConfig OffloadConfig PrefetchOffloadConfig UVAOffloadConfig",
    # Not part of a complete configuration, or of one that is in the namespace by other fields.
    "AudioDummyOptions BaseDummyOptions ImageDummyOptions ModelArchitectureConfig QuantSpec QuantizationConfigArgs "
    "Range SpeechToTextConfig SpeechToTextParams VideoDummyOptions",
)
"""None of their fields decides a byte of a block."""

_HARMLESS_FIELDS = {
    "CacheConfig": names(
        "_block_size_resolved block_size cache_dtype cache_hit_alignment_tokens effective_attention_block_size "
        "enable_prefix_caching gpu_memory_utilization hash_block_size kv_cache_layout kv_cache_max_concurrency "
        "kv_cache_memory_bytes kv_cache_size_tokens kv_offloading_backend kv_offloading_size num_cpu_blocks "
        "num_gpu_blocks num_gpu_blocks_override prefix_cache_retention_interval prefix_caching_hash_algo "
        "prefix_match_unit simple_cpu_offload_num_blocks user_specified_block_size user_specified_mamba_block_size"
    ),  # the layout of blocks, their span and their dtype have fields of their own
    "CompilationConfig": names(
        "cache_dir compilation_time compile_cache_save_format compile_ranges_endpoints compile_sizes "
        "cudagraph_capture_sizes cudagraph_copy_inputs cudagraph_decoder_replay cudagraph_mm_encoder cudagraph_mode "
        "cudagraph_num_of_warmups cudagraph_specialize_lora debug_dump_path decoder_replay_cudagraph_capture_sizes "
        "decoder_replay_trim_threshold disabled_custom_ops enabled_custom_ops encoder_compilation_time "
        "encoder_cudagraph_max_frames_per_batch encoder_cudagraph_max_vision_items_per_batch "
        "encoder_cudagraph_token_budgets fast_moe_cold_start local_cache_dir max_cudagraph_capture_size "
        "static_all_moe_layers static_forward_context traced_files"
    ),  # sizes of batches, which differ from step to step anyway; caches; what is filled in while it compiles
    "KernelConfig": names("enable_cutedsl_warmup enable_jit_warmup"),
    "LoRAConfig": names(
        "default_mm_loras max_cpu_loras max_lora_cls_labels max_lora_rank max_loras specialize_active_lora"
    ),  # a request's adapter is in its keys by content
    "LoadConfig": names(
        "device download_dir pt_load_map_location safetensors_load_strategy safetensors_prefetch_block_size "
        "safetensors_prefetch_num_threads use_tqdm_on_load"
    ),
    "ModelConfig": names(
        "allow_deprecated_quantization allowed_local_media_path allowed_media_domains enable_cumem_allocator "
        "enable_nccl_comm_suspend enable_prompt_embeds enable_return_routed_experts enable_sleep_mode "
        "enable_trace_replay generation_config hf_config hf_config_path hf_overrides hf_text_config hf_token "
        "io_processor_plugin is_submodel_config logits_processors logprobs_mode max_logprobs max_model_len model "
        "model_weights override_generation_config pooler_config quantization quantization_config "
        "renderer_num_workers return_sampling_mask revision seed served_model_name skip_tokenizer_init "
        "sleep_mode_backend sleep_mode_offload_cudagraph sleep_preserve_parameter_names spec_target_max_model_len "
        "tokenizer tokenizer_mode tokenizer_revision trust_remote_code use_fp64_gumbel "
        "word_embeddings_untied_by_checkpoint"
    ),  # weights, the model's configuration and its quantization have fields of their own
    "MultiModalConfig": names(
        "enable_mm_embeds interleave_mm_strings limit_per_prompt mm_encoder_only mm_hasher_algorithm "
        "mm_ipc_gpu_memory_gb mm_processor_cache_gb mm_processor_cache_type mm_shm_cache_max_object_size_mb "
        "mm_tensor_ipc skip_mm_profiling"
    ),
    "ParallelConfig": names(
        "_allow_auto_resolve_cp_interleave_size _api_process_count _api_process_rank _coord_store_port "
        "_data_parallel_master_port_list assigned_physical_gpu_ids cpu_distributed_timeout_seconds "
        "data_parallel_backend data_parallel_external_lb data_parallel_hybrid_lb data_parallel_index "
        "data_parallel_master_ip data_parallel_master_port data_parallel_rank data_parallel_rank_local "
        "data_parallel_rpc_port data_parallel_size data_parallel_size_local disable_nccl_for_dp_synchronization "
        "distributed_executor_backend distributed_timeout_seconds dp_sync_interval elastic_ep_max_dp_size "
        "enable_batch_sharded_sampling enable_ep_weight_filter enable_fault_tolerance enable_shm_tensor_arena "
        "fault_tolerance_config is_moe_model master_addr master_port max_parallel_loading_workers nnodes node_rank "
        "numa_bind numa_bind_cpus numa_bind_nodes pipeline_parallel_size placement_group rank ray_runtime_env "
        "ray_workers_use_nsight tensor_parallel_size world_size"
    ),  # replicas share; the sizes that part a block have fields of their own
    "SchedulerConfig": names(
        "async_scheduling disable_hybrid_kv_cache_manager enable_chunked_prefill encoder_cache_size "
        "is_multimodal_model long_prefill_token_threshold long_prefill_token_threshold_adaptive max_num_active_seqs "
        "max_num_batched_tokens max_num_encoder_input_tokens max_num_queued_reqs max_num_queued_tokens "
        "max_num_scheduled_tokens max_num_seqs policy prefill_schedule_interval runner_type "
        "scheduler_reserve_full_isl stream_interval watermark"
    ),
    "EPLBConfig": names(
        "communicator enable_migration_batching log_balancedness log_balancedness_interval step_interval use_async "
        "window_size"
    ),
    "VllmConfig": names("instance_id quant_config shutdown_timeout"),
}
HARMLESS = frozenset(f"{owner}.{name}" for owner, fields in _HARMLESS_FIELDS.items() for name in fields)
"""They decide no byte of a block, or have a field of their own in the namespace."""


def deciding(vllm_config: VllmConfig) -> dict[str, str]:
    """The settings of a complete configuration that may decide bytes: by path, as text."""
    model_dtype = str(vllm_config.model_config.dtype)
    found = {}
    for owner, path, value in _fields(vllm_config, ""):
        if owner == "LoRAConfig" and (not value or str(value) == model_dtype):
            continue  # as without adapters: the base model's blocks are the same then
        found[path] = as_text(value)
    return found


def multimodal(vllm_config: Any) -> dict[str, str]:
    """Those among them that decide what becomes of an image, audio or video before the model sees it."""
    config = getattr(vllm_config.model_config, "multimodal_config", None)
    return {} if config is None else {path: as_text(value) for _, path, value in _fields(config, "")}


def multimodal_defaults() -> dict[str, str]:
    """The same of an engine whose user has set none of them."""
    from vllm.config.multimodal import MultiModalConfig

    return {path: as_text(value) for _, path, value in _fields(MultiModalConfig(), "")}


def _fields(part: Any, path: str) -> Iterator[tuple[str, str, Any]]:
    """(class, path, value) of each field that counts, down to those that are no configuration themselves."""
    owner = type(part).__name__
    for field in dataclasses.fields(part):
        if f"{owner}.{field.name}" in HARMLESS:
            continue
        value = getattr(part, field.name, None)
        if value is None and owner == "VllmConfig":  # a part that this engine does without
            continue
        if not dataclasses.is_dataclass(value) or isinstance(value, type):
            yield owner, path + field.name, value
        elif type(value).__name__ not in HARMLESS_CLASSES:
            yield from _fields(value, f"{path}{field.name}.")
