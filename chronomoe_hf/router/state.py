"""What a wrapped router points to: its slow state, its lens, its recorder; and what the forward asks of others.

Shape suffixes: L layers, E experts, T tokens, K experts per token, D router input width.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, Self, TypeAlias

import torch
from torch import Tensor, nn

from chronomoe_hf.errors import ConfigError
from chronomoe_hf.lens.lens import ChronoLens

# What a router points to is copied with the whole model, and shared when only a part of the model is copied.


class SharedInParts:
    """Base of what wrapped modules point to.

    A library that deep-copies a wrapped *part* of a model (PEFT's ``modules_to_save``) runs the copy in the place of
    the original, so the copy must be recorded and governed as that one. A deep copy of the *whole* model is another
    model and gets its own.
    """

    root: weakref.ReferenceType[nn.Module] | None = None
    """The model that owns the system; None = always copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        root = None if self.root is None else self.root()
        if root is not None and id(root) not in memo:
            return self
        twin = memo[id(self)] = type(self).__new__(type(self))
        for name, value in self.__getstate__().items():
            setattr(twin, name, copy.deepcopy(value, memo))
        twin.root = None if root is None else weakref.ref(memo[id(root)])
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "root"}  # its layer sets it again


# One call of a router, as its adapter gets it to choose again.
#
# Shape suffixes: T tokens, E router classes (experts).

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
        index_TK: int64 ``[T, K]``, the experts to choose instead; a row that holds -1 chooses itself. None = no row is
            told what to choose. Their weights come from the live logits by the family's own rule.
    """

    output: Any
    logits_TE: Tensor
    beta_E: Tensor
    scope: Scope = "routing"
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}
    shift_TE: Tensor | None = None
    index_TK: Tensor | None = None

    @property
    def own_T1(self) -> Tensor | None:
        """Bool ``[T, 1]``: rows that choose themselves; None where all do."""
        return None if self.index_TK is None else (self.index_TK < 0).any(dim=-1, keepdim=True)

    def chosen(self, index_TK: Tensor) -> Tensor:
        """The given ids, row by row; `index_TK`, the router's own choice, in rows that are given none."""
        if self.index_TK is None:
            return index_TK
        own_T1 = self.own_T1
        assert own_T1 is not None
        return torch.where(own_T1, index_TK, self.index_TK.to(index_TK.dtype))


def lensed_logits(call: RouterCall) -> Tensor:
    """The logits with the lens and without beta, fp32 ``[T, E]``."""
    if call.shift_TE is None:
        return call.logits_TE.float()
    return call.logits_TE + call.shift_TE  # the sum of any dtype and fp32 is one in fp32: a copy less


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> Tensor:
    """The router's input: its first argument, also where the block passes it by `name`."""
    hidden: Tensor = args[0] if args else kwargs[name]
    return hidden


HANDLE = "_chrono_handle"
"""Name of the plain attribute through which a wrapped module finds its layer. Never a registered buffer."""


class Routing(NamedTuple):
    """What a router decided, read from its native output.

    Args:
        logits_TE: clean router logits flattened to two dimensions, native dtype.
        index_TK: int64 expert ids chosen, before capacity dropping.
        kept_TK: bool, False where capacity dropped the assignment; None = nothing can be dropped.
        masked_E: bool, experts that no token may choose; None = there are none.
    """

    logits_TE: Tensor
    index_TK: Tensor
    kept_TK: Tensor | None = None
    masked_E: Tensor | None = None


class RouterRule(Protocol):
    """What the forward must know of a family: how its router's output is read and how it chooses (``patches``)."""

    def weight(self, router: nn.Module) -> Tensor:
        """The router's own weight ``(E, D)``."""

    def read(self, router: nn.Module, output: Any) -> Routing:
        """Clean logits, chosen ids and capacity drops of a native output."""

    def distribution(self, router: nn.Module, logits_TE: Tensor) -> Tensor:
        """The family's scores of logits as a distribution, fp32 ``(T, E)``."""

    def steer(self, router: nn.Module, call: RouterCall, recorded: bool) -> tuple[Any, Routing | None]:
        """Choose again with what steers: the native structure, and, where `recorded`, what was decided."""


MASKS = "_chrono_masks"
"""Plain attribute of a router: the :class:`RouterMask` that code around the forward has put on it."""


class RouterMask(Protocol):
    """Experts that no token may choose; implemented in ``lifecycle.live.masking``."""

    @property
    def dropped(self) -> tuple[int, ...]:
        """Their ids, ascending."""

    def dropped_on(self, router: nn.Module, device: torch.device) -> Tensor:
        """The same as bool ``(E,)`` on a device, with those of every other mask of the router."""

    def reroute(self, router: nn.Module, call: RouterCall) -> Any:
        """Choose again among the experts that are left; the native structure, with -inf at the others' logits."""


