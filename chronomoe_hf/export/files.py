"""export_checkpoint: the files of a checkpoint, without the experts that a plan drops; no weight is loaded."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from chronomoe_hf.checkpoint.fingerprint import UNREADABLE, file_fingerprint
from chronomoe_hf.checkpoint.state_file import has_state, read_state, write_state
from chronomoe_hf.checkpoint.store import steering
from chronomoe_hf.errors import ExportError
from chronomoe_hf.export.card import ExportReport, write_card, write_plan
from chronomoe_hf.export.config_file import write_cut_config
from chronomoe_hf.export.cut_model import check_plan, cut_config, small_on_meta
from chronomoe_hf.export.cut_state import cut_state
from chronomoe_hf.export.disk_names import disk_pieces, require_names
from chronomoe_hf.export.live import details, fresh_target, make_report, reload, staged
from chronomoe_hf.export.memory import available_memory
from chronomoe_hf.export.memory_names import has_memory_names, memory_pieces, write_published_names
from chronomoe_hf.export.slicing import Piece
from chronomoe_hf.export.tensor_files import Stored, measure_pieces, read_tables, write_checkpoint
from chronomoe_hf.export.verify import Comparison, masked_logits, probe_batches, require_close
from chronomoe_hf.lifecycle.pruning.measure import Effect
from chronomoe_hf.lifecycle.pruning.plan import PrunePlan
from chronomoe_hf.wrapping.discovery import find_layers
from chronomoe_hf.wrapping.support import build_on_meta, load_config

Check = Literal["auto", "logits", "shapes"]
_SPARE = 1.5  # times the weights' bytes, for a comparison of logits
_KEPT_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".md", ".py", ".tiktoken")
_KEPT_FOLDERS = ("additional_chat_templates",)
_NOT_KEPT = ("config.json", "trainer_state.json", "prune_plan.json", "chronomoe.json", "run_manifest.json")


def export_checkpoint(
    directory: str | os.PathLike[str],
    plan: PrunePlan,
    out: str | os.PathLike[str],
    *,
    check: Check = "auto",
    drop_unknown: bool = False,
    effect: Effect | None = None,
) -> ExportReport:
    """Copy a checkpoint without the experts that `plan` drops, a buffer at a time: its size does not matter.

    Tokenizer files and the like are copied; a state of chronomoe_hf in the directory is cut along.

    Args:
        directory: that ``save_pretrained`` wrote in safetensors, whole or sharded.
        plan: for this model.
        out: must not exist.
        check: ``"shapes"`` compares names and shapes of the new files with what Transformers builds for the new
            config. ``"logits"`` also loads both checkpoints, one after the other, and compares logits. ``"auto"``
            does so where memory allows (1.5 times the weights) and they are not quantized.
        drop_unknown: leave out tensors that the model of Transformers does not have (a next-token head with experts of
            its own); otherwise they are refused.
        effect: what was measured, for the model card.

    Raises:
        PlanMismatchError: the plan is for another model.
        ExportError: files are missing or torn, their names are not those that this Transformers writes, the family
            cannot be cut, `out` exists, or the copy is not the masked model. Nothing is left behind.
    """
    started = time.perf_counter()
    source = Path(directory)
    target = fresh_target(out)
    config = load_config(str(source))
    stored, metadata = read_tables(source)
    big = build_on_meta(config)
    assert isinstance(big, PreTrainedModel)
    layers = check_plan(big, plan)
    small_config = cut_config(config, layers, plan)
    small = small_on_meta(big, small_config, plan)
    fused = not _is_quantized(config) and has_memory_names(big, stored)
    if fused:
        pieces, dropped = memory_pieces(big, small, layers, plan, stored, drop_unknown=drop_unknown)
    else:
        quantized = _is_quantized(config)
        pieces, dropped = disk_pieces(big, small, layers, plan, stored, quantized=quantized, drop_unknown=drop_unknown)
    how = _how(check, config, stored)
    want = _masked_logits(type(big), source, plan) if how == "logits" else None
    extra = details(effect, None)
    with staged(target) as folder:
        written = write_checkpoint(folder, stored, pieces, metadata)
        if fused:
            write_published_names(folder, small, metadata)
        _copy_others(source, folder)
        write_cut_config(source, folder, config, small_config, heads_dropped=bool(dropped))
        require_names(small, read_tables(folder)[0], quantized=_is_quantized(config))
        compared = None if want is None else _compare(type(big), folder, want)
        state = _cut_state_file(source, folder, plan, small)
        whole = measure_pieces(stored, {name: Piece(name) for name in stored})
        sizes = (_counted(big, whole, config), _counted(small, written, config))
        report = make_report(target, plan, sizes, compared, state, steering(folder), started, len(dropped))
        write_plan(folder, plan, {**extra, "export": report.to_record()})
        write_card(folder, plan, report, extra)
    return report


# ---- checks --------------------------------------------------------------------------------------------------------


def _is_quantized(config: PreTrainedConfig) -> bool:
    return getattr(config, "quantization_config", None) is not None


def _counted(model: PreTrainedModel, found: tuple[int, int], config: PreTrainedConfig) -> tuple[int, int]:
    """Parameters and bytes: the files of a quantized checkpoint hold packed numbers and scales, the model says more."""
    return (sum(p.numel() for p in model.parameters()), found[1]) if _is_quantized(config) else found


def _how(check: Check, config: PreTrainedConfig, stored: Mapping[str, Stored]) -> Check:
    if check not in get_args(Check):
        raise ExportError(f"check must be one of {', '.join(get_args(Check))}, got {check!r}")
    if check != "auto":
        return check
    needed = _SPARE * sum(entry.end - entry.begin for entry in stored.values())
    return "logits" if not _is_quantized(config) and needed < available_memory() else "shapes"


def _masked_logits(model_class: type[PreTrainedModel], source: Path, plan: PrunePlan) -> list[Tensor]:
    model = reload(model_class, source, leftovers=True)
    return masked_logits(model, plan, probe_batches(model.config))


def _compare(model_class: type[PreTrainedModel], folder: Path, want: list[Tensor]) -> Comparison:
    model = reload(model_class, folder)
    return require_close(want, model, probe_batches(model.config), None)


# ---- other files ---------------------------------------------------------------------------------------------------


def _copy_others(source: Path, folder: Path) -> None:
    """Tokenizer, generation config, licence, code: what is no weight and not of a training run."""
    for path in sorted(source.iterdir()):
        wanted = path.suffix in _KEPT_SUFFIXES or path.name.startswith(("LICENSE", "NOTICE"))
        if path.is_file() and wanted and path.name not in _NOT_KEPT and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    for name in _KEPT_FOLDERS:
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name)


def _cut_state_file(source: Path, folder: Path, plan: PrunePlan, small: PreTrainedModel) -> bool:
    if not has_state(source):
        return False
    tensors, meta = read_state(source)
    tensors, meta = cut_state(tensors, meta, plan)
    # The weights were never loaded: routers are read, for the others stands a word that compares equal to anything.
    blind = dict.fromkeys(meta.get("fingerprint", {}), UNREADABLE)
    lines, rounded = file_fingerprint(small, find_layers(small)[0], folder)
    meta["fingerprint"], meta["fingerprint_bfloat16"] = {**blind, **lines}, rounded
    return write_state(folder, tensors, meta, strict=True)
