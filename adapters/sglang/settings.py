"""Which of SGLang's settings decide a page's bytes: all but those that were looked at, release by release.

A setting that a later release brings counts until it has been looked at; ``tests/unit/test_settings.py`` names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvplug.adapters.common.environment import names
from kvplug.adapters.common.settings import as_text

HARMLESS = names(
    # Caches, and how pages lie in them: the mode tells its layout itself.
    "_radix_eviction_policy_explicitly_set disable_radix_cache enable_flexkv enable_hierarchical_cache "
    "enable_linker_mla_dedup enable_lmcache enable_session_radix_cache enable_unified_cache_external_linker "
    "flexkv_config_file hicache_host_memory_fraction hicache_host_memory_mode hicache_io_backend "
    "hicache_mem_layout hicache_ratio hicache_size hicache_storage_backend hicache_storage_backend_extra_config "
    "hicache_storage_prefetch_policy hicache_storage_prefetch_retry_max_attempts "
    "hicache_storage_prefetch_retry_poll_interval hicache_write_policy lmcache_config_file radix_cache_backend "
    "radix_eviction_policy radix_eviction_policy_config unified_cache_external_linker_backend "
    "unified_cache_external_linker_config",
    # Scheduling, room; a page's tokens have a field of their own.
    "_swa_full_tokens_ratio_explicitly_set abort_on_priority_when_disabled chunked_prefill_size "
    "default_priority_value disable_overlap_schedule disable_priority_preemption enable_dynamic_chunking "
    "enable_prefill_delayer enable_priority_scheduling mamba_full_memory_ratio max_mamba_cache_size "
    "max_prefill_tokens max_queued_requests max_running_requests max_total_tokens mem_fraction_static "
    "min_free_slots_delay num_continuous_decode_steps page_size prefill_decode_interval "
    "prefill_decode_interval_min_bs prefill_delayer_forward_passes_buckets prefill_delayer_max_delay_ms "
    "prefill_delayer_max_delay_passes prefill_delayer_queue_min_ratio prefill_delayer_token_usage_low_watermark "
    "prefill_delayer_wait_seconds_buckets prefill_max_requests prefill_only_disable_kv_cache "
    "priority_scheduling_preemption_threshold retraction_policy schedule_conservativeness "
    "schedule_low_priority_values_first schedule_policy scheduler_recv_interval swa_full_tokens_ratio",
    # The server: prompts come out of it as tokens, which names of pages hold.
    "admin_api_key allow_auto_truncate api_key asr_max_buffer_seconds asr_max_concurrent_sessions "
    "batch_notify_size chat_template completion_template constrained_json_disable_any_whitespace "
    "constrained_json_max_whitespace_cnt constrained_json_whitespace_pattern default_chat_template_kwargs "
    "detokenizer_worker_num disable_tokenizer_batch_decode dynamic_batch_tokenizer_batch_size "
    "dynamic_batch_tokenizer_batch_timeout enable_cache_report enable_dynamic_batch_tokenizer enable_http2 "
    "enable_http_worker_reuseport enable_response_store enable_ssl_refresh enable_streaming_session "
    "enable_strict_thinking enable_tokenizer_batch_encode fastapi_root_path file_storage_path grpc_mode grpc_port "
    "grpc_response_timeout_secs grpc_worker_threads hf_chat_template_name host "
    "http2_initial_connection_window_size http2_max_concurrent_streams incremental_streaming_output port "
    "preferred_sampling_params reasoning_parser return_input_ids return_output_ids sampling_defaults "
    "served_model_name sidecar sidecar_args skip_server_warmup skip_tokenizer_init smg_grpc_mode ssl_ca_certs "
    "ssl_certfile ssl_keyfile ssl_keyfile_password stream_interval stream_response_default_include_usage "
    "strip_thinking_cache tokenizer_backend tokenizer_mode tokenizer_path tokenizer_worker_num tool_call_parser "
    "tool_server trust_request_chat_template warmups weight_version",
    # Media: room, workers, transport.
    "allowed_media_domains enable_broadcast_mm_inputs_process enable_prefix_mm_cache limit_mm_data_per_request "
    "media_url_max_file_size_mb mm_feature_transport mm_io_worker_num mm_preprocess_cache_size_mb "
    "mm_processor_worker_num",
    # Attention backends have a field of their own; the others come after logits.
    "attention_backend decode_attention_backend grammar_backend prefill_attention_backend sampling_backend",
    # What happens to logits and after them, and what is returned; some of it is refused.
    "aux_hidden_state_capture disable_outlines_disk_cache enable_custom_logit_processor "
    "enable_draft_weights_cpu_backup enable_memory_saver enable_return_aux_hidden_states "
    "enable_return_hidden_states enable_return_indexer_topk enable_return_routed_experts enable_watermark "
    "enable_weights_cpu_backup return_aux_hidden_state_layer_ids return_hidden_states_mode "
    "sampling_mask_max_tokens watermark_config watermark_context_window watermark_default_enabled "
    "watermark_enforce_all watermark_key watermark_key_b watermark_max_probability watermark_mixing_probability",
    # Devices, processes.
    "base_gpu_id custom_sigquit_handler device gc_threshold gpu_id_step mlx_enable_sampling numa_node random_seed "
    "sleep_on_idle soft_watchdog_timeout use_ray watchdog_timeout",
    # Logs and measurements.
    "bucket_e2e_request_latency bucket_inter_token_latency bucket_time_to_first_token crash_dump_folder "
    "debug_tensor_dump_layers debug_tensor_dump_output_folder decode_log_interval enable_forward_pass_metrics "
    "enable_metrics enable_metrics_for_all_schedulers enable_mfu_metrics enable_request_time_stats_logging "
    "enable_trace export_metrics_to_file export_metrics_to_file_dir extra_metric_labels "
    "forward_pass_metrics_ipc_name forward_pass_metrics_worker_id gc_warning_threshold_secs "
    "generation_tokens_buckets kv_canary_sweep_interval kv_events_config load_publish_endpoint "
    "load_snapshot_publish_interval log_level log_level_http log_requests log_requests_format log_requests_level "
    "log_requests_target msprobe_dump_config otlp_service_name otlp_traces_endpoint prompt_tokens_buckets "
    "show_time_cost smg_http_sidecar_port stat_loggers tokenizer_metrics_allowed_custom_labels "
    "tokenizer_metrics_custom_labels_header trace_modules uvicorn_access_log_exclude_prefixes",
    # Weights and the cache's dtype, which have fields of their own; how files are read.
    "checkpoint_engine_wait_weights_before_ready context_length delete_ckpt_after_loading download_dir "
    "engine_info_bootstrap_port kv_cache_dtype model_checksum model_path modelexpress_config "
    "modelopt_checkpoint_save_path modelopt_export_path quantization quantization_param_path "
    "remote_instance_weight_loader_backend remote_instance_weight_loader_seed_instance_ip "
    "remote_instance_weight_loader_seed_instance_service_port "
    "remote_instance_weight_loader_send_weights_group_ports "
    "remote_instance_weight_loader_start_seed_via_transfer_engine revision trust_remote_code weight_cache_mode "
    "weight_cache_socket weight_cache_timeout weight_loader_disable_mmap weight_loader_drop_cache_after_load "
    "weight_loader_prefetch_checkpoints weight_loader_prefetch_num_threads",
    # Where weights lie.
    "cpu_offload_gb offload_group_size offload_num_in_group offload_prefetch_step ple_offload_dir",
    # Which batches are captured and replayed.
    "cuda_graph_backend_decode cuda_graph_backend_prefill cuda_graph_bs_decode cuda_graph_bs_prefill "
    "cuda_graph_config cuda_graph_max_bs_decode cuda_graph_max_bs_prefill cuda_graph_max_seq_len_prefill "
    "cuda_graph_prefill_max_context debug_cuda_graph disable_cuda_graph disable_cuda_graph_padding "
    "disable_decode_cuda_graph disable_prefill_cuda_graph enable_cudagraph_gc enable_profile_cuda_graph "
    "torch_compile_max_bs",
    # Disaggregation.
    "decoupled_spec_bind_endpoint decoupled_spec_connect_endpoints decoupled_spec_rank decoupled_spec_role "
    "disaggregation_bootstrap_port disaggregation_decode_allocation_policy "
    "disaggregation_decode_enable_offload_kvcache disaggregation_decode_enable_radix_cache "
    "disaggregation_decode_extra_slots disaggregation_decode_host_receive_threshold "
    "disaggregation_decode_polling_interval disaggregation_decode_retraction_backup "
    "disaggregation_enable_kv_checksum disaggregation_ib_device disaggregation_mode "
    "disaggregation_transfer_backend enable_pd_role_switch encoder_bootstrap_port encoder_register_urls "
    "encoder_urls num_reserved_decode_tokens optimistic_prefill_attempts pdmux_config_path sm_group_num",
    # Ranks: the sizes that decide bytes have fields of their own.
    "dist_init_addr dist_timeout dp_size elastic_ep_initial_size enable_dp_attention_local_control_broadcast "
    "enable_dp_lm_head enable_p2p_check enable_tp_lm_head_all_to_all ep_join_rank_offset gated_launch_port "
    "load_balance_method max_ep_size nccl_port nnodes node_rank pp_async_batch_depth pp_max_micro_batch_size "
    "pp_size tp_size",
    # Experts: when they move, what is recorded.
    "elastic_ep_rejoin elastic_ep_scale_timeout ep_join_mode eplb_min_rebalancing_utilization_threshold "
    "eplb_rebalance_layers_per_chunk eplb_rebalance_num_iterations expert_balancedness_report_mode "
    "expert_distribution_recorder_buffer_size expert_distribution_recorder_mode kt_cpuinfer kt_threadpool_count "
    "mooncake_ib_device",
    # Communication: measurements, warm-up.
    "enable_layerwise_nvtx_marker pre_warm_nccl",
    # Adapters: their content is in the names of their pages.
    "enable_lora enable_lora_overlap_loading lora_drain_wait_threshold lora_eviction_policy lora_paths "
    "max_loaded_loras max_lora_chunk_size max_lora_rank max_loras_per_batch",
    # What is drafted; pages hold confirmed tokens. The draft model has a field of its own.
    "_speculative_draft_quantization_explicitly_set spec_trace_dir speculative_accept_threshold_acc "
    "speculative_accept_threshold_single speculative_adaptive speculative_adaptive_config "
    "speculative_dflash_block_size speculative_domino_candidate_pool_size speculative_draft_load_format "
    "speculative_draft_model_path speculative_draft_model_revision "
    "speculative_dspark_align_verify_tokens_to_graph_tier speculative_dspark_block_size "
    "speculative_dspark_confidence_sts_path speculative_dspark_sps_table_path speculative_eagle_topk "
    "speculative_ngram_capacity speculative_ngram_external_corpus_max_tokens "
    "speculative_ngram_external_corpus_path speculative_ngram_external_sam_budget speculative_ngram_match_type "
    "speculative_ngram_max_bfs_breadth speculative_ngram_max_trie_depth speculative_ngram_min_bfs_breadth "
    "speculative_num_draft_tokens speculative_num_steps speculative_skip_dp_mlp_sync speculative_token_map "
    "speculative_use_block_verification speculative_use_rejection_sampling",
)
"""They decide no byte of a page, or have a field of their own in the namespace."""


def deciding(server: Mapping[str, Any]) -> dict[str, str]:
    """Those of an engine's resolved settings that may decide bytes, by name, as text; none that is not set (None)."""
    return {
        name: as_text(value) for name, value in sorted(server.items()) if value is not None and name not in HARMLESS
    }
