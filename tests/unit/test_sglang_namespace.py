"""What an SGLang engine's namespace holds: whatever decides the bytes, and nothing that differs between its ranks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from kvplug.adapters.sglang import namespace, settings
from kvplug.config import Config
from kvplug.errors import NamespaceError
from kvplug.identity.namespace import WeightsIdentity
from tests.unit.sglang_facts import facts, give
from tests.unit.test_environment import listed

WEIGHTS = WeightsIdentity("files", b"w" * 32)
DRAFT = WeightsIdentity("files", b"d" * 32)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, facts("/model"))


def digest(layout: Any = None, weights: Any = WEIGHTS, draft: Any = None, **changes: Any) -> bytes:
    return namespace.build(facts("/model", **changes), layout or {"mode": "linker"}, weights, draft).digest()


DIFFERENT = [
    {"layout": {"mode": "hicache"}},
    {"weights": DRAFT},
    {"draft": DRAFT, "draft_path": "/draft"},
    {"draft_path": "/model"},
    {"kv_dtype": "bfloat16"},
    {"kv_pool": "MLATokenToKVPool"},
    {"page_size": 16},
    {"device": "cuda"},
    {"backends": {"attention_backend": "fa3"}},
    {"backends": {"attention_backend": "torch_native", "decode_attention_backend": "fa3"}},
    {"is_eagle": True},
    {"tp": (0, 2)},
    {"pp": (0, 2)},
    {"model": {"hf": {"hidden_size": 128}, "dtype": "torch.float32", "quantization": None}},
    {"model": {"hf": {"hidden_size": 64}, "dtype": "torch.float16", "quantization": None}},
    {"model": {"hf": {"hidden_size": 64}, "dtype": "torch.float32", "quantization": "fp8"}},
    {"environment": {"SGLANG_IMAGE_MAX_PIXELS": "65536"}},
    {"environment": {"SGLANG_IMAGE_MAX_PIXELS": "131072"}},
    *({"server": {name: "another"}} for name in sorted(listed("sglang-settings.txt") - {"dcp_size"})),
    {"server": {"a_setting_of_a_later_release": 1}},
]


@pytest.mark.parametrize("change", DIFFERENT, ids=lambda c: " ".join(map(str, c.get("server", c))))
def test_what_decides_the_bytes_makes_another_namespace(change: dict[str, Any]) -> None:
    assert digest(**change) != digest()


def test_no_two_of_them_meet() -> None:
    digests = [digest(**change) for change in DIFFERENT]
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"tp": (0, 2)}, {"tp": (1, 2)}),
        ({"pp": (0, 2), "layers": (0, 1)}, {"pp": (1, 2), "layers": (1, 2)}),
        ({"replica": "0.0"}, {"replica": "1.1"}),
        ({}, {"server": {"port": 1, "served_model_name": "x", "max_running_requests": 3, "enable_metrics": True}}),
        ({}, {"lora_enabled": True}),
    ],
)
def test_ranks_and_engines_of_one_model_agree(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert digest(**one) == digest(**two)


def test_scales_count_by_content(tmp_path: Path) -> None:
    one, two = tmp_path / "a.json", tmp_path / "b.json"
    one.write_text("{}")
    two.write_text("{}")
    with_scales = digest(quantization_param_path=str(one))
    assert with_scales != digest()
    assert with_scales == digest(quantization_param_path=str(two))
    two.write_text("{ }")
    assert with_scales != digest(quantization_param_path=str(two))
    with pytest.raises(NamespaceError, match="can't be read"):
        digest(quantization_param_path=str(tmp_path / "none"))


@pytest.mark.parametrize("change", [{"cp": (0, 2)}, {"server": {"dcp_size": 2}}])
def test_context_parallelism_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(NamespaceError, match="context parallelism"):
        digest(**change)


def identified(settings: dict[str, Any] | None = None, **changes: Any) -> tuple[Any, Any]:
    config = Config.defaults().model_copy(update=settings or {})
    probe, draft = namespace.probes(facts(changes.pop("path"), **changes), config, time.time_ns())
    return probe.result(60), None if draft is None else draft.result(60)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("model", "draft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(name.encode())
    time.sleep(0.01)  # older than "now" by more than the file system's clock ticks
    return tmp_path / "model", tmp_path / "draft"


def test_a_draft_model_is_identified_too(folders: tuple[Path, Path]) -> None:
    model, draft = folders
    one, two = identified(path=model, draft_path=str(draft))
    assert {one.kind, two.kind} == {"files"}
    assert one.digest != two.digest
    assert identified(path=model, draft_path=str(model))[1] is None
    with pytest.raises(NamespaceError, match="draft model with dummy weights"):
        identified(path=model, draft_path=str(draft), server={"speculative_draft_load_format": "dummy"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"load_format": "remote_instance"}, "--load-format remote_instance"),
        ({"load_format": "ipc_cache"}, "--load-format ipc_cache"),
        ({"load_format": "private"}, "--load-format private"),
        ({"load_format": "a_new_one"}, "--load-format a_new_one"),
        ({"server": {"weight_cache_mode": "daemon"}}, "--weight-cache-mode daemon"),
        ({"server": {"modelopt_checkpoint_restore_path": "/x"}}, "--modelopt-checkpoint-restore-path"),
    ],
)
def test_weights_from_elsewhere_need_the_users_word(
    folders: tuple[Path, Path], change: dict[str, Any], words: str
) -> None:
    with pytest.raises(NamespaceError, match=words):
        identified(path=folders[0], **change)
    identity, _ = identified({"weights_id": "mine"}, path=folders[0], **change)
    assert identity.kind == "user"


def test_two_drafts_that_a_user_vouches_for_are_told_apart() -> None:
    user = WeightsIdentity("user", b"u" * 32)
    assert digest(weights=user, draft=user, draft_path="/a") != digest(weights=user, draft=user, draft_path="/b")


PARTIAL = [
    {"load_format": "dummy"},
    {"load_format": "layered"},
    {"draft_path": "/draft"},
    {"draft_path": "/model"},
    {"lora_enabled": True},
    {"model": {"hf": {}, "dtype": "torch.float32", "quantization": "fp8"}},
    {"server": {"offload_group_size": 2}},
    {"server": {"init_expert_location": "/experts.json"}},
    {"server": {"weight_cache_mode": "client"}},
    *({"server": {name: 1}} for name in namespace._NOT_RELOADED),
]


@pytest.mark.parametrize("change", PARTIAL, ids=lambda c: " ".join(map(str, c.get("server", c))))
def test_what_an_update_from_files_would_leave_in_part(change: dict[str, Any]) -> None:
    assert namespace.reloaded_from(facts("/model", **change)) is None


def test_an_update_from_files_replaces_a_plain_model() -> None:
    """With SGLang's settings as they are when nobody gives any; and the settings that are looked at exist."""
    plain = {
        "cpu_offload_gb": 0,
        "enable_eplb": False,
        "init_expert_location": "trivial",
        "offload_group_size": -1,
        "speculative_algorithm": None,
        "weight_cache_mode": "off",
    }
    for server in ({}, plain):
        assert namespace.reloaded_from(facts("/model", server=server)) == "/model"
    looked_at = {*namespace._NOT_RELOADED, "offload_group_size", "init_expert_location", "weight_cache_mode"}
    assert looked_at <= listed("sglang-settings.txt") | settings.HARMLESS
