"""A plan and a live model: finding the layers that a plan speaks of, and running forwards that leave no trace.

Shape suffixes: E experts of a layer.
"""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chronomoe_hf.errors import LifecycleError, NoMoELayersError, PlanMismatchError
from chronomoe_hf.lifecycle.evidence.spec import LayerSpec
from chronomoe_hf.recording.scope import real_tokens_of
from chronomoe_hf.wrapping.discovery import FoundLayer, find_layers, root_of
from chronomoe_hf.wrapping.owner import find_system

Batch = dict[str, Any]


def layer_specs(model: nn.Module) -> tuple[LayerSpec, ...]:
    """The layer table of a live model, wrapped or plain.

    Raises:
        NoMoELayersError: it has no MoE layer that can be read.
    """
    return tuple(_spec(layer_id, layer) for layer_id, layer in enumerate(live_layers(model)))


def match_layers(model: nn.Module, specs: Sequence[LayerSpec]) -> list[FoundLayer]:
    """The live layers that a plan or a table of evidence speaks of, in its order.

    Raises:
        PlanMismatchError: the model has other layers, with the first difference.
        NoMoELayersError: it has none.
    """
    found = live_layers(model)
    live = [_spec(layer_id, layer) for layer_id, layer in enumerate(found)]
    if len(live) != len(specs):
        raise PlanMismatchError(
            f"the plan is for a model with {len(specs)} MoE layers, {type(model).__name__} has {len(live)}; "
            "make a plan from evidence of this model"
        )
    for ours, planned in zip(live, specs, strict=True):
        if ours != planned:
            raise PlanMismatchError(
                f"layer {planned.layer_id} of the plan is {_describe(planned)}, in {type(model).__name__} it is "
                f"{_describe(ours)}; make a plan from evidence of this model"
            )
    return found


def live_layers(model: nn.Module) -> list[FoundLayer]:
    """The MoE layers of a model, wrapped or plain. Raises NoMoELayersError where none can be read."""
    found, refused = find_layers(root_of(model))
    if not found:
        reasons = "".join(f"\n  {line}" for line in refused)
        raise NoMoELayersError(f"{type(model).__name__} has no MoE layer that chronomoe_hf can read{reasons}")
    for layer in found:
        layer.adapter.bind(layer.router, layer.parent)
    return found


def _spec(layer_id: int, layer: FoundLayer) -> LayerSpec:
    num_groups, groups_kept = layer.adapter.groups(layer.router)
    return LayerSpec(
        layer_id=layer_id,
        name=layer.name,
        family=layer.adapter.family,
        router_class=layer.adapter.router_class,
        num_experts=layer.adapter.num_experts(layer.router),
        top_k=layer.adapter.top_k(layer.router),
        num_groups=num_groups,
        groups_kept=groups_kept,
    )


def _describe(spec: LayerSpec) -> str:
    groups = f" in {spec.num_groups} groups" if spec.num_groups > 1 else ""
    return f"{spec.name} ({spec.router_class}, {spec.top_k} of {spec.num_experts} experts{groups})"


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients and without a record of it; every module's mode comes back."""
    modes = {module: module.training for module in model.modules()}
    system = find_system(model)
    recorded = None if system is None else (system.switches.training, system.switches.evaluation)
    try:
        model.eval()
        if system is not None:
            system.switches.training = system.switches.evaluation = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        if system is not None and recorded is not None:
            system.switches.training, system.switches.evaluation = recorded


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def input_device(model: nn.Module) -> torch.device:
    """Where the model's inputs belong: the device of its first parameter that is not on meta."""
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))


def uncompiled(model: nn.Module) -> nn.Module:
    """The model under ``torch.compile``: a graph that was compiled before does not see hooks put on later."""
    inner = model._modules.get("_orig_mod")
    return model if inner is None else inner


def as_batches(batches: Iterable[Batch], what: str) -> list[Batch]:
    """The batches as a list, checked.

    Raises:
        LifecycleError: there is none, or one is no dictionary with ``input_ids`` (or ``inputs_embeds``).
    """
    out = list(batches)
    if not out:
        raise LifecycleError(f"{what} needs at least one batch; got none (was a generator used up?)")
    for batch in out:
        is_dict = hasattr(batch, "keys") and hasattr(batch, "items")
        if not is_dict or not ("input_ids" in batch or "inputs_embeds" in batch):
            got = ", ".join(map(str, batch)) if is_dict else type(batch).__name__
            raise LifecycleError(f"{what} reads batches as dictionaries with input_ids, got {got}")
        _require_batched(batch, what)
    return [dict(batch) for batch in out]


