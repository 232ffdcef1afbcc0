"""Switch Transformers: top-1 with a capacity per sequence and expert (Fedus et al., arXiv:2101.03961).

The router returns the dispatch mask *after* dropping, so a dropped token is an all-zero row and its choice must be read
from the probabilities. Shape suffixes: B sequences, S positions, T = B * S tokens, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chronomoe_hf.patches.registry import Adapter
from chronomoe_hf.patches.rules import ScoreTopK
from chronomoe_hf.patches.scores import steered_scores
from chronomoe_hf.router.state import RouterCall, Routing, lensed_logits


@dataclass(frozen=True, kw_only=True)
class SwitchAdapter(Adapter):
    """Top-1 router that returns ``(mask [B, S, E] after capacity, weight [B, S, 1], logits [B, S, E])``."""

    def read(self, router: Any, output: Any) -> Routing:
        """The choice is the mask where it survived the capacity, else the argmax of the rounded probabilities."""
        mask_BSE, weight_BS1, logits_BSE = output
        logits_TE = logits_BSE.reshape(-1, logits_BSE.shape[-1])
        prob_TE = F.softmax(logits_TE.detach(), dim=-1, dtype=router.dtype).to(weight_BS1.dtype)
        mask_TE = mask_BSE.reshape(logits_TE.shape)
        # Steering can choose what is not the argmax of the clean logits: where the mask is set, it outweighs every
        # probability.
        index_T1 = torch.add(prob_TE, mask_TE, alpha=2).argmax(dim=-1, keepdim=True)
        return Routing(logits_TE, index_T1, mask_TE.any(dim=-1, keepdim=True))

    def reroute(self, router: Any, call: RouterCall) -> Any:
        """Choose with ``z + beta``, then apply the capacity per sequence in position order, as the native does."""
        return self._choose(router, call)[0]

    def steer(self, router: Any, call: RouterCall, recorded: bool) -> tuple[Any, Routing | None]:
        """As :meth:`reroute`; the choice of a token that the capacity has dropped is known here, and only here."""
        output, index_T1 = self._choose(router, call)
        if not recorded:
            return output, None
        kept_T1 = output[0].reshape(call.logits_TE.shape).any(dim=-1, keepdim=True)
        return output, Routing(call.logits_TE, index_T1, kept_T1)

    def _choose(self, router: Any, call: RouterCall) -> tuple[Any, Tensor]:
        mask_BSE, weight_BS1, logits_BSE = call.output

        def score(z: Tensor) -> Tensor:
            # The cast to the input's dtype can create ties, and ties decide the argmax.
            return F.softmax(z, dim=-1, dtype=router.dtype).to(weight_BS1.dtype)

        if weight_BS1.dtype == router.dtype == torch.float:
            choice_TE, weight_TE = steered_scores(score, call, None, fp32=True)
        else:
            choice_TE, weight_TE = _low_precision_scores(score, call)
        index_T1 = call.chosen(choice_TE.argmax(dim=-1, keepdim=True))
        demand_BSE = torch.zeros_like(mask_BSE).scatter_(-1, index_T1.view(*mask_BSE.shape[:-1], 1), 1)
        kept_BSE = torch.cumsum(demand_BSE, dim=-2) <= router.expert_capacity
        weight_BS1 = weight_TE.gather(-1, index_T1).view(weight_BS1.shape)
        return (demand_BSE * kept_BSE, weight_BS1, logits_BSE), index_T1


def _low_precision_scores(score: Any, call: RouterCall) -> tuple[Tensor, Tensor]:
    """Native rounded scores plus the fp32 difference that steering makes: ties stay the native ones at beta = 0."""
    native_TE, lensed_TE = score(call.logits_TE), lensed_logits(call)
    native32_TE = F.softmax(call.logits_TE.float(), dim=-1)
    biased_TE = native_TE.float() + (F.softmax(lensed_TE + call.beta_E, dim=-1) - native32_TE)
    if call.scope == "routing":
        return biased_TE, biased_TE.to(native_TE.dtype)
    if call.shift_TE is None:
        return biased_TE, native_TE
    return biased_TE, (native_TE.float() + (F.softmax(lensed_TE, dim=-1) - native32_TE)).to(native_TE.dtype)


ADAPTERS = (
    SwitchAdapter(
        family="switch_transformers",
        router_class="SwitchTransformersTop1Router",
        rule=ScoreTopK(score="softmax32"),
        logits_index=2,
        top_k_at=1,
        weight_at="classifier.weight",
        linear_bias_at="classifier.bias",
        experts_call="switch",
        notes="capacity per sequence and expert, in position order",
    ),
)
