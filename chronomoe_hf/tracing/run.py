"""trace: a text through a model in eval mode, and what every router decided for every token.

Shape suffixes: B rows of a batch, S positions, T router rows (B * S), K experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from chronomoe_hf.errors import ContractError, DataError
from chronomoe_hf.lifecycle.live.model import input_device
from chronomoe_hf.profiling.batches import call_arguments, collate, pad_id
from chronomoe_hf.profiling.run import recording, take_sums
from chronomoe_hf.step_state import StepState
from chronomoe_hf.system import ChronoSystem
from chronomoe_hf.tracing.layer import NOWHERE, TracedLayer
from chronomoe_hf.tracing.records import Trace
from chronomoe_hf.tracing.tokens import Text, Tokens, texts_of
from chronomoe_hf.window.events import layer_events
from chronomoe_hf.wrapping.layer import Layer


def trace(
    model: nn.Module,
    tokenizer: Any,
    text: Text,
    *,
    against: nn.Module | None = None,
    tokens: int | None = 2000,
    length: int = 1024,
    batch_size: int = 4,
    packed: bool = False,
    model_name: str = "",
    against_name: str = "",
) -> Trace:
    """Send a text through a model and keep what every router decided for every token. No weight changes.

    Args:
        model: any model that `wrap` accepts, wrapped or not; a wrapped one is traced as it is governed.
        tokenizer: of the model.
        text: a string, a conversation (messages, through the chat template), or a list of either.
        against: a second model, given the same tokens.
        tokens: most tokens in all; None = no limit.
        length: most tokens of a forward's row; a longer text is cut, and its parts do not see each other.
        batch_size: rows of a forward.
        packed: put the texts behind each other in rows, with positions that start again, as packed training does.
        model_name: for people.
        against_name: the same of the second model.

    Returns:
        The trace. It holds the text, and so do the files that it writes.

    Raises:
        DataError: no text, no tokenizer, a conversation without a template; models that cannot be compared.
        ContractError: a router was not called once in a forward, or not with the tokens of the batch.
        WrapError: the model cannot be wrapped.
    """
    for name, value in (("tokens", tokens), ("length", length), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise DataError(f"{name} is at least 1, got {value}")
    texts = _limited(texts_of(text, tokenizer), tokens)
    found = _traced(model, tokenizer, texts, length, batch_size, packed, model_name)
    if against is None:
        return found
    return found.beside(_traced(against, tokenizer, texts, length, batch_size, packed, against_name))


def _limited(texts: list[Tokens], most: int | None) -> list[Tokens]:
    if most is None:
        return texts
    out = []
    for tokens in texts:
        if most > 0:
            out.append(tokens[:most])
            most -= len(tokens)
    return out


class _Piece(NamedTuple):
    """Some tokens of one text that see each other."""

    text: int
    tokens: Tokens


class _Part(NamedTuple):
    """Where the real tokens of a forward stand in one part of the model (encoder, decoder, or all of it)."""

    rows_R: Tensor
    num_rows: int


class _Call(NamedTuple):
    """What one router did in one forward, on the CPU: int64 and fp32 ``(T, K)``, ``(T,)``."""

    index_TK: Tensor
    weight_TK: Tensor
    kept_TK: Tensor
    score_TK: Tensor
    margin_T: Tensor
    next_T: Tensor


def _traced(
    model: nn.Module, tokenizer: Any, texts: list[Tokens], length: int, batch_size: int, packed: bool, name: str
) -> Trace:
    pieces = [_Piece(at, t[start : start + length]) for at, t in enumerate(texts) for start in range(0, len(t), length)]
    with recording(model, 1, None) as system:
        taps = [_Tap(layer) for layer in system.layers]
        try:
            batches = _packed(pieces, length) if packed else [[piece] for piece in pieces]
            for start in range(0, len(batches), batch_size):
                _forward(model, system, taps, batches[start : start + batch_size], tokenizer, packed)
        finally:
            for tap in taps:
                tap.remove()
        phi = _phi(system)
        laid = _Layout(system.model, pieces)
        return Trace(
            model_name=name,
            model_class=type(system.model).__name__,
            ids=laid.tokens.ids,
            pieces=laid.tokens.pieces,
            special=laid.tokens.special,
            text_of=laid.text_of,
            layers=[
                _layer(layer, tap, laid, phi[at])
                for at, (layer, tap) in enumerate(zip(system.layers, taps, strict=True))
            ],
        )


def _packed(pieces: Sequence[_Piece], length: int) -> list[list[_Piece]]:
    """Pieces behind each other, at most `length` tokens a row."""
    rows: list[list[_Piece]] = []
    room = 0
    for piece in pieces:
        if len(piece.tokens) > room:
            rows.append([])
            room = length
        rows[-1].append(piece)
        room -= len(piece.tokens)
    return rows


class _Tap:
    """Keeps what one router decides, forward by forward."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.part = "decoder" if _in_decoder(layer.name) else ""
        self.running: list[_Call] = []
        self.kept: list[_Call] = []
        self._handle = layer.router.register_forward_hook(self._hook)

    def remove(self) -> None:
        """Take the hook off again."""
        self._handle.remove()

    def _hook(self, module: nn.Module, args: Any, output: Any) -> None:
        self.running.append(_call(self.layer, module, output))

    def close(self, part: _Part) -> None:
        """The forward has ended: of its call, keep the real tokens, in the order of the text."""
        where = f"layer {self.layer.layer_id} ({self.layer.name})"
        if len(self.running) != 1:
            raise ContractError(f"{where} was called {len(self.running)} times in one forward, so no token is its own")
        call = self.running.pop()
        if call.index_TK.shape[0] != part.num_rows:
            raise ContractError(
                f"{where} routed {call.index_TK.shape[0]} rows and the batch has {part.num_rows} positions, so no "
                "token is its own; trace the language model alone"
            )
        self.kept.append(_Call(*(value[part.rows_R] for value in call)))


