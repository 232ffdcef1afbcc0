"""What every config dataclass shares: typed fields, strict dictionaries, errors that name the value."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import operator
import os
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from chronomoe_hf.errors import ConfigError, did_you_mean, shown

logger = logging.getLogger("chronomoe_hf")

_INT_LIMIT = 2**63 - 1  # counts and steps end up in int64 tensors


def require(ok: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `ok`."""
    if not ok:
        raise ConfigError(message)


class ConfigBase:
    """Shared behaviour of every config dataclass: typed fields, strict dictionaries, overrides by name.

    A part remembers which of its fields were written out (as pydantic's ``model_fields_set`` does), so that a preset
    can take over exactly those from a part that is passed to it. Equality and JSON do not depend on it.
    """

    renamed: ClassVar[Mapping[str, str]] = {}
    """Names of older versions, each with the ``part.field`` that it is now; see :func:`takes_old_names`."""

    def __new__(cls, *args: Any, **fields: Any) -> typing.Self:
        """Refuses unknown names before the dataclass sees them; the values are checked after ``__init__``."""
        check_names(cls, fields)
        new = super().__new__(cls)
        written = frozenset(cls.renamed.get(name, name).partition(".")[0] for name in fields)
        object.__setattr__(new, "_written", written)
        return new

    def __post_init__(self) -> None:
        hints = hints_of(type(self))
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            fixed = _coerce(f"{type(self).__name__}.{item.name}", value, hints[item.name])
            if fixed is not value:
                object.__setattr__(self, item.name, fixed)
        self._check()

    def _check(self) -> None:
        """Raise ConfigError for values out of range; overridden by each part."""

    @property
    def written(self) -> frozenset[str]:
        """The fields that were written out when this part was made, whether or not they equal the default."""
        return typing.cast("frozenset[str]", self.__dict__.get("_written", frozenset()))

    def replace(self, **changes: Any) -> typing.Self:
        """A copy with other values; everything that is not named stays.

        Args:
            changes: fields by name; a field of a part by ``part__field`` (``beta__rate=0.1``). A whole part, or a
                dictionary, changes the fields that are written out in it and keeps the others.

        Raises:
            ConfigError: an unknown name, a value that is not allowed, or one given twice.
        """
        return _replaced(self, _tree(type(self), changes))

    def to_dict(self) -> dict[str, Any]:
        """Plain, JSON-ready dictionary of every field."""
        out: dict[str, Any] = {}
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if isinstance(value, ConfigBase):
                value = value.to_dict()
            out[item.name] = list(value) if isinstance(value, tuple) else value
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> typing.Self:
        """Build from a dictionary; unknown keys raise ConfigError naming them."""
        return cls(**with_parts(cls, data))


Part = typing.TypeVar("Part", bound=ConfigBase)

_HINTS: dict[type, dict[str, Any]] = {}


def hints_of(cls: type[ConfigBase]) -> dict[str, Any]:
    """The resolved type hint of every field."""
    if cls not in _HINTS:
        _HINTS[cls] = typing.get_type_hints(cls)
    return _HINTS[cls]


def part_of(cls: type[ConfigBase], name: str) -> type[ConfigBase] | None:
    """The config class of a field that is a part, None for a plain field."""
    hint = hints_of(cls)[name]
    return hint if isinstance(hint, type) and issubclass(hint, ConfigBase) else None


def with_parts(cls: type[ConfigBase], data: Mapping[str, Any]) -> dict[str, Any]:
    """`data` with a part in place of each dictionary that stands for one."""
    require(isinstance(data, Mapping), f"{cls.__name__} is built from a dictionary, got {shown(data)}")
    check_names(cls, data)
    values = regrouped(cls, data)
    for name, value in values.items():
        part = part_of(cls, name)
        if part is not None and isinstance(value, Mapping):
            values[name] = part.from_dict(value)
    return values


