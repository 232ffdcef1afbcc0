"""Reading expert outputs: the wrapped experts module.

The experts' own computation is never replaced. Where the library's backend offers a place to look at the
unweighted rows (`post_expert_norm`, Transformers >= 5.20), they are read there; where it does not, a few
tokens are sent through the experts once more without gradient; and where a token has one expert, its output
is the block's output divided by its weight.

Shape suffixes: T tokens, K experts per token, D width, S tokens read, A = T * K assignments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from chronomoe_hf.recording.scope import TokenSample, sample_tokens
from chronomoe_hf.recording.sums import ExpertRows, LayerRecorder
from chronomoe_hf.router.state import HANDLE

_TAPPED = ("grouped_mm", "batched_mm")
# Sending tokens through the experts again costs compute, reading rows does not: keep the former small.
_REPLAY_LIMIT = 64


class _Tap:
    """Stands in for the experts module inside a library backend and keeps the unweighted rows it passes on."""

    has_post_expert_norm = True

    def __init__(self, experts: Any) -> None:
        self.experts = experts
        self.rows_AD: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.experts, name)

    def post_expert_norm(self, rows_AD: Tensor) -> Tensor:
        if self.experts.has_post_expert_norm:
            rows_AD = self.experts.post_expert_norm(rows_AD)
        self.rows_AD = rows_AD
        return rows_AD


class ChronoExperts(nn.Module):
    """Mixin placed before an experts class that follows the experts interface (hidden, index, weights)."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *args: Any) -> Tensor:
        """The native module's inputs and output; records expert outputs on the way."""
        recorder: LayerRecorder = self.__dict__[HANDLE].recorder
        if not (recorder.active and recorder.coherence.enabled):
            return super().forward(hidden_states, top_k_index, top_k_weights, *args)  # type: ignore[misc]
        config: Any = self.config
        implementation: str = config._experts_implementation
        # hasattr: the attribute exists from Transformers 5.20 on, and with it the place to look.
        tapped = implementation in _TAPPED and hasattr(self, "has_post_expert_norm") and not self._is_expert_parallel
        if tapped and not args and top_k_index.shape[-1] > 1:
            tap = _Tap(self)
            output: Tensor = ALL_EXPERTS_FUNCTIONS[implementation](tap, hidden_states, top_k_index, top_k_weights)
            _read_tap(recorder, tap, implementation, top_k_index, top_k_weights)
            return output
        output = super().forward(hidden_states, top_k_index, top_k_weights, *args)  # type: ignore[misc]
        if top_k_index.shape[-1] == 1:
            valid_T1 = torch.ones_like(top_k_index, dtype=torch.bool)
            _read_single(recorder, output, top_k_index, top_k_weights, valid_T1)
        else:
            with torch.no_grad():
                self._replay(recorder, hidden_states, top_k_index, top_k_weights)
        return output

    def _replay(self, recorder: LayerRecorder, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> None:
        limit = recorder.coherence.max_tokens
        sample = _sample(recorder, index_TK, None if limit is None else min(limit, _REPLAY_LIMIT))
        num_k = index_TK.shape[1]
        index_SK = index_TK[sample.position_S]
        hidden_AD = hidden_TD[sample.position_S].repeat_interleave(num_k, 0)
        with _without_dropout(self):
            rows_AD = self._unweighted(hidden_AD, index_SK.reshape(-1, 1))
        _record(recorder, rows_AD.view(-1, num_k, rows_AD.shape[-1]), weight_TK, index_TK, sample)

    def _unweighted(self, hidden_AD: Tensor, index_A1: Tensor) -> Tensor:
        """Native outputs of one expert a row, weight 1."""
        rows_AD: Tensor = super().forward(hidden_AD, index_A1, hidden_AD.new_ones(index_A1.shape))  # type: ignore[misc]
        return rows_AD


class ChronoDirectExperts(ChronoExperts):
    """Mixin for experts called like the interface but without its backends; DBRX passes the batch unflattened."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *args: Any) -> Tensor:
        """The native module's inputs and output; records expert outputs on the way."""
        recorder: LayerRecorder = self.__dict__[HANDLE].recorder
        native = super(ChronoExperts, self).forward
        output: Tensor = native(hidden_states, top_k_index, top_k_weights, *args)
        if recorder.active and recorder.coherence.enabled:
            with torch.no_grad():
                self._replay(recorder, hidden_states.reshape(-1, hidden_states.shape[-1]), top_k_index, top_k_weights)
        return output


class ChronoDbrxExperts(ChronoDirectExperts):
    """Mixin for DBRX experts, whose output keeps a batch axis."""

    def _unweighted(self, hidden_AD: Tensor, index_A1: Tensor) -> Tensor:
        return super()._unweighted(hidden_AD[None], index_A1)[0]


class ChronoLongcatExperts(ChronoDirectExperts):
    """Mixin for LongCat-Flash experts, which cannot be called with one slot a token."""

    def _unweighted(self, hidden_AD: Tensor, index_A1: Tensor) -> Tensor:
        weight_A2 = torch.cat([hidden_AD.new_ones(index_A1.shape), hidden_AD.new_zeros(index_A1.shape)], dim=1)
        native = super(ChronoExperts, self).forward
        rows_AD: Tensor = native(hidden_AD, index_A1.expand(-1, 2), weight_A2)
        return rows_AD


class ChronoSwitchExperts(nn.Module):
    """Mixin for Switch experts (hidden, one-hot dispatch mask ``[T, 1, E]``, weights ``[T, 1]``)."""

    def forward(self, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor) -> Tensor:
        """The native module's inputs and output; records expert outputs on the way."""
        recorder: LayerRecorder = self.__dict__[HANDLE].recorder
        output: Tensor = super().forward(hidden_states, selected_experts, routing_weights)  # type: ignore[misc]
        if recorder.active and recorder.coherence.enabled:
            mask_TE = selected_experts.reshape(output.shape[0], -1)
            index_T1 = mask_TE.argmax(-1, keepdim=True)
            _read_single(recorder, output, index_T1, routing_weights, mask_TE.sum(-1, keepdim=True) > 0)
        return output


@contextlib.contextmanager
def _without_dropout(experts: nn.Module) -> Iterator[None]:
    """A second run must draw no random numbers: what follows in the forward would draw others."""
    training = [module for module in experts.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _sample(recorder: LayerRecorder, index_TK: Tensor, limit: int | None) -> TokenSample:
    return sample_tokens(recorder.window.rows(index_TK.shape[0]), index_TK.shape[0], limit, index_TK.device)


def _read_tap(recorder: LayerRecorder, tap: _Tap, implementation: str, index_TK: Tensor, weight_TK: Tensor) -> None:
    assert tap.rows_AD is not None, "the backend did not pass its rows through post_expert_norm"
    with torch.no_grad():
        sample = _sample(recorder, index_TK, recorder.coherence.max_tokens)
        num_tokens, num_k = index_TK.shape
        slot_A = torch.arange(num_tokens * num_k, device=index_TK.device)
        if implementation == "grouped_mm":
            # The backend sorts assignments by expert with this very call; invert it to find a token's rows.
            order_A = torch.sort(index_TK.reshape(-1))[1]
            slot_A = torch.empty_like(order_A).index_copy_(0, order_A, slot_A)
        slot_A = slot_A.view(num_tokens, num_k)[sample.position_S].reshape(-1)
        rows_SKD = tap.rows_AD.detach()[slot_A].view(-1, num_k, tap.rows_AD.shape[-1])
        _record(recorder, rows_SKD, weight_TK, index_TK, sample)


def _read_single(
    recorder: LayerRecorder, output_TD: Tensor, index_T1: Tensor, weight_T1: Tensor, valid_T1: Tensor
) -> None:
    """One expert a token: y = output / weight, exact up to one rounding of the model's dtype."""
    with torch.no_grad(), torch.autocast(output_TD.device.type, enabled=False):
        sample = _sample(recorder, index_T1, recorder.coherence.max_tokens)
        weight_S1 = weight_T1.detach()[sample.position_S].float()
        usable_S1 = (weight_S1 > 0) & valid_T1[sample.position_S]
        rows_SD = output_TD.detach()[sample.position_S].float() / torch.where(usable_S1, weight_S1, 1.0)
        recorder.expert_rows(
            ExpertRows(
                output_SKD=rows_SD[:, None],
                weight_SK=weight_S1,
                index_SK=index_T1[sample.position_S],
                valid_SK=usable_S1 & sample.valid_S[:, None],
                scale=sample.scale,
            )
        )


def _record(
    recorder: LayerRecorder, rows_SKD: Tensor, weight_TK: Tensor, index_TK: Tensor, sample: TokenSample
) -> None:
    weight_SK = weight_TK.detach()[sample.position_S]
    index_SK = index_TK[sample.position_S]
    finite_S = torch.isfinite(weight_SK.float().sum(-1)) & sample.valid_S
    in_range_SK = index_SK < recorder.num_experts  # expert-parallel sentinels are not experts
    recorder.expert_rows(
        ExpertRows(
            output_SKD=rows_SKD,
            weight_SK=weight_SK,
            index_SK=index_SK.clamp(max=recorder.num_experts - 1),
            valid_SK=finite_S[:, None] & in_range_SK,
            scale=sample.scale,
        )
    )


_MIXINS: dict[str, type[nn.Module]] = {
    "interface": ChronoExperts,
    "direct": ChronoDirectExperts,
    "dbrx": ChronoDbrxExperts,
    "longcat": ChronoLongcatExperts,
    "switch": ChronoSwitchExperts,
}


def experts_mixin(experts_call: str) -> type[nn.Module] | None:
    """The mixin that reads experts which are called in this way (the adapter's ``experts_call``), or None."""
    return _MIXINS.get(experts_call)


def reading_mode(experts: nn.Module, reader: str, top_k: int) -> str:
    """How outputs are read in this module: ``"rows"``, ``"replay"`` or ``"division"``, see the top of this file."""
    if reader == "switch":
        return "division"
    if reader != "interface":
        return "replay"
    if top_k == 1:
        return "division"
    config: Any = experts.config
    tapped = config._experts_implementation in _TAPPED and hasattr(experts, "has_post_expert_norm")
    return "rows" if tapped else "replay"
