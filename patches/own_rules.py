"""Routers that follow neither parametric rule to the letter: Inkling, Zaya, Gemma 4, DBRX, NLLB-MoE.

Doge, which routes without a router module, is refused here by name.

Shape suffixes: T tokens, E router classes, K experts per token, N shared experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chronomoe_hf.errors import ContractError
from chronomoe_hf.patches.registry import Adapter, ObserveOnly, module_of
from chronomoe_hf.patches.rules import Renorm, ScoreTopK
from chronomoe_hf.router.state import RouterCall, Routing, input_of

TOP_K = "_chrono_top_k"
"""Plain attribute of a DBRX router that holds the k of its parent."""


@dataclass(frozen=True, kw_only=True)
class InklingAdapter(Adapter):
    """Chosen and shared logits share one softmax of log-sigmoids; returns ``(logits, weights, ids, shared gammas)``."""

    def weight(self, router: Any) -> Tensor:
        """Return the rows of the routed experts ``[E, D]`` (a view: the last rows belong to shared experts)."""
        rows_ED: Tensor = router.weight[: router.num_experts]
        return rows_ED

    def reroute(self, router: Any, call: RouterCall) -> Any:
        """Choose by sigmoid plus bias, weigh against the shared experts, whose logits beta does not touch."""
        hidden = input_of(call.args, call.kwargs, "hidden_states")
        logits_TE, dtype = call.output[0], call.output[1].dtype
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            # The same product as in the native forward: a product of the shared rows alone may round differently.
            full_TE = F.linear(hidden.reshape(-1, router.hidden_dim).float(), router.weight.float())
            routed_TE, shared_TN = full_TE.split((router.num_experts, router.n_shared_experts), dim=-1)
            lensed_TE = routed_TE + (call.logits_TE.float() - logits_TE)  # zero, but where experts are masked
            if call.shift_TE is not None:
                lensed_TE = lensed_TE + call.shift_TE
            biased_TE = lensed_TE + call.beta_E
            bias_E = self._bias_of_call(router, call)
            assert bias_E is not None
            index_TK = torch.topk(biased_TE.sigmoid() + bias_E.float(), router.top_k, dim=-1, sorted=False)[1]
            index_TK = call.chosen(index_TK)
            chosen_TK = (biased_TE if call.scope == "routing" else lensed_TE).gather(-1, index_TK)
            log_p = F.logsigmoid(torch.cat([chosen_TK, shared_TN], dim=-1))
            weights = torch.exp(log_p - torch.logsumexp(log_p, dim=-1, keepdim=True))
            weights = (weights * router.route_scale * router.global_scale.float()).to(dtype)
        shared = weights[..., -router.n_shared_experts :].contiguous()
        return logits_TE, weights[..., : router.top_k].contiguous(), index_TK, shared


@dataclass(frozen=True, kw_only=True)
class ZayaAdapter(Adapter):
    """E + 1 classes, the last of which skips the experts; the block sees a skipped slot as expert 0 with weight 0.

    `num_experts` counts the skip class, and `read` gives skipped slots its id, so that counts say what was decided.
    """

    def read(self, router: Any, output: Any) -> Routing:
        """A weight of exactly 0 marks a skipped slot."""
        logits, weights_TK, index_TK = output[:3]
        skip = router.num_router_classes - 1
        return Routing(logits, index_TK.masked_fill(weights_TK.detach() == 0, skip), None)

    def reroute(self, router: Any, call: RouterCall) -> Any:
        """Choose among all classes, then mask the skip class as the native router does."""
        logits, weights_TK, index_TK, states = super().reroute(router, call)
        skipped_TK = index_TK == router.num_router_classes - 1
        return logits, weights_TK.masked_fill(skipped_TK, 0), index_TK.masked_fill(skipped_TK, 0), states


@dataclass(frozen=True, kw_only=True)
class GemmaAdapter(Adapter):
    """Records probabilities instead of logits; weights are renormalised and scaled per expert."""

    def read(self, router: nn.Module, output: Any) -> Routing:
        """Logits are log-probabilities: the true logits up to one constant per token, which no choice depends on."""
        prob_TE, _, index_TK = output
        return Routing(prob_TE.clamp_min(torch.finfo(prob_TE.dtype).tiny).log(), index_TK, None)

    def masked(self, output: Any, dropped_E: Tensor) -> tuple[Any, float]:
        """The probabilities among the other experts: the family hands those on, and steers by their change."""
        prob_TE = output[0].masked_fill(dropped_E, 0.0)
        total_T1 = prob_TE.sum(-1, keepdim=True).clamp_min(torch.finfo(prob_TE.dtype).tiny)
        return (prob_TE / total_T1, *output[1:]), 0.0

    def reroute(self, router: Any, call: RouterCall) -> Any:
        """Move the native probabilities by what beta changes: exact at beta = 0 although the logits are gone."""
        prob_TE, z_TE = call.output[0], call.logits_TE
        biased_TE = prob_TE + (F.softmax(z_TE + call.beta_E, dim=-1) - F.softmax(z_TE, dim=-1))
        index_TK = call.chosen(torch.topk(biased_TE, self.top_k(router), dim=-1)[1])
        w_TK = (biased_TE if call.scope == "routing" else prob_TE).gather(-1, index_TK)
        w_TK = w_TK / w_TK.sum(dim=-1, keepdim=True)
        return prob_TE, w_TK * router.per_expert_scale[index_TK], index_TK


@dataclass(frozen=True, kw_only=True)
class DbrxAdapter(ObserveOnly):
    """Returns the logits alone; its parent softmaxes them in their dtype and takes the top k."""

    def bind(self, router: nn.Module, parent: Any) -> None:
        """Remember the parent's k."""
        router.__dict__[TOP_K] = int(parent.top_k)

    def unbind(self, router: nn.Module) -> None:
        """Forget it."""
        router.__dict__.pop(TOP_K, None)

    def num_experts(self, router: Any) -> int:
        """Return the rows of the weight: the router keeps no count."""
        return int(router.layer.out_features)  # not the weight's rows: a packed weight has others

    def top_k(self, router: nn.Module) -> int:
        """Return the parent's k. Raises ContractError before `bind`."""
        if TOP_K not in router.__dict__:
            raise ContractError("a DBRX router does not know its k: call adapter.bind(router, parent) first")
        k: int = router.__dict__[TOP_K]
        return k

    def read(self, router: nn.Module, output: Any) -> Routing:
        """Repeat the parent's choice."""
        index_TK = torch.topk(F.softmax(output.detach(), dim=1, dtype=output.dtype), self.top_k(router), dim=-1)[1]
        return Routing(output, index_TK, None)


