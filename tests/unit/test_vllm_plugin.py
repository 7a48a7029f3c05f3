"""When the plugin switches kvplug on, and what it says when it does not. On vLLM's own configuration."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest

vllm = pytest.importorskip("vllm")

from vllm.config import KVTransferConfig, VllmConfig  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402

from kvplug.adapters.vllm import compat, compat_requests, namespace, plugin  # noqa: E402
from kvplug.adapters.vllm.groups import GroupRule  # noqa: E402
from kvplug.adapters.vllm.jobs import RankLayout  # noqa: E402
from kvplug.adapters.vllm.layout import LayerPage  # noqa: E402
from kvplug.config import Config  # noqa: E402
from kvplug.engines import SUPPORTED  # noqa: E402
from kvplug.errors import NamespaceError, UnsupportedEngineError  # noqa: E402
from kvplug.identity.namespace import Namespace, WeightsIdentity  # noqa: E402
from tests.lab.models import GEMMA3, LLAMA, MLA, model_dir  # noqa: E402
from tests.lab.releases import outside  # noqa: E402

WEIGHTS = WeightsIdentity("files", b"w" * 32)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """register() as in an engine's process, undone at the end."""
    monkeypatch.setattr(VllmConfig, "__post_init__", VllmConfig.__post_init__)
    plugin._said.clear()
    yield
    plugin._said.clear()


@pytest.fixture
def wanted(registered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "kvplug")
    plugin.register()
    plugin.register()


def make(path: Path | str | None = None, **more: Any) -> VllmConfig:
    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, **more}
    return EngineArgs(model=str(path or model_dir(LLAMA)), **settings).create_engine_config()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "kvplug" in record.getMessage()]


def test_naming_the_plugin_is_enough(wanted: None) -> None:
    """A load that fails is computed again, which is not the engine's own default."""
    transfer = make().kv_transfer_config
    assert transfer is not None
    assert transfer.kv_connector == "KvplugConnector"
    assert transfer.kv_connector_module_path == "kvplug.adapters.vllm.connector"
    assert transfer.kv_load_failure_policy == "recompute"
    assert transfer.is_kv_producer
    assert transfer.is_kv_consumer


