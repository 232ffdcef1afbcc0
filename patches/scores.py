"""Score functions of routers, their distributions, and the scores of biased logits.

Shape suffixes: T tokens, E router classes (experts).

Scores of ``z + beta`` must be those of ``z``, bit for bit and with the same gradients, when ``beta == 0``:

* beta is added in fp32, because a bf16 sum would swallow a small beta;
* where a family scores in the dtype of its logits, the native score is kept and only the *difference* that beta makes
  is added in fp32: ``score(z) + (score(z.float() + beta) - score(z.float()))``. The bracket is exactly zero, and so is
  its gradient, at ``beta == 0``. What an open lens adds to the logits is treated alike: a shift of 0 changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from chronomoe_hf.router.state import RouterCall, lensed_logits

ScoreFn: TypeAlias = Callable[[Tensor], Tensor]


def _softmax32(z_TE: Tensor) -> Tensor:
    return F.softmax(z_TE, dim=-1, dtype=torch.float)


def _softmax(z_TE: Tensor) -> Tensor:
    return F.softmax(z_TE, dim=-1)


def _sigmoid32(z_TE: Tensor) -> Tensor:
    return z_TE.float().sigmoid()


SCORES: dict[str, ScoreFn] = {
    "softmax32": _softmax32,
    "softmax": _softmax,
    "sigmoid32": _sigmoid32,
    "sigmoid": torch.sigmoid,
}
"""Score functions by name; the ones ending in 32 compute in fp32 whatever the dtype of the logits."""


def softmax_distribution(logits_TE: Tensor) -> Tensor:
    """Softmax over all experts in fp32, ``[T, E]``; rows sum to 1."""
    return F.softmax(logits_TE.float(), dim=-1)


def sigmoid_distribution(logits_TE: Tensor) -> Tensor:
    """Sigmoid scores divided by their row sum, fp32 ``[T, E]``; rows sum to 1.

    Taken as ``softmax(log sigmoid(z))``, which stays finite where every score underflows.
    """
    return F.softmax(F.logsigmoid(logits_TE.float()), dim=-1)


def normalised_distribution(score: ScoreFn, logits_TE: Tensor) -> Tensor:
    """Non-negative scores of any function divided by their row sum, fp32 ``[T, E]``; uniform where all are zero."""
    score_TE = score(logits_TE.float())
    total_T1 = score_TE.sum(dim=-1, keepdim=True)
    uniform_TE = torch.full_like(score_TE, 1.0 / score_TE.shape[-1])
    return torch.where(total_T1 > 0, score_TE / total_T1.clamp_min(torch.finfo(torch.float).tiny), uniform_TE)


def steered_scores(score: ScoreFn, call: RouterCall, bias_E: Tensor | None, *, fp32: bool) -> tuple[Tensor, Tensor]:
    """Scores of the steered logits: what is ranked (with the native bias) and what is weighed.

    Args:
        score: the family's score function.
        call: logits, beta, the lens's shift and the scope.
        bias_E: the native balancing bias in score units, or None.
        fp32: the score is computed in fp32 whatever the dtype of the logits.

    Returns:
        ``(choice_TE, weight_TE)``; ``choice_TE`` is fp32, ``weight_TE`` has the dtype of the native scores.
    """
    z_TE, lensed_TE = call.logits_TE, lensed_logits(call)
    if fp32 or z_TE.dtype == torch.float:
        score_TE = score(lensed_TE + call.beta_E)
        weight_TE = score_TE if call.scope == "routing" else score(lensed_TE)
        return (score_TE if bias_E is None else score_TE + bias_E), weight_TE
    native_TE, native32_TE = score(z_TE), score(z_TE.float())
    delta_TE = score(lensed_TE + call.beta_E) - native32_TE
    choice_TE = (native_TE if bias_E is None else native_TE + bias_E).float() + delta_TE
    if call.scope == "selection":
        if call.shift_TE is None:
            return choice_TE, native_TE
        delta_TE = score(lensed_TE) - native32_TE
    return choice_TE, (native_TE.float() + delta_TE).to(native_TE.dtype)