class Recorder(Protocol):
    """What the forward tells its observer; implemented in ``recording.recorder``."""

    @property
    def active(self) -> bool:
        """Whether this forward is recorded."""

    @property
    def any_steering(self) -> bool:
        """Whether anything steers in any layer of the system."""

    def routing(
        self, router: nn.Module, routing: Routing, native_TK: Tensor | None, beta_full_E: Tensor | None
    ) -> None:
        """One router call: what was decided, what would have been, and the full beta while it acts."""

    def router_input(self, hidden: Tensor) -> None:
        """The router's input, where a lens will need it."""

    def not_active(self) -> None:
        """The router was called in training mode, and the call is not recorded."""

    def fail(self, error: Exception) -> None:
        """Something of ours failed in the router's forward: its layer is not recorded any more."""


class Replayer(Protocol):
    """What a router is told to choose, and what it would have chosen; implemented in ``replay.passes``."""

    @property
    def active(self) -> bool:
        """Whether the running forward, or the running recompute of a checkpoint, is one that matters to it."""

    @property
    def counts_own(self) -> bool:
        """Whether what is recorded is the router's own choice, where it is told another one."""

    def given(self, layer_id: int, own_TK: Tensor, masked_E: Tensor | None) -> Tensor | None:
        """The ids to choose, int64 ``(T, K)`` with -1 in rows that choose themselves; None = nothing is told.

        Args:
            layer_id: whose call it is.
            own_TK: what the router would choose itself, with all that steers and without the experts that are masked.
            masked_E: bool, experts that no token may choose; None = there are none.
        """


class Placer(Protocol):
    """Where the state of every layer lies; implemented in ``wrapping.placement``."""

    def place(self, layer_id: int, device: torch.device) -> None:
        """A layer's router runs on `device`: move what belongs to it there."""


LOGIT_STD_ALPHA = 0.99
"""EMA decay of the logit standard deviation, per optimizer step."""
_NEUTRAL: Any = None  # stands for the neutral tensor of a field, which __post_init__ makes