def check_names(cls: type[ConfigBase], data: Mapping[Any, Any]) -> None:
    """Raise ConfigError for keys that are no field of `cls`, with what may have been meant."""
    known = [item.name for item in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for name in data:
        if name in known or (isinstance(name, str) and name in cls.renamed):
            continue
        near = _in_a_part(cls, name) or _of_a_part(cls, name) or did_you_mean(name, known)
        raise ConfigError(f"{cls.__name__} has no {shown(name)}{near}; known: {', '.join(sorted(known))}")


_TOLD: set[tuple[type, str]] = set()


def takes_old_names(cls: type[Part]) -> type[Part]:
    """Class decorator, above ``dataclass``: the names in `renamed` are still taken as keywords, and can be read."""
    native = cls.__init__

    @functools.wraps(native)
    def init(self: ConfigBase, **fields: Any) -> None:
        native(self, **(with_parts(cls, fields) if cls.renamed.keys() & fields.keys() else fields))

    cls.__init__ = init  # type: ignore[assignment]
    for old, now in cls.renamed.items():
        setattr(cls, old, property(operator.attrgetter(now), doc=f"`{now}`, by the name of an older version."))
    return cls


def regrouped(cls: type[ConfigBase], data: Mapping[Any, Any], say: bool = True) -> dict[Any, Any]:
    """`data` with what older versions called otherwise where it belongs today.

    Args:
        cls: what it is for.
        data: field -> value; a part as itself or as a dictionary.
        say: log, once for every name, what it is called now.

    Raises:
        ConfigError: a setting is given twice, differently, by its old name and by that of today.
    """
    old = [name for name in data if isinstance(name, str) and name in cls.renamed]
    out = {name: value for name, value in data.items() if name not in old}
    for name in old:
        part, field = cls.renamed[name].split(".")
        inner = out.get(part, {})
        if isinstance(inner, ConfigBase):
            inner = {each: getattr(inner, each) for each in inner.written}
        require(isinstance(inner, Mapping), f"{cls.__name__}.{part} is a part, got {shown(inner)}")
        # A dictionary that `to_dict` made holds every setting; one that is at its default there says nothing.
        kind = part_of(cls, part)
        assert kind is not None, f"{cls.__name__}.{part} is no part"
        require(
            field not in inner or inner[field] in (getattr(kind, field), data[name]),
            f"{cls.__name__} has both {name} and {part}.{field}, its name now; keep the latter",
        )
        out[part] = {**inner, field: data[name]}
    if say:
        _tell(cls, old)
    return out


def _tell(cls: type[ConfigBase], old: list[str]) -> None:
    """Log what the names of older versions are now; once each in a process."""
    new = [name for name in old if (cls, name) not in _TOLD]
    if new:
        _TOLD.update((cls, name) for name in new)
        logger.warning(
            "%s: %s (older names still work; docs/configuration.md)",
            cls.__name__,
            ", ".join(f"{name} is {cls.renamed[name]} now" for name in new),
        )


def _in_a_part(cls: type[ConfigBase], name: Any) -> str:
    """What to write instead of ``part__field`` or ``part_field``, if `name` is one of these."""
    for item in dataclasses.fields(cls):  # type: ignore[arg-type]
        part = part_of(cls, item.name)
        if part is None or not isinstance(name, str) or not name.startswith(f"{item.name}_"):
            continue
        field = name.removeprefix(f"{item.name}_").removeprefix("_")
        if field in hints_of(part):
            return (
                f"; did you mean {item.name}={part.__name__}({field}=...)? A preset and config.replace also take "
                f"{item.name}__{field}=..."
            )
        if field in part.renamed:
            return f"; did you mean {item.name}__{part.renamed[field].replace('.', '__')}?"
    return ""


def _of_a_part(cls: type[ConfigBase], name: Any) -> str:
    """What to write for a field of a part that was given without its part (``rate``), or for ``preset``."""
    if name == "preset" and any(item.name == "contract" for item in dataclasses.fields(cls)):  # type: ignore[arg-type]
        return "; did you mean contract?"
    parts = [item.name for item in dataclasses.fields(cls)]  # type: ignore[arg-type]
    kinds = {part: kind for part in parts if (kind := part_of(cls, part)) is not None}
    found = [f"{part}__{name}" for part, kind in kinds.items() if name in hints_of(kind)] or [
        f"{part}__{kind.renamed[name].replace('.', '__')}" for part, kind in kinds.items() if name in kind.renamed
    ]
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _tree(cls: type[ConfigBase], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes as nested dictionaries of plain values: ``{"beta": {"rate": 0.1}, "interval": 50}``."""
    tree: dict[str, Any] = {}
    _tell(cls, [name for name in changes if name in cls.renamed])
    for key, value in changes.items():
        name, _, rest = cls.renamed.get(str(key), str(key)).replace(".", "__").partition("__")
        check_names(cls, {name: value})
        part = part_of(cls, name)
        if part is None:
            require(not rest, f"{cls.__name__}.{name} is a value, not a part: {shown(key)} names nothing in it")
            _put(tree, name, value, cls)
            continue
        if rest:
            value = {rest: value}
        elif isinstance(value, part):
            value = {field: getattr(value, field) for field in value.written}
        require(isinstance(value, Mapping), f"{cls.__name__}.{name} must be {part.__name__}, got {shown(value)}")
        below = tree.setdefault(name, {})
        for field, inner in _tree(part, value).items():
            _merge(below, field, inner, part)
    return tree


def _merge(tree: dict[str, Any], name: str, value: Any, cls: type[ConfigBase]) -> None:
    part = part_of(cls, name)
    if part is None:
        _put(tree, name, value, cls)
        return
    below = tree.setdefault(name, {})
    for field, inner in value.items():
        _merge(below, field, inner, part)


def _put(tree: dict[str, Any], name: str, value: Any, cls: type[ConfigBase]) -> None:
    require(name not in tree, f"{cls.__name__}.{name} is given twice; leave one of them out")
    tree[name] = value


def _replaced(part: Any, tree: Mapping[str, Any]) -> Any:
    """A copy of `part` with the changes of a :func:`_tree`, which remembers what was written out in either."""
    values = {item.name: getattr(part, item.name) for item in dataclasses.fields(part)}
    for name, value in tree.items():
        values[name] = value if part_of(type(part), name) is None else _replaced(values[name], value)
    new = type(part)(**values)
    object.__setattr__(new, "_written", part.written | set(tree))
    return new


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """Check `value` against a type hint; an int is taken where a float is meant, a path where a string is."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        choices = typing.get_args(hint)
        if not (isinstance(value, str) and value in choices):
            listed = ", ".join(map(repr, choices))
            raise ConfigError(f"{name} must be one of {listed}, got {shown(value)}{did_you_mean(value, choices)}")
        return value
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(name, value, typing.get_args(hint))
    if origin is tuple:
        return _coerce_tuple(name, value, typing.get_args(hint))
    if hint is type(None):
        require(value is None, f"{name} must be None, got {shown(value)}")
        return value
    if hint is float:
        number = _finite(value)
        require(number is not None, f"{name} must be a finite number, got {shown(value)}")
        return number
    if hint is int:
        ok = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _INT_LIMIT
        require(ok, f"{name} must be an integer (of at most 64 bits), got {shown(value)}")
        return value
    if origin is os.PathLike:
        require(isinstance(value, os.PathLike), f"{name} must be a path, got {shown(value)}")
        return os.fsdecode(value)
    require(isinstance(value, hint), f"{name} must be {hint.__name__}, got {shown(value)}")
    return value


def _coerce_tuple(name: str, value: Any, hints: tuple[Any, ...]) -> tuple[Any, ...]:
    ok = isinstance(value, list | tuple) and len(value) == len(hints)
    require(ok, f"{name} must be {len(hints)} values or None, got {shown(value)}")
    return tuple(_coerce(f"{name}[{at}]", each, hint) for at, (each, hint) in enumerate(zip(value, hints, strict=True)))


def _coerce_union(name: str, value: Any, options: tuple[Any, ...]) -> Any:
    errors = []
    for option in options:
        try:
            return _coerce(name, value, option)
        except ConfigError as error:
            errors.append(str(error))
    # A string was meant for the list of words, where there is one; everything else for the first option.
    words = [error for option, error in zip(options, errors, strict=True) if typing.get_origin(option) is Literal]
    raise ConfigError(words[0] if words and isinstance(value, str) else errors[0])


def _finite(value: Any) -> float | None:
    """`value` as a float, None where it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:  # an int beyond the range of a float
        return None
    return number if math.isfinite(number) else None


def between(name: str, value: float, low: float, high: float) -> None:
    """Raise ConfigError unless `value` is in [low, high]."""
    require(low <= value <= high, f"{name} must be in [{low}, {high}], got {value}")


def positive(name: str, value: float) -> None:
    """Raise ConfigError unless `value` is above 0."""
    require(value > 0, f"{name} must be positive, got {value}")
