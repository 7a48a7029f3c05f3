"""docs/keys.md says what the code does: its example runs, and its table of the namespace is complete."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from kvplug.identity.namespace import Namespace

PAGE = (Path(__file__).parents[2] / "docs" / "keys.md").read_text(encoding="utf-8")


def test_the_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["chain"].n_steps == 18
    assert names["keys"].shape == (2, 32)


def test_the_table_of_the_namespace_has_every_field_and_no_other() -> None:
    section = PAGE.split("## The namespace")[1].split("```")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named == {field.name for field in dataclasses.fields(Namespace) if not field.name.startswith("_")}
