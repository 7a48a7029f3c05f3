"""Promises of `namespace` and `canonical`: what decides bytes changes the digest, and nothing is guessed."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import pickle
import re
import types
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplug.errors import NamespaceError
from kvplug.identity.canonical import MAX_DEPTH, encode
from kvplug.identity.namespace import ByteRun, GroupLayout, Namespace, WeightsIdentity, digest_of

RUNS = (ByteRun("layers.0", 4096), ByteRun("layers.1", 4096))
FULL = GroupLayout("full", 16, (RUNS,))
WEIGHTS = WeightsIdentity("files", b"w" * 32)
NAMESPACE = Namespace(
    weights=WEIGHTS,
    config_digest=digest_of({"hidden_size": 64}),
    quantization=None,
    kv_dtype="bfloat16",
    kv_scales=None,
    draft=None,
    eagle=False,
    engine="vllm",
    engine_version="0.32.0",
    device="cpu",
    attention_backend="CPU_ATTN",
    cpu_isa=None,
    kv_layout="NHD",
    groups=(FULL,),
    tp=1,
    pp=1,
    cp=1,
)


def group(**changes: Any) -> dict[str, Any]:
    return {"groups": (dataclasses.replace(FULL, **changes),)}


CHANGES: list[dict[str, Any]] = [
    {"weights": WeightsIdentity("files", b"v" * 32)},
    {"weights": WeightsIdentity("user", b"w" * 32)},
    {"config_digest": digest_of({"hidden_size": 65})},
    {"quantization": "fp8"},
    {"quantization": ""},
    {"quantization": False},
    {"quantization": 0},
    {"quantization": {}},
    {"quantization": {"method": "fp8", "group": 128}},
    {"kv_dtype": "fp8_e4m3"},
    {"kv_scales": {"k": 0.5}},
    {"kv_scales": {"k": 0.25}},
    {"draft": WEIGHTS},
    {"eagle": True},
    {"engine": "sglang"},
    {"engine_version": "0.31.0"},
    {"device": "cuda"},
    {"attention_backend": "FLASH_ATTN"},
    {"attention_backend": {"full": "CPU_ATTN"}},
    {"cpu_isa": ""},
    {"cpu_isa": "amx"},
    {"kv_layout": "HND"},
    {"groups": (FULL, FULL)},
    group(kind="mla"),
    group(span_tokens=32),
    group(window_tokens=1024),
    group(shards=(RUNS, RUNS)),
    group(shards=(RUNS[:1],)),
    group(shards=(RUNS[::-1],)),
    group(shards=(RUNS[:1], RUNS[1:])),
    group(shards=((ByteRun("layers.0", 4096), ByteRun("layers.2", 4096)),)),
    group(shards=((ByteRun("layers.0", 4096), ByteRun("layers.1", 8192)),)),
    {"tp": 2},
    {"pp": 2},
    {"cp": 2},
    {"weights_epoch": b"e" * 32},
    {"rotation": b"e" * 32},
    {"other": {"a": 1}},
    {"other": {"a": 2}},
]


@pytest.mark.parametrize("change", CHANGES, ids=repr)
def test_each_field_changes_the_digest(change: dict[str, Any]) -> None:
    changed = dataclasses.replace(NAMESPACE, **change)
    assert changed.digest() != NAMESPACE.digest()
    assert changed != NAMESPACE
    assert NAMESPACE.differences(changed) == tuple(change)


def test_the_table_of_changes_covers_every_field_and_no_two_changes_are_alike() -> None:
    public = {field.name for field in dataclasses.fields(Namespace) if not field.name.startswith("_")}
    assert {name for change in CHANGES for name in change} == public
    digests = {dataclasses.replace(NAMESPACE, **change).digest() for change in CHANGES}
    assert len(digests) == len(CHANGES)


def test_equal_namespaces_have_equal_digests_wherever_they_were_made() -> None:
    again = dataclasses.replace(NAMESPACE, other={"b": 1, "a": 2})
    other_order = dataclasses.replace(NAMESPACE, other={"a": 2, "b": 1})
    assert again.digest() == other_order.digest()
    assert hash(again) == hash(other_order)
    assert pickle.loads(pickle.dumps(again)).digest() == again.digest()
    assert again.differences(other_order) == ()


def test_a_mapping_that_is_changed_afterwards_changes_nothing() -> None:
    other = {"a": 1}
    namespace = dataclasses.replace(NAMESPACE, other=other)
    before = namespace.digest()
    other["a"] = 2
    assert namespace.digest() == before


def test_private_and_rotated_namespaces_are_new_each_time_and_identified_ones_are_shared_again() -> None:
    made = {NAMESPACE.private().digest() for _ in range(10)} | {NAMESPACE.rotated().digest() for _ in range(10)}
    assert len(made | {NAMESPACE.digest()}) == 21
    epoch = bytes(range(32))
    assert NAMESPACE.private(epoch).digest() == NAMESPACE.private(epoch).digest() != NAMESPACE.rotated(epoch).digest()
    assert NAMESPACE.private().identified(WEIGHTS) == NAMESPACE
    rotated = NAMESPACE.rotated()
    assert rotated.private().identified(WEIGHTS) == rotated, "a reset cache stays reset when weights change"


def test_describe_is_one_line_and_says_what_is_private() -> None:
    line = NAMESPACE.private().rotated().describe()
    assert "\n" not in line
    assert "vllm 0.32.0" in line
    assert "private" in line
    assert "rotated" in line
    assert NAMESPACE.digest().hex() not in NAMESPACE.describe()
    assert NAMESPACE.digest().hex()[:12] in NAMESPACE.describe()


class Method(str, enum.Enum):
    FP8 = "fp8"


def _named(value: object) -> str:
    """The same in every process: no addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"quantization": object()}, "namespace.quantization"),
        ({"quantization": Method.FP8}, "namespace.quantization"),
        ({"quantization": {"a": [1, {"b": {1}}]}}, r"namespace.quantization.a\[1\].b"),
        ({"attention_backend": b"x".__class__}, "namespace.attention_backend"),
        ({"other": {"x": np.float64(1)}}, "namespace.other.x"),
        ({"other": {"x": float("nan")}}, "namespace.other.x"),
        ({"other": {("a", "b"): 1}}, "namespace.other"),
        ({"other": {True: 1}}, "namespace.other"),
        ({"other": {"x": "\ud800"}}, "namespace.other.x"),
        ({"eagle": np.True_}, "namespace.eagle"),
        ({"eagle": 0}, "namespace.eagle"),
        ({"groups": ()}, "groups"),
        ({"groups": (object(),)}, r"namespace.groups\[0\]"),
        ({"config_digest": b"short"}, "config_digest"),
        ({"config_digest": "0" * 32}, "config_digest"),
        ({"kv_scales": "dynamic"}, "kv_scales"),
        ({"kv_dtype": "auto"}, "kv_dtype"),
        ({"kv_dtype": None}, "kv_dtype"),
        ({"engine": ""}, "engine"),
        ({"engine_version": None}, "engine_version"),
        ({"tp": 0}, "tp"),
        ({"pp": True}, "pp"),
        ({"weights_epoch": b""}, "weights_epoch"),
        ({"rotation": "x" * 32}, "rotation"),
        ({"weights": None}, "weights"),
        ({"weights": "org/name"}, "weights"),
        ({"draft": "org/name"}, "draft"),
    ],
    ids=_named,
)
def test_what_cannot_be_identified_is_refused_by_name(change: dict[str, Any], path: str) -> None:
    with pytest.raises(NamespaceError, match=path):
        dataclasses.replace(NAMESPACE, **change)


