"""The LM head and its cross-entropy in one function that never holds all logits: a quarter of a small model's step.

Chunks of tokens small enough for the processor's cache go through head, softmax and both backward products at once.
On a processor with bf16 matrix units the products round their inputs to bf16; sums, softmax and gradients are fp32.

Legend: T tokens, C tokens of a chunk, D hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

CHUNK = 256


class _HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of ``hidden @ weight.T`` against labels; its gradients are computed in the forward."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, label_T: Tensor, low: bool) -> Tensor:
        dtype = torch.bfloat16 if low else torch.float32
        keep_T = label_T >= 0
        count = keep_T.sum().clamp_min(1)
        head_VD = weight_VD.to(dtype)
        grad_TD, grad_VD = torch.empty_like(hidden_TD), torch.zeros_like(weight_VD)
        total = torch.zeros(())
        for start in range(0, len(label_T), CHUNK):
            at = slice(start, start + CHUNK)
            part_CD = hidden_TD[at].to(dtype)
            target_C1 = label_T[at, None].clamp_min(0)
            logit_CV = (part_CD @ head_VD.T).float()
            prob_CV = logit_CV.softmax(-1)
            # log p of the label, without a second pass over the logits
            log_C1 = prob_CV.gather(-1, target_C1).clamp_min_(1e-38).log_()
            total -= (log_C1 * keep_T[at, None]).sum()
            prob_CV.scatter_add_(-1, target_C1, torch.full_like(log_C1, -1.0))
            slope_CV = prob_CV.mul_(keep_T[at, None] / count).to(dtype)
            grad_TD[at] = slope_CV @ head_VD
            grad_VD += slope_CV.T @ part_CD
        ctx.save_for_backward(grad_TD, grad_VD)
        return total / count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_TD, grad_VD = ctx.saved_tensors
        return grad_TD * grads[0], grad_VD * grads[0], None, None


class FastHead(nn.Module):
    """In place of a model's LM head: hands the hidden state through in training and is the plain head otherwise."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight = head.weight
        self.low = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_amx_tile_supported()

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return hidden_BTD if self.training else nn.functional.linear(hidden_BTD, self.weight)

    def loss(self, logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
        """What Transformers calls ``loss_function`` with: labels are shifted here."""
        if not self.training:
            flat_TV = logits[:, :-1].reshape(-1, vocab_size).float()
            return nn.functional.cross_entropy(flat_TV, labels[:, 1:].reshape(-1))
        hidden_TD = logits[:, :-1].reshape(-1, logits.shape[-1])
        return _HeadLoss.apply(hidden_TD, self.weight, labels[:, 1:].reshape(-1), self.low)


def use_fast_head(model: PreTrainedModel) -> None:
    """Put a :class:`FastHead` in place of the model's LM head; ``model.loss_function`` follows."""
    head = FastHead(model.lm_head)
    model.lm_head = head
    model.loss_function = head.loss