@dataclass(frozen=True, kw_only=True)
class NllbAdapter(ObserveOnly):
    """Top-2 with a capacity over the flattened batch.

    Returns ``(top-1 mask after capacity, gates after capacity, logits)``, all ``[T, E]``.
    """

    def read(self, router: Any, output: Any) -> Routing:
        """First choice: argmax of the probabilities; second: of the other logits. Kept where the gate is above zero.

        A second expert policy that samples (not ``"all"``) can only be read where the assignment was kept.
        """
        mask_TE, gate_TE, logits_TE = output
        prob_TE = F.softmax(logits_TE.detach(), dim=-1, dtype=router.dtype).to(gate_TE.dtype)
        first_T1 = prob_TE.argmax(dim=-1, keepdim=True)
        second_TE = gate_TE.detach() * (mask_TE == 0)
        rest_T1 = logits_TE.detach().scatter(-1, first_T1, float("-inf")).argmax(dim=-1, keepdim=True)
        kept2_T1 = second_TE.scatter(-1, first_T1, 0.0).sum(dim=-1, keepdim=True) > 0
        second_T1 = torch.where(kept2_T1, second_TE.scatter(-1, first_T1, 0.0).argmax(dim=-1, keepdim=True), rest_T1)
        kept1_T1 = mask_TE.gather(-1, first_T1) > 0
        return Routing(logits_TE, torch.cat((first_T1, second_T1), dim=-1), torch.cat((kept1_T1, kept2_T1), dim=-1))


_ZAYA = "zaya's logits come from an MLP over projected and carried states, so they are not linear in the router's input"
_ZAYA_SKIP = (
    "zaya hands skipped tokens to expert 0 with weight 0, so the experts module cannot tell its own tokens apart"
)
_GEMMA = "the router normalises its input, so its logits are not linear in it"
_DBRX = "dbrx chooses in its block from the logits that Transformers records: a bias would falsify output_router_logits"
_NLLB = "nllb_moe runs only experts 0 and 1, whatever its router says (Transformers 5.23): steering it means nothing"
_DBRX_REPLAY = "dbrx chooses in its block, after its router: recorded ids could not be put in the place of that choice"
_NLLB_REPLAY = "nllb_moe runs only experts 0 and 1, whatever its router says (Transformers 5.23): no choice to repeat"

ADAPTERS = (
    InklingAdapter(
        family="inkling",
        router_class="InklingTopkRouter",
        rule=ScoreTopK(score="sigmoid32"),
        bias_at="e_score_correction_bias",
    ),
    ZayaAdapter(
        family="zaya",
        router_class="ZayaRouter",
        rule=ScoreTopK(score="softmax"),
        linear=False,
        num_experts_at="num_router_classes",
        weight_at="router_mlp.out_proj.weight",
        bias_at="balancing_biases",
        refuse={"lens": _ZAYA, "fold": _ZAYA, "coherence": _ZAYA_SKIP},
        notes="the weight is the last linear of the router's MLP; the last class skips the experts",
    ),
    *(
        GemmaAdapter(
            family=family,
            router_class=router_class,
            rule=ScoreTopK(score="softmax32", renorm=Renorm("sum")),
            linear=False,
            num_experts_at="config.num_experts",
            top_k_at="config.top_k_experts",
            weight_at="proj.weight",
            refuse={"lens": _GEMMA, "fold": _GEMMA},
            notes="index 0 of the output holds probabilities; the experts get another input than the router",
        )
        for family, router_class in (("gemma4", "Gemma4TextRouter"), ("diffusion_gemma", "DiffusionGemmaTextRouter"))
    ),
    DbrxAdapter(
        family="dbrx",
        router_class="DbrxRouter",
        rule=ScoreTopK(score="softmax"),
        logits_index=None,
        weight_at="layer.weight",
        experts_call="dbrx",
        refuse={"beta": _DBRX, "lens": _DBRX, "fold": _DBRX, "replay": _DBRX_REPLAY},
    ),
    NllbAdapter(
        family="nllb_moe",
        router_class="NllbMoeTop2Router",
        rule=ScoreTopK(score="softmax32"),
        logits_index=2,
        top_k_at=2,
        weight_at="classifier.weight",
        experts_call="none",
        refuse={"beta": _NLLB, "lens": _NLLB, "fold": _NLLB, "coherence": _NLLB, "replay": _NLLB_REPLAY},
    ),
)

REFUSED = {
    (
        module_of("doge"),
        "DogeCDMoE",
    ): "doge routes by product keys inside its feed-forward block, without a router module",
    (
        "transformers.integrations.mxfp4",
        "Mxfp4GptOssMLP",
    ): "its MXFP4 kernels read the router's weight and never call the router; load with Mxfp4Config(dequantize=True)",
}
"""Blocks that never call a router module: (module, class) -> reason. A router inside one is left alone too."""
