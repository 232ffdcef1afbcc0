"""Which forwards are recorded, and which of their rows are real tokens.

Shape suffixes: T router rows (tokens), B batch, S sequence.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, compiler, nn
from transformers import PreTrainedModel

from chronomoe_hf import private
from chronomoe_hf.recording.faults import guarded
from chronomoe_hf.recording.passes import Passes
from chronomoe_hf.recording.rows import DECODER_LABELS, PadToken, TokenSample, real_tokens, sample_tokens
from chronomoe_hf.recording.slices import UNKNOWN, Slices
from chronomoe_hf.recording.tape import Tape
from chronomoe_hf.recording.totals import Sums
from chronomoe_hf.router.state import SharedInParts

Mode = Literal["off", "train", "eval"]
SCOPE = "_chrono_scope"
DECODER = "_chrono_decoder"
"""Name of the plain attribute of an encoder-decoder model that holds the scope of its decoder."""


class ForwardWatcher(Protocol):
    """What wants to know of every forward, and may stop it; implemented in ``replay.passes``."""

    def open(self, training: bool, named: Mapping[str, Any], mask_T: Tensor | None) -> None:
        """An owner's forward begins, with these arguments; `mask_T` says which rows are real tokens (None = all)."""

    def close(self) -> None:
        """It has ended."""

    def abandon(self) -> None:
        """It failed."""


@dataclass
class Switches:
    """Host-side switches shared by all scopes of a system.

    Args:
        training: record training forwards.
        evaluation: record forwards in eval mode (set while Trainer evaluates, or by ``system.recording_eval()``).
        router_input: also sum router inputs (set for the one step before a lens may be steered).
        any_steering: beta or a lens acts in some layer (only compiled graphs go by it, see ``ChronoRouter.forward``).
        step: the optimizer step that the next training forward belongs to.
        watcher: is told of every forward of an owner, recorded or not; None = nobody is.
    """

    training: bool = True
    evaluation: bool = False
    router_input: bool = False
    any_steering: bool = False
    step: int = 1
    watcher: ForwardWatcher | None = None

    @contextlib.contextmanager
    def recording_eval(self) -> Iterator[None]:
        """Record forwards in eval mode meanwhile."""
        before = self.evaluation
        self.evaluation = True
        try:
            yield
        finally:
            self.evaluation = before


@dataclass
class _Cache:
    """What the calls of one forward share: masks and samples by size and device."""

    masks: dict[Any, Tensor | None] = field(default_factory=dict)
    samples: dict[Any, TokenSample] = field(default_factory=dict)
    ranges: dict[Any, Tensor] = field(default_factory=dict)