@pytest.mark.parametrize("span", [0, -16, 16.0, True, "16", None])
def test_a_span_is_a_positive_number_of_tokens(span: Any) -> None:
    with pytest.raises(NamespaceError, match="span"):
        GroupLayout("full", span, (RUNS,))


@pytest.mark.parametrize("bad", [("", b"w" * 32), ("files", b"w" * 31), ("files", "w" * 32), (None, b"w" * 32)])
def test_a_weights_identity_is_a_kind_and_32_bytes(bad: tuple[Any, Any]) -> None:
    with pytest.raises(NamespaceError):
        WeightsIdentity(*bad)


# the canonical encoding

SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=3)
    | st.binary(max_size=3)
)  # fmt: skip
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2) | st.integers(-2, 2), inner, max_size=3)
    ),
    max_leaves=8,
)


def meaning(value: Any) -> str:
    """repr of builtins is injective, types and -0.0 included, once mappings are put into one order."""
    if isinstance(value, list):
        return "[" + ", ".join(map(meaning, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(sorted(f"{key!r}: {meaning(item)}" for key, item in value.items())) + "}"
    return repr(value)


@given(a=VALUES, b=VALUES)
def test_two_values_encode_alike_only_if_they_are_the_same(a: Any, b: Any) -> None:
    assert (encode(a) == encode(b)) == (meaning(a) == meaning(b))


@given(a=st.lists(VALUES, min_size=2, max_size=3), b=st.lists(VALUES, min_size=2, max_size=3))
def test_encodings_joined_can_be_told_apart(a: list[Any], b: list[Any]) -> None:
    joined = b"".join(map(encode, a)), b"".join(map(encode, b))
    assert (joined[0] == joined[1]) == (meaning(a) == meaning(b))


def test_look_alikes_are_distinct_and_missing_is_not_none() -> None:
    alike: list[Any] = [None, "", 0, False, 0.0, -0.0, b"", [], {}, "0", "None", b"0", [None], {"": None}, [[]], [{}]]
    assert len({encode(value) for value in alike}) == len(alike)
    assert encode({"a": None}) != encode({})
    assert encode({1: "x"}) != encode({"1": "x"})


def test_list_and_tuple_are_the_same_sequence_and_any_mapping_is_a_mapping() -> None:
    assert encode([1, (2, 3)]) == encode((1, [2, 3]))
    assert encode(types.MappingProxyType({"a": 1})) == encode({"a": 1}) == encode(collections.OrderedDict(a=1))


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    "bad",
    [
        object(), {1, 2}, frozenset(), decimal.Decimal(1), datetime.date(2026, 1, 1), Method.FP8, Text("x"),
        np.float64(1), np.int64(1), np.zeros(1), bytearray(1), memoryview(b"x"), 1j, range(3), float, ..., WEIGHTS,
        10**5000, iter([]),
    ],
    ids=lambda v: type(v).__name__,
)  # fmt: skip
def test_values_of_other_types_are_refused_and_never_spelled_by_repr(bad: Any) -> None:
    with pytest.raises(NamespaceError, match=r"config\.x\[0\]"):
        encode({"x": [bad]}, "config")


def test_a_value_that_contains_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(NamespaceError, match="contains itself"):
        encode(loop)
    deep: Any = 1
    for _ in range(MAX_DEPTH):
        deep = [deep]
    encode(deep)
    with pytest.raises(NamespaceError):
        encode([deep])
