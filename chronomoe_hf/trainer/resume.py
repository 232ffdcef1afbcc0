"""Saving and resuming under Trainer: where state is written, how it is found again, and whether the weights are right.

Trainer of Transformers 5.x loses router and expert weights on resume and on load_best_model_at_end in plain and DDP
runs (huggingface/transformers#48805): it loads Hub-format names without converting them. Here that is detected by the
fingerprint in our state and repaired from the checkpoint.
"""

from __future__ import annotations

import logging
import types
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from chronomoe_hf import distributed
from chronomoe_hf.checkpoint.fingerprint import UNREADABLE, compare_fingerprints, repair_weights
from chronomoe_hf.errors import StateError, WeightMismatchError
from chronomoe_hf.system import ChronoSystem
from chronomoe_hf.wrapping.save_pretrained import state_saved

logger = logging.getLogger("chronomoe_hf")

UPSTREAM = "huggingface/transformers#48805"


def hook_trainer(trainer: Trainer, system: ChronoSystem) -> ResumePath:
    """Wrap ``save_model`` (state beside every checkpoint) and ``train`` (to know what is resumed) on the instance.

    Returns:
        Where the path given to ``train(resume_from_checkpoint=...)`` is kept.
    """
    path = ResumePath()
    save_model, train = trainer.save_model, trainer.train

    def saving(self: Trainer, output_dir: str | None = None, _internal_call: bool = False) -> None:
        directory = output_dir if output_dir is not None else self.args.output_dir
        if system.config.checkpoint.save and self.args.should_save and directory is not None:
            # Before the weights: a checkpoint that Trainer regards as complete then always has our state.
            system.save(directory)
        with state_saved(system):
            save_model(output_dir, _internal_call)

    def training(self: Trainer, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        path.set(resume_from_checkpoint, self.args.output_dir)
        return train(resume_from_checkpoint, *args, **kwargs)

    trainer.save_model = types.MethodType(saving, trainer)  # type: ignore[method-assign]
    trainer.train = types.MethodType(training, trainer)  # type: ignore[method-assign]
    return path


class ResumePath:
    """Directory that the running ``train()`` resumes from, if it is known."""

    def __init__(self) -> None:
        self.directory: Path | None = None

    def set(self, given: str | bool | None, output_dir: str | None) -> None:
        """Note what was passed to ``train``; True means the last checkpoint of `output_dir`."""
        found = get_last_checkpoint(output_dir) if given is True and output_dir is not None else given
        self.directory = Path(found) if isinstance(found, str) else None

    def at(self, output_dir: str | None, global_step: int) -> Path:
        """The noted directory, or Trainer's default name for that step."""
        return self.directory or Path(output_dir or ".") / f"checkpoint-{global_step}"


def restore(system: ChronoSystem, directory: Path, step: int) -> dict[str, str] | None:
    """Restore state from a checkpoint. Collective.

    Returns:
        The fingerprint of the checkpoint's weights, for :func:`check_weights`; None where there is none.

    Raises:
        StateMissingError, StateCorruptError, StateMismatchError, StateSchemaError: see ``persistence.load``.
        StateError: the state there is of another step.
    """
    manifest = system.load(directory)
    if manifest is not None and manifest["step"] != step:
        raise StateError(
            f"{directory} holds chronomoe state of step {manifest['step']}, but the Trainer resumes at step {step}; "
            "the files of two checkpoints are mixed up"
        )
    return None if manifest is None else manifest.get("fingerprint")


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
