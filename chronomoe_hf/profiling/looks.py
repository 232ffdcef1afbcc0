"""A profile as a card, a table and a picture; sums over the whole profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from chronomoe_hf.metrics import effective_experts
from chronomoe_hf.pictures.domains import DomainLoads
from chronomoe_hf.pictures.loads import Load, load_picture
from chronomoe_hf.pictures.picture import Picture
from chronomoe_hf.pictures.shown import Looks


class Part(Protocol):
    """What is shown of one domain."""

    @property
    def name(self) -> str:
        """Of the domain."""

    @property
    def tokens(self) -> int:
        """Real tokens."""

    @property
    def loss(self) -> float | None:
        """Mean next-token loss."""

    @property
    def counts(self) -> list[list[int]]:
        """Assignments per layer and expert."""

    @property
    def contribution(self) -> list[list[float] | None]:
        """Sum of gate times output norm per layer and expert."""


def profile_looks(model: str, layers: Sequence[Mapping[str, Any]], domains: Sequence[Part]) -> Looks:
    """How a profile shows itself."""
    sums = _sums(domains)
    used = [n / len(row) for row in sums if (n := effective_experts(row)) is not None]
    dead = sum(count == 0 for row in sums for count in row)
    losses = [f"{part.name} {part.loss:.3f}" for part in domains if part.loss is not None]
    numbers = [
        ("tokens", f"{sum(part.tokens for part in domains):,}"),
        ("experts in use", f"{100 * sum(used) / len(used):.0f} %" if used else "-"),
        ("without a token", f"{dead} of {sum(map(len, sums))}"),
    ]
    return Looks(
        title=f"Profile of {model}",
        sentence=f"{len(domains)} domains, {len(sums)} MoE layers. Loss, nats a token: {', '.join(losses) or '-'}.",
        numbers=numbers,
        rows=lambda: _rows(domains),
        picture=lambda: _picture(layers, domains, sums),
        hint="chronomoe report DIRECTORY makes the page; --against a later profile shows what changed",
    )


def _sums(domains: Sequence[Part]) -> list[list[int]]:
    tables = zip(*(part.counts for part in domains), strict=True)
    return [[sum(column) for column in zip(*rows, strict=True)] for rows in tables]


def _picture(layers: Sequence[Mapping[str, Any]], domains: Sequence[Part], sums: list[list[int]]) -> Picture:
    top_k = [int(row["top_k"]) for row in layers]
    if len(domains) < 2:
        loads = [Load(str(at), row, k) for at, (row, k) in enumerate(zip(sums, top_k, strict=True))]
        return load_picture(loads, "Who does the work")
    given = [[row for row in part.contribution if row is not None] for part in domains]
    known = all(len(rows) == len(sums) for rows in given)
    labels = [str(row["layer_id"]) for row in layers]
    names = [part.name for part in domains]
    return DomainLoads(names, labels, top_k, [part.counts for part in domains], given if known else None).picture()


def _rows(domains: Sequence[Part]) -> list[dict[str, Any]]:
    """A row for every expert of every layer in every domain."""
    rows = []
    for part in domains:
        for at, counts in enumerate(part.counts):
            given = part.contribution[at] if at < len(part.contribution) else None
            total = sum(counts)
            for expert, count in enumerate(counts):
                rows.append(
                    {
                        "domain": part.name,
                        "layer": at,
                        "expert": expert,
                        "assignments": count,
                        "share": count / total if total else None,
                        "contribution": None if given is None else given[expert],
                    }
                )
    return rows
