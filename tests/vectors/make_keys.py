"""Makes keys.json beside it: test vectors for docs/keys.md.

Written from the document, with blake3 and struct only, and importing nothing of kvplug: an implementation that agrees
with these vectors agrees with two that were written apart. `python tests/vectors/make_keys.py` writes the file anew;
a test checks that it would come out the same.

Values in the file are JSON, with these spellings for what JSON lacks: {"bytes": hex}, {"float": C99 hex},
{"map": [[key, value], ...]}.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from blake3 import blake3

HERE = Path(__file__).parent


def encode(v: Any) -> bytes:
    """The canonical encoding of one value in the file's spelling."""
    if v is None:
        return b"N"
    if v is True or v is False:
        return b"T" if v else b"F"
    if isinstance(v, int):
        text = str(v).encode()
        return b"i" + struct.pack("<I", len(text)) + text
    if isinstance(v, str):
        return b"s" + struct.pack("<I", len(v.encode())) + v.encode()
    if isinstance(v, list):
        return b"l" + struct.pack("<I", len(v)) + b"".join(encode(item) for item in v)
    ((kind, x),) = v.items()
    if kind == "bytes":
        return b"b" + struct.pack("<I", len(x) // 2) + bytes.fromhex(x)
    if kind == "float":
        return b"d" + struct.pack("<d", float.fromhex(x))
    assert kind == "map"
    pairs = sorted((encode(key), encode(value)) for key, value in x)
    return b"m" + struct.pack("<I", len(pairs)) + b"".join(key + value for key, value in pairs)


def chain(root: bytes, tokens: list[int], extras: dict[int, bytes], step: int) -> list[bytes]:
    """k[1], k[2], …"""
    k = root if step == 16 else blake3(root + struct.pack("<I", step)).digest()
    keys = []
    for i in range(len(tokens) // step):
        message = k
        for token in tokens[i * step : (i + 1) * step]:
            message += struct.pack("<I", token)
        k = blake3(message + extras.get(i, b"")).digest()
        keys.append(k)
    return keys


def fold(key: bytes, group: int, shard: int) -> bytes:
    tail = struct.pack("<HH", group, shard)
    return key[:28] + bytes(a ^ b for a, b in zip(key[28:], tail, strict=True))


def extras(e: dict[str, Any]) -> bytes:
    out = b""
    for tag, name in enumerate(("lora", "cache_salt", "mm", "prompt_embeds", "other"), start=1):
        if name not in e:
            continue
        if name == "mm":
            items = sorted(encode(item) for item in e["mm"])
            payload = b"l" + struct.pack("<I", len(items)) + b"".join(items)
        else:
            payload = encode(e[name])
        out += struct.pack("<BI", tag, len(payload)) + payload
    return out


VALUES: list[Any] = [
    None, False, True, 0, 1, -1, 2**32, -(2**63), 10**30, "", "0", "None", "ключ", "a\0b",
    {"float": (0.0).hex()}, {"float": (-0.0).hex()}, {"float": (1.0).hex()}, {"float": (1e-6).hex()}, {"float": "inf"},
    {"bytes": ""}, {"bytes": "00"}, {"bytes": b"None".hex()},
    [], [None], [[]], [1, "1", {"bytes": "31"}], ["ab", ""], ["a", "b"],
    {"map": []}, {"map": [["a", None]]}, {"map": [["b", 1], ["a", 2]]}, {"map": [[1, "x"], ["1", "y"], [10, "z"]]},
    {"map": [["rope_scaling", {"map": [["factor", {"float": (8.0).hex()}], ["type", "yarn"]]}], ["layers", 32]]},
]  # fmt: skip


def run(layer: str, nbytes: int) -> dict[str, Any]:
    return {"map": [["layer", layer], ["nbytes", nbytes]]}


def group(kind: str, span: int, window: int | None, shards: list[list[dict[str, Any]]]) -> dict[str, Any]:
    return {"map": [["kind", kind], ["span_tokens", span], ["shards", shards], ["window_tokens", window]]}


def weights(kind: str, byte: int) -> dict[str, Any]:
    return {"map": [["kind", kind], ["digest", {"bytes": bytes([byte] * 32).hex()}]]}


NAMESPACES: list[dict[str, Any]] = [
    {
        "map": [
            ["weights", weights("files", 0x11)],
            ["config_digest", {"bytes": bytes(range(32)).hex()}],
            ["quantization", None],
            ["kv_dtype", "float32"],
            ["kv_scales", None],
            ["draft", None],
            ["eagle", False],
            ["engine", "vllm"],
            ["engine_version", "0.32.0"],
            ["device", "cpu"],
            ["attention_backend", "CPU_ATTN"],
            ["cpu_isa", "avx512"],
            ["kv_layout", "NHD"],
            ["groups", [group("full", 128, None, [[run("layers.0", 262144), run("layers.1", 262144)]])]],
            ["tp", 1],
            ["pp", 1],
            ["cp", 1],
            ["weights_epoch", None],
            ["rotation", None],
            ["other", {"map": []}],
        ]
    },
    {
        "map": [
            ["weights", weights("user", 0x22)],
            ["config_digest", {"bytes": bytes(32).hex()}],
            ["quantization", {"map": [["method", "fp8"], ["activation", "static"]]}],
            ["kv_dtype", "fp8_e4m3"],
            ["kv_scales", {"map": [["k", {"float": (0.5).hex()}], ["v", {"float": (0.25).hex()}]]}],
            ["draft", weights("files", 0x33)],
            ["eagle", True],
            ["engine", "sglang"],
            ["engine_version", "0.5.23"],
            ["device", "cuda"],
            ["attention_backend", {"map": [["full", "FA3"], ["sliding", "FLASHINFER"]]}],
            ["cpu_isa", None],
            ["kv_layout", ["HND", 1]],
            [
                "groups",
                [
                    group("full", 64, None, [[run("a", 8192)], [run("a", 8192)]]),
                    group("sliding", 16, 1024, [[run("b", 4096)], [run("b", 4096)]]),
                ],
            ],
            ["tp", 2],
            ["pp", 1],
            ["cp", 1],
            ["weights_epoch", {"bytes": "44" * 32}],
            ["rotation", {"bytes": "55" * 32}],
            ["other", {"map": [["spec_tokens", 3]]}],
        ]
    },
]

EXTRAS: list[dict[str, Any]] = [
    {},
    {"cache_salt": "tenant-a"},
    {"cache_salt": ""},
    {"lora": {"bytes": "ab" * 32}},
    {"lora": {"bytes": "ab" * 32}, "cache_salt": "tenant-a"},
    {"mm": [["5f2c", 3]]},
    {"mm": [["5f2c", -13], [{"bytes": "5f2c"}, 4]]},
    {"prompt_embeds": {"bytes": "cd" * 32}},
    {"other": {"map": [["x", 1]]}},
]


def tokens(n: int, seed: int) -> list[int]:
    return [(seed + i * 2654435761) % 151936 for i in range(n)]


def chains() -> list[dict[str, Any]]:
    root = blake3(b"kvplug namespace 1\0" + encode(NAMESPACES[0])).digest()
    salt, image = extras(EXTRAS[1]), extras(EXTRAS[6])
    out = []
    for note, toks, more, step in (
        ("no whole step", tokens(15, 1), {}, 16),
        ("one step", tokens(16, 1), {}, 16),
        ("the tail of 7 tokens has no key", tokens(71, 1), {}, 16),
        ("the smallest and largest tokens", [0, 2**32 - 1] * 8, {}, 16),
        ("a salt at step 0", tokens(48, 1), {0: salt}, 16),
        ("an image reaches into steps 1 and 2", tokens(64, 1), {1: image, 2: image}, 16),
        ("steps of 8", tokens(64, 1), {}, 8),
        ("steps of 24, with extras", tokens(96, 1), {1: salt}, 24),
    ):
        keys = chain(root, toks, more, step)
        out.append(
            {
                "note": note,
                "root": root.hex(),
                "step_tokens": step,
                "tokens": toks,
                "extras": {str(i): e.hex() for i, e in more.items()},
                "step_keys": [k.hex() for k in keys],
            }
        )
    return out


PAGES = [
    ("one page pool, one rank", "kv", 0, 2),
    ("another page pool", "swa", 0, 1),
    ("the third of four ranks", "kv", 2, 1),
    ("no pages", "kv", 0, 0),
]


def pages() -> list[dict[str, Any]]:
    """Keys of SGLang's pages. The hashes stand for its own, which are SHA-256 over tokens."""
    root = blake3(b"kvplug namespace 1\0" + encode(NAMESPACES[0])).digest()
    out = []
    for note, pool, shard, n in PAGES:
        mask = fold(blake3(b"kvplug page mask 1\0" + root + pool.encode()).digest(), 0, shard)
        hashes = [hashlib.sha256(bytes([i])).digest() for i in range(n)]
        out.append(
            {
                "note": note,
                "root": root.hex(),
                "pool": pool,
                "shard": shard,
                "mask": mask.hex(),
                "hashes": [h.hex() for h in hashes],
                "keys": [bytes(a ^ b for a, b in zip(h, mask, strict=True)).hex() for h in hashes],
            }
        )
    return out


def vectors() -> dict[str, Any]:
    key = blake3(b"any key").digest()
    return {
        "about": "Test vectors for kvplug's content keys; docs/keys.md explains them. Made by make_keys.py.",
        "format": 1,
        "canonical": [{"value": v, "encoded": encode(v).hex()} for v in VALUES],
        "namespaces": [
            {
                "value": v,
                "canonical": (b"kvplug namespace 1\0" + encode(v)).hex(),
                "root": blake3(b"kvplug namespace 1\0" + encode(v)).digest().hex(),
            }
            for v in NAMESPACES
        ],
        "extras": [{"value": e, "encoded": extras(e).hex()} for e in EXTRAS],
        "chains": chains(),
        "fold": [
            {"key": key.hex(), "group": g, "shard": s, "folded": fold(key, g, s).hex()}
            for g, s in ((0, 0), (1, 0), (0, 1), (258, 772), (65535, 65535))
        ],
        "pages": pages(),
    }


def text() -> str:
    return json.dumps(vectors(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    (HERE / "keys.json").write_text(text(), encoding="utf-8")
