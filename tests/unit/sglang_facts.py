"""Facts of a rank as tests of the SGLang adapter need them: plain values, no SGLang."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from kvplug.adapters.sglang import compat
from kvplug.adapters.sglang.compat import Facts

MODEL_VALUES = {"hf": {"hidden_size": 64}, "dtype": "torch.float32", "quantization": None, "context_len": None}


def facts(path: Path | str, **changes: Any) -> Facts:
    """One rank of a plain model whose weights lie at *path*."""
    plain = Facts(
        server={"model_path": str(path), "served_model_name": "m"},
        model={**MODEL_VALUES, "architecture": ["LlamaForCausalLM"]},
        model_path=str(path),
        revision=None,
        draft_path=None,
        draft_revision=None,
        load_format="auto",
        download_dir=None,
        page_size=64,
        kv_dtype="float32",
        kv_pool="MHATokenToKVPool",
        device="cpu",
        backends={"attention_backend": "torch_native"},
        is_multimodal=False,
        is_generation=True,
        is_eagle=False,
        tp=(0, 1),
        cp=(0, 1),
        pp=(0, 1),
        layers=(0, 2),
        quantization_param_path=None,
        lora_enabled=False,
        rust_tree=False,
        replica="0.0",
        environment={},
        one_tokenizer=True,
    )
    return dataclasses.replace(plain, **changes)


def give(monkeypatch: pytest.MonkeyPatch, known: Facts) -> None:
    """Makes these the facts of this process, whose SGLang is 0.5.23."""
    monkeypatch.setattr(compat, "have_context", lambda: True)
    monkeypatch.setattr(compat, "facts", lambda: known)
    monkeypatch.setattr(compat, "version", lambda: "0.5.23")
    monkeypatch.setattr(compat, "dummy_seed", lambda: 1234)
