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
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from chronomoe_hf import private
from chronomoe_hf.recording.faults import guarded
from chronomoe_hf.recording.recorder import LayerRecorder
from chronomoe_hf.router.state import HANDLE

_TAPPED = ("grouped_mm", "batched_mm")


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


class _Weights:
    """Stands in for the weights inside ``grouped_mm`` and keeps the order in which it sorts the assignments.

    The backend flattens the weights and indexes them with that order. Everything else acts on the weights themselves.
    """

    def __init__(self, weight_TK: Tensor) -> None:
        self.weight_TK = weight_TK
        self.order_A: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.weight_TK, name)

    def reshape(self, *shape: Any) -> Any:
        return self if shape == (-1,) else self.weight_TK.reshape(*shape)

    def __getitem__(self, index: Any) -> Tensor:
        if isinstance(index, Tensor) and index.shape == (self.weight_TK.numel(),):
            self.order_A = index
        return self.weight_TK.reshape(-1)[index]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = [arg.weight_TK if isinstance(arg, cls) else arg for arg in args]
        return func(*args, **(kwargs or {}))


class ChronoExperts(nn.Module):
    """Mixin placed before an experts class that follows the experts interface (hidden, index, weights)."""

    chrono_native_class: ClassVar[type[nn.Module]]
    plain_dispatch: ClassVar[bool] = False
    """Whether the class dispatches by Transformers' own table of backends, whose order of rows is known here."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *args: Any) -> Tensor:
        """The native module's inputs and output; records expert outputs on the way."""
        recorder: LayerRecorder = self.__dict__[HANDLE].recorder
        if not recorder.reads_outputs:
            return super().forward(hidden_states, top_k_index, top_k_weights, *args)  # type: ignore[misc]
        if self.plain_dispatch and not args and top_k_index.shape[-1] > 1 and _is_tapped(self):
            return self._run_tapped(recorder, hidden_states, top_k_index, top_k_weights)
        output: Tensor = super().forward(hidden_states, top_k_index, top_k_weights, *args)  # type: ignore[misc]
        guarded(recorder.fail_outputs, self._read, recorder, output, hidden_states, top_k_index, top_k_weights)
        return output

    def _run_tapped(self, recorder: LayerRecorder, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """The native forward with a tap as ``self``; its rows are read. Where that fails, the native forward alone."""
        tap = _Tap(self)
        config: Any = self.config
        grouped = config._experts_implementation == "grouped_mm"
        if torch.compiler.is_compiling():
            output: Tensor = self.chrono_native_class.forward(tap, hidden_TD, index_TK, weight_TK)
            _read_rows(recorder, tap, None, grouped, index_TK, weight_TK)
            return output
        weights = _Weights(weight_TK) if grouped else None
        failed: Exception | None = None
        try:
            output = self.chrono_native_class.forward(tap, hidden_TD, index_TK, weights if grouped else weight_TK)
        except Exception as error:
            failed = error
        if failed is not None:
            output = super().forward(hidden_TD, index_TK, weight_TK)  # type: ignore[misc]  # its own error passes
            recorder.fail_outputs(failed)
        elif tap.rows_AD is None:  # somebody has registered another backend under this name
            guarded(recorder.fail_outputs, self._read, recorder, output, hidden_TD, index_TK, weight_TK)
        else:
            order_A = None if weights is None else weights.order_A
            guarded(recorder.fail_outputs, _read_rows, recorder, tap, order_A, grouped, index_TK, weight_TK)
        return output

    def _read(
        self, recorder: LayerRecorder, output_TD: Tensor, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor
    ) -> None:
        """Read what the native forward has computed: by division, or by sending a few tokens through once more."""
        if index_TK.shape[-1] == 1:
            _read_single(recorder, output_TD, index_TK, weight_TK, None)
        else:
            self._replay(recorder, hidden_TD, index_TK, weight_TK)

    @torch.no_grad()
    def _replay(self, recorder: LayerRecorder, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> None:
        sample = recorder.sample(index_TK.shape[0], index_TK.device, replayed=True)
        hidden_AD = sample.pick(hidden_TD).repeat_interleave(index_TK.shape[1], 0)
        with _without_dropout(self):
            rows_AD = self._unweighted(hidden_AD, sample.pick(index_TK).reshape(-1, 1))
        recorder.outputs(rows_AD.detach(), None, sample, weight_TK, index_TK)

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
        if recorder.reads_outputs:
            hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
            guarded(recorder.fail_outputs, self._replay, recorder, hidden_TD, top_k_index, top_k_weights)
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
        if recorder.reads_outputs:
            guarded(recorder.fail_outputs, self._read, recorder, output, selected_experts, routing_weights)
        return output

    def _read(self, recorder: LayerRecorder, output_TD: Tensor, mask_T1E: Tensor, weight_T1: Tensor) -> None:
        index_T1, kept_T1 = recorder.routed(output_TD.shape[0])
        if index_T1 is None:
            mask_TE = mask_T1E.reshape(output_TD.shape[0], -1)
            index_T1, kept_T1 = mask_TE.argmax(-1, keepdim=True), mask_TE.any(-1, keepdim=True)
        _read_single(recorder, output_TD, index_T1, weight_T1, kept_T1)


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


def dispatches_plainly(native: type[nn.Module]) -> bool:
    """Whether an experts class chooses its backend from Transformers' own table.

    FP8 experts have a table of their own, with backends that need their scales; those of Liger and others have none.
    The decorator of Transformers keeps the table in the closure of the forward that it makes.
    """
    cells = getattr(native.forward, "__closure__", None) or ()
    return any(cell.cell_contents is private.EXPERTS_TABLE for cell in cells if _is_table(cell))


def _is_table(cell: Any) -> bool:
    try:
        kind = private.EXPERTS_INTERFACE
        return kind is not None and isinstance(cell.cell_contents, kind)
    except ValueError:  # an empty cell
        return False


def _is_tapped(experts: Any) -> bool:
    """Whether the backend in force passes its unweighted rows through a method of the module."""
    config = getattr(experts, "config", None)
    # hasattr: the attribute exists from Transformers 5.20 on, and with it the place to look.
    known = getattr(config, "_experts_implementation", None) in _TAPPED and hasattr(experts, "has_post_expert_norm")
    # Where nobody says so, the order of rows is not known either.
    return known and getattr(experts, "_is_expert_parallel", True) is False


@torch.no_grad()
def _read_rows(
    recorder: LayerRecorder, tap: _Tap, order_A: Tensor | None, grouped: bool, index_TK: Tensor, weight_TK: Tensor
) -> None:
    """Record the rows of the sampled tokens that a backend has passed through the tap."""
    assert tap.rows_AD is not None, "the backend did not pass its rows through post_expert_norm"
    num_tokens, num_k = index_TK.shape
    sample = recorder.sample(num_tokens, index_TK.device)
    pick_A: Tensor | None
    if grouped:
        pick_A = _sorted_slots(recorder, sample, index_TK, order_A)
    else:
        pick_A = recorder.slots(sample, num_k, index_TK.device)
    recorder.outputs(tap.rows_AD.detach(), pick_A, sample, weight_TK, index_TK)


def _sorted_slots(recorder: LayerRecorder, sample: Any, index_TK: Tensor, order_A: Tensor | None) -> Tensor:
    """Where ``grouped_mm``, which sorts assignments by expert, has put those of the sampled tokens.

    Args:
        recorder: of the layer.
        sample: the tokens.
        index_TK: expert ids of the call.
        order_A: the order that the backend has used; None = repeat its very call.
    """
    if order_A is None:
        order_A = torch.sort(index_TK.reshape(-1))[1]
    num = order_A.shape[0]
    if torch.compiler.is_compiling():
        place_A = torch.arange(num, device=order_A.device)
    else:
        place_A = recorder.scope.count_up(num, order_A.device)
    at_A = torch.empty_like(order_A).scatter_(0, order_A, place_A)
    slots: Tensor = sample.pick(at_A.view(index_TK.shape)).flatten()
    return slots


def _read_single(
    recorder: LayerRecorder, output_TD: Tensor, index_T1: Tensor, weight_T1: Tensor, valid_T1: Tensor | None
) -> None:
    """One expert a token: y = output / weight, exact up to one rounding of the model's dtype."""
    sample = recorder.sample(output_TD.shape[0], output_TD.device)
    recorder.outputs(output_TD.detach(), sample.position_S, sample, weight_T1, index_T1, valid_T1, divided=True)


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
    native = getattr(type(experts), "chrono_native_class", type(experts))
    return "rows" if dispatches_plainly(native) and _is_tapped(experts) else "replay"
