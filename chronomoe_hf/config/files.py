"""JSON text and files to dictionaries, strictly; and the dictionaries of older schemas to today's."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from chronomoe_hf.config.base import regrouped, require
from chronomoe_hf.config.lifecycle import LifecycleConfig
from chronomoe_hf.errors import ConfigError, shown

logger = logging.getLogger("chronomoe_hf")

CONFIG_SCHEMA = 4
CONFIG_NAME = "chronomoe_config.json"
MAX_BYTES = 2**20
"""Largest config that is read; one with every field is about 3 KB."""

# What the preset `balance` set for its law up to schema 2, without saying so: written files must keep their law.
_BALANCE_2 = {"rate": 0.3, "dead_zone": None, "first_layer": "same"}
# Schema 1 kept the harm guard's settings among those of the controller.
_HARM_1 = ("threshold", "min_scale", "factor", "floor", "recovery", "abstain", "restart", "hold")


def parse(text: Any) -> dict[str, Any]:
    """The JSON object in `text`.

    Raises:
        ConfigError: no string, too long, no JSON, nested too deeply, a key that occurs twice, a number that JSON does
            not have (NaN) or that is too long.
    """
    require(isinstance(text, str), f"a config is read from a JSON string, got {shown(text)}")
    require(len(text) <= MAX_BYTES, f"not a chronomoe config: {len(text)} characters, at most {MAX_BYTES} are read")
    try:
        data = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse)
    except ConfigError:
        raise
    except RecursionError:
        raise ConfigError("not a chronomoe config: the JSON is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, and a number of more digits than Python reads
        raise ConfigError(f"not a chronomoe config: {error}") from None
    require(isinstance(data, dict), f"a config is a JSON object, got {shown(data)}")
    return dict(data)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        require(key not in out, f"the JSON has the key {shown(key)} twice; which one is meant?")
        out[key] = value
    return out


def _refuse(constant: str) -> NoReturn:
    raise ConfigError(f"the JSON holds {constant}, which is no JSON number; settings are finite")


def read(path: Any) -> str:
    """The text of a config file, or of ``chronomoe_config.json`` in a directory.

    Raises:
        ConfigError: there is none, it cannot be read, is too large, or is no UTF-8 text.
    """
    require(isinstance(path, str | os.PathLike), f"a config is read from a path, got {shown(path)}")
    path = Path(path)
    try:
        path = path / CONFIG_NAME if path.is_dir() else path
        require(path.is_file(), f"no {CONFIG_NAME} at {path}; save one with config.save_pretrained(directory)")
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} cannot be read: {error}") from None
    require(len(raw) <= MAX_BYTES, f"{path} is no chronomoe config: it is larger than {MAX_BYTES} bytes")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no chronomoe config: it is not UTF-8 text ({error})") from None


def upgrade(data: Mapping[str, Any]) -> dict[str, Any]:
    """A config dictionary of any schema that was ever written, in today's form.

    A dictionary without ``schema_version`` may use the names of any schema, and means today's presets. One that says
    schema 1 or 2 and ``"contract": "balance"`` keeps the law that this preset had then; one that says a schema below 4
    keeps what its ``max_tokens`` meant.

    Raises:
        ConfigError: a newer schema, or one that never was.
    """
    schema = data.get("schema_version", 1)
    require(
        isinstance(schema, int) and not isinstance(schema, bool) and schema >= 1,
        f"schema_version must be an integer from 1 to {CONFIG_SCHEMA}, got {shown(schema)}",
    )
    require(
        schema <= CONFIG_SCHEMA,
        f"schema_version {shown(schema)} is newer than this version reads (up to {CONFIG_SCHEMA}); "
        "install the chronomoe_hf that wrote it",
    )
    out = {**data, "schema_version": CONFIG_SCHEMA}
    if schema < 2:
        out = _from_1(out)
    if schema < 3 and "schema_version" in data:
        out = _from_2(out)
    if schema < 4 and "schema_version" in data:
        out = _from_3(out)
    return out


def _from_3(data: dict[str, Any]) -> dict[str, Any]:
    """The lifecycle had no groups; and 256, the default, meant 64 where outputs are replayed: that is ``"auto"``."""
    coherence, lifecycle = data.get("coherence"), data.get("lifecycle")
    if isinstance(coherence, Mapping) and coherence.get("max_tokens") == 256:
        data = {**data, "coherence": {**coherence, "max_tokens": "auto"}}
    if isinstance(lifecycle, Mapping):
        data = {**data, "lifecycle": regrouped(LifecycleConfig, lifecycle, say=False)}
    return data


_SAID: list[bool] = []


def say_what_changed(data: Mapping[str, Any]) -> None:
    """Log, once in a process, that the config of an older schema is read whose lifecycle has no groups."""
    lifecycle, schema = data.get("lifecycle"), data.get("schema_version")
    old = [name for name in lifecycle if name in LifecycleConfig.renamed] if isinstance(lifecycle, Mapping) else []
    if not old or not isinstance(schema, int) or schema >= 4 or _SAID:
        return
    _SAID.append(True)
    logger.warning(
        "a config of schema %d is read: the settings of lifecycle are in groups now, lifecycle.%s is lifecycle.%s "
        "(docs/configuration.md); config.save_pretrained(directory) writes the new names",
        schema,
        old[0],
        LifecycleConfig.renamed[old[0]],
    )


def _from_2(data: dict[str, Any]) -> dict[str, Any]:
    beta = data.get("beta", {})
    if not isinstance(beta, Mapping):
        return data
    if data.get("contract") == "balance":
        return {**data, "beta": {**_BALANCE_2, **beta}}
    if beta.get("law") == "balance":  # a law built from parts chose by "selection", whatever was written
        return {**data, "beta": {**beta, "scope": "selection"}}
    return data


def _from_1(data: dict[str, Any]) -> dict[str, Any]:
    control = data.get("control")
    if not isinstance(control, Mapping):
        return data
    moved = {name: control[f"harm_{name}"] for name in _HARM_1 if f"harm_{name}" in control}
    if not moved:
        return data
    harm = control.get("harm", {})
    if not isinstance(harm, Mapping) or set(harm) & set(moved):
        raise ConfigError("control.harm and the older control.harm_... are both given; keep control.harm")
    kept = {name: value for name, value in control.items() if name not in {f"harm_{old}" for old in moved}}
    return {**data, "control": {**kept, "harm": {**harm, **moved}}}
