"""docs/configuration.md: its blocks run, and its tables name every setting with its default."""

from __future__ import annotations

import ast
import dataclasses
import re
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from chronomoe_hf import ChronoConfig
from chronomoe_hf.config import PRESETS

PAGE = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def test_the_blocks_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) >= 5
    names: dict[str, Any] = {}
    for block in BLOCKS:
        exec(block, names)
    printed = capsys.readouterr().out
    for comment in ("never steers: lens.enabled is False there", "did you mean 'rate'?", "did you mean 'balance'?"):
        assert comment in printed, "the page shows another message than is raised"


def documented() -> dict[str, Any]:
    """Dotted path -> default, from the page's tables."""
    found, part = {}, ""
    for line in PAGE.partition("## Every setting")[2].splitlines():
        if heading := re.match(r"### (?:`([a-z._]+)`|Top level)", line):
            part = f"{heading[1]}." if heading[1] else ""
        elif row := re.match(r"\| `(\w+)` \| `([^`]+)` \| \S", line):
            assert part + row[1] not in found, f"{part}{row[1]} is documented twice"
            found[part + row[1]] = ast.literal_eval(row[2])
    return found


def settings(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted path -> default, of the config."""
    out: dict[str, Any] = {}
    for item in dataclasses.fields(value):
        inner = getattr(value, item.name)
        out |= (
            settings(inner, f"{prefix}{item.name}.")
            if dataclasses.is_dataclass(inner)
            else {f"{prefix}{item.name}": inner}
        )
    return out


def test_every_setting_is_documented_with_its_default() -> None:
    expected = settings(ChronoConfig())
    del expected["contract"], expected["schema_version"]  # told in the text
    assert documented() == expected


def test_the_promises_of_the_presets_are_those_of_the_code() -> None:
    for name, preset in PRESETS.items():
        assert f"`ChronoConfig.{name}()`" in PAGE
        for path, value in (preset.fixed | preset.other).items():  # type: ignore[operator]
            assert reduce(getattr, path.split("."), ChronoConfig.preset(name)) == value
