"""The output projection of every expert of a layer: reading it, its inputs, and writing it back.

An expert is ``f_e(x) = W_e h_e(x) + b_e``. Its h_e is read without knowing its activation: the experts module runs
with selection matrices in place of W_e, so that its output *is* h_e. Whether that holds is checked on real tokens.

Shape suffixes: E experts, N tokens, D width of the output, I width of the projection's input.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from chronomoe_hf.errors import LifecycleError
from chronomoe_hf.lifecycle.live.weights import require_writable
from chronomoe_hf.wrapping.discovery import FoundLayer

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class OutputProjections:
    """The output projections of one layer.

    Args:
        layer: a live layer.

    Raises:
        LifecycleError: the family's experts have no output projection of their own each, or the weights cannot be
            changed here (sharded, quantised, offloaded, LoRA on the experts).
    """

    def __init__(self, layer: FoundLayer) -> None:
        self.layer = layer
        reason = layer.adapter.calls.not_alone
        if reason is not None or layer.experts is None:
            raise LifecycleError(f"{layer.name}: the output projections cannot be refitted: {reason or 'no experts'}")
        self.experts: nn.Module = layer.experts
        self.switch = layer.adapter.calls.by_module
        self.num_experts = layer.adapter.num_experts(layer.router)
        self.holders = self._find()
        self.transposed = bool(getattr(self.experts, "is_transposed", False))
        self.dtype = self._weight(0).dtype
        require_writable(layer, [self._weight(index) for index in range(len(self.holders))], "refit")

    def _find(self) -> list[tuple[nn.Module, str]]:
        """Where the weights are: one fused tensor, or one parameter per expert."""
        if self.switch:
            return [(self.experts.get_submodule(f"expert_{e}.wo"), "weight") for e in range(self.num_experts)]
        fused = self.experts._parameters.get("down_proj")
        if fused is None or fused.dim() != 3 or fused.shape[0] != self.num_experts:
            raise LifecycleError(
                f"{self.layer.name}: {type(self.experts).__name__} has no down_proj of shape ({self.num_experts}, "
                "width, width); its output projections cannot be refitted"
            )
        return [(self.experts, "down_proj")]

    def _weight(self, index: int) -> Tensor:
        module, name = self.holders[index]
        return getattr(module, name)  # type: ignore[no-any-return]

    def _slice(self, expert: int) -> Tensor:
        return self._weight(expert) if self.switch else self._weight(0)[expert]

    def weight(self, expert: int) -> Tensor:
        """W_e, fp32 ``(I, D)``: rows multiply the inputs."""
        own = self._slice(expert).detach().float()
        return own if self.transposed else own.T

    def bias(self, expert: int) -> Tensor | None:
        """b_e, fp32 ``(D,)``, or None."""
        bias_ED = self.experts._parameters.get("down_proj_bias")
        return None if bias_ED is None else bias_ED[expert].detach().float()

    def rounded(self, weight_ID: Tensor) -> Tensor:
        """`weight_ID` as the model would store it, in its layout and dtype."""
        return (weight_ID if self.transposed else weight_ID.T).to(self.dtype)

    def place(self, expert: int) -> tuple[Tensor, int | None]:
        """The parameter that holds an expert's projection, and its index there (None: all of it)."""
        return (self._weight(expert), None) if self.switch else (self._weight(0), expert)

    @torch.no_grad()
    def exchange(self, expert: int, stored: Tensor) -> Tensor:
        """Put a stored weight (of :meth:`rounded`) in place and return the one that was there."""
        own = self._slice(expert)
        before = own.detach().clone()
        own.copy_(stored)
        return before

    def inputs(self, hidden_ND: Tensor, expert: int) -> Tensor:
        """h_e of tokens, ``(N, I)`` in the dtype of the model."""
        own = self._slice(expert)
        num_out, width = (own.shape[1], own.shape[0]) if self.transposed else (own.shape[0], own.shape[1])
        parts = []
        for start in range(0, width, num_out):
            size = min(num_out, width - start)
            select = own.new_zeros(num_out, width)
            select[torch.arange(size), start + torch.arange(size)] = 1.0
            with self._replaced(expert, select.T if self.transposed else select):
                parts.append(expert_outputs(self.layer, hidden_ND, expert)[:, :size])
        return torch.cat(parts, dim=-1)

    def require_linear(self, hidden_ND: Tensor, expert: int) -> None:
        """Check on real tokens that f_e is ``W_e h_e + b_e``.

        Raises:
            LifecycleError: it is not (a norm or a factor follows the projection).
        """
        with torch.no_grad():
            real_ND = expert_outputs(self.layer, hidden_ND, expert).float()
            built_ND = self.inputs(hidden_ND, expert).float() @ self.weight(expert)
            bias_D = self.bias(expert)
            built_ND = built_ND if bias_D is None else built_ND + bias_D
            off = float((real_ND - built_ND).norm()) / max(float(real_ND.norm()), 1e-30)
        if not off <= _TOLERANCE.get(self.dtype, 1e-2):
            raise LifecycleError(
                f"{self.layer.name}: the outputs of {type(self.experts).__name__} are not its output projection times "
                f"its activations (off by {off:.2g} of their size); this family cannot be refitted"
            )

    @contextlib.contextmanager
    def _replaced(self, expert: int, select: Tensor) -> Iterator[None]:
        """Selection matrices in place of the projections, and no bias; nothing is copied or changed."""
        module, name = self.holders[expert if self.switch else 0]
        bias_ED = None if self.switch else module._parameters.get("down_proj_bias")
        own = module._parameters[name]
        try:
            module._parameters[name] = select if self.switch else select.expand(self.num_experts, -1, -1)  # type: ignore[assignment]
            if bias_ED is not None:
                module._parameters["down_proj_bias"] = torch.zeros_like(bias_ED)  # type: ignore[assignment]
            yield
        finally:
            module._parameters[name] = own
            if bias_ED is not None:
                module._parameters["down_proj_bias"] = bias_ED


