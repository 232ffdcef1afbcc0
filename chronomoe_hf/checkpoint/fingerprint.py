"""Does a saved state belong to this model? Layer tables, weight fingerprints, and the repair of a lossy resume.

Shape suffixes: E experts, A and B the two dimensions of an expert's weight.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from chronomoe_hf.errors import StateCorruptError, StateError, StateMismatchError, StateMissingError

SLICE_ELEMENTS = 256  # read at each end of an expert's weight
WHOLE_BYTES = 32 * 2**20  # a router of 512 experts x 8192 in fp32 is 16 MiB
MAX_ROWS_SHOWN = 20
UNREADABLE = "sharded"

_LAYER_FIELDS = ("router_class", "num_experts", "top_k")


def check_layers(
    saved: Sequence[Mapping[str, Any]], live: Sequence[Mapping[str, Any]], allow_partial: bool = False
) -> list[tuple[int, int]]:
    """Pair the layers of a saved state with those of the live model, by name.

    Args:
        saved: The manifest's ``layers``: ``{"name", "router_class", "num_experts", "top_k"}`` each.
        live: The same table of the wrapped model.
        allow_partial: Return the layers that agree instead of raising when some do not.

    Returns:
        ``(index in saved, index in live)`` of every layer that agrees in all fields, in the order of `live`.

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
        elif _describe(saved[position]) != _describe(layer):
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


def fingerprint(entries: Iterable[tuple[str, Tensor]], sampled: Iterable[tuple[str, Tensor]] = ()) -> dict[str, str]:
    """One line per weight, ``"<dtype> <shape> <sha256>"``: equal lines mean equal values where they were read.

    Args:
        entries: ``(name, parameter)``; pass parameters, a detached copy does not show ZeRO-3's partitioning. Up to
            two dimensions and 32 MiB (router weights, biases) are read whole; stacked expert weights ``[E, A, B]``
            and anything larger are sliced.
        sampled: ``(name, parameter)`` that are always sliced (experts kept as one module each, ``[A, B]``).

    Returns:
        Name -> line. A slice is the first 256 elements (at least one row, capped columns) and the last 256 of every
        expert. The bytes are those of the tensor's own dtype, on any device. A weight that this rank does not hold
        in full (DTensor, gathered on demand, meta) gets the word ``"sharded"``, which compares equal to anything:
        the engines that shard restore their weights themselves, and gathering here would be a collective.
    """
    lines: dict[str, str] = {}
    for whole, group in ((True, entries), (False, sampled)):
        for name, tensor in group:
            lines[name] = _line(tensor, whole)
    return lines


