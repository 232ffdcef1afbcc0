"""Cards for a notebook, and rows as a pandas table."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from chronomoe_hf.errors import ConfigError
from chronomoe_hf.pictures.picture import Picture

if TYPE_CHECKING:
    import pandas

_EDGES = {"fine": "#0b6e4f", "healthy": "#0b6e4f", "watch": "#b07a00", "act": "#b3261e", "": "#0072b2"}


def frame(rows: Sequence[Mapping[str, Any]]) -> pandas.DataFrame:
    """Rows as a table.

    Raises:
        ConfigError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise ConfigError('to_pandas() needs pandas: pip install "chronomoe_hf[notebook]"') from error
    return pandas.DataFrame(list(rows))


def card(
    title: str,
    sentence: str,
    numbers: Sequence[tuple[str, str]],
    hint: str = "",
    picture: Picture | None = None,
    level: str = "",
) -> str:
    """A small box for a notebook; it takes its colours from the notebook, light or dark.

    Args:
        title: in bold.
        sentence: below it.
        numbers: name and value, side by side.
        hint: what to call next, small.
        picture: drawn below.
        level: colour of the edge: fine, watch, act, or none.
    """
    cells = "".join(
        f'<div style="min-width:84px"><div style="opacity:.65;font-size:11.5px">{html.escape(name)}</div>'
        f'<div style="font-size:18px;font-weight:600">{html.escape(value)}</div></div>'
        for name, value in numbers
    )
    drawn = "" if picture is None else picture.drawing(0, 760).svg(picture.label, tips=True)
    small = f'<div style="opacity:.65;font-size:12px;margin-top:6px">{html.escape(hint)}</div>' if hint else ""
    edge = _EDGES.get(level, _EDGES[""])
    return (
        f'<div style="border:1px solid rgba(128,128,128,.35);border-left:5px solid {edge};border-radius:8px;'
        'padding:10px 14px;max-width:800px;font-family:system-ui,sans-serif;line-height:1.45">'
        f'<div style="font-weight:600;font-size:15px">{html.escape(title)}</div><div>{html.escape(sentence)}</div>'
        f'<div style="display:flex;flex-wrap:wrap;gap:10px 26px;margin:8px 0">{cells}</div>{drawn}{small}</div>'
    )
