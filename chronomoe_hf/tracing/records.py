"""What a trace holds: every token with the experts that every layer chose for it.

Shape suffixes: T tokens of all texts, K experts per token, E experts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chronomoe_hf.errors import ChronoError, ConfigError, DataError
from chronomoe_hf.jsonfiles import write_text
from chronomoe_hf.pictures.charts import KINDS
from chronomoe_hf.pictures.drawing import Drawing, Grid, Look, Places
from chronomoe_hf.pictures.picture import Picture, View
from chronomoe_hf.pictures.tables import card, frame
from chronomoe_hf.tracing.layer import NOWHERE, TracedLayer, leaders
from chronomoe_hf.tracing.page import trace_page

if TYPE_CHECKING:
    import pandas

TRACE_SCHEMA = 1
MOST_DRAWN = 120  # tokens of the picture of all layers


@dataclass(frozen=True, kw_only=True, repr=False)
class Trace:
    """One or more texts through a model.

    Attributes:
        model_name, model_class: of the model.
        ids, pieces, special: of every token; see ``tracing.tokens.Tokens``.
        text_of: number of the text that a token belongs to.
        layers: of the model.
        other: the same tokens through a second model, or None.
    """

    model_name: str
    model_class: str
    ids: list[int]
    pieces: list[str]
    special: list[bool]
    text_of: list[int]
    layers: list[TracedLayer]
    other: Trace | None = field(default=None)

    def beside(self, other: Trace) -> Trace:
        """This trace with a second model's of the same tokens; where both have one name, they get "(1)" and "(2)".

        Raises:
            DataError: the tokens differ, or the models have another number of MoE layers.
        """
        if self.ids != other.ids:
            raise DataError("the two models were given other tokens, so they cannot be compared; use one tokenizer")
        if len(self.layers) != len(other.layers):
            raise DataError(
                f"{self.title} has {len(self.layers)} MoE layers and {other.title} has {len(other.layers)}; only "
                "models with the same layers can be compared"
            )
        if self.title != other.title:
            return dataclasses.replace(self, other=other)
        one, two = (f"{self.title} ({at})" for at in (1, 2))  # two names that are one could not be told apart
        return dataclasses.replace(self, model_name=one, other=dataclasses.replace(other, model_name=two))

    @property
    def title(self) -> str:
        """Name of the model, or its class."""
        return self.model_name or self.model_class

    def changed(self, layer: int) -> float | None:
        """Share of the routed tokens whose first expert is another one in `other`; None without one."""
        if self.other is None:
            return None
        own_T, its_T = self.layers[layer].first_T, self.other.layers[layer].first_T
        routed_T = (own_T != NOWHERE) & (its_T != NOWHERE)
        return float((own_T != its_T)[routed_T].mean()) if routed_T.any() else None

    # ---- to look at ------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        beside = f" beside {self.other.title}" if self.other is not None else ""
        return f"<Trace of {self.title}{beside}: {len(self.ids)} tokens, {len(self.layers)} layers>"

    def _repr_html_(self) -> str:
        sizes = f"{len(self.ids)} tokens, {len(self.layers)} MoE layers"
        numbers = [("tokens", str(len(self.ids))), ("layers", str(len(self.layers)))]
        if self.other is not None:
            known = [share for at in range(len(self.layers)) if (share := self.changed(at)) is not None]
            mean = f"{100 * sum(known) / len(known):.1f} %" if known else "-"
            numbers.append((f"tokens with another first expert in {self.other.title}", mean))
        hint = "save('trace.html') writes the page with the text, coloured by expert"
        return card(f"Trace of {self.title}", sizes, numbers, hint, self.figure())

    def figure(self) -> Picture:
        """All layers at a glance: the first expert of every token (of the first MOST_DRAWN)."""
        shown = min(len(self.ids), MOST_DRAWN)
        text = f"The first expert of {shown} tokens in every layer; the eight that lead most tokens have a colour."
        views = [View(trace.title, trace._draw) for trace in (self, self.other) if trace is not None]
        note = "Expert numbers of two layers have nothing to do with each other, so a colour means something in a row."
        return Picture("layers", "All layers at a glance", text, views, note)

    def _draw(self, width: float) -> Drawing:
        shown = min(len(self.ids), MOST_DRAWN)
        line, left = max(9.0, min(20.0, 420.0 / max(1, len(self.layers)))), 42.0
        cell = (width - left) / max(1, shown)
        out = Drawing(width, line * len(self.layers) + 34.0)
        places = Places(["layer", "token", "", "first expert"])
        for row, layer in enumerate(self.layers):
            first, lead = layer.first_T, leaders(layer.first_T)
            out.text(left - 6, row * line + line / 2, str(layer.layer_id), anchor="end", size=11)
            seen = [None if expert == NOWHERE else expert for expert in first[:shown].tolist()]
            tips = [(layer.layer_id, at, self.pieces[at], seen[at]) for at in range(shown)]
            places.add(Grid(left, row * line, cell, line, 1, shown), tips)
            for at in range(shown):
                expert = int(first[at])
                if expert == NOWHERE:
                    continue
                colour = KINDS[lead.index(expert)] if expert in lead else "#888f99"
                out.rect(left + at * cell, row * line, cell, line - 1, Look(colour, 0.85 if expert in lead else 0.35))
        out.text(9, line * len(self.layers) / 2, "layer", anchor="middle", turn=-90)
        for at in range(0, shown, max(1, int(60 / cell))):
            middle = left + (at + 0.5) * cell
            if middle + 3.5 * len(str(at)) <= width:  # a number that would be cut off at the edge is left out
                out.text(middle, line * len(self.layers) + 9, str(at), anchor="middle", size=11)
        out.text(left + (width - left) / 2, out.height - 8, "token", anchor="middle")
        out.shapes.sort(key=lambda shape: shape.look)
        out.places.append(places)
        return out

    def to_pandas(self) -> pandas.DataFrame:
        """A row for every token, layer and slot; needs pandas.

        Raises:
            ConfigError: pandas is not installed.
        """
        rows: list[Mapping[str, Any]] = []
        for trace in (self, self.other):
            for layer in [] if trace is None else trace.layers:
                assert trace is not None
                rows += trace._rows(layer)
        return frame(rows)

    def _rows(self, layer: TracedLayer) -> list[Mapping[str, Any]]:
        return [
            {
                "model": self.title,
                "text": self.text_of[at],
                "token": at,
                "id": self.ids[at],
                "piece": self.pieces[at],
                "layer": layer.layer_id,
                "slot": slot,
                "expert": int(layer.index_TK[at, slot]),
                "weight": float(layer.weight_TK[at, slot]),
                "score": float(layer.score_TK[at, slot]),
                "kept": bool(layer.kept_TK[at, slot]),
                "margin": float(layer.margin_T[at]),
                "next": int(layer.next_T[at]),
                "phi": layer.phi[int(layer.index_TK[at, slot])],
            }
            for at in range(len(self.ids))
            for slot in range(layer.top_k)
            if layer.index_TK[at, slot] != NOWHERE
        ]

    # ---- files -----------------------------------------------------------------------------------------------------

    def to_record(self) -> dict[str, Any]:
        """Strict-JSON dictionary; it holds the text."""
        return {
            "schema": TRACE_SCHEMA,
            "model_name": self.model_name,
            "model_class": self.model_class,
            "tokens": [
                {"id": one, "piece": piece, "special": alone, "text": text}
                for one, piece, alone, text in zip(self.ids, self.pieces, self.special, self.text_of, strict=True)
            ],
            "layers": [layer.to_record() for layer in self.layers],
            "other": None if self.other is None else self.other.to_record(),
        }

    def save(self, path: str | Path) -> Path:
        """Write the page (``.html``, below 3 MB) or every number (``.json``). Both hold the text.

        Raises:
            ConfigError: another suffix.
            ChronoError: the file cannot be written.
        """
        target = Path(path)
        if target.suffix.lower() == ".html":
            text = trace_page([self] if self.other is None else [self, self.other], self.figure())
        elif target.suffix.lower() == ".json":
            text = json.dumps(self.to_record(), allow_nan=False)
        else:
            raise ConfigError(f"a trace is saved as .html or .json, got {str(path)!r}")
        try:
            return write_text(target, text)
        except OSError as error:
            raise ChronoError(f"the trace cannot be written to {target}: {error}; name another file") from error
