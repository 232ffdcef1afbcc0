"""The probe: does a router return what its adapter describes?

Shape suffixes: T tokens, E router classes (experts), K experts chosen per token.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from chronomoe_hf.errors import ContractError
from chronomoe_hf.patches.registry import Adapter
from chronomoe_hf.router.state import Routing


def probe(adapter: Adapter, router: nn.Module, output: Any) -> Routing:
    """Check a native output against its adapter and return the routing read from it.

    Raises:
        ContractError: the output does not have the parts, widths or ids that the adapter describes.
    """
    where = f"{adapter.router_class} (family {adapter.family!r}, transformers {version('transformers')})"
    num_experts, k = adapter.num_experts(router), adapter.top_k(router)
    try:
        routing = adapter.read(router, output)
    except (IndexError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise ContractError(f"{where} returned {_shape_of(output)}, which its adapter cannot read: {error}") from error
    wrong = _disagreement(routing, num_experts, k)
    if wrong is not None:
        raise ContractError(
            f"{where} returned {_shape_of(output)}: {wrong}. The adapter was verified against Transformers 5.23; "
            "install that version, or describe the new layout with an Adapter (docs/adding_an_architecture.md)."
        )
    return routing


def _disagreement(routing: Routing, num_experts: int, k: int) -> str | None:
    """Return the first thing in which a routing contradicts E and K, in words, or None."""
    logits_TE, index_TK = routing.logits_TE, routing.index_TK
    if not logits_TE.is_floating_point() or logits_TE.shape[-1] != num_experts:
        return f"expected float logits of width {num_experts}, got {logits_TE.dtype} of width {logits_TE.shape[-1]}"
    if index_TK.dtype != torch.int64 or index_TK.shape != (logits_TE.shape[0], k):
        expected = f"int64 ids of shape {(logits_TE.shape[0], k)}"
        return f"expected {expected}, got {index_TK.dtype} of shape {tuple(index_TK.shape)}"
    if index_TK.numel() and not 0 <= int(index_TK.min()) <= int(index_TK.max()) < num_experts:
        return f"expected ids in 0..{num_experts - 1}, got {int(index_TK.min())}..{int(index_TK.max())}"
    return None


def _shape_of(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"{str(output.dtype).removeprefix('torch.')}{list(output.shape)}"
    if isinstance(output, tuple | list):
        return "(" + ", ".join(_shape_of(part) for part in output) + ")"
    return type(output).__name__
