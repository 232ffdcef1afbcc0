"""The low-rank lens on a router's input: x' = x + s (x V) U.

Only the router sees x'; the experts get x. On a linear router with weight W the lens is a shift of the logits,
``x' W^T = x W^T + s (x V)(U W^T)``, and it folds exactly into the weight: ``W' = W + s (W U^T) V^T``.

Shape suffixes: T tokens, D hidden size, E experts, R rank. All lens math is fp32 (`direction` solves the bases in
fp64 on the host); the model's dtype is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from chronomoe_hf.config import BasisName
from chronomoe_hf.errors import ConfigError, StateMismatchError, WrapError
from chronomoe_hf.lens.basis import basis_problem, host64, least_squares_basis, no_basis, router_basis, row_norm_ratio


def fold_weight(weight_ED: Tensor, V_DR: Tensor, U_RD: Tensor, scale: float) -> Tensor:
    """The router weight that routes like the lens: ``W' = W + s (W U^T) V^T``.

    Computed in float64 and rounded once to `weight_ED`'s dtype; a scale of 0 returns an equal copy.
    """
    if scale == 0.0:
        return weight_ED.detach().clone()
    weight, V, U = (tensor.detach().to("cpu", torch.float64) for tensor in (weight_ED, V_DR, U_RD))
    folded = weight + scale * (weight @ U.T) @ V.T
    return folded.to(device=weight_ED.device, dtype=weight_ED.dtype)


class ChronoLens:
    """One layer's lens. A plain object: it is no module, adds no parameter and no key to a state dict.

    Args:
        d_model: D, width of the router input.
        rank: R, columns of V; a basis of lower rank is padded with zeros.
        layer_id: MoE layer the lens belongs to.
        device: where the tensors live.
        train_router: see ``LensConfig.train_router``.

    Attributes:
        V: shape ``(D, R)``, float32.
        U: shape ``(R, D)``, float32.
        scale: gate s in force, a Python float; 0 closes the lens exactly.
        scale_t: the same as a 0-dim float32 tensor, for graphs that must not be rebuilt when it changes.
        note: why the last basis is empty, or None.
        is_open: whether the lens acts, ``scale > 0``. A bool of its own, because the compiler guards floats by value.

    Raises:
        ConfigError: `d_model` or `rank` is not positive.
    """

    supported = True

    def __init__(
        self,
        d_model: int,
        rank: int = 1,
        layer_id: int = 0,
        *,
        device: torch.device | str | None = None,
        train_router: bool = False,
    ) -> None:
        for name, value in (("d_model", d_model), ("rank", rank)):
            if value < 1:
                raise ConfigError(f"ChronoLens {name} must be at least 1, got {value}")
        self.d_model = d_model
        self.rank = rank
        self.layer_id = layer_id
        self.train_router = train_router
        self.V = torch.zeros(d_model, rank, dtype=torch.float32, device=device)
        self.U = torch.zeros(rank, d_model, dtype=torch.float32, device=device)
        self.scale = 0.0
        self.scale_t = torch.zeros((), dtype=torch.float32, device=device)
        self.note: str | None = None
        self.is_open = False
        self._norms: dict[str, float] = {"v_norm": 0.0, "u_norm": 0.0}

    @property
    def s(self) -> float:
        """The scale in force (the original's name)."""
        return self.scale

    def __call__(self, x: Tensor) -> Tensor:
        """``x + s (x V) U`` in x's dtype and shape ``(..., D)``; x itself while the lens is closed."""
        if self.scale == 0.0:
            return x
        with torch.autocast(x.device.type, enabled=False):
            x32 = x.float()
            return (x32 + self.scale_t * (x32 @ self.V) @ self.U).to(x.dtype)

    def logit_shift(self, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        """What the lens adds to the logits of a linear router: ``s (x V)(U W^T)``, shape ``(T, E)``, float32.

        Differentiable in x; in W only with `train_router`.

        Raises:
            WrapError: the router was quantised after the lens was opened: its weight holds codes.
        """
        if not weight_ED.is_floating_point():
            raise WrapError(
                f"a lens is open over a router whose weight is {weight_ED.dtype} now: it was quantised after wrap, and "
                "codes steer nothing; fold the lens first (unwrap(model, fold=True)), quantise then"
            )
        if not self.train_router:
            weight_ED = weight_ED.detach()
        with torch.autocast(x_TD.device.type, enabled=False):
            return self.scale_t * (x_TD.float() @ self.V) @ (self.U @ weight_ED.float().T)

    @torch.no_grad()
    def set_basis(self, V_DR: Tensor, U_RD: Tensor) -> None:
        """Write a basis of rank at most R, in place.

        Raises:
            ConfigError: the shapes are not ``(D, r)`` and ``(r, D)`` with r <= R.
        """
        rank = V_DR.shape[-1]
        if V_DR.shape != (self.d_model, rank) or U_RD.shape != (rank, self.d_model) or rank > self.rank:
            raise ConfigError(
                f"layer {self.layer_id}: basis shapes {tuple(V_DR.shape)} and {tuple(U_RD.shape)} do not fit a lens of "
                f"d_model {self.d_model} and rank {self.rank}; expected ({self.d_model}, r) and (r, {self.d_model}), "
                f"r <= {self.rank}"
            )
        self.V.zero_()[:, :rank].copy_(V_DR)
        self.U.zero_()[:rank].copy_(U_RD)
        self._norms = {"v_norm": float(host64(V_DR).norm()), "u_norm": float(host64(U_RD).norm())}

    def aim(
        self,
        mu_D: Tensor,
        weight_ED: Tensor,
        share_E: Tensor | Sequence[float],
        logit_std: float,
        basis: BasisName = "least_squares",
        carry: float = 0.0,
        reader_D: Tensor | None = None,
    ) -> str | None:
        """Compute and set the steering basis of a window; arguments as in :func:`least_squares_basis`.

        Args:
            mu_D: see there.
            weight_ED: see there.
            share_E: see there.
            logit_std: see there.
            basis: which basis.
            reader_D: see there.
            carry: in [0, 1]; the new lens moves the mean token by `carry` times what the old basis did, plus
                ``1 - carry`` times the fresh correction. :func:`carried` says how much of a lens to keep.

        Returns:
            None, or why the inputs are degenerate; the basis is then empty and the lens an exact identity
            at any scale.
        """
        weight_ED = host64(weight_ED)  # once: the functions below take it as it is
        self.note = basis_problem(mu_D, weight_ED, share_E, logit_std)
        if self.note is not None:
            self.set_basis(*no_basis(self.d_model))
            return self.note
        if basis == "router":
            V_DR, U_RD = router_basis(mu_D, weight_ED, share_E, reader_D)
        else:
            spread_E = row_norm_ratio(weight_ED) if basis == "scaled" else None
            V_DR, U_RD = least_squares_basis(mu_D, weight_ED, share_E, logit_std, spread_E, reader_D)
        if carry > 0.0:
            held_D = (host64(mu_D) @ host64(self.V)) @ host64(self.U)
            U_RD = (carry * held_D + (1.0 - carry) * U_RD.double()).float()
        self.set_basis(V_DR, U_RD)
        return None

    def set_scale(self, scale: float) -> None:
        """Open (or with 0 close) the lens; `scale` in logit standard deviations, finite and not negative."""
        if not math.isfinite(scale) or scale < 0.0:
            raise ConfigError(f"layer {self.layer_id}: a lens scale must be finite and >= 0, got {scale}")
        self.scale = float(scale)
        self.is_open = self.scale > 0.0
        self.scale_t.fill_(self.scale)

    def norms(self) -> dict[str, float]:
        """Frobenius norms of the basis in force, ``v_norm`` and ``u_norm``."""
        return dict(self._norms)

    def to(self, device: torch.device | str) -> Self:
        """Move the tensors; dtypes stay float32."""
        self.V, self.U, self.scale_t = self.V.to(device), self.U.to(device), self.scale_t.to(device)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """``V``, ``U`` (float32) and ``scale`` (0-dim float64, so that the Python float returns bit for bit)."""
        return {
            "V": self.V.detach().clone(),
            "U": self.U.detach().clone(),
            "scale": torch.tensor(self.scale, dtype=torch.float64),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of :meth:`state_dict`.

        Raises:
            StateMismatchError: tensors are missing or belong to a lens of another size.
        """
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        expected = {"V": tuple(self.V.shape), "U": tuple(self.U.shape), "scale": ()}
        if found != expected:
            raise StateMismatchError(
                f"layer {self.layer_id}: lens state has shapes {found}, this lens needs {expected}; "
                "the state was saved for another model or rank"
            )
        self.set_basis(state["V"], state["U"])
        self.set_scale(float(state["scale"]))
        self.note = None

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(d_model={self.d_model}, rank={self.rank}, layer_id={self.layer_id}, s={self.scale})"
        )


class IdentityLens:
    """The explicit no-op, for layers that cannot carry a lens. Same surface as :class:`ChronoLens`.

    Args:
        layer_id: MoE layer it stands in for.
        reason: why the layer has no lens, for the decision log.
    """

    supported = False
    rank = 0
    scale = 0.0
    s = 0.0
    is_open = False

    def __init__(self, layer_id: int = 0, *, reason: str | None = None) -> None:
        self.layer_id = layer_id
        self.note = reason
        self.scale_t = torch.zeros((), dtype=torch.float32)

    def __call__(self, x: Tensor) -> Tensor:
        """x itself."""
        return x

    def logit_shift(self, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        """Zeros, shape ``(T, E)``, float32."""
        return torch.zeros(x_TD.shape[0], weight_ED.shape[0], dtype=torch.float32, device=x_TD.device)

    def set_basis(self, V_DR: Tensor, U_RD: Tensor) -> None:
        """Ignored."""

    def aim(self, *args: Any, **kwargs: Any) -> str | None:
        """Arguments as in :meth:`ChronoLens.aim`, ignored; returns why."""
        return self.note or "this layer has no lens"

    def set_scale(self, scale: float) -> None:
        """Ignored."""

    def norms(self) -> dict[str, float]:
        """Zeros: there is no basis."""
        return {"v_norm": 0.0, "u_norm": 0.0}

    def to(self, device: torch.device | str) -> Self:
        """Only the (zero) scale tensor moves."""
        self.scale_t = self.scale_t.to(device)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Empty."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Accepts only the empty state; anything else raises StateMismatchError."""
        if state:
            raise StateMismatchError(
                f"layer {self.layer_id}: saved lens state ({', '.join(state)}) for a layer without a lens; "
                "the state was saved for another model"
            )
