"""Whether the weights of a layer's experts can be written here: one answer for refitting, splitting and merging."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from chronomoe_hf.distributed import is_sharded
from chronomoe_hf.errors import LifecycleError
from chronomoe_hf.wrapping.discovery import FoundLayer

UNREACHABLE = {
    "dbrx": "the experts of dbrx share one flattened weight",
    "longcat": "some experts of longcat_flash are identities without weights",
    "none": "its experts cannot be reached",
}
"""``experts_call`` of an adapter -> why no single expert's weights can be written."""


def require_writable(layer: FoundLayer, weights: Iterable[Tensor], doing: str) -> None:
    """Raise LifecycleError where `weights` cannot be changed in place.

    Args:
        layer: a live layer.
        weights: what is to be written.
        doing: the verb of the message, for example ``"refit"``.

    Raises:
        LifecycleError: an adapter in the layer's block is not merged, or the weights are sharded, quantised or
            offloaded; with the way out.
    """
    adapted = [name for name, module in layer.parent.named_modules() if "base_layer" in module._modules]
    if adapted:
        raise LifecycleError(
            f"{layer.name}: {adapted[0]} carries an adapter that is not merged; call model.merge_and_unload() first"
        )
    for weight in weights:
        if is_sharded(weight):
            raise LifecycleError(
                f"{layer.name}: its experts are sharded over the ranks (FSDP, DeepSpeed ZeRO-3, tensor parallel); "
                f"{doing} a model loaded whole, in one process"
            )
        if not weight.is_floating_point() or weight.element_size() < 2:
            raise LifecycleError(f"{layer.name}: its experts are stored as {weight.dtype}; {doing} before quantising")
        if weight.device.type == "meta":
            raise LifecycleError(f"{layer.name}: its experts are offloaded; load the model so that they are in memory")
