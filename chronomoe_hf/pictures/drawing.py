"""A drawing as a list of shapes, and the same list as SVG and as PNG.

Text and lines take the colour of the text around them (``currentColor``), so that a drawing can stand on a light page,
a dark page and in a notebook of either kind. Shapes of one look are one SVG path: thousands of cells stay small.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

INK = "ink"
"""The colour of the text around the drawing."""
FONT = "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif"
MOST_TIPS = 1500  # a drawing outside the page carries native tips for so many places at most


class Look(NamedTuple):
    """How a shape is painted.

    Args:
        colour: ``INK`` or ``#rrggbb``.
        opacity: 0 to 1.
        width: of a line, or diameter of a dot.
        dash: lengths of dashes and gaps; empty draws a whole line.
    """

    colour: str = INK
    opacity: float = 1.0
    width: float = 1.0
    dash: tuple[float, ...] = ()


class Shape(NamedTuple):
    """One shape: ``"rect"`` x y w h, ``"dot"`` x y, ``"line"`` x1 y1 x2 y2, ``"band"`` x1 y1 x2 y2 thickness."""

    kind: str
    look: Look
    at: tuple[float, ...]


class Text(NamedTuple):
    """A line of text; `anchor` is start, middle or end, `turn` in degrees."""

    x: float
    y: float
    text: str
    anchor: str
    size: float
    look: Look
    turn: float


class Grid(NamedTuple):
    """Places of one size side by side: `rows` lines of `columns` from ``(x, y)``."""

    x: float
    y: float
    width: float
    height: float
    rows: int
    columns: int


@dataclass
class Places:
    """Where the pointer finds something, and what.

    Attributes:
        names: of the values, one a column.
        grids: places of one size side by side, row by row; the values follow in that order.
        columns: the values, column by column; numbers, text, or None.
    """

    names: list[str]
    grids: list[Grid] = field(default_factory=list)
    columns: list[list[Any]] = field(default_factory=list)

    def add(self, grid: Grid, rows: Iterable[Sequence[Any]]) -> None:
        """More places, each with its values in the order of `names`."""
        if not self.columns:
            self.columns = [[] for _ in self.names]
        self.grids.append(grid)
        for values in rows:
            for column, value in zip(self.columns, values, strict=True):
                column.append(value)

    @property
    def boxes(self) -> Iterator[tuple[float, float, float, float]]:
        """``(x, y, width, height)`` of every place."""
        for grid in self.grids:
            for row in range(grid.rows):
                for column in range(grid.columns):
                    x, y = grid.x + column * grid.width, grid.y + row * grid.height
                    yield x, y, grid.width, grid.height

    def __len__(self) -> int:
        return sum(grid.rows * grid.columns for grid in self.grids)

    def words(self, at: int) -> str:
        """What the tip of one place says."""
        pairs = zip(self.names, (column[at] for column in self.columns), strict=True)
        return ", ".join(f"{name} {_plain(value)}".strip() for name, value in pairs if value is not None)

    def to_record(self) -> dict[str, Any]:
        """For the page: where the places are, and the columns that they name."""
        grids = [[round(value, 2) for value in grid] for grid in self.grids]
        return {"names": self.names, "grids": grids, "columns": [_column(column) for column in self.columns]}


def _column(values: Sequence[Any]) -> Any:
    """Numbers as they are, rounded; words as places in a list of the few different ones."""
    if not any(isinstance(value, str) for value in values):
        return [_rounded(value) for value in values]
    words = list(dict.fromkeys(values))
    at = {word: place for place, word in enumerate(words)}
    return {"words": words, "at": [at[value] for value in values]}


class Drawing:
    """Shapes on a ground of `width` x `height` pixels.

    Args:
        width: pixels.
        height: pixels; may grow while one draws.
    """

    def __init__(self, width: float, height: float = 0.0) -> None:
        self.width, self.height = float(width), float(height)
        self.shapes: list[Shape] = []
        self.texts: list[Text] = []
        self.places: list[Places] = []

    def rect(self, x: float, y: float, width: float, height: float, look: Look) -> None:
        """A filled rectangle."""
        self.shapes.append(Shape("rect", look, (x, y, width, height)))

    def dot(self, x: float, y: float, look: Look) -> None:
        """A filled disc of diameter ``look.width``."""
        self.shapes.append(Shape("dot", look, (x, y)))

    def line(self, x1: float, y1: float, x2: float, y2: float, look: Look) -> None:
        """A straight line."""
        self.shapes.append(Shape("line", look, (x1, y1, x2, y2)))

    def cross(self, x: float, y: float, arm: float, look: Look) -> None:
        """Two lines that cross at a point."""
        self.line(x - arm, y - arm, x + arm, y + arm, look)
        self.line(x - arm, y + arm, x + arm, y - arm, look)

    def band(self, x1: float, y1: float, x2: float, y2: float, thickness: float, look: Look) -> None:
        """A curved band from one upright to another; `y1` and `y2` are its upper ends."""
        self.shapes.append(Shape("band", look, (x1, y1, x2, y2, thickness)))

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        anchor: str = "start",
        size: float = 12.0,
        opacity: float = 0.75,
        colour: str = INK,
        turn: float = 0.0,
    ) -> None:
        """A line of text whose middle is at height `y`."""
        self.texts.append(Text(x, y, text, anchor, size, Look(colour, opacity), turn))

    # ---- SVG -------------------------------------------------------------------------------------------------------

    def svg(self, label: str = "", *, alone: bool = False, tips: bool = False) -> str:
        """The drawing as SVG.

        Args:
            label: what a screen reader says.
            alone: for a file of its own, with a ground that follows the reader's light or dark setting.
            tips: native tips over the places, at most MOST_TIPS.
        """
        size = f'viewBox="0 0 {_num(self.width)} {_num(self.height)}"'
        space = 'xmlns="http://www.w3.org/2000/svg" ' if alone else ""
        opening = f'<svg {space}{size} role="img" aria-label="{html.escape(label)}"'
        opening += f' font-family="{FONT}"'
        if alone:
            opening += f' width="{_num(self.width)}" height="{_num(self.height)}" class="alone">{_ALONE}'
        else:
            opening += ">"
        parts = [opening, *_paths(self.shapes), *map(_text_svg, self.texts)]
        if tips and sum(map(len, self.places)) <= MOST_TIPS:
            parts += itertools.chain.from_iterable(map(_tips, self.places))
        return "".join([*parts, "</svg>"])


_ALONE = (
    "<style>svg.alone{color:#1c2430;background:#fff}"
    "@media (prefers-color-scheme:dark){svg.alone{color:#e6eaf0;background:#14181f}}</style>"
)


def _paths(shapes: Sequence[Shape]) -> Iterator[str]:
    """Neighbours of one kind and look are one path."""
    for (kind, look), group in itertools.groupby(shapes, key=lambda shape: (shape.kind, shape.look)):
        data = "".join(_DATA[kind](shape.at) for shape in group)
        yield f'<path d="{data}" {_attributes(kind, look)}/>'


def _rect(at: tuple[float, ...]) -> str:
    x, y, width, height = map(_num, at)
    return f"M{x} {y}h{width}v{height}h-{width}z"


def _band(at: tuple[float, ...]) -> str:
    x1, y1, x2, y2, thick = at
    middle, t = _num((x1 + x2) / 2), thick
    up = f"M{_num(x1)} {_num(y1)}C{middle} {_num(y1)} {middle} {_num(y2)} {_num(x2)} {_num(y2)}"
    down = f"v{_num(t)}C{middle} {_num(y2 + t)} {middle} {_num(y1 + t)} {_num(x1)} {_num(y1 + t)}z"
    return up + down


_DATA = {
    "rect": _rect,
    "dot": lambda at: f"M{_num(at[0])} {_num(at[1])}h0",
    "line": lambda at: f"M{_num(at[0])} {_num(at[1])}" + _to(*at),
    "band": _band,
}


def _to(x1: float, y1: float, x2: float, y2: float) -> str:
    return f"V{_num(y2)}" if x1 == x2 else f"h{_num(x2 - x1)}" if y1 == y2 else f"L{_num(x2)} {_num(y2)}"


def _attributes(kind: str, look: Look) -> str:
    colour = "currentColor" if look.colour == INK else look.colour
    verb = "fill" if kind in ("rect", "band") else "stroke"
    text = f'{verb}="{colour}"'
    if look.opacity < 1.0:
        text += f' {verb}-opacity="{_num(look.opacity, 3)}"'
    if verb == "stroke":
        text += f' fill="none" stroke-width="{_num(look.width)}"'
        text += ' stroke-linecap="round"' if kind == "dot" else ""
        text += f' stroke-dasharray="{" ".join(map(_num, look.dash))}"' if look.dash else ""
    return text


def _text_svg(text: Text) -> str:
    colour = "currentColor" if text.look.colour == INK else text.look.colour
    anchor = "" if text.anchor == "start" else f' text-anchor="{text.anchor}"'
    turn = f' transform="rotate({_num(text.turn)} {_num(text.x)} {_num(text.y)})"' if text.turn else ""
    weight = f'fill="{colour}" fill-opacity="{_num(text.look.opacity, 3)}"'
    place = f'x="{_num(text.x)}" y="{_num(text.y)}" dy=".35em" font-size="{_num(text.size)}"'
    return f"<text {place}{anchor}{turn} {weight}>{html.escape(text.text)}</text>"


def _tips(places: Places) -> Iterator[str]:
    for at, (x, y, width, height) in enumerate(places.boxes):
        box = f'x="{_num(x)}" y="{_num(y)}" width="{_num(width)}" height="{_num(height)}"'
        yield f'<rect {box} fill="transparent"><title>{html.escape(places.words(at))}</title></rect>'


def _num(value: float, digits: int = 1) -> str:
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _plain(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _rounded(value: Any) -> Any:
    return float(f"{value:.3g}") if isinstance(value, float) else value
