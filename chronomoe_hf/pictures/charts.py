"""What is drawn of routing: shares before and after, layers by experts, flows between layers, bars with errors.

Colours can be told apart with the common kinds of colour blindness (Okabe and Ito 2008), and no meaning hangs on colour
alone: direction is also in the tip and the table, an expert without a token is a cross.

Shape suffixes: L layers, E experts of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from chronomoe_hf.pictures.drawing import Drawing, Grid, Look, Places

BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
KINDS = (BLUE, "#e69f00", GREEN, PURPLE, "#56b4e9", ORANGE, "#b5a800", "#8c6bb1")
"""Eight colours for eight kinds of things."""
_LEVELS = 8  # steps of opacity on each side of a scale
_ONE_LINE = 900.0  # pixels from which the scale and its key are in one line
_AXIS = Look(opacity=0.15)
_MARK = Look(opacity=0.7, dash=(4.0, 3.0))


@dataclass(frozen=True)
class Row:
    """One layer in two states.

    Args:
        label: of the layer.
        before, after: load of every expert over the fair share, length E; None where it is not known or was cut.
        error: standard error of `after` minus `before`, length E, in the same unit; empty where it is not known.
    """

    label: str
    before: Sequence[float | None]
    after: Sequence[float | None]
    error: Sequence[float | None] = field(default_factory=tuple)

    def moved(self, expert: int) -> bool:
        """Whether the change of an expert is larger than three errors."""
        before, after = self.before[expert], self.after[expert]
        error = self.error[expert] if self.error else None
        if before is None or after is None or error is None:
            return False
        return abs(after - before) > 3.0 * error


def before_after(rows: Sequence[Row], width: float, names: tuple[str, str] = ("before", "after")) -> Drawing:
    """Every expert of every layer, before and after, a panel a layer, the busiest first.

    Args:
        rows: the layers.
        width: pixels.
        names: of the two states.
    """
    per_row = max(1, min(len(rows), int(width // 240)))
    top = max((v for row in rows for v in (*row.before, *row.after) if v is not None), default=1.0)
    top = max(1.25, 1.06 * top)
    gap, left, head, tall = 14.0, 38.0, 40.0, 150.0
    wide = (width - left - gap * (per_row - 1)) / per_row
    out = Drawing(width)
    places = Places(["layer", "expert", f"{names[0]} (x fair)", f"{names[1]} (x fair)", "change", ""])
    _key(out, names)
    for at, row in enumerate(rows):
        x, y = left + (at % per_row) * (wide + gap), head + (at // per_row) * (tall + 44.0)
        out.text(x, y - 10, f"layer {row.label}", opacity=0.9)
        _panel(out, places, row, (x, y, wide, tall - 16.0), top, first=at % per_row == 0)
    lines = math.ceil(len(rows) / per_row)
    out.height = head + lines * (tall + 44.0) - 14.0
    out.text(9, head + (lines * (tall + 44.0) - 60.0) / 2, "times the fair share", anchor="middle", turn=-90)
    out.text(left + (width - left) / 2, out.height - 8, f"experts, the busiest {names[0]} first", anchor="middle")
    out.places.append(places)
    return out


def _key(out: Drawing, names: tuple[str, str]) -> None:
    x = 38.0
    for name, colour in zip(names, (BLUE, ORANGE), strict=True):
        out.dot(x + 4, 9, Look(colour, 1.0, 8.0))
        out.text(x + 13, 9, name[:24], opacity=0.9)
        x += 34.0 + 7.0 * len(name[:24])
    out.line(x, 9, x + 20, 9, _MARK)
    out.text(x + 25, 9, "fair share")


def _panel(
    out: Drawing, places: Places, row: Row, box: tuple[float, float, float, float], top: float, first: bool
) -> None:
    x, y, wide, tall = box
    bottom = y + tall

    def height(value: float) -> float:
        return bottom - tall * value / top

    for tick in _ticks(0.0, top, 4):
        out.line(x, height(tick), x + wide, height(tick), _AXIS)
        if first:
            out.text(x - 5, height(tick), f"{tick:g}", anchor="end", size=11)
    out.line(x, height(1.0), x + wide, height(1.0), _MARK)
    known = [e for e in range(len(row.before)) if row.before[e] is not None or row.after[e] is not None]
    order = sorted(known, key=lambda e: -(row.before[e] if row.before[e] is not None else -1.0))  # type: ignore[operator]
    step = wide / max(1, len(order))
    dot = max(1.8, min(7.0, 0.8 * step))
    stems, dots, tips = [], [], []
    for place, expert in enumerate(order):
        before, after = row.before[expert], row.after[expert]
        middle = x + (place + 0.5) * step
        if before is not None and after is not None:
            stems.append((middle, before, after, row.moved(expert)))
        dots += [(middle, value, colour) for value, colour in ((before, BLUE), (after, ORANGE)) if value is not None]
        change = None if before is None or after is None else after - before
        word = "beyond 3 errors" if row.moved(expert) else "within its error" if row.error else None
        tips.append((row.label, expert, before, after, change, word))
        if step >= 14:
            out.text(middle, bottom + 9, str(expert), anchor="middle", size=10)
    places.add(Grid(x, y, step, tall, 1, len(tips)), tips)
    for strong in (False, True):
        look = Look(opacity=0.85 if strong else 0.3, width=2.0 if strong else 1.0)
        for middle, before, after, moved in stems:
            if moved is strong:
                out.line(middle, height(before), middle, height(after), look)
    for colour in (BLUE, ORANGE):
        for middle, value, own in dots:
            if own == colour:
                out.dot(middle, height(value), Look(colour, 0.95, dot))


@dataclass(frozen=True)
class Cells:
    """A number for every expert of every layer.

    Args:
        name: above the cells.
        rows: label of every layer.
        values: ``[L][E]``, on a scale with 0 in the middle; None is no data.
        shown: name -> ``[L][E]`` what the tip says of a cell; numbers, text or None.
        empty: ``[L][E]`` whether the expert has no token: a cross.
        unsure: ``[L][E]`` whether the number is within its error: drawn pale.
    """

    name: str
    rows: Sequence[str]
    values: Sequence[Sequence[float | None]]
    shown: Mapping[str, Sequence[Sequence[Any]]]
    empty: Sequence[Sequence[bool]] = field(default_factory=tuple)
    unsure: Sequence[Sequence[bool]] = field(default_factory=tuple)


def cells(
    blocks: Sequence[Cells], width: float, low: str, high: str, key: str = "x: no token", reach: float | None = None
) -> Drawing:
    """Blocks of layers by experts, blue below the middle and orange above, on a scale that fits the data.

    Args:
        blocks: at least one, each with the same layers.
        width: pixels.
        low: what the lower end means, with ``{}`` where the number of the scale's end goes.
        high: the same of the upper end.
        key: what grey and a cross mean.
        reach: end of the scale, in doublings; None fits it to the data.
    """
    size = max((len(row) for block in blocks for row in block.values), default=1)
    most = reach or _reach([abs(v) for block in blocks for row in block.values for v in row if v is not None])
    least = 300.0 if len(blocks) > 1 else width
    per_row = max(1, min(len(blocks), int(width // max(least, min(width, size * 7.0)))))
    out = Drawing(width)
    gap, left, head = 18.0, 44.0, 21.0 + _scale(out, most, low, high, key)
    head -= 0.0 if any(block.name for block in blocks) else 18.0
    wide = (width - left - gap * (per_row - 1)) / per_row
    line = max(6.0, min(22.0, 420.0 / max(1, len(blocks[0].rows))))
    tall = line * len(blocks[0].rows)
    places = Places(["", "layer", "expert", *blocks[0].shown])
    for at, block in enumerate(blocks):
        x, y = left + (at % per_row) * (wide + gap), head + 16.0 + (at // per_row) * (tall + 58.0)
        out.text(x, y - 10, block.name[:40], opacity=0.95, size=13)
        _cells(out, places, block, (x, y, wide / size, line), most, first=at % per_row == 0)
        _expert_axis(out, x, y + tall, wide / size, size)
    lines = math.ceil(len(blocks) / per_row)
    out.height = head + 16.0 + lines * (tall + 58.0) - 16.0
    out.text(9, head + 16.0 + tall / 2, "layer", anchor="middle", turn=-90)
    out.places.append(places)
    return out


def _reach(sizes: Sequence[float]) -> float:
    """End of a scale that fits the data: nineteen in twenty cells are within it, in quarters of a doubling."""
    known = sorted(size for size in sizes if math.isfinite(size))
    if not known:
        return 1.0
    return min(6.0, max(0.5, math.ceil(4.0 * known[int(0.95 * (len(known) - 1))]) / 4.0))


def _cells(
    out: Drawing, places: Places, block: Cells, box: tuple[float, float, float, float], most: float, first: bool
) -> None:
    x, y, cell, line = box
    painted: dict[Look, list[tuple[float, float]]] = {}  # cells are short thick lines: half as long as rectangles
    crosses = []
    for row, values in enumerate(block.values):
        top = y + row * line
        if first and (line >= 11.0 or row % 2 == 0):
            out.text(x - 6, top + line / 2, block.rows[row], anchor="end", size=min(12.0, line + 3.0))
        tips = (_tip(block, row, expert) for expert in range(len(values)))
        places.add(Grid(x, top, cell, line, 1, len(values)), tips)
        for expert, value in enumerate(values):
            left = x + expert * cell
            if block.empty and block.empty[row][expert]:
                crosses.append((left + cell / 2, top + line / 2))
            elif value is not None:
                pale = bool(block.unsure) and block.unsure[row][expert]
                painted.setdefault(_tone(value, most, pale), []).append((left, top))
    gap, thick = 0.6 if cell > 4.0 else 0.0, line - (0.6 if line > 8.0 else 0.0)
    for look, spots in sorted(painted.items(), key=lambda item: (item[0].colour, item[0].opacity)):
        for left, top in spots:
            out.line(left, top + line / 2, left + cell - gap, top + line / 2, look._replace(width=thick))
    for left, top in crosses:
        out.cross(left, top, max(1.2, min(cell, line, 11.0) / 2 - 1.5), Look(opacity=0.9, width=1.2))


def _tip(block: Cells, row: int, expert: int) -> list[Any]:
    name = block.name or None
    return [name, block.rows[row], expert, *(table[row][expert] for table in block.shown.values())]


def _tone(value: float, most: float, pale: bool) -> Look:
    part = min(1.0, abs(value) / most)
    level = round(part * _LEVELS) / _LEVELS
    opacity = 0.08 if pale or level == 0.0 else 0.1 + 0.9 * level
    return Look("#888f99" if pale or level == 0.0 else ORANGE if value > 0 else BLUE, round(opacity, 3))


def _scale(out: Drawing, most: float, low: str, high: str, key: str) -> float:
    """The colours and what they mean, in as many lines as the width needs; returns the height."""
    ends = [words.format(f"{2**most:.3g}") for words in (low, high)]
    wide = 7.0 if out.width >= 500.0 else 4.0
    bar = wide * (2 * _LEVELS + 1)
    at, line = 8.0 + 6.4 * len(ends[0]), 9.0
    out.text(4, line, ends[0], size=11.5)
    if at + bar + 6.0 + 6.4 * len(ends[1]) > out.width:
        at, line = 4.0, line + 17.0
    for step in range(-_LEVELS, _LEVELS + 1):
        out.rect(at + (step + _LEVELS) * wide, line - 5, wide, 10, _tone(step / _LEVELS * most, most, False))
    out.text(at + bar + 6, line, ends[1], size=11.5)
    if out.width >= _ONE_LINE:
        out.text(out.width - 4, line, key, anchor="end", size=11.5)
    else:
        line += 17.0
        out.text(4, line, key, size=11.5)
    return line + 8.0


def _expert_axis(out: Drawing, x: float, y: float, cell: float, size: int) -> None:
    skip = max(1, math.ceil((7.0 * len(str(size)) + 6.0) / cell))
    for expert in range(0, size, skip):
        out.text(x + (expert + 0.5) * cell, y + 10, str(expert), anchor="middle", size=11)
    out.text(x + size * cell / 2, y + 26, "expert", anchor="middle")


@dataclass(frozen=True)
class Node:
    """A node of a flow: an expert, or the rest of a layer.

    Args:
        name: beside it.
        size: share of the layer's tokens, 0 to 1.
    """

    name: str
    size: float


def flow(
    columns: Sequence[Sequence[Node]],
    links: Sequence[Sequence[tuple[int, int, float, float]]],
    labels: Sequence[str],
    width: float,
) -> Drawing:
    """What leaves every expert of a layer, and where it goes in the next.

    Args:
        columns: the nodes of every layer, in order.
        links: between neighbours: ``(from, to, share, lift)``; shares of all that leaves the layer.
        labels: of the layers.
        width: pixels.
    """
    out = Drawing(width, 420.0)
    top, tall, bar = 34.0, 360.0, 12.0
    left = 44.0
    step = (width - left - 58.0) / max(1, len(columns) - 1)  # right of the last layer stand its names
    places = Places(["layer", "expert", "hands to layer", "expert", "share", "times chance"])
    spots = [_stack(column, top, tall) for column in columns]
    for at, pairs in enumerate(links):
        x1, x2 = left + at * step + bar, left + (at + 1) * step
        leaves, enters = ([y for y, _ in spots[at]], [y for y, _ in spots[at + 1]])
        for one, other, share, lift in sorted(pairs):
            thick = share * spots[at][0][1]
            y1, y2 = leaves[one], enters[other]
            leaves[one], enters[other] = y1 + thick, y2 + thick
            colour = KINDS[one % len(KINDS)]
            rest = "other" in (columns[at][one].name, columns[at + 1][other].name)
            out.band(x1, y1, x2, y2, max(0.4, thick), Look("#888f99" if rest else colour, 0.25 if rest else 0.5))
            middle = (min(y1, y2), max(y1, y2) + thick)
            named = (labels[at], columns[at][one].name, labels[at + 1], columns[at + 1][other].name)
            box = ((x1 + x2) / 2 - step / 6, middle[0], step / 3, max(4.0, thick))
            places.add(Grid(box[0], (y1 + y2) / 2, box[2], box[3], 1, 1), [(*named, share, lift)])
    for at, column in enumerate(columns):
        x, last = left + at * step, at == len(columns) - 1
        out.text(x + bar / 2, 12, f"layer {labels[at]}", anchor="middle", size=12, opacity=0.9)
        for (y, unit), node in zip(spots[at], column, strict=True):
            out.rect(x, y, bar, max(0.6, unit * node.size), Look(opacity=0.8))
            if unit * node.size >= 9.0:
                beside = (x + bar + 4, "start") if last else (x - 4, "end")
                out.text(beside[0], y + unit * node.size / 2, node.name, anchor=beside[1], size=11)
    out.places.append(places)
    return out


def _stack(column: Sequence[Node], top: float, tall: float) -> list[tuple[float, float]]:
    gap = 3.0
    unit = (tall - gap * (len(column) - 1)) / max(1e-9, sum(node.size for node in column))
    out, y = [], top
    for node in column:
        out.append((y, unit))
        y += node.size * unit + gap
    return out


@dataclass(frozen=True)
class Bar:
    """A number with its error.

    Args:
        name: at the left.
        value: as long as this.
        error: standard error; None is not known.
        shown: at the right.
        threshold: where a mark stands, if anywhere.
    """

    name: str
    value: float
    error: float | None = None
    shown: str = ""
    threshold: float | None = None


def bars(rows: Sequence[Bar], width: float, unit: str) -> Drawing:
    """Horizontal bars with errors, on a scale from 0 that fits them.

    Args:
        rows: from top to bottom.
        width: pixels.
        unit: below the axis.
    """
    left = min(width * 0.4, 14.0 + 7.0 * max(len(row.name) for row in rows))
    right = 84.0
    reach = [abs(row.value) + (row.error or 0.0) for row in rows] + [abs(row.threshold or 0.0) for row in rows]
    low = min(0.0, *(row.value - (row.error or 0.0) for row in rows))
    high = max(*reach, 1e-9) if low >= 0 else max(0.0, *(row.value + (row.error or 0.0) for row in rows))
    out = Drawing(width, 26.0 * len(rows) + 40.0)
    places = Places(["", "", "error"])

    def at(value: float) -> float:
        return left + (value - low) / ((high - low) or 1.0) * (width - left - right)

    for tick in _ticks(low, high, max(2, int(width / 160))):
        out.line(at(tick), 0, at(tick), 26.0 * len(rows), _AXIS)
        out.text(at(tick), 26.0 * len(rows) + 10, f"{tick:g}", anchor="middle", size=11)
    for index, row in enumerate(rows):
        y = 26.0 * index + 13.0
        out.text(left - 8, y, row.name, anchor="end", opacity=0.95)
        ends = sorted((at(0.0), at(row.value)))
        out.rect(ends[0], y - 7, max(0.8, ends[1] - ends[0]), 14, Look(KINDS[index % len(KINDS)], 0.85))
        if row.error:
            out.line(at(row.value - row.error), y, at(row.value + row.error), y, Look(opacity=0.9, width=1.6))
        if row.threshold is not None:
            out.line(at(row.threshold), y - 11, at(row.threshold), y + 11, _MARK)
        out.text(at(max(row.value + (row.error or 0.0), 0.0)) + 6, y, row.shown or f"{row.value:.4g}", opacity=0.95)
        places.add(Grid(0.0, y - 13, width, 26.0, 1, 1), [(row.name, row.shown or row.value, row.error)])
    out.text(left + (width - left - right) / 2, out.height - 12, unit, anchor="middle")
    out.places.append(places)
    return out


def _ticks(low: float, high: float, most: int) -> list[float]:
    raw = (high - low) / max(1, most)
    power = 10.0 ** math.floor(math.log10(raw)) if raw > 0 else 1.0
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round((first + at) * step, 12) for at in range(int((high - first * step) / step + 1e-9) + 1)]
