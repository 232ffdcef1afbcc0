"""Which forwards are recorded, which of their rows are real tokens, and which of those are read for coherence.

Shape suffixes: T router rows (tokens), B batch, S sequence (in `real_tokens`) or tokens read (in `sample_tokens`).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Mode = Literal["off", "train", "eval"]
SCOPE = "_chrono_scope"


@dataclass
class Switches:
    """Host-side switches shared by all windows of a system.

    Args:
        training: record training forwards.
        evaluation: record forwards in eval mode (set while Trainer evaluates, or by ``system.recording_eval()``).
        router_input: also sum router inputs (set for the one step before a lens may be steered).
        any_steering: beta or a lens acts in some layer (only compiled graphs go by it, see ``ChronoRouter.forward``).
    """

    training: bool = True
    evaluation: bool = False
    router_input: bool = False
    any_steering: bool = False


class ForwardScope:
    """Whether the running forward counts, and which of its rows are real tokens.

    One window belongs to each innermost PreTrainedModel that owns routers. Its pre-hook opens it, its
    always-called post-hook closes it, so the recompute of activation checkpointing (which runs outside
    the owner), evaluation, generation and no-grad forwards in training mode are all left out.
    """

    def __init__(self, switches: Switches, parameters: tuple[str, ...], pad_token_id: int | None) -> None:
        self.switches = switches
        self.parameters = parameters
        self.pad_token_id = pad_token_id
        self.mode: Mode = "off"
        self.mask_T: Tensor | None = None

    def open(self, training: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decide the mode and read the padding mask from the owner's arguments."""
        self.mode = self._mode(training)
        if self.mode != "off":
            named = dict(zip(self.parameters, args, strict=False)) | kwargs
            self.mask_T = real_tokens(named, self.pad_token_id)

    def _mode(self, training: bool) -> Mode:
        if training:
            if not (self.switches.training and torch.is_grad_enabled()):
                return "off"
            # A user may checkpoint the whole owner; its recompute then runs this hook again, inside backward.
            if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
                return "off"
            return "train"
        return "eval" if self.switches.evaluation else "off"

    def close(self) -> None:
        """Forget the forward."""
        self.mode = "off"
        self.mask_T = None

    def rows(self, num_rows: int) -> Tensor | None:
        """Real-token mask for a router that sees `num_rows` rows, or None where all rows count as real."""
        mask_T = self.mask_T
        return mask_T if mask_T is not None and mask_T.shape[0] == num_rows else None


def open_scope(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of an owner; finds its window through the module, so a deep copy records into its own."""
    module.__dict__[SCOPE].open(module.training, args, kwargs)


def close_scope(module: nn.Module, args: Any, output: Any) -> None:
    """Always-called forward hook of an owner."""
    module.__dict__[SCOPE].close()


def forward_parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the positional parameters of the module's class-level forward."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def real_tokens(named: dict[str, Any], pad_token_id: int | None) -> Tensor | None:
    """Which rows of a flattened batch are real tokens, from the arguments of a decoder.

    A 2-D ``attention_mask`` wins; while generating it is wider than the rows, and its last columns are theirs.
    Without one, a padding-free batch (one row, explicit ``position_ids``) marks its tail of padding by zeros.

    Args:
        named: the forward's arguments by name.
        pad_token_id: settles whether a trailing zero position is padding or a one-token document.

    Returns:
        bool ``(B * S,)``, or None where every row is real (or the mask cannot be aligned with the rows).
    """
    tokens = named.get("input_ids")
    shaped = tokens if isinstance(tokens, Tensor) else named.get("inputs_embeds")
    if not isinstance(shaped, Tensor) or shaped.dim() < 2:
        return None
    batch, length = shaped.shape[0], shaped.shape[1]
    mask = named.get("attention_mask")
    if isinstance(mask, Tensor):
        if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < length:
            return None
        return (mask[:, mask.shape[1] - length :] != 0).reshape(-1)
    positions = named.get("position_ids")
    if mask is not None or not isinstance(positions, Tensor) or batch != 1 or length < 2:
        return None
    if positions.shape != (1, length):
        return None
    advanced_T = (positions[0] != 0).flip(0).cumsum(0).flip(0) > 0
    if isinstance(tokens, Tensor) and pad_token_id is not None:
        return advanced_T | (tokens[0] != pad_token_id)
    # Without token ids the first trailing zero is read as a one-token document only if it stands alone.
    return advanced_T | ((~advanced_T).sum() == 1)


def sample_tokens(mask_T: Tensor | None, num_rows: int, limit: int | None, device: torch.device) -> TokenSample:
    """Up to `limit` real tokens, spread evenly over the call, chosen without talking to the host.

    Args:
        mask_T: bool, real tokens; None = all.
        num_rows: T.
        limit: most tokens to read; None = all.
        device: of the call.

    Returns:
        Positions ``(S,)`` int64, bool ``(S,)`` (False = filler), and real tokens / tokens read.
    """
    if limit is None or num_rows <= limit:
        position_S = torch.arange(num_rows, device=device)
        valid_S = torch.ones(num_rows, dtype=torch.bool, device=device) if mask_T is None else mask_T.to(device)
        return TokenSample(position_S, valid_S, 1.0)
    slot_S = torch.arange(limit, device=device)
    if mask_T is None:
        return TokenSample(
            slot_S * num_rows // limit, torch.ones(limit, dtype=torch.bool, device=device), num_rows / limit
        )
    rank_T = mask_T.to(device).cumsum(0)
    total = rank_T[-1]
    wanted_S = torch.where(total > limit, slot_S * total // limit, slot_S) + 1
    position_S = torch.searchsorted(rank_T, wanted_S).clamp_(max=num_rows - 1)
    scale = total.clamp_min(limit).float() / limit
    return TokenSample(position_S, wanted_S <= total, scale)


@dataclass(frozen=True)
class TokenSample:
    """Which tokens are read: see :func:`sample_tokens`."""

    position_S: Tensor
    valid_S: Tensor
    scale: Tensor | float
