"""The arms of the balance benchmark: what governs a run, by name.

Legend: T tokens, L layers, E experts, D router input width.
"""

from __future__ import annotations

import ast
from typing import Any

import torch
from torch import Tensor, nn

from chronomoe_hf import ChronoConfig, ChronoSystem
from chronomoe_hf.coherence import read_clocks
from chronomoe_hf.config import ControlConfig, LensConfig, VetoConfig
from chronomoe_hf.router.laws import coherence_law

SIGN_RATE = 0.1  # tuned: fewest updates to balance on seed 0 of e8 and e32 (results/balance_changed.md)
BALANCE_0_2 = {"dead_zone": None, "rate": 0.3, "first_layer": "same"}

# `protect` with one thing changed: what each default is there for.
CHANGED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "reader mean": ({"lens_spread_max": 1e6}, {"reader": "mean"}),
    "no spread limit": ({"lens_spread_max": 1e6}, {}),
    "no memory": ({}, {"memory": 0.0}),
    "train_router": ({}, {"train_router": True}),
    "reader mean, train_router": ({"lens_spread_max": 1e6}, {"reader": "mean", "train_router": True}),
    "basis least_squares": ({}, {"basis": "least_squares"}),
    "scale_max 0.5": ({"scale_max": 0.5}, {}),
    "harm_threshold 0.02": ({"harm__threshold": 0.02}, {}),
    "original law": (
        {
            "gate": "pressure",
            "scale_max": 0.5,
            "warmup_steps": 100,
            "harm__threshold": 0.02,
            "harm__restart": False,
            "harm__hold": 0,
            "lens_spread_max": 1e6,
        },
        {"basis": "least_squares", "reader": "mean", "memory": 0.0, "train_router": True},
    ),
}
# The coherence study: gain, what earns nothing, clock, sign (-1 pushes coherent experts down), cap in std.
COHERENCE = tuple(
    f"coherence@{eta},{tau},{clock},{sign},{cap}"
    for eta, tau, clock, sign, cap in (
        ("0.01", "layer_mean", "slow", "+1", "0.3"),
        ("0.05", "layer_mean", "slow", "+1", "0.3"),
        ("0.05", "0.5", "slow", "+1", "0.3"),
        ("0.05", "layer_mean", "mid", "+1", "0.3"),
        ("0.05", "layer_mean", "slow", "-1", "0.3"),
        ("0.5", "layer_mean", "mid", "+1", "2.0"),
        ("0.5", "layer_mean", "mid", "-1", "2.0"),
    )
)
AUX = ("aux 0.001", "aux 0.01", "aux 0.02")
# `protect` by what its controller owes debt for: what the run is below a level, or what it lost since its baseline.
REFERENCES = ("protect level", "protect baseline")
FRONT = ("none", *AUX, "sign 0.001", "sign", "quantile", "balance 0.2", "balance", "protect", "revive")
ARMS = (*FRONT, *REFERENCES, "coherence", "proportional", *CHANGED)


def aux_weight(arm: str) -> float:
    """Weight of Transformers' auxiliary loss, alone or beside `revive`; 0 for the other arms."""
    beside = arm.removeprefix("revive + ")
    return float(beside.removeprefix("aux ")) if beside.startswith("aux ") else 0.0


def balance_config(**beta: Any) -> ChronoConfig:
    """The balance law without dead zone and first-layer rule, with another `rule` or `rate`."""
    return ChronoConfig.balance(beta={**BALANCE_0_2, **beta})


def arm_config(arm: str) -> ChronoConfig:
    """The configuration of an arm by name; ``none`` and ``aux`` only observe.

    ``sign@RATE`` is the sign rule at a rate, ``zone@LOW,HIGH,RATE,FIRST`` the balance law with that dead zone,
    ``revive@PART__FIELD=VALUE`` the preset `revive` with one other setting, ``revive + aux WEIGHT`` that with the
    auxiliary loss, ``coherence@ETA,TAU,CLOCK,SIGN,CAP`` a form of the coherence law (:class:`CoherenceForm`).
    """
    if arm.startswith("sign@"):
        return balance_config(rule="sign", rate=float(arm.removeprefix("sign@")))
    if arm.startswith("revive@"):
        name, _, value = arm.removeprefix("revive@").partition("=")
        return ChronoConfig.revive(**{name: ast.literal_eval(value)})
    if arm.startswith("revive + "):
        return ChronoConfig.revive()
    if arm.startswith("zone@"):
        low, high, rate, first = arm.removeprefix("zone@").split(",")
        return ChronoConfig.balance(
            beta={"dead_zone": (float(low), float(high)), "rate": float(rate), "first_layer": first}
        )
    if arm.startswith("coherence@"):
        alone = {"veto__enabled": False, "control__enabled": False, "lens__enabled": False}
        return ChronoConfig.protect(beta__eta=1e-12, beta__k_max=float(arm.rpartition(",")[2]), **alone)
    if arm in CHANGED:
        control, lens = CHANGED[arm]
        return ChronoConfig.protect(control=control, lens=lens)
    if arm == "none" or aux_weight(arm):
        return ChronoConfig.observe()
    return {
        "sign 0.001": balance_config(rule="sign", rate=0.001),
        "sign": balance_config(rule="sign", rate=SIGN_RATE),
        "proportional": balance_config(rule="proportional"),
        "quantile": balance_config(rate=1e-12, balance_cap=30.0),  # the bias is set by QuantileBias
        "balance 0.2": balance_config(),
        "balance": ChronoConfig.balance(),
        "protect": ChronoConfig.protect(),
        "protect level": ChronoConfig.protect(control__reference="level"),
        "protect baseline": ChronoConfig.protect(control__reference="baseline"),
        "revive": ChronoConfig.revive(),
        "coherence": ChronoConfig(
            veto=VetoConfig(enabled=False), control=ControlConfig(enabled=False), lens=LensConfig(enabled=False)
        ),
    }[arm]


