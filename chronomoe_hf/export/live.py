"""export: a live model without the experts that a plan drops, as a checkpoint that stock Transformers loads.

The directory appears whole or not at all: everything is written beside it and renamed when it has been loaded again and
compared with the masked model.
"""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from chronomoe_hf import distributed
from chronomoe_hf.checkpoint.fingerprint import live_fingerprint, rounded_fingerprint
from chronomoe_hf.checkpoint.state_file import write_state
from chronomoe_hf.checkpoint.store import steering
from chronomoe_hf.distributed import is_sharded
from chronomoe_hf.errors import ExportError
from chronomoe_hf.export.card import ExportReport, write_card, write_plan
from chronomoe_hf.export.config_file import complete_config
from chronomoe_hf.export.cut_model import (
    check_plan,
    cut_config,
    owners_of,
    shapes_of,
    small_on_meta,
)
from chronomoe_hf.export.cut_state import cut_state
from chronomoe_hf.export.disk_names import writes_published_names
from chronomoe_hf.export.slicing import Piece, cut_table
from chronomoe_hf.export.verify import Comparison, masked_logits, probe_batches, require_close, require_same_weights
from chronomoe_hf.lifecycle.live.model import Batch, input_device
from chronomoe_hf.lifecycle.pruning.measure import Effect
from chronomoe_hf.lifecycle.pruning.plan import PrunePlan
from chronomoe_hf.lifecycle.pruning.refit import RefitReport
from chronomoe_hf.wrapping.discovery import find_layers, root_of
from chronomoe_hf.wrapping.owner import find_system


def export(
    model: nn.Module,
    plan: PrunePlan,
    directory: str | os.PathLike[str],
    *,
    batches: list[Batch] | None = None,
    tolerance: float | None = None,
    tokenizer: Any = None,
    effect: Effect | None = None,
    refit: RefitReport | None = None,
    max_shard_size: str = "5GB",
) -> ExportReport:
    """Write `model` without the experts that `plan` drops. The live model is not changed.

    The saved files are loaded again; every tensor must be the one that was written, bit for bit, and the logits those
    of the live model under the plan's mask. What steers a wrapped model (beta, a lens) is left out of that comparison:
    a plain reload routes without it. Its state is cut along and saved beside the weights.

    Args:
        model: wrapped or plain, whole and in one process; an adapter must be merged.
        plan: for this model.
        directory: must not exist.
        batches: dictionaries with ``input_ids`` to compare on; None makes up token ids.
        tolerance: largest difference of a logit; None = 1e-5 (fp32), or 4 rounding steps of a 16-bit model's dtype,
            times the largest logit where that is above 1. In 16 bits two routings may tie: there the limit holds for
            95 % of the positions.
        tokenizer: saved along (a tokenizer or processor).
        effect: what was measured, for the model card.
        refit: what was refitted, for the model card.
        max_shard_size: largest weight file.

    Raises:
        PlanMismatchError: the plan is for another model.
        ExportError: the directory exists, the model is not whole, its family cannot be cut, or the saved checkpoint is
            not the masked model. Nothing is left behind.
    """
    started = time.perf_counter()
    target = fresh_target(directory)
    root = root_of(model)
    _check_whole(model, root)
    assert isinstance(root, PreTrainedModel)
    layers = check_plan(root, plan)
    config = cut_config(root.config, layers, plan)
    small = small_on_meta(root, config, plan)
    old = root.state_dict()
    names = {**old, **small.state_dict()}
    table = cut_table(shapes_of(old), shapes_of(small.state_dict()), owners_of(root, layers, names), plan)
    probe = probe_batches(root.config) if batches is None else batches
    want = masked_logits(root, plan, probe)
    _fill(small, root, old, table)
    extra = details(effect, refit)
    with staged(target) as folder:
        small.save_pretrained(folder, max_shard_size=max_shard_size)
        complete_config(folder, config)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        sizes = (size_of(old, root), size_of(small.state_dict(), small))
        reloaded = _beside(root, reload(type(root), folder, device_map=getattr(root, "hf_device_map", None)))
        require_same_weights(reloaded, small)
        del small
        compared = require_close(want, reloaded, probe, tolerance)
        state = _save_state(model, reloaded, plan, folder)
        report = make_report(target, plan, sizes, compared, state, steering(folder), started)
        write_plan(folder, plan, {**extra, "export": report.to_record()})
        write_card(folder, plan, report, extra)
    return report


