"""What Trainer itself prints: of our scalars three; trackers get them all. And a live card in a notebook."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from transformers import TrainerCallback

from chronomoe_hf.telemetry import SystemSnapshot
from chronomoe_hf.trainer.hooks import Replaced

PRINTERS = frozenset({"PrinterCallback", "ProgressCallback", "NotebookProgressCallback", "RichProgressCallback"})
"""Callbacks, of Transformers and TRL, that show logs to a person and store them nowhere."""
OURS = "moe/"
TRAINING = ("neff_mean", "dead_experts", "alerts_active")
EVALUATION = ("neff_mean", "dead_experts", "maxvio_max")
_HANDLE = "_chrono_card"


def keep_short(replaced: Replaced, callbacks: Iterable[TrainerCallback]) -> None:
    """Let every printing callback see three of our scalars.

    Args:
        replaced: takes the replacements off again.
        callbacks: of a Trainer; one that was seen before is left as it is.
    """
    for callback in callbacks:
        kinds = {kind.__name__ for kind in type(callback).__mro__}
        if kinds & PRINTERS and not replaced.has(callback, "on_log"):
            replaced.replace(callback, "on_log", _with_few("logs"))
            replaced.replace(callback, "on_evaluate", _with_few("metrics"))


def few(numbers: dict[str, Any]) -> dict[str, Any]:
    """`numbers` with three of ours at most."""
    return {name: value for name, value in numbers.items() if _shown(name)}


def _shown(name: str) -> bool:
    before, found, rest = name.partition(OURS)
    if not found or not (before == "" or before.endswith("_")):
        return True
    return rest in (EVALUATION if before else TRAINING)


def _with_few(argument: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            given = kwargs.get(argument)
            if not isinstance(given, dict):
                return original(*args, **kwargs)
            shown = few(given)
            names = set(shown)
            try:
                return original(*args, **{**kwargs, argument: shown})
            finally:
                for name in names - set(shown):  # a printer takes entries out of what it is given
                    given.pop(name, None)

        return call

    return make


def live_card(callback: Any, snapshot: SystemSnapshot) -> None:
    """The newest window as a card below Trainer's progress in a notebook; it takes the place of the one before.

    Args:
        callback: Trainer's NotebookProgressCallback, which exists in notebooks only.
        snapshot: the window.
    """
    from IPython.display import HTML, display

    card = HTML(snapshot._repr_html_())
    handle = vars(callback).get(_HANDLE)
    if handle is None or snapshot.step <= handle[1]:  # a new run
        vars(callback)[_HANDLE] = (display(card, display_id=True), snapshot.step)
    else:
        handle[0].update(card)
        vars(callback)[_HANDLE] = (handle[0], snapshot.step)