def _in_decoder(name: str) -> bool:
    parts = name.split(".")
    return "decoder" in parts and "encoder" not in parts


def _call(layer: Layer, router: nn.Module, output: Any) -> _Call:
    adapter = layer.adapter
    routing = adapter.read(router, output)
    index_TK, logits_TE = routing.index_TK.detach(), routing.logits_TE.detach()
    score_TE = adapter.distribution(router, logits_TE).float()
    taken_TE = torch.zeros_like(score_TE, dtype=torch.bool).scatter(1, index_TK, True)
    rest_T, next_T = score_TE.masked_fill(taken_TE, float("-inf")).max(dim=1)
    score_TK = score_TE.gather(1, index_TK)
    margin_T = score_TK.min(dim=1).values - rest_T
    none_T = rest_T == float("-inf")
    kept_TK = torch.ones_like(index_TK, dtype=torch.bool) if routing.kept_TK is None else routing.kept_TK.detach()
    weight_TK = _weights(layer, output, index_TK)
    return _Call(
        index_TK.cpu(),
        weight_TK.cpu(),
        kept_TK.cpu(),
        score_TK.cpu(),
        margin_T.masked_fill(none_T, float("nan")).cpu(),
        next_T.masked_fill(none_T, NOWHERE).cpu(),
    )


def _weights(layer: Layer, output: Any, index_TK: Tensor) -> Tensor:
    """The weights that a router's output holds, fp32 ``(T, K)``; NaN where it holds none (its block computes them)."""
    at = layer.adapter.weights_index
    native = output[at] if isinstance(output, tuple | list) and at < len(output) else None
    if isinstance(native, Tensor) and native.is_floating_point():
        flat = native.detach().float()
        if flat.dim() >= 2 and flat.shape[-1] == index_TK.shape[1] and flat.numel() == index_TK.numel():
            return flat.reshape(index_TK.shape)
        if flat.dim() >= 2 and flat.numel() == index_TK.shape[0] * layer.num_experts:
            return flat.reshape(index_TK.shape[0], -1).gather(1, index_TK)
    return torch.full(index_TK.shape, float("nan"), device=index_TK.device)