class ForwardScope(SharedInParts):
    """Whether the running forward counts, which of its rows are real tokens, and what it has left to be summed.

    One scope belongs to each innermost PreTrainedModel that owns routers. Its forward (``ChronoOwner``) opens and
    closes it, so the recompute of activation checkpointing (which runs outside the owner), evaluation, generation,
    no-grad forwards in training mode and function transforms (``torch.func``) are all left out. Closing sums up the
    tape; a forward that failed is in no sum.

    Args:
        switches: shared with the system.
        parameters: names of the owner's positional parameters.
        pad_token_id: of the owner.
        sums: where the tape goes.

    Attributes:
        inside: a forward of the owner is running, recorded or not.
        fault: why no forward of this owner is recorded any more; None = they are.
    """

    def __init__(
        self, switches: Switches, parameters: tuple[str, ...], pad: PadToken, sums: Sums | None = None
    ) -> None:
        self.switches = switches
        self.parameters = parameters
        self.pad = pad
        self.mode: Mode = "off"
        self.mask_T: Tensor | None = None
        self.labels: Tensor | None = None
        self.note: str | None = None
        self.tape = Tape(Sums(1, 1) if sums is None else sums)
        self.fault: str | None = None
        self.inside = False
        self.passes = Passes()
        self.slices = Slices()
        self._cache = _Cache()
        self._step, self._num_closed = 0, 0  # training forwards that were summed in that step

    def open(self, training: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decide the mode and read the padding mask from the owner's arguments."""
        if not torch.compiler.is_compiling():
            self.abandon()  # an interrupted forward never came to its end
        self.inside = True
        named = dict(zip(self.parameters, args, strict=False)) | kwargs
        self.mode = self._mode(training, named)
        if self.mode != "off":
            if self.labels is not None:
                named[DECODER_LABELS] = self.labels
            self.mask_T, note = real_tokens(*self._with_ids(named))
            self.slices.begin(named, self.mask_T)
            self.note = note or self.note

    def _with_ids(self, named: dict[str, Any]) -> tuple[dict[str, Any], PadToken, bool]:
        """The arguments, with the ids of the model around where the owner was given embeddings; whether it did."""
        shown, embeds = self.tape.sums.tokens, named.get("inputs_embeds")
        if shown is None or named.get("input_ids") is not None or not isinstance(embeds, Tensor):
            return named, self.pad, False
        ids, pad = shown
        if embeds.shape[:2] != ids.shape:
            return named, self.pad, False
        return {**named, "input_ids": ids}, self.pad if self.pad.token_id is not None else pad, True

    def show(self, training: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tell the watcher of the forward that was just opened; what it raises stops the forward."""
        watcher = self.switches.watcher
        if watcher is None or torch.compiler.is_compiling():
            return
        named = dict(zip(self.parameters, args, strict=False)) | kwargs
        watcher.open(training, named, real_tokens(named, self.pad)[0] if self.mode == "off" else self.mask_T)

    def shown(self) -> None:
        """Tell the watcher that the forward has ended."""
        if self.switches.watcher is not None and not torch.compiler.is_compiling():
            self.switches.watcher.close()

    def fail(self, error: Exception) -> None:
        """Opening or closing a scope has failed: no forward of this owner is recorded from here on."""
        self.fault = self.fault or self.tape.sums.faults.tell("model", "routing", error)
        self.abandon()

    def _mode(self, training: bool, named: dict[str, Any]) -> Mode:
        if self.fault is not None:
            return "off"
        if not training:
            return "eval" if self.switches.evaluation else "off"
        if not self.switches.training:
            return "off"
        if torch.compiler.is_compiling():
            return "train" if torch.is_grad_enabled() else "off"
        # Inside torch.func.grad and its like tensors belong to the transform and may not be added to ours.
        if private.in_transform():
            return "off"
        step = self.switches.step
        if not torch.is_grad_enabled():
            self.passes.note_without_grad(named, step)
            return "off"
        if private.in_backward():
            return "train" if self.passes.counts_in_backward(named, step) else "off"
        self.passes.note_counted(named, step)
        return "train"

    def close(self) -> None:
        """Sum up and forget the forward.

        The owner may be compiled and some of its routers not (a block that is kept out of the graph, activation
        checkpointing beside captured outputs): they run between two graphs and leave their calls on the tape. A graph
        that holds every layer finds the tape empty, and is not broken here.
        """
        if not torch.compiler.is_compiling():
            self._settle()
        elif self.tape.calls or self.tape.chunks:
            self._settle_eagerly()
        self.abandon()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _settle_eagerly(self) -> None:
        guarded(self.fail, self._settle)
        self.tape.clear()
        self._cache = _Cache()

    def _settle(self) -> None:
        if self.mode == "off":
            return
        self.slices.end()
        self.tape.sum_up(self.mode, self.rows, self.sample)
        self.tape.sums.count_labels(self.mode)
        if self.mode == "train":
            self._num_closed = self._micro + 1
            self._step = self.switches.step

    @property
    def _micro(self) -> int:
        """Number of the running training forward in its step, from 0."""
        return self._num_closed if self._step == self.switches.step else 0

    def abandon(self) -> None:
        """Forget the forward without summing it."""
        self.mode = "off"
        self.inside = False
        self.mask_T = None
        if self.switches.watcher is not None:
            self.switches.watcher.abandon()
        if not torch.compiler.is_compiling():
            self.tape.clear()
            self._cache = _Cache()

    def reads_outputs(self, every: int) -> bool:
        """Whether expert outputs are read in this forward: always in evaluation, else in every n-th micro-batch.

        Which one follows from the step and the micro-batch alone, so a resumed run reads the same ones.
        """
        if self.mode == "off":
            return False
        return every == 1 or self.mode == "eval" or (self.switches.step + self._micro) % every == 0

    def rows(self, num_rows: int, device: torch.device, at: int | None = None) -> Tensor | None:
        """Real-token mask for a router that sees `num_rows` rows, or None where all rows count as real.

        Args:
            num_rows: rows of the call.
            device: where the mask is wanted.
            at: where the call begins, if it may be a slice of the forward's rows; see ``Slices``.
        """
        if torch.compiler.is_compiling():
            return self._rows(num_rows, device)
        key = (num_rows, device, at)
        if key not in self._cache.masks:
            self._cache.masks[key] = self._rows(num_rows, device, at)
        return self._cache.masks[key]

    def _rows(self, num_rows: int, device: torch.device, at: int | None = None) -> Tensor | None:
        mask_T = self.mask_T
        part_T = None if mask_T is None else self.slices.part(mask_T, at, num_rows)
        if part_T is not None:
            return part_T.to(device)
        if mask_T is not None and mask_T.shape[0] != num_rows:
            if at != UNKNOWN:
                rows = f"the router sees {num_rows} rows, the mask has {mask_T.shape[0]}"
                self.note = f"padding is counted as real tokens: {rows}"
            return None
        return None if mask_T is None else mask_T.to(device)

    def sample(self, num_rows: int, limit: int | None, device: torch.device, at: int | None = None) -> TokenSample:
        """Up to `limit` of the real rows, the same for every caller in this forward."""
        if torch.compiler.is_compiling():
            return sample_tokens(self._rows(num_rows, device), num_rows, limit, device)
        key = (num_rows, limit, device, at)
        if key not in self._cache.samples:
            self._cache.samples[key] = sample_tokens(self.rows(num_rows, device, at), num_rows, limit, device)
        return self._cache.samples[key]

    def count_up(self, num: int, device: torch.device) -> Tensor:
        """0, 1, ..., num - 1 on `device`; made once a forward."""
        key = (num, device)
        if key not in self._cache.ranges:
            self._cache.ranges[key] = torch.arange(num, device=device)
        return self._cache.ranges[key]


def open_scope(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of an owner whose forward was replaced on the instance: its class is bypassed."""
    scope: ForwardScope = module.__dict__[SCOPE]
    guarded(scope.fail, scope.open, module.training, args, kwargs)
    scope.show(module.training, args, kwargs)


def close_scope(module: nn.Module, args: Any, output: Any) -> None:
    """Always-called forward hook of such an owner; torch gives it no output where the forward raised."""
    scope: ForwardScope = module.__dict__[SCOPE]
    if output is None:
        scope.abandon()
    else:
        scope.shown()
        guarded(scope.fail, scope.close)


class ChronoOwner(nn.Module):
    """Mixin placed before the class of an owner of routers: its forward opens and closes the scope.

    A hook would not do: libraries that call ``model.forward(...)`` (sentence-transformers does) run none.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The native forward, inside the scope; found through the module, so a deep copy records into its own."""
        scope: ForwardScope | None = self.__dict__.get(SCOPE)
        if scope is None:  # an instance that somebody made of this class
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        if torch.compiler.is_compiling():
            scope.open(self.training, args, kwargs)
            output = super().forward(*args, **kwargs)  # type: ignore[misc]
            scope.close()
            return output
        guarded(scope.fail, scope.open, self.training, args, kwargs)
        try:
            scope.show(self.training, args, kwargs)
            output = super().forward(*args, **kwargs)  # type: ignore[misc]
            scope.shown()
        except BaseException:
            scope.abandon()
            raise
        guarded(scope.fail, scope.close)
        return output


def open_decoder(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of an encoder-decoder model: shows its labels to the scope of the decoder."""
    named = dict(zip(forward_parameters(module), args, strict=False)) | kwargs
    module.__dict__[DECODER].labels = named.get("labels")


def close_decoder(module: nn.Module, args: Any, output: Any) -> None:
    """Always-called forward hook of an encoder-decoder model."""
    module.__dict__[DECODER].labels = None


def forward_parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the positional parameters of the module's class-level forward."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def real_tokens_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Bool ``(T,)``, real tokens of a call of a model's forward (for hooks outside a scope); None = all are."""
    named = dict(zip(forward_parameters(module), args, strict=False)) | kwargs
    return real_tokens(named, PadToken.of(getattr(module, "config", None)))[0]


# Loss tokens: positions whose label takes part in the loss, seen in what a forward is given, without a host read.
#
# A forward that is given no labels (its loss is computed outside: DPO, GRPO, label smoothing) says nothing about them,
# and neither does a compiled one. The count itself is in ``Sums``.

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
        has_labels: it may be given labels.
        pad: its padding token; None = its ids are not those of the owners inside (an encoder's).
    """

    sums: Sums
    parameters: tuple[str, ...]
    shifted: bool
    has_labels: bool
    pad: PadToken | None


def labelled_models(root: nn.Module, outer: nn.Module, sums: Sums) -> dict[nn.Module, Labelled]:
    """The models whose forward is given labels, and those around an owner that are given ids.

    Args:
        root: the model that was wrapped.
        outer: `root`, or what is around it. PEFT calls ``root.forward`` past its hooks, so it is read there.
        sums: of the system.
    """
    found = {}
    for module in root.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        names = forward_parameters(module)
        if "labels" in names or ("input_ids" in names and SCOPE not in module.__dict__):
            found[module] = Labelled(sums, names, shifts(module), "labels" in names, _pad_of(module))
    for module in outer.modules():
        if module is root:
            break  # what comes after it is no wrapper around it
        if hasattr(type(module), "get_base_model"):
            found[module] = Labelled(sums, forward_parameters(module), shifts(root), True, _pad_of(root))
    return found


def _pad_of(model: nn.Module) -> PadToken | None:
    config = getattr(model, "config", None)
    return None if getattr(config, "is_encoder_decoder", False) else PadToken.of(config)


def shifts(model: nn.Module) -> bool:
    """Whether position t of the labels is predicted from the positions before it, in the model itself."""
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return not encoder_decoder and getattr(model, "loss_type", None) not in _NOT_SHIFTED


def show_labels(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: shows labels and ids to the scopes inside; the innermost model that is given some decides."""
    if compiler.is_compiling():
        return
    seen: Labelled = module.__dict__[LABELS]
    named = dict(zip(seen.parameters, args, strict=False)) | kwargs
    ids = named.get("input_ids")
    if isinstance(ids, Tensor) and ids.dim() == 2 and seen.pad is not None:
        seen.sums.tokens = (ids, seen.pad)
    labels, ready = named.get("labels"), named.get("shift_labels")
    if not isinstance(labels, Tensor) or labels.dim() < 2:
        return  # none, or one for a whole row: no tokens
    seen.sums.labels = ready if isinstance(ready, Tensor) else labels[..., 1:] if seen.shifted else labels


def hide_labels(module: nn.Module, args: Any, output: Any) -> None:
    """Always-called forward hook: labels and ids are of one forward."""
    if not compiler.is_compiling():
        seen: Labelled = module.__dict__[LABELS]
        seen.sums.tokens = None
        if seen.has_labels:
            seen.sums.labels = None
