"""What a gradient pass has chosen, kept for the recompute of activation checkpointing, which must choose the same.

A recompute has the inputs of its forward, so what the router would choose itself says which forward it belongs to: in
any order of backward, reentrant or not, without a count of calls. No host read: the best match is found on the device,
and how well it matches is looked at before the optimizer moves.

Shape suffixes: T rows (tokens), K experts a token, P forwards that are waiting.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from chronomoe_hf.errors import ReplayError


def same_sets(one: Tensor, two: Tensor) -> Tensor:
    """Where two choices ``(..., T, K)`` hold the same experts, in any order; bool ``(..., T)``."""
    return (one.unsqueeze(-1) == two.unsqueeze(-2)).any(-1).all(-1)


@dataclass(frozen=True)
class _Waiting:
    own_TK: Tensor
    given_TK: Tensor | None


class Pending:
    """The choices of gradient passes until their backward.

    Attributes:
        flips: layer id -> 0-dim float64, tokens whose own choice differed in the recompute.
        seen: layer id -> tokens that were recomputed.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, list[_Waiting]] = {}
        self._recomputed: dict[int, int] = {}
        self._agreement: list[Tensor] = []
        self.flips: dict[int, Tensor] = {}
        self.seen: dict[int, int] = {}

    def begin(self) -> None:
        """A new gradient pass: what all earlier ones left is forgotten once every one was recomputed."""
        if self._waiting and all(self._recomputed.get(at, 0) >= len(each) for at, each in self._waiting.items()):
            self.clear()

    def clear(self) -> None:
        """Forget everything that waits."""
        self._waiting.clear()
        self._recomputed.clear()

    def remember(self, layer_id: int, own_TK: Tensor, given_TK: Tensor | None) -> None:
        """Keep what a layer would have chosen in a gradient pass, and what it was told."""
        kept = None if given_TK is None else given_TK.to(torch.int16)
        self._waiting.setdefault(layer_id, []).append(_Waiting(own_TK.to(torch.int16), kept))

    def recompute(self, layer_id: int, own_TK: Tensor, name: str, required: bool) -> Tensor | None:
        """What the layer was told in the forward that is recomputed now.

        Args:
            layer_id: of the layer.
            own_TK: what it would choose itself now.
            name: of the layer, for the error.
            required: a choice that is missing raises.

        Raises:
            ReplayError: no gradient pass with so many rows is waiting: the router would choose itself, and the
                gradient would be of another routing than the loss.
        """
        self._recomputed[layer_id] = self._recomputed.get(layer_id, 0) + 1
        own_TK = own_TK.to(torch.int16)
        fits = [each for each in self._waiting.get(layer_id, ()) if each.own_TK.shape == own_TK.shape]
        if not fits:
            if not required:
                return None
            raise ReplayError(
                f"{name}: backward recomputes a forward of {own_TK.shape[0]} tokens whose choices are not there any "
                "more (system.step was called between a forward and its backward, or the forward ran before replay was "
                "switched on); call system.step once per optimizer step, after all backward passes"
            )
        stacked_PTK = torch.stack([each.own_TK for each in fits])
        same_PT = (stacked_PTK == own_TK).all(-1).float()
        agreement, at = same_PT.mean(-1).max(0)
        matched_TK = stacked_PTK.index_select(0, at[None])[0]
        if required:
            self._agreement.append(agreement)
        zero = torch.zeros((), dtype=torch.float64, device=own_TK.device)
        self.flips[layer_id] = self.flips.get(layer_id, zero) + (~same_sets(matched_TK, own_TK)).sum()
        self.seen[layer_id] = self.seen.get(layer_id, 0) + own_TK.shape[0]
        told = [each.given_TK for each in fits]
        if all(each is None for each in told):
            return None
        blank_TK = torch.full_like(own_TK, -1)
        told_PTK = torch.stack([blank_TK if each is None else each for each in told])
        return told_PTK.index_select(0, at[None])[0].long()

    def check(self) -> None:
        """Look at how well the recomputes since the last call matched their forwards. One host read.

        Raises:
            ReplayError: for one of them less than half of the tokens.
        """
        if not self._agreement:
            return
        worst = float(torch.stack(self._agreement).min())
        self._agreement.clear()
        if worst < 0.5:
            raise ReplayError(
                f"a recompute of activation checkpointing matches its forward in only {worst:.0%} of the tokens: the "
                "gradient would be of another routing than the loss. Dropout or noise that is not repeated "
                "(preserve_rng_state=False) does this; keep preserve_rng_state=True, or train without checkpointing"
            )
