"""Which tokens of a call are read: up to a limit, spread evenly over the real ones, chosen without the host.

Shape suffixes: T rows (tokens) of a call, S tokens read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenSample:
    """Tokens read of one call.

    Args:
        position_S: int64 rows of the call; None = all rows, in order (S = T).
        valid_S: bool, False = filler; None = every row counts.
        scale: real tokens / tokens read: what a sum over the sample is multiplied with.
    """

    position_S: Tensor | None
    valid_S: Tensor | None
    scale: Tensor | float

    def pick(self, value_T: Tensor, dim: int = 0) -> Tensor:
        """The rows read of `value_T`."""
        return value_T if self.position_S is None else value_T.index_select(dim, self.position_S)


def sample_tokens(mask_T: Tensor | None, num_rows: int, limit: int | None, device: torch.device) -> TokenSample:
    """Up to `limit` real tokens, spread evenly over the call, chosen without talking to the host.

    Args:
        mask_T: bool, real tokens; None = all.
        num_rows: T.
        limit: most tokens to read; None = all.
        device: of the call.
    """
    if limit is None or num_rows <= limit:
        return TokenSample(None, None if mask_T is None else mask_T.to(device), 1.0)
    slot_S = torch.arange(limit, device=device)
    if mask_T is None:
        return TokenSample(slot_S * num_rows // limit, None, num_rows / limit)
    rank_T = mask_T.to(device).cumsum(0)
    total = rank_T[-1]
    spread = total.clamp_min(limit)  # fewer real tokens than slots: one a slot, then filler
    wanted_S = slot_S * spread // limit
    position_S = torch.searchsorted(rank_T, wanted_S, right=True).clamp_(max=num_rows - 1)
    return TokenSample(position_S, wanted_S < total, spread / limit)