@dataclass
class RouterState:
    """Slow state of one router. Tensors are plain (never registered), fp32, updated in place between forwards.

    ``RouterState(layer_id=3, num_experts=8)`` is neutral: beta 0, relevance 1, logit standard deviation 1, on the CPU.
    Numbers that are given for 0-dim tensors become tensors. In a wrapped model they are views of the system's stacked
    state, which the system updates; a state of your own is updated by :meth:`update_logit_std` and ``update_beta``.

    Args:
        layer_id: position of the layer among the wrapped ones.
        num_experts: E.
        beta_coeff: promotion prior, shape ``(E,)``, in logit standard deviations, zero-centred, within +-k_max.
        k_max: cap on ``|beta_coeff|``.
        logit_std_ema: 0-dim, bias-corrected EMA of the logit standard deviation.
        logit_std_alpha: decay of that EMA per update.
        disagreement_js: 0-dim, nats, of the full (unvetoed) beta over the last step.
        disagreement_flip: 0-dim, top-1 flip rate over the last step.
        overlap_only: 0-dim, probability mass that beta moved over the last step.
        relevance: 0-dim in [0, 1], the bridge veto; 1 = beta fully applied.
        beta_full: shape ``(E,)``, :meth:`compute_beta_eff` when it was last refreshed, in logits.
        beta_applied: shape ``(E,)``, relevance * beta_full: what the forward adds.
        logit_std_updates: 0-dim int64, updates of the EMA so far.
        scope: ``"routing"`` or ``"selection"``.
        beta_on: whether the forward applies beta at all (a host-side switch: no step reads the device for it).

    Raises:
        ConfigError: a tensor of another shape than one value per expert, or a decay or cap out of range.
    """

    layer_id: int
    num_experts: int
    beta_coeff: Tensor = _NEUTRAL
    k_max: float = 0.3
    logit_std_ema: Tensor = _NEUTRAL
    logit_std_alpha: float = LOGIT_STD_ALPHA
    disagreement_js: Tensor = _NEUTRAL
    disagreement_flip: Tensor = _NEUTRAL
    overlap_only: Tensor = _NEUTRAL
    relevance: Tensor = _NEUTRAL
    beta_full: Tensor = _NEUTRAL
    beta_applied: Tensor = _NEUTRAL
    logit_std_updates: Tensor = _NEUTRAL
    scope: Scope = "routing"
    beta_on: bool = False

    def __post_init__(self) -> None:
        if self.num_experts < 1:
            raise ConfigError(f"RouterState num_experts must be at least 1, got {self.num_experts}")
        if not (self.k_max > 0 and 0 <= self.logit_std_alpha < 1):
            raise ConfigError(
                f"RouterState needs k_max > 0 and logit_std_alpha in [0, 1), got {self.k_max}, {self.logit_std_alpha}"
            )
        self.beta_coeff = self._vector("beta_coeff")
        self.logit_std_updates = self._number("logit_std_updates", 0, torch.int64)
        for name, neutral in (("logit_std_ema", 1.0), ("relevance", 1.0)):
            setattr(self, name, self._number(name, neutral))
        for name in ("disagreement_js", "disagreement_flip", "overlap_only"):
            setattr(self, name, self._number(name, 0.0))
        given = self.beta_full is not None or self.beta_applied is not None
        self.beta_full, self.beta_applied = self._vector("beta_full"), self._vector("beta_applied")
        if not given:
            self.refresh_()

    def _vector(self, name: str) -> Tensor:
        value = getattr(self, name)
        if value is None:
            return torch.zeros(self.num_experts, device=self.beta_coeff.device if name != "beta_coeff" else None)
        vector = torch.as_tensor(value, dtype=torch.float32)
        shape = (self.num_experts,)
        if vector.shape != shape:
            raise ConfigError(
                f"RouterState {name} holds one value per expert, shape {shape}, got {tuple(vector.shape)}"
            )
        return vector

    def _number(self, name: str, neutral: float, dtype: torch.dtype = torch.float32) -> Tensor:
        value = getattr(self, name)
        return torch.as_tensor(neutral if value is None else value, dtype=dtype, device=self.beta_coeff.device)

    def compute_beta_eff(self) -> Tensor:
        """The full bias in logits, shape ``(E,)``: ``clamp(beta_coeff, +-k_max) * logit_std_ema``, before the veto."""
        return self.beta_coeff.clamp(-self.k_max, self.k_max) * self.logit_std_ema

    def update_logit_std(self, z_clean: Tensor) -> None:
        """Add one step's clean logits to `logit_std_ema`, in place and without a transfer to the host.

        The step's value is the root of the mean over tokens of the variance over experts; where it is 0 or not finite
        nothing changes. The EMA is bias-corrected, so the first update sets it to that value.

        Args:
            z_clean: clean logits of real tokens, shape ``(..., E)``, any floating dtype.

        Raises:
            ConfigError: another number of experts.
        """
        if z_clean.dim() < 1 or z_clean.shape[-1] != self.num_experts:
            raise ConfigError(f"z_clean must have shape (..., {self.num_experts}), got {tuple(z_clean.shape)}")
        if z_clean.numel() == 0:
            return
        std = z_clean.detach().double().var(-1, correction=0).mean().sqrt().to(self.logit_std_ema.device)
        seen = torch.isfinite(std) & (std > 0)
        alpha, count = self.logit_std_alpha, self.logit_std_updates.double()
        raw = self.logit_std_ema.double() * (1.0 - alpha**count)
        corrected = (alpha * raw + (1.0 - alpha) * std) / (1.0 - alpha ** (count + 1.0))
        self.logit_std_ema.copy_(torch.where(seen, corrected, self.logit_std_ema.double()))
        self.logit_std_updates.add_(seen)

    def refresh_(self) -> None:
        """Recompute `beta_full` and `beta_applied` from the other fields, in place."""
        self.beta_full.copy_(self.compute_beta_eff())
        self.beta_applied.copy_(self.relevance * self.beta_full)


@dataclass
class RouterHandle(SharedInParts):
    """How a router module reaches its slow state; shared with the ChronoSystem, never registered as a submodule.

    Args:
        state: the slow state.
        recorder: the observer.
        lens: the layer's lens, if it has one.
        placer: where the state lies.
        mask: experts cut during the run; None = none are.
        replay: what tells the router what to choose; None = nothing does.
    """

    state: RouterState
    recorder: Recorder
    lens: ChronoLens | None = None
    placer: Placer | None = None
    mask: RouterMask | None = None
    replay: Replayer | None = None

    def follow(self, hidden: Tensor) -> None:
        """Have the state where the router runs, from its first forward there on."""
        if hidden.device != self.state.beta_applied.device and self.placer is not None:
            self.placer.place(self.state.layer_id, hidden.device)

    @property
    def replays(self) -> bool:
        """Whether a pass is running that wants to know what is chosen, or to choose."""
        return self.replay is not None and self.replay.active

    @property
    def lens_open(self) -> bool:
        """Whether a lens acts in this layer."""
        return self.lens is not None and self.lens.is_open
