"""Promises of kvplug.identity.keys: one key per content, made step by step or at once, the same in every process."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
from array import array
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from kvplug.errors import KeyFormatError, NamespaceError
from kvplug.identity.extras import encode_extras
from kvplug.identity.keys import KEY_BYTES, KeyChain, as_key_array, block_keys, fold, root, step_for_spans

ROOT = root(b"a namespace")
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=8) | st.builds(
    lambda n, seed: random.Random(seed).choices(range(2**32), k=n), st.integers(0, 200), st.integers(0, 2**16)
)
"""Few tokens of every kind, or many."""


def plain_chain(start: bytes, tokens: list[int], extras: dict[int, bytes] | None = None, step: int = 16) -> bytes:
    """The definition, written out."""
    k = start if step == 16 else blake3(start + struct.pack("<I", step)).digest()
    out = b""
    for i in range(len(tokens) // step):
        words = struct.pack(f"<{step}I", *tokens[i * step : (i + 1) * step])
        k = blake3(k + words + (extras or {}).get(i, b"")).digest()
        out += k
    return out


@given(tokens=TOKENS, cuts=st.lists(st.integers(0, 200), max_size=8), step=st.sampled_from([16, 16, 16, 1, 8, 24]))
def test_incremental_equals_all_at_once_equals_definition(tokens: list[int], cuts: list[int], step: int) -> None:
    extras = {0: b"salt", 3: b"image"}
    chain = KeyChain(ROOT, extras, step_tokens=step)
    done = 0
    for cut in [*sorted(cuts), len(tokens)]:
        before = chain.n_steps
        made = chain.extend(tokens[done:cut])
        done = max(done, min(cut, len(tokens)))
        assert chain.n_steps == before + made == done // step
        assert chain.n_tokens == done
        assert chain.step_keys.tobytes() == plain_chain(ROOT, tokens[:done], extras, step)
    whole = KeyChain(ROOT, extras, step_tokens=step)
    whole.extend(tokens)
    assert whole.step_keys.tobytes() == chain.step_keys.tobytes()


@given(tokens=TOKENS, others=TOKENS, at=st.integers(0, 220))
def test_truncated_chain_goes_on_as_if_the_tail_had_never_been(tokens: list[int], others: list[int], at: int) -> None:
    chain = KeyChain(ROOT, {0: b"salt"})
    chain.extend(tokens)
    view = chain.step_keys
    old = view.tobytes()
    left = chain.truncate(at)
    assert left == chain.n_tokens <= min(at, len(tokens))
    assert left > min(at, len(tokens)) - 16
    replaced = tokens[: min(at, len(tokens))] + others
    chain.extend(replaced[chain.n_tokens :])
    assert chain.step_keys.tobytes() == plain_chain(ROOT, replaced, {0: b"salt"})
    assert view.tobytes() == old, "a view that was given out changed under its holder"


@pytest.mark.parametrize(
    "convert",
    [
        list,
        tuple,
        lambda t: np.array(t, np.uint32),
        lambda t: np.array(t, np.int64),
        lambda t: np.array(t, np.uint64),
        lambda t: np.array(t, ">u4"),
        lambda t: np.repeat(np.array(t, np.int64), 2)[::2],
        lambda t: array("q", t),
        lambda t: [np.int64(x) for x in t],
    ],
)
def test_same_tokens_in_any_container_have_the_same_keys(convert: Any) -> None:
    tokens = [0, 1, 2**31, 2**32 - 1] * 8
    chain = KeyChain(ROOT)
    chain.extend(convert(tokens))
    assert chain.step_keys.tobytes() == plain_chain(ROOT, tokens)


@pytest.mark.parametrize(
    "bad",
    [
        [1, -1],
        [1, 2**32],
        [1, 1.0],
        [1, None],
        [1, "2"],
        np.array([1, -1]),
        np.array([1, 2**32]),
        np.array([1.0, 2.0]),
        np.zeros((2, 2), np.int64),
        np.array([True, False]),
        b"\1\0\0\0",
        bytearray(4),
        "12",
        7,
        None,
    ],
)
def test_a_token_that_is_no_u32_is_refused_and_changes_nothing(bad: Any) -> None:
    chain = KeyChain(ROOT)
    chain.extend(list(range(20)))
    with pytest.raises(KeyFormatError):
        chain.extend(bad)
    assert chain.n_tokens == 20
    chain.extend(list(range(20, 40)))
    assert chain.step_keys.tobytes() == plain_chain(ROOT, list(range(40)))


def test_the_bad_token_is_named() -> None:
    with pytest.raises(KeyFormatError, match=r"token 2 is -5"):
        KeyChain(ROOT).extend([1, 2, -5])
    with pytest.raises(KeyFormatError, match=r"token 1 is 4294967296"):
        KeyChain(ROOT).extend(np.array([1, 2**32]))


def test_extras_may_be_a_callable_and_are_asked_for_whole_steps_only() -> None:
    asked: list[int] = []

    def extras(step: int) -> bytes:
        asked.append(step)
        return b"x" if step == 1 else b""

    chain = KeyChain(ROOT, extras)
    for token in range(40):
        chain.extend([token])
    assert asked == [0, 1]
    assert chain.step_keys.tobytes() == plain_chain(ROOT, list(range(40)), {1: b"x"})


def test_extras_that_fail_or_are_not_bytes_change_nothing() -> None:
    def unknown(step: int) -> bytes:
        if step == 1:
            raise LookupError("not known yet")
        return b""

    chain = KeyChain(ROOT, unknown)
    with pytest.raises(LookupError):
        chain.extend(list(range(48)))
    assert chain.n_tokens == 0
    chain = KeyChain(ROOT, {0: "salt"})  # type: ignore[dict-item]
    with pytest.raises(KeyFormatError, match="step 0"):
        chain.extend(list(range(16)))
    assert chain.n_tokens == 0


def test_extras_of_one_step_change_its_key_and_all_that_follow_and_none_before() -> None:
    tokens = list(range(64))
    plain, other = KeyChain(ROOT), KeyChain(ROOT, {2: encode_extras(mm=[("hash", 0)])})
    plain.extend(tokens)
    other.extend(tokens)
    assert (plain.step_keys == other.step_keys).all(axis=1).tolist() == [True, True, False, False]


def test_chains_of_different_steps_share_no_key() -> None:
    tokens = [7] * 960
    seen: set[bytes] = set()
    total = 0
    for step in (4, 8, 16, 24, 32):
        chain = KeyChain(ROOT, step_tokens=step)
        chain.extend(tokens)
        seen |= {row.tobytes() for row in chain.step_keys}
        total += chain.n_steps
    assert len(seen) == total


def test_step_keys_is_read_only_and_block_keys_is_not() -> None:
    chain = KeyChain(ROOT)
    chain.extend(range(64))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="read-only"):
        chain.step_keys[0, 0] = 1
    assert block_keys(chain.step_keys, 2).flags.writeable
    assert block_keys(chain.step_keys, 2).flags.c_contiguous


@pytest.mark.parametrize("bad", [b"", b"x" * 31, bytearray(32), "x" * 32, None])
def test_a_root_is_32_bytes(bad: Any) -> None:
    with pytest.raises(KeyFormatError):
        KeyChain(bad)


@pytest.mark.parametrize("step", [0, -16, 5000, 16.0, True])
def test_step_tokens_are_checked(step: Any) -> None:
    with pytest.raises(KeyFormatError):
        KeyChain(ROOT, step_tokens=step)


@pytest.mark.parametrize(
    ("spans", "step"), [((16,), 16), ((128,), 16), ((64, 16), 16), ((8,), 8), ((24, 40), 8), ((16, 24), 8), ((20,), 20)]
)
def test_step_is_sixteen_or_the_spans_divisor(spans: tuple[int, ...], step: int) -> None:
    assert step_for_spans(spans) == step


@pytest.mark.parametrize("spans", [(), (1,), (16, 1), (0,), (-16,), (16, 18), (5000 - 1,)])
def test_spans_without_a_useful_step_are_refused(spans: tuple[int, ...]) -> None:
    with pytest.raises(NamespaceError):
        step_for_spans(spans)


def test_block_keys_are_the_keys_at_block_ends_from_start_on() -> None:
    chain = KeyChain(ROOT)
    chain.extend(list(range(16 * 11 + 5)))
    ends = chain.step_keys[[3, 7]]
    assert (block_keys(chain.step_keys, 4) == ends).all()
    assert (block_keys(chain.step_keys, 4, start=1) == ends[1:]).all()
    assert block_keys(chain.step_keys, 4, start=2).shape == (0, KEY_BYTES)
    assert block_keys(chain.step_keys, 4, start=9).shape == (0, KEY_BYTES)
    assert block_keys(chain.step_keys, 12).shape == (0, KEY_BYTES)
    with pytest.raises(KeyFormatError):
        block_keys(chain.step_keys, 0)
    with pytest.raises(KeyFormatError):
        block_keys(chain.step_keys, 1, start=-1)


U16 = st.integers(0, 2**16 - 1)


@given(a=st.tuples(st.binary(min_size=32, max_size=32), U16, U16), b=st.tuples(U16, U16))
def test_fold_keeps_28_bytes_and_is_a_bijection_of_group_and_shard(
    a: tuple[bytes, int, int], b: tuple[int, int]
) -> None:
    key, group, shard = a
    keys = np.frombuffer(key, np.uint8).reshape(1, 32)
    folded = fold(keys, group, shard)
    assert folded.tobytes()[:28] == key[:28]
    assert fold(folded, group, shard).tobytes() == key
    assert (folded.tobytes() == fold(keys, *b).tobytes()) == ((group, shard) == b)
    assert keys.tobytes() == key


def test_fold_takes_a_group_and_shard_for_each_key() -> None:
    keys = np.random.default_rng(1).integers(0, 256, (5, 32), np.uint8)
    groups, shards = np.arange(5), np.arange(5)[::-1] * 1000
    folded = fold(keys, groups, shards)
    assert folded.tobytes() == b"".join(
        fold(keys[i : i + 1], int(groups[i]), int(shards[i])).tobytes() for i in range(5)
    )
    strided = np.repeat(keys, 2, axis=0)[::2]
    assert fold(strided, groups, shards).tobytes() == folded.tobytes()


@pytest.mark.parametrize("bad", [-1, 65536, 1.5, np.array([0, 70000])])
def test_group_and_shard_out_of_range_are_refused(bad: Any) -> None:
    keys = np.zeros((2, 32), np.uint8)
    with pytest.raises(KeyFormatError, match="group"):
        fold(keys, bad)
    with pytest.raises(KeyFormatError, match="shard"):
        fold(keys, 0, bad)


def test_as_key_array_takes_bytes_and_arrays_and_gives_something_to_write_to() -> None:
    keys = [bytes([i]) * 32 for i in range(5)]
    for given_keys in (keys, tuple(keys), iter(keys)):
        made = as_key_array(given_keys)  # type: ignore[arg-type]
        assert made.shape == (5, 32)
        assert made.tobytes() == b"".join(keys)
        assert made.flags.c_contiguous
        assert made.flags.writeable
    assert as_key_array([]).shape == (0, 32)
    assert as_key_array(made) is made
    frozen = np.frombuffer(b"".join(keys), np.uint8).reshape(5, 32)
    for array_keys in (frozen, frozen[::-1], np.asfortranarray(frozen)):
        made = as_key_array(array_keys)
        assert (made == array_keys).all()
        assert made.flags.c_contiguous
        assert made.flags.writeable


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([b"x" * 32, b"x" * 31], r"key 1 has 31 bytes"),
        ([b"x" * 31, b"x" * 33], r"key 0 has 31 bytes"),
        ([b"x" * 32, "x" * 32], r"key 1 is of type str"),
        ([b"x" * 32, None], r"key 1 is of type NoneType"),
        ([b"x" * 32, 5], r"key 1 is of type int"),
        ([bytearray(32)], r"key 0 is of type bytearray"),
        (b"x" * 32, r"give \[key\]"),
        ("x" * 32, r"give \[key\]"),
        (np.zeros(32, np.uint8), r"give keys\[None\]"),
        (np.zeros((2, 31), np.uint8), r"\(2, 31\)"),
        (np.zeros((2, 32), np.int8), r"int8"),
        (np.zeros((2, 8), np.uint32), r"uint32"),
        (7, r"int"),
    ],
)
def test_wrong_keys_are_refused_with_what_is_wrong(keys: Any, message: str) -> None:
    with pytest.raises(KeyFormatError, match=message):
        as_key_array(keys)


SCRIPT = """
import json, sys
from kvplug.identity.extras import encode_extras
from kvplug.identity.keys import KeyChain, block_keys, root
from kvplug.identity.namespace import digest_of
names = {f"option{i}" for i in range(50)}           # iteration order of a set goes by PYTHONHASHSEED
config = {name: len(name) for name in names}
chain = KeyChain(root(digest_of(config)), {0: encode_extras(cache_salt="s", other=config)})
chain.extend([hash_free * 7 for hash_free in range(64)])
print(block_keys(chain.step_keys, 2, 1, 2).tobytes().hex())
"""


def test_keys_are_the_same_in_every_process_and_for_every_hash_seed() -> None:
    printed = set()
    for seed in ("0", "1", "4242"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        run = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=True)
        printed.add(run.stdout)
    assert len(printed) == 1
    assert len(printed.pop().strip()) == 2 * 32 * 2


def test_root_takes_a_namespace_or_bytes() -> None:
    assert root(b"mine") == blake3(b"mine").digest()
    with pytest.raises(KeyFormatError):
        root("mine")  # type: ignore[arg-type]


# extras

VALUES: Any = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False), st.text(max_size=4),
    st.binary(max_size=4),
)  # fmt: skip
EXTRAS = st.fixed_dictionaries(
    {},
    optional={
        "lora": st.none() | st.binary(max_size=4),
        "cache_salt": st.none() | st.text(max_size=4),
        "mm": st.lists(st.tuples(st.binary(max_size=3) | st.text(max_size=3), st.integers(-64, 64)), max_size=3),
        "prompt_embeds": st.none() | st.binary(max_size=4),
        "other": st.none() | st.dictionaries(st.text(max_size=2), VALUES, max_size=3),
    },
)


def meaning(extras: dict[str, Any]) -> str:
    """What must be told apart: repr tells types and -0.0 from 0.0; absent, None and empty collections mean the same."""
    present = {name: value for name, value in extras.items() if value is not None and value not in ([], {})}
    for name, order in (("mm", list), ("other", dict.items)):
        if name in present:
            present[name] = sorted(map(repr, order(present[name])))
    return json.dumps({name: repr(present[name]) for name in sorted(present)})


@given(a=EXTRAS, b=EXTRAS)
def test_extras_encode_alike_only_if_they_mean_the_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert (encode_extras(**a) == encode_extras(**b)) == (meaning(a) == meaning(b))


@given(a=EXTRAS)
def test_extras_do_not_depend_on_the_order_of_their_parts(a: dict[str, Any]) -> None:
    turned = {name: a[name] for name in reversed(a)}
    if turned.get("mm"):
        turned["mm"] = turned["mm"][::-1]
    if turned.get("other"):
        turned["other"] = dict(reversed(turned["other"].items()))
    assert encode_extras(**a) == encode_extras(**turned)


def test_no_extras_are_empty_bytes_and_an_empty_salt_is_a_salt() -> None:
    assert encode_extras() == encode_extras(lora=None, cache_salt=None, mm=[], other={}) == b""
    assert encode_extras(cache_salt="") != b""
    assert encode_extras(lora=b"") != b""
    assert encode_extras(cache_salt="a") != encode_extras(lora=b"a") != encode_extras(prompt_embeds=b"a")


@pytest.mark.parametrize(
    "bad",
    [
        {"lora": "name"},
        {"cache_salt": b"x"},
        {"prompt_embeds": object()},
        {"mm": [(object(), 1)]},
        {"other": {"a": {1}}},
    ],
)
def test_extras_of_other_types_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(NamespaceError, match=next(iter(bad))):
        encode_extras(**bad)
