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

from chronomoe_hf.patches.registry import Adapter, module_of
from chronomoe_hf.patches.rules import ScoreTopK
from chronomoe_hf.patches.scores import steered_scores
from chronomoe_hf.router.call import RouterCall, lensed_logits
from chronomoe_hf.router.state import Routing


@dataclass(frozen=True, kw_only=True)
class SwitchAdapter(Adapter):
    """Top-1 router that returns ``(mask [B, S, E] after capacity, weight [B, S, 1], logits [B, S, E])``."""

    def read(self, router: Any, output: Any) -> Routing:
        """The choice is the mask where it survived the capacity, else the argmax of the rounded probabilities."""
        mask_BSE, weight_BS1, logits_BSE = output
        logits_TE = logits_BSE.reshape(-1, logits_BSE.shape[-1])
        prob_TE = F.softmax(logits_TE.detach(), dim=-1, dtype=router.dtype).to(weight_BS1.dtype)
        mask_TE = mask_BSE.reshape(logits_TE.shape)
        kept_T1 = mask_TE.sum(dim=-1, keepdim=True) > 0
        # A steered choice is not the argmax of the clean logits: use the mask where it is set, else the argmax.
        index_T1 = torch.where(kept_T1, mask_TE.argmax(dim=-1, keepdim=True), prob_TE.argmax(dim=-1, keepdim=True))
        return Routing(logits_TE, index_T1, kept_T1)

    def reroute(self, router: Any, call: RouterCall) -> Any:
        """Choose with ``z + beta``, then apply the capacity per sequence in position order, as the native does."""
        mask_BSE, weight_BS1, logits_BSE = call.output

        def score(z: Tensor) -> Tensor:
            # The cast to the input's dtype can create ties, and ties decide the argmax.
            return F.softmax(z, dim=-1, dtype=router.dtype).to(weight_BS1.dtype)

        if weight_BS1.dtype == router.dtype == torch.float:
            choice_TE, weight_TE = steered_scores(score, call, None, fp32=True)
        else:
            choice_TE, weight_TE = _low_precision_scores(score, call)
        index_T1 = choice_TE.argmax(dim=-1, keepdim=True)
        demand_BSE = F.one_hot(index_T1.squeeze(-1), num_classes=mask_BSE.shape[-1]).view(mask_BSE.shape)
        kept_BSE = torch.cumsum(demand_BSE, dim=-2) <= router.expert_capacity
        return demand_BSE * kept_BSE, weight_TE.gather(-1, index_T1).view(weight_BS1.shape), logits_BSE


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
        module=module_of("switch_transformers"),
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
