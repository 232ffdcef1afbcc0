"""docs/api.md has every public name, and only names that are there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import chronomoe_hf

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"^::: (\S+)$", PAGE, flags=re.M)


def public_names() -> dict[str, object]:
    """``room.name`` -> object, of the root and of every room that it offers."""
    found: dict[str, object] = {}
    for room in ("chronomoe_hf", *(f"chronomoe_hf.{name}" for name in chronomoe_hf._ROOMS)):
        module = importlib.import_module(room)
        names = {*getattr(module, "__all__", ()), *getattr(module, "_HOME_OF", ())}
        found |= {f"{room}.{name}": getattr(module, name) for name in names}
    return found


def test_every_public_name_is_on_the_page() -> None:
    names = public_names()
    assert len(names) > 80, "hardly a name was found; is the reader broken?"
    shown = {id(_at(path)) for path in SHOWN}
    modules = {path for path in SHOWN if _is_module(path)}
    missing = [
        name
        for name, value in names.items()
        if id(value) not in shown
        and getattr(value, "__module__", None) not in modules
        and not name.startswith(("chronomoe_hf.config.", "chronomoe_hf.report."))
    ]
    assert missing == []


def test_what_the_page_shows_exists_once() -> None:
    assert len(SHOWN) == len(set(SHOWN))
    assert all(_at(path) is not None for path in SHOWN)


def _is_module(path: str) -> bool:
    try:
        return importlib.import_module(path) is not None
    except ModuleNotFoundError:
        return False


def _at(path: str) -> object:
    if _is_module(path):
        return importlib.import_module(path)
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
