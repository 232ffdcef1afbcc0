"""The roles of experts in a saved state: tensors ``role.<layer>.<name>``, which states without roles lack.

Shape suffixes: E experts, D width of an output, M columns and P sums of ``recording.roles``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from chronomoe_hf import distributed
from chronomoe_hf.checkpoint.manifest import WAY_OUT, short
from chronomoe_hf.errors import StateCorruptError
from chronomoe_hf.recording.role_sums import KEPT, MOMENTS, PAIRS, WINDOW, RoleState

ROLE = re.compile(r"role\.(\d{1,9})\.(\w{1,40})")
_DTYPES = {"updates_E": torch.int64, "table_EM": torch.float64}


def packed(roles: RoleState | None) -> dict[str, Tensor]:
    """The tensors that are saved; none without roles."""
    return {} if roles is None else {f"role.{name}": value for name, value in roles.state_dict().items()}


def of_layer(tensors: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    """The tensors of one saved layer, by name; empty where it has none."""
    prefix = f"role.{layer}."
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def check_roles(tensors: Mapping[str, Tensor], num_experts: Sequence[int]) -> None:
    """Check names, dtypes, shapes and numbers of every ``role.*`` tensor.

    Args:
        tensors: of the saved state.
        num_experts: E of each saved layer.

    Raises:
        StateCorruptError: the first that is missing, unknown, or not what it must be.
    """
    found = [match for name in tensors if (match := ROLE.fullmatch(str(name)))]
    for layer in sorted({int(match[1]) for match in found}):
        if layer >= len(num_experts):
            raise StateCorruptError(f"the saved state has role.{layer} for {len(num_experts)} layers; {WAY_OUT}")
        own, names = of_layer(tensors, layer), (*WINDOW, *KEPT)
        if set(own) != set(names):
            wrong = sorted(set(own) ^ set(names))
            raise StateCorruptError(
                f"the saved roles of layer {layer} lack or have too much: {short(wrong)}; {WAY_OUT}"
            )
        width = own["mean_ED"].shape[-1] if own["mean_ED"].dim() == 2 else 0
        sizes = {"E": num_experts[layer], "D": width, "M": len(MOMENTS), "P": len(PAIRS)}
        for name in names:
            shape = tuple(sizes[letter] for letter in name.rpartition("_")[2])
            _check(f"role.{layer}.{name}", own[name], _DTYPES.get(name, torch.float32), shape)
        if bool((own["updates_E"] < 0).any()) or bool((own["table_EM"][:, (0, 1, 4, 5)] < 0).any()):
            raise StateCorruptError(f"the saved roles of layer {layer} hold a negative number of tokens; {WAY_OUT}")


def _check(name: str, value: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if value.dtype != dtype or tuple(value.shape) != shape or 0 in shape:
        raise StateCorruptError(
            f"the saved state's {name} must be {dtype} of shape {shape}, got {value.dtype} {tuple(value.shape)}; "
            f"{WAY_OUT}"
        )
    if value.is_floating_point() and not bool(value.isfinite().all()):
        raise StateCorruptError(f"the saved state's {name} must be finite; {WAY_OUT}")


def load_roles(
    roles: RoleState | None, tensors: Mapping[str, Tensor], pairs: Sequence[tuple[int, int]], copies: int, whole: bool
) -> None:
    """Take over the roles of the layers that agree; where none were saved, they start afresh.

    The open window's sums are those of the rank that saved: they go to the ranks that saw its batches, the others
    start their part afresh.

    Args:
        roles: live; None = not kept.
        tensors: of the saved state, checked.
        pairs: (saved layer, live layer) that agree.
        copies: how many ranks see the same batch.
        whole: the whole model agrees; only then the open window counts.
    """
    if roles is None:
        return
    roles.layers.clear()
    for old, new in pairs:
        own = of_layer(tensors, old)
        if own:
            roles.load_layer(new, own, with_window=whole and distributed.rank() < copies)
