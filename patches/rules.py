"""How routers choose: the two rules that cover almost every family, as pure functions and as stated parameters.

Shape suffixes: T tokens, E router classes (experts), K experts chosen per token, G expert groups.

Both rules take a `RouterCall`: the native logits, beta (fp32, logit units) and what a lens adds. They are written so
that a beta and a shift of 0 reproduce the native router bit for bit, values and gradients;
`chronomoe_hf.patches.scores` says how.

Rules: score -> top-k (Shazeer et al. 2017; DeepSeek-V3, arXiv:2412.19437, for bias and group limit) and
top-k -> squash (gpt-oss, Granite).
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chronomoe_hf.patches.scores import (
    SCORES,
    ScoreFn,
    normalised_distribution,
    sigmoid_distribution,
    softmax_distribution,
    steered_scores,
)
from chronomoe_hf.router.state import RouterCall, lensed_logits

Setting: TypeAlias = str | int | float | bool | None
"""A constant, or (str) the dotted path of the router attribute that holds the value."""


def setting(router: nn.Module, value: Setting) -> Any:
    """Return a stated parameter: the constant itself, or the router attribute that a dotted path names."""
    return attrgetter(value)(router) if isinstance(value, str) else value


@dataclass(frozen=True)
class Renorm:
    """How the chosen scores are rescaled: ``w / sum``, ``w / (sum + eps)`` or ``w / clamp(sum, min=eps)``.

    Attributes:
        kind: ``"sum"``, ``"sum_eps"`` or ``"clamp"``.
        when: whether it applies at all (a flag of the router, or a constant).
        eps: the constant of the last two kinds.
    """

    kind: Literal["sum", "sum_eps", "clamp"] = "sum"
    when: Setting = True
    eps: Setting = None

    def __call__(self, router: nn.Module, w_TK: Tensor) -> Tensor:
        """Rescale the chosen scores ``[T, K]``."""
        if not setting(router, self.when):
            return w_TK
        total_T1 = w_TK.sum(dim=-1, keepdim=True)
        if self.kind == "sum_eps":
            total_T1 = total_T1 + setting(router, self.eps)
        elif self.kind == "clamp":
            total_T1 = torch.clamp(total_T1, min=setting(router, self.eps))
        return w_TK / total_T1


@dataclass(frozen=True)
class GroupLimit:
    """Only experts of the best ``keep`` of ``groups`` groups may be chosen (DeepSeek-V2, arXiv:2405.04434).

    Attributes:
        reduce: score of a group: its best expert (``"max"``) or the sum of its two best (``"top2"``).
        fill: what the scores outside the kept groups become.
        groups, keep: router attributes; no limit where ``groups`` is None.
        when: ``(attribute, value)`` that switches the limit on; None means always.
        fill_weights: whether weights are read from the filled scores too (DeepSeek-V2).
    """

    reduce: Literal["max", "top2"] = "top2"
    fill: float = float("-inf")
    groups: Setting = "num_group"
    keep: Setting = "topk_group"
    when: tuple[str, object] | None = None
    fill_weights: bool = False

    def mask(self, router: nn.Module, choice_TE: Tensor, sort: bool) -> Tensor | None:
        """Return the bool mask ``[T, E]`` of experts that stay eligible, or None when the limit is off."""
        groups = setting(router, self.groups)
        if groups is None or (self.when is not None and setting(router, self.when[0]) != self.when[1]):
            return None
        choice_TGE = choice_TE.view(choice_TE.shape[0], groups, choice_TE.shape[-1] // groups)
        if self.reduce == "max":
            group_TG = choice_TGE.max(dim=-1).values
        else:
            group_TG = choice_TGE.topk(2, dim=-1)[0].sum(dim=-1)
        kept = torch.topk(group_TG, k=setting(router, self.keep), dim=-1, sorted=sort)[1]
        mask_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter_(1, kept, True)
        return mask_TG.unsqueeze(-1).expand_as(choice_TGE).reshape(choice_TE.shape)


class Rule(Protocol):
    """What an adapter needs of a rule."""

    def route(
        self, router: nn.Module, call: RouterCall, *, k: int, bias_E: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return ``(weights_TK, index_TK)`` chosen with ``z + beta``; weights in ``dtype``, indices int64."""
        ...

    def distribution(self, router: nn.Module, logits_TE: Tensor) -> Tensor:
        """Return the score distribution over all experts, fp32 ``[T, E]``, rows summing to 1."""
        ...

    def bias_slope(self, num_experts: int) -> float:
        """Return how much the quantity that a native bias is added to moves per unit of logit, typically."""
        ...


