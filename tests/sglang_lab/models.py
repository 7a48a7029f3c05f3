"""What SGLang has to be told beside the folder of a tiny model (``tests/lab/models.py``: both labs serve them)."""

from __future__ import annotations

import json
from pathlib import Path

from tests.lab.models import ModelSpec, model_dir

__all__ = ["LORA_ARGUMENTS", "serving_arguments"]

LORA_ARGUMENTS = (
    *("--enable-lora", "--lora-backend", "torch_native", "--max-lora-rank", "8", "--max-loras-per-batch", "4"),
    *("--lora-target-modules", "q_proj", "k_proj", "v_proj", "o_proj"),
)
"""With these a server takes adapters of :func:`tests.lab.models.lora_dir`, by ``--lora-paths name=folder`` or by
``/load_lora_adapter``; a request names one by ``lora_path``."""

MLA_OVERRIDES = {
    "moe_layer_freq": 1,  # SGLang asks for it also where no layer has experts
    # On the CPU SGLang knows this kind of rotary embedding only for latent attention.
    "rope_scaling": {
        "rope_type": "yarn",
        "type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "beta_fast": 32,
        "beta_slow": 1,
    },
}


def serving_arguments(model: ModelSpec | Path | str) -> list[str]:
    """``--model-path`` and what else this model needs; a folder goes as it is."""
    if not isinstance(model, ModelSpec):
        return ["--model-path", str(model)]
    more = {
        "mla": ["--json-model-override-args", json.dumps(MLA_OVERRIDES)],
        "lfm2": ["--max-mamba-cache-size", "64"],  # else it takes gigabytes; and it runs with page_size=1 only
    }
    return ["--model-path", str(model_dir(model)), *more.get(model.family, ())]
