"""JSON Schemas of every record, one file a kind, and a check of the part of JSON Schema that they use."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from importlib import resources
from typing import Any

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list,),
    "null": (type(None),),
    "integer": (int,),
    "number": (int, float),
}


@functools.cache
def schema_of(kind: str) -> dict[str, Any]:
    """The JSON Schema (2020-12) of one kind of record, or of ``"verdict"``: what ``report --json`` prints.

    Args:
        kind: one of ``telemetry.reader.KINDS``, or ``"verdict"``.
    """
    text = resources.files(__name__).joinpath(f"{kind}.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def mismatches(value: Any, schema: dict[str, Any], where: str = "") -> Iterator[str]:
    """What in `value` is not as `schema` says, in words: types, required names, enumerations and lower bounds.

    Args:
        value: parsed JSON.
        schema: of :func:`schema_of`, or a part of one.
        where: path to the value, for the words.
    """
    name = where or "the record"
    types = schema.get("type", [])
    types = [types] if isinstance(types, str) else types
    if types and not any(_is(value, each) for each in types):
        yield f"{name} is {_shown(value)}, not {' or '.join(types)}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{name} is {_shown(value)}, none of {', '.join(map(str, schema['enum']))}"
    if "minimum" in schema and isinstance(value, int | float) and value < schema["minimum"]:
        yield f"{name} is {_shown(value)}, below {schema['minimum']}"
    if isinstance(value, dict):
        yield from _of_object(value, schema, where)
    if isinstance(value, list) and "items" in schema:
        for at, item in enumerate(value):
            yield from mismatches(item, schema["items"], f"{where}[{at}]")


def _of_object(value: dict[str, Any], schema: dict[str, Any], where: str) -> Iterator[str]:
    for name in schema.get("required", ()):
        if name not in value:
            yield f"{where or 'the record'} has no {name}"
    known, others = schema.get("properties", {}), schema.get("additionalProperties")
    for name, item in value.items():
        inner = known.get(name, others)
        if isinstance(inner, dict):
            yield from mismatches(item, inner, f"{where}.{name}" if where else name)


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, _TYPES[kind]) or (kind == "integer" and isinstance(value, float) and value.is_integer())


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
