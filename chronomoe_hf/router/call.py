"""One call of a router, as its adapter gets it to choose again.

Shape suffixes: T tokens, E router classes (experts).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import Tensor

Scope: TypeAlias = Literal["routing", "selection"]


class RouterCall(NamedTuple):
    """What the native forward was given and returned, and what is added to its logits.

    Args:
        output: what the native forward returned for the clean input.
        logits_TE: its clean logits, 2-D, in their own dtype.
        beta_E: fp32 ``[E]`` in logit units, may be zeros.
        scope: ``"routing"`` (beta moves the choice and the weights) or ``"selection"`` (the choice alone).
        args: positional arguments of the native forward (without ``self``).
        kwargs: keyword arguments of the native forward.
        shift_TE: fp32 ``[T, E]``, what an open lens adds to the logits (choice and weights in both scopes), or None.
    """

    output: Any
    logits_TE: Tensor
    beta_E: Tensor
    scope: Scope = "routing"
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}
    shift_TE: Tensor | None = None


def lensed_logits(call: RouterCall) -> Tensor:
    """The logits with the lens and without beta, fp32 ``[T, E]``."""
    z_TE = call.logits_TE.float()
    return z_TE if call.shift_TE is None else z_TE + call.shift_TE


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> Tensor:
    """The router's input: its first argument, also where the block passes it by `name`."""
    hidden: Tensor = args[0] if args else kwargs[name]
    return hidden
