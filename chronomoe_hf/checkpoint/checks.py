"""Every field and tensor of a saved state, checked before any of it is used. Raises on the first fault.

A sound pair of files may still hold anything: the checks here end in StateCorruptError that names the field, what was
found and what belongs there. Shape suffixes: L layers, E experts (of the widest layer), C clocks, R numbers of a row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from chronomoe_hf import distributed
from chronomoe_hf.checkpoint.correction import BIAS, check_biases
from chronomoe_hf.checkpoint.manifest import SCHEMA_MINOR, WAY_OUT, is_count, short
from chronomoe_hf.errors import StateCorruptError, StateMismatchError
from chronomoe_hf.lifecycle.evidence.drift import START
from chronomoe_hf.recording.role_sums import KEPT, MOMENTS, PAIRS, WINDOW, RoleState

# The roles of experts in a saved state: tensors ``role.<layer>.<name>``, which states without roles lack.
#
# Shape suffixes: E experts, D width of an output, M columns and P sums of ``recording.role_sums``.

ROLE = re.compile(r"role\.(\d{1,9})\.(\w{1,40})")
_DTYPES = {"updates_E": torch.int64, "table_EM": torch.float64}


def packed(roles: RoleState | None) -> dict[str, Tensor]:
    """The tensors that are saved; none without roles."""
    return {} if roles is None else {f"role.{name}": value for name, value in roles.state_dict().items()}


def of_layer(tensors: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    """The tensors of one saved layer, by name; empty where it has none."""
    prefix = f"role.{layer}."
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def check_roles(tensors: Mapping[str, Tensor], num_experts: Sequence[int]) -> None:
    """Check names, dtypes, shapes and numbers of every ``role.*`` tensor.

    Args:
        tensors: of the saved state.
        num_experts: E of each saved layer.

    Raises:
        StateCorruptError: the first that is missing, unknown, or not what it must be.
    """
    found = [match for name in tensors if (match := ROLE.fullmatch(str(name)))]
    for layer in sorted({int(match[1]) for match in found}):
        if layer >= len(num_experts):
            raise StateCorruptError(f"the saved state has role.{layer} for {len(num_experts)} layers; {WAY_OUT}")
        own, names = of_layer(tensors, layer), (*WINDOW, *KEPT)
        if set(own) != set(names):
            wrong = sorted(set(own) ^ set(names))
            raise StateCorruptError(
                f"the saved roles of layer {layer} lack or have too much: {short(wrong)}; {WAY_OUT}"
            )
        width = own["mean_ED"].shape[-1] if own["mean_ED"].dim() == 2 else 0
        sizes = {"E": num_experts[layer], "D": width, "M": len(MOMENTS), "P": len(PAIRS)}
        for name in names:
            shape = tuple(sizes[letter] for letter in name.rpartition("_")[2])
            _check(f"role.{layer}.{name}", own[name], _DTYPES.get(name, torch.float32), shape)
        if bool((own["updates_E"] < 0).any()) or bool((own["table_EM"][:, (0, 1, 4, 5)] < 0).any()):
            raise StateCorruptError(f"the saved roles of layer {layer} hold a negative number of tokens; {WAY_OUT}")


def _check(name: str, value: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if value.dtype != dtype or tuple(value.shape) != shape or 0 in shape:
        raise StateCorruptError(
            f"the saved state's {name} must be {dtype} of shape {shape}, got {value.dtype} {tuple(value.shape)}; "
            f"{WAY_OUT}"
        )
    if value.is_floating_point() and not bool(value.isfinite().all()):
        raise StateCorruptError(f"the saved state's {name} must be finite; {WAY_OUT}")


def load_roles(
    roles: RoleState | None, tensors: Mapping[str, Tensor], pairs: Sequence[tuple[int, int]], copies: int, whole: bool
) -> None:
    """Take over the roles of the layers that agree; where none were saved, they start afresh.

    The open window's sums are those of the rank that saved: they go to the ranks that saw its batches, the others
    start their part afresh.

    Args:
        roles: live; None = not kept.
        tensors: of the saved state, checked.
        pairs: (saved layer, live layer) that agree.
        copies: how many ranks see the same batch.
        whole: the whole model agrees; only then the open window counts.
    """
    if roles is None:
        return
    roles.layers.clear()
    for old, new in pairs:
        own = of_layer(tensors, old)
        if own:
            roles.load_layer(new, own, with_window=whole and distributed.rank() < copies)


_RUN_ID = re.compile(r"[0-9A-Za-z._-]{1,64}")
# What a tensor may hold, beyond being finite.
_RANGES: dict[str, tuple[float, float]] = {
    "updates_LE": (0, 2**62),
    "tokens_LE": (0, 2**62),
    "last_step_LE": (-1, 2**62),
    "std_L": (0.0, 1e30),
    "std_updates_L": (0, 2**62),
    "logit_std_L": (0.0, 1e30),
    "relevance_L": (0.0, 1.0),
    "loss_N": (0.0, 2**53),
}
LENS = re.compile(r"lens\.(\d{1,9})\.(V|U|scale)")


def _fault(what: str, found: object, expected: str) -> StateCorruptError:
    return StateCorruptError(f"the saved state's {what} must be {expected}, got {short(found)}; {WAY_OUT}")


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_run_id(value: Any) -> bool:
    return isinstance(value, str) and _RUN_ID.fullmatch(value) is not None


def _is_share(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0.0 <= value <= 1.0)


def _are(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(check(item) for item in value)


_REQUIRED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "step": (is_count, "a non-negative integer"),
    "window_steps": (is_count, "a non-negative integer"),
    "run_id": (_is_run_id, "1 to 64 letters, digits, '.', '_' or '-'"),
    "governed": (_is_flag, "true or false"),
    "steering": (_are(_is_flag), "a list of true or false, one per layer"),
    "layers": (_are(lambda row: isinstance(row, dict)), "a list of layers"),
    "controller": (lambda value: isinstance(value, dict), "a table"),
    "lifecycle": (lambda value: isinstance(value, dict), "a table"),
    "alerts": (lambda value: isinstance(value, dict), "a table"),
}
_OPTIONAL: dict[str, tuple[Callable[[Any], bool], str]] = {
    "attempt": (is_count, "a non-negative integer"),
    "world_size": (is_count, "a non-negative integer"),
    "config": (lambda value: isinstance(value, dict), "a table"),
    "cut": (lambda value: isinstance(value, dict), "a table"),
    "interval": (lambda value: value is None or (is_count(value) and value > 0), "null or a positive integer"),
    "topk_disagreement": (_are(_is_share), "a list of null or numbers in [0, 1]"),
}


def check_meta(meta: Mapping[str, Any]) -> None:
    """Check presence, type and range of every field that loading reads.

    Raises:
        StateCorruptError: The first field that is missing or not what it must be.
    """
    if not isinstance(meta, Mapping):
        raise _fault("manifest", meta, "a table")
    for name, (check, expected) in _REQUIRED.items():
        if name not in meta:
            raise StateCorruptError(f"the saved state lacks {name} ({expected}); {WAY_OUT}")
        if not check(meta[name]):
            raise _fault(name, meta[name], expected)
    for name, (check, expected) in _OPTIONAL.items():
        if name in meta and not check(meta[name]):
            raise _fault(name, meta[name], expected)
    if len(meta["steering"]) != len(meta["layers"]):
        raise _fault("steering", meta["steering"], f"a list of {len(meta['layers'])} entries, one per layer")
    _check_rows(meta["layers"])
    _check_alerts(meta["alerts"])


def _check_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    for index, row in enumerate(rows):
        for name in ("name", "router_class"):
            if not isinstance(row.get(name), str):
                raise _fault(f"layers[{index}].{name}", row.get(name), "a string")
        for name in ("num_experts", "top_k"):
            if not is_count(row.get(name)) or row[name] < 1:
                raise _fault(f"layers[{index}].{name}", row.get(name), "a positive integer")


def _check_alerts(alerts: Mapping[str, Any]) -> None:
    streak, active, baseline = alerts.get("streak"), alerts.get("active"), alerts.get("baseline")
    if not isinstance(streak, dict) or not all(is_count(value) for value in streak.values()):
        raise _fault("alerts.streak", streak, "a table of non-negative integers")
    if not isinstance(active, list) or not all(_is_alert(item) for item in active):
        raise _fault("alerts.active", active, "a list of {kind, layer_id, step, detail}")
    if not isinstance(baseline, dict) or not all(_are(_is_number)(values) for values in baseline.values()):
        raise _fault("alerts.baseline", baseline, "a table of lists of finite numbers")
    if not _is_reference(alerts.get("reference", {})):
        raise _fault("alerts.reference", alerts["reference"], "a baseline: counts of every layer, and what was watched")
    if not isinstance(alerts.get("governed"), bool):
        raise _fault("alerts.governed", alerts.get("governed"), "true or false")


def _is_reference(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("source", ""), str):
        return False
    tables = [value.get(name, {}) for name in ("layers", "noise", "quiet")]
    if not all(isinstance(table, dict) for table in tables):
        return False
    layers, noise, quiet = tables
    return (
        all(
            isinstance(entry, dict)
            and _are(is_count)(entry.get("counts"))
            and all(is_count(entry.get(name)) for name in ("windows", "step"))
            and isinstance(entry.get("settled"), bool)
            and (entry.get("coherence_mean") is None or _is_number(entry["coherence_mean"]))
            for entry in layers.values()
        )
        and all(
            isinstance(each, dict)
            and all(
                isinstance(row, dict) and _is_number(row.get("last")) and _are(_is_number)(row.get("steps"))
                for row in each.values()
            )
            for each in noise.values()
        )
        and all(
            isinstance(each, dict)
            and all(name.isdigit() and _are(_is_number)(row) and len(row) == 2 for name, row in each.items())
            for each in quiet.values()
        )
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_alert(item: Any) -> bool:
    return (
        isinstance(item, dict)
        and isinstance(item.get("kind"), str)
        and (item.get("layer_id") is None or is_count(item["layer_id"]))
        and is_count(item.get("step"))
        and isinstance(item.get("detail"), str)
    )


def check_tensors(
    tensors: Mapping[str, Tensor], live: Mapping[str, Tensor], num_experts: Sequence[int], minor: Any = 0
) -> None:
    """Check names, dtypes, shapes, finiteness and ranges of the stacked tensors and of the lenses.

    Args:
        tensors: Of the saved state.
        live: The live stacked tensors by name: which there must be, and their dtypes. The letters after the last
            underscore of a name are its dimensions.
        num_experts: E of each *saved* layer; only the model's own table says whether that fits the live model.
        minor: The state's ``schema_minor``: only a newer one may hold tensors that are not known here.

    Raises:
        StateCorruptError: The first tensor that is missing, unknown, or not what it must be.
    """
    missing = [name for name in live if name not in tensors]
    if missing:
        raise StateCorruptError(f"the saved state lacks {', '.join(missing)}; {WAY_OUT}")
    known = (LENS, ROLE, START, BIAS)
    unknown = [name for name in tensors if name not in live and not any(each.fullmatch(str(name)) for each in known)]
    if unknown and not (is_count(minor) and minor > SCHEMA_MINOR):
        raise StateCorruptError(f"the saved state holds tensors that no state has: {short(sorted(unknown))}; {WAY_OUT}")
    for name, value in live.items():
        expected = tuple(_size(letter, value, place, num_experts) for place, letter in _dimensions(name))
        _check_tensor(name, tensors[name], value.dtype, expected)
    for name in tensors:
        match = LENS.fullmatch(str(name))
        if match is not None and int(match[1]) >= len(num_experts):
            raise StateCorruptError(f"the saved state has {name} for {len(num_experts)} layers; {WAY_OUT}")
    check_roles(tensors, num_experts)
    _check_starts(tensors, num_experts)
    check_biases(tensors, num_experts)
    for layer in range(len(num_experts)):
        _check_lens(layer, {part: tensors.get(f"lens.{layer}.{part}") for part in ("V", "U", "scale")})


def _check_starts(tensors: Mapping[str, Tensor], num_experts: Sequence[int]) -> None:
    """Router rows of the start: whole rows of a known layer, of any floating dtype."""
    for name, value in tensors.items():
        if (match := START.fullmatch(str(name))) is None:
            continue
        if int(match[1]) >= len(num_experts):
            raise StateCorruptError(f"the saved state has {name} for {len(num_experts)} layers; {WAY_OUT}")
        rows = num_experts[int(match[1])]
        if value.dim() != 2 or value.shape[0] < rows or not value.is_floating_point():
            raise _fault(name, f"{value.dtype} {tuple(value.shape)}", f"floating, of shape ({rows} or more, any)")
        _check_tensor(name, value, value.dtype, (None, None))


def _dimensions(name: str) -> list[tuple[int, str]]:
    return list(enumerate(name.rpartition("_")[2]))


def _size(letter: str, live: Tensor, place: int, num_experts: Sequence[int]) -> int | None:
    """Size of one dimension; None = any (a row's columns are the recorder's own and may change between versions)."""
    if letter == "R":
        return None
    return {"L": len(num_experts), "E": max(num_experts)}.get(letter, live.shape[place])


def _check_tensor(name: str, value: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]) -> None:
    if value.dtype != dtype:
        raise _fault(name, value.dtype, str(dtype))
    fits = value.dim() == len(shape) and all(
        want in (None, size) for size, want in zip(value.shape, shape, strict=True)
    )
    if not fits:
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise _fault(name, tuple(value.shape), f"of shape ({sizes})")
    if value.is_floating_point() and not bool(value.isfinite().all()):
        count = int((~value.isfinite()).sum())
        raise _fault(name, f"{count} NaN or infinite numbers", "finite")
    low, high = _RANGES.get(name, (None, None))
    if low is not None and high is not None and value.numel():
        least, most = value.min().item(), value.max().item()
        if least < low or most > high:
            raise _fault(name, f"{least:g} to {most:g}", f"within [{low:g}, {high:g}]")


def _check_lens(layer: int, parts: Mapping[str, Tensor | None]) -> None:
    V_DR, U_RD, scale = parts["V"], parts["U"], parts["scale"]
    if V_DR is None and U_RD is None and scale is None:
        return
    if V_DR is None or U_RD is None or scale is None:
        lacking = [name for name, value in parts.items() if value is None]
        raise StateCorruptError(f"the saved lens of layer {layer} lacks {', '.join(lacking)}; {WAY_OUT}")
    _check_tensor(f"lens.{layer}.V", V_DR, torch.float32, (None, None))
    _check_tensor(f"lens.{layer}.U", U_RD, torch.float32, (V_DR.shape[1], V_DR.shape[0]))
    _check_tensor(f"lens.{layer}.scale", scale, torch.float64, ())
    if float(scale) < 0.0:
        raise _fault(f"lens.{layer}.scale", float(scale), "at least 0")


MAX_ROWS_SHOWN = 20

_LAYER_FIELDS = ("router_class", "num_experts", "top_k")
_SAME_FIELDS = ("router_class", "num_experts")  # k is a setting of the model, which a run may change


def check_layers(
    saved: Sequence[Mapping[str, Any]], live: Sequence[Mapping[str, Any]], allow_partial: bool = False
) -> list[tuple[int, int]]:
    """Pair the layers of a saved state with those of the live model, by name.

    Args:
        saved: The manifest's ``layers``: ``{"name", "router_class", "num_experts", "top_k"}`` each.
        live: The same table of the wrapped model.
        allow_partial: Return the layers that agree instead of raising when some do not.

    Returns:
        ``(index in saved, index in live)`` of every layer that agrees in router class and E, in the order of `live`.

    Raises:
        StateMismatchError: With a table of the differences: any without `allow_partial`, or no layer agrees.
    """
    saved_index = {layer["name"]: index for index, layer in enumerate(saved)}
    live_names = {layer["name"] for layer in live}
    pairs, rows = [], []
    for index, layer in enumerate(live):
        position = saved_index.get(layer["name"])
        if position is None:
            rows.append((layer["name"], "(absent)", _describe(layer)))
        elif any(saved[position][key] != layer[key] for key in _SAME_FIELDS):
            rows.append((layer["name"], _describe(saved[position]), _describe(layer)))
        else:
            pairs.append((position, index))
    rows += [(layer["name"], _describe(layer), "(absent)") for layer in saved if layer["name"] not in live_names]
    if rows and not (allow_partial and pairs):
        hint = "load it into the model it was saved from" + (
            "" if allow_partial else ", or set CheckpointConfig(allow_partial=True) to load only the layers that agree"
        )
        raise StateMismatchError(
            f"the saved state has {len(saved)} MoE layers, the model has {len(live)}, {len(pairs)} agree; {hint}\n"
            + _table([("layer", "saved", "model"), *rows[:MAX_ROWS_SHOWN]])
            + (f"\n... and {len(rows) - MAX_ROWS_SHOWN} more" if len(rows) > MAX_ROWS_SHOWN else "")
        )
    return pairs


def _describe(layer: Mapping[str, Any]) -> str:
    return "{} E={} k={}".format(*(layer[key] for key in _LAYER_FIELDS))


def _table(rows: list[tuple[str, str, str]]) -> str:
    # Names come from a file: escape them so that no control character reaches a terminal.
    clean = [[cell.encode("unicode_escape").decode("ascii")[:120] for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in clean) for column in range(3)]
    return "\n".join(
        "  " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in clean
    )
