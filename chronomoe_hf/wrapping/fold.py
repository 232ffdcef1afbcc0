"""What survives without the library: lens and beta written into the model's own weights, where that is exact.

The lens always folds into the weight of a linear router, ``W' = W + s (W U^T) V^T``. beta is a constant added to the
logits, so it folds where the model has a constant of the same kind:

* scope ``"routing"`` (choice and weights from ``z + beta``): the bias of the router's own linear;
* scope ``"selection"`` (only the choice): a native correction bias that is added to the *logits*. One that is added to
  sigmoid or softmax scores is another thing (``sigmoid(z + beta)`` is not ``sigmoid(z) + c``), and nothing is folded.

"Exact" is up to one rounding in the dtype of the weight. What does not fold is reported, with the share of tokens whose
experts it decided. Shape suffixes: E experts, D router input width.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from chronomoe_hf import distributed
from chronomoe_hf.errors import WrapError
from chronomoe_hf.lens.lens import fold_weight
from chronomoe_hf.patches.rules import TopKSquash
from chronomoe_hf.wrapping.layer import Layer
from chronomoe_hf.wrapping.weights import WAY_OUT, packed_as, quantised_router

logger = logging.getLogger("chronomoe_hf")

WARN_ABOVE = 0.01
_ADAPTER_WRAPPER = "base_layer"


@dataclass(frozen=True)
class FoldReport:
    """What became of one layer's steering.

    Args:
        layer_id: position among the wrapped layers.
        name: module path of the router.
        folded: what is in the model's own weights now: a subset of ``("lens", "beta")``.
        lost: what is not, with the reason: ``{"beta": "..."}``. It acts only while the model stays wrapped.
        topk_differs: share of the real tokens of the last window whose experts were not those of the plain router,
            everything that steered taken together; None where nothing steered or nothing was recorded.
    """

    layer_id: int
    name: str
    folded: tuple[str, ...]
    lost: dict[str, str]
    topk_differs: float | None

    def __str__(self) -> str:
        share = "an unknown share" if self.topk_differs is None else f"{100.0 * self.topk_differs:.2g} %"
        reasons = "; ".join(f"{part} does not fold: {reason}" for part, reason in self.lost.items())
        return f"layer {self.layer_id} ({self.name}): {share} of tokens go to other experts without it; {reasons}"


@torch.no_grad()
def fold_layers(model: nn.Module, layers: Sequence[Layer], topk_differs: Sequence[float | None]) -> list[FoldReport]:
    """Fold every layer in place; what was folded stops acting, so nothing is applied twice.

    Args:
        model: the wrapped root.
        layers: its layers.
        topk_differs: per layer, share of the tokens that the plain router sends to other experts; None = unknown.

    Returns:
        One report per layer. A warning names the layers that lose more than 1 % of their choices.

    Raises:
        WrapError: a lens or beta belongs to a router whose weights are sharded; nothing was changed.
    """
    for layer in layers:
        _require_whole(layer)
    reports = [_fold_layer(model, layer, differs) for layer, differs in zip(layers, topk_differs, strict=True)]
    _say_quantised(layers)
    lossy = [report for report in reports if report.lost]
    above = [report for report in lossy if report.topk_differs is None or report.topk_differs > WARN_ABOVE]
    for report in lossy:
        logger.info("fold: %s", report)
    if above:
        warnings.warn(
            "part of the routing does not survive outside chronomoe_hf:\n  "
            + "\n  ".join(map(str, above))
            + "\nKeep the model wrapped where it is used, or train on without this steering.",
            stacklevel=5,
        )
    return reports


def _fold_layer(model: nn.Module, layer: Layer, differs: float | None) -> FoldReport:
    folded: list[str] = []
    lost: dict[str, str] = {}
    handle = layer.handle
    if handle.lens_open:
        assert handle.lens is not None
        reason = layer.adapter.refused("fold") or _not_plain(model, layer)
        if reason is None:
            weight_ED = layer.adapter.weight(layer.router)
            weight_ED.copy_(fold_weight(weight_ED, handle.lens.V, handle.lens.U, handle.lens.scale))
            handle.lens.set_scale(0.0)
            folded.append("lens")
        else:
            lost["lens"] = reason
    if _has_beta(layer):
        target_E, reason = _beta_target(layer)
        reason = reason or _adapted(model, layer)
        if target_E is not None and reason is None and (packed := packed_as(target_E)) is not None:
            reason = f"the bias is quantised ({packed})"
        if target_E is not None and reason is None:
            state = handle.state
            target_E.add_(state.beta_applied.to(device=target_E.device, dtype=target_E.dtype))
            for value in (state.beta_coeff, state.beta_full, state.beta_applied):
                value.zero_()
            folded.append("beta")
        else:
            assert reason is not None
            lost["beta"] = reason
    return FoldReport(layer.layer_id, layer.name, tuple(folded), lost, differs)


def folds_beta(layer: Layer) -> bool:
    """Whether a beta of this layer can be written into the model's own weights, so that a plain server routes alike."""
    return layer.native_bias or _beta_target(layer)[1] is None


