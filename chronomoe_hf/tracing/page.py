"""A trace as a page: the text, coloured by expert, with a slider over the layers. The one page that holds text.

Shape suffixes: T tokens, K experts per token.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from chronomoe_hf.pictures.page import picture_page
from chronomoe_hf.pictures.picture import Picture
from chronomoe_hf.tracing.layer import NOWHERE, Array, TracedLayer, leaders

MOST_BYTES = 1_500_000  # of packed arrays; in base64 and with the pictures the page stays below 3 MB
_NONE = 65535


class Traced(Protocol):
    """What the page needs of a ``Trace``."""

    @property
    def pieces(self) -> list[str]:
        """What every token stands for."""

    @property
    def special(self) -> list[bool]:
        """Whether it stands for no letters."""

    @property
    def text_of(self) -> list[int]:
        """Number of the text that it belongs to."""

    @property
    def layers(self) -> list[TracedLayer]:
        """Of the model."""

    @property
    def title(self) -> str:
        """Name of the model."""

    def changed(self, layer: int) -> float | None:
        """Share of the tokens whose first expert is another one in the second model."""


def trace_page(models: Sequence[Traced], figure: Picture) -> str:
    """The page as text, below 3 MB: of a long text it shows the first tokens, and says so.

    Args:
        models: one trace, or two of the same tokens.
        figure: all layers at a glance.
    """
    trace = models[0]
    bytes_a_token = sum(layer.top_k * 4 + 4 for each in models for layer in each.layers)
    shown = max(1, min(len(trace.pieces), MOST_BYTES // max(1, bytes_a_token)))
    data = {
        "pieces": trace.pieces[:shown],
        "special": [at for at in range(shown) if trace.special[at]],
        "starts": [at for at in range(1, shown) if trace.text_of[at] != trace.text_of[at - 1]],
        "models": [{"name": each.title, "layers": [_layer(layer, shown) for layer in each.layers]} for each in models],
        "keys": [leaders(*(each.layers[at].first_T[:shown] for each in models)) for at in range(len(trace.layers))],
        "sentences": [_sentence(models, at) for at in range(len(trace.layers))],
    }
    title = f"Trace of {' and '.join(each.title for each in models)}"
    return picture_page([figure], title, body=_body(models, shown), data=data, extra="trace.js")


def _layer(layer: TracedLayer, shown: int) -> dict[str, Any]:
    weight_TK = np.nan_to_num(layer.weight_TK[:shown], nan=0.0)
    known = bool(np.isfinite(layer.weight_TK[:shown]).any())
    top = float(np.abs(weight_TK).max(initial=0.0)) or 1.0
    margin_T = np.nan_to_num(layer.margin_T[:shown], nan=0.0)
    return {
        "label": str(layer.layer_id),
        "name": layer.name,
        "experts": layer.num_experts,
        "k": layer.top_k,
        "index": _packed(np.where(layer.index_TK[:shown] == NOWHERE, _NONE, layer.index_TK[:shown]), np.uint16),
        "weight": _packed(np.rint(np.abs(weight_TK) / top * 65535), np.uint16) if known else None,
        "top": top,
        "margin": _packed(np.rint(np.clip(margin_T, -1.0, 1.0) * 32767), np.int16),
        "next": _packed(np.where(layer.next_T[:shown] == NOWHERE, _NONE, layer.next_T[:shown]), np.uint16),
        "dropped": np.flatnonzero(
            ~layer.kept_TK[:shown].ravel() & (layer.index_TK[:shown].ravel() != NOWHERE)
        ).tolist(),
        "phi": [None if value is None or not math.isfinite(value) else round(value, 3) for value in layer.phi],
    }


def _packed(value: Array, dtype: Any) -> str:
    return base64.b64encode(np.ascontiguousarray(value.astype(np.dtype(dtype).newbyteorder("<"))).tobytes()).decode()


def _sentence(models: Sequence[Traced], at: int) -> str:
    trace = models[0]
    layer = trace.layers[at]
    first_T = layer.first_T[layer.first_T != NOWHERE]
    if not first_T.size:
        return f"Layer {layer.layer_id} routed no token of this text."
    experts, counts = np.unique(first_T, return_counts=True)
    busiest = int(experts[counts.argmax()])
    text = (
        f"Layer {layer.layer_id}: expert {busiest} comes first for {100 * counts.max() / first_T.size:.0f} % of the "
        f"tokens; {len(experts)} of {layer.num_experts} experts come first for at least one."
    )
    changed = trace.changed(at)
    if changed is None:
        return text
    return f"{text} In {models[1].title}, {100 * changed:.0f} % of the tokens have another first expert (underlined)."


def _body(models: Sequence[Traced], shown: int) -> str:
    trace = models[0]
    cut = "" if shown == len(trace.pieces) else f" The page shows the first {shown:,} of {len(trace.pieces):,}."
    panes = "".join(
        f'<div><h3>{html.escape(each.title)}</h3><div class="text" data-model="{at}"></div></div>'
        for at, each in enumerate(models)
    )
    two = " two" if len(models) > 1 else ""
    note = (
        "A colour is an expert of this layer: the one with the largest weight. Numbers of two layers have nothing to "
        "do with each other. Point at a token, or tap it, for all its experts, their weights, the margin and phi. "
        "This page holds the text; no other record or page of chronomoe does."
    )
    return (
        f'<header><p class="brand">chronomoe trace</p><h1>{html.escape(" and ".join(e.title for e in models))}</h1>'
        f'<p class="sub">{len(trace.pieces):,} tokens, {len(trace.layers)} MoE layers.{cut}</p></header>'
        '<section id="tokens"><div class="bar"><div class="controls"><label for="layer">layer</label>'
        f'<input type="range" id="layer" min="0" max="{max(0, len(trace.layers) - 1)}" value="0">'
        '<output for="layer" id="shown"></output><label><input type="checkbox" id="numbers"> numbers</label></div>'
        '<div class="keys" id="keys"></div></div><p class="sentence" id="said"></p>'
        f'<div class="panes{two}">{panes}</div><div class="detail" id="detail" aria-live="polite">'
        f'Point at a token.</div><p class="note">{note}</p>'
        "<noscript><p>The text needs JavaScript.</p></noscript></section>"
    )