@pytest.mark.parametrize("variable", ["KVPLUG_SIZ", "KVPLUG_SIZE"])
def test_a_users_error_is_one_line_without_a_traceback(
    variable: str, registered: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    monkeypatch.setenv("VLLM_PLUGINS", "kvplug")
    monkeypatch.setenv(variable, "banana")
    plugin.register()
    (message,) = set(said(caplog))
    assert message.startswith("kvplug: OFF: ")
    assert variable in message
    assert "\n" not in message
    assert not [record for record in caplog.records if record.exc_info]


def test_being_installed_is_not_enough(registered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With VLLM_PLUGINS unset the engine loads every plugin that there is; nobody has asked for kvplug then."""
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    plugin.register()
    assert make().kv_transfer_config is None


def test_another_connector_is_left_alone_and_that_is_said(
    wanted: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    other = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
    config = make(kv_transfer_config=other)
    assert config.kv_transfer_config.kv_connector == "ExampleConnector"
    assert any("ExampleConnector" in line for line in said(caplog))


def test_who_asked_for_offloading_is_told_by_that_option(
    wanted: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    assert make(kv_offloading_size=1.0).kv_transfer_config.kv_connector == "OffloadingConnector"
    (line,) = set(said(caplog))
    assert "--kv-offloading-size" in line
    assert "OffloadingConnector" in line
    assert "--kv-transfer-config" not in line


def test_a_users_own_configuration_of_kvplug_is_kept(wanted: None) -> None:
    mine = KVTransferConfig(kv_connector="KvplugConnector", kv_role="kv_both", engine_id="mine")
    assert make(kv_transfer_config=mine).kv_transfer_config.engine_id == "mine"


@pytest.mark.parametrize(
    ("version", "fits"),
    [
        *((version, True) for version in SUPPORTED["vllm"].tested),
        (f"{SUPPORTED['vllm'].tested[-1][:-1]}1+cpu", True),
        *((version, False) for version in outside("vllm")),
        (f"{outside('vllm')[1]}rc1", False),
        ("1.0", False),
    ],
)
def test_versions(version: str, fits: bool) -> None:
    assert compat.version_supported(version) is fits


def test_an_unknown_version_runs_on_without_kvplug_unless_told_otherwise(
    registered: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    monkeypatch.setenv("VLLM_PLUGINS", "kvplug")
    monkeypatch.setattr(vllm, "__version__", "0.40.0")
    plugin.register()
    assert make().kv_transfer_config is None
    (line,) = set(said(caplog))
    assert "0.40.0" in line
    assert "KVPLUG_UNSUPPORTED_ENGINE_OK" in line
    monkeypatch.setenv("KVPLUG_UNSUPPORTED_ENGINE_OK", "1")
    plugin.register()
    assert make().kv_transfer_config is not None


def test_this_engine_is_as_kvplug_knows_it() -> None:
    assert compat.problems() == []


def test_a_changed_engine_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One method with another signature is enough to stay away."""
    from vllm.v1.core.block_pool import BlockPool

    monkeypatch.setattr(BlockPool, "touch", lambda self, block_ids: None)
    assert any("BlockPool.touch" in line for line in compat.problems())


def test_where_the_engine_does_not_reuse_kv_kvplug_does_not_either(
    wanted: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's kernels for MLA on a CPU answer differently when they continue from cached tokens."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    plain = {"attention_backend": "CPU_MLA"}  # where the CPU has AMX, others that may continue are the default
    assert make(model_dir(MLA), **plain).kv_transfer_config is None
    assert any("MLA" in line for line in said(caplog))
    monkeypatch.setenv("KVPLUG_UNSUPPORTED_ENGINE_OK", "1")
    assert make(model_dir(MLA), **plain).kv_transfer_config is not None


def _with_outputs(config: VllmConfig) -> None:
    config.aux_output_config.enable_return_routed_experts = True


def _with_outputs_of_older_releases(config: VllmConfig) -> None:
    object.__setattr__(config.model_config, "enable_return_routed_experts", True)


def _with_diffusion(config: VllmConfig) -> None:
    from vllm.config.diffusion import DiffusionConfig

    config.diffusion_config = DiffusionConfig(canvas_length=32)


def _that_goes_on_without_a_rank(config: VllmConfig) -> None:
    config.parallel_config.enable_fault_tolerance = True


def _whose_experts_may_be_missing(config: VllmConfig) -> None:
    config.parallel_config.all2all_backend = "nixl_ep"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_with_outputs, "--enable-return-routed-experts"),
        (_with_outputs_of_older_releases, "--enable-return-routed-experts"),
        (_with_diffusion, "diffusion"),
        (_that_goes_on_without_a_rank, "--enable-fault-tolerance"),
        (_whose_experts_may_be_missing, "nixl_ep"),
    ],
)
def test_what_blocks_do_not_hold_or_bring_along_is_refused(change: Any, words: str) -> None:
    """Its release for CPUs refuses these settings itself, so they are made on a configuration that is complete."""
    config = make()
    assert plugin.against(config) is None
    change(config)
    assert words in (plugin.against(config) or "")


