"""What the forward records: each layer's device accumulators, and the sums that a call adds to them.

Nothing here talks to the host or to other ranks: the forward only adds to tensors, once per micro-batch.

Shape suffixes: E experts, T router rows (tokens), K experts per token, D router input width, S tokens read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from chronomoe_hf.coherence import phase_coherence
from chronomoe_hf.config import CoherenceConfig, ReaderName
from chronomoe_hf.lens.direction import SAMPLE, input_sums, sums_width
from chronomoe_hf.recording.scope import ForwardScope, sample_tokens
from chronomoe_hf.router.state import Routing

META = ("tokens", "dropped", "nonfinite", "calls")
PER_EXPERT = ("prob", "phi_weighted", "phi_weight", "phi_rows", "contribution", "contribution_weight")
PER_LAYER = ("logit_var", "js", "flip", "overlap", "compared", "topk_differs", "steered_tokens")


@dataclass
class Accumulators:
    """One layer's sums since the last step, on the device.

    Args:
        ints: int64 ``(E_max + len(META),)``: assignments per expert, then META.
        floats: float64 ``(len(PER_EXPERT) * E_max + len(PER_LAYER),)``.
        inputs: fp32 ``(2 D + 4,)``, sums over router inputs, laid out by `lens_input.input_sums`; None without a lens.
    """

    ints: Tensor
    floats: Tensor
    inputs: Tensor | None = None

    @classmethod
    def zeros(cls, width: int, input_width: int = 0) -> Accumulators:
        """Empty accumulators for layers padded to `width` experts."""
        return cls(
            ints=torch.zeros(width + len(META), dtype=torch.int64),
            floats=torch.zeros(len(PER_EXPERT) * width + len(PER_LAYER), dtype=torch.float64),
            inputs=torch.zeros(sums_width(input_width)) if input_width else None,
        )

    def move_(self, device: torch.device) -> None:
        """Move to another device, keeping the sums."""
        self.ints, self.floats = self.ints.to(device), self.floats.to(device)
        if self.inputs is not None:
            self.inputs = self.inputs.to(device)


@dataclass
class LayerRecorder:
    """Adds one layer's router calls and expert outputs to its accumulators.

    Args:
        layer_id: position among the wrapped layers.
        num_experts: E of the layer.
        width: E_max of the system (accumulators are padded to it).
        window: the owner's recording window.
        coherence: how expert outputs are read.
        reader: how the lens reads router inputs.
    """

    layer_id: int
    num_experts: int
    width: int
    window: ForwardScope
    coherence: CoherenceConfig
    reader: ReaderName = "ridge"
    train: Accumulators = field(repr=False, default=None)  # type: ignore[assignment]
    eval: Accumulators = field(repr=False, default=None)  # type: ignore[assignment]

    @property
    def active(self) -> bool:
        """Whether the running forward is recorded."""
        return self.window.mode != "off"

    @property
    def any_steering(self) -> bool:
        """Whether anything steers in any layer of the system."""
        return self.window.switches.any_steering

    def _sums(self, device: torch.device) -> Accumulators:
        sums = self.train if self.window.mode == "train" else self.eval
        if sums.ints.device != device:
            sums.move_(device)
        return sums

    def _expert_slot(self, name: str) -> slice:
        start = PER_EXPERT.index(name) * self.width
        return slice(start, start + self.num_experts)

    def routing(
        self,
        routing: Routing,
        distribution: Callable[[Tensor], Tensor],
        disagreement: tuple[Tensor, Tensor, Tensor] | None,
        differs_T: Tensor | None = None,
    ) -> None:
        """Counts, probability sums, logit moments and disagreement of one router call.

        Args:
            routing: what the router decided, after steering.
            distribution: the family's scores of logits.
            disagreement: per token, of the full beta; None while beta does not steer.
            differs_T: per token, whether beta and lens changed the set of chosen experts; None while nothing steers.
        """
        device = routing.logits_TE.device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            sums = self._sums(device)
            z_TE = routing.logits_TE.detach().float()
            finite_T = torch.isfinite(z_TE.sum(-1))
            mask_T = self.window.rows(z_TE.shape[0])
            real_T = finite_T if mask_T is None else finite_T & mask_T.to(device)
            lost_T = ~finite_T if mask_T is None else mask_T.to(device) & ~finite_T
            z_TE = torch.where(finite_T[:, None], z_TE, 0.0)
            weight_T = real_T.float()

            kept_TK = real_T[:, None].expand_as(routing.index_TK)
            if routing.kept_TK is not None:
                kept_TK = kept_TK & routing.kept_TK
            sums.ints.scatter_add_(0, routing.index_TK.reshape(-1), kept_TK.reshape(-1).long())
            tokens = real_T.sum()
            dropped = tokens * routing.index_TK.shape[-1] - kept_TK.sum()
            meta = torch.stack([tokens, dropped, lost_T.sum(), torch.ones_like(tokens)])
            sums.ints[self.width :].add_(meta)

            sums.floats[self._expert_slot("prob")].add_(weight_T @ distribution(z_TE))
            scalars = {"logit_var": weight_T @ z_TE.var(-1, correction=0)}
            if disagreement is not None:
                # A NaN token would poison the sum: zero it before weighting, it is not real anyway.
                for name, d_T in zip(("js", "flip", "overlap"), disagreement, strict=True):
                    scalars[name] = weight_T @ torch.where(real_T, d_T, 0.0)
                scalars["compared"] = weight_T.sum()
            if differs_T is not None:
                scalars["topk_differs"] = weight_T @ differs_T.float()
                scalars["steered_tokens"] = weight_T.sum()
            nothing = weight_T.new_zeros(())
            start = len(PER_EXPERT) * self.width
            sums.floats[start:].add_(torch.stack([scalars.get(name, nothing) for name in PER_LAYER]))

    def router_input(self, hidden: Tensor) -> None:
        """Mean and reader of the router inputs, only in the step before a lens may be steered.

        A compiled graph does it in every step: a switch would cost a second variant of the graph.
        """
        wanted = torch.compiler.is_compiling() or self.window.switches.router_input
        if not wanted or self.window.mode != "train":
            return
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            sums = self._sums(hidden.device).inputs
            if sums is None:
                return
            x_TD = hidden.detach().reshape(-1, hidden.shape[-1]).float()
            real_T = torch.isfinite(x_TD.sum(-1))
            mask_T = self.window.rows(x_TD.shape[0])
            if mask_T is not None:
                real_T = real_T & mask_T.to(hidden.device)
            x_TD = torch.where(real_T[:, None], x_TD, 0.0)
            sample = sample_tokens(mask_T, x_TD.shape[0], SAMPLE, hidden.device)
            sums.add_(input_sums(x_TD, real_T.float(), sample.position_S, sample.valid_S, self.reader))

    def expert_rows(self, rows: ExpertRows) -> None:
        """Coherence and contribution of every expert from the outputs of one call of the experts."""
        with torch.no_grad(), torch.autocast(rows.output_SKD.device.type, enabled=False):
            sums = self._sums(rows.output_SKD.device)
            table = expert_sums(rows, self.num_experts, self.coherence.reference)
            for name, value_E in table.items():
                sums.floats[self._expert_slot(name)].add_(value_E)


@dataclass(frozen=True)
class ExpertRows:
    """Expert outputs of S tokens, all K assignments of each.

    Args:
        output_SKD: unweighted expert outputs, native dtype, detached.
        weight_SK: combine weights, detached.
        index_SK: int64 expert ids.
        valid_SK: bool: real, finite, not dropped.
        scale: 0-dim or float: real tokens of the call / tokens read, so that sums estimate the whole call.
    """

    output_SKD: Tensor
    weight_SK: Tensor
    index_SK: Tensor
    valid_SK: Tensor
    scale: Tensor | float


def expert_sums(rows: ExpertRows, num_experts: int, reference: str) -> dict[str, Tensor]:
    """Per-expert sums of one micro-batch: phi (token-weighted), rows read, and contribution sum(gate * |y|).

    Returns:
        fp32 tensors ``(E,)`` by the names of PER_EXPERT that it fills.

    Source: SPEC section 4 (phi), REAP (gate * |expert output|).
    """
    index_A = rows.index_SK.reshape(-1)
    y_SKD = rows.output_SKD.float()
    norm_SK = y_SKD.norm(dim=-1)
    valid_SK = rows.valid_SK & torch.isfinite(norm_SK)
    y_SKD = torch.where(valid_SK[..., None], y_SKD, 0.0)
    weight_SK = torch.where(valid_SK, rows.weight_SK.float(), 0.0)
    own_SKD = weight_SK[..., None] * y_SKD
    mixture_SD = own_SKD.sum(1)
    num_k = rows.index_SK.shape[1]

    def per_expert(value: Tensor) -> Tensor:
        out = value.new_zeros((num_experts, *value.shape[1:]))
        return out.index_add_(0, index_A, value)

    valid_A = valid_SK.reshape(-1).float()
    output_ED = per_expert(y_SKD.flatten(0, 1))
    if reference == "leave_one_out" and num_k > 1:
        rest_SKD = torch.where(valid_SK[..., None], mixture_SD[:, None] - own_SKD, 0.0)
        reference_ED = per_expert(rest_SKD.flatten(0, 1))
    else:
        reference_ED = mixture_SD.sum(0).expand_as(output_ED)
    phi_E, has_phi_E = phase_coherence(output_ED, reference_ED)
    rows_E = per_expert(valid_A)
    evidence_E = torch.where(has_phi_E, rows_E, 0.0) * rows.scale
    contribution_A = torch.where(valid_SK, weight_SK * norm_SK, 0.0).reshape(-1)
    return {
        "phi_weighted": phi_E * evidence_E,
        "phi_weight": evidence_E,
        "phi_rows": rows_E,
        "contribution": per_expert(contribution_A) * rows.scale,
        "contribution_weight": rows_E * rows.scale,
    }
