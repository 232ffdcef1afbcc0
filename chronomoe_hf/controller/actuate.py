"""From decisions to the next window: beta, native biases, lens bases. Every rank does the same arithmetic.

Shape suffixes: L layers, E experts, D router input width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from chronomoe_hf import distributed
from chronomoe_hf.errors import ConfigError
from chronomoe_hf.lens.basis import carried
from chronomoe_hf.lens.direction import RouterInputs
from chronomoe_hf.telemetry import SystemSnapshot
from chronomoe_hf.wrapping.layer import Layer

if TYPE_CHECKING:  # system imports this room
    from chronomoe_hf.system import ChronoSystem


def balance(system: ChronoSystem, count_LE: Tensor) -> None:
    """One step of the balance law: on beta, or on the model's own correction bias where it has one.

    Raises:
        ConfigError: a correction bias that is a parameter has been sharded over the ranks.
    """
    beta = system.config.beta
    step_LE = system.step_state.apply_balance(count_LE, beta, system.untouched_L)
    for layer in system.layers:
        if layer.native_bias:
            _require_whole_bias(system, layer)
            layer.update_native_bias(step_LE[layer.layer_id, : layer.num_experts], beta)
        layer.handle.state.beta_on = layer.takes_beta
    system.governed = True


def _require_whole_bias(system: ChronoSystem, layer: Layer) -> None:
    if layer.layer_id in system.native_parameters and distributed.is_sharded(layer.adapter.weight(layer.router)):
        raise ConfigError(
            f"layer {layer.layer_id} ({layer.name}): the correction bias of {layer.adapter.family} is a parameter, "
            "and this engine shards parameters over the ranks, so it cannot be updated in place; set "
            "BetaConfig(native=False)"
        )


def share_control(system: ChronoSystem) -> Tensor:
    """Rank 0's lens scales and beta multipliers on every rank, in one small broadcast; returns the multipliers.

    The ranks have decided from the same numbers, but on hosts of different kinds the last bit of a logarithm may
    differ, and a lens that is open on one rank only would hang engines that gather weights in the forward.
    """
    control_L2 = torch.zeros(len(system.layers), 2, dtype=torch.float64)
    control_L2[:, 1] = 1.0
    for decision in system.decisions:
        control_L2[decision.layer_id, 1] = decision.beta_multiplier
    for layer_id, lens in system.lenses.items():
        control_L2[layer_id, 0] = lens.scale
    if distributed.active():
        control_L2 = distributed.broadcast_(control_L2.to(system.step_state.device)).cpu()
        for layer_id, lens in system.lenses.items():
            lens.set_scale(float(control_L2[layer_id, 0]))
    return control_L2[:, 1]


def move_beta(system: ChronoSystem, step: int, keep_L: Tensor) -> None:
    """The coherence law and forgetting, for the next window; layers that take no beta stay at zero.

    Args:
        system: the wrapped model's.
        step: optimizer step that closed the window.
        keep_L: what each layer's beta is multiplied with, float64 on the host.
    """
    if system.config.beta.law != "coherence":
        return
    system.step_state.apply_coherence(step, system.config.beta, system.untouched_L)
    system.step_state.forget(keep_L)
    for layer in system.layers:
        layer.handle.state.beta_on = layer.takes_beta
    system.governed = True


def read_inputs(system: ChronoSystem, sums: list[Tensor]) -> list[RouterInputs]:
    """Tell every lens how well its reader reads, before the controller decides; one transfer for all layers.

    Args:
        system: the wrapped model's.
        sums: of the router inputs per layer with a lens, over all ranks; empty where nothing was recorded.

    Returns:
        What the lenses are aimed by, in the order of `sums`.
    """
    inputs = [RouterInputs.from_sums(each) for each in sums]
    if inputs:
        with_lens = [layer.handle.lens for layer in system.layers if layer.handle.lens is not None]
        spread_L = torch.stack([each.spread for each in inputs]).tolist()
        for lens, spread in zip(with_lens, spread_L, strict=True):
            lens.spread = spread
    return inputs


def aim_lenses(
    system: ChronoSystem, inputs: list[RouterInputs], snapshot: SystemSnapshot | None, held: dict[int, float]
) -> None:
    """Open, close and aim the lenses for the next window. Collective where router weights are sharded.

    Args:
        system: the wrapped model's.
        inputs: from :func:`read_inputs`, per layer with a lens; empty = keep the bases.
        snapshot: of the window, None if it could not be evaluated.
        held: lens scales of the window that closes.
    """
    with_lens = [layer for layer in system.layers if layer.handle.lens is not None]
    for layer in with_lens:
        assert layer.handle.lens is not None
        layer.handle.lens_open = layer.handle.lens.scale > 0.0
    if snapshot is None or not inputs:
        return
    by_id = {layer.layer_id: layer for layer in snapshot.layers}
    for layer, seen_inputs in zip(with_lens, inputs, strict=True):
        lens, seen = layer.handle.lens, by_id[layer.layer_id]
        assert lens is not None
        if not layer.handle.lens_open or seen.shares is None:
            continue
        weight_ED = distributed.full_weight(layer.adapter.weight(layer.router))
        std = seen.logit_std or 1.0  # of the snapshot: already on the host
        carry = carried(held[layer.layer_id], lens.scale, system.config.lens.memory)
        settings = system.config.lens
        reader_D = seen_inputs.reader_D if settings.reader == "ridge" else None  # None reads along the mean input
        lens.aim(seen_inputs.mean_D, weight_ED, seen.shares, std, settings.basis, carry, reader_D)
        system.governed = True
