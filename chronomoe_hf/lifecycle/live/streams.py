"""Where the routed output of a layer is added up, found by trying, and what stands there when the model has run.

"There" is the largest module around the experts whose output is their output times a factor, plus the rest: a
transformer block with its residual stream, or less where a norm follows. Which one that is, is tried out, not assumed.

Shape suffixes: T tokens, D hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from chronomoe_hf.errors import LifecycleError
from chronomoe_hf.lifecycle.live.model import Batch, forward_arguments, real_rows
from chronomoe_hf.lifecycle.live.samples import LayerTap, StopForward
from chronomoe_hf.wrapping.discovery import FoundLayer, root_of

_TOLERANCE = 0.02  # of the disturbance; a norm behind the experts is off by more than a half


@dataclass(frozen=True)
class Stream:
    """Where the routed output of a layer is added up.

    Args:
        name: path of `module`, empty for the experts themselves.
        module: its output is `factor` times the routed output, plus what does not depend on it.
        factor: see `module`.
        block: path of the block of the stack that the layer is in, empty where there is none.
    """

    name: str
    module: nn.Module
    factor: float
    block: str


def find_streams(model: nn.Module, layers: Sequence[FoundLayer], batch: Batch) -> list[Stream]:
    """The stream of every layer, by disturbing its experts' output in a forward of one batch.

    Two forwards' worth for all layers together, whatever the depth; a layer whose block cannot be repeated inside the
    forward takes two of its own.

    Args:
        model: in evaluation mode, without gradients.
        layers: to look at.
        batch: a small one is enough.

    Raises:
        LifecycleError: the experts are not called once in a forward.
    """
    modules = dict(root_of(model).named_modules())
    paths = {module: name for name, module in modules.items()}
    around = [_around(layer, paths[layer.parent], modules) for layer in layers]
    found = _found_at_once(model, layers, around, batch)
    return [
        _find(model, layer, modules_of, batch) if stream is None else stream
        for layer, modules_of, stream in zip(layers, around, found, strict=True)
    ]


def _around(layer: FoundLayer, path: str, modules: Mapping[str, nn.Module]) -> list[tuple[str, nn.Module]]:
    """The modules around the experts, from the block of the stack inwards to the experts; `path` is the parent's."""
    words = path.split(".")
    first = next((at for at, word in enumerate(words) if word.isdigit()), len(words) - 1)
    names = [".".join(words[: at + 1]) for at in range(first, len(words))]
    assert layer.experts is not None
    return [*((name, modules[name]) for name in names), ("", layer.experts)]


