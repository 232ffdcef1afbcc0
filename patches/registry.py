"""Adapters: what chronomoe_hf knows about the router of each family, stated and tested, never guessed.

Shape suffixes: T tokens, E router classes (experts), K experts chosen per token, D hidden size.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from chronomoe_hf.errors import UnsupportedArchitectureError
from chronomoe_hf.patches.rules import Rule, ScoreTopK, Setting, setting
from chronomoe_hf.router.state import RouterCall, Routing

CAPABILITIES = ("observe", "beta", "lens", "coherence", "fold", "replay")


@dataclass(frozen=True, kw_only=True)
class ExpertsCall:
    """What follows from the way in which a family calls its experts.

    Attributes:
        takes_weights: the call is given the routing weights, so that their gradient can be read there.
        by_module: every expert is a module ``expert_{e}`` of its own, and the call is given a one-hot mask of one slot.
        not_apart: why no single expert's weights can be reached; None = they can.
        not_linear: why an expert's output is not linear in its routing weight; None = it is.
    """

    takes_weights: bool = True
    by_module: bool = False
    not_apart: str | None = None
    not_linear: str | None = None

    @property
    def not_alone(self) -> str | None:
        """Why the output of a single expert can neither be read nor refitted; None = it can."""
        return self.not_apart or self.not_linear


EXPERTS_CALLS: Mapping[str, ExpertsCall] = {
    "interface": ExpertsCall(),
    "direct": ExpertsCall(),
    "longcat": ExpertsCall(not_apart="some experts of longcat_flash are identities without weights"),
    "switch": ExpertsCall(by_module=True),
    "llama4": ExpertsCall(
        takes_weights=False,
        not_linear="llama4 scales the input of its experts, so their outputs are not linear in the routing weight",
    ),
    "dbrx": ExpertsCall(takes_weights=False, not_apart="the experts of dbrx share one flattened weight"),
    "none": ExpertsCall(takes_weights=False, not_apart="its experts cannot be reached"),
}
"""``Adapter.experts_call`` -> what follows from it."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The facts of one router class.

    Attributes:
        family: model folder of Transformers, for example ``"qwen3_moe"``.
        module: importable module that defines the router class; left out, the modeling file of the family.
        router_class: name of the router class.
        rule: choice rule, see `chronomoe_hf.patches.rules`.
        logits_index: position of the recorded logits in the router's output; None when the output is the logits.
        weights_index, indices_index: positions of the weights and of the chosen ids.
        linear: the logits are ``x @ weight.T`` (+ constant) of the router's input, so a lens can act and be folded.
        experts: attribute of the router's parent that holds the experts; None when there is none.
        experts_call: how the experts are called: ``"interface"`` (``experts(x, index, weights)``, dispatched through
            Transformers' experts interface), ``"direct"`` (same call, no dispatch), ``"longcat"`` (same call, at least
            two slots), ``"switch"``, ``"llama4"``, ``"dbrx"``, ``"none"``; see EXPERTS_CALLS.
        num_experts_at, top_k_at, weight_at: where the router keeps the number of its classes, k, and its weight.
        linear_bias_at: dotted path of the bias of the router's own linear (which may be None): what is added to it is
            added to the logits.
        bias_at: dotted path of the native balancing bias on the router.
        bias_arg: name of the bias when the parent passes it as second argument of the router (and owns it).
        bias_when: router flag that switches the native bias on.
        mixins: classes that go between ChronoRouter and the native class.
        by_token: the experts follow from the token id alone, so every pass of a text chooses the same.
        samples: experts are drawn at random in training mode, so no two passes of a text choose the same.
        refuse: capability -> reason, for what cannot be done honestly with this router.
        notes: one line on what is unusual.
    """

    family: str
    module: str = ""
    router_class: str
    rule: Rule
    logits_index: int | None = 0
    weights_index: int = 1
    indices_index: int = 2
    linear: bool = True
    experts: str | None = "experts"
    experts_call: str = "interface"
    num_experts_at: Setting = "num_experts"
    top_k_at: Setting = "top_k"
    weight_at: str = "weight"
    linear_bias_at: str | None = None
    bias_at: str | None = None
    bias_arg: str | None = None
    bias_when: Setting = True
    mixins: tuple[type[nn.Module], ...] = ()
    by_token: bool = False
    samples: bool = False
    refuse: Mapping[str, str] = field(default_factory=dict)
    notes: str = ""

    def __post_init__(self) -> None:
        if not self.module:
            object.__setattr__(self, "module", module_of(self.family))
        if self.experts_call not in EXPERTS_CALLS:
            raise ValueError(
                f"adapter {self.family!r}: experts_call is one of {', '.join(EXPERTS_CALLS)}, got {self.experts_call!r}"
            )

    @property
    def calls(self) -> ExpertsCall:
        """What follows from `experts_call`."""
        return EXPERTS_CALLS[self.experts_call]

    def bind(self, router: nn.Module, parent: nn.Module) -> None:
        """Give the router what only its parent knows. Called once, before `top_k` and `read`; mostly does nothing."""

    def unbind(self, router: nn.Module) -> None:
        """Remove the plain attributes that wrapping left on the router; mostly does nothing."""

    def num_experts(self, router: nn.Module) -> int:
        """Return E, the width of the router's logits."""
        return int(setting(router, self.num_experts_at))

    def top_k(self, router: nn.Module) -> int:
        """Return K, the number of experts chosen per token."""
        return int(setting(router, self.top_k_at))

    def groups(self, router: nn.Module) -> tuple[int, int]:
        """Return ``(expert groups, groups that a token may choose from)``; ``(1, 1)`` where no group is limited."""
        limit = self.rule.group if isinstance(self.rule, ScoreTopK) else None
        groups = None if limit is None else setting(router, limit.groups)
        if limit is None or groups is None:
            return 1, 1
        if limit.when is not None and setting(router, limit.when[0]) != limit.when[1]:
            return 1, 1
        return int(groups), int(setting(router, limit.keep))

    def weight(self, router: nn.Module) -> Tensor:
        """Return the router's own weight ``[E, D]`` (the model's tensor, not a copy).

        torch's own quantised Linear has a method in its place, which makes the packed tensor anew.
        """
        found: Any = setting(router, self.weight_at)
        weight_ED: Tensor = found if isinstance(found, Tensor) else found()
        return weight_ED

    def linear_bias(self, router: nn.Module) -> Tensor | None:
        """Return the bias ``[E]`` of the router's own linear, or None when its logits have no constant part."""
        found: Any = None if self.linear_bias_at is None else setting(router, self.linear_bias_at)
        bias: Tensor | None = found if found is None or isinstance(found, Tensor) else found()
        return bias

    def native_bias_place(self, router: nn.Module, parent: nn.Module) -> tuple[nn.Module, str] | None:
        """Return the module that holds the native balancing bias and the name there, or None when there is none."""
        path, start = (self.bias_arg, parent) if self.bias_at is None else (self.bias_at, router)
        if path is None or not setting(router, self.bias_when):
            return None
        way, _, name = path.rpartition(".")
        return (setting(start, way) if way else start), name

    def native_bias(self, router: nn.Module, parent: nn.Module) -> Tensor | None:
        """Return the model's own balancing bias ``[E]`` (shares its storage), or None when this router uses none."""
        place = self.native_bias_place(router, parent)
        if place is None:
            return None
        bias: Tensor = getattr(*place)
        return bias if bias.dim() == 1 else bias.view(-1)

    def read(self, router: nn.Module, output: Any) -> Routing:
        """Read clean logits, chosen ids and capacity drops from the native output, flattened to 2-D."""
        logits = output if self.logits_index is None else output[self.logits_index]
        index = output[self.indices_index]
        return Routing(logits.reshape(-1, logits.shape[-1]), index.reshape(-1, index.shape[-1]), None)

    def distribution(self, router: nn.Module, logits_TE: Tensor) -> Tensor:
        """Return the scores of the logits as a distribution, fp32 ``[T, E]``: no native bias, no group limit."""
        return self.rule.distribution(router, logits_TE)

    def reroute(self, router: nn.Module, call: RouterCall) -> Any:
        """Route again with beta and the lens's shift, and return the native structure.

        Args:
            router: the router.
            call: the native output and arguments, what steers, and the ids to choose where they are given; see
                `RouterCall`.

        Returns:
            The native structure: the clean logits object in its place, new weights and ids of native shapes and dtypes.
        """
        native = call.output[self.weights_index]
        weights_TK, index_TK = self.rule.route(
            router, call, k=self.top_k(router), bias_E=self._bias_of_call(router, call), dtype=native.dtype
        )
        parts = list(call.output)
        parts[self.weights_index] = weights_TK.view(native.shape)
        parts[self.indices_index] = index_TK.view(call.output[self.indices_index].shape)
        return tuple(parts)

    def masked(self, output: Any, dropped_E: Tensor) -> tuple[Any, float]:
        """What the router returned, as if some experts did not exist.

        Args:
            output: of the native forward.
            dropped_E: bool ``(E,)``, those experts.

        Returns:
            The output that `reroute` starts from, and the value that stands at the dropped experts in what it records.
        """
        return output, float("-inf")

    def _bias_of_call(self, router: nn.Module, call: RouterCall) -> Tensor | None:
        """Return the native bias that the native forward used in this call."""
        if self.bias_arg is not None:
            if not setting(router, self.bias_when):
                return None
            bias: Tensor | None = call.kwargs[self.bias_arg] if self.bias_arg in call.kwargs else call.args[1]
            return bias
        return self.native_bias(router, router)

    def refused(self, capability: str) -> str | None:
        """Return why ``capability`` is refused for this router, or None when it is supported."""
        if capability not in CAPABILITIES:
            raise ValueError(f"unknown capability {capability!r}; one of {', '.join(CAPABILITIES)}")
        if capability in self.refuse:
            return self.refuse[capability]
        if capability in ("lens", "fold") and not self.linear:
            return f"the logits of {self.router_class} are not linear in the router's input"
        return None

    def steer(self, router: nn.Module, call: RouterCall, recorded: bool) -> tuple[Any, Routing | None]:
        """:meth:`reroute`, and what :meth:`read` says of it where the forward is recorded.

        A router whose output does not show its whole choice answers here what it has just computed.
        """
        output = self.reroute(router, call)
        return output, self.read(router, output) if recorded else None


