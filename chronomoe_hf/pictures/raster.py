"""A drawing as pixels, painted with Pillow (optional: ``pip install "chronomoe_hf[notebook]"``)."""

from __future__ import annotations

import io
import itertools
from typing import Any

from chronomoe_hf.errors import ConfigError
from chronomoe_hf.pictures.drawing import Drawing, Look, Shape, Text

_INK, _GROUND = (28, 36, 48), (255, 255, 255)
_CURVE = 24  # straight pieces of a band's edge


def png(drawing: Drawing, scale: float = 2.0) -> bytes:
    """The drawing as a PNG file, `scale` pixels a unit.

    Raises:
        ConfigError: Pillow is not installed.
    """
    buffer = io.BytesIO()
    paint(drawing, scale).save(buffer, "PNG")
    return buffer.getvalue()


def paint(drawing: Drawing, scale: float) -> Any:
    """A ``PIL.Image.Image`` of the drawing on white.

    Raises:
        ConfigError: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise ConfigError(
            'a PNG needs Pillow: pip install "chronomoe_hf[notebook]"; an .svg or .html file needs nothing'
        ) from error
    size = (max(1, round(drawing.width * scale)), max(1, round(drawing.height * scale)))
    image = Image.new("RGB", size, _GROUND)
    for look, group in itertools.groupby(drawing.shapes, key=lambda shape: shape.look):
        if look.opacity >= 1.0:
            pen = ImageDraw.Draw(image)
            for shape in group:
                _shape(pen, shape, scale, _colour(look))
            continue
        mask = Image.new("L", size, 0)
        pen = ImageDraw.Draw(mask)
        for shape in group:
            _shape(pen, shape, scale, round(255 * look.opacity))
        image.paste(_colour(look), mask=mask)
    for text in drawing.texts:
        _text(image, text, scale)
    return image


def _colour(look: Look) -> tuple[int, int, int]:
    if not look.colour.startswith("#"):
        return _INK
    red, green, blue = (int(look.colour[at : at + 2], 16) for at in (1, 3, 5))
    return red, green, blue


def _shape(pen: Any, shape: Shape, scale: float, fill: Any) -> None:
    at, width = [value * scale for value in shape.at], max(1, round(shape.look.width * scale))
    if shape.kind == "rect":
        right, bottom = max(at[0], at[0] + at[2] - 1), max(at[1], at[1] + at[3] - 1)
        pen.rectangle([at[0], at[1], right, bottom], fill=fill)
    elif shape.kind == "dot":
        half = shape.look.width * scale / 2
        pen.ellipse([at[0] - half, at[1] - half, at[0] + half, at[1] + half], fill=fill)
    elif shape.kind == "line":
        _line(pen, at, width, fill, [part * scale for part in shape.look.dash])
    else:
        pen.polygon(_outline(at), fill=fill)


def _line(pen: Any, at: list[float], width: int, fill: Any, dash: list[float]) -> None:
    x1, y1, x2, y2 = at
    length = ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5
    if not dash or length == 0.0:
        pen.line([x1, y1, x2, y2], fill=fill, width=width)
        return
    start, drawn = 0.0, True
    for part in itertools.cycle(dash):
        end = min(length, start + part)
        if drawn:
            ends = [start / length, end / length]
            points = [(x1 + (x2 - x1) * t, y1 + (y2 - y1) * t) for t in ends]
            pen.line(points, fill=fill, width=width)
        start, drawn = end, not drawn
        if start >= length:
            return


def _outline(at: list[float]) -> list[tuple[float, float]]:
    x1, y1, x2, y2, thick = at
    upper = []
    for step in range(_CURVE + 1):
        t = step / _CURVE
        a, b, c, d = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3
        middle = (x1 + x2) / 2
        upper.append((a * x1 + (b + c) * middle + d * x2, (a + b) * y1 + (c + d) * y2))
    return upper + [(x, y + thick) for x, y in reversed(upper)]


def _text(image: Any, text: Text, scale: float) -> None:
    from PIL import Image, ImageDraw, ImageFont

    font: Any = ImageFont.load_default(text.size * scale)
    left, top, right, bottom = font.getbbox(text.text)
    box = (max(1, int(right - left) + 2), max(1, int(bottom - top) + 2))
    stamp = Image.new("L", box, 0)
    ImageDraw.Draw(stamp).text((1 - left, 1 - top), text.text, fill=round(255 * text.look.opacity), font=font)
    shift = {"start": 0.0, "middle": box[0] / 2, "end": float(box[0])}[text.anchor]
    x, y = text.x * scale - shift, text.y * scale - box[1] / 2
    if text.turn:
        stamp = stamp.rotate(-text.turn, expand=True)
        x, y = text.x * scale - stamp.width / 2, text.y * scale - stamp.height / 2
    image.paste(_colour(text.look), (round(x), round(y)), stamp)