@dataclass(frozen=True)
class ScoreTopK:
    """Score all experts, add the native bias, limit groups, take the top k, gather, renormalise, scale, cast.

    Attributes:
        score: a key of `SCORES`, or ``"@name"`` for the router attribute that holds the function.
        sort: ``sorted=`` of the native ``topk`` (it decides the order of the slots).
        renorm, group: see `Renorm`, `GroupLimit`; None means the step does not exist.
        scale: factor on the weights; None means the step does not exist.
    """

    score: str = "softmax32"
    sort: bool = True
    renorm: Renorm | None = None
    group: GroupLimit | None = None
    scale: Setting = None

    def score_fn(self, router: nn.Module) -> ScoreFn:
        """Return the score function: one of `SCORES`, or the router's own."""
        return setting(router, self.score[1:]) if self.score.startswith("@") else SCORES[self.score]

    def bias_slope(self, num_experts: int) -> float:
        """Softmax scores move by p (1 - p), about 1 / E near balance; sigmoid-like ones by a quarter at most."""
        return 1.0 / num_experts if self.score in ("softmax", "softmax32") else 0.25

    def route(
        self, router: nn.Module, call: RouterCall, *, k: int, bias_E: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Score -> (+ native bias) -> (group limit) -> top-k -> gather -> renormalise -> scale -> cast.

        Args:
            router: the native router, for the settings that the rule names.
            call: logits to route with, beta, the lens's shift, the scope, and the ids to choose where they are given.
            k: experts per token.
            bias_E: native bias, ``[E]``, in score units.
            dtype: dtype of the native weights.

        Returns:
            ``(weights_TK, index_TK)``.
        """
        choice_TE, weight_TE = steered_scores(self.score_fn(router), call, bias_E, fp32=self.score.endswith("32"))
        if self.group is not None:
            mask_TE = self.group.mask(router, choice_TE, self.sort)
            if mask_TE is not None:
                choice_TE = choice_TE.masked_fill(~mask_TE, self.group.fill)
                if self.group.fill_weights:
                    # An expert that is given keeps its score: the engine that chose it may have kept other groups.
                    own_T1 = call.own_T1
                    out_TE = ~mask_TE if own_T1 is None else ~mask_TE & own_T1
                    weight_TE = weight_TE.masked_fill(out_TE, self.group.fill)
        index_TK = call.chosen(torch.topk(choice_TE, k, dim=-1, sorted=self.sort)[1])
        w_TK = weight_TE.gather(-1, index_TK)
        if self.renorm is not None:
            w_TK = self.renorm(router, w_TK)
        if self.scale is not None:
            w_TK = w_TK * setting(router, self.scale)
        return w_TK.to(dtype), index_TK

    def distribution(self, router: nn.Module, logits_TE: Tensor) -> Tensor:
        """Score distribution without native bias and group limit, fp32 ``[T, E]``, rows summing to 1."""
        if self.score in ("softmax", "softmax32"):
            return softmax_distribution(logits_TE)
        if self.score in ("sigmoid", "sigmoid32"):
            return sigmoid_distribution(logits_TE)
        return normalised_distribution(self.score_fn(router), logits_TE)


@dataclass(frozen=True)
class TopKSquash:
    """Take the top k of the logits (plus the native bias), squash the chosen logits, renormalise, divide, cast.

    Attributes:
        squash: ``"softmax"`` or ``"sigmoid"`` of the chosen logits, or ``"@name"``: the router attribute that says.
        renorm: see `Renorm`; applies to sigmoid only.
        divisor: the weights are divided by it; None means the step does not exist.
    """

    squash: str = "softmax"
    renorm: Renorm | None = None
    divisor: Setting = None

    def bias_slope(self, num_experts: int) -> float:
        """The native bias is added to the logits themselves."""
        return 1.0

    def squash_name(self, router: nn.Module) -> str:
        """Return ``"softmax"`` or ``"sigmoid"``."""
        return str(setting(router, self.squash[1:])) if self.squash.startswith("@") else self.squash

    def route(
        self, router: nn.Module, call: RouterCall, *, k: int, bias_E: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """(Logits + native bias) -> top-k -> squash the chosen logits -> renormalise -> divide.

        Arguments as in `ScoreTopK.route`. The native bias is in logit units here, and is not part of the weights.
        """
        lensed_TE = lensed_logits(call)
        biased_TE = lensed_TE + call.beta_E
        index_TK = call.chosen(torch.topk(biased_TE if bias_E is None else biased_TE + bias_E, k, dim=-1)[1])
        chosen_TK = (biased_TE if call.scope == "routing" else lensed_TE).gather(-1, index_TK)
        if self.squash_name(router) == "softmax":
            w_TK = F.softmax(chosen_TK, dim=-1).to(dtype)
        else:
            w_TK = chosen_TK.sigmoid().to(dtype)
            if self.renorm is not None:
                w_TK = self.renorm(router, w_TK)
        return (w_TK if self.divisor is None else w_TK / setting(router, self.divisor)), index_TK

    def distribution(self, router: nn.Module, logits_TE: Tensor) -> Tensor:
        """The squash over *all* experts (sigmoid: normalised), fp32 ``[T, E]``, rows summing to 1."""
        return (softmax_distribution if self.squash_name(router) == "softmax" else sigmoid_distribution)(logits_TE)


SOFTMAX_BY_FLAG = ScoreTopK(score="softmax32", renorm=Renorm("sum", when="norm_topk_prob"))
"""Softmax in fp32, top-k, renormalised where the router says so: Qwen, OLMoE and many more."""

EPS20 = Renorm("sum_eps", eps=1e-20)
"""Divided by the sum plus 1e-20."""

EPS20_BY_FLAG = Renorm("sum_eps", when="norm_topk_prob", eps=1e-20)
"""The same where the router says so: DeepSeek-V3 and its relatives."""
