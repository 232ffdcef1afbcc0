"""Saving and loading the state of one wrapped model, on all ranks; a failure is the same error on every rank."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from chronomoe_hf import distributed
from chronomoe_hf.checkpoint.card import note_in_card
from chronomoe_hf.checkpoint.fingerprint import live_fingerprint
from chronomoe_hf.checkpoint.manifest import MANIFEST_FILE, OLD_MANIFEST_FILE, short
from chronomoe_hf.checkpoint.state_file import STATE_FOLDER, has_state, read_manifest, read_state, write_state
from chronomoe_hf.checkpoint.system_state import advise_of_disagreement, pack, unloadable, unpack
from chronomoe_hf.errors import StateError, StateMissingError, StateWriteError
from chronomoe_hf.parts import Parts, Position

logger = logging.getLogger("chronomoe_hf")

# Finding the state of a directory for every rank, and what to do where there is none.

OnMissing = Literal["auto", "fresh", "raise"]


def read_for_all(directory: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The state in `directory`, read by the main process and given to every rank; None where there is none. Collective.

    Raises:
        StateError: torn, foreign, or of another schema; the message names the file and the way out.
    """
    found: Any = None
    if distributed.is_main():
        try:
            found = read_state(directory) if has_state(directory) else None
        except StateError as error:
            found = error
    found = distributed.broadcast_object(found)
    if isinstance(found, StateError):
        raise found
    return None if found is None else (found[0], found[1])


def missing(directory: str | Path, on_missing: OnMissing, acted: bool) -> None:
    """There is no state in `directory`: warn, or raise.

    Args:
        directory: where the state was looked for.
        on_missing: as in ``CheckpointConfig``.
        acted: the live run has been governed.

    Raises:
        StateMissingError: `on_missing` is ``"raise"``, or ``"auto"`` and the run has been governed.
    """
    if on_missing == "raise" or (on_missing == "auto" and acted):
        raise StateMissingError(
            f"no chronomoe state in {directory} (neither {STATE_FOLDER}/{MANIFEST_FILE} nor {OLD_MANIFEST_FILE})"
            f"{', although this run has been governed: routing would change silently' if acted else ''}; pass the "
            "directory of a checkpoint that was saved with chronomoe_hf, or on_missing='fresh' (in CheckpointConfig "
            "for a Trainer) to start with beta = 0"
        )
    warnings.warn(f"no chronomoe state in {directory}: starting with fresh statistics and beta = 0", stacklevel=4)


