"""Which forwards are recorded, which of their rows are real tokens, and which of those are read for coherence.

Shape suffixes: T router rows (tokens), B batch, S sequence (in `real_tokens`) or tokens read (in `sample_tokens`).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from chronomoe_hf.recording.padding import DECODER_LABELS, PadToken, real_tokens
from chronomoe_hf.router.shared import SharedInParts

Mode = Literal["off", "train", "eval"]
SCOPE = "_chrono_scope"
DECODER = "_chrono_decoder"
"""Name of the plain attribute of an encoder-decoder model that holds the scope of its decoder."""


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


class ForwardScope(SharedInParts):
    """Whether the running forward counts, and which of its rows are real tokens.

    One window belongs to each innermost PreTrainedModel that owns routers. Its pre-hook opens it, its
    always-called post-hook closes it, so the recompute of activation checkpointing (which runs outside
    the owner), evaluation, generation and no-grad forwards in training mode are all left out.
    """

    def __init__(self, switches: Switches, parameters: tuple[str, ...], pad: PadToken) -> None:
        self.switches = switches
        self.parameters = parameters
        self.pad = pad
        self.mode: Mode = "off"
        self.mask_T: Tensor | None = None
        self.labels: Tensor | None = None
        self.note: str | None = None

    def open(self, training: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decide the mode and read the padding mask from the owner's arguments."""
        self.mode = self._mode(training)
        if self.mode != "off":
            named = dict(zip(self.parameters, args, strict=False)) | kwargs
            if self.labels is not None:
                named[DECODER_LABELS] = self.labels
            self.mask_T, note = real_tokens(named, self.pad)
            self.note = note or self.note

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
        """The forward has ended."""
        self.abandon()

    def abandon(self) -> None:
        """Forget a forward, also one that never came to its end."""
        self.mode = "off"
        self.mask_T = None

    def rows(self, num_rows: int) -> Tensor | None:
        """Real-token mask for a router that sees `num_rows` rows, or None where all rows count as real."""
        mask_T = self.mask_T
        if mask_T is not None and mask_T.shape[0] != num_rows:
            self.note = (
                f"padding is counted as real tokens: the router sees {num_rows} rows, the mask has {mask_T.shape[0]}"
            )
            return None
        return mask_T


def open_scope(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of an owner; finds its window through the module, so a deep copy records into its own."""
    module.__dict__[SCOPE].open(module.training, args, kwargs)


def close_scope(module: nn.Module, args: Any, output: Any) -> None:
    """Always-called forward hook of an owner."""
    module.__dict__[SCOPE].close()


def open_decoder(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of an encoder-decoder model: shows its labels to the scope of the decoder."""
    named = dict(zip(forward_parameters(module), args, strict=False)) | kwargs
    module.__dict__[DECODER].labels = named.get("labels")


def close_decoder(module: nn.Module, args: Any, output: Any) -> None:
    """Always-called forward hook of an encoder-decoder model."""
    module.__dict__[DECODER].labels = None


def forward_parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the positional parameters of the module's class-level forward."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


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
