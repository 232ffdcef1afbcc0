"""PrunePlan: which experts stay, in every layer, on what evidence. A frozen value that touches no model.

Shape suffixes: E experts of a layer.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chronomoe_hf.errors import PlanError
from chronomoe_hf.jsonfiles import parse_json, write_text
from chronomoe_hf.lifecycle.evidence.spec import (
    EvidenceSource,
    LayerSpec,
    Scores,
    id_list,
    plain_record,
    score_list,
    strict_fields,
)
from chronomoe_hf.lifecycle.pruning.looks import plan_looks
from chronomoe_hf.pictures.shown import Looks, Shown

FORMAT = "chronomoe_hf.prune_plan"
EXPORT_FORMAT = "chronomoe_hf.export"  # what an export writes: the plan is its entry `plan`
SCHEMA = 1
_TOP = ("format", "schema", "rank", "seed", "num_kept", "source", "layers", "notes")
_SPEC = tuple(item.name for item in dataclasses.fields(LayerSpec))
_LAYER = (*_SPEC, "kept", "dropped", "protected", "scores")


@dataclass(frozen=True, kw_only=True)
class PlannedLayer:
    """What stays of one layer.

    Args:
        spec: the layer.
        kept: ids of the experts that stay, ascending. In the smaller checkpoint, expert ``i`` is ``kept[i]``.
        scores: what the experts were ranked by (the lowest go first), one per expert; None without evidence.
        protected: ids that could not go (named by the caller, or super-experts); all of them are kept.
    """

    spec: LayerSpec
    kept: tuple[int, ...]
    scores: Scores
    protected: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        spec, where = self.spec, f"layer {self.spec.layer_id} ({self.spec.name})"
        id_list(self.kept, spec.num_experts, f"{where}: kept", PlanError)
        id_list(self.protected, spec.num_experts, f"{where}: protected", PlanError)
        score_list(self.scores, spec.num_experts, f"{where}: scores", PlanError)
        if not set(self.protected) <= set(self.kept):
            raise PlanError(f"{where}: protected experts {sorted(set(self.protected) - set(self.kept))} are not kept")
        check_survivors(spec, self.kept)

    @property
    def dropped(self) -> tuple[int, ...]:
        """Ids of the experts that go, ascending."""
        kept = set(self.kept)
        return tuple(expert for expert in range(self.spec.num_experts) if expert not in kept)

    @property
    def new_ids(self) -> dict[int, int]:
        """Old id -> id in the smaller checkpoint, for the kept experts."""
        return {old: new for new, old in enumerate(self.kept)}


def check_survivors(spec: LayerSpec, kept: tuple[int, ...]) -> None:
    """Whether a stock checkpoint of these experts routes as the masked model does.

    Raises:
        PlanError: fewer survivors than experts per token; unequal survivors per routing group, which would load, run
            and compute something else; fewer than two in a group (group scores are sums of two); or too few in the
            groups a token may choose from.
    """
    where = f"layer {spec.layer_id} ({spec.name})"
    if len(kept) < spec.top_k:
        raise PlanError(f"{where}: {len(kept)} survivors, but every token needs {spec.top_k}; keep at least that many")
    if spec.num_groups == 1:
        return
    size = spec.group_size
    per_group = [
        sum(group * size <= expert < (group + 1) * size for expert in kept) for group in range(spec.num_groups)
    ]
    if len(set(per_group)) > 1:
        raise PlanError(
            f"{where}: {per_group} survivors in its {spec.num_groups} routing groups; a checkpoint has groups of "
            "equal size, so the same number must stay in each"
        )
    if per_group[0] < min(2, size) or per_group[0] * spec.groups_kept < spec.top_k:
        raise PlanError(
            f"{where}: {per_group[0]} survivors in each of {spec.num_groups} groups; at least 2 are needed for a "
            f"group's score, and {spec.groups_kept} groups must hold the {spec.top_k} experts of a token"
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class PrunePlan(Shown):
    """Which experts of a model stay.

    Made by :func:`~chronomoe_hf.lifecycle.plan_prune`, or by another tool as JSON. The JSON of a plan names every
    layer's ``kept`` and ``dropped`` ids and its ``scores``, so a reader can cut the same ranking at another number.

    Args:
        layers: one entry per MoE layer of the model, by layer_id.
        rank: name of the rank that ordered the experts.
        source: where the evidence comes from.
        seed: of a random rank; 0 elsewhere.
        notes: remarks in plain words.

    Raises:
        PlanError: no layers, layer ids that do not count from 0, another number of survivors in different layers (a
            stock config holds one number), or a layer that could not route (see :func:`check_survivors`).
    """

    layers: tuple[PlannedLayer, ...]
    rank: str
    source: EvidenceSource
    seed: int = 0
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        ids = [layer.spec.layer_id for layer in self.layers]
        if not ids or ids != list(range(len(ids))):
            raise PlanError(f"a plan has the layers 0, 1, 2, ... of a model, got {ids}")
        kept = [len(layer.kept) for layer in self.layers]
        if len(set(kept)) > 1:
            raise PlanError(
                f"the layers keep {kept} experts, but a config holds one number for all layers; plan with one `keep`"
            )

    def _looks(self) -> Looks:
        return plan_looks(self.rank, self.layers)

    @property
    def num_kept(self) -> int:
        """Survivors in every layer."""
        return len(self.layers[0].kept)

    @property
    def num_dropped(self) -> int:
        """Experts that go, over all layers."""
        return sum(len(layer.dropped) for layer in self.layers)

    @property
    def specs(self) -> tuple[LayerSpec, ...]:
        """The model's layer table."""
        return tuple(layer.spec for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return {
            "format": FORMAT,
            "schema": SCHEMA,
            "rank": self.rank,
            "seed": self.seed,
            "num_kept": self.num_kept,
            "source": dataclasses.asdict(self.source),
            "layers": [
                {
                    **dataclasses.asdict(layer.spec),
                    "kept": list(layer.kept),
                    "dropped": list(layer.dropped),
                    "protected": list(layer.protected),
                    "scores": list(layer.scores),
                }
                for layer in self.layers
            ],
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, data: Any) -> PrunePlan:
        """Inverse of :meth:`to_dict`; ``dropped`` and ``num_kept`` may be missing, but must be right where they stand.

        What an export writes into its ``prune_plan.json`` is read too: the plan that it followed, for the model before
        the cut.

        Raises:
            PlanError: not a plan, another schema, or a plan that no model could hold.
        """
        if isinstance(data, dict) and data.get("format") == EXPORT_FORMAT:
            data = data.get("plan")
        record = strict_fields(data, "a prune plan", _TOP, ("num_kept", "notes", "seed"), PlanError)
        if record["format"] != FORMAT or record["schema"] != SCHEMA:
            raise PlanError(
                f"expected format {FORMAT!r} with schema {SCHEMA}, got {record['format']!r} with {record['schema']!r}"
            )
        notes, seed, layers = record.get("notes", []), record.get("seed", 0), record["layers"]
        texts = isinstance(notes, list) and all(isinstance(note, str) for note in notes)
        if not texts or type(seed) is not int or not isinstance(record["rank"], str) or not isinstance(layers, list):
            raise PlanError("a plan has a text `rank`, a whole `seed`, a list of `layers` and a list of texts `notes`")
        plan = cls(
            layers=tuple(_layer_from(layer, index) for index, layer in enumerate(layers)),
            rank=record["rank"],
            source=plain_record(EvidenceSource, record["source"], "the plan's source", PlanError),
            seed=seed,
            notes=tuple(notes),
        )
        if record.get("num_kept", plan.num_kept) != plan.num_kept:
            raise PlanError(f"num_kept is {record['num_kept']!r}, but every layer keeps {plan.num_kept}")
        return plan

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> PrunePlan:
        """Inverse of :meth:`to_json`. Raises PlanError, see :meth:`from_dict`."""
        data = parse_json(text, "the plan", PlanError)
        if isinstance(data, dict) and "schema_version" in data and "contract" in data:
            raise PlanError("this is a config of chronomoe_hf, no plan; give the file that `chronomoe plan -o` wrote")
        return cls.from_dict(data)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan as JSON, whole or not at all."""
        return write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PrunePlan:
        """Read a plan file.

        Raises:
            PlanError: there is no file, or it is no plan.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            raise PlanError(f"no plan can be read from {path}: {problem}; give the file that plan.save wrote") from None
        return cls.from_json(text)


def _layer_from(data: Any, index: int) -> PlannedLayer:
    what = f"layer {index} of the plan"
    record = strict_fields(data, what, _LAYER, ("dropped", "protected", "num_groups", "groups_kept"), PlanError)
    spec = plain_record(LayerSpec, {name: record[name] for name in _SPEC if name in record}, what, PlanError)
    layer = PlannedLayer(
        spec=spec,
        kept=id_list(record["kept"], spec.num_experts, f"{what}: kept", PlanError),
        scores=score_list(record["scores"], spec.num_experts, f"{what}: scores", PlanError),
        protected=id_list(record.get("protected", []), spec.num_experts, f"{what}: protected", PlanError),
    )
    if tuple(record.get("dropped", layer.dropped)) != layer.dropped:
        raise PlanError(f"{what}: dropped is {record['dropped']!r}, but kept leaves {list(layer.dropped)}")
    return layer
