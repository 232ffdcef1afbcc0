"""What a weight is, asked once when a model is wrapped: which of it may be read, steered, folded or written.

A router's or an expert's weight may be packed (bitsandbytes, FP8, MXFP4, GPTQ store codes and scales), a tensor
subclass that stands for one (torchao), or sharded. Codes are no weights: whoever would compute with them asks here
first and names what it finds.

Shape suffixes: T tokens, D router input width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from chronomoe_hf import distributed
from chronomoe_hf.patches import Adapter

WAY_OUT = (
    "load it with the routers left out of quantisation (llm_int8_skip_modules, modules_to_not_convert), "
    "as most quantised checkpoints are made"
)
_PLAIN = (Tensor, nn.Parameter)


def packed_as(weight: Tensor) -> str | None:
    """How a weight is stored where its elements are no numbers to compute with, or None for a floating weight.

    Args:
        weight: of a router or of experts, whole or sharded.

    Returns:
        For messages: ``"torch.uint8 (Params4bit)"``, ``"Int8Tensor"``.
    """
    local = distributed.local_part(weight)
    kind = type(local).__name__
    if is_traceable_wrapper_subclass(local):
        return kind
    if local.is_floating_point() and local.element_size() >= 2:
        return None
    return str(local.dtype) if type(local) in _PLAIN else f"{local.dtype} ({kind})"


def quantised_router(adapter: Adapter, router: nn.Module) -> str | None:
    """Why a router's own weight can be neither read nor written, in plain words; None where it is plain numbers."""
    packed = packed_as(adapter.weight(router))
    return None if packed is None else f"the router's weight is quantised ({packed})"


@dataclass(frozen=True)
class ProbeInput:
    """Made-up router inputs, in every dtype that the router may take, the likeliest first.

    Args:
        width: D.
        dtypes: to try.
        device: of the router.
    """

    width: int
    dtypes: tuple[torch.dtype, ...]
    device: torch.device

    def __iter__(self) -> Iterator[Tensor]:
        for dtype in self.dtypes:
            row = torch.linspace(-1.0, 1.0, 4 * self.width, device=self.device, dtype=dtype)
            hidden_TD = row.view(4, self.width)
            yield hidden_TD
            yield hidden_TD[None]


def probe_input(adapter: Adapter, router: nn.Module) -> ProbeInput | None:
    """What a router can be called with; None where that cannot be told (a weight not here, or of another form)."""
    weight = adapter.weight(router)
    if weight.is_meta or weight.numel() == 0:
        return None
    if packed_as(weight) is None:
        return ProbeInput(int(weight.shape[-1]), (weight.dtype,), weight.device) if weight.dim() == 2 else None
    width = _input_width(adapter, router, weight)
    if width is None:
        return None
    outer = (weight.dtype,) if weight.is_floating_point() and weight.element_size() >= 2 else ()
    return ProbeInput(width, tuple(dict.fromkeys((*outer, torch.float32, torch.bfloat16))), weight.device)


def _input_width(adapter: Adapter, router: nn.Module, weight: Tensor) -> int | None:
    """D of a packed weight: its linear layer's own, else its shape where packing has kept that."""
    holder = next((m for m in router.modules() if any(each is weight for each in m._parameters.values())), None)
    width = getattr(holder, "in_features", None)
    if isinstance(width, int):
        return width
    kept = weight.dim() == 2 and weight.shape[0] == adapter.num_experts(router)
    return int(weight.shape[1]) if kept else None
