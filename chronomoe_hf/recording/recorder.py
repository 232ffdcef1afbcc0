"""One layer's recorder: what its router and its experts leave on the tape, or, in a compiled graph, sum at once.

A tape cannot live in a graph: it would be filled in one graph and summed in another, and a list of another length
would compile anew. So a compiled forward sums every layer by itself (a group of one, which the compiler fuses), into
a row of its own that the next step collects.

Shape suffixes: E experts, T router rows (tokens), K experts per token, D router input width, S tokens read, R numbers
of one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from chronomoe_hf import distributed, private
from chronomoe_hf.config import CoherenceConfig, ReaderName
from chronomoe_hf.lens.direction import SAMPLE, finite_rows, input_sums, sums_width
from chronomoe_hf.recording.calls import OutputCall, RoutedCall, output_batch, sums_of
from chronomoe_hf.recording.expert_sums import output_sums
from chronomoe_hf.recording.faults import guarded
from chronomoe_hf.recording.reduce import DISAGREEMENT_SAMPLE, routing_table
from chronomoe_hf.recording.rows import TokenSample
from chronomoe_hf.recording.scope import ForwardScope
from chronomoe_hf.recording.totals import Recorded, Sums
from chronomoe_hf.router.state import Routing


class LayerRecorder:
    """Records one layer's router calls and expert outputs.

    Args:
        layer_id: position among the wrapped layers.
        num_experts: E of the layer.
        scope: of the module that owns the layer.
        sums: of the system.
        coherence: how expert outputs are read.
        reader: how the lens reads router inputs.
        input_width: D where a lens may act, else 0.
        compares: measure what the full beta does to the scores (the veto needs it).

    Attributes:
        graph_train_R, graph_eval_R: float64 ``(R,)``: what compiled graphs add; see the top of this file.
        missed: calls of the router in training, in this window, outside a forward of the model that owns it.
        fault, outputs_fault: why nothing, or nothing of the experts' outputs, is recorded any more; None = it is.
        top_k: experts per token in the last router call of this window; None = no eager call yet.
        least_top_k, most_top_k: the least and the most of all its calls.
        other_width: experts of the router where they are not `num_experts` any more; None = they are.
        inputs: fp32 ``(2 D + 4,)``: sums over router inputs, laid out by ``lens.direction.input_sums``; None without
            a lens.
    """

    def __init__(
        self,
        layer_id: int,
        num_experts: int,
        scope: ForwardScope,
        sums: Sums,
        coherence: CoherenceConfig,
        reader: ReaderName = "ridge",
        input_width: int = 0,
        compares: bool = True,
    ) -> None:
        self.layer_id = layer_id
        self.num_experts = num_experts
        self.scope = scope
        self.sums = sums
        self.coherence = coherence
        self.reader = reader
        self.compares = compares
        self.missed = 0
        self.fault: str | None = None
        self.outputs_fault: str | None = None
        self.top_k: int | None = None
        self.least_top_k: int | None = None
        self.most_top_k: int | None = None
        self.other_width: int | None = None
        self.graph_train_R = torch.zeros(sums.row.size, dtype=torch.float64)
        self.graph_eval_R = torch.zeros(sums.row.size, dtype=torch.float64)
        self.inputs = torch.zeros(sums_width(input_width)) if input_width else None

    @property
    def reference(self) -> str:
        """What an expert's output is compared with."""
        return self.coherence.reference

    @property
    def active(self) -> bool:
        """Whether the running forward is recorded."""
        return self.scope.mode != "off" and self.fault is None

    @property
    def any_steering(self) -> bool:
        """Whether anything steers in any layer of the system."""
        return self.scope.switches.any_steering

    @property
    def reads_outputs(self) -> bool:
        """Whether the running forward's expert outputs are read. A compiled graph reads them every time."""
        if self.outputs_fault is not None or not self.active or not self.coherence.enabled:
            return False
        return torch.compiler.is_compiling() or self.scope.reads_outputs(self.coherence.every)

    def not_active(self) -> None:
        """The router was called and nothing is recorded: remember it where a training forward was to be seen."""
        unseen = torch.is_grad_enabled() and self.scope.switches.training and not self.scope.inside
        if unseen and not private.in_backward():  # not the recompute of activation checkpointing
            self.missed += 1

    def fail(self, error: Exception) -> None:
        """A part of ours has failed in this layer's router: nothing of the layer is recorded from here on."""
        self.fault = self.fault or self.sums.faults.tell(f"layer {self.layer_id}", "routing", error)

    def fail_outputs(self, error: Exception) -> None:
        """Reading this layer's expert outputs has failed: they are not read from here on; routing still is."""
        told = self.outputs_fault or self.sums.faults.tell(f"layer {self.layer_id}", "outputs", error)
        self.outputs_fault = told

    def to_(self, device: torch.device) -> None:
        """Move what the recorder holds itself."""
        self.graph_train_R = self.graph_train_R.to(device)
        self.graph_eval_R = self.graph_eval_R.to(device)
        if self.inputs is not None:
            self.inputs = self.inputs.to(device)

    def held(self, mode: Recorded) -> list[Tensor]:
        """The sums that the recorder holds itself: the row of compiled graphs first, then those of router inputs."""
        if mode == "eval":
            return [self.graph_eval_R]
        return [self.graph_train_R] if self.inputs is None else [self.graph_train_R, self.inputs]

    @property
    def _graph_R(self) -> Tensor:
        return self.graph_train_R if self.scope.mode == "train" else self.graph_eval_R

    def see_top_k(self, top_k: int) -> None:
        """Tokens get `top_k` experts now."""
        self.top_k = top_k
        self.least_top_k = top_k if self.least_top_k is None else min(top_k, self.least_top_k)
        self.most_top_k = top_k if self.most_top_k is None else max(top_k, self.most_top_k)

    def new_window(self) -> None:
        """What is told of a window starts afresh."""
        self.top_k = self.least_top_k = self.most_top_k = None
        self.missed = 0
        self.scope.passes.new_window()

    # ---- routers -------------------------------------------------------------------------------------------------

    def routing(
        self, router: nn.Module, routing: Routing, native_TK: Tensor | None, beta_full_E: Tensor | None
    ) -> None:
        """One router call.

        Args:
            router: the wrapped router.
            routing: what it decided, after steering.
            native_TK: what it would have decided without; None while nothing steers.
            beta_full_E: the full beta, in logits; None while beta does not act.
        """
        guarded(self.fail, self._routing, router, routing, native_TK, beta_full_E)

    def _routing(
        self, router: nn.Module, routing: Routing, native_TK: Tensor | None, beta_full_E: Tensor | None
    ) -> None:
        call = RoutedCall(
            layer=self,
            router=router,
            logits_TE=routing.logits_TE.detach(),
            index_TK=routing.index_TK.detach(),
            kept_TK=None if routing.kept_TK is None else routing.kept_TK.detach(),
            native_TK=native_TK,
            beta_E=beta_full_E if self.compares else None,
            masked_E=routing.masked_E,
            at=self.scope.slices.place("routing", self.layer_id, routing.index_TK.shape[0]),
        )
        if torch.compiler.is_compiling():
            self._sum_routing(call)
            return
        if call.index_TK.shape[-1] != self.top_k:
            self.see_top_k(call.index_TK.shape[-1])
        if call.logits_TE.shape[-1] != self.num_experts:
            self.other_width = call.logits_TE.shape[-1]  # the next step says so; the forward is none of ours
            return
        mode = self.scope.mode
        assert mode != "off"
        self.scope.tape.remember(mode, call, self.scope.rows, self.scope.sample)

    def routed(self, num_rows: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Ids ``(T, K)`` of this layer's last router call and what capacity kept of it; None where it is not known."""
        calls = self.scope.tape.calls
        if torch.compiler.is_compiling() or not calls or calls[-1].layer is not self:
            return None, None
        index_TK, kept_TK = calls[-1].index_TK, calls[-1].kept_TK
        return (index_TK, kept_TK) if kept_TK is not None and index_TK.shape[0] == num_rows else (None, None)

    def _sum_routing(self, call: RoutedCall) -> None:
        row, device, num_rows = self.sums.row, call.logits_TE.device, call.logits_TE.shape[0]
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            compared = None
            if call.beta_E is not None:
                compared = self.scope.sample(num_rows, DISAGREEMENT_SAMPLE, device)
            head, tail = routing_table([sums_of([call], row, self.scope.rows(num_rows, device), compared)], row)
            self._graph_R[row.head].add_(head[0])
            self._graph_R[row.tail].add_(tail[0])

    def router_input(self, hidden: Tensor) -> None:
        """Mean and direction of the router inputs, only in the step before a lens may be steered.

        A compiled graph does it in every step: a switch would cost a second variant of the graph.
        """
        wanted = torch.compiler.is_compiling() or self.scope.switches.router_input
        if wanted and self.scope.mode == "train" and self.inputs is not None:
            guarded(self.fail, self._router_input, hidden)

    def _router_input(self, hidden: Tensor) -> None:
        assert self.inputs is not None
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            x_TD = hidden.detach().reshape(-1, hidden.shape[-1])
            real_T = finite_rows(x_TD)
            at = self.scope.slices.place("inputs", self.layer_id, x_TD.shape[0])
            mask_T = self.scope.rows(x_TD.shape[0], hidden.device, at)
            if mask_T is not None:
                real_T = real_T & mask_T
            sample = self.scope.sample(x_TD.shape[0], SAMPLE, hidden.device, at)
            if torch.compiler.is_compiling():
                self.inputs.add_(input_sums(x_TD, real_T, sample.position_S, sample.valid_S, self.reader))
            else:
                self.scope.tape.inputs.add(self, x_TD, real_T, sample)

    # ---- experts -------------------------------------------------------------------------------------------------

    def sample(self, num_rows: int, device: torch.device, replayed: bool = False) -> TokenSample:
        """The tokens whose expert outputs are read: as many as the settings say for rows read so, or sent once more."""
        at = self.scope.slices.place("outputs", self.layer_id, num_rows)
        return self.scope.sample(num_rows, self.coherence.tokens_read(replayed), device, at)

    def outputs(
        self,
        rows_AD: Tensor,
        pick_A: Tensor | None,
        sample: TokenSample,
        weight_TK: Tensor,
        index_TK: Tensor,
        valid_TK: Tensor | None = None,
        divided: bool = False,
    ) -> None:
        """Expert outputs of the tokens of a sample.

        Args:
            rows_AD: detached rows that hold them.
            pick_A: which of these rows, token by token and slot by slot; None = all, in that order.
            sample: the tokens.
            weight_TK: combine weights of the whole call.
            index_TK: expert ids of the whole call.
            valid_TK: bool, slots that count; None = all.
            divided: the rows hold weight times output.
        """
        if self.other_width is not None:
            return
        num_k, width = index_TK.shape[-1], rows_AD.shape[-1]
        num_tokens = (rows_AD.shape[0] if pick_A is None else pick_A.shape[0]) // num_k
        call = OutputCall(self, weight_TK.detach(), index_TK.detach(), valid_TK)
        if torch.compiler.is_compiling():
            self._sum_outputs(call, rows_AD, pick_A, sample, divided)
            return
        # Nothing here has a gradient or another dtype under autocast; what sums a full chunk enters its own contexts.
        mode = self.scope.mode
        assert mode != "off"
        every = self.coherence.every if mode == "train" else 1
        chunk = self.scope.tape.slot(mode, (num_tokens, num_k, width), rows_AD, sample, every, divided)
        target_AD = chunk.rows_GSKD[len(chunk.calls)].view(-1, width)
        if pick_A is None:
            target_AD.copy_(rows_AD)
        else:
            torch.index_select(rows_AD, 0, pick_A, out=target_AD)
        self.scope.tape.added(mode, chunk, call)

    def _sum_outputs(
        self, call: OutputCall, rows_AD: Tensor, pick_A: Tensor | None, sample: TokenSample, divided: bool
    ) -> None:
        num_k, width = call.index_TK.shape[-1], rows_AD.shape[-1]
        with torch.no_grad(), torch.autocast(rows_AD.device.type, enabled=False):
            rows_AD = rows_AD.clone() if pick_A is None else rows_AD.index_select(0, pick_A)
            batch = output_batch([call], rows_AD.view(1, -1, num_k, width), sample, sample.scale, divided)
            value_1C = output_sums(batch, self.num_experts, self.sums.row.width, self.reference)
            self._graph_R[self.sums.row.outputs].add_(value_1C[0])

    def slots(self, sample: TokenSample, num_k: int, device: torch.device) -> Tensor | None:
        """Rows of the sampled tokens in a call whose rows lie token by token, slot by slot; None = all of them."""
        if sample.position_S is None:
            return None
        within_K = torch.arange(num_k, device=device)
        return (sample.position_S[:, None] * num_k + within_K).flatten()


# Taking what forwards have added up since the last step: over all layers and ranks, in one collective.
#
# Shape suffixes: L layers, R numbers of one row, N the two numbers about the loss.


class Taken(NamedTuple):
    """What was taken.

    Args:
        row_LR: float64 sums of all layers over all ranks.
        loss_N: float64 loss tokens and forwards that were given labels, over all ranks.
        inputs: sums over router inputs by layer; empty where they were not asked for.
        failures: `flag` summed over ranks, 0-dim; None where this process is alone.
    """

    row_LR: Tensor
    loss_N: Tensor
    inputs: dict[int, Tensor]
    failures: Tensor | None


def take(
    sums: Sums,
    recorders: Sequence[LayerRecorder],
    home: torch.device,
    mode: Recorded = "train",
    *,
    with_inputs: bool = False,
    flag: float = 0.0,
    copies: int = 1,
) -> Taken:
    """Sums since the last call, over all ranks; they start at zero again. Collective: one all-reduce.

    Args:
        sums: of the system.
        recorders: of its layers, in order.
        home: device that the result is wanted on.
        mode: of training or of evaluation.
        with_inputs: also the sums over router inputs.
        flag: travels along and is summed.
        copies: how many ranks have seen the same batch.
    """
    for scope in {each.scope for each in recorders}:
        scope.abandon()  # no forward is running: this one a KeyboardInterrupt ended, for which torch calls no hook
    row_LR = sums.total(mode, home, [each.held(mode)[0] for each in recorders])
    loss_N = sums.loss(mode, home)
    wide = {each.layer_id: each.inputs for each in recorders if each.inputs is not None} if with_inputs else {}
    alone = not distributed.active()
    if not wide and alone:
        zero(sums, recorders, mode)
        return Taken(row_LR, loss_N, {}, None)
    parts = [row_LR.reshape(-1), row_LR.new_full((1,), flag), loss_N]
    parts += [each.to(home).double() for each in wide.values()]
    flat = distributed.all_reduce_sum_(torch.cat(parts)).div_(copies)
    zero(sums, recorders, mode)
    start = row_LR.numel()
    sizes = [each.numel() for each in wide.values()]
    inputs = dict(zip(wide, flat[start + 3 :].split(sizes), strict=True)) if wide else {}
    return Taken(flat[:start].view_as(row_LR), flat[start + 1 : start + 3], inputs, None if alone else flat[start])


def zero(sums: Sums, recorders: Sequence[LayerRecorder], mode: Recorded) -> None:
    """Start at zero again."""
    sums.zero(mode, [each for recorder in recorders for each in recorder.held(mode)])
