"""Are the weights after a resume those of the checkpoint? If not: repair, raise or warn, by config.

Trainer of Transformers 5.x loses router and expert weights on resume and on load_best_model_at_end in plain and DDP
runs (huggingface/transformers#48805): it loads Hub-format names without converting them. The fingerprint in our state
shows it, and the checkpoint's own files hold what is missing.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate.utils import extract_model_from_parallel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import get_last_checkpoint

from chronomoe_hf import distributed
from chronomoe_hf.checkpoint.converted import ConvertedWeights, weight_files
from chronomoe_hf.checkpoint.fingerprint import UNREADABLE, compare_fingerprints
from chronomoe_hf.errors import (
    StateCorruptError,
    StateError,
    StateMismatchError,
    StateMissingError,
    WeightMismatchError,
)
from chronomoe_hf.system import ChronoSystem

logger = logging.getLogger("chronomoe_hf")

UPSTREAM = "huggingface/transformers#48805"
_REBUILD = "build the model with from_pretrained(checkpoint) and resume from the same checkpoint"


def check_weights(
    system: ChronoSystem, model: nn.Module, directory: Path, saved: dict[str, str] | None, step: int
) -> list[str]:
    """Compare live router and expert weights with a checkpoint's fingerprint; repair, raise or warn by config.

    Returns:
        Names of the tensors that were repaired.

    Raises:
        WeightMismatchError: with ``repair="raise"``, when Trainer left wrong weights in the model, or when they could
            not be repaired.
    """
    live = system.fingerprint()
    wrong = compare_fingerprints(saved, live) if saved is not None else []
    # FSDP and ZeRO-3 leave no fingerprint to compare with; what they saved may well be resumed by a plain run.
    blind = saved is None or any(saved.get(name) == UNREADABLE != line for name, line in live.items())
    if not wrong and not blind:
        return []
    policy = system.config.checkpoint.repair
    if not wrong and (policy != "repair" or not any(directory.glob("*.safetensors"))):
        return []
    detail = f"{len(wrong)} router and expert weights differ from {directory} (first: {wrong[0]})" if wrong else ""
    if policy == "raise" and wrong:
        raise WeightMismatchError(
            f"{detail}. Trainer of Transformers 5.x loses MoE weights on resume ({UPSTREAM}); build the model with "
            "from_pretrained(checkpoint) before resuming from it, or set CheckpointConfig(repair='repair')"
        )
    if wrong:
        system.set_alert("RESUME_MISMATCH", step, True, detail)
    if policy == "off":
        logger.error("%s; repair is off, training continues with them (%s)", detail, UPSTREAM)
        return []
    try:
        repaired = repair_weights(model, directory)
    except StateError as error:
        if not wrong:
            return []
        raise WeightMismatchError(f"{detail}, and they could not be repaired: {error}") from error
    if repaired and distributed.is_main():
        logger.warning(
            "Trainer left %d of the checkpoint's tensors out (%s); restored them from %s (first: %s)",
            len(repaired),
            UPSTREAM,
            directory,
            repaired[0],
        )
    left = compare_fingerprints(saved, system.fingerprint()) if saved is not None else []
    if left:
        raise WeightMismatchError(
            f"{len(left)} weights still differ from {directory} after the repair (first: {left[0]}); the state and the "
            "weights there belong to different models"
        )
    if wrong:
        system.set_alert("RESUME_MISMATCH", step, False)
    return repaired


def repair_weights(model: nn.Module, checkpoint_dir: str | Path) -> list[str]:
    """Give `model` the weights of `checkpoint_dir` that a raw ``load_state_dict`` missed, in place.

    ``save_pretrained`` writes Hub names, and Trainer (transformers 5.0 to 5.23, huggingface/transformers#48805) loads
    them back without converting the names: the experts, and in some families the routers, silently keep older values.
    The files are read tensor by tensor, converted as ``from_pretrained`` converts them, and what differs is copied
    over: on top of the model this takes host memory for a few copies of its largest tensor. Only where Transformers'
    conversion cannot be followed is a second model loaded, with a warning. Random number generators are left as they
    were. Optimizer state is not touched: Trainer restores it correctly.

    Args:
        model: The trained model, wrapped or not, also inside DDP or torch.compile. With a PEFT adapter nothing is
            done: its checkpoints hold the adapter only, and the base model never went through that path.
        checkpoint_dir: A directory that ``save_pretrained`` wrote weights to, in safetensors, whole or in shards.

    Returns:
        Names of the tensors that were wrong and are now those of the checkpoint, sorted; empty if all were right.

    Raises:
        StateMissingError: The directory has no safetensors weights.
        StateCorruptError: Its weights are damaged.
        StateMismatchError: Its weights have other shapes than the model's. Like all of these, before any change.
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
    try:
        weight_files(directory)
    except StateMissingError as error:
        raise StateMissingError(f"{error} to repair from; {_REBUILD}") from None
    live = model.state_dict()
    repaired: set[str] = set()
    try:
        with ConvertedWeights(model, directory, live) as weights:
            for name, value in weights:
                _copy_if_different(name, value, live, repaired)
    except SafetensorError as error:
        raise _damaged(directory, error) from error
    except StateMismatchError as error:
        raise StateMismatchError(f"{error}; {_REBUILD}") from None
    except StateError:
        raise
    except Exception as error:  # of Transformers' own conversion code, which may change under us
        logger.warning(
            "the weight conversion of %s could not be followed (%s: %s): loading a second copy of the model on the CPU",
            type(model).__name__,
            type(error).__name__,
            error,
        )
        reference, missing = _load_reference(model, directory, live)
        for name, value in reference.state_dict().items():
            if name in live and name not in missing:  # missing: the reference's value is fresh noise
                _copy_if_different(name, value.to(live[name].dtype), live, repaired)
    return sorted(repaired)


@torch.no_grad()
def _copy_if_different(name: str, value: Tensor, live: Mapping[str, Tensor], repaired: set[str]) -> None:
    if not torch.equal(value, live[name].cpu()):
        live[name].copy_(value)  # state_dict shares memory with the parameters
        repaired.add(name)


def _refuse_unrepairable(model: PreTrainedModel) -> None:
    sharded = [name for name, value in model.named_parameters() if value.is_meta or distributed.is_sharded(value)]
    if sharded:
        raise StateError(
            f"{len(sharded)} parameters are not whole on this process (first: {sharded[0]}): FSDP and DeepSpeed "
            f"restore their own checkpoints and need no repair. If weights do differ, {_REBUILD}"
        )
    if getattr(model, "hf_quantizer", None) is not None:  # set by from_pretrained for quantized models only
        raise StateError(f"{type(model).__name__} is quantized, its weights cannot be copied; {_REBUILD}")


def _damaged(directory: Path, error: SafetensorError) -> StateCorruptError:
    return StateCorruptError(f"the weights in {directory} are damaged: {error}; load an older checkpoint")


def _load_reference(
    model: PreTrainedModel, directory: Path, live: Mapping[str, Tensor]
) -> tuple[PreTrainedModel, set[str]]:
    """A second model with the checkpoint's weights, and the names that it had to make up."""
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
            raise _damaged(directory, error) from error
        except (OSError, RuntimeError, ValueError) as error:
            raise StateMismatchError(
                f"the weights in {directory} cannot be loaded into {type(model).__name__}: {error}; {_REBUILD}"
            ) from error
    return reference, set(info["missing_keys"])


# Saving and resuming under Trainer: where state is written, and how it is found again.


class ResumePath:
    """Directory that the running ``train()`` resumes from, if it is known."""

    def __init__(self) -> None:
        self.directory: Path | None = None

    def set(self, given: str | os.PathLike[str] | bool | None, output_dir: str | None) -> None:
        """Note what was passed to ``train``; True means the last checkpoint of `output_dir`."""
        found = get_last_checkpoint(output_dir) if given is True and output_dir is not None else given
        self.directory = Path(found) if isinstance(found, str | os.PathLike) else None

    def at(self, output_dir: str | None, global_step: int) -> Path:
        """The noted directory, or Trainer's default name for that step."""
        return self.directory or Path(output_dir or ".") / f"checkpoint-{global_step}"


def restore(system: ChronoSystem, directory: Path, step: int) -> dict[str, str] | None:
    """Restore state from a checkpoint. Collective.

    Returns:
        The fingerprint of the checkpoint's weights, for :func:`check_weights`; None where there is none.

    Raises:
        StateMissingError, StateCorruptError, StateMismatchError, StateSchemaError: see ``ChronoSystem.load``.
        StateError: the state there is of another step.
    """
    on_missing = system.config.checkpoint.on_missing
    # Trainer may have left weights out: check_weights repairs them after this.
    manifest = system.load(directory, on_missing=on_missing, step=step, check_weights=False)
    return None if manifest is None else manifest.get("fingerprint")