@dataclass(frozen=True, kw_only=True)
class ObserveOnly(Adapter):
    """A router whose choice cannot be moved; `refuse` says why under ``"beta"``."""

    def reroute(self, router: nn.Module, call: RouterCall) -> Any:
        """Raise UnsupportedArchitectureError with the reason."""
        raise UnsupportedArchitectureError(f"{self.router_class} cannot be steered: {self.refused('beta')}")


def module_of(family: str) -> str:
    """Return the modeling module of a Transformers model folder."""
    return f"transformers.models.{family}.modeling_{family}"


_ADAPTERS: dict[tuple[str, str], Adapter] = {}
_REFUSED: dict[tuple[str, str], str] = {}


def register(adapter: Adapter) -> Adapter:
    """Add an adapter. Raises ValueError when its router class is taken, or a capability that it refuses is unknown."""
    key = (adapter.module, adapter.router_class)
    if key in _ADAPTERS:
        raise ValueError(
            f"{adapter.router_class} of {adapter.module} already has an adapter (family {_ADAPTERS[key].family!r})"
        )
    unknown = set(adapter.refuse) - set(CAPABILITIES)
    if unknown:
        raise ValueError(
            f"adapter {adapter.family!r} refuses unknown capabilities {sorted(unknown)}; known: {CAPABILITIES}"
        )
    _ADAPTERS[key] = adapter
    return adapter


