"""plan_split: which idle experts should become copies of which busy ones. Reads a few batches, changes nothing.

Shape suffixes: T tokens, N tokens of one expert, K experts per token, E experts, D router input width.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from chronomoe_hf.errors import LifecycleError
from chronomoe_hf.lifecycle.evidence.spec import LayerSpec
from chronomoe_hf.lifecycle.live.fit_model import groups_in_memory, within_memory
from chronomoe_hf.lifecycle.live.model import Batch, as_batches, layer_specs, live_layers, quiet, uncompiled
from chronomoe_hf.lifecycle.live.weights import ExpertWeights
from chronomoe_hf.splitting.plan import ExpertCopy, LayerSplit, SplitPlan
from chronomoe_hf.splitting.router_tap import RouterTap, read_calls
from chronomoe_hf.wrapping.owner import find_system

IDLE, BUSY = 0.5, 1.5  # fair shares
BOUND = 2.0  # shares are brought within [1 / BOUND, BOUND] fair shares (k > 1)
FLOOR = 0.4  # fair share that every expert of the first layer is brought to (k > 1)
STRENGTH = 0.1  # spread of what splits two rows, in standard deviations of the layer's logits
MEMORY_GB = 2.0  # for router inputs
_POWER_STEPS, _SOLVE_STEPS = 50, 300
_PAST = 1.03
_FIRST, _LARGEST, _SMALLEST = 0.1, 0.5, 1e-3  # steps of the solver, in standard deviations of the logits


def plan_split(
    model: nn.Module, batches: Iterable[Batch], *, idle: float = IDLE, busy: float = BUSY, memory_gb: float = MEMORY_GB
) -> SplitPlan:
    """Find idle experts, and whose work each of them could share.

    The model reads the batches in evaluation mode without gradients, once if the inputs of all its routers fit into
    `memory_gb`, else in several passes; nothing in it changes.

    *One expert per token (k = 1).* While a layer has an expert below `idle` and one above `busy` fair shares, the
    idlest becomes a copy of the busiest, and the router row w of the latter is split into w + v and w - v. v lies along
    the first principal component of the busy expert's own router inputs, orthogonal to their mean, so that it halves
    the tokens, and is so short that their logits spread by a tenth of the layer's logit standard deviation.

    *Several experts per token (k > 1).* A bias on the router's logits is found that brings every share into
    [1/2, 2] fair shares (in the first layer only above 0.4); rows stay. An idle expert becomes a copy of the expert
    that lost most of the tokens that the idle one gained. :func:`~chronomoe_hf.lifecycle.apply` then refits all
    output projections.

    Args:
        model: the model; wrapped under the balance law (``ChronoConfig.revive()``) where k > 1.
        batches: training text as dictionaries with ``input_ids`` (and ``attention_mask``); no labels are read. About
            16,000 tokens are good.
        idle: below this many fair shares an expert is idle.
        busy: above this many an expert may be split (k = 1).
        memory_gb: memory for router inputs, 10^9 bytes. Layers that do not fit together are read in further passes;
            of a text that does not fit for one layer, the first sequences are read, and a warning says how many.

    Returns:
        The plan; where no expert is idle it changes nothing and says so.

    Raises:
        LifecycleError: experts cannot be copied (see the reasons), the router's rows cannot be split, k > 1 without a
            wrapped model that can hold the bias, `idle` or `busy` out of range, or too few tokens.

    Source: the originals' spawn and split; measured in ``benchmarks/results/balance.md``.
    """
    if not 0.0 < idle < 1.0 < busy:
        raise LifecycleError(f"plan_split needs 0 < idle < 1 < busy (in fair shares), got idle={idle}, busy={busy}")
    model = uncompiled(model)
    read = as_batches(batches, "plan_split")
    layers, specs = live_layers(model), layer_specs(model)
    system = find_system(model)
    wrapped = {layer.name: layer for layer in system.layers} if system is not None else {}
    taps = [RouterTap(layer, wrapped.get(layer.name)) for layer in layers]
    for tap, spec in zip(taps, specs, strict=True):
        ExpertWeights(tap.layer)
        _check_bias(tap, spec, "none" if system is None else system.config.beta.law)
    read = within_memory(layers, read, memory_gb, "plan_split")
    out, tokens = [], 0
    with quiet(model):
        for group in groups_in_memory(layers, range(len(layers)), read, memory_gb):
            read_calls(model, [taps[index] for index in group], read)
            for index in group:
                tap, spec = taps[index], specs[index]
                index_TK = tap.choose()
                tokens = max(tokens, len(index_TK))
                require_enough(spec, len(index_TK))
                if spec.top_k == 1:
                    out.append(_rows_split(tap, spec, index_TK, idle, busy))
                else:
                    out.append(_bias_split(tap, spec, index_TK, idle))
                tap.calls.clear()
    return SplitPlan(layers=tuple(out), tokens=tokens, batches=tuple(read))


def _check_bias(tap: RouterTap, spec: LayerSpec, law: str) -> None:
    if spec.top_k == 1:
        return
    if tap.wrapped is not None and law != "balance":
        raise LifecycleError(
            f"{spec.name}: with {spec.top_k} experts a token a bias on the router goes with the copies, and under this "
            f"config (beta.law {law!r}) none of that size may act; wrap the model with ChronoConfig.revive()"
        )
    if tap.wrapped is None:
        raise LifecycleError(
            f"{spec.name}: with {spec.top_k} experts a token a bias on the router goes with the copies; wrap the model "
            "first, chronomoe_hf.wrap(model, ChronoConfig.revive())"
        )
    if not (tap.wrapped.takes_beta or tap.wrapped.native_bias):
        raise LifecycleError(f"{spec.name}: no bias can act on this router: {'; '.join(tap.wrapped.known)}")


def require_enough(spec: LayerSpec, tokens: int) -> None:
    """Raise LifecycleError where `tokens` are too few to tell which experts of a layer are idle."""
    if tokens * spec.top_k < 8 * spec.num_experts:
        raise LifecycleError(
            f"a split read {tokens} tokens in {spec.name}, too few to tell which of {spec.num_experts} experts are "
            "idle; give more batches"
        )


def fair_shares(index_TK: Tensor, num_experts: int) -> Tensor:
    """Shares in fair shares, float64 ``(E,)`` on the CPU."""
    count_E = torch.bincount(index_TK.reshape(-1).cpu(), minlength=num_experts)[:num_experts].double()
    return count_E * num_experts / count_E.sum().clamp_min(1.0)


def logit_std(tap: RouterTap) -> float:
    """Standard deviation of the layer's logits over its experts, mean over tokens."""
    return float(tap.logits().var(-1, correction=0).mean().sqrt())