def _line(tensor: Tensor, whole: bool) -> str:
    if is_sharded(tensor):
        return UNREADABLE
    tensor = tensor.detach()
    digest = hashlib.sha256()
    fits = whole and tensor.ndim <= 2 and tensor.numel() * tensor.element_size() <= WHOLE_BYTES
    for part in [tensor] if fits or tensor.ndim < 2 else _ends(tensor):
        # .contiguous before .cpu: only what was selected crosses to the host.
        digest.update(part.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    return f"{str(tensor.dtype).removeprefix('torch.')} {shape} {digest.hexdigest()}"


def _ends(tensor: Tensor) -> list[Tensor]:
    weight_EAB = tensor if tensor.ndim > 2 else tensor.unsqueeze(0)
    weight_EAB = weight_EAB.flatten(1, -2)
    columns = min(weight_EAB.shape[-1], SLICE_ELEMENTS)
    rows = min(weight_EAB.shape[1], max(1, SLICE_ELEMENTS // max(columns, 1)))
    last = weight_EAB.shape[1] - rows, weight_EAB.shape[-1] - columns
    return [weight_EAB[:, :rows, :columns], weight_EAB[:, last[0] :, last[1] :]]


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds less than the whole tensor: FSDP2 (DTensor), ZeRO-3 (``ds_shape``), meta."""
    return tensor.is_meta or hasattr(tensor, "placements") or hasattr(tensor, "ds_shape")


def compare_fingerprints(saved: Mapping[str, str], live: Mapping[str, str]) -> list[str]:
    """Names whose lines differ, or that only one side has, sorted; weights that are sharded on a side are skipped."""
    return [
        name
        for name in sorted({*saved, *live})
        if saved.get(name) != live.get(name) and UNREADABLE not in (saved.get(name), live.get(name))
    ]


def repair_weights(model: nn.Module, checkpoint_dir: str | Path) -> list[str]:
    """Give `model` the weights of `checkpoint_dir` that a raw ``load_state_dict`` missed, in place.

    ``save_pretrained`` writes Hub names, and Trainer (transformers 5.0 to 5.23, huggingface/transformers#48805) loads
    them back without converting the names: the experts, and in some families the routers, silently keep older values.
    ``from_pretrained`` does convert, so a second copy is loaded on the CPU (one more model in host memory while this
    runs) and what differs is copied over. Random number generators are left as they were. Optimizer state is not
    touched: Trainer restores it correctly.

    Args:
        model: The trained model, wrapped or not, also inside DDP or torch.compile. With a PEFT adapter nothing is
            done: its checkpoints hold the adapter only, and the base model never went through that path.
        checkpoint_dir: A directory that ``save_pretrained`` wrote weights to, in safetensors.

    Returns:
        Names of the tensors that were wrong and are now those of the checkpoint, sorted; empty if all were right.

    Raises:
        StateMissingError: The directory has no safetensors weights.
        StateCorruptError: Its weights are damaged.
        StateMismatchError: Its weights have other shapes than the model's.
        StateError: The weights are sharded (FSDP, DeepSpeed ZeRO-3), on the meta device, or quantized.
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    peft = sys.modules.get("peft")  # an adapter can only be there if its library was imported
    if peft is not None and isinstance(model, peft.PeftModel):
        return []
    if not isinstance(model, PreTrainedModel):
        raise StateError(f"{type(model).__name__} is not a transformers PreTrainedModel; load its weights yourself")
    _refuse_unrepairable(model)
    directory = Path(checkpoint_dir)
    if not any((directory / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        raise StateMissingError(f"{directory} holds no {SAFE_WEIGHTS_NAME} to repair from; {_REBUILD}")
    live = model.state_dict()
    reference, missing = _load_reference(model, directory, live)
    repaired = []
    with torch.no_grad():
        for name, value in sorted(reference.state_dict().items()):
            if name not in live or name in missing:  # missing: the reference's value is fresh noise
                continue
            value = value.to(live[name].dtype)
            if not torch.equal(value, live[name].cpu()):
                live[name].copy_(value)  # state_dict shares memory with the parameters
                repaired.append(name)
    return repaired


_REBUILD = "build the model with from_pretrained(checkpoint) and resume from the same checkpoint"


def _refuse_unrepairable(model: PreTrainedModel) -> None:
    sharded = [name for name, parameter in model.named_parameters() if is_sharded(parameter)]
    if sharded:
        raise StateError(
            f"{len(sharded)} parameters are not whole on this process (first: {sharded[0]}): FSDP and DeepSpeed "
            f"restore their own checkpoints and need no repair. If weights do differ, {_REBUILD}"
        )
    if getattr(model, "hf_quantizer", None) is not None:  # set by from_pretrained for quantized models only
        raise StateError(f"{type(model).__name__} is quantized, its weights cannot be copied; {_REBUILD}")


def _load_reference(
    model: PreTrainedModel, directory: Path, live: Mapping[str, Tensor]
) -> tuple[PreTrainedModel, set[str]]:
    # One dtype for all, wide enough to hold every live tensor's values: casting back is then exact, also for a
    # model with fp32 routers among bf16 weights.
    dtypes = {value.dtype for value in live.values() if value.is_floating_point()}
    with torch.random.fork_rng(devices=[]):
        try:
            reference, info = type(model).from_pretrained(
                directory,
                config=model.config,
                dtype=functools.reduce(torch.promote_types, dtypes),
                local_files_only=True,
                use_safetensors=True,  # never unpickle
                output_loading_info=True,
            )
        except SafetensorError as error:
            raise StateCorruptError(
                f"the weights in {directory} are damaged: {error}; load an older checkpoint"
            ) from error
        except (OSError, RuntimeError, ValueError) as error:
            raise StateMismatchError(
                f"the weights in {directory} cannot be loaded into {type(model).__name__}: {error}; {_REBUILD}"
            ) from error
    return reference, set(info["missing_keys"])