class StateStore:
    """Where the parts of a system are saved to and loaded from.

    Args:
        parts: what is saved, and what loading writes into.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self._failed: str | None = None
        self._advised = self._told_of_biases = False

    def begin(self) -> None:
        """Start of a training run: the advice of a save may be printed once more."""
        self._advised = self._told_of_biases = False

    def pack(self, position: Position) -> dict[str, Any]:
        """``{"tensors": {name: CPU tensor}, "meta": JSON-ready mapping}``."""
        tensors, meta = pack(self.parts, position)
        return {"tensors": tensors, "meta": meta}

    def unpack(self, state: dict[str, Any]) -> Position:
        """Inverse of :meth:`pack`, all or nothing; raises StateMismatchError for another model's state."""
        return unpack(self.parts, state["tensors"], state["meta"])

    def save(self, directory: str | Path, position: Position) -> bool:
        """Write the state into `directory` (main process only, no collective).

        Returns:
            Whether it was written (always True on the other ranks).
        """
        if not distributed.is_main():
            return True
        parts, state = self.parts, self.pack(position)
        state["meta"]["fingerprint"] = live_fingerprint(parts.layers)
        shares = state["meta"]["topk_disagreement"] = parts.step_state.topk_disagreement()
        self._advised = self._advised or advise_of_disagreement(shares, parts.layers)
        strict = parts.config.checkpoint.strict_save
        # Raising on one rank only would leave the others waiting in their next collective: with several ranks the
        # failure travels with the next step's reduction and is raised by all of them there.
        fault = unloadable(parts.step_state, state["tensors"], state["meta"])
        written = write_state(
            directory, state["tensors"], state["meta"], fault=fault, strict=strict and not distributed.active()
        )
        if strict and not written:
            self._failed = str(directory)
        return written

    def weights_written(self, directory: str | Path, governed: bool) -> None:
        """``save_pretrained`` has written weights into `directory`: the card says what they do not hold.

        Args:
            directory: where they lie.
            governed: something has acted on routing.
        """
        if not governed or not distributed.is_main() or not Path(directory).is_dir():
            return
        try:
            lacking = note_in_card(directory, self.parts.layers)
        except OSError as error:  # the state is there; a card is not worth a run
            logger.warning("the card in %s could not be written: %s", directory, error)
            return
        if lacking and not self._told_of_biases:
            self._told_of_biases = True
            logger.warning(
                "the correction bias that the balance law has moved is not among the adapter's weights in %s: keep its "
                "folder chronomoe and load it with wrap(model, config, state=directory)",
                directory,
            )

    def read(
        self, directory: str | Path, governed: bool, on_missing: OnMissing, step: int | None
    ) -> dict[str, Any] | None:
        """The state in `directory` as :meth:`unpack` takes it, the same on every rank. Collective.

        Args:
            directory: where it lies.
            governed: the live run has been governed.
            on_missing: what to do where there is none.
            step: optimizer step that the state must be of; None = any.

        Raises:
            StateMissingError: there is none, and `on_missing` does not allow that.
            StateError: torn, foreign, of another schema or step.
        """
        found = read_for_all(directory)
        if found is None:
            acted = governed or bool(torch.count_nonzero(self.parts.step_state.beta_LE))
            missing(directory, on_missing, acted)
            return None
        tensors, meta = found
        if step is not None and meta["step"] != step:
            raise StateError(
                f"{directory} holds chronomoe state of step {meta['step']}, but the run resumes at step {step}; the "
                "files of two checkpoints are mixed up"
            )
        return {"tensors": tensors, "meta": meta}

    @property
    def failed(self) -> float:
        """1.0 where this process could not write a state that had to be written, else 0.0; summed over ranks."""
        return float(self._failed is not None)

    def require_saved(self, failures: Tensor | None = None) -> None:
        """Raise on every rank if a state could not be written. Collective with ``strict_save`` unless summed already.

        Args:
            failures: :attr:`failed` summed over ranks; None = sum it here.

        Raises:
            StateWriteError: the main process could not write.
        """
        if not self.parts.config.checkpoint.strict_save:
            return
        if failures is None:
            own = torch.full((), self.failed, dtype=torch.float64, device=self.parts.step_state.device)
            failures = distributed.all_reduce_sum_(own)
        if float(failures) > 0:
            raise StateWriteError(
                f"chronomoe state could not be saved ({self._failed or 'by the main process'}), and strict_save "
                "is set; free space or fix permissions and resume from the last checkpoint"
            )


# Weights whose routing was governed, loaded without the state that goes with them.


def warn_of_unloaded_state(model: nn.Module) -> None:
    """Warn if `model` came from a local directory whose state steers: without it the same weights route otherwise.

    A state that steers nothing in the forward (``observe``, or ``balance`` on a family's own correction bias, which is
    part of the weights) is not warned of.

    Args:
        model: As ``from_pretrained`` returned it; its ``name_or_path`` says where it came from.
    """
    source = getattr(model, "name_or_path", None)
    if not isinstance(source, str) or not source or not distributed.is_main() or not has_state(source):
        return
    try:
        manifest = read_manifest(source)
    except StateError:
        return  # loading it says what is wrong with it
    steering = manifest.get("steering")
    beta = isinstance(steering, list) and any(steering)
    if manifest.get("governed") is True and (beta or any(name.startswith("lens.") for name in manifest["tensors"])):
        warnings.warn(
            f"the weights of this model come from {short(source)}, where their routing was governed, and without the "
            "state there they route otherwise: load it with wrap(model, config, state=directory), or resume the "
            "Trainer from that checkpoint",
            stacklevel=3,
        )
