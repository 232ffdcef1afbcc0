"""A plugin for vLLM: the beta and the lens of a governed checkpoint act where vLLM serves it.

vLLM finds it by itself where this package is installed (entry point group ``vllm.general_plugins``) and calls
:func:`register` in each of its processes. From then on a model that is loaded from a directory whose folder
``chronomoe`` steers, routes as it was trained:

* a beta of scope ``"routing"`` is added to what the gate returns: choice and weights come from ``z + beta``;
* a beta of scope ``"selection"`` (``balance``) chooses only: experts from ``z + beta``, weights from ``z``. This needs
  vLLM's plain softmax choice; a router that scores otherwise is refused by name, and the model does not load;
* an open lens is folded into the gate's weight, ``W' = W + s (W U^T) V^T``.

``CHRONOMOE_STATE=DIRECTORY`` names another directory, ``CHRONOMOE_STATE=off`` serves the plain model. Nothing of vLLM
is imported before it loads a model. A balance in the family's own correction bias needs no plugin: vLLM reads it.

Shape suffixes: T tokens, E experts, K chosen experts, D router input, R rank of the lens.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import re
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chronomoe_hf.checkpoint.state_file import has_state, read_state
from chronomoe_hf.checkpoint.store import steering_of
from chronomoe_hf.config import ChronoConfig
from chronomoe_hf.errors import UnsupportedArchitectureError
from chronomoe_hf.lens.lens import fold_weight
from chronomoe_hf.step_state import StepState

logger = logging.getLogger("chronomoe_hf")

VARIABLE = "CHRONOMOE_STATE"
OFF = "off"
_LOADER = "vllm.model_executor.model_loader.default_loader"
_NUMBER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True)
class Steering:
    """What acts in one layer.

    Args:
        name: of the router in Transformers.
        beta_E: fp32, added to the logits; None = none.
        scope: ``"routing"`` or ``"selection"``.
        lens: (V ``[D, R]``, U ``[R, D]``, scale) of an open lens, or None.
    """

    name: str
    beta_E: Tensor | None
    scope: str
    lens: tuple[Tensor, Tensor, float] | None


def register() -> None:
    """Entry point of vLLM: steer every model that this process loads from now on. A second call does nothing."""
    if os.environ.get(VARIABLE) == OFF:
        return
    loader = importlib.import_module(_LOADER).DefaultModelLoader
    if getattr(loader.load_weights, "chronomoe", False):
        return
    native: Callable[..., Any] = loader.load_weights

    # Weights are as in the files here; afterwards vLLM packs them for its kernels.
    @functools.wraps(native)
    def load_weights(self: Any, model: nn.Module, model_config: Any, *args: Any, **kwargs: Any) -> Any:
        result = native(self, model, model_config, *args, **kwargs)
        directory = os.environ.get(VARIABLE) or str(model_config.model)
        steered = steer(model, directory)
        if steered:
            logger.warning("chronomoe: the steering of %s acts in %d layers", directory, steered)
        return result

    load_weights.chronomoe = True  # type: ignore[attr-defined]
    loader.load_weights = load_weights


def read_steering(directory: str | Path) -> list[Steering]:
    """What steers in the state of a directory; empty where there is no state, or nothing in it steers.

    Raises:
        StateError: there is a state, and it is torn or foreign.
    """
    if not Path(directory).is_dir() or not has_state(directory):
        return []
    tensors, meta = read_state(directory)
    if steering_of(tensors, meta) is None:
        return []
    beta = ChronoConfig.from_dict(meta["config"]).beta
    state = StepState([row["num_experts"] for row in meta["layers"]])
    state.load_state_dict({name: value for name, value in tensors.items() if name in state.NAMES})
    state.refresh(beta.balance_cap if beta.law == "balance" else beta.k_max)
    scope = beta.scope_in_force
    found = []
    for at, row in enumerate(meta["layers"]):
        beta_E = state.beta_applied_LE[at, : row["num_experts"]].float() if meta["steering"][at] else None
        scale = float(tensors.get(f"lens.{at}.scale", 0.0))
        lens = (tensors[f"lens.{at}.V"], tensors[f"lens.{at}.U"], scale) if scale > 0.0 else None
        acts = beta_E is not None and bool(beta_E.any())
        if acts or lens is not None:
            found.append(Steering(row["name"], beta_E if acts else None, scope, lens))
    return found


@torch.no_grad()
def steer(model: nn.Module, directory: str | Path) -> int:
    """Make the steering of `directory` act in a model of vLLM; returns in how many layers it does.

    Raises:
        UnsupportedArchitectureError: a layer cannot take it; nothing was changed.
    """
    planned = read_steering(directory)
    if not planned:
        return 0
    places = _places(model)
    jobs = []
    for each in planned:
        number = _number(each.name)
        if number not in places:
            known = sorted(map(str, places))
            raise UnsupportedArchitectureError(
                f"vLLM's {type(model).__name__} has no gate and experts for {each.name} (found layers "
                f"{known}); serve it unsteered with {VARIABLE}={OFF}, or fold: unwrap(model, fold=True)"
            )
        jobs.append((each, *places[number]))
    for each, gate, router in jobs:
        _require_possible(each, gate, router)
    for each, gate, router in jobs:
        if each.lens is not None:
            V_DR, U_RD, scale = each.lens
            gate.weight.copy_(fold_weight(gate.weight.float(), V_DR, U_RD, scale).to(gate.weight.dtype))
        if each.beta_E is not None and each.scope == "routing":
            gate.register_forward_hook(functools.partial(_add_beta, each.beta_E.to(gate.weight.device)))
        elif each.beta_E is not None:
            _choose_with(router, each.beta_E.to(gate.weight.device))
    return len(jobs)


def _number(name: str) -> int | None:
    match = _NUMBER.search(f"{name}.")
    return None if match is None else int(match[1])


def _places(model: nn.Module) -> dict[int | None, tuple[Any, Any]]:
    """Number of a decoder layer -> its gate, and vLLM's router."""
    gates, routers = {}, {}
    for name, module in model.named_modules():
        number = _number(name)
        last = name.rpartition(".")[2]
        if last in ("gate", "router") and isinstance(getattr(module, "weight", None), Tensor):
            gates[number] = module
        router = getattr(module, "router", None)
        if hasattr(type(router), "_compute_routing"):
            routers[number] = router
    return {number: (gates[number], routers[number]) for number in gates.keys() & routers.keys()}


