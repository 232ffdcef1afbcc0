"""What a smaller checkpoint says about itself: ``prune_plan.json`` and a section of its model card."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chronomoe_hf.jsonfiles import write_json, write_text
from chronomoe_hf.lifecycle.pruning.plan import EXPORT_FORMAT, PrunePlan
from chronomoe_hf.model_card import HEADINGS, put_section

PLAN_FILE = "prune_plan.json"
CARD_FILE = "README.md"
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What an export wrote, and how it was checked.

    Args:
        directory: the checkpoint.
        num_experts, num_kept: experts of every MoE layer before and after.
        top_k: experts per token, unchanged.
        parameters_before, parameters_after: of the whole model.
        bytes_before, bytes_after: of its tensors.
        checked: ``"logits"``: the saved files were loaded, every tensor compared bit for bit, and the logits compared
            with those of the masked model; ``"shapes"``: names and shapes of the saved files were compared with what
            Transformers builds for this config.
        max_difference: largest difference of a logit from the masked model; None with ``"shapes"``.
        tolerance: what was allowed.
        state: whether a state of chronomoe_hf was cut along.
        steering: what of that state acts only where it is loaded, in words; None = a plain reload routes as it should.
        dropped_tensors: tensors of the source that the model does not have, left out (``drop_unknown``).
        seconds: wall time.
    """

    directory: str
    num_experts: int
    num_kept: int
    top_k: int
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    checked: str
    max_difference: float | None
    tolerance: float | None
    state: bool
    steering: str | None = None
    dropped_tensors: int = 0
    seconds: float

    def to_record(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return asdict(self)

    def __str__(self) -> str:
        how = "names and shapes checked" if self.max_difference is None else f"logits within {self.max_difference:.1e}"
        return (
            f"{self.directory}: {self.num_experts} -> {self.num_kept} experts a layer, "
            f"{self.parameters_before / 1e6:.1f} -> {self.parameters_after / 1e6:.1f} M parameters, {how}"
        )


def write_plan(directory: Path, plan: PrunePlan, extra: dict[str, Any]) -> None:
    """``prune_plan.json``: the plan, and per layer the new id of every kept expert.

    Args:
        directory: of the checkpoint.
        plan: what stayed.
        extra: further entries (measured effect, refit), JSON-ready.
    """
    record = {
        "format": EXPORT_FORMAT,
        "schema": SCHEMA,
        "old_to_new": [
            {
                "layer_id": layer.spec.layer_id,
                "name": layer.spec.name,
                "ids": {str(o): n for o, n in layer.new_ids.items()},
            }
            for layer in plan.layers
        ],
        "plan": plan.to_dict(),
        **extra,
    }
    write_json(directory / PLAN_FILE, record)


def write_card(directory: Path, plan: PrunePlan, report: ExportReport, extra: dict[str, Any]) -> None:
    """Put our section into the model card, in place of an earlier one; a checkpoint without a card gets one."""
    path = directory / CARD_FILE
    text = path.read_text(encoding="utf-8") if path.is_file() else _HEAD
    write_text(path, put_section(text, "export", _section(plan, report, extra)))


_HEAD = """---
library_name: transformers
tags:
- mixture-of-experts
- pruned
- chronomoe
---

# Model with fewer experts
"""


def _section(plan: PrunePlan, report: ExportReport, extra: dict[str, Any]) -> str:
    source = plan.source
    lines = [
        HEADINGS["export"],
        "",
        f"{report.num_kept} of {report.num_experts} experts stay in each of {len(plan.layers)} layers; every token "
        f"still uses {report.top_k}. Which ones, and their old ids: `{PLAN_FILE}`.",
        "",
        "| | before | after |",
        "|---|---|---|",
        f"| experts a layer | {report.num_experts} | {report.num_kept} |",
        f"| parameters | {_short(report.parameters_before)} | {_short(report.parameters_after)} |",
        f"| bytes | {_short(report.bytes_before)} | {_short(report.bytes_after)} |",
        "",
        f"- Ranked by `{plan.rank}`, from {source.kind} `{source.run_id or '-'}` ({source.mode}, steps "
        f"{source.first_step} to {source.last_step}, {source.tokens} tokens, {source.rows_read} expert outputs read).",
    ]
    effect = extra.get("effect")
    if effect:
        lines.append(_effect_line(effect))
    if extra.get("refit"):
        before, after = extra["refit"]["kl_before"], extra["refit"]["kl_after"]
        lines.append(
            "- The output projections of the kept experts were refitted, layer by layer, to the full model: KL to the "
            f"full model on text held out from the refit {before:.4f} before, {after:.4f} after."
        )
    if report.max_difference is None:
        lines.append("- Names and shapes of the files were checked against the config.")
    else:
        lines.append(
            f"- Loaded again and compared with the full model under a mask: largest difference of a logit "
            f"{report.max_difference:.1e}."
        )
    if report.dropped_tensors:
        lines.append(f"- {report.dropped_tensors} tensors that the model of Transformers does not have were left out.")
    if report.steering is None:
        lines.append(
            "- It loads with `from_pretrained` of Transformers; nothing else is needed. Made with chronomoe_hf."
        )
    else:
        lines.append(
            f"- It loads with `from_pretrained` of Transformers, but **its routing was governed**, and the folder "
            f"`chronomoe` holds {report.steering}. A plain reload and serving engines route without it; "
            "`chronomoe_hf.wrap(model, state=directory)` gives it back. Made with chronomoe_hf."
        )
    return "\n".join(lines)


def _short(value: int) -> str:
    """1,234,567,890 as ``1.23 billion``."""
    for size, name in ((1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.2f} {name}"
    return f"{value:,}"


def _effect_line(effect: dict[str, Any]) -> str:
    plan, random = effect["plan"], effect.get("random") or []
    text = f"- Measured on {effect['tokens']} held-out tokens before the cut: loss {plan['delta_loss']:+.4f} nats"
    if plan.get("delta_loss_error") is not None:
        text += f" (standard error {plan['delta_loss_error']:.4f})"
    if random:
        text += f"; random experts instead: {sum(each['delta_loss'] for each in random) / len(random):+.4f}"
    return text + "."
