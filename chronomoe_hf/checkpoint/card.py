"""The section about routing in a model card (``README.md``), between markers, so that writing it again replaces it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from chronomoe_hf.checkpoint.correction import missing_from_weights, only_adapter
from chronomoe_hf.wrapping.layer import Layer

START, END = "<!-- chronomoe:start -->", "<!-- chronomoe:end -->"
CARD = "README.md"

ONLY_IN_STATE = (
    "The model's own balancing bias was trained, and these adapter weights do not hold it: it is in the folder "
    "`chronomoe`. Until that is loaded, the adapter routes with the bias of the base model. Load the adapter and then "
    "`chronomoe_hf.wrap(model, config, state=directory)`, or merge it in the process that trained it "
    "(`merge_and_unload`) and save the model."
)


def note_in_card(directory: str | Path, layers: Sequence[Layer]) -> bool:
    """After weights were written: an adapter that lacks what the law moved says so in its card. Returns whether."""
    if not only_adapter(layers) or not missing_from_weights(layers):
        return False
    path = Path(directory) / CARD
    if path.is_file() and ONLY_IN_STATE in path.read_text(encoding="utf-8"):
        return True
    return put_section(directory, f"{START}\n## Expert routing\n\n{ONLY_IN_STATE}\n{END}\n", create=True)


def put_section(directory: str | Path, section: str, *, create: bool = False) -> bool:
    """Put a section into ``README.md``; what stands outside its markers is kept byte for byte.

    Args:
        directory: where the model card is.
        section: from marker to marker, ending in a newline.
        create: also where there is no model card yet.

    Returns:
        Whether a card was written.
    """
    path = Path(directory) / CARD
    if not path.is_file():
        if create:
            path.write_text(section, encoding="utf-8")
        return create
    text = path.read_bytes().decode("utf-8")
    before, found, rest = text.partition(START)
    if found and END in rest:
        after = rest.partition(END)[2].removeprefix("\n")
        text = before + section + after
    else:
        text = f"{text.rstrip()}\n\n{section}" if text.strip() else section
    path.write_bytes(text.encode("utf-8"))
    return True