def _forward(
    model: nn.Module, system: ChronoSystem, taps: list[_Tap], rows: list[list[_Piece]], tokenizer: Any, packed: bool
) -> None:
    ids = [[one for piece in row for one in piece.tokens.ids] for row in rows]
    if packed and len(ids) > 1:  # without a mask, packed rows cannot be padded
        for row in rows:
            _forward(model, system, taps, [row], tokenizer, packed)
        return
    batch = collate(ids, system.model, pad_id(system.model, tokenizer))
    inputs = dict(batch.inputs)
    if packed:
        if "decoder_input_ids" in inputs:
            raise DataError("texts of an encoder-decoder cannot be packed; leave packed=False")
        position = torch.cat([torch.arange(len(piece.tokens)) for piece in rows[0]])
        inputs = {"input_ids": inputs["input_ids"], "position_ids": position[None]}
    parts = {"": _part(batch.inputs["attention_mask"])}
    if "decoder_attention_mask" in batch.inputs:
        parts["decoder"] = _part(batch.inputs["decoder_attention_mask"])
    device = input_device(model)
    for tap in taps:
        tap.running.clear()
    model(**{name: value.to(device) for name, value in inputs.items()}, **call_arguments(system.model))
    for tap in taps:
        tap.close(parts.get(tap.part, parts[""]))


def _part(mask_BS: Tensor) -> _Part:
    return _Part(torch.nonzero(mask_BS.reshape(-1))[:, 0], mask_BS.numel())


class _Layout:
    """The tokens in the order of the text, and which of them a part of the model sees.

    An encoder-decoder reads the first half of a piece and writes the second; see ``profiling.batches.collate``. In its
    decoder a token is routed where it is written: at the position whose output it is.
    """

    def __init__(self, model: nn.Module, pieces: Sequence[_Piece]) -> None:
        config: Any = getattr(model, "config", None)
        self.split = bool(getattr(config, "is_encoder_decoder", False))
        whole = Tokens([], [], [])
        self.text_of: list[int] = []
        self.seen: dict[str, list[int]] = {"": [], "decoder": []}
        for text, tokens in pieces:
            start, half = len(self.text_of), (len(tokens) + 1) // 2
            for own, one in zip(whole.__dict__.values(), tokens.__dict__.values(), strict=True):
                own.extend(one)
            self.text_of += [text] * len(tokens)
            read = half if self.split else len(tokens)
            self.seen[""] += range(start, start + read)
            self.seen["decoder"] += range(start + half, start + len(tokens)) if self.split else ()
            if self.split and half == len(tokens):
                self.seen["decoder"].append(start)
        self.tokens = whole


def _layer(layer: Layer, tap: _Tap, laid: _Layout, phi: list[float | None]) -> TracedLayer:
    calls = _Call(*(torch.cat(values).numpy() for values in zip(*tap.kept, strict=True)))  # type: ignore[arg-type]
    at = laid.seen[tap.part if laid.split else ""]
    size = (len(laid.text_of), layer.top_k)

    def spread(value: Any, empty: float, dtype: Any) -> Any:
        out = np.full((size[0], *value.shape[1:]), empty, dtype=dtype)
        out[at] = value
        return out

    return TracedLayer(
        layer_id=layer.layer_id,
        name=layer.name,
        num_experts=layer.num_experts,
        top_k=layer.top_k,
        index_TK=spread(calls.index_TK, NOWHERE, np.int32),
        weight_TK=spread(calls.weight_TK, np.nan, np.float32),
        kept_TK=spread(calls.kept_TK, False, np.bool_),
        score_TK=spread(calls.score_TK, np.nan, np.float32),
        margin_T=spread(calls.margin_T, np.nan, np.float32),
        next_T=spread(calls.next_T, NOWHERE, np.int32),
        phi=phi,
    )


def _phi(system: ChronoSystem) -> list[list[float | None]]:
    """Phase coherence of every expert over everything that was sent through."""
    row_LR = take_sums(system)
    state = StepState([layer.num_experts for layer in system.layers])
    state.to_(row_LR.device)
    state.update(row_LR, 1, system.config.veto)
    events = layer_events(
        system.layers,
        state.row,
        state.host(),
        run_id="trace",
        attempt=0,
        step=1,
        mode="INFER",
        window_steps=1,
        config=system.config,
    )
    return [[None] * event.n_experts if event.phi_fast is None else list(event.phi_fast) for event in events]
