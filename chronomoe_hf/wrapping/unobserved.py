"""Why a wrapped layer was not called in a window, as far as the model itself shows it."""

from __future__ import annotations

from chronomoe_hf.router.forward import ChronoRouter
from chronomoe_hf.wrapping.layer import Layer


def why_unobserved(layer: Layer, others_ran: bool) -> str:
    """The likely cause, with the way out.

    Args:
        layer: a layer that no training forward called in the window.
        others_ran: other layers of the model were called in it.
    """
    router = layer.router
    if not isinstance(router, ChronoRouter) or not any(module is router for module in layer.parent.modules()):
        return (
            f"another module runs in the place of {layer.name}, put there after wrap(); "
            "call chronomoe_hf.unwrap(model) and then wrap(model) on the model as it is now"
        )
    if others_ran:
        return "other layers ran in this window and this one did not: no token took that branch of the model"
    if not layer.parent.training:
        return "the model is in eval mode; call model.train()"
    return (
        "no training forward of this model ran: another model object may be in training (wrap or attach that one), "
        "or its forwards ran under torch.no_grad()"
    )
