"""What every config dataclass shares: typed fields, strict dictionaries, errors that name the value."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any, Literal

from chronomoe_hf.errors import ConfigError


def require(ok: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `ok`."""
    if not ok:
        raise ConfigError(message)


class ConfigBase:
    """Shared behaviour of every config dataclass: typed fields, strict dictionaries."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            fixed = _coerce(f"{type(self).__name__}.{item.name}", value, hints[item.name])
            if fixed is not value:
                object.__setattr__(self, item.name, fixed)
        self._check()

    def _check(self) -> None:
        """Raise ConfigError for values out of range; overridden by each part."""

    def to_dict(self) -> dict[str, Any]:
        """Plain, JSON-ready dictionary of every field."""
        out: dict[str, Any] = {}
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            out[item.name] = value.to_dict() if isinstance(value, ConfigBase) else value
        return out

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> typing.Self:
        """Build from a dictionary; unknown keys raise ConfigError naming them."""
        require(isinstance(data, dict), f"{cls.__name__} is built from a dictionary, got {type(data).__name__}")
        hints = typing.get_type_hints(cls)
        known = {item.name for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(data) - known)
        require(not unknown, f"{cls.__name__} has no {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        values = dict(data)
        for name, value in data.items():
            hint = hints[name]
            if isinstance(hint, type) and issubclass(hint, ConfigBase) and isinstance(value, dict):
                values[name] = hint.from_dict(value)
        return cls(**values)


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """Check `value` against a type hint; an int is accepted (and converted) where a float is meant."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        choices = typing.get_args(hint)
        require(value in choices, f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
        return value
    if origin in (typing.Union, types.UnionType):
        errors = []
        for option in typing.get_args(hint):
            try:
                return _coerce(name, value, option)
            except ConfigError as error:
                errors.append(str(error))
        raise ConfigError(errors[0])
    if hint is type(None):
        require(value is None, f"{name} must be None, got {value!r}")
        return value
    if hint is float:
        ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        require(ok, f"{name} must be a finite number, got {value!r}")
        return float(value)
    if hint is int:
        require(isinstance(value, int) and not isinstance(value, bool), f"{name} must be an integer, got {value!r}")
        return value
    require(isinstance(value, hint), f"{name} must be {hint.__name__}, got {value!r}")
    return value


def between(name: str, value: float, low: float, high: float) -> None:
    """Raise ConfigError unless `value` is in [low, high]."""
    require(low <= value <= high, f"{name} must be in [{low}, {high}], got {value}")


def positive(name: str, value: float) -> None:
    """Raise ConfigError unless `value` is above 0."""
    require(value > 0, f"{name} must be positive, got {value}")