def register_refusal(module: str, class_name: str, reason: str) -> None:
    """State why modules of a class, which route without a router module, cannot be wrapped at all."""
    _REFUSED[(module, class_name)] = reason


def refusal(module: nn.Module) -> str | None:
    """Return why a module that routes inline cannot be wrapped, or None when it is not such a module."""
    reasons = (_REFUSED.get((cls.__module__, cls.__name__)) for cls in type(module).__mro__)
    return next((reason for reason in reasons if reason is not None), None)


def refused_classes() -> tuple[tuple[str, str, str], ...]:
    """Return ``(module, class, reason)`` of every block that routes without a router module."""
    return tuple((module, class_name, reason) for (module, class_name), reason in _REFUSED.items())


def all_adapters() -> tuple[Adapter, ...]:
    """Return every registered adapter, in order of registration."""
    return tuple(_ADAPTERS.values())


def match_class(cls: type) -> Adapter | None:
    """Return the adapter of a router class (it or any base class, by module and name), or None."""
    found = (_ADAPTERS.get((base.__module__, base.__name__)) for base in cls.__mro__)
    return next((adapter for adapter in found if adapter is not None), None)


def match(module: nn.Module) -> Adapter | None:
    """Return the adapter of a router, or None."""
    return match_class(type(module))


def find(router: nn.Module) -> Adapter:
    """Return the adapter of a router. Raises UnsupportedArchitectureError, with close names, when there is none."""
    adapter = match(router)
    if adapter is not None:
        return adapter
    cls = type(router)
    reason = refusal(router)
    if reason is not None:
        raise UnsupportedArchitectureError(f"{cls.__name__} of {cls.__module__} cannot be wrapped: {reason}")
    close = difflib.get_close_matches(cls.__name__, [name for _, name in _ADAPTERS], n=3, cutoff=0.5)
    hint = f"; closest known routers: {', '.join(close)}" if close else ""
    raise UnsupportedArchitectureError(
        f"no adapter describes {cls.__name__} of {cls.__module__}{hint}. "
        "Describe it with chronomoe_hf.patches.register(Adapter(...)); docs/adding_an_architecture.md shows how."
    )