class CoherenceForm:
    """The coherence law with another gain, target, clock, sign and cap, in place of the configured one.

    Args:
        system: of a model under the coherence law with next to no gain.
        arm: ``coherence@ETA,TAU,CLOCK,SIGN,CAP``.
        interval: optimizer steps between updates.
    """

    def __init__(self, system: ChronoSystem, arm: str, interval: int) -> None:
        eta, tau, clock, sign, cap = arm.removeprefix("coherence@").split(",")
        self.state, self.interval, self.steps = system.step_state, interval, 0
        self.clock = ("fast", "mid", "slow").index(clock)
        self.law = {"eta": float(sign) * float(eta), "tau": tau if tau == "layer_mean" else float(tau)}
        self.law["k_max"] = float(cap)

    @torch.no_grad()
    def update(self) -> None:
        """Move beta once per interval; call it before every ``system.step``."""
        self.steps += 1
        if self.steps % self.interval:
            return
        state = self.state
        phi_LE = read_clocks(state.ema_CLE, state.updates_LE)[self.clock]
        seen_LE = state.updates_LE > 0
        state.beta_LE.copy_(
            coherence_law(state.beta_LE, phi_LE, seen_LE, state.tokens_LE, mask_LE=state.mask_LE, **self.law)
        )


def actor(arm: str, system: ChronoSystem, interval: int) -> QuantileBias | CoherenceForm | None:
    """What acts beside the library in an arm, None in most."""
    if arm.startswith("coherence@"):
        return CoherenceForm(system, arm, interval)
    return QuantileBias(system) if arm == "quantile" else None


def quantile_bias(logit_TE: Tensor, bias_E: Tensor, top_k: int) -> Tensor:
    """One round of the dual problem of even assignment: token thresholds first, then expert quantiles.

    A token takes the experts whose score plus bias exceeds a threshold between its k-th and (k+1)-th best. Given the
    thresholds, an expert's bias is set so that it exceeds them for exactly its capacity T k / E tokens: minus the
    (1 - k/E) quantile of score minus threshold.

    Args:
        logit_TE: clean router logits.
        bias_E: of the round before.
        top_k: k.

    Returns:
        The next bias, centred.

    Source: quantile balancing (J. Su 2025; ``qb_dual_update`` in Megatron Core); own code from the description.
    """
    best_TK = (logit_TE + bias_E).topk(top_k + 1, dim=-1).values
    threshold_T1 = best_TK[:, top_k - 1 :].mean(-1, keepdim=True)
    new_E = -torch.quantile(logit_TE - threshold_T1, 1.0 - top_k / logit_TE.shape[-1], dim=0)
    return new_E - new_E.mean()


class QuantileBias:
    """Quantile balancing: after every step, each layer's bias for the next one, from the step's own logits.

    Args:
        system: of a model under the balance law with next to no rate; the bias goes where that law's would.
    """

    def __init__(self, system: ChronoSystem) -> None:
        self.system = system
        self._input: dict[int, Tensor] = {}
        for layer in system.layers:
            layer.router.register_forward_pre_hook(self._keep(layer.layer_id))

    def _keep(self, layer_id: int) -> Any:
        def keep(router: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if router.training:
                self._input[layer_id] = inputs[0].detach()

        return keep

    @torch.no_grad()
    def update(self) -> None:
        """Set every layer's bias; call it before ``system.step``."""
        state = self.system.step_state
        for layer in self.system.layers:
            hidden_TD = self._input[layer.layer_id].flatten(0, -2)
            logit_TE = hidden_TD @ layer.router.weight.T
            std = float(logit_TE.std(-1).mean())  # beta is in units of the layer's logit standard deviation
            bias_E = state.beta_LE[layer.layer_id] * state.logit_std_L[layer.layer_id]
            state.beta_LE[layer.layer_id] = quantile_bias(logit_TE, bias_E, layer.top_k) / std