def test_a_cache_dtype_that_a_plugin_brings_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As platforms may register one from 0.33 on, under any name."""
    config = make()
    assert plugin.against(config) is None
    monkeypatch.setattr("vllm.config.cache.get_kv_cache_dtype_handler", {"auto": object()}.get, raising=False)
    assert "--kv-cache-dtype auto comes from a plugin" in (plugin.against(config) or "")


def _groups(spec: Any, **more: Any) -> Any:
    """A configuration of caches with one group."""
    return SimpleNamespace(
        kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec, is_eagle_group=False)],
        prefix_cacheable_group_ids=(0,),
        **more,
    )


def _full() -> Any:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    return FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=8, dtype=torch.float32)


def test_caches_that_later_releases_keep_elsewhere_or_for_drafts_are_refused() -> None:
    """What vLLM 0.33 marks them by; releases before it have other marks, which count as well."""
    assert compat.group_rules(_groups(_full())) == [GroupRule("full", 16)]
    drafting = _full()
    object.__setattr__(drafting, "is_draft", True)
    with pytest.raises(UnsupportedEngineError, match="draft"):
        compat.group_rules(_groups(drafting))
    assert compat.group_rules(_groups(_full(), hisparse_host_num_blocks=None)) == [GroupRule("full", 16)]
    with pytest.raises(UnsupportedEngineError, match="HiSparse"):
        compat.group_rules(_groups(_full(), hisparse_host_num_blocks=64))


def page(layer: str, nbytes: int, shape: str = "float32 (2, 128, 64) (8192, 64, 1)") -> LayerPage:
    return LayerPage(layer, nbytes, shape)


def layouts(**more: Any) -> dict[tuple[int, int], RankLayout]:
    values = {"groups": ((page("0", 4096),),), "device": "cpu", "isa": "x86_64 AVX2", "backends": ("CPU_ATTN",), **more}
    return {(0, 0): RankLayout((0, 0), "token", None, **values)}


RULES = [GroupRule("full", 128)]


def build(
    config: VllmConfig,
    rules: Any = RULES,
    ranks: Any = None,
    weights: WeightsIdentity = WEIGHTS,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Namespace:
    return namespace.build(config, rules, ranks or layouts(), "LBHNC", weights, environment)


def test_equal_engines_have_one_namespace_wherever_the_model_lies(tmp_path: Path) -> None:
    """A path is not content."""
    elsewhere = tmp_path / "another-name"
    elsewhere.symlink_to(model_dir(LLAMA))
    assert build(make()).digest() == build(make(elsewhere)).digest()


def test_whatever_decides_bytes_changes_the_namespace() -> None:
    base = make()
    made = [
        build(base),
        build(base, weights=WeightsIdentity("files", b"v" * 32)),
        build(base, rules=[GroupRule("full", 64)]),
        build(base, rules=[GroupRule("sliding", 128, 64)]),
        build(base, ranks=layouts(isa="x86_64 AVX512")),
        build(base, ranks=layouts(backends=("OTHER",))),
        build(base, ranks=layouts(groups=((page("0", 8192),),))),
        build(base, ranks=layouts(groups=((page("0", 4096, "bfloat16"),),))),
        build(make(hf_overrides={"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})),
        build(make(dtype="bfloat16")),
        build(make(model_dir(GEMMA3))),
        build(base, environment={"VLLM_VIDEO_LOADER_BACKEND": "torchcodec"}),
        build(base, environment={"VLLM_VIDEO_LOADER_BACKEND": "opencv"}),
        build(make(model_impl="transformers")),
        build(make(additional_config={"of": "a plugin"})),
        build(make(worker_extension_cls="tests.vllm_lab.worker.Extension")),
        build(make(all2all_backend="deepep_low_latency")),
        build(make(compilation_config={"custom_ops": ["none", "+rms_norm"]})),
        build(make(kernel_config={"linear_backend": "cutlass"})),
    ]
    digests = [one.digest() for one in made]
    assert len(set(digests)) == len(digests)


def test_how_weights_are_quantized_while_they_are_loaded_changes_the_namespace() -> None:
    """Which layers, and how, is said on the command line and stands in no file of the model's."""
    from vllm.config.quantization import QuantizationConfigArgs

    made = []
    for settings in (
        None,
        QuantizationConfigArgs(linear="fp8_per_tensor"),
        QuantizationConfigArgs(linear="fp8_per_tensor", ignore=["*.o_proj"]),
        {"linear": {"weight": "fp8_per_tensor_static"}},
        {"linear": {"weight": "fp8_per_tensor_static", "activation": "fp8_per_token"}},
    ):
        config = make()
        object.__setattr__(config.model_config, "quantization", "fp8_per_tensor")
        object.__setattr__(config.model_config, "quantization_config", settings)
        made.append(build(config).digest())
    assert len(set(made)) == len(made)


