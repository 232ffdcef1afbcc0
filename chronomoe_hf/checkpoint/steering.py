"""What of a state on disk acts only where it is loaded, in words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from chronomoe_hf.checkpoint.state_file import has_state, read_state
from chronomoe_hf.errors import StateError


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
