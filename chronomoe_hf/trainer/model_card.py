"""The section about the routing of a run in a model card."""

from __future__ import annotations

from pathlib import Path

from chronomoe_hf.checkpoint.card import ONLY_IN_STATE
from chronomoe_hf.checkpoint.correction import missing_from_weights
from chronomoe_hf.model_card import HEADINGS, write_section
from chronomoe_hf.system import ChronoSystem
from chronomoe_hf.telemetry import SystemSnapshot


def model_card_section(system: ChronoSystem) -> str:
    """Markdown about the last window of a run: what acted, and one row a layer. No markers, a newline at its end."""
    snapshot = system.last_snapshot
    lines = [HEADINGS["routing"], ""]
    lines.append(f"Recorded with chronomoe_hf over the run `{system.run_id}`. {_acted(system)}")
    lines += ["", *(_table(snapshot) if snapshot is not None else ["No telemetry window was closed."])]
    return "\n".join(lines) + "\n"


def _acted(system: ChronoSystem) -> str:
    if not system.governed:
        return "Nothing acted on the routing: the model routes the same without chronomoe_hf."
    if missing_from_weights(system.layers):
        return ONLY_IN_STATE
    if system.config.beta.law == "balance" and all(layer.native_bias for layer in system.layers):
        return "The model's own balancing bias was trained: a plain load routes as trained."
    return (
        "A bias or a lens acted on the routing: load the model with its `chronomoe` folder, or fold what acts into the "
        "weights, to route as trained."
    )


def _table(snapshot: SystemSnapshot) -> list[str]:
    lines = [
        f"Last window, step {snapshot.step}:",
        "",
        "| layer | experts | effective | dead | max violation | top-2 share | coherence |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for layer in snapshot.layers:
        numbers = (layer.n_effective, layer.max_violation, layer.top2_share, layer.coherence_mean)
        neff, violation, top2, phi = ("-" if number is None else f"{number:.2f}" for number in numbers)
        dead = "-" if layer.dead_experts is None else str(layer.dead_experts)
        lines.append(f"| {layer.layer_id} | {layer.n_experts} | {neff} | {dead} | {violation} | {top2} | {phi} |")
    active = [a.kind if a.layer_id is None else f"{a.kind} (layer {a.layer_id})" for a in snapshot.active_alerts]
    return [*lines, "", f"Alerts in force: {', '.join(active) or 'none'}."]


def write_model_card(directory: str | Path, system: ChronoSystem, *, create: bool = False) -> bool:
    """Put the section into ``README.md``; what stands outside its markers is kept byte for byte.

    Args:
        directory: where the model card is.
        system: whose routing it describes.
        create: also where there is no model card yet.

    Returns:
        Whether a card was written.
    """
    return write_section(directory, "routing", model_card_section(system), create=create)
