"""What engines hand out as routes, read by its own dtype and shape: nothing is assumed, and nothing is cut to fit.

Forms that are known: an array or tensor ``(rows, layers, k)``; base64 of an ``.npy`` file (vLLM over HTTP); base64 of
raw int32 without a shape (SGLang); the prompt's and the completion's part as two arrays (vLLM 0.21).

Shape suffixes: N tokens of a row, R rows of routes, A the engine's layer axis, L compared layers, K experts a token.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from chronomoe_hf.errors import ReplayError, shown
from chronomoe_hf.replay.layers import ReplayLayer
from chronomoe_hf.replay.store import Array

_NPY = b"\x93NUMPY"


@dataclass(frozen=True)
class Axis:
    """How an engine's layer axis is read.

    Args:
        layers: all wrapped layers, in order.
        compared: those whose choices are compared and repeated.
        num_hidden_layers: decoder layers of the model's config; None = it says nothing.
        wanted: ``ReplayConfig.layers``.
    """

    layers: Sequence[ReplayLayer]
    compared: Sequence[ReplayLayer]
    num_hidden_layers: int | None
    wanted: str = "auto"

    @property
    def top_k(self) -> int:
        """Experts a token of the layer with most."""
        return max((layer.top_k for layer in self.compared), default=1)

    def sizes(self) -> dict[str, int]:
        """Length of the axis in every way of reading it that the settings allow."""
        known = {"moe": len(self.layers), "all": self.num_hidden_layers}
        return {name: size for name, size in known.items() if size and self.wanted in ("auto", name)}

    def columns(self, size: int) -> list[int]:
        """Which places of an axis of that length belong to the compared layers.

        Raises:
            ReplayError: the length is neither the number of MoE layers nor that of all layers, or two routers lie in
                one decoder layer.
        """
        sizes = self.sizes()
        if size not in sizes.values():
            ways = ", ".join(f"{value} ({name})" for name, value in sizes.items())
            raise ReplayError(
                f"the routes have {size} layers, the model {ways} (replay.layers={self.wanted!r}); routes of a draft "
                "(MTP) head must be taken off, and those of another model cannot be used"
            )
        decoders = [layer.decoder for layer in self.layers]
        if len(set(decoders)) != len(decoders) or None in decoders:
            raise ReplayError(
                "several routers of this model lie in one decoder layer, or their names carry no layer number, so an "
                "engine's layer axis cannot be told apart; use Transformers' generate for the rollouts"
            )
        moe = {layer.layer_id: at for at, layer in enumerate(self.layers)}
        if size == sizes.get("all") and (size != sizes.get("moe") or max(d for d in decoders if d is not None) < size):
            return [layer.decoder for layer in self.compared if layer.decoder is not None]
        return [moe[layer.layer_id] for layer in self.compared]


@dataclass(frozen=True)
class Routes:
    """Routes of one row, ready for the store.

    Args:
        routes_RLK: ids, -1 in rows that are unknown.
        invalid: rows that the engine returned but that cannot be choices, with the reason; None = there are none.
        num_invalid: how many.
    """

    routes_RLK: Array
    num_invalid: int = 0
    invalid: str | None = None


def read_routes(payload: Any, num_tokens: int, axis: Axis, dtype: np.dtype[Any], start: int = 0) -> Routes:
    """The routes of one row in the order and type of the store.

    Args:
        payload: see the top of this file.
        num_tokens: tokens of the row, prompt and completion.
        axis: of the model.
        dtype: of the store.
        start: first token that the payload is about (``routed_experts_prompt_start``, ``routed_experts_start_len``).

    Raises:
        ReplayError: the shape does not fit the row or the model; the message names both.
    """
    array = _array(payload, num_tokens - start, axis)
    if array.ndim != 3:
        raise ReplayError(f"routes have three axes (tokens, layers, experts), got shape {array.shape}")
    rows, size, k = array.shape
    if start + rows not in (num_tokens, num_tokens - 1):
        raise ReplayError(
            f"routes of {rows} tokens (from token {start} on) for a row of {num_tokens}: an engine returns a row for "
            f"every token, or for all but the last ({num_tokens - start} or {num_tokens - start - 1}); the row "
            "here and the row there are not the same text, or the prompt's part is missing"
        )
    if k != axis.top_k:
        raise ReplayError(f"routes name {k} experts a token, this model chooses {axis.top_k}")
    picked_RLK = array[:, axis.columns(size)].astype(np.int64)
    checked = _checked(picked_RLK, axis)
    blank = np.full((start, *picked_RLK.shape[1:]), -1, dtype=dtype)
    return Routes(np.concatenate([blank, checked.routes_RLK.astype(dtype)]), checked.num_invalid, checked.invalid)


def _checked(picked_RLK: Array, axis: Axis) -> Routes:
    """Rows that cannot be choices become -1: ids out of range, an expert twice."""
    sizes_L = np.array([layer.num_experts for layer in axis.compared])
    unknown_R = (picked_RLK < 0).any((1, 2))
    outside_R = (picked_RLK >= sizes_L[None, :, None]).any((1, 2)) & ~unknown_R
    sorted_RLK = np.sort(picked_RLK, -1)
    # Never for k = 1, where no expert can stand twice.
    twice_R = (sorted_RLK[..., 1:] == sorted_RLK[..., :-1]).any((1, 2)) & ~unknown_R
    zero_R = (picked_RLK == 0).all((1, 2)) & twice_R
    picked_RLK = np.where((unknown_R | outside_R | twice_R)[:, None, None], -1, picked_RLK)
    num = int((outside_R | twice_R).sum())
    if not num:
        return Routes(picked_RLK)
    if zero_R.any():
        why = (
            f"{int(zero_R.sum())} tokens came with all-zero routes: the engine's kernel does not report them (vLLM "
            "issue 54730: start it with --moe-backend triton) or lost them to a cache (SGLang issues 23885, 26975)"
        )
    elif outside_R.any():
        why = f"{int(outside_R.sum())} tokens have an id beyond the {int(sizes_L.max())} experts of this model"
    else:
        why = f"{int(twice_R.sum())} tokens have the same expert twice in a layer"
    return Routes(picked_RLK, num, why)


def _array(payload: Any, num_tokens: int, axis: Axis) -> Array:
    if isinstance(payload, torch.Tensor):
        return payload.detach().cpu().numpy()
    if isinstance(payload, np.ndarray):
        return payload
    if isinstance(payload, str | bytes):
        return _decoded(payload, num_tokens, axis)
    if isinstance(payload, Mapping) and {"prompt", "completion"} <= payload.keys():
        return _joined(payload["prompt"], payload["completion"], num_tokens, axis)
    if isinstance(payload, tuple) and len(payload) == 2:
        return _joined(*payload, num_tokens, axis)
    if isinstance(payload, Sequence):
        try:
            array: Array = np.asarray(payload, dtype=np.int64)
        except (ValueError, TypeError) as error:
            raise ReplayError(f"routes are nested lists of one shape, got {shown(payload)}: {error}") from error
        return array
    raise ReplayError(
        f"routes are an array (tokens, layers, experts), base64 of an .npy file or of int32, got {shown(payload)}"
    )


def _joined(prompt: Any, completion: Any, num_tokens: int, axis: Axis) -> Array:
    """The form of vLLM 0.21: the prompt's part and the generated part apart."""
    parts = [_array(part, num_tokens, axis) for part in (prompt, completion) if part is not None and len(part)]
    return np.concatenate(parts) if parts else np.zeros((0, 0, 0), dtype=np.int64)


def _decoded(text: str | bytes, num_tokens: int, axis: Axis) -> Array:
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ReplayError(f"routes as text are base64, got {shown(text)}: {error}") from error
    if raw.startswith(_NPY):
        try:
            array: Array = np.load(io.BytesIO(raw), allow_pickle=False)
        except ValueError as error:
            raise ReplayError(f"routes in .npy form cannot be read: {error}") from error
        return array
    if len(raw) % 4:
        raise ReplayError(f"routes in raw form are int32, got {len(raw)} bytes")
    flat = np.frombuffer(raw, dtype="<i4")
    fits = [
        (rows, size, axis.top_k)
        for size in sorted(set(axis.sizes().values()))
        for rows in (num_tokens - 1, num_tokens)
        if rows * size * axis.top_k == flat.size
    ]
    if len(fits) != 1:
        raise ReplayError(
            f"{flat.size} numbers without a shape do not say (tokens, layers, experts) for a row of {num_tokens} "
            f"tokens, {axis.sizes()} layers and {axis.top_k} experts ({len(fits)} ways fit); give an array"
        )
    return flat.reshape(fits[0])