def test_what_an_engine_makes_of_an_image_changes_the_namespace() -> None:
    """The content hash of an image holds the image and what its request says, and nothing of the engine's settings."""
    from vllm.config.multimodal import MultiModalConfig

    made = [build(make())]
    for settings in (
        {},
        {"mm_processor_kwargs": {"do_normalize": False}},
        {"mm_processor_kwargs": {"size": {"longest_edge": 64}}},
        {"media_io_kwargs": {"video": {"num_frames": 4}}},
        {"video_pruning_rate": 0.5},
    ):
        config = make()
        object.__setattr__(config.model_config, "multimodal_config", MultiModalConfig(**settings))
        made.append(build(config))
    digests = [one.digest() for one in made]
    assert len(set(digests)) == len(digests)
    limited = make()
    object.__setattr__(limited.model_config, "multimodal_config", MultiModalConfig(mm_processor_cache_gb=0))
    assert build(limited).digest() == digests[1]


def test_what_replicas_differ_in_parts_nobody() -> None:
    base = build(make()).digest()
    for settings in (
        {"max_num_seqs": 3, "gpu_memory_utilization": 0.5, "seed": 7, "served_model_name": "other"},
        {"kv_cache_memory_bytes": 1 << 26, "max_model_len": 256},
        {"enable_sleep_mode": False, "max_logprobs": 3, "stream_interval": 4},
    ):
        assert build(make(**settings)).digest() == base
    other = make()
    other.instance_id, other.parallel_config.data_parallel_rank, other.parallel_config.master_port = "other", 3, 4711
    assert build(other).digest() == base


def test_an_engine_that_takes_adapters_shares_the_plain_models_blocks_with_one_that_does_not() -> None:
    base = build(make()).digest()
    assert build(make(enable_lora=True, max_loras=2, max_lora_rank=32)).digest() == base
    assert build(make(enable_lora=True, fully_sharded_loras=True)).digest() != base


def test_equal_settings_are_equal_in_another_process() -> None:
    """Nothing of an object's address, of a process or of a clock is in them."""
    code = (
        "from vllm.engine.arg_utils import EngineArgs; from kvplug.adapters.vllm import settings; import json, sys;"
        "config = EngineArgs(model=sys.argv[1], dtype='float32', max_model_len=512).create_engine_config();"
        "print(json.dumps(settings.deciding(config), sort_keys=True))"
    )
    command = [sys.executable, "-c", code, str(model_dir(LLAMA))]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    one, two = (run.communicate(timeout=300)[0].splitlines()[-1] for run in runs)
    assert one == two
    assert len(one) > 1000


@pytest.mark.parametrize("load_format", ["tensorizer", "modelexpress", "ipc_cache", "of_a_plugin"])
def test_weights_from_elsewhere_need_the_users_word(load_format: str) -> None:
    config = make()
    config.load_config.load_format = load_format
    with pytest.raises(NamespaceError, match=f"--load-format {load_format}"):
        namespace.weights_probe(config, Config.defaults(), None)
    vouched = Config.defaults().model_copy(update={"weights_id": "mine"})
    assert namespace.weights_probe(config, vouched, None).result(60).kind == "user"


def test_a_name_on_another_hub_names_no_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A repository of the same name in the Hugging Face hub's cache would be taken for it."""
    config = make()
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "1")
    assert namespace.weights_probe(config, Config.defaults(), None).result(60) is not None
    config.model_config.model = "someone/something"
    with pytest.raises(NamespaceError, match="VLLM_USE_MODELSCOPE"):
        namespace.weights_probe(config, Config.defaults(), None)


def test_media_that_were_decoded_by_other_settings_than_the_engines_are_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The process that takes requests in may be another host's, with settings of its own."""
    from vllm.config.multimodal import MultiModalConfig

    def mark(**settings: Any) -> str:
        config = make()
        object.__setattr__(config.model_config, "multimodal_config", MultiModalConfig(**settings))
        return compat_requests.media_mark(config)

    assert compat_requests.media_mark(make()) == mark() == mark(mm_processor_cache_gb=1) == ""
    marks = {mark(media_io_kwargs={"video": {"num_frames": 4}}), mark(mm_processor_kwargs={"do_resize": False})}
    monkeypatch.setenv("VLLM_VIDEO_LOADER_BACKEND", "torchcodec")
    marks |= {mark(), mark(media_io_kwargs={"video": {"num_frames": 4}})}
    assert len(marks) == 4
    assert all(one.startswith(compat_requests.MEDIA) for one in marks)


