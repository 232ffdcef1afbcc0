"""Saving and loading the state of one wrapped model, on all ranks; a failure is the same error on every rank."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from chronomoe_hf import distributed
from chronomoe_hf.checkpoint.biases import rounded_biases, warn_of_rounded_biases
from chronomoe_hf.checkpoint.card import note_in_card
from chronomoe_hf.checkpoint.checks import check_layers, check_meta
from chronomoe_hf.checkpoint.fingerprint import foreign_weights, live_fingerprint, rounded_fingerprint
from chronomoe_hf.checkpoint.folded import folded_note, forget_note
from chronomoe_hf.checkpoint.manifest import MANIFEST_FILE, OLD_MANIFEST_FILE, short
from chronomoe_hf.checkpoint.state_file import STATE_FOLDER, has_state, read_manifest, read_state, write_state
from chronomoe_hf.checkpoint.system_state import advise_of_disagreement, pack, unloadable, unpack
from chronomoe_hf.config import ChronoConfig
from chronomoe_hf.errors import ConfigError, StateError, StateMissingError, StateWriteError, WeightMismatchError
from chronomoe_hf.parts import Parts, Position
from chronomoe_hf.wrapping.layer import Layer

logger = logging.getLogger("chronomoe_hf")

# Finding the state of a directory for every rank, and what to do where there is none.

OnMissing = Literal["auto", "fresh", "raise"]


def read_for_all(directory: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The state in `directory`, read by the main process and given to every rank; None where there is none. Collective.

    Raises:
        StateError: torn, foreign, or of another schema; the message names the file and the way out.
    """
    found = _from_main(directory, read_state)
    return None if found is None else (found[0], found[1])


def _from_main(directory: str | Path, read: Callable[[str | Path], Any]) -> Any:
    """What the main process reads of the state in `directory` or its error, on every rank; None where there is none."""
    found: Any = None
    if distributed.is_main():
        try:
            found = read(directory) if has_state(directory) else None
        except StateError as error:
            found = error
    found = distributed.broadcast_object(found)
    if isinstance(found, StateError):
        raise found
    return found


def missing(directory: str | Path, on_missing: OnMissing, acted: bool) -> None:
    """There is no state in `directory`: warn, or raise.

    Args:
        directory: where the state was looked for.
        on_missing: as in ``CheckpointConfig``.
        acted: the live run has been governed.

    Raises:
        StateMissingError: `on_missing` is ``"raise"``, or ``"auto"`` and the run has been governed.
    """
    if on_missing == "raise" and (folded := folded_note(directory)) is not None:
        raise StateMissingError(folded)
    if on_missing == "raise" or (on_missing == "auto" and acted):
        raise StateMissingError(
            f"no chronomoe state in {directory} (neither {STATE_FOLDER}/{MANIFEST_FILE} nor {OLD_MANIFEST_FILE})"
            f"{', although this run has been governed: routing would change silently' if acted else ''}; pass the "
            "directory of a checkpoint that was saved with chronomoe_hf, or on_missing='fresh' (in CheckpointConfig "
            "for a Trainer) to start with beta = 0"
        )
    warnings.warn(f"no chronomoe state in {directory}: starting with fresh statistics and beta = 0", stacklevel=4)


def saved_config(directory: str | Path) -> ChronoConfig:
    """The settings that the state in `directory` was saved with, the same on every rank. Collective.

    Raises:
        StateMissingError: there is no state.
        StateError: it is torn or foreign, or its settings are not ones that this version reads.
    """
    found = _from_main(directory, lambda place: read_manifest(place).get("config", {}))
    if found is None:
        missing(directory, "raise", False)
    try:
        return ChronoConfig.from_dict(found)
    except ConfigError as error:
        raise StateError(
            f"the settings saved in {directory} cannot be used: {short(error)}; give the settings yourself: "
            "wrap(model, config, state=directory)"
        ) from error


