"""Loss tokens: positions whose label takes part in the loss, seen in what a forward is given, without a host read.

A forward that is given no labels (its loss is computed outside: DPO, GRPO, label smoothing) says nothing about them,
and neither does a compiled one. The count itself is in ``Sums``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, compiler, nn
from transformers import PreTrainedModel

from chronomoe_hf.recording.scope import forward_parameters
from chronomoe_hf.recording.totals import Sums

LABELS = "_chrono_labels"
"""Name of the plain attribute of a model that is given labels, which says where they are counted."""
_NOT_SHIFTED = ("ForMaskedLM", "ForTokenClassification")


@dataclass
class Labelled:
    """How the labels of one model are read.

    Args:
        sums: of the system.
        parameters: names of the model's positional parameters.
        shifted: the model shifts labels itself, so the first one of a row is never predicted.
    """

    sums: Sums
    parameters: tuple[str, ...]
    shifted: bool


def labelled_models(root: nn.Module, outer: nn.Module, sums: Sums) -> dict[nn.Module, Labelled]:
    """The models whose forward is given labels.

    Args:
        root: the model that was wrapped.
        outer: `root`, or what is around it. PEFT calls ``root.forward`` past its hooks, so it is read there.
        sums: of the system.
    """
    found = {}
    for module in root.modules():
        if isinstance(module, PreTrainedModel) and "labels" in forward_parameters(module):
            found[module] = Labelled(sums, forward_parameters(module), shifts(module))
    for module in outer.modules():
        if module is root:
            break  # what comes after it is no wrapper around it
        if hasattr(type(module), "get_base_model"):
            found[module] = Labelled(sums, forward_parameters(module), shifts(root))
    return found


def shifts(model: nn.Module) -> bool:
    """Whether position t of the labels is predicted from the positions before it, in the model itself."""
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return not encoder_decoder and getattr(model, "loss_type", None) not in _NOT_SHIFTED


def show_labels(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: shows the labels to the scopes inside; the innermost model that is given some decides."""
    if compiler.is_compiling():
        return
    seen: Labelled = module.__dict__[LABELS]
    named = dict(zip(seen.parameters, args, strict=False)) | kwargs
    labels, ready = named.get("labels"), named.get("shift_labels")
    if not isinstance(labels, Tensor) or labels.dim() < 2:
        return  # none, or one for a whole row: no tokens
    seen.sums.labels = ready if isinstance(ready, Tensor) else labels[..., 1:] if seen.shifted else labels


def hide_labels(module: nn.Module, args: Any, output: Any) -> None:
    """Always-called forward hook: labels are of one forward."""
    if not compiler.is_compiling():
        module.__dict__[LABELS].sums.labels = None
