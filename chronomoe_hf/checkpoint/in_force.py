"""What of a sound state the settings in force let act. Config decides what acts, the state supplies numbers.

* beta belongs to the law that moved it. It is loaded under that law only, for layers on which that law moves beta here.
  ``balance`` makes beta for the choice of experts alone, up to 4 logit standard deviations; ``coherence`` sums up
  coherence, within 0.3, and by default also moves the mixture weights. Clipping the one into the other keeps neither
  the balance nor the meaning (a clipped balance beta raised max_violation from 0.44 to 0.62 in a test run), so it is
  left unused, and the law in force starts at 0. Under law ``"none"`` no beta is loaded.
* The gains, the balance law's memory of its last steps, are kept where the law moves what it moved before: beta, or the
  model's own correction bias. Without them a resumed run would start with full steps again.
* Scope and cap are of the config; a state does not hold them.
* With the veto off, relevance is 1.
* A lens is loaded where the model has one. What was open and cannot be taken is named.

Everything that is left unused is said in one warning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chronomoe_hf.config import ChronoConfig


@dataclass(frozen=True)
class InForce:
    """A state as the settings in force see it.

    Args:
        tensors: The saved tensors, with what may not act at its neutral value.
        beta_moved: Whether a law in force has moved beta.
        governed: Whether anything that may act here has acted.
        unused: What was left unused and why, in words.
    """

    tensors: dict[str, Tensor]
    beta_moved: bool
    governed: bool
    unused: list[str]


def in_force(
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    pairs: Sequence[tuple[int, int]],
    takes_beta: Sequence[bool],
    moves_bias: Sequence[bool],
    has_lens: Sequence[bool],
    config: ChronoConfig,
) -> InForce:
    """Apply the rules above.

    Args:
        tensors: Of the saved state, checked.
        meta: Its manifest, checked.
        pairs: (saved layer, live layer) that agree.
        takes_beta: Per live layer, whether the law in force acts on its beta.
        moves_bias: Per live layer, whether the law in force moves its native correction bias instead.
        has_lens: Per live layer.
        config: The settings in force.
    """
    kept = dict(tensors)
    unused: list[str] = []
    saved_law, law = _saved_law(meta), config.beta.law
    beta_on = set()  # saved layers whose beta may act
    remembered = set()  # saved layers whose step memory goes on
    dropped = []
    for old, new in pairs:
        if law != "none" and law == saved_law and takes_beta[new]:
            beta_on.add(old)
        elif bool(tensors["beta_LE"][old].any()):
            dropped.append(new)
        elif law != "none" and law == saved_law and moves_bias[new]:
            remembered.add(old)
    for name, kept_layers in (("beta_LE", beta_on), ("gain_LE", beta_on | remembered)):
        keep_L1 = torch.tensor([[old in kept_layers] for old in range(len(meta["layers"]))])
        kept[name] = torch.where(keep_L1, tensors[name], torch.zeros_like(tensors[name]))
    if dropped:
        unused.append(f"the beta of {layers_named(dropped)} ({_why_not_beta(saved_law, law)})")
    if not config.veto.enabled:
        kept["relevance_L"] = torch.ones_like(tensors["relevance_L"])
    lost = []
    for old, new in pairs:
        scale = tensors.get(f"lens.{old}.scale")
        if scale is not None and not has_lens[new]:
            for part in ("V", "U", "scale"):
                del kept[f"lens.{old}.{part}"]
            if float(scale) > 0.0:
                lost.append(new)
    if lost:
        unused.append(f"the open lens of {layers_named(lost)} (it has none with these settings)")
    steering = any(meta["steering"][old] for old in beta_on)
    can_act = law != "none" or any(has_lens)
    return InForce(kept, steering, bool(meta["governed"]) and can_act, unused)


def _saved_law(meta: Mapping[str, Any]) -> str | None:
    """The law of the config that was saved; None = unknown (no config, or one that this version does not read)."""
    beta = meta.get("config", {}).get("beta")
    law = beta.get("law") if isinstance(beta, dict) else None
    return law if isinstance(law, str) else None


def _why_not_beta(saved: str | None, law: str) -> str:
    if law == "none":
        return "beta.law is 'none'"
    if saved == law:
        return "no law acts on their beta with these settings"
    was = "an unknown law" if saved is None else f"law {saved!r}"
    return f"it was moved by {was}, and {law!r} is in force, which starts at 0"


def layers_named(ids: Sequence[int]) -> str:
    """Layer ids in words, the first eight of them."""
    shown = ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
    return f"layer{'s' if len(ids) > 1 else ''} {shown}"
