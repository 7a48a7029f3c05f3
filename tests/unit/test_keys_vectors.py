"""kvplug agrees with tests/vectors/keys.json, and so does the reference that the file was made with."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvplug.identity.canonical import encode
from kvplug.identity.extras import encode_extras
from kvplug.identity.keys import KeyChain, fold, root
from kvplug.identity.namespace import ByteRun, GroupLayout, Namespace, WeightsIdentity

FOLDER = Path(__file__).parent.parent / "vectors"
VECTORS = json.loads((FOLDER / "keys.json").read_text(encoding="utf-8"))


def value(v: Any) -> Any:
    """A value from the file's spelling."""
    if isinstance(v, list):
        return [value(item) for item in v]
    if isinstance(v, dict):
        ((kind, x),) = v.items()
        if kind == "bytes":
            return bytes.fromhex(x)
        if kind == "float":
            return float.fromhex(x)
        return {value(key): value(item) for key, item in x}
    return v


def namespace(fields: dict[str, Any]) -> Namespace:
    groups = tuple(
        GroupLayout(
            **{**group, "shards": tuple(tuple(ByteRun(**run) for run in shard) for shard in group["shards"])},
        )
        for group in fields["groups"]
    )
    draft = WeightsIdentity(**fields["draft"]) if fields["draft"] else None
    return Namespace(**{**fields, "weights": WeightsIdentity(**fields["weights"]), "draft": draft, "groups": groups})


def test_the_file_is_what_its_script_makes() -> None:
    spec = importlib.util.spec_from_file_location("make_keys", FOLDER / "make_keys.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.text() == (FOLDER / "keys.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("vector", VECTORS["canonical"], ids=lambda v: json.dumps(v["value"])[:40])
def test_canonical_encoding(vector: dict[str, Any]) -> None:
    assert encode(value(vector["value"])).hex() == vector["encoded"]


def test_no_two_canonical_vectors_are_equal() -> None:
    assert len({v["encoded"] for v in VECTORS["canonical"]}) == len(VECTORS["canonical"])


@pytest.mark.parametrize("vector", VECTORS["namespaces"], ids=["cpu", "gpu"])
def test_namespaces(vector: dict[str, Any]) -> None:
    made = namespace(value(vector["value"]))
    assert made.canonical().hex() == vector["canonical"]
    assert root(made).hex() == vector["root"]


@pytest.mark.parametrize("vector", VECTORS["extras"], ids=lambda v: json.dumps(v["value"])[:40])
def test_extras(vector: dict[str, Any]) -> None:
    parts = {name: value(part) for name, part in vector["value"].items()}
    assert encode_extras(**parts).hex() == vector["encoded"]


@pytest.mark.parametrize("vector", VECTORS["chains"], ids=lambda v: v["note"])
def test_chains(vector: dict[str, Any]) -> None:
    extras = {int(step): bytes.fromhex(e) for step, e in vector["extras"].items()}
    chain = KeyChain(bytes.fromhex(vector["root"]), extras, step_tokens=vector["step_tokens"])
    chain.extend(vector["tokens"])
    assert [row.tobytes().hex() for row in chain.step_keys] == vector["step_keys"]


@pytest.mark.parametrize("vector", VECTORS["fold"], ids=lambda v: f"{v['group']}-{v['shard']}")
def test_fold(vector: dict[str, Any]) -> None:
    key = np.frombuffer(bytes.fromhex(vector["key"]), np.uint8).reshape(1, 32)
    assert fold(key, vector["group"], vector["shard"]).tobytes().hex() == vector["folded"]