def _has_beta(layer: Layer) -> bool:
    return layer.handle.state.beta_on and bool(layer.handle.state.beta_applied.any())


def _beta_target(layer: Layer) -> tuple[Tensor | None, str | None]:
    """The model's tensor that stands for a constant shift of the logits in the layer's scope, or why there is none."""
    adapter = layer.adapter
    if layer.handle.state.scope == "routing":
        bias_E = adapter.linear_bias(layer.router)
        return bias_E, None if bias_E is not None else "the router has no bias of its own"
    bias_E = adapter.native_bias(layer.router, layer.parent)
    if bias_E is None:
        return None, "the model has no bias that acts on the choice alone"
    if not isinstance(adapter.rule, TopKSquash):
        return None, "the model's correction bias is added to scores, beta to logits"
    return bias_E, None


def _adapted(model: nn.Module, layer: Layer) -> str | None:
    """Why the router's own tensors are not all of it, or None."""
    path = next(name for name, module in model.named_modules() if module is layer.router)
    if _ADAPTER_WRAPPER in path.split("."):
        return "a PEFT adapter acts on the router's weight; call merge_and_unload() first"
    return None


def _not_plain(model: nn.Module, layer: Layer) -> str | None:
    """Why nothing can be written into the router's weight now, with the way out; also where that came after wrap."""
    quantised = quantised_router(layer.adapter, layer.router)
    return _adapted(model, layer) or (None if quantised is None else f"{quantised}; {WAY_OUT}")


def require_foldable(model: nn.Module, layers: Sequence[Layer]) -> None:
    """Before a model is unwrapped with a fold: every open lens can be written, so that none is lost.

    Args:
        model: the wrapped root.
        layers: its layers.

    Raises:
        WrapError: a lens is open over a router whose weight is quantised, or under an adapter that is not merged.
    """
    for layer in layers:
        reason = _not_plain(model, layer) if layer.handle.lens_open else None
        if reason is not None:
            raise WrapError(
                f"layer {layer.layer_id} ({layer.name}): its lens is open and cannot fold: {reason}; or unwrap(model) "
                "without a fold, which drops the lens (a saved state keeps it). Nothing was changed"
            )


def _say_quantised(layers: Sequence[Layer]) -> None:
    """One sentence where nothing can fold because routers are quantised, though nothing is lost by it."""
    reasons = [quantised_router(layer.adapter, layer.router) for layer in layers if not layer.handle.lens_open]
    named = [reason for reason in reasons if reason is not None]
    if named:
        warnings.warn(
            f"nothing folds into the routers of {len(named)} of {len(layers)} layers, and no lens was open there: "
            f"{named[0]}; {WAY_OUT}",
            stacklevel=6,
        )


def _require_whole(layer: Layer) -> None:
    steers = layer.handle.lens_open or layer.handle.state.beta_on
    if steers and distributed.is_sharded(layer.adapter.weight(layer.router)):
        raise WrapError(
            f"layer {layer.layer_id} ({layer.name}): the router's weight is sharded over ranks, and folding needs it "
            "whole; save the model, load it in one process, restore the state with system.load(directory), fold there"
        )
