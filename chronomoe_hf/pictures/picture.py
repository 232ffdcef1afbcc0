"""A picture: a heading, a sentence and one or more views, for a page, a notebook and a file."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chronomoe_hf.errors import ChronoError, ConfigError
from chronomoe_hf.jsonfiles import write_bytes
from chronomoe_hf.pictures.drawing import Drawing
from chronomoe_hf.pictures.page import picture_page
from chronomoe_hf.pictures.raster import png

WIDE, NARROW = 1000, 344
"""Width in pixels on a desk and on a telephone."""
MOST_PLACES = 6000
"""A picture of more places is in a page once; a narrow screen moves across it."""


@dataclass(frozen=True)
class View:
    """One way to look at a picture's data.

    Args:
        label: on the button that shows it.
        draw: makes the drawing for a width in pixels.
    """

    label: str
    draw: Callable[[float], Drawing]


@dataclass(frozen=True)
class Picture:
    """Something to look at.

    A notebook shows it as it is; :meth:`save` writes ``.svg``, ``.png`` (needs Pillow) or ``.html``.

    Args:
        key: id in a page.
        title: heading.
        sentence: what is seen.
        views: at least one.
        note: how to read it.
    """

    key: str
    title: str
    sentence: str
    views: Sequence[View]
    note: str = ""
    _drawn: dict[tuple[int, float], Drawing] = field(default_factory=dict, repr=False, compare=False)

    def drawing(self, view: int = 0, width: float = WIDE) -> Drawing:
        """One view, drawn for a width in pixels.

        Raises:
            ConfigError: there is no such view.
        """
        if not 0 <= view < len(self.views):
            labels = ", ".join(f"{at} ({one.label})" for at, one in enumerate(self.views))
            raise ConfigError(f"this picture has no view {view}; it has {labels}")
        if (view, width) not in self._drawn:
            self._drawn[view, width] = self.views[view].draw(width)
        return self._drawn[view, width]

    def svg(self, view: int = 0, width: float = WIDE) -> str:
        """One view as an SVG file's text."""
        return self.drawing(view, width).svg(self.label, alone=True, tips=True)

    def save(self, path: str | Path, *, view: int = 0, width: float = WIDE) -> Path:
        """Write one view (``.svg``, ``.png``) or all of them with zoom and tips (``.html``).

        Args:
            path: the file; its suffix says the format.
            view: which view; ``.html`` holds all.
            width: pixels.

        Raises:
            ConfigError: another suffix, no such view, or a PNG without Pillow.
            ChronoError: the file cannot be written.
        """
        target = Path(path)
        suffix = target.suffix.lower()
        if suffix == ".svg":
            data = self.svg(view, width).encode()
        elif suffix == ".png":
            data = png(self.drawing(view, width))
        elif suffix == ".html":
            data = picture_page([self], self.title).encode()
        else:
            raise ConfigError(f"a picture is saved as .svg, .png or .html, got {str(path)!r}")
        try:
            write_bytes(target, data)
        except OSError as error:
            raise ChronoError(f"the picture cannot be written to {target}: {error}") from error
        return target

    @property
    def label(self) -> str:
        """Heading and sentence, for a screen reader."""
        return f"{self.title}. {self.sentence}"

    def __repr__(self) -> str:
        views = ", ".join(view.label for view in self.views)
        return f"<Picture {self.title!r}: {views}; show it in a notebook or .save('x.svg')>"

    def _repr_html_(self) -> str:
        drawn = self.drawing().svg(self.label, tips=True)
        heading = f"<b>{html.escape(self.title)}</b><br><span>{html.escape(self.sentence)}</span>"
        note = f'<br><small style="opacity:.7">{html.escape(self.note)}</small>' if self.note else ""
        return f'<div style="max-width:{WIDE}px">{heading}{drawn}{note}</div>'

    @property
    def _widths(self) -> tuple[float, ...]:
        most = max(sum(map(len, self.drawing(at).places)) for at in range(len(self.views)))
        return (WIDE, NARROW) if most <= MOST_PLACES else (WIDE,)

    def to_spec(self) -> dict[str, Any]:
        """Places of every view and width, for the page's script; columns that are alike are there once."""
        tables: dict[str, int] = {}
        columns: list[Any] = []
        views = []
        for at in range(len(self.views)):
            widths = []
            for width in self._widths:
                records = [places.to_record() for places in self.drawing(at, width).places]
                for record in records:
                    name = json.dumps(record["columns"])
                    if name not in tables:
                        tables[name] = len(columns)
                        columns.append(record["columns"])
                    record["columns"] = tables[name]
                widths.append(records)
            views.append(widths)
        return {"kind": "picture", "views": views, "columns": columns}

    def markup(self) -> str:
        """All views at both widths, as HTML for a page that carries ``pictures.css`` and ``pictures.js``."""
        parts = []
        for at, view in enumerate(self.views):
            hidden = " hidden" if at else ""
            names = ("wide", "narrow") if len(self._widths) > 1 else ("only",)
            for width, name in zip(self._widths, names, strict=True):
                drawn = self.drawing(at, width).svg(f"{self.label} {view.label}")
                parts.append(f'<div class="view {name}" data-view="{at}"{hidden}>{drawn}</div>')
        labels = "".join(
            f'<button type="button" class="choice" data-view="{at}" aria-pressed="{"false" if at else "true"}">'
            f"{html.escape(view.label)}</button>"
            for at, view in enumerate(self.views)
        )
        choices = f'<div class="choices">{labels}</div>' if len(self.views) > 1 else ""
        key = html.escape(self.key)
        return f'<div class="picture" data-picture="{key}">{choices}{"".join(parts)}</div>'
