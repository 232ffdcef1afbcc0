"""One split between two named experts: planned as plan_split would, in force for a while, and the load that it moves.

Shape suffixes: T tokens, K experts per token, E experts, D router input width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from chronomoe_hf import distributed
from chronomoe_hf.distributed import is_sharded
from chronomoe_hf.errors import ChronoError, LifecycleError
from chronomoe_hf.lifecycle.evidence.spec import LayerSpec
from chronomoe_hf.lifecycle.live.fit_model import groups_in_memory
from chronomoe_hf.lifecycle.live.model import Batch, RealTokens, quiet, real_rows, uncompiled
from chronomoe_hf.lifecycle.live.weights import Changes, ExpertWeights
from chronomoe_hf.splitting.apply import rewrite
from chronomoe_hf.splitting.plan import ExpertCopy, LayerSplit
from chronomoe_hf.splitting.plan_split import (
    MEMORY_GB,
    STRENGTH,
    fair_shares,
    logit_std,
    require_enough,
    solve_bias,
    splitting_direction,
)
from chronomoe_hf.splitting.router_tap import RouterTap, read_calls
from chronomoe_hf.wrapping.discovery import FoundLayer


def require_splittable(tap: RouterTap, spec: LayerSpec) -> None:
    """Raise LifecycleError where no expert of the layer can become a copy of another here, before any text is read.

    Args:
        tap: of the layer.
        spec: of the layer.

    Raises:
        LifecycleError: experts that cannot be copied or are frozen, or, with several experts per token, a router on
            which no bias can act.
    """
    ExpertWeights(tap.layer)
    if spec.top_k > 1:
        require_bias(tap, spec)


def require_bias(tap: RouterTap, spec: LayerSpec) -> None:
    """Raise LifecycleError where no bias can act on the router, whatever the config's law is."""
    if any(is_sharded(weight) for weight in tap.layer.parent.parameters()):
        raise LifecycleError(
            f"{spec.name}: its weights are sharded over the ranks (FSDP, DeepSpeed ZeRO-3, tensor parallel), so no "
            "single rank can find a bias for it"
        )
    if tap.wrapped is None:
        raise LifecycleError(f"{spec.name}: a bias acts on the router of a wrapped model alone")
    reason = None if tap.wrapped.native_bias else tap.layer.adapter.refused("beta")
    if reason is not None:
        raise LifecycleError(f"{spec.name}: no bias can act on this router: {reason}")


def plan_one(tap: RouterTap, spec: LayerSpec, donor: int, target: int | None, idle: float) -> LayerSplit:
    """What makes `target` a copy of `donor` that shares its tokens, found on the calls that `tap` holds.

    One expert per token (k = 1): the donor's router row w becomes w + v, the copy's w - v, v as in
    :func:`~chronomoe_hf.lifecycle.plan_split`. Several (k > 1): a bias on these two experts that brings the share of
    each into the bounds of ``plan_split``; rows stay.

    Args:
        tap: calls of the layer's router; nothing in the model is changed when this returns.
        spec: of the layer.
        donor: the expert to be split.
        target: the expert to be overwritten; None = the idlest, which must have less than `idle` fair shares.
        idle: in fair shares.

    Returns:
        The split of this layer; shares after it are not predicted (``share_after`` is empty).

    Raises:
        LifecycleError: too few tokens, of all or of the donor, rows that cannot be split, or no idle expert.
    """
    index_TK, num = tap.choose(), spec.num_experts
    require_enough(spec, len(index_TK))
    share_E, std = fair_shares(index_TK, num), logit_std(tap)
    if target is None:
        cut = () if tap.wrapped is None else tap.wrapped.cut
        target = min((e for e in range(num) if e != donor and e not in cut), key=lambda e: (float(share_E[e]), e))
        if float(share_E[target]) >= idle:
            raise LifecycleError(
                f"{spec.name}: no expert is below {idle} fair shares on the text read, so there is none that could "
                f"become a copy of expert {donor}"
            )
    rows: dict[int, Tensor] = {}
    shift_E: Tensor | None = None
    if spec.top_k == 1:
        tap.require_linear()
        own_ND = tap.hidden()[index_TK[:, 0] == donor]
        split_D = splitting_direction(own_ND, STRENGTH * std) if std > 0.0 else None
        if split_D is None:
            raise LifecycleError(
                f"{spec.name}: expert {donor} got {len(own_ND)} tokens of the text read, too few or too alike to split"
            )
        row_D = tap.layer.adapter.weight(tap.layer.router).detach()[donor].float()
        rows = {donor: row_D + split_D, target: row_D - split_D}
    else:
        shift_E = solve_bias(tap, spec, share_E, std, moving=(donor, target))
    return LayerSplit(
        spec=spec,
        copies=(ExpertCopy(donor=donor, target=target, row_of=donor if spec.top_k == 1 else -1),),
        rows=rows,
        shift_E=shift_E,
        logit_std=std,
        share_before=tuple(share_E.tolist()),
    )


