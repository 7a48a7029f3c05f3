"""Tiny models for real engines, made here: no hub, no download, the same bytes for the same parameters.

A model is named by a :class:`ModelSpec`; :func:`model_dir` makes it the first time (a few seconds) and finds it
again after that, in a folder named by a digest of the parameters and of this file.

The weights are random but shaped for tests of a KV cache:

* attention is sharp (queries and keys are scaled up), so what is generated depends on particular tokens far back
  in the prompt, and a wrong or zeroed block shows in the output;
* the logits spread widely, so that a greedy choice is decided by far more than the rounding that a different
  batch schedule brings (float32: about 1e-5); the tests drop the few prompts whose output comes near a tie.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

__all__ = [
    "GEMMA3",
    "HRM_TEXT",
    "LFM2",
    "LLAMA",
    "LLAMA_BIG",
    "LLAMA_OTHER",
    "MELLUM",
    "MISTRAL",
    "MLA",
    "LoraSpec",
    "ModelSpec",
    "lora_dir",
    "model_dir",
]

Family = Literal["llama", "gemma3", "mla", "mellum", "mistral", "lfm2", "hrm_text"]

VOCAB = 2048


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """What decides a tiny model's bytes. Sizes in elements, ``max_position`` and ``window`` in tokens."""

    family: Family = "llama"
    layers: int = 4
    hidden: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    inter: int = 512
    max_position: int = 8192
    window: int = 64
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class LoraSpec:
    """An adapter over the attention projections of a llama :class:`ModelSpec`; ``scale`` is the weights' spread."""

    seed: int = 1
    rank: int = 8
    scale: float = 0.08


LLAMA = ModelSpec()
LLAMA_OTHER = ModelSpec(seed=1)
"""The same shapes as :data:`LLAMA` with other weights: for weights that change in a living engine."""
LLAMA_BIG = ModelSpec(layers=8, hidden=512, heads=8, kv_heads=2, inter=2048)
"""Heavy enough that computing a long prompt takes visible time: for the demo and the bench."""
GEMMA3 = ModelSpec(family="gemma3", layers=6)
MLA = ModelSpec(family="mla", layers=3)
LFM2 = ModelSpec(family="lfm2", layers=6)
"""Two layers of three keep a state of the last tokens instead of keys and values."""
HRM_TEXT = ModelSpec(family="hrm_text", layers=2)
"""A prefix LM: every token of a prompt attends to the whole prompt, so a prefix's KV depends on what comes after it."""
MISTRAL = ModelSpec(family="mistral", window=100)
"""Every layer with a sliding window: one cache group that does not keep its whole prefix."""
MELLUM = ModelSpec(family="mellum", layers=6)
"""Two layers of three with a sliding window, like :data:`GEMMA3`: the one of the kind that SGLang keeps apart, in a
pool of their own."""


def cache_dir() -> Path:
    """Where made models are kept: ``$VLLM_LAB_MODELS``, else inside the running virtual environment."""
    given = os.environ.get("VLLM_LAB_MODELS")
    return Path(given) if given else Path(sys.prefix) / "lab-models"


def model_dir(spec: ModelSpec) -> Path:
    """Path of the model's folder (config, safetensors, tokenizer), made if it is not there yet."""
    return _cached(f"{spec.family}-{_digest(spec)}", lambda out: _make_model(spec, out))


def lora_dir(spec: ModelSpec, lora: LoraSpec) -> Path:
    """Path of a LoRA adapter's folder in PEFT's format for ``spec``, made if it is not there yet."""
    return _cached(f"lora-{_digest(spec, lora)}", lambda out: _make_lora(spec, lora, out))


def _digest(*specs: Any) -> str:
    text = json.dumps([dataclasses.asdict(s) for s in specs], sort_keys=True)
    source = Path(__file__).read_bytes()
    return hashlib.sha256(text.encode() + source).hexdigest()[:16]


def _cached(name: str, make: Any) -> Path:
    root = cache_dir()
    target = root / name
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
    try:
        make(building)
        building.chmod(0o755)
        try:
            building.rename(target)
        except OSError:  # another process was faster: its bytes are the same
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


