"""Attaching to every Trainer of a process without an edit of its script: an environment and an import hook.

``chronomoe run`` starts a command with two variables: ``CHRONOMOE`` (a preset, or the path of a config) and a
``PYTHONPATH`` that begins with the folder ``autostart``, whose ``sitecustomize`` Python runs when it starts. Both are
inherited, so the processes that ``torchrun``, ``accelerate launch`` or a tool start are reached too. There
:func:`start` waits until Transformers' ``trainer`` module is imported and puts our callback into the list of callbacks
that every Trainer begins with (where a tool puts a list of its own there, as ms-swift does, it comes with the
trackers). A script that imports ``chronomoe_hf`` itself needs ``CHRONOMOE`` alone.

Nothing here imports torch or Transformers: this runs in every Python process of the command.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from chronomoe_hf.integrations.journal import JOURNAL, VARIABLE

REPORT_NAME = "chronomoe"
"""What ``report_to`` calls us."""
AUTOSTART = Path(__file__).resolve().parent / "autostart"


def environment(settings: str, journal: Path | None = None, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a command whose Trainers are to be attached to.

    Args:
        settings: for :data:`VARIABLE`.
        journal: for :data:`JOURNAL`.
        base: what it adds to; None = this process's own.
    """
    env = dict(os.environ if base is None else base)
    others = [part for part in env.get("PYTHONPATH", "").split(os.pathsep) if part and Path(part) != AUTOSTART]
    env["PYTHONPATH"] = os.pathsep.join([str(AUTOSTART), *others])
    env[VARIABLE] = settings
    if journal is not None:
        env[JOURNAL] = str(journal)
    return env


def start() -> None:
    """Attach to every Trainer that this process makes from now on, with the settings of :data:`VARIABLE`.

    Does nothing where the variable is not set, and nothing the second time.
    """
    register_report()
    if os.environ.get(VARIABLE):
        _when_imported("transformers.trainer", _add_default_callback)


def register_report() -> None:
    """Make ``report_to="chronomoe"`` a word that Transformers knows; settings as in :func:`start`, else ``observe``."""
    _when_imported("transformers.integrations.integration_utils", _add_report)


def _add_default_callback(module: ModuleType) -> None:
    """In the list that every Trainer begins with, and behind the trackers where a tool puts its own list there."""
    if _among(module.DEFAULT_CALLBACKS):
        return
    module.DEFAULT_CALLBACKS.insert(0, _Launched)
    native = module.get_reporting_integration_callbacks

    @functools.wraps(native)
    def trackers(*args: Any, **kwargs: Any) -> list[Any]:
        found: list[Any] = native(*args, **kwargs)
        return found if _among([*module.DEFAULT_CALLBACKS, *found]) else [*found, _Launched]

    module.get_reporting_integration_callbacks = trackers  # type: ignore[attr-defined]


def _among(callbacks: list[Any]) -> bool:
    return any(getattr(each, "__qualname__", "") == _Launched.__qualname__ for each in callbacks)


def _add_report(module: ModuleType) -> None:
    module.INTEGRATION_TO_CALLBACK.setdefault(REPORT_NAME, _Launched)


class _Launched:
    """Stands in Transformers' lists for a class that needs torch; making one gives a ``LaunchedCallback``."""

    def __new__(cls) -> Any:
        """Transformers makes a callback of each class in its lists."""
        from chronomoe_hf.integrations.launched import LaunchedCallback

        return LaunchedCallback()


# ---- after the import of a module ------------------------------------------------------------------------------------


class _Finder(importlib.abc.MetaPathFinder):
    """Calls functions right after their module was imported; finds nothing itself."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Callable[[ModuleType], None]]] = {}

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """What the other finders find, with our functions after it."""
        calls = self.waiting.pop(fullname, None)
        if calls is None:
            return None
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            self.waiting[fullname] = calls
            return None
        spec.loader = _Loader(spec.loader, calls)
        return spec


class _Loader(importlib.abc.Loader):
    """A module's own loader, and then the functions that waited for it."""

    def __init__(self, loader: importlib.abc.Loader, calls: list[Callable[[ModuleType], None]]) -> None:
        self.loader = loader
        self.calls = calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the module's own loader."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the module's own loader; then the functions."""
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        for call in self.calls:
            call(module)


_FINDER = _Finder()


def _when_imported(name: str, call: Callable[[ModuleType], None]) -> None:
    module = sys.modules.get(name)
    if module is not None:
        call(module)
        return
    waiting = _FINDER.waiting.setdefault(name, [])
    if call not in waiting:
        waiting.append(call)
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
