"""Decisions in, state out: the one place where governing writes beta, native correction biases and lenses.

Other writers are no governing: loading a state, folding at unwrap, a cut, a split.

Every rank does the same arithmetic on rank 0's decisions. Shape suffixes: L layers, E experts, D router input width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chronomoe_hf import distributed
from chronomoe_hf.config import BetaConfig, ChronoConfig
from chronomoe_hf.controller.decisions import ControlDecision
from chronomoe_hf.errors import ConfigError
from chronomoe_hf.lens.basis import carried
from chronomoe_hf.lens.direction import RouterInputs
from chronomoe_hf.lens.lens import ChronoLens
from chronomoe_hf.step_state import StepState
from chronomoe_hf.wrapping.layer import Layer


@dataclass(frozen=True)
class Control:
    """What all ranks do at the end of a window.

    Args:
        scale_L: lens scale per layer, NaN = leave it; float64 on the host.
        keep_L: what each layer's beta is multiplied with, float64 on the host.
        failures: ranks whose evaluation failed.
    """

    scale_L: Tensor
    keep_L: Tensor
    failures: int

    @property
    def decided(self) -> bool:
        """Whether the main process has decided; if not, lenses stay as they are."""
        return not bool(self.scale_L.isnan().any())


def share_control(
    decisions: Sequence[ControlDecision] | None, layers: Sequence[Layer], device: torch.device
) -> Control:
    """The main process's decisions on every rank, in one small all-reduce. Collective.

    The ranks have decided from the same numbers, but on hosts of different kinds the last bit of a logarithm may
    differ, and a lens that is open on one rank only would hang engines that gather weights in the forward. A rank whose
    evaluation failed takes part all the same and does what the main process decided.

    Args:
        decisions: of this rank; None if its evaluation failed.
        layers: the wrapped layers.
        device: where collectives run.
    """
    control = torch.zeros(2 * len(layers) + 1, dtype=torch.float64)
    if distributed.is_main():
        control[: len(layers)] = 0.0 if decisions is not None else torch.nan
        control[len(layers) : -1] = 1.0
        for decision in decisions or ():
            control[decision.layer_id] = decision.scale
            control[len(layers) + decision.layer_id] = decision.beta_multiplier
    control[-1] = float(decisions is None)
    if distributed.active():
        control = distributed.all_reduce_sum_(control.to(device)).cpu()
    return Control(control[: len(layers)], control[len(layers) : -1], int(control[-1]))


def balance(state: StepState, layers: Sequence[Layer], config: ChronoConfig, count_LE: Tensor) -> None:
    """One step of the balance law: on beta, or on the model's own correction bias where it has one.

    Args:
        state: the stacked state; its beta moves.
        layers: the wrapped layers.
        config: settings.
        count_LE: the step's assignments, over all ranks.

    Raises:
        ConfigError: a correction bias that is a parameter has been sharded over the ranks.
    """
    step_LE = state.apply_balance(count_LE, config.beta)
    native = [layer for layer in layers if layer.native_bias]
    for layer in native:
        _require_whole_bias(layer)
    if native:
        move_native_biases(native, step_LE, state.logit_std_L, config.beta)


def move_native_biases(layers: Sequence[Layer], step_LE: Tensor, logit_std_L: Tensor, beta: BetaConfig) -> None:
    """The balance law on the model's own correction biases, in their score units; only the change is centred.

    Args:
        layers: those that have such a bias.
        step_LE: centred step of the law in units of the rate, from ``StepState.apply_balance``, of all layers.
        logit_std_L: of all layers, for ``native_rate=None``.
        beta: the rate.
    """
    if beta.native_rate is not None:
        moved_LE = step_LE * beta.native_rate
    else:
        moved_LE = step_LE * logit_std_L[:, None]
    alike: dict[tuple[torch.device, torch.dtype, float], list[Layer]] = {}
    biases: dict[int, Tensor] = {}
    for layer in layers:
        bias_E = layer.adapter.native_bias(layer.router, layer.parent)
        assert bias_E is not None
        slope = 1.0 if beta.native_rate is not None else beta.rate * layer.adapter.rule.bias_slope(layer.num_experts)
        biases[layer.layer_id] = bias_E
        alike.setdefault((bias_E.device, bias_E.dtype, slope), []).append(layer)
    with torch.no_grad():
        for (device, dtype, slope), group in alike.items():
            there_LE = moved_LE.to(device=device, dtype=dtype)  # in the bias's dtype, in one operation for all layers
            changes = [there_LE[layer.layer_id, : layer.num_experts] for layer in group]
            torch._foreach_add_([biases[layer.layer_id] for layer in group], changes, alpha=slope)


def shift_biases(
    state: StepState, layers: Sequence[Layer], shifts: Mapping[int, Tensor], logit_std: Mapping[int, float]
) -> Callable[[], None]:
    """Add shifts of the logits to beta, or to the model's own correction bias where the balance law moves that.

    Args:
        state: the stacked state; its beta moves, and its logit standard deviation where none was measured yet.
        layers: the wrapped layers.
        shifts: by layer_id, in logits, ``(E,)``.
        logit_std: by layer_id, to bring them into beta's unit.

    Returns:
        A function that gives every bit back.
    """
    held = {name: getattr(state, name).clone() for name in ("beta_LE", "logit_std_L")}
    biases: list[tuple[Tensor, Tensor]] = []
    measured = (state.std_updates_L > 0).tolist()
    with torch.no_grad():
        for layer_id, shift_E in shifts.items():
            layer, std = layers[layer_id], logit_std[layer_id]
            if layer.native_bias:
                _require_whole_bias(layer)
                bias_E = layer.adapter.native_bias(layer.router, layer.parent)
                assert bias_E is not None
                biases.append((bias_E.detach(), bias_E.detach().clone()))
                bias_E.detach().add_((shift_E * layer.adapter.rule.bias_slope(layer.num_experts)).to(bias_E))
                continue
            if not measured[layer_id]:
                state.logit_std_L[layer_id] = std
            unit = float(state.logit_std_L[layer_id])
            state.beta_LE[layer_id, : layer.num_experts] += shift_E.to(state.device) / unit

    def restore() -> None:
        with torch.no_grad():
            for name, value in held.items():
                getattr(state, name).copy_(value)
            for bias_E, before_E in biases:
                bias_E.copy_(before_E)

    return restore


def _require_whole_bias(layer: Layer) -> None:
    if layer.bias_is_parameter and distributed.is_sharded(layer.adapter.weight(layer.router)):
        raise ConfigError(
            f"layer {layer.layer_id} ({layer.name}): the correction bias of {layer.adapter.family} is a parameter, "
            "and this engine shards parameters over the ranks, so it cannot be updated in place; set "
            "BetaConfig(native=False)"
        )


def move_beta(state: StepState, config: ChronoConfig, step: int, control: Control, cap: float) -> bool:
    """What the law in force does to beta when a window closes; layers that take no beta stay at zero.

    The coherence law moves it and forgets part of it. The balance law has moved it in every step; only the part that is
    common to all experts, which does nothing, is taken out here.

    Args:
        state: the stacked state; its beta moves.
        config: settings.
        step: optimizer step that closed the window.
        control: says how much of beta each layer keeps.
        cap: of the law in force.

    Returns:
        Whether beta was moved.
    """
    if config.beta.law == "balance":
        state.recentre(cap)
    if config.beta.law != "coherence":
        return False
    state.apply_coherence(step, config.beta, state.untouched_L)
    state.forget(control.keep_L)
    return True


def aim_lenses(
    layers: Sequence[Layer],
    config: ChronoConfig,
    control: Control,
    inputs: Mapping[int, RouterInputs],
    shares: Mapping[int, Sequence[float]],
    logit_std: Sequence[float],
) -> bool:
    """Set every lens's scale for the next window, and the basis of those that open. Collective if weights are sharded.

    Args:
        layers: the wrapped layers.
        config: settings.
        control: the scales; nothing happens where the main process has not decided.
        inputs: what router inputs looked like, by layer; a layer without keeps its basis.
        shares: of the window, by layer; a layer without assignments keeps its basis.
        logit_std: per layer.

    Returns:
        Whether a lens was aimed.
    """
    if not control.decided:
        return False
    aimed = False
    for layer, scale in zip(layers, control.scale_L.tolist(), strict=True):
        lens = layer.handle.lens
        if lens is None:
            continue
        held = lens.scale
        lens.set_scale(scale)
        if lens.is_open and layer.layer_id in inputs and layer.layer_id in shares:
            _aim(layer, lens, config, held, inputs[layer.layer_id], shares[layer.layer_id], logit_std[layer.layer_id])
            aimed = True
    return aimed


def _aim(
    layer: Layer,
    lens: ChronoLens,
    config: ChronoConfig,
    held: float,
    seen: RouterInputs,
    shares: Sequence[float],
    logit_std: float,
) -> None:
    weight_ED = distributed.full_weight(layer.adapter.weight(layer.router))
    if layer.cut:  # the lens moves tokens between the experts that are left
        kept = [expert for expert in range(layer.num_experts) if expert not in layer.cut]
        weight_ED, shares = weight_ED[kept], [shares[expert] for expert in kept]
    carry = carried(held, lens.scale, config.lens.memory)
    reader_D = seen.reader_D if config.lens.reader == "ridge" else None  # None reads along the mean input
    lens.aim(seen.mean_D, weight_ED, shares, logit_std or 1.0, config.lens.basis, carry, reader_D)
