"""The public root: every name is there, from where the type checker sees it, and loads nothing before it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import chronomoe_hf


def test_the_imports_for_the_type_checker_name_the_same_homes() -> None:
    tree = ast.parse(Path(chronomoe_hf.__file__).read_text(encoding="utf-8"))
    typed = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("chronomoe_hf"):
            typed |= {alias.name: node.module for alias in node.names}
    assert typed == chronomoe_hf._HOME_OF
    assert sorted(typed) == sorted(chronomoe_hf.__all__)


def test_every_name_is_the_object_of_its_home() -> None:
    for name in chronomoe_hf.__all__:
        value = getattr(chronomoe_hf, name)
        assert value is getattr(sys.modules[chronomoe_hf._HOME_OF[name]], name)
        assert name in dir(chronomoe_hf)


def test_importing_it_loads_no_torch() -> None:
    code = (
        "import sys, chronomoe_hf, chronomoe_hf.telemetry, chronomoe_hf.config; assert 'torch' not in sys.modules\n"
        "from chronomoe_hf import *; assert 'torch' in sys.modules and wrap and RoutingEvent\n"
        "import chronomoe_hf as c; c.errors.ChronoError, c.telemetry.read_jsonl"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'wrapp'"):
        chronomoe_hf.wrapp  # noqa: B018
    assert not hasattr(chronomoe_hf, "__wrapped__")
