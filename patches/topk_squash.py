"""Families that take the top k of the logits first and squash only the chosen ones.

gpt-oss, Granite, Aria, Command, Kolibri, JetMoE, Llama 4.
Shape suffixes: T tokens, E experts, K experts per token, N = T * K assignments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from chronomoe_hf.patches.registry import Adapter
from chronomoe_hf.patches.rules import Renorm, TopKSquash
from chronomoe_hf.router.state import RouterCall, Routing, lensed_logits

SOFTMAX = TopKSquash("softmax")


@dataclass(frozen=True, kw_only=True)
class JetMoeAdapter(Adapter):
    """Returns its dispatch sorted by expert: ``(index_sorted [N], batch_index [N], gates [N], expert_size, logits)``.

    ``expert_size`` is a list of E ints, the logits are ``[T, E]``.
    """

    def read(self, router: nn.Module, output: Any) -> Routing:
        """Undo the sort: the n-th sorted assignment has slot ``index_sorted[n]`` and the expert whose run holds n."""
        order_N, _, _, expert_size, logits_TE = output
        size_E = torch.tensor(expert_size, device=order_N.device)
        expert_N = torch.repeat_interleave(torch.arange(len(expert_size), device=order_N.device), size_E)
        index_N = torch.empty_like(order_N).scatter_(0, order_N, expert_N)
        return Routing(logits_TE, index_N.view(-1, self.top_k(router)), None)

    def reroute(self, router: nn.Module, call: RouterCall) -> Any:
        """Choose with ``z + beta`` and sort the dispatch as the native router does."""
        k, logits_TE = self.top_k(router), call.output[4]
        gates_TK, index_TK = self.rule.route(router, call, k=k, bias_E=None, dtype=call.output[2].dtype)
        order_N = index_TK.flatten().sort(0)[1]
        expert_size = torch.bincount(index_TK.flatten(), minlength=logits_TE.shape[-1]).tolist()
        return order_N, order_N.div(k, rounding_mode="trunc"), gates_TK.flatten()[order_N], expert_size, logits_TE


@dataclass(frozen=True, kw_only=True)
class Llama4Adapter(Adapter):
    """Returns ``(dense scores [T, E], logits [T, E])``; the scores of experts that were not chosen are exactly 0."""

    def read(self, router: nn.Module, output: Any) -> Routing:
        """The chosen experts are those with the k largest dense scores."""
        score_TE, logits_TE = output
        return Routing(logits_TE, torch.topk(score_TE.detach(), self.top_k(router), dim=-1)[1], None)

    def reroute(self, router: nn.Module, call: RouterCall) -> Any:
        """Choose with ``z + beta`` and scatter the sigmoid of the chosen logits into a dense matrix."""
        score_TE, logits_TE = call.output
        lensed_TE = lensed_logits(call)
        biased_TE = lensed_TE + call.beta_E
        index_TK = call.chosen(torch.topk(biased_TE, self.top_k(router), dim=-1)[1])
        chosen_TK = (biased_TE if call.scope == "routing" else lensed_TE).gather(-1, index_TK)
        dense_TE = torch.full_like(lensed_TE, float("-inf")).scatter(-1, index_TK, chosen_TK)
        return torch.sigmoid(dense_TE).to(score_TE.dtype), logits_TE


_GRANITE = (
    ("granitemoe", "GraniteMoeTopKRouter"),
    ("granitemoe_swa", "GraniteMoeSWATopKRouter"),
    ("granitemoehybrid", "GraniteMoeHybridTopKRouter"),
    ("granitemoeshared", "GraniteMoeSharedTopKRouter"),
)
_NO_EXPERTS_MODULE = (
    "jetmoe has no experts module: its experts are two linears that work on rows already sorted by expert"
)
_SCALED_INPUT = "llama4 multiplies the input of its experts by the weight, so an expert has no unweighted output"

ADAPTERS = (
    Adapter(
        family="gpt_oss",
        router_class="GptOssTopKRouter",
        rule=SOFTMAX,
        linear_bias_at="bias",
    ),
    Adapter(
        family="openai_privacy_filter",
        router_class="OpenAIPrivacyFilterTopKRouter",
        rule=TopKSquash("softmax", divisor="top_k"),
        linear_bias_at="bias",
    ),
    *(Adapter(family=family, router_class=name, rule=SOFTMAX) for family, name in _GRANITE),
    Adapter(family="aria", router_class="AriaTextTopKRouter", rule=SOFTMAX),
    Adapter(
        family="cohere2_moe",
        router_class="Cohere2MoeTopKRouter",
        rule=TopKSquash("@expert_selection_fn", renorm=Renorm("sum", when="norm_topk_prob")),
    ),
    Adapter(
        family="kolibri1",
        router_class="Kolibri1TopKRouter",
        rule=TopKSquash("sigmoid", renorm=Renorm("sum", when="norm_topk_prob")),
        bias_at="e_score_correction_bias",
        notes="the native bias is in logit units",
    ),
    JetMoeAdapter(
        family="jetmoe",
        router_class="JetMoeTopKGating",
        rule=SOFTMAX,
        logits_index=4,
        weight_at="layer.weight",
        experts=None,
        experts_call="none",
        refuse={"coherence": _NO_EXPERTS_MODULE},
        notes="attention is routed too (self_attention.experts.router)",
    ),
    Llama4Adapter(
        family="llama4",
        router_class="Llama4Router",
        rule=TopKSquash("sigmoid"),
        logits_index=1,
        weights_index=0,
        experts_call="llama4",
        refuse={"coherence": _SCALED_INPUT},
    ),
)
