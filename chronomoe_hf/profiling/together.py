"""Which experts are chosen together, in a layer and in two layers that follow each other, by forward hooks.

Shape suffixes: L layers, E experts, F experts of the next layer, T router rows, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from chronomoe_hf import distributed
from chronomoe_hf.wrapping.layer import Layer


class CoActivation:
    """Counts, layer by layer, in how many real tokens two experts were both chosen (and kept).

    Args:
        layers: of a wrapped model.

    Attributes:
        mask: int ``(B, S)`` real tokens of the running forward, by the part of the model it belongs to
            (``"decoder"`` or ``""``); set before every forward.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers
        self.mask: dict[str, Tensor] = {}
        self._sums: list[Tensor | None] = [None] * len(layers)
        self._flows: list[Tensor | None] = [None] * len(layers)  # from a layer to the next
        self._before: tuple[int, str, Tensor] | None = None  # the last router that was called, its part, what it chose
        self._handles = [layer.router.register_forward_hook(self._hook(at)) for at, layer in enumerate(layers)]

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, at: int) -> Any:
        layer = self.layers[at]
        part = "decoder" if "decoder" in layer.name.split(".") and "encoder" not in layer.name.split(".") else ""

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            routing = layer.adapter.read(module, output)
            real_T = torch.isfinite(routing.logits_TE.float().sum(-1))
            mask = self.mask.get(part, self.mask.get(""))
            if mask is not None and mask.numel() == real_T.numel():
                real_T = real_T & (mask.reshape(-1) != 0).to(real_T.device)
            kept_TK = real_T[:, None].expand_as(routing.index_TK)
            if routing.kept_TK is not None:
                kept_TK = kept_TK & routing.kept_TK
            hit_TE = torch.zeros(len(real_T), layer.num_experts, device=real_T.device)
            hit_TE.scatter_(1, routing.index_TK, kept_TK.float())
            pair_EE = (hit_TE.T @ hit_TE).double()  # fp32 is exact: a batch has fewer than 2^24 tokens
            self._sums[at] = _more(self._sums[at], pair_EE)
            before = self._before
            if before is not None and before[:2] == (at - 1, part) and len(before[2]) == len(hit_TE):
                pair_EF = (before[2].to(hit_TE.device).T @ hit_TE).double()
                self._flows[at - 1] = _more(self._flows[at - 1], pair_EF)
            self._before = (at, part, hit_TE)

        return hook

    def take_flows(self) -> list[Tensor | None]:
        """Tokens for which a layer chose e and the next chose f, since the last call over all ranks. Collective.

        Returns:
            int64 ``(E, F)`` per pair of layers on the CPU, length L - 1; None where the second was never called right
            after the first (encoder and decoder), on any rank.
        """
        pairs = list(zip(self.layers, self.layers[1:], strict=False))
        flat = []
        for at, (one, other) in enumerate(pairs):
            sums, size = self._flows[at], one.num_experts * other.num_experts
            flat.append(torch.zeros(size, dtype=torch.float64) if sums is None else sums.cpu().ravel())
            self._flows[at] = None
        self._before = None
        if not flat:
            return []
        summed = distributed.all_reduce_sum_(torch.cat(flat).to(distributed_device(self.layers))).cpu().round().long()
        parts = summed.split([one.num_experts * other.num_experts for one, other in pairs])
        return [
            part.view(one.num_experts, -1) if bool(part.any()) else None
            for part, (one, _) in zip(parts, pairs, strict=True)
        ]

    def take(self) -> list[Tensor]:
        """Sums since the last call over all ranks, int64 ``(E, E)`` per layer on the CPU. Collective.

        The diagonal holds the tokens of each expert.
        """
        flat = []
        for at, layer in enumerate(self.layers):
            sums = self._sums[at]
            flat.append(torch.zeros(layer.num_experts**2, dtype=torch.float64) if sums is None else sums.cpu().ravel())
            self._sums[at] = None
        summed = distributed.all_reduce_sum_(torch.cat(flat).to(distributed_device(self.layers)))
        parts = summed.cpu().round().long().split([layer.num_experts**2 for layer in self.layers])
        return [part.view(layer.num_experts, -1) for part, layer in zip(parts, self.layers, strict=True)]


def _more(sums: Tensor | None, new: Tensor) -> Tensor:
    return new if sums is None else sums + new


def distributed_device(layers: Sequence[Layer]) -> torch.device:
    """Where tensors for a collective live: with the first router, or on the CPU when alone."""
    if not distributed.active():
        return torch.device("cpu")
    return layers[0].adapter.weight(layers[0].router).device


def strongest_pairs(pair_EE: Tensor, limit: int = 10) -> list[dict[str, Any]]:
    """The pairs chosen together most above chance.

    Lift = n(i, j) / (n(i) n(j) / N * (k - 1) E / (k (E - 1))), N tokens: 1 is what k different experts a token give
    when they are drawn evenly and by load otherwise. Pairs expected in fewer than 5 tokens are left out.

    Args:
        pair_EE: int64 counts of one layer, from :meth:`CoActivation.take`.
        limit: how many.
    """
    single_E = pair_EE.diagonal().double()
    both_EE = pair_EE.double() - torch.diag(single_E)
    num_experts = len(single_E)
    num_k = 1.0 + float(both_EE.sum()) / max(float(single_E.sum()), 1.0)
    tokens = float(single_E.sum()) / num_k
    scale = (num_k - 1.0) * num_experts / (num_k * max(num_experts - 1, 1))
    expected_EE = single_E[:, None] * single_E[None, :] / max(tokens, 1.0) * scale
    lift_EE = torch.where(expected_EE >= 5.0, both_EE / expected_EE.clamp_min(1e-9), 0.0).triu(1)
    best = lift_EE.ravel().argsort(descending=True)[:limit]
    found = []
    for flat in best.tolist():
        i, j = divmod(flat, num_experts)
        if float(lift_EE[i, j]) > 1.0:
            found.append({"experts": [i, j], "tokens": int(pair_EE[i, j]), "lift": round(float(lift_EE[i, j]), 4)})
    return found
