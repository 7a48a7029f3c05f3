"""Every environment variable that an engine reads was looked at, in each release; which of them part two engines."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from kvplug.adapters.common.environment import Variables
from kvplug.adapters.sglang import environment as sglang
from kvplug.adapters.vllm import environment as vllm
from kvplug.engines import SUPPORTED
from tests.sglang_lab import env as sglang_lab
from tests.vllm_lab.env import matrix_path

LOOKED_AT = Path(__file__).parent / "looked_at"
READS = re.compile(
    r"(?:environ\.(?:get|setdefault|pop)\(|getenv\(|environ\[|(?:get_\w*env\w*|env_var)\()\s*f?[\"'](\w+)[\"']"
    r"|[\"'](\w+)[\"']\s+(?:not\s+)?in\s+os\.environ"
)
"""A variable that is read by its name, past the register."""
NOT_SERVING = {"__pycache__", "benchmarks", "test", "tests"}
VLLM_MATRIX = tuple(v for v in SUPPORTED["vllm"].tested if v != SUPPORTED["vllm"].built[-1])


def vllm_roots() -> dict[str, Path]:
    """Where each installed release of vLLM lies."""
    found = {version: path / "vllm" for version in VLLM_MATRIX if (path := matrix_path(version)) is not None}
    spec = importlib.util.find_spec("vllm")
    if spec is not None and spec.origin is not None:
        found["installed"] = Path(spec.origin).parent
    return found


def sglang_roots() -> dict[str, Path]:
    """Where each installed release of SGLang lies."""
    lab = sglang_lab
    return {v: lab.version_path(v) / "sglang/srt" for v in lab.VERSIONS if lab.installed(v)}


def registered(tree: ast.AST) -> set[str]:
    """Names in vLLM's dictionary of variables, or in the body of SGLang's class of them."""
    found: set[str] = set()
    for node in ast.walk(tree):
        value = getattr(node, "value", None)
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(value, ast.Dict):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == "environment_variables" for target in targets):
                found |= {key.value for key in value.keys if isinstance(key, ast.Constant)}
        if isinstance(node, ast.ClassDef) and node.name == "Envs":
            found |= {
                target.id
                for line in node.body
                if isinstance(line, ast.Assign)
                for target in line.targets
                if isinstance(target, ast.Name)
            }
    return found


def read_by(root: Path) -> set[str]:
    """Every variable that the sources below a folder read."""
    register = root / ("envs.py" if root.name == "vllm" else "environ.py")
    found = registered(ast.parse(register.read_text()))
    assert len(found) > 200, f"{register} is not as it was: no register of variables was found in it"
    for path in root.rglob("*.py"):
        if not NOT_SERVING & set(path.relative_to(root).parts):
            for match in READS.finditer(path.read_text(errors="replace")):
                found.add(match[1] or match[2])
    return found


def unknown(names: Iterable[str], variables: Variables, looked_at: set[str]) -> list[str]:
    """Those that nobody has looked at."""
    return sorted(name for name in names if name not in variables.harmless and name not in looked_at)


def listed(name: str) -> set[str]:
    return set((LOOKED_AT / name).read_text().split())


ENGINES = {
    "vllm": (vllm.VARIABLES, "vllm-variables.txt", vllm_roots),
    "sglang": (sglang.VARIABLES, "sglang-variables.txt", sglang_roots),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_every_variable_that_an_engine_reads_was_looked_at(engine: str) -> None:
    variables, file, roots = ENGINES[engine]
    looked_at, everywhere = listed(file), set()
    if not roots():
        pytest.skip(f"no {engine} here")
    for version, root in roots().items():
        names = read_by(root)
        everywhere |= names
        new = unknown(names, variables, looked_at)
        assert not new, (
            f"{engine} {version} reads variables that nobody has looked at: {', '.join(new)}. They count until then. "
            f"See {(LOOKED_AT / 'README.md')}"
        )
    assert not looked_at & variables.harmless
    assert variables.named <= looked_at
    read_here = len(looked_at & everywhere)  # builds for CPUs lack what computes on GPUs only
    assert read_here > 0.7 * len(looked_at), "a misspelt name would never make a difference"
    uncounted = sorted(name for name in looked_at if not variables.counts(name) and name not in variables.harmless)
    assert not [name for name in uncounted if name.startswith(variables.prefixes)]


def test_a_new_variable_is_noticed(tmp_path: Path) -> None:
    root = tmp_path / "vllm"
    (root / "inner").mkdir(parents=True)
    entries = ", ".join(f'"VLLM_{number}": lambda: 1' for number in range(300))
    (root / "envs.py").write_text(f"environment_variables = {{{entries}}}\n")
    (root / "inner" / "kernel.py").write_text(
        'fast = os.environ.get("NEW_MATH", "0")\nif "OLD_MATH" in os.environ: pass\n'
    )
    names = read_by(root)
    assert {"VLLM_7", "NEW_MATH", "OLD_MATH"} <= set(unknown(names, vllm.VARIABLES, set()))


@pytest.mark.parametrize(
    "name",
    [
        "VLLM_VIDEO_LOADER_BACKEND",
        "VLLM_MEDIA_CONNECTOR",
        "VLLM_BATCH_INVARIANT",
        "VLLM_FLOAT32_MATMUL_PRECISION",
        "VLLM_ROCM_USE_AITER",
        "VLLM_A_VARIABLE_OF_A_LATER_RELEASE",
        "NVIDIA_TF32_OVERRIDE",
        "ONEDNN_DEFAULT_FPMATH_MODE",
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
        "TRITON_F32_DEFAULT",
        "VIDEO_MAX_PIXELS",
    ],
)
def test_what_decides_how_a_byte_is_computed_counts(name: str) -> None:
    assert vllm.VARIABLES.deciding({name: "1", "HOME": "/root"}) == {name: "1"}


@pytest.mark.parametrize(
    "name",
    [
        "VLLM_HOST_IP",
        "VLLM_PORT",
        "VLLM_DP_RANK",
        "VLLM_CACHE_ROOT",
        "VLLM_LOGGING_LEVEL",
        "VLLM_API_KEY",
        "CUDA_VISIBLE_DEVICES",
        "OMP_NUM_THREADS",
        "TORCHINDUCTOR_CACHE_DIR",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING",
        "PYTORCH_CUDA_ALLOC_CONF",
        "VLLM_SERVICE_HOST",
        "VLLM_SERVICE_PORT_HTTP",
        "VLLM_PORT_8000_TCP_ADDR",
        "KVPLUG_POOL",
        "HOSTNAME",
    ],
)
def test_what_differs_between_replicas_parts_nobody(name: str) -> None:
    assert vllm.VARIABLES.deciding({name: "1"}) == {}


def test_the_same_holds_for_sglang() -> None:
    counts = {
        "SGLANG_IMAGE_MAX_PIXELS": "1",
        "SGL_USE_DEEPGEMM_BMM": "1",
        "SGLANG_OF_A_LATER_RELEASE": "x",
        "CK_MOE": "1",
    }
    harmless = {
        "SGLANG_PORT": "1",
        "SGLANG_RUN_ID": "x",
        "SGLANG_LOG_MS": "1",
        "SGLANG_SERVICE_HOST": "::1",
        "RANK": "0",
    }
    assert sglang.VARIABLES.deciding({**counts, **harmless}) == counts
