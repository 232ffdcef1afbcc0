"""Saving and resuming under Trainer: where state is written, how it is found again, and whether the weights are right.

Trainer of Transformers 5.x loses router and expert weights on resume and on load_best_model_at_end in plain and DDP
runs (huggingface/transformers#48805): it loads Hub-format names without converting them. Here that is detected by the
fingerprint in our state and repaired from the checkpoint.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from torch import nn
from transformers.trainer_utils import get_last_checkpoint

from chronomoe_hf import distributed
from chronomoe_hf.checkpoint.fingerprint import UNREADABLE, compare_fingerprints, repair_weights
from chronomoe_hf.errors import StateError, WeightMismatchError
from chronomoe_hf.system import ChronoSystem

logger = logging.getLogger("chronomoe_hf")

UPSTREAM = "huggingface/transformers#48805"


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
