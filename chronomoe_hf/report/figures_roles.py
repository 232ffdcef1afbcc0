"""The tables about the roles of experts: near-duplicates, experts with two roles, free energy, proposals."""

from __future__ import annotations

from typing import Any

from chronomoe_hf.report.data import RunData
from chronomoe_hf.report.figures import Figure
from chronomoe_hf.report.words import counted

MOST_PAIRS = 20
SHOWN = 0.005  # a score below it is shown as 0.00
MOST_PROPOSALS = 200


def roles(run: RunData) -> list[Figure]:
    """What the roles of the newest window show, and what is proposed; nothing where roles were not kept."""
    if not run.roles and not run.proposals:
        return []
    return [_duplicates(run), _layers(run), _proposals(run)]


def _duplicates(run: RunData) -> Figure:
    found = [(layer["layer_id"], pair) for layer in run.roles for pair in layer["pairs"] if pair["score"] is not None]
    found.sort(key=lambda each: -each[1]["score"])
    text = "No two experts of a layer could be compared: too few of their outputs were read in a window."
    if found:
        layer, pair = found[0]
        text = (
            f"The closest pair is experts {pair['first']} and {pair['second']} of layer {layer}, with a score of "
            f"{pair['score']:.2f} (1 = the same outputs)."
        )
    rows = [
        [layer, str(pair["first"]), str(pair["second"])]
        + [_number(pair[name]) for name in ("score", "agreement", "shared", "cosine", "centred")]
        for layer, pair in found[:MOST_PAIRS]
    ]
    return Figure(
        "duplicates",
        "Experts that are near-duplicates",
        text,
        None,
        ["layer", "expert", "other", "score", "agreement", "tokens shared", "cosine of roles", "centred"],
        rows,
        "Agreement: mean cosine of both outputs on the tokens that both served; where too few are shared, the score is "
        "the smaller cosine of the two role vectors.",
    )


def _layers(run: RunData) -> Figure:
    rows, worst = [], None
    for layer in run.roles:
        top = next(iter(layer["two_roles"]), None)
        if top is not None and top["score"] is not None and (worst is None or top["score"] > worst[1]["score"]):
            worst = layer["layer_id"], top
        energy = layer["free_energy"]
        rows.append(
            [layer["layer_id"], "-" if top is None else str(top["expert"]), _number(top["score"] if top else None)]
            + [_number(energy[name]) for name in ("total", "incoherence", "size", "duplicates", "two_roles")]
            + ["-" if layer["basin"] is None else str(layer["basin"])]
        )
    text = "For no expert were enough outputs read in a window to see two roles."
    if worst is not None and worst[1]["score"] < SHOWN:
        text = "No expert's tokens are of two kinds (every score rounds to 0; 1 = two)."
    elif worst is not None:
        text = (
            f"Expert {worst[1]['expert']} of layer {worst[0]} is the one whose tokens are most clearly of two kinds "
            f"({worst[1]['score']:.2f}; 0 = one kind, 1 = two)."
        )
    head = ["layer", "expert", "score", "free energy", "1 - coherence", "size", "duplicates", "two roles", "basin"]
    return Figure("roles", "Two roles, free energy and basin of every layer", text, None, head, rows)


def _proposals(run: RunData) -> Figure:
    standing = [each for each in run.proposals if each["state"] != "withdrawn"]
    confirmed = sum(each["state"] == "confirmed" for each in standing)
    text = "The roles of experts speak for no merge, split or spawn."
    if standing:
        text = f"{counted(len(standing), 'proposal')} ({confirmed} confirmed); a dry run, nothing was executed."
    rows = [
        [
            *(each[name] for name in ("layer_id", "proposal", "experts", "state")),
            "-" if each["step"] is None else f"{each['step']:.0f}",
            _number(each["score"]),
            ", ".join(_edit(name, each) for name in each["competing"]) or "-",
        ]
        for each in standing[:MOST_PROPOSALS]
    ]
    head = ["layer", "proposal", "experts", "state", "since step", "score", "what could be done"]
    note = (
        "Behind an edit, where it was measured (lifecycle__measuring__enabled=True): its rise of the loss, nats a "
        "token. A merge is a prune with an edited survivor; it is worth making where its rise is the smaller one. A "
        "split or a "
        "spawn makes an idle expert a copy of a busy one that shares its tokens: it is worth making where the load of "
        "the busy one falls and the loss hardly moves (1 = a fair share of the tokens; measured without a refit). "
        "Balance is the bias alone that evens the layer's load, before any training."
    )
    return Figure("proposals", "Proposals", text, None, head, rows, note)


def _edit(name: str, proposal: dict[str, Any]) -> str:
    rise, load = proposal["measured"].get(name), proposal["loads"].get(name)
    if rise is None:
        return name
    if load is None:
        return f"{name} {rise:+.4f}"
    (donor, target), before, after = load
    return (
        f"{name} {rise:+.4f} (expert {target} becomes a copy of {donor}: load {before[0]:.2f} and {before[1]:.2f} -> "
        f"{after[0]:.2f} and {after[1]:.2f})"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