def require_callable(layer: FoundLayer) -> None:
    """Raise LifecycleError where the experts of a layer cannot be called one by one."""
    reason = layer.adapter.calls.not_alone
    if reason is not None or layer.experts is None:
        raise LifecycleError(f"{layer.name}: its experts cannot be read one by one: {reason or 'no experts'}")


def expert_outputs(layer: FoundLayer, hidden_ND: Tensor, expert: int) -> Tensor:
    """Unweighted outputs of one expert, ``(N, D)``, by the family's own code.

    Raises:
        LifecycleError: the family's experts cannot be called one by one, or are offloaded beyond reach.
    """
    require_callable(layer)
    assert layer.experts is not None
    with experts_in_memory(layer):
        if layer.adapter.calls.by_module:
            out: Tensor = layer.experts.get_submodule(f"expert_{expert}")(hidden_ND)
            return out
        index_N1 = torch.full((hidden_ND.shape[0], 1), expert, dtype=torch.int64, device=hidden_ND.device)
        out = _eager(layer.experts)(layer.experts, hidden_ND, index_N1, hidden_ND.new_ones(hidden_ND.shape[0], 1))
        return out


@contextlib.contextmanager
def experts_in_memory(layer: FoundLayer) -> Iterator[None]:
    """Offloaded weights of a layer's experts are in memory, as they are in a forward of the model.

    accelerate brings them in around the module's own forward, and leaves them on ``meta`` otherwise. torch multiplies
    with a ``meta`` weight without an error and gives back memory that nobody wrote, so nothing below that forward may
    run without this. It is cheap to enter twice: open it around many experts of one layer.

    Args:
        layer: a live layer with experts.

    Raises:
        LifecycleError: weights are on ``meta`` and no hook of accelerate's on the experts can bring them.
    """
    experts = layer.experts
    assert experts is not None
    hook: Any = getattr(experts, "_hf_hook", None)
    away = hook is not None and any(parameter.is_meta for parameter in experts.parameters())
    if away:
        hook.pre_forward(experts)
    try:
        for name, module in experts.named_modules():
            own = any(tensor.is_meta for tensor in module._parameters.values() if tensor is not None)
            if own and (module is experts or not hasattr(module, "_hf_hook")):
                where = f"{layer.name}.experts{'.' + name if name else ''}"
                raise LifecycleError(
                    f"{where}: its weights are offloaded (on meta) and cannot be brought in for one expert; load the "
                    "model so that they are in memory"
                )
        yield
    finally:
        if away:
            hook.post_forward(experts, None)


def _eager(experts: nn.Module) -> Any:
    """The family's own loop over experts: below our mixin, and below the choice of a backend."""
    for base in type(experts).__mro__:
        forward = base.__dict__.get("forward")
        if forward is not None and not base.__module__.startswith("chronomoe_hf"):
            return getattr(forward, "__wrapped__", forward)
    raise LifecycleError(f"{type(experts).__name__} has no forward of its own")