def _listed(share_E: Tensor) -> tuple[float, ...]:
    return tuple(share_E.tolist())


# ---------------------------------------------------------------------------------------------------------- k = 1


def _rows_split(tap: RouterTap, spec: LayerSpec, index_TK: Tensor, idle: float, busy: float) -> LayerSplit:
    """Copies and split rows of a layer with one expert per token."""
    num, std = spec.num_experts, logit_std(tap)
    before_E = share_E = fair_shares(index_TK, num)
    weight_ED = tap.layer.adapter.weight(tap.layer.router).detach().float()
    rows: dict[int, Tensor] = {}
    copies: list[ExpertCopy] = []
    origin = list(range(num))
    hidden_TD: Tensor | None = None
    while True:
        free = [e for e in range(num) if e not in rows and float(share_E[e]) < idle]
        donor = int(share_E.argmax())
        if not free or float(share_E[donor]) <= busy or std == 0.0:
            break
        if hidden_TD is None:
            tap.require_linear()
            hidden_TD = tap.hidden()
        target = min(free, key=lambda e: (float(share_E[e]), e))
        split_D = splitting_direction(hidden_TD[index_TK[:, 0] == donor], STRENGTH * std)
        if split_D is None:
            break
        row_D = rows.get(donor, weight_ED[donor])
        rows[donor], rows[target] = row_D + split_D, row_D - split_D
        origin[target] = origin[donor]
        copies.append(ExpertCopy(donor=origin[donor], target=target, row_of=donor))
        with tap.rows(rows):
            index_TK = tap.choose()
        share_E = fair_shares(index_TK, num)
    reason = "" if copies else f"no expert is below {idle} fair shares beside one above {busy}"
    return LayerSplit(
        spec=spec,
        copies=tuple(copies),
        rows=rows,
        logit_std=std,
        share_before=_listed(before_E),
        share_after=_listed(share_E),
        reason=reason,
    )


def splitting_direction(rows_ND: Tensor, spread: float) -> Tensor | None:
    """v along the first principal component of `rows_ND`, orthogonal to their mean, with ``std(rows v) = spread``."""
    if rows_ND.shape[0] < 2:
        return None
    mean_D = rows_ND.mean(0)
    unit_D = mean_D / mean_D.norm().clamp_min(1e-12)
    centred_ND = rows_ND - mean_D
    centred_ND = centred_ND - (centred_ND @ unit_D)[:, None] * unit_D
    found_D = centred_ND[int(centred_ND.square().sum(-1).argmax())].clone()  # power iteration from the farthest token
    for _ in range(_POWER_STEPS):
        found_D = found_D / found_D.norm().clamp_min(1e-12)
        found_D = centred_ND.T @ (centred_ND @ found_D)
    found_D = found_D / found_D.norm().clamp_min(1e-12)
    size = float((centred_ND @ found_D).std(correction=0))
    return found_D * (spread / size) if size > 1e-9 else None