def _make_model(spec: ModelSpec, out: Path) -> None:
    import torch
    from transformers import (
        DeepseekV2Config,
        DeepseekV2ForCausalLM,
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        HrmTextConfig,
        HrmTextForCausalLM,
        Lfm2Config,
        Lfm2ForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        MellumConfig,
        MellumForCausalLM,
        MistralConfig,
        MistralForCausalLM,
    )

    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.inter,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "max_position_embeddings": spec.max_position,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
    }
    kinds = ["full_attention" if i % 3 == 2 else "sliding_attention" for i in range(spec.layers)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model: Any
        if spec.family == "llama":
            model = LlamaForCausalLM(LlamaConfig(num_key_value_heads=spec.kv_heads, head_dim=spec.head_dim, **common))
        elif spec.family == "gemma3":
            model = Gemma3ForCausalLM(
                Gemma3TextConfig(
                    num_key_value_heads=spec.kv_heads,
                    head_dim=spec.head_dim,
                    sliding_window=spec.window,
                    layer_types=kinds,
                    **common,
                )
            )
        elif spec.family == "hrm_text":
            model = HrmTextForCausalLM(
                HrmTextConfig(head_dim=spec.head_dim, H_cycles=1, L_cycles=1, embedding_scale=1.0, **common)
            )
        elif spec.family == "lfm2":
            model = Lfm2ForCausalLM(
                Lfm2Config(
                    num_key_value_heads=spec.kv_heads,
                    layer_types=[kind.replace("sliding_attention", "conv") for kind in kinds],
                    block_auto_adjust_ff_dim=False,
                    **common,
                )
            )
        elif spec.family == "mistral":
            model = MistralForCausalLM(
                MistralConfig(
                    num_key_value_heads=spec.kv_heads, head_dim=spec.head_dim, sliding_window=spec.window, **common
                )
            )
        elif spec.family == "mellum":
            model = MellumForCausalLM(
                MellumConfig(
                    num_key_value_heads=spec.kv_heads,
                    head_dim=spec.head_dim,
                    sliding_window=spec.window,
                    layer_types=kinds,
                    mlp_layer_types=["dense"] * spec.layers,
                    **common,
                )
            )
        else:
            # The shapes of the latent (512 + 64) are the ones that vLLM's CPU kernel is built for. All layers dense:
            # experts say nothing about a cache.
            model = DeepseekV2ForCausalLM(
                DeepseekV2Config(
                    kv_lora_rank=512,
                    q_lora_rank=None,
                    qk_rope_head_dim=64,
                    qk_nope_head_dim=128,
                    v_head_dim=128,
                    first_k_dense_replace=spec.layers,
                    n_routed_experts=4,
                    num_experts_per_tok=2,
                    n_shared_experts=1,
                    moe_intermediate_size=64,
                    num_key_value_heads=spec.heads,
                    **common,
                )
            )
        _shape_weights(model)
    model.float().save_pretrained(out, safe_serialization=True)
    _make_tokenizer(out)


def _shape_weights(model: Any) -> None:
    """Scales each kind of matrix (module docstring says why). Norms stay at one, except those of queries and keys,
    which would undo it; biases do not exist."""
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() < 2:
                if name.endswith(("q_norm.weight", "k_norm.weight")) and bool((weight == 1).all()):
                    weight.fill_(2.0)
                continue
            fan_in = weight.shape[1]
            if "embed_tokens" in name:
                std = 1.0
            elif "lm_head" in name:
                std = 4.0 / fan_in**0.5
            elif any(part in name for part in ("q_proj", "k_proj", "kv_a_proj", "kv_b_proj", "o_proj")):
                std = 2.0 / fan_in**0.5
            else:
                std = 1.0 / fan_in**0.5
            weight.normal_(0.0, std)


def _make_tokenizer(out: Path) -> None:
    """A byte-level BPE tokenizer trained on made-up words: ids below VOCAB, 0 = <s>, 1 = </s>, 2 = <pad>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(0)
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(4000)]
    lines = [" ".join(rng.choices(words, k=40)) for _ in range(1000)]
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=VOCAB,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<s>", "</s>", "<pad>"],
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    )
    fast.save_pretrained(out)


def _make_lora(spec: ModelSpec, lora: LoraSpec, out: Path) -> None:
    """Writes the two files of a PEFT adapter directly; B is not zero, so the adapter changes every projection."""
    import torch
    from safetensors.torch import save_file

    if spec.family != "llama":
        raise ValueError(f"adapters are made for llama models only, not {spec.family}")
    shapes = {
        "q_proj": (spec.hidden, spec.heads * spec.head_dim),
        "k_proj": (spec.hidden, spec.kv_heads * spec.head_dim),
        "v_proj": (spec.hidden, spec.kv_heads * spec.head_dim),
        "o_proj": (spec.heads * spec.head_dim, spec.hidden),
    }
    generator = torch.Generator().manual_seed(lora.seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(spec.layers):
        for module, (n_in, n_out) in shapes.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            for part, shape in (("lora_A", (lora.rank, n_in)), ("lora_B", (n_out, lora.rank))):
                tensors[f"{prefix}.{part}.weight"] = torch.randn(shape, generator=generator) * lora.scale
    save_file(tensors, str(out / "adapter_model.safetensors"))
    (out / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": "tiny",
                "r": lora.rank,
                "lora_alpha": lora.rank,
                "lora_dropout": 0.0,
                "bias": "none",
                "target_modules": sorted(shapes),
            }
        )
    )