def test_media_that_another_engine_encodes_are_not_known() -> None:
    from vllm.config import ECTransferConfig
    from vllm.config.multimodal import MultiModalConfig

    config = make()
    object.__setattr__(config.model_config, "multimodal_config", MultiModalConfig())
    assert compat_requests.mm_named_by_content(config)
    config.ec_transfer_config = ECTransferConfig(ec_connector="ECExampleConnector", ec_role="ec_consumer")
    assert not compat_requests.mm_named_by_content(config)


def test_who_shares_with_nobody_says_so() -> None:
    from kvplug.adapters.vllm.scheduler import _alone

    found = build(make())
    for known in (False, True):
        assert _alone(found, known) == ""
        for hidden in (found.rotated(), found.rotated().private()):
            assert "shares with no other until it is started again: its cache was reset" in _alone(hidden, known)
    assert "shares with no other until it is started again: its weights were changed" in _alone(found.private(), False)
    assert "It shares again once reload_weights has read them from a folder" in _alone(found.private(), True)


def test_scales_that_depend_on_history_are_refused() -> None:
    config = make()
    object.__setattr__(config.cache_config, "calculate_kv_scales", True)
    with pytest.raises(NamespaceError, match="scales"):
        build(config)


def ranks(*parts: tuple[int, int, int]) -> dict[tuple[int, int], RankLayout]:
    return {(pp, tp): RankLayout((pp, tp), "t", None, ((page(f"{pp}", n),) if n else (),)) for pp, tp, n in parts}


def test_each_rank_has_its_own_part_of_a_slot() -> None:
    plan = namespace.plan_parts(RULES, ranks((0, 0, 100), (0, 1, 100), (1, 0, 70), (1, 1, 70)))
    assert [(p.index, p.nbytes, p.writer) for p in plan[0].values()] == [
        (0, 100, True),
        (1, 100, True),
        (2, 70, True),
        (3, 70, True),
    ]


def test_identical_kv_is_stored_once_per_stage_and_read_by_all() -> None:
    plan = namespace.plan_parts([GroupRule("mla", 16)], ranks((0, 0, 100), (0, 1, 100), (1, 0, 70), (1, 1, 70)))
    assert [(p.index, p.nbytes, p.writer) for p in plan[0].values()] == [
        (0, 100, True),
        (0, 100, False),
        (1, 70, True),
        (1, 70, False),
    ]


def test_a_stage_without_a_layer_of_the_group_has_no_part() -> None:
    plan = namespace.plan_parts(RULES, ranks((0, 0, 100), (1, 0, 0)))
    assert list(plan[0]) == [(0, 0)]


def test_ranks_that_differ_are_refused() -> None:
    with pytest.raises(UnsupportedEngineError, match="differently"):
        namespace.plan_parts(RULES, ranks((0, 0, 100), (0, 1, 50)))


def test_parts_lie_where_the_pool_says() -> None:
    plan = namespace.plan_parts(RULES, ranks((0, 0, 100), (0, 1, 100)))
    placed = namespace.place_parts(plan, lambda sizes: [0, 128])
    assert [part.offset for part in placed[0].values()] == [0, 128]
    assert Config().verify in ("never", "always")


def test_the_connector_is_there_before_any_compiled_kernel() -> None:
    """vLLM imports it while it looks at a configuration, in processes that never copy a byte."""
    modules = "sorted({'kvplug.store', 'kvplug.shm.copy'} & set(sys.modules))"
    code = f"import sys, kvplug.adapters.vllm.connector; print({modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


def test_an_engine_may_look_into_every_module_of_a_process_with_numba() -> None:
    """What vLLM's dispatcher does to each value of each module, in a process that has llvmlite."""
    code = (
        "from kvplug.adapters.vllm.llvmlite_handle import shield_compiled_modules as s; s();"
        "from llvmlite.binding import ffi; s(); s();"
        "[vars(v).get('kernel') for v in list(vars(ffi).values()) if hasattr(v, '__dict__')];"
        "import numba; print(numba.njit(lambda x: x + 1)(1))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["2"]