def plan_bias(tap: RouterTap, spec: LayerSpec) -> LayerSplit:
    """The bias alone that brings all shares of the layer into the bounds of ``plan_split``; no expert is copied.

    Args:
        tap: calls of the layer's router; nothing in the model is changed when this returns.
        spec: of the layer.

    Raises:
        LifecycleError: too few tokens.
    """
    index_TK = tap.choose()
    require_enough(spec, len(index_TK))
    share_E, std = fair_shares(index_TK, spec.num_experts), logit_std(tap)
    shift_E = solve_bias(tap, spec, share_E, std)
    return LayerSplit(spec=spec, shift_E=shift_E, logit_std=std, share_before=tuple(share_E.tolist()))


@contextlib.contextmanager
def in_force(tap: RouterTap, split: LayerSplit) -> Iterator[None]:
    """The split is carried out, without a refit; afterwards every bit is what it was.

    The bias of several experts per token acts whatever the config's law is.

    Args:
        tap: of the layer.
        split: of :func:`plan_one` or :func:`plan_bias`.

    Raises:
        LifecycleError: as :func:`require_splittable`.
    """
    changes = Changes()
    biased = contextlib.nullcontext() if split.shift_E is None else tap.shifted(split.shift_E)
    try:
        if split.copies:
            rewrite(tap.layer, split, None, changes)
        with biased:
            yield
    finally:
        changes.undo()


@dataclass
class LoadCount:
    """Assignments per expert of one layer, real tokens alone, before capacity drops.

    Args:
        layer: a live layer.
        count_E: float64 ``(E,)`` where the router runs; None before the first forward that was counted.
    """

    layer: FoundLayer
    count_E: Tensor | None = None

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count the forwards within this context."""
        layer, real = self.layer, RealTokens()

        def router(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            index_TK = real_rows(layer.adapter.read(module, output).index_TK, real.mask_T)
            num = layer.adapter.num_experts(module)
            count_E = torch.bincount(index_TK.reshape(-1), minlength=num)[:num].double()
            self.count_E = count_E if self.count_E is None else self.count_E + count_E

        handles = [real.listen(layer.owner), layer.router.register_forward_hook(router)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


# Planning the splits that proposals name, on held-out text that is not measured. The same plan on every rank.


class Wanted(NamedTuple):
    """A split to be planned.

    Args:
        layer_id: MoE layer.
        donor: expert to be split; None = no expert is copied, a bias alone evens the layer's load.
        target: expert to be overwritten; None = the idlest.
    """

    layer_id: int
    donor: int | None = None
    target: int | None = None


def plan_wanted(
    model: nn.Module,
    taps: Mapping[int, RouterTap],
    specs: Sequence[LayerSpec],
    wanted: Sequence[Wanted],
    batches: Sequence[Batch],
    idle: float,
) -> tuple[dict[Wanted, LayerSplit | str], int]:
    """Plan on the main process's batches. Collective: every rank runs as many forwards, and gets the same plan.

    Args:
        model: what to run; it is not changed.
        taps: by layer_id, of every layer that is named.
        specs: the model's layer table.
        wanted: the splits; each is planned as if it were the only one.
        batches: what to read; in several passes where the inputs of the routers do not fit into 2 GB.
        idle: fair shares below which an expert may be overwritten where none is named.

    Returns:
        Per split its plan, or why there is none; and the tokens that the main process read.
    """
    found: dict[Wanted, LayerSplit | str] = {}
    tokens = 0
    layer_ids = sorted(taps)
    groups = groups_in_memory([taps[i].layer for i in layer_ids], range(len(taps)), list(batches), MEMORY_GB)
    groups = distributed.broadcast_object(groups)  # type: ignore[assignment]  # as many forwards on every rank
    try:
        with quiet(model):
            for group in groups:
                held = {layer_ids[at]: taps[layer_ids[at]] for at in group}
                read_calls(uncompiled(model), list(held.values()), batches)
                if distributed.is_main():
                    tokens = max(tokens, *(len(tap.choose()) for tap in held.values()))
                    of_group = [one for one in wanted if one.layer_id in held]
                    found |= {one: _planned(held[one.layer_id], specs[one.layer_id], one, idle) for one in of_group}
                for tap in held.values():
                    tap.calls.clear()
    except LifecycleError as error:  # of reading: it holds for every split
        found = {one: str(error) for one in wanted}
    finally:
        for tap in taps.values():
            tap.calls.clear()
    found = {one: found[one] for one in wanted if one in found}
    if distributed.active():
        found, tokens = distributed.broadcast_object((found, tokens))  # type: ignore[misc]
    return found, tokens


def _planned(tap: RouterTap, spec: LayerSpec, one: Wanted, idle: float) -> LayerSplit | str:
    """The plan with its vectors on the CPU, as it travels to other ranks; or the reason why there is none."""
    try:
        split = plan_bias(tap, spec) if one.donor is None else plan_one(tap, spec, one.donor, one.target, idle)
    except ChronoError as error:
        return str(error)
    except Exception as error:  # whatever it is, the other ranks must not wait for a plan
        if not distributed.active():
            raise
        return f"{type(error).__name__}: {error}"
    shift_E = None if split.shift_E is None else split.shift_E.cpu()
    return replace(split, rows={expert: row_D.cpu() for expert, row_D in split.rows.items()}, shift_E=shift_E)