def fresh_target(directory: str | os.PathLike[str]) -> Path:
    """`directory` as a path that nothing exists at.

    Raises:
        ExportError: something is there, or several processes would write.
    """
    target = Path(directory)
    if os.path.lexists(target):
        raise ExportError(f"{target} exists already; export into a new directory")
    if distributed.active():
        raise ExportError("export runs in one process; save the trained model and export that")
    return target


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A folder beside `target` that becomes it when the block ends well, and goes when it does not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.parent / f".{target.name}.partial-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        _settle(folder)
        if os.path.lexists(target):
            raise ExportError(f"{target} has come into being during the export; nothing was written there")
        os.rename(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _settle(folder: Path) -> None:
    """Every file on the disk, and readable by whom the umask says (safetensors writes files of its owner only)."""
    mask = os.umask(0)
    os.umask(mask)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            path.chmod(0o666 & ~mask)


def reload(
    model_class: type[PreTrainedModel],
    folder: Path,
    *,
    leftovers: bool = False,
    device_map: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """The model in a directory, loaded strictly in its own dtype.

    Args:
        model_class: to load.
        folder: the checkpoint.
        leftovers: whether the files may hold tensors that the model does not have.
        device_map: where its parts go; None = the CPU.

    Raises:
        ExportError: a tensor is missing, left over or of another shape.
    """
    try:
        model, info = model_class.from_pretrained(
            folder,
            dtype="auto",
            device_map=device_map,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ExportError(f"{folder} does not load: {str(error)[:500]}") from error
    kinds = ("missing_keys", "mismatched_keys") if leftovers else ("missing_keys", "unexpected_keys", "mismatched_keys")
    wrong = {name: sorted(map(str, info[name])) for name in kinds}
    if any(wrong.values()):
        found = "; ".join(f"{len(keys)} {name} (first: {keys[0]})" for name, keys in wrong.items() if keys)
        raise ExportError(f"{folder} does not load strictly: {found}")
    out: PreTrainedModel = model.eval()
    return out


def _beside(root: PreTrainedModel, reloaded: PreTrainedModel) -> PreTrainedModel:
    """`reloaded` on the live model's device: the logits of two kinds of device are not the same to the last bits."""
    if getattr(root, "hf_device_map", None) is None:
        reloaded.to(input_device(root))  # type: ignore[arg-type]
    return reloaded


def size_of(tensors: Mapping[str, Tensor], model: nn.Module) -> tuple[int, int]:
    """Parameters, and bytes of all tensors; what is tied counts once."""
    seen = {(t.data_ptr(), tuple(t.shape)): t.numel() * t.element_size() for t in tensors.values()}
    return sum(p.numel() for p in model.parameters()), sum(seen.values())


def make_report(
    target: Path,
    plan: PrunePlan,
    sizes: tuple[tuple[int, int], tuple[int, int]],
    compared: Comparison | None,
    state: bool,
    steered: str | None,
    started: float,
    dropped: int = 0,
) -> ExportReport:
    """The report of an export that began at `started`."""
    return ExportReport(
        directory=str(target),
        num_experts=plan.specs[0].num_experts,
        num_kept=plan.num_kept,
        top_k=plan.specs[0].top_k,
        parameters_before=sizes[0][0],
        parameters_after=sizes[1][0],
        bytes_before=sizes[0][1],
        bytes_after=sizes[1][1],
        checked="shapes" if compared is None else "logits",
        max_difference=None if compared is None else compared.difference,
        tolerance=None if compared is None else compared.limit,
        state=state,
        steering=steered,
        dropped_tensors=dropped,
        seconds=time.perf_counter() - started,
    )


def details(effect: Effect | None, refit: RefitReport | None) -> dict[str, Any]:
    """What was measured and refitted, for ``prune_plan.json`` and the model card."""
    out: dict[str, Any] = {}
    if effect is not None:
        out["effect"] = effect.to_record()
    if refit is not None:
        out["refit"] = refit.to_record()
    return out


def _check_whole(model: nn.Module, root: nn.Module) -> None:
    if not isinstance(root, PreTrainedModel):
        raise ExportError(f"{type(model).__name__} is no Transformers model, so no checkpoint of it can be written")
    peft = sys.modules.get("peft")  # an adapter can only be there if its library was imported
    tuner = None if peft is None else peft.tuners.tuners_utils.BaseTunerLayer
    adapted = [name for name, m in root.named_modules() if (tuner and isinstance(m, tuner)) or "lora_A" in m._modules]
    if adapted:
        raise ExportError(
            f"an adapter is not merged ({len(adapted)} modules, first: {adapted[0]}); merge it first: "
            "model = model.merge_and_unload()"
        )
    if getattr(root, "hf_quantizer", None) is not None:
        raise ExportError(
            f"{type(root).__name__} is quantized in memory; cut its files instead: lifecycle.export_checkpoint"
        )
    parts = [name for name, value in root.named_parameters() if value.is_meta or is_sharded(value)]
    if parts:
        raise ExportError(
            f"{len(parts)} parameters are not whole in this process (first: {parts[0]}: FSDP, ZeRO-3, or on disk); "
            "save the model and cut its files: lifecycle.export_checkpoint"
        )


def _fill(small: PreTrainedModel, root: PreTrainedModel, old: Mapping[str, Tensor], table: Mapping[str, Piece]) -> None:
    """Give the model on meta its tensors; what is not cut is shared with the live model."""
    small.load_state_dict({name: _cut(old[piece.source], piece) for name, piece in table.items()}, assign=True)
    live = dict(root.named_buffers())
    for name, buffer in list(small.named_buffers()):
        if buffer.is_meta:  # not part of a state dict: rotary frequencies and the like
            if name not in live or live[name].shape != buffer.shape:
                raise ExportError(f"the buffer {name} is not saved and depends on the number of experts")
            path, _, last = name.rpartition(".")
            small.get_submodule(path)._buffers[last] = live[name]
    small.tie_weights()
    if "generation_config" in root.__dict__:
        small.generation_config = copy.copy(root.__dict__["generation_config"])
    if writes_published_names(root):
        small.__dict__["_weight_conversions"] = copy.copy(root.__dict__["_weight_conversions"])
    small.eval()


def _cut(tensor: Tensor, piece: Piece) -> Tensor:
    tensor = tensor.detach()
    if piece.axis is None:
        return tensor
    return tensor.index_select(piece.axis, torch.tensor(piece.ids, device=tensor.device))


def _save_state(model: nn.Module, reloaded: PreTrainedModel, plan: PrunePlan, folder: Path) -> bool:
    system = find_system(model)
    if system is None or not system.config.checkpoint.save:
        return False
    state = system.state_dict()
    tensors, meta = cut_state(state["tensors"], state["meta"], plan)
    layers = cast(Any, find_layers(reloaded)[0])
    meta["fingerprint"], meta["fingerprint_bfloat16"] = live_fingerprint(layers), rounded_fingerprint(layers)
    return write_state(folder, tensors, meta, strict=True)
