"""Every setting of an engine was looked at, in each release; equal settings are equal text, whichever process asks."""

from __future__ import annotations

import ast
import enum
from pathlib import Path
from typing import Any

import pytest

from kvplug.adapters.common.settings import as_text
from kvplug.adapters.sglang import settings as sglang
from kvplug.adapters.vllm import settings as vllm
from tests.unit.test_environment import LOOKED_AT, listed, sglang_roots, vllm_roots


def fields_of(folder: Path, *, configuration: bool) -> set[str]:
    """``Class.field`` of every dataclass of a folder's sources (``configuration``), else the bare names of fields."""
    found = set()
    for path in sorted(folder.glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.ClassDef):
                continue
            if configuration and not any(
                "config" in (d := ast.unparse(x)) or "dataclass" in d for x in node.decorator_list
            ):
                continue
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                    if any(word in ast.unparse(line.annotation) for word in ("ClassVar", "InitVar")):
                        continue
                    found.add(f"{node.name}.{line.target.id}" if configuration else line.target.id)
    return found


def test_every_setting_of_vllm_was_looked_at() -> None:
    looked_at, everywhere = listed("vllm-settings.txt"), set()
    if not vllm_roots():
        pytest.skip("no vLLM here")
    for version, root in vllm_roots().items():
        names = fields_of(root / "config", configuration=True)
        assert len(names) > 400, f"vLLM {version} keeps its configuration elsewhere"
        everywhere |= names
        new = sorted(
            name for name in names - vllm.HARMLESS - looked_at if name.partition(".")[0] not in vllm.HARMLESS_CLASSES
        )
        assert not new, f"vLLM {version} has settings that nobody has looked at: {new}. See {LOOKED_AT / 'README.md'}"
    assert not looked_at & vllm.HARMLESS


def test_every_setting_of_sglang_was_looked_at() -> None:
    looked_at, everywhere = listed("sglang-settings.txt"), set()
    if not sglang_roots():
        pytest.skip("no SGLang here")
    for version, root in sglang_roots().items():
        names = fields_of(root / "arg_groups/fields", configuration=False)
        assert len(names) > 400, f"SGLang {version} keeps its settings elsewhere"
        everywhere |= names
        new = sorted(names - sglang.HARMLESS - looked_at)
        assert not new, f"SGLang {version} has settings that nobody has looked at: {new}. See {LOOKED_AT / 'README.md'}"
    assert not looked_at & sglang.HARMLESS
    assert sglang.HARMLESS | looked_at <= everywhere, "a misspelt name would never make a difference"


class Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({"x", "y", "z"}, {"z", "y", "x"}),
        ([1, 2.5, None], (1, 2.5, None)),
        (Colour.RED, "RED"),
        (Path("/x"), "/x"),
        (as_text, "kvplug.adapters.common.settings.as_text"),
    ],
)
def test_equal_settings_are_equal_text(one: Any, two: Any) -> None:
    assert as_text(one) == as_text(two)


def test_different_settings_are_different_text() -> None:
    some = [None, False, 0, "", "0", [], {}, {"a": 1}, {"a": "1"}, [1], ["1"], object(), object()]
    assert len({as_text(value) for value in some}) == len(some)