def _require_possible(each: Steering, gate: Any, router: Any) -> None:
    rows = getattr(gate, "output_size", gate.weight.shape[0])
    if each.beta_E is not None and len(each.beta_E) != rows:
        raise UnsupportedArchitectureError(f"{each.name}: its gate has {rows} rows in vLLM, beta {len(each.beta_E)}")
    if each.beta_E is None or each.scope == "routing":
        return
    plain = getattr(router, "scoring_func", "softmax") == "softmax"
    other = [
        name for name in ("use_grouped_topk", "custom_routing_function", "e_score_correction_bias")
        if getattr(router, name, None) not in (None, False)
    ]  # fmt: skip
    if not plain or other:
        raise UnsupportedArchitectureError(
            f"{each.name}: a beta that only chooses needs vLLM's softmax choice, and this router has "
            f"{', '.join(other) or getattr(router, 'scoring_func', '?')}; serve it unsteered with {VARIABLE}={OFF}"
        )


def _add_beta(beta_E: Tensor, module: nn.Module, args: Any, output: Any) -> Any:
    """Hook of a gate: its logits, which come alone or with a bias."""
    if isinstance(output, tuple):
        return (output[0] + beta_E.to(output[0].dtype), *output[1:])
    return output + beta_E.to(output.dtype)


def _choose_with(router: Any, beta_E: Tensor) -> None:
    def compute(
        self: Any, hidden_states: Tensor, router_logits: Tensor, indices_type: Any = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        logits_TE = router_logits.float()
        ids_TK = (logits_TE + beta_E).topk(self.top_k, dim=-1).indices
        weight_TK = logits_TE.softmax(-1).gather(-1, ids_TK)
        if self.renormalize:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        return weight_TK.contiguous(), ids_TK.to(indices_type or torch.int32).contiguous()

    router._compute_routing = types.MethodType(compute, router)