def _require_batched(batch: Batch, what: str) -> None:
    """Tensors of a whole batch, as a collator makes them: not lists, and no single row."""
    for name, least in (("input_ids", 2), ("inputs_embeds", 3), ("attention_mask", 2), ("labels", 1)):
        value = batch.get(name)
        if isinstance(value, list | tuple):
            raise LifecycleError(
                f"{what} reads batches of tensors (batch, length), and {name} is a {type(value).__name__}; let a data "
                "collator make them, or call torch.tensor on it"
            )
        if isinstance(value, Tensor) and value.dim() < least:
            raise LifecycleError(
                f"{what} reads batches of tensors (batch, length), and {name} has shape {tuple(value.shape)}: a single "
                "row; let a data collator batch the rows, or add a dimension (value[None])"
            )


def forward_arguments(model: nn.Module, batch: Batch, *, logits: bool) -> Batch:
    """The batch as arguments of a forward that keeps no cache and computes no more than is read.

    Args:
        model: the model.
        batch: a batch.
        logits: whether all logits are read; otherwise those of one position, where the family can.
    """
    root = root_of(model)
    names = inspect.signature(type(root).forward).parameters
    out = dict(batch)
    config = getattr(root, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        out.pop("labels", None)
    if "use_cache" in names or any(p.kind is p.VAR_KEYWORD for p in names.values()):
        out.setdefault("use_cache", False)
    if "output_router_logits" in names:
        out["output_router_logits"] = False
    if not logits and "logits_to_keep" in names:
        out["logits_to_keep"] = 1
    return on_device(out, input_device(root))


def logits_of(model: nn.Module, arguments: Batch) -> Tensor:
    """Next-token logits of a forward, ``(B, S, V)``.

    Raises:
        LifecycleError: the model has no language-model head.
    """
    output = model(**arguments)
    logits: Tensor | None = getattr(output, "logits", None)
    if logits is None or logits.dim() != 3:
        raise LifecycleError(
            f"{type(model).__name__} gives no next-token logits; load it with its language-model head "
            "(AutoModelForCausalLM)"
        )
    return logits


CHUNK = 512  # positions whose distributions over the vocabulary are held at a time


def log_distributions(full_BSV: Tensor, other_BSV: Tensor, counted_BS: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-probabilities of two models at the counted positions, fp32 ``(N, V)`` each, chunk by chunk."""
    for index in counted_BS.nonzero().split(CHUNK):
        at = index[:, 0], index[:, 1]
        yield full_BSV[at].float().log_softmax(-1), other_BSV[at].float().log_softmax(-1)


def kl_of(p_NV: Tensor, q_NV: Tensor) -> float:
    """Sum of KL(p || q) over the positions, nats, of log-probabilities."""
    return float(F.kl_div(q_NV, p_NV, reduction="sum", log_target=True))


def first_batches(batches: Iterable[Batch], count: int) -> list[Batch]:
    """The first `count` batches; a loader that is left early is told so (Accelerate keeps a list of the open ones)."""
    out: list[Batch] = []
    iterator = iter(batches)
    for batch in iterator:
        out.append(dict(batch))
        if len(out) == count:
            if hasattr(iterator, "close"):
                iterator.close()
            if hasattr(batches, "end"):
                batches.end()
            break
    return out


@contextlib.contextmanager
def untouched_randomness() -> Iterator[None]:
    """Random states of Python, numpy and torch are given back: a loader draws from them when it starts."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


# Which tokens of a forward are real, for the hooks that read a model beside its recording.
#
# Shape suffixes: T router rows (tokens).


@dataclass
class RealTokens:
    """Remembers of the forward that runs which of its rows are real tokens.

    Args:
        mask_T: bool, of the last forward of the owner; None where its inputs do not say.
    """

    mask_T: Tensor | None = None

    def listen(self, owner: nn.Module) -> Any:
        """Put the hook on the model that gets the attention mask, before its other hooks, and return its handle."""
        return owner.register_forward_pre_hook(self._remember, with_kwargs=True, prepend=True)

    def _remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.mask_T = real_tokens_of(module, args, kwargs)


def real_rows(rows: Tensor, real_T: Tensor | None) -> Tensor:
    """Rows of real tokens, detached; all of them where `real_T` is None or of another length."""
    if real_T is None or real_T.shape[0] != rows.shape[0]:
        return rows.detach()
    return rows.detach()[real_T.to(rows.device)]
