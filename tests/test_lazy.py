"""The public root: every name is there, from where the type checker sees it, and loads nothing before it is used."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import chronomoe_hf
from chronomoe_hf import lifecycle, router

DOORS = {"chronomoe_hf": chronomoe_hf, "chronomoe_hf.lifecycle": lifecycle, "chronomoe_hf.router": router}


def typed_imports(module: ModuleType) -> dict[str, str]:
    """Name -> module of every import under ``if TYPE_CHECKING:``; each must be ``name as name`` to be public."""
    (block,) = [
        node
        for node in ast.parse(Path(module.__file__ or "").read_text(encoding="utf-8")).body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name)
    ]
    found = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom) and node.module is not None
        for alias in node.names:
            assert alias.asname == alias.name
            found[alias.name] = node.module
    return found


@pytest.mark.parametrize("door", DOORS)
def test_the_imports_for_the_type_checker_name_the_same_homes(door: str) -> None:
    module = DOORS[door]
    rooms = {name: "chronomoe_hf" for name in getattr(module, "_ROOMS", ())}
    assert typed_imports(module) == {**module._HOME_OF, **rooms}
    assert set(module.__all__) <= {*module._HOME_OF, *vars(module)}


@pytest.mark.parametrize("door", DOORS)
def test_every_name_is_the_object_of_its_home(door: str) -> None:
    module = DOORS[door]
    for name, home in module._HOME_OF.items():
        assert getattr(module, name) is getattr(importlib.import_module(home), name)
    for room in getattr(module, "_ROOMS", ()):
        assert getattr(module, room) is importlib.import_module(f"chronomoe_hf.{room}") and room in dir(module)
    assert {*module.__all__} <= {*dir(module)}


def test_every_name_that_0_2_offered_is_importable() -> None:
    names = (
        "ChronoCallback ChronoConfig ChronoLens ChronoRouter ChronoSystem CoherenceBuffer CoherenceState IdentityLens "
        "LayerSnapshot LifecycleCoordinator PruneDecision RouterState RoutingEvent SystemSnapshot TelemetryWriter "
        "attach detach profile system_of unwrap wrap"
    )
    assert set(names.split()) <= set(chronomoe_hf._HOME_OF)


def test_importing_it_loads_no_torch() -> None:
    code = (
        "import sys, chronomoe_hf, chronomoe_hf.telemetry, chronomoe_hf.config; assert 'torch' not in sys.modules\n"
        "from chronomoe_hf import *; assert 'torch' in sys.modules and wrap and attach\n"
        "import chronomoe_hf as c; c.errors.ChronoError, c.telemetry.read_jsonl"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'wrapp'"):
        chronomoe_hf.wrapp  # noqa: B018
    assert not hasattr(chronomoe_hf, "__wrapped__")
