"""Everything chronomoe_hf raises on purpose.

ChronoError
|-- ConfigError                      a setting is unknown, out of range, or contradicts another
|-- WrapError                        the model cannot be wrapped as asked
|   |-- NoMoELayersError             nothing in the model routes tokens to experts
|   |-- UnsupportedArchitectureError a router of a family, or of a layout, that is not supported
|   |-- AlreadyWrappedError          the model is wrapped with another config
|   `-- NotWrappedError              the model has no ChronoSystem
|-- StepError                        system.step was given something that is no step number
|-- ContractError                    a router returned something its adapter does not describe
|-- TelemetryError                   an output directory or record file cannot be used
|-- DataError                        text to read is missing, empty, or not where it was said to be
|-- ReplayError                      choices of another pass are missing, or belong to other tokens, layers or weights
|-- NonFiniteLossError               a loss is NaN or infinite
|-- LifecycleError                   evidence, a plan, a measurement or a refit cannot be had as asked
|   |-- EvidenceError                there is no evidence, or too little, for what is asked
|   |-- PlanError                    a plan that no model could hold, or a plan file that is none
|   |-- PlanMismatchError            a sound plan of another model
|   `-- ExportError                  a smaller checkpoint cannot be written, or is not what it should be
`-- StateError                       saved state cannot be used
    |-- StateMissingError            there is no state where one is required
    |-- StateCorruptError            a file is torn, truncated, altered or not what its name says
    |-- StateSchemaError             written by a schema this version does not read
    |-- StateMismatchError           a sound state of another model (layers, E, k, router class)
    |-- StateWriteError              state could not be written (raised with ``strict_save=True``)
    `-- WeightMismatchError          live router/expert weights differ from the checkpoint's fingerprint

Every message names the value, what was expected, and the way out.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

_SHOWN = 80  # characters of a value that a message repeats


class ChronoError(Exception):
    """Root of every exception that chronomoe_hf raises on purpose."""


class ConfigError(ChronoError, ValueError):
    """A setting is unknown, out of range, or contradicts another setting."""


class WrapError(ChronoError):
    """The model cannot be wrapped or unwrapped as asked."""


class NoMoELayersError(WrapError):
    """No module of the model routes tokens to experts."""


class UnsupportedArchitectureError(WrapError):
    """A router belongs to a family, or has a layout, that is not supported."""


class AlreadyWrappedError(WrapError):
    """The model is already wrapped, with a different config."""


class NotWrappedError(WrapError, LookupError):
    """The model (or anything inside it) carries no ChronoSystem."""


class StepError(ChronoError, ValueError):
    """``system.step`` was given something other than the number of an optimizer step."""


class ContractError(ChronoError):
    """A router returned something other than what its adapter describes."""


class TelemetryError(ChronoError, OSError):
    """An output directory or a record file cannot be used."""


class LifecycleError(ChronoError):
    """Evidence, a plan, a measurement or a refit cannot be had as asked."""


class EvidenceError(LifecycleError, ValueError):
    """There is no evidence, or too little, for what is asked."""


class PlanError(LifecycleError, ValueError):
    """A plan that no model could hold, or a plan file that is none."""


class PlanMismatchError(LifecycleError):
    """The plan is sound but belongs to another model."""


class ExportError(LifecycleError):
    """A checkpoint with fewer experts cannot be written, or does not compute what the masked model does."""


class DataError(ChronoError, ValueError):
    """Text to read is missing, empty, or not where it was said to be."""


class ReplayError(ChronoError, ValueError):
    """Routing of another pass is missing, or belongs to other tokens, layers or weights."""


class NonFiniteLossError(ChronoError, ArithmeticError):
    """A loss is NaN or infinite, so nothing can be concluded from it."""


class StateError(ChronoError):
    """Saved state cannot be used."""


class StateMissingError(StateError, FileNotFoundError):
    """No state was found where one is required."""


class StateCorruptError(StateError):
    """A state file is torn, truncated, altered, or not what its name says."""


class StateSchemaError(StateError):
    """The state was written with a schema that this version does not read."""


class StateMismatchError(StateError):
    """The state is sound but belongs to another model."""


class StateWriteError(StateError, OSError):
    """State could not be written."""


class WeightMismatchError(StateError):
    """Live router or expert weights differ from the checkpoint's fingerprint."""


def shown(value: Any) -> str:
    """``repr(value)`` for a message, cut where it is long; a value that has no repr is named by its type."""
    try:
        text = repr(value)
    except Exception:  # a broken __repr__, an int of more digits than Python prints
        return f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({type(value).__name__})"


def did_you_mean(name: Any, known: Iterable[Any]) -> str:
    """``"; did you mean 'interval'?"`` for a name that is close to a known one, else an empty string."""
    if not isinstance(name, str) or len(name) > _SHOWN:
        return ""
    by_lower = {str(each).lower(): str(each) for each in known}
    near = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.6)
    return f"; did you mean {by_lower[near[0]]!r}?" if near else ""
