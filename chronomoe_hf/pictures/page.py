"""A page of its own for pictures: self-contained, offline, under a strict content policy; and the glossary."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any, Protocol


class Shown(Protocol):
    """What a page needs of a ``Picture``."""

    @property
    def key(self) -> str:
        """Id in the page."""

    @property
    def title(self) -> str:
        """Heading."""

    @property
    def sentence(self) -> str:
        """What is seen."""

    @property
    def note(self) -> str:
        """How to read it."""

    def markup(self) -> str:
        """All views, as HTML."""

    def to_spec(self) -> dict[str, Any]:
        """What the script needs."""


def picture_page(pictures: Sequence[Shown], title: str, *, body: str = "", data: Any = None, extra: str = "") -> str:
    """A page with pictures below each other.

    Args:
        pictures: from top to bottom.
        title: of the page.
        body: HTML above them; the caller has escaped what is not his.
        data: strict JSON for the script, as ``chronomoe-page``.
        extra: name of a further script of this room.
    """
    style = part("pictures.css")
    script = part("pictures.js") + (part(extra) if extra else "")
    sections = "".join(_section(picture) for picture in pictures)
    specs = {picture.key: picture.to_spec() for picture in pictures}
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy(style, script)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{html.escape(title)}</title><style>{style}</style></head><body>"
        f"<main>{body}{sections}{glossary_section()}</main>"
        f'<script type="application/json" id="chronomoe-pictures">{block(specs)}</script>'
        f'<script type="application/json" id="chronomoe-page">{block(data)}</script>'
        f"<script>{script}</script></body></html>"
    )


def _section(picture: Shown) -> str:
    note = f'<p class="note">{html.escape(picture.note)}</p>' if picture.note else ""
    heading = f'<h2>{html.escape(picture.title)}</h2><p class="sentence">{html.escape(picture.sentence)}</p>'
    return f'<section id="{html.escape(picture.key)}">{heading}{picture.markup()}{note}</section>'


def policy(style: str, script: str) -> str:
    """Nothing is loaded; nothing runs but the one style and script, by their hashes; a picture may be made a PNG."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    own = f"style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'"
    return f"default-src 'none'; {own}; img-src blob:; base-uri 'none'; form-action 'none'"


def block(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


@cache
def part(name: str) -> str:
    """A style or a script of this room."""
    return resources.files("chronomoe_hf.pictures").joinpath("templates", name).read_text(encoding="utf-8")


@cache
def glossary() -> dict[str, dict[str, Any]]:
    """Term -> ``{"also": other spellings, "text": what it means, "reference": what is good and what is bad}``."""
    found: dict[str, dict[str, Any]] = json.loads(part("glossary.json"))
    return found


def glossary_section() -> str:
    """The glossary as HTML; the script makes every term in the page a button that shows its entry."""
    rows = "".join(_entry(term, entry) for term, entry in glossary().items())
    return f'<section id="glossary"><details><summary>Words on this page</summary><dl>{rows}</dl></details></section>'


def _entry(term: str, entry: dict[str, Any]) -> str:
    name, also = html.escape(term), html.escape("|".join(entry.get("also", [])))
    once = " data-once" if entry.get("once") else ""  # so common a word is a button at its first place only
    reference = f" <b>{html.escape(entry['reference'])}</b>" if entry.get("reference") else ""
    return (
        f'<div data-term="{name}" data-also="{also}"{once}><dt>{name}</dt>'
        f"<dd>{html.escape(entry['text'])}{reference}</dd></div>"
    )
