"""What evidence and plans say about the model and the run they come from, and strict reading of their JSON.

Shape suffixes: E experts of a layer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from chronomoe_hf.errors import LifecycleError, PlanError

Scores = tuple[float | None, ...]
Record = TypeVar("Record")


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One MoE layer of a model, as far as a plan depends on it.

    Args:
        layer_id: position among the MoE layers, from 0.
        name: module path of the router, without wrapper prefixes.
        family: model folder of Transformers, for example ``"qwen3_moe"``.
        router_class: class name of the router.
        num_experts: E.
        top_k: experts per token.
        num_groups: expert groups of a group-limited router (DeepSeek), consecutive and of equal size; 1 without.
        groups_kept: groups that a token may choose from; equal to `num_groups` where nothing is limited.
    """

    layer_id: int
    name: str
    family: str
    router_class: str
    num_experts: int
    top_k: int
    num_groups: int = 1
    groups_kept: int = 1

    def __post_init__(self) -> None:
        ok = 1 <= self.top_k <= self.num_experts and 1 <= self.groups_kept <= self.num_groups
        if not ok or self.num_experts % self.num_groups:
            raise PlanError(
                f"layer {self.layer_id} ({self.name}): {self.top_k} of {self.num_experts} experts a token in "
                f"{self.groups_kept} of {self.num_groups} groups is no routing; need 1 <= k <= E, equal groups"
            )

    @property
    def group_size(self) -> int:
        """Experts in a group."""
        return self.num_experts // self.num_groups


@dataclass(frozen=True, kw_only=True)
class EvidenceSource:
    """Where evidence comes from.

    Args:
        kind: ``"run"`` (records of a directory), ``"system"`` (a live wrapped model) or ``"calibration"`` (batches read
            for the purpose).
        run_id: of the run.
        model_class: class name of the model.
        mode: ``"TRAIN"``, ``"INFER"`` or ``"EVAL"``: which forwards were read.
        first_step, last_step: optimizer steps that the evidence spans, both included.
        tokens: real tokens routed in a layer (the most of any layer).
        rows_read: expert outputs read, over all layers and experts.
        beta_law: routing law of the run: ``"none"``, ``"coherence"`` or ``"balance"``.
    """

    kind: str
    run_id: str = ""
    model_class: str = ""
    mode: str = "TRAIN"
    first_step: int = 0
    last_step: int = 0
    tokens: int = 0
    rows_read: int = 0
    beta_law: str = "none"


def strict_fields(
    record: Any, what: str, known: Sequence[str], optional: Sequence[str], error: type[LifecycleError]
) -> dict[str, Any]:
    """`record` as a dictionary with exactly the `known` keys, of which the `optional` ones may be missing.

    Raises:
        LifecycleError: (of the class `error`) it is no object, a key is missing or unknown.
    """
    if not isinstance(record, Mapping):
        raise error(f"{what} must be a JSON object, got {type(record).__name__}")
    missing = [name for name in known if name not in record and name not in optional]
    unknown = [name for name in record if name not in known]
    if missing or unknown:
        parts = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has unknown {', '.join(unknown)}"] * bool(unknown)
        raise error(f"{what} {' and '.join(parts)}; known: {', '.join(known)}")
    return dict(record)


def plain_record(cls: type[Record], record: Any, what: str, error: type[LifecycleError]) -> Record:
    """Build one of the dataclasses above (``str`` and ``int`` fields only) from a JSON object.

    Raises:
        LifecycleError: (of the class `error`) a key is missing or unknown, or a value of another type.
    """
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    optional = [item.name for item in fields if item.default is not dataclasses.MISSING]
    values = strict_fields(record, what, [item.name for item in fields], optional, error)
    for item in fields:
        kind = {"str": str, "int": int}[str(item.type)]
        value = values.get(item.name, item.default)
        if type(value) is not kind:
            raise error(f"{what}: {item.name} must be of type {kind.__name__}, got {value!r}")
    return cls(**values)


def score_list(values: Any, num_experts: int, what: str, error: type[LifecycleError]) -> Scores:
    """A list of `num_experts` finite numbers or None (no evidence) as a tuple of floats.

    Raises:
        LifecycleError: (of the class `error`) another length or type.
    """
    if not isinstance(values, list | tuple) or len(values) != num_experts:
        size = len(values) if isinstance(values, list | tuple) else type(values).__name__
        raise error(f"{what} must hold {num_experts} values, one per expert, got {size}")
    out: list[float | None] = []
    for value in values:
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
        ):
            raise error(f"{what} must hold finite numbers or null, got {value!r}")
        out.append(None if value is None else float(value))
    return tuple(out)


def id_list(values: Any, num_experts: int, what: str, error: type[LifecycleError]) -> tuple[int, ...]:
    """A sorted list of different expert ids as a tuple.

    Raises:
        LifecycleError: (of the class `error`) ids outside 0..E-1, twice, out of order, or no list.
    """
    ok = isinstance(values, list | tuple) and all(type(value) is int for value in values)
    if not ok or list(values) != sorted(set(values)) or any(not 0 <= value < num_experts for value in values):
        raise error(f"{what} must be ascending expert ids in 0..{num_experts - 1}, got {values!r}")
    return tuple(values)