def require_same_weights(layers: Sequence[Layer], state: dict[str, Any], directory: str | Path, policy: str) -> None:
    """Check that the live weights are those that a state was saved with, on the main process for all. Collective.

    Args:
        layers: of the live model.
        state: ``{"tensors": ..., "meta": ...}``.
        directory: where it lies.
        policy: ``CheckpointConfig.other_weights``.

    Raises:
        WeightMismatchError: they are not, and `policy` is ``"raise"``.
    """
    wrong: Any = []
    meta = state["meta"]
    if distributed.is_main():
        lines, rounded = meta.get("fingerprint", {}), meta.get("fingerprint_bfloat16", {})
        wrong = foreign_weights(layers, lines, rounded, held=state["tensors"])
    wrong = distributed.broadcast_object(wrong)
    if not wrong:
        return
    message = (
        f"the chronomoe state in {directory} (step {meta['step']}) is of other weights than this model's: {len(wrong)} "
        f"router and expert weights differ (first: {short(wrong[0])}). They are another model's, or were trained on, "
        "merged or folded since: what was folded acts already, and would act twice"
    )
    if policy == "raise":
        raise WeightMismatchError(
            f"{message}. Load the weights that were saved with this state, or use the model without it; "
            "CheckpointConfig(other_weights='warn') loads it nevertheless"
        )
    warnings.warn(message, stacklevel=4)


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
        state["meta"]["fingerprint_bfloat16"] = rounded_fingerprint(parts.layers)
        state["meta"]["rounded_biases"] = rounded_biases(parts.layers)
        shares = state["meta"]["topk_disagreement"] = parts.step_state.topk_disagreement()
        if not self._advised:
            told = [advise_of_disagreement(shares, parts.layers), warn_of_rounded_biases(parts.layers)]
            self._advised = any(told)
        strict = parts.config.checkpoint.strict_save
        # Raising on one rank only would leave the others waiting in their next collective: with several ranks the
        # failure travels with the next step's reduction and is raised by all of them there.
        fault = unloadable(parts.step_state, state["tensors"], state["meta"])
        written = write_state(
            directory, state["tensors"], state["meta"], fault=fault, strict=strict and not distributed.active()
        )
        if strict and not written:
            self._failed = str(directory)
        if written:
            forget_note(directory)
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
        self, directory: str | Path, governed: bool, on_missing: OnMissing, step: int | None, check_weights: bool = True
    ) -> dict[str, Any] | None:
        """The state in `directory` as :meth:`unpack` takes it, the same on every rank. Collective.

        Args:
            directory: where it lies.
            governed: the live run has been governed.
            on_missing: what to do where there is none.
            step: optimizer step that the state must be of; None = any.
            check_weights: hold the live weights against the state's fingerprint.

        Raises:
            StateMissingError: there is none, and `on_missing` does not allow that.
            WeightMismatchError: it is of other weights, and ``CheckpointConfig.other_weights`` is ``"raise"``.
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
        if check_weights:
            check_meta(meta)
            layers = self.parts.layers
            check_layers(
                meta["layers"], [layer.table_row() for layer in layers], self.parts.config.checkpoint.allow_partial
            )
            policy = self.parts.config.checkpoint.other_weights
            require_same_weights(layers, {"tensors": tensors, "meta": meta}, directory, policy)
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


def warn_of_unloaded_state(model: nn.Module, layers: Sequence[Layer]) -> None:
    """Warn if `model` came from a local directory whose state steers: without it the same weights route otherwise.

    A state that steers nothing in the forward (``observe``, or ``balance`` on a family's own correction bias, which is
    part of the weights) is not warned of.

    Args:
        model: As ``from_pretrained`` returned it; its ``name_or_path`` says where it came from.
        layers: Its wrapped layers. Of a state that is not of their weights (they were folded since) nothing is said.
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
        lines, rounded = manifest.get("fingerprint", {}), manifest.get("fingerprint_bfloat16", {})
        if foreign_weights(layers, lines, rounded, held=manifest["tensors"]):
            return
        warnings.warn(
            f"the weights of this model come from {short(source)}, where their routing was governed, and without the "
            "state there they route otherwise: load it with wrap(model, state=directory), or resume the "
            "Trainer from that checkpoint",
            stacklevel=3,
        )


# What of a state on disk acts only where it is loaded, in words.


def steering(directory: str | Path) -> str | None:
    """What steers in the state of `directory`, which a plain reload of its weights routes without.

    Returns:
        In words; None where there is no state, where it cannot be read, or where nothing in it steers (``observe``, or
        ``balance`` on a family's own correction bias, which is part of the weights).
    """
    try:
        return steering_of(*read_state(directory)) if has_state(directory) else None
    except StateError:
        return None


def steering_of(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> str | None:
    """The same, of a state that was read."""
    steers = meta.get("steering")
    if meta.get("governed") is not True or not isinstance(steers, list):
        return None
    beta = sum(bool(on) and bool(tensors["beta_LE"][at].any()) for at, on in enumerate(steers))
    lenses = sum(
        name.startswith("lens.") and name.endswith(".scale") and float(tensors[name]) > 0.0 for name in tensors
    )
    parts = [f"a beta for {beta} of {len(steers)} layers"] if beta else []
    parts += [f"an open lens in {lenses} of {len(steers)} layers"] if lenses else []
    if not parts:
        return None
    shares = [share for share in meta.get("topk_disagreement") or [] if isinstance(share, int | float)]
    share = f" (without it up to {100.0 * max(shares):.1f} % of a layer's tokens go to other experts)" if shares else ""
    return " and ".join(parts) + share
