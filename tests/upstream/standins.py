"""Models under the names that other projects' tests ask the hub for: tiny, made here, in the form of the hub's cache.

What a test looks at is never what a model says, only that the same prompt gives the same answer; so a few shapes do for
all names. Some names only ever lend a configuration.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.lab.models import GEMMA3, LLAMA, ModelSpec, model_dir
from tests.upstream.common import kept

COMMIT = "0" * 40
MODELS: dict[str, ModelSpec] = {
    "Qwen/Qwen3-0.6B": LLAMA,
    "google/gemma-3-1b-it": GEMMA3,
    "hmellor/tiny-random-LlamaForCausalLM": LLAMA,
    "meta-llama/Llama-3.1-8B": LLAMA,
    "meta-llama/Llama-3.2-1B-Instruct": LLAMA,
}
OPT = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "hidden_size": 768,
    "word_embed_proj_dim": 768,
    "ffn_dim": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "max_position_embeddings": 2048,
    "vocab_size": 50272,
    "torch_dtype": "float16",
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "image_token_index": 32000,
    "torch_dtype": "float16",
    "text_config": {
        "model_type": "llama",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "vocab_size": 32064,
        "max_position_embeddings": 4096,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "image_size": 336,
        "patch_size": 14,
    },
}
CONFIGURATIONS: dict[str, dict[str, object]] = {
    "facebook/opt-125m": OPT,
    "facebook/opt-350m": OPT,
    "llava-hf/llava-1.5-7b-hf": LLAVA,
}


def hub() -> Path:
    """The cache folder, with every model in it."""
    folder = kept() / "hub"
    for name, spec in MODELS.items():
        _entry(folder, name, model_dir(spec))
    for name, configuration in CONFIGURATIONS.items():
        snapshot = _entry(folder, name, None)
        (snapshot / "config.json").write_text(json.dumps(configuration))
        for file in model_dir(LLAMA).glob("*token*"):
            shutil.copy(file, snapshot)
    return folder


def _entry(folder: Path, name: str, model: Path | None) -> Path:
    entry = folder / f"models--{name.replace('/', '--')}"
    snapshot = entry / "snapshots" / COMMIT
    (entry / "refs").mkdir(parents=True, exist_ok=True)
    (entry / "refs" / "main").write_text(COMMIT)
    snapshot.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir() if model is not None else ():
        link = snapshot / file.name
        link.unlink(missing_ok=True)
        link.symlink_to(file)
    return snapshot
