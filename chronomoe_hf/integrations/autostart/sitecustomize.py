"""Run by Python when a process of ``chronomoe run`` starts: begins the attaching, then runs the next of its name."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys


def _next() -> None:
    """Another ``sitecustomize`` further down the path, which this one hides."""
    here = os.path.dirname(os.path.abspath(__file__))
    rest = [entry for entry in sys.path if os.path.abspath(entry or os.curdir) != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", rest)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def _start() -> None:
    try:
        import chronomoe_hf.integrations.launch as launch
    except ImportError as error:
        print(
            f"chronomoe run: {sys.executable} cannot import chronomoe_hf ({error}); nothing is watched in this "
            "process. Install chronomoe_hf into that environment",
            file=sys.stderr,
        )
        return
    launch.start()


_start()
_next()
