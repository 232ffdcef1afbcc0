"""What the tensors of a checkpoint's files become, by the names that Transformers writes.

In memory, experts are one tensor; in files most families keep one name per expert. What Transformers writes for a
config is asked of Transformers: a model without storage, sent through the conversion of ``save_pretrained``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from transformers import PreTrainedModel

from chronomoe_hf.errors import ExportError
from chronomoe_hf.export.cut_model import owners_of, shapes_of
from chronomoe_hf.export.slicing import Piece, Shapes, cut_table
from chronomoe_hf.export.tensor_files import Stored
from chronomoe_hf.lifecycle.pruning.plan import PrunePlan
from chronomoe_hf.private import find
from chronomoe_hf.wrapping.discovery import FoundLayer, find_layers


def writes_published_names(model: PreTrainedModel) -> bool:
    """Whether saving `model` writes the published names, one an expert, where its family has them.

    Transformers reverses only the conversions that it made when the model was loaded: none, if the files had the names
    that the model has in memory. Without a note of them it reverses those of the family.
    """
    used = model.__dict__.get("_weight_conversions")
    if used is None:
        return False
    known = conversion("conversion_mapping.get_model_conversion_mapping")(model, add_legacy=False)
    converter = conversion("core_model_loading.WeightConverter")
    splits = [entry for entry in known if isinstance(entry, converter)]
    return not splits or any(isinstance(entry, converter) for entry in used)


def disk_pieces(
    big: PreTrainedModel,
    small: PreTrainedModel,
    layers: list[FoundLayer],
    plan: PrunePlan,
    stored: Mapping[str, Stored],
    *,
    quantized: bool,
    drop_unknown: bool,
) -> tuple[dict[str, Piece], list[str]]:
    """The piece of every tensor of the new files, and the names of what is left out: the model does not have it.

    Args:
        big: the model of the checkpoint's config, without storage.
        small: the model that stays, without storage.
        layers: of `big`, in the order of the plan.
        plan: what stays.
        stored: tensors of the files.
        quantized: shapes in the files are packed, and scales lie beside the weights.
        drop_unknown: leave out tensors that belong to nothing in the model.

    Raises:
        ExportError: the files hold other tensors than this Transformers writes for the config.
    """
    old, new = on_disk(big), on_disk(small)
    owners = _disk_owners(big, layers) | _disk_owners(small, find_layers(small)[0])
    absent = {name for name in old if name not in stored}
    _require_known(stored, old, absent - _tied(big), quantized)
    table = cut_table(old, new, owners, plan)
    targets: dict[str, list[str]] = {}
    for name, piece in table.items():
        targets.setdefault(piece.source, []).append(name)
    pieces = {}
    for name, piece in table.items():
        if piece.source in stored:
            pieces[name] = checked(name, piece, stored[piece.source], plan)
    unknown = []
    for name in stored:
        if name not in old:
            model_name = _relative(name, old, absent)
            if model_name is None:
                unknown.append(name)
            else:
                pieces |= _following(name, model_name, targets.get(model_name, []), table, stored[name], plan)
    require_unknown_dropped(unknown, drop_unknown)
    return pieces, unknown


def require_unknown_dropped(unknown: Sequence[str], drop_unknown: bool) -> None:
    """Tensors that the model does not have are left out only where that was asked for.

    Raises:
        ExportError: there are some, and it was not.
    """
    if unknown and not drop_unknown:
        raise ExportError(
            f"{len(unknown)} tensors in the files are not part of the model that Transformers builds (first: "
            f"{unknown[0]}), a next-token head perhaps; whether they depend on the experts is not known. "
            "drop_unknown=True (--drop-unknown) leaves them out"
        )


def conversion(path: str) -> Any:
    """A name of Transformers that says by which names files hold experts.

    Raises:
        ExportError: this release does not have it.
    """
    found = find(f"transformers.{path}")
    if found is None:
        raise ExportError(
            f"Transformers {version('transformers')} has no {path}, which says by which names files hold "
            "its experts; cut the model in memory (lifecycle.export), or install a release that chronomoe_hf is tested "
            "with"
        )
    return found


def on_disk(model: PreTrainedModel) -> Shapes:
    """Shapes by the names that ``save_pretrained`` writes."""
    return shapes_of(_reverted(model, model.state_dict()))


def _reverted(model: PreTrainedModel, tensors: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = conversion("core_model_loading.revert_weight_conversion")(model, dict(tensors))
    return out


def _disk_owners(model: PreTrainedModel, layers: list[FoundLayer]) -> dict[str, int]:
    """layer_id by name in the files: each block's tensors are converted by themselves."""
    tensors = model.state_dict()
    by_layer: dict[int, dict[str, Any]] = {}
    for name, at in owners_of(model, layers, tensors).items():
        by_layer.setdefault(at, {})[name] = tensors[name]
    return {name: at for at, part in by_layer.items() for name in _reverted(model, part)}


