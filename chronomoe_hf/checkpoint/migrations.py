"""States of older schemas, brought to today's. Pure: tensors and manifest entries in, the same out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from chronomoe_hf.checkpoint.manifest import STATE_SCHEMA, Meta, short
from chronomoe_hf.errors import StateSchemaError
from chronomoe_hf.recording.columns import Row

Tensors = dict[str, Tensor]
Migration = Callable[[Tensors, Meta], tuple[Tensors, Meta]]


def _from_1(tensors: Tensors, meta: Meta) -> tuple[Tensors, Meta]:
    """1.0 had no gains: they start afresh. What else changed is where the files lie."""
    if "beta_LE" in tensors and "gain_LE" not in tensors:
        tensors = {**tensors, "gain_LE": torch.zeros_like(tensors["beta_LE"])}
    return tensors, meta


def _without_loss(tensors: Tensors) -> Tensors:
    """Before 2.1 no loss tokens were counted: those of an open window are unknown."""
    if "window_LR" in tensors and "loss_N" not in tensors:
        tensors = {**tensors, "loss_N": torch.zeros(2, dtype=torch.float64)}
    return tensors


def _with_gates_and_norms(tensors: Tensors) -> Tensors:
    """Before 2.3 a row had no sums of gates and of norms.

    So that sums and the number of outputs that they are over agree, what the open window has read of expert outputs
    starts afresh; its counts and probabilities stay.
    """
    window_LR, beta_LE = tensors.get("window_LR"), tensors.get("beta_LE")
    if window_LR is None or beta_LE is None or not window_LR.dim() == beta_LE.dim() == 2:
        return tensors  # what it is will be said when it is checked
    row = Row(beta_LE.shape[-1])
    if window_LR.shape[-1] != row.size - 2 * row.width:
        return tensors
    new_LR = window_LR.new_zeros(window_LR.shape[0], row.size)
    new_LR[:, row.head] = window_LR[:, row.head]
    new_LR[:, row.tail] = window_LR[:, row.tail.start - row.size :]
    return {**tensors, "window_LR": new_LR}


MIGRATIONS: dict[int, Migration] = {1: _from_1}
"""Schema version -> function that turns the (tensors, meta) of that version into those of the next."""


def migrate(tensors: Tensors, meta: Meta, source: str) -> tuple[Tensors, Meta]:
    """Apply every migration between the schema of `meta` and today's.

    Args:
        tensors: By name.
        meta: The manifest, with its ``schema_version``.
        source: Path shown in messages.

    Raises:
        StateSchemaError: There is no way from that schema to this one.
    """
    saved = meta["schema_version"], meta.get("schema_minor", 0)
    while (version := meta["schema_version"]) < STATE_SCHEMA:
        if version not in MIGRATIONS:
            raise StateSchemaError(
                f"{source} has schema version {version}, which cannot be migrated to this "
                f"version's {STATE_SCHEMA}; install chronomoe_hf {short(meta.get('chronomoe_version'))}"
            )
        tensors, meta = MIGRATIONS[version](tensors, meta)
        meta = {**meta, "schema_version": version + 1}
    tensors = _without_loss(tensors) if saved < (2, 1) else tensors
    return _with_gates_and_norms(tensors) if saved < (2, 3) else tensors, meta