@dataclass
class _Probe:
    """One layer in a forward of all: when its block has run, the block runs once more with the experts disturbed.

    What reaches the blocks behind it is what the plain block gave, so one forward serves every layer. A block that
    cannot be repeated (its forward raises, or gives something else the second time) leaves `stream` at None.
    """

    layer: FoundLayer
    around: list[tuple[str, nn.Module]]
    busy: list[_Probe]  # of all probes: who repeats its block now
    waiting: list[_Probe]  # of all probes: whose block has not run
    tokens: list[int] = field(default_factory=list)
    noise_TD: Tensor | None = None
    out: dict[nn.Module, Tensor | None] = field(default_factory=dict)
    stream: Stream | None = None

    def attach(self) -> list[Any]:
        """Put the hooks on and return their handles."""
        assert self.layer.experts is not None
        inner = [module for _, module in self.around[1:]]
        return [
            self.layer.experts.register_forward_hook(self._experts, with_kwargs=True),
            *(module.register_forward_hook(self._keep) for module in reversed(inner)),
            self.around[0][1].register_forward_hook(self._block, with_kwargs=True),
        ]

    def _listens(self) -> bool:
        return self in self.waiting and (not self.busy or self.busy[0] is self)

    def _experts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not self._listens():
            return None
        hidden = [*args, *kwargs.values()][0]
        self.tokens.append(hidden.numel() // hidden.shape[-1])
        if self.noise_TD is None or not isinstance(output, Tensor):
            return None
        return output + self.noise_TD.reshape(output.shape).to(output.dtype)

    def _keep(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._listens():
            self.out[module] = rows_of(output, self.tokens[-1]) if self.tokens else None

    def _block(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self._listens() or self.busy:
            return
        self._keep(module, args, output)
        plain = self._taken()
        if len(self.tokens) == 1 and plain[-1] is not None and bool(torch.isfinite(plain[-1]).all()):
            self.busy.append(self)
            try:
                self.noise_TD = _noise(plain)
                self._keep(module, args, module.forward(*args, **kwargs))
                if len(self.tokens) == 2:
                    self.stream = _followed(self.around, plain, self._taken(), self.noise_TD)
            except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError):
                self.stream = None  # whatever the block does with a second call, it is followed in a forward of its own
            finally:
                self.busy.remove(self)
                self.noise_TD = None
        self.out.clear()
        self.waiting.remove(self)
        if not self.waiting:
            raise StopForward

    def _taken(self) -> list[Tensor | None]:
        taken = [self.out.get(module) for _, module in self.around]
        self.out = {}
        return taken


def _found_at_once(
    model: nn.Module, layers: Sequence[FoundLayer], around: Sequence[list[tuple[str, nn.Module]]], batch: Batch
) -> list[Stream | None]:
    """The streams of all layers by one forward in which every block runs twice; None where that did not find it."""
    busy: list[_Probe] = []
    waiting: list[_Probe] = []
    probes = [_Probe(layer, each, busy, waiting) for layer, each in zip(layers, around, strict=True)]
    waiting.extend(probes)
    handles = [handle for probe in probes for handle in probe.attach()]
    run_up_to(model, batch, handles)
    return [probe.stream for probe in probes]


def _noise(plain: Sequence[Tensor | None]) -> Tensor:
    """What the output of the experts (the last of `plain`) is disturbed by, as large as the outermost output."""
    own_TD = plain[-1]
    assert own_TD is not None
    size = next(value for value in plain if value is not None).float().square().mean().sqrt()
    return torch.randn(own_TD.shape, generator=torch.Generator().manual_seed(0)).to(own_TD.device) * size


def _followed(
    around: list[tuple[str, nn.Module]],
    plain: Sequence[Tensor | None],
    moved: Sequence[Tensor | None],
    noise_TD: Tensor,
) -> Stream | None:
    """The outermost module whose output moved by a factor times the noise, or None."""
    block = around[0][0] if around[0][0].rpartition(".")[2].isdigit() else ""
    for (name, module), was_TD, is_TD in zip(around, plain, moved, strict=True):
        if was_TD is None or is_TD is None or was_TD.shape != noise_TD.shape:
            continue
        change_TD = is_TD.float() - was_TD.float()
        factor = float((change_TD * noise_TD).sum() / noise_TD.square().sum())
        off = float((change_TD - factor * noise_TD).norm()) / max(abs(factor) * float(noise_TD.norm()), 1e-30)
        if off <= _TOLERANCE:
            return Stream(name, module, factor, block)
    return None


def _find(model: nn.Module, layer: FoundLayer, around: list[tuple[str, nn.Module]], batch: Batch) -> Stream:
    """The stream of one layer, by two forwards up to it."""
    plain, count = _outputs(model, layer, around, batch, None)
    own_TD = plain[-1]
    if own_TD is None or not bool(torch.isfinite(own_TD).all()):
        raise LifecycleError(f"{layer.name}: the outputs of its experts are not finite, or are no hidden states")
    noise_TD = _noise(plain)
    moved, _ = _outputs(model, layer, around, batch, noise_TD)
    stream = _followed(around, plain, moved, noise_TD)
    if stream is not None:
        return stream
    raise LifecycleError(
        f"{layer.name}: what its experts give for {count} tokens cannot be followed to the output of any module around "
        "them; refit with sequential=False"
    )


def _outputs(
    model: nn.Module, layer: FoundLayer, around: list[tuple[str, nn.Module]], batch: Batch, noise_TD: Tensor | None
) -> tuple[list[Tensor | None], int]:
    """The output rows of the modules around a layer's experts, `noise_TD` added to that of the experts."""
    assert layer.experts is not None
    out: dict[nn.Module, Tensor | None] = {}
    tokens: list[int] = []

    def experts_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = [*args, *kwargs.values()][0]
        tokens.append(hidden.numel() // hidden.shape[-1])
        if noise_TD is None or not isinstance(output, Tensor):
            return None
        return output + noise_TD.reshape(output.shape).to(output.dtype)

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        out[module] = rows_of(output, tokens[-1]) if tokens else None
        if module is around[0][1]:
            raise StopForward

    handles = [layer.experts.register_forward_hook(experts_hook, with_kwargs=True)]
    handles += [module.register_forward_hook(keep) for _, module in reversed(around)]
    run_up_to(model, batch, handles)
    if len(tokens) != 1:
        raise LifecycleError(f"{layer.name}: its experts were called {len(tokens)} times in one forward")
    return [out.get(module) for _, module in around], tokens[0]


def rows_of(output: Any, tokens: int) -> Tensor | None:
    """The hidden states in a module's output as ``(T, D)``; None where it holds none of so many tokens."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, Tensor) or first.dim() < 2 or first.numel() != tokens * first.shape[-1]:
        return None
    return first.detach().reshape(tokens, first.shape[-1])


def run_up_to(model: nn.Module, batch: Batch, handles: Iterable[RemovableHandle] = ()) -> None:
    """Run the model until a hook raises StopForward, and take these hooks off."""
    try:
        with contextlib.suppress(StopForward):
            model(**forward_arguments(model, batch, logits=False))
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class StreamTap:
    """One layer's calls and what its stream holds behind it, in one forward."""

    layer: FoundLayer
    stream: Stream
    last: bool
    tap: LayerTap = field(init=False)
    handle: Any = None
    rows_TD: Tensor | None = None

    def __enter__(self) -> StreamTap:
        self.tap = LayerTap(self.layer, None)
        self.tap.attach()
        self.handle = self.stream.module.register_forward_hook(self._keep)
        return self

    def __exit__(self, *error: object) -> None:
        self.tap.detach()
        self.handle.remove()

    def _keep(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.rows_TD = rows_of(output, self.tap.calls[-1][0].shape[0]) if self.tap.calls else None
        if self.last:
            raise StopForward

    def take(self) -> tuple[Tensor, ...]:
        """Rows of real tokens: hidden, index, gate, stream."""
        if self.rows_TD is None:
            raise LifecycleError(f"{self.layer.name}: its experts were not called in a forward")
        taken = (*self.tap.take(), real_rows(self.rows_TD, self.tap.real.mask_T))
        self.rows_TD = None
        return taken


def full_streams(
    model: nn.Module, layers: Sequence[FoundLayer], streams: Sequence[Stream], batches: Sequence[Batch]
) -> list[Tensor]:
    """What the streams of the full model hold behind the layers, per layer ``(T, D)`` of real tokens, model's dtype."""
    rows: list[list[Tensor]] = [[] for _ in layers]
    with contextlib.ExitStack() as stack:
        taps = [
            stack.enter_context(StreamTap(layer, stream, last=layer is layers[-1]))
            for layer, stream in zip(layers, streams, strict=True)
        ]
        for batch in batches:
            run_up_to(model, batch)
            for index, tap in enumerate(taps):
                rows[index].append(tap.take()[-1])
    return [torch.cat(parts) for parts in rows]
