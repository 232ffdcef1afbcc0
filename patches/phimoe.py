"""Phi-3.5-MoE: SparseMixer (Liu et al., arXiv:2409.12136). Shape suffixes: T tokens, E experts, 1 one expert per token.

In training the router *samples* its experts and estimates the gradient of the sampling. Steering repeats the sampling
with the same random numbers, so the class of a wrapped router remembers the random state before its native forward.

Experts that are *given* (replay) are weighed as in evaluation mode: in training the native router multiplies the weight
of a sampled expert by 1 or by a third, at random, and no two passes would agree. The gradient is the native one, which
does not know of that factor. The random numbers that the choice would have taken are taken all the same.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from chronomoe_hf.errors import ContractError
from chronomoe_hf.patches.registry import Adapter, module_of
from chronomoe_hf.patches.scores import softmax_distribution
from chronomoe_hf.router.state import RouterCall, input_of, lensed_logits

RNG_STATE = "_chrono_rng_state"
"""Plain attribute of the router that holds the random state from before its last training forward."""


class ReplayRandomness(nn.Module):
    """Mixin placed before the native router: remembers the random state with which a training forward began."""

    def forward(self, hidden_states: Tensor) -> Any:
        """The native forward."""
        if self.training:
            self.__dict__[RNG_STATE] = _generator(hidden_states.device).get_state()
        return super().forward(hidden_states)  # type: ignore[misc]


def _generator(device: torch.device) -> torch.Generator:
    """Return the default generator of a device: the one that ``uniform_`` and ``rand_like`` use."""
    if device.type == "cpu":
        return torch.default_generator
    index = device.index if device.index is not None else torch.get_device_module(device).current_device()
    generator: torch.Generator = torch.get_device_module(device).default_generators[index]
    return generator


class SparsemixerRule:
    """Softmax over the experts near the maximum; sampled in training."""

    def bias_slope(self, num_experts: int) -> float:
        """PhiMoE has no native bias; one would be added to the logits."""
        return 1.0

    def distribution(self, router: nn.Module, logits_TE: Tensor) -> Tensor:
        """Softmax over all experts, fp32 ``[T, E]``: the law before the threshold."""
        return softmax_distribution(logits_TE)

    def route(
        self, router: Any, call: RouterCall, *, k: int, bias_E: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Repeat SparseMixer. Beta is rounded to ``dtype``, that of the logits: the native threshold is taken in it."""
        lensed_TE = lensed_logits(call)
        biased_TE = (lensed_TE + call.beta_E).to(dtype)
        weigh_TE = biased_TE if call.scope == "routing" else lensed_TE.to(dtype)
        multiplier = sys.modules[module_of("phimoe")].PhimoeMultiplier if router.training else None
        jitter = router.router_jitter_noise
        given = (None, None) if call.index_TK is None else (call.index_TK[:, :1], call.index_TK[:, 1:])
        own_T1 = call.own_T1
        first = _mix(biased_TE, weigh_TE, biased_TE, weigh_TE, jitter, multiplier, given=given[0], own_T1=own_T1)
        rest = biased_TE.scatter(-1, first[1], float("-inf")), weigh_TE.scatter(-1, first[1], float("-inf"))
        second = _mix(*rest, biased_TE, weigh_TE, jitter, multiplier, draws=2, given=given[1], own_T1=own_T1)
        return torch.cat((first[0], second[0]), dim=-1), torch.cat((first[1], second[1]), dim=-1)


def _far(score_TE: Tensor, all_TE: Tensor, jitter: float) -> tuple[Tensor, Tensor]:
    """Return ``(best_T1, mask_TE)``: the best expert, and where a score is too far below it to take part."""
    with torch.no_grad():
        top_T1, best_T1 = score_TE.max(dim=-1, keepdim=True)
        return best_T1, (top_T1 - all_TE) / all_TE.abs().clamp(min=top_T1) > 2 * jitter


