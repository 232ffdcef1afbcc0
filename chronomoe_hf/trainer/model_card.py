"""A section about the routing in a model card, between markers, so that writing it again replaces it."""

from __future__ import annotations

from pathlib import Path

from chronomoe_hf.system import ChronoSystem
from chronomoe_hf.telemetry import SystemSnapshot

START, END = "<!-- chronomoe:start -->", "<!-- chronomoe:end -->"
CARD = "README.md"


def model_card_section(system: ChronoSystem) -> str:
    """Markdown about the last window of a run: what acted, and one row a layer. Ends with a newline."""
    snapshot = system.last_snapshot
    lines = [START, "## Expert routing", ""]
    lines.append(f"Recorded with chronomoe_hf over the run `{system.run_id}`. {_acted(system)}")
    lines += ["", *(_table(snapshot) if snapshot is not None else ["No telemetry window was closed."]), END]
    return "\n".join(lines) + "\n"


def _acted(system: ChronoSystem) -> str:
    if not system.governed:
        return "Nothing acted on the routing: the model routes the same without chronomoe_hf."
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
    path = Path(directory) / CARD
    section = model_card_section(system)
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
