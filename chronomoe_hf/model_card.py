"""Sections of a model card, each between markers of its own, so that writing one again replaces it and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

CARD = "README.md"
# Name of a section -> its heading. Sections that 0.2 wrote all had the markers without a name; the heading tells them
# apart.
HEADINGS = {"routing": "## Expert routing", "export": "## Experts removed"}
_UNNAMED = re.compile("<!-- chronomoe:start -->\n(.*?)<!-- chronomoe:end -->\n?", re.DOTALL)


def put_section(text: str, name: str, section: str) -> str:
    """`text` with our section of that name: in its place where it stands already, at the end otherwise.

    What stands outside of it is kept as it is.

    Args:
        text: the model card; may be empty.
        name: ``"routing"`` (of a run) or ``"export"`` (of a cut checkpoint).
        section: Markdown that begins with ``HEADINGS[name]``, without markers.
    """
    start, end = f"<!-- chronomoe:{name}:start -->", f"<!-- chronomoe:{name}:end -->"
    marked = f"{start}\n{section.strip()}\n{end}\n"
    found = re.search(f"{start}.*?{end}\n?", text, re.DOTALL)
    if found is None:
        found = next((old for old in _UNNAMED.finditer(text) if old[1].startswith(HEADINGS[name])), None)
    if found is not None:
        return text[: found.start()] + marked + text[found.end() :]
    return f"{text.rstrip()}\n\n{marked}" if text.strip() else marked


def write_section(directory: str | Path, name: str, section: str, *, create: bool = False) -> bool:
    """:func:`put_section` into the ``README.md`` of `directory`.

    Args:
        directory: where the model card is.
        name: of the section.
        section: its Markdown.
        create: also where there is no model card yet.

    Returns:
        Whether a card was written.
    """
    path = Path(directory) / CARD
    there = path.is_file()
    if not there and not create:
        return False
    text = path.read_bytes().decode("utf-8") if there else ""
    path.write_bytes(put_section(text, name, section).encode("utf-8"))
    return True