def _mix(
    choose_TE: Tensor,
    weigh_TE: Tensor,
    choose_all_TE: Tensor,
    weigh_all_TE: Tensor,
    jitter: float,
    multiplier: Any,
    draws: int = 1,
    given: Tensor | None = None,
    own_T1: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose one expert from ``choose`` and weigh it with ``weigh``.

    ``*_all`` are the scores before the first choice left. ``multiplier`` is the native gradient estimator in training,
    None in evaluation. ``draws`` is how often the native code fills its last random tensor; the last filling counts.
    ``given`` are the experts to choose instead, but in the rows of ``own_T1``. Returns ``(weight_T1, index_T1)``.
    """
    best_T1, far_TE = _far(choose_TE, choose_all_TE, jitter)
    if multiplier is not None:
        gate_TE = choose_TE.masked_fill(far_TE, float("-inf"))
        noise_TE = torch.empty_like(gate_TE, memory_format=torch.legacy_contiguous_format).exponential_().log()
        best_T1 = (gate_TE - noise_TE).max(dim=-1)[1].unsqueeze(-1)
    if given is not None and own_T1 is not None:
        best_T1 = torch.where(own_T1, best_T1, given)
    # Beta may choose an expert below the clean threshold: a chosen expert always takes part in the weights.
    far_TE = _far(weigh_TE, weigh_all_TE, jitter)[1].scatter(-1, best_T1, False)
    gate_TE = torch.softmax(weigh_TE.masked_fill(far_TE, float("-inf")), dim=-1)
    weight_T1 = gate_TE.gather(-1, best_T1)
    if multiplier is None:
        return weight_T1, best_T1
    top_T1, first_T1 = gate_TE.max(dim=-1, keepdim=True)
    for _ in range(draws):
        coin_T1 = torch.rand_like(top_T1)
    one_T1 = torch.logical_or(best_T1 == first_T1, coin_T1 > 0.75)
    if own_T1 is not None:
        one_T1 = one_T1 | ~own_T1
    one_T1 = torch.add(0.3333, one_T1, alpha=0.6667).type_as(gate_TE)
    return multiplier.apply(weigh_all_TE, weight_T1, best_T1, gate_TE, one_T1), best_T1


@dataclass(frozen=True, kw_only=True)
class PhimoeAdapter(Adapter):
    """Replays the random numbers of the native forward before it chooses again."""

    def reroute(self, router: nn.Module, call: RouterCall) -> Any:
        """See `Adapter.reroute`. Raises ContractError in training when the random state was not remembered."""
        if router.training:
            self._rewind(router, input_of(call.args, call.kwargs, "hidden_states"))
        # The threshold is taken in the dtype of the logits; under autocast the weights have another one.
        w_T2, index_T2 = self.rule.route(router, call, k=2, bias_E=None, dtype=call.output[0].dtype)
        return call.output[0], w_T2, index_T2

    def unbind(self, router: nn.Module) -> None:
        """Forget the random state."""
        router.__dict__.pop(RNG_STATE, None)

    def _rewind(self, router: Any, hidden_states: Tensor) -> None:
        state = router.__dict__.get(RNG_STATE)
        if state is None:
            raise ContractError(
                "PhimoeTopKRouter samples its experts in training and its random state was not remembered; "
                "wrap its model with chronomoe_hf.wrap(model) before it is trained"
            )
        _generator(hidden_states.device).set_state(state)
        if router.input_jitter_noise > 0:
            torch.empty_like(hidden_states).uniform_()  # the numbers that the input jitter took


ADAPTERS = (
    PhimoeAdapter(
        family="phimoe",
        router_class="PhimoeTopKRouter",
        rule=SparsemixerRule(),
        top_k_at=2,
        samples=True,
        mixins=(ReplayRandomness,),
        notes="samples in training; exactly two experts per token; beta is rounded to the dtype of the logits",
    ),
)