def tied_names(model: PreTrainedModel) -> set[str]:
    """Names in memory of tensors that are another tensor too."""
    seen: dict[int, str] = {}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    for name, value in model.state_dict(keep_vars=True).items():
        first = seen.setdefault(id(value), name)
        if first != name:
            tied |= {first, name}
    return tied


def _tied(model: PreTrainedModel) -> set[str]:
    """Names in the files of tensors that are another tensor too, and need not be there."""
    tensors = model.state_dict()
    return set(_reverted(model, {name: tensors[name] for name in tied_names(model) if name in tensors}))


def _require_known(stored: Mapping[str, Stored], old: Shapes, absent: set[str], quantized: bool) -> None:
    if quantized:
        return
    if absent:
        raise ExportError(
            f"{len(absent)} of the model's tensors are not in the files (first: {min(absent)}); either the checkpoint "
            "is not whole, or its names are neither those of the model nor those that this Transformers writes. If "
            "from_pretrained loads it, cut the loaded model: lifecycle.export"
        )
    for name, entry in stored.items():
        if name in old and entry.shape != old[name]:
            raise ExportError(
                f"{name} has shape {list(entry.shape)} in the files, {list(old[name])} by the config; is the config "
                "that of this checkpoint?"
            )


def checked(name: str, piece: Piece, entry: Stored, plan: PrunePlan) -> Piece:
    """`piece`, if the tensor in the file has one row an expert along its axis (a packed one may have other sizes)."""
    if piece.axis is not None:
        num_experts = plan.specs[0].num_experts
        if piece.axis >= len(entry.shape) or entry.shape[piece.axis] != num_experts:
            raise ExportError(
                f"{name} has shape {list(entry.shape)} in the files, not {num_experts} rows along axis {piece.axis}; "
                "experts packed like this cannot be cut"
            )
    return piece


def _relative(name: str, old: Shapes, absent: set[str]) -> str | None:
    """The model's tensor that a tensor of the files goes with: a scale beside a weight, or a packed part of it."""
    packed = [known for known in absent if name.startswith((f"{known}_", f"{known}."))]
    if packed:
        return max(packed, key=len)
    module = name.rpartition(".")[0]
    beside = sorted(known for known in old if known.rpartition(".")[0] == module)
    return beside[0] if beside and module else None


def _following(
    name: str, model_name: str, targets: list[str], table: Mapping[str, Piece], entry: Stored, plan: PrunePlan
) -> dict[str, Piece]:
    """The pieces of a tensor that goes where `model_name` goes."""
    out = {}
    for target in targets:
        piece = table[target]
        if name.startswith(model_name):
            new_name = target + name.removeprefix(model_name)
        else:
            new_name = f"{target.rpartition('.')[0]}.{name.rpartition('.')[2]}"
        out[new_name] = checked(name, Piece(name, piece.axis, piece.ids), entry, plan)
    return out


def require_names(small: PreTrainedModel, written: Mapping[str, Stored], *, quantized: bool) -> None:
    """The new files hold what Transformers builds for the new config.

    Raises:
        ExportError: they do not.
    """
    want = on_disk(small)
    missing = sorted(name for name in want if name not in written and name not in _tied(small))
    other = sorted(n for n, entry in written.items() if n in want and entry.shape != want[n])
    if (missing or other) and not quantized:
        raise ExportError(f"the new files do not fit their config: {[*missing, *other][0]}; nothing was written")
