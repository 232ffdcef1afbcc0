"""What a model card says of an adapter that lacks what the balance law moved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from chronomoe_hf.checkpoint.correction import missing_from_weights, only_adapter
from chronomoe_hf.model_card import CARD, HEADINGS, write_section
from chronomoe_hf.wrapping.layer import Layer

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
    return write_section(directory, "routing", f"{HEADINGS['routing']}\n\n{ONLY_IN_STATE}\n", create=True)