# ---------------------------------------------------------------------------------------------------------- k > 1


def _bias_split(tap: RouterTap, spec: LayerSpec, before_TK: Tensor, idle: float) -> LayerSplit:
    """Bias and copies of a layer with several experts per token."""
    num, std = spec.num_experts, logit_std(tap)
    before_E = fair_shares(before_TK, num)
    unchanged = LayerSplit(
        spec=spec,
        logit_std=std,
        share_before=_listed(before_E),
        share_after=_listed(before_E),
        reason=f"no expert is below {idle} fair shares",
    )
    if float(before_E.min()) >= idle or std == 0.0:
        return unchanged
    shift_E = solve_bias(tap, spec, before_E, std)
    with tap.shifted(shift_E):
        after_TK = tap.choose()
    is_idle = {e for e in range(num) if float(before_E[e]) < idle}
    copies = []
    for target in sorted(is_idle):
        donor = _relieved(target, before_TK, after_TK, is_idle, num)
        if donor is not None:
            copies.append(ExpertCopy(donor=donor, target=target))
    share_after = _listed(fair_shares(after_TK, num))
    return replace(unchanged, copies=tuple(copies), shift_E=shift_E, share_after=share_after, reason="")


def solve_bias(
    tap: RouterTap, spec: LayerSpec, share_E: Tensor, std: float, moving: Collection[int] | None = None
) -> Tensor:
    """A shift of the logits under which shares lie in [1 / BOUND, BOUND] (in the first layer: at FLOOR or above).

    Experts outside the bounds take individual steps, halved on arrival and growing until then.

    Args:
        tap: calls of the router, and where the shift may act for a while.
        spec: of its layer.
        share_E: fair shares without the shift.
        std: of :func:`logit_std`.
        moving: experts that are brought there, with a shift of their own; None = all.

    Returns:
        The best found, in logits, fp32 ``(E,)`` on the CPU, centred over the layer's experts.
    """
    device = tap.layer.adapter.weight(tap.layer.router).device
    num = len(share_E)
    low, high = (FLOOR, math.inf) if spec.layer_id == 0 else (1.0 / BOUND, BOUND)
    high = min(high, num / spec.top_k)
    held_E = torch.tensor([moving is not None and expert not in moving for expert in range(num)])
    shift_E, side_E = torch.zeros(2, num, dtype=torch.float64)
    step_E = torch.full_like(shift_E, _FIRST)
    best_E, best = shift_E.clone(), math.inf
    for _ in range(_SOLVE_STEPS):
        ratio_E = share_E.clamp_min(1e-3)
        inside_E = ((ratio_E >= low) & (ratio_E <= high)) | held_E
        # Aimed a little past the edge: towards the edge itself the steps would become ever smaller.
        error_E = torch.where(ratio_E < low, (_PAST * low / ratio_E).log(), (high / _PAST / ratio_E).log())
        error_E = error_E.masked_fill(inside_E, 0.0)
        off = float(error_E.abs().sum())
        if off < best:
            best, best_E = off, shift_E.clone()
        if off == 0.0:
            break
        now_E = error_E.sign()
        # An expert that was pushed and has arrived, or gone past, moves more gently from then on.
        arrived_E, pushed_E = (side_E != 0) & (now_E != side_E), (side_E != 0) & (now_E == side_E)
        step_E = torch.where(arrived_E, step_E * 0.5, torch.where(pushed_E, step_E * 1.2, step_E))
        step_E, side_E = step_E.clamp(_SMALLEST, _LARGEST), now_E
        shift_E = shift_E + step_E * error_E.clamp(-1.0, 1.0)
        with tap.shifted((shift_E * std).float().to(device)):
            share_E = fair_shares(tap.choose(), num)
    return ((best_E - best_E.mean()) * std).float()


def _relieved(target: int, before_TK: Tensor, after_TK: Tensor, idle: set[int], num_experts: int) -> int | None:
    """The expert that lost most of the tokens the target gained; an idle one is no donor."""
    new_T = (after_TK == target).any(-1) & ~(before_TK == target).any(-1)
    old_NK, now_NK = before_TK[new_T], after_TK[new_T]
    gone_NK = ~(old_NK[:, :, None] == now_NK[:, None, :]).any(-1)
    count_E = torch.bincount(old_NK[gone_NK].cpu(), minlength=num_experts)[:num_experts]
    for expert in idle:
        count_E[expert] = 0
    return int(count_E.argmax()) if int(count_E.max()) > 0 else None
