"""What a user would write instead of wrapping, and the cost of a step with each: processor time, launches, host reads.

Both recipes log, after every step, the share of the busiest expert, the dead experts and the entropy of every layer.
They count padding, evaluation and recomputation too (benchmarks/rivals/run.py); here only their cost is looked at.

Legend: L layers, E experts, D hidden size, T tokens of a batch.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from support import phantom
from torch import Tensor

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from cost.launches import Shape, build

WINDOW = 10  # steps; the default is 100


def logged(count_E: Tensor) -> list[float]:
    """Three numbers of a layer, each read on the host, as a logging line does."""
    share_E = count_E / count_E.sum()
    entropy = -torch.special.xlogy(share_E, share_E).sum()
    return [share_E.max().item(), (count_E == 0).sum().item(), entropy.item()]


class Untouched:
    """Nothing but the model."""

    def __init__(self, model: Any) -> None:
        self.model, self.lines = model, []

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss."""
        return self.model(**batch).loss

    def after(self, step: int) -> None:
        """What the recipe does after optimizer step `step`."""


class Hooks(Untouched):
    """A forward hook on every router that reads its ids on the host, call by call."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(self._hook)

    def _hook(self, router: Any, args: Any, output: Any) -> None:
        self.lines.append(logged(torch.bincount(output[2].flatten(), minlength=router.num_experts)))

    def after(self, step: int) -> None:
        """Start the next line."""
        self.lines.clear()


class RouterLogits(Untouched):
    """`output_router_logits=True`, softmax, top-k and bincount after every forward."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss, without the auxiliary loss that asking for logits adds."""
        out = self.model(**batch, output_router_logits=True)
        self.lines = []
        for logits_TE in out.router_logits:
            ids = logits_TE.detach().float().softmax(-1).topk(self.model.config.num_experts_per_tok, -1).indices
            self.lines.append(logged(torch.bincount(ids.flatten(), minlength=logits_TE.shape[-1])))
        return out.loss


class Observed(Untouched):
    """`chronomoe_hf.wrap(model, ChronoConfig.observe())`."""

    def __init__(self, model: Any) -> None:
        super().__init__(chronomoe_hf.wrap(model, ChronoConfig.observe(interval=WINDOW)))
        self.system = chronomoe_hf.system_of(model)

    def after(self, step: int) -> None:
        """The step of the system."""
        self.system.step(step)


ARMS: dict[str, Callable[[Any], Untouched]] = {
    "untouched": Untouched,
    "untouched, a copy": Untouched,
    "chronomoe_hf observe": Observed,
    "router logits every step": RouterLogits,
    "hooks with .item()": Hooks,
}


def make_batch(shape: Shape) -> dict[str, Tensor]:
    """Random tokens, no padding."""
    ids = torch.randint(2, 64, (shape.batch, shape.length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def timed(shape: Shape, layers: int, rounds: int) -> dict[str, Any]:
    """Processor time of a step per arm: of the untouched one in seconds, of the others over it, round by round."""
    base, batch = build(shape, layers), make_batch(shape)
    arms = {name: kind(copy.deepcopy(base)) for name, kind in ARMS.items()}
    optimizers = {name: torch.optim.SGD(arm.model.parameters(), lr=1e-4) for name, arm in arms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    order = list(arms)
    for step in range(1, rounds + 3):
        for name in order:
            start = time.process_time()
            arms[name].forward(batch).backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            arms[name].after(step)
            seconds[name].append(time.process_time() - start)
        order = order[1:] + order[:1]
    plain = seconds["untouched"][2:]
    found: dict[str, Any] = {"untouched_ms": round(1000 * statistics.median(plain), 2), "arms": {}}
    for name in list(arms)[1:]:
        own = seconds[name][2:]
        ratios = [a / b for a, b in zip(own, plain, strict=True)]
        added = [1000 * (a - b) for a, b in zip(own, plain, strict=True)]
        found["arms"][name] = {
            "ratio": [round(q, 4) for q in statistics.quantiles(ratios, n=4)],
            "added_ms": [round(q, 2) for q in statistics.quantiles(added, n=4)],
        }
    return found


def counted(shape: Shape, layers: int) -> dict[str, dict[str, int]]:
    """Launches and host reads of one step between windows (forward, backward, recipe, `system.step`), per arm."""
    found = {}
    for name, kind in ARMS.items():
        if name == "untouched, a copy":
            continue
        with phantom.device():
            arm = kind(phantom.to_device(build(shape, layers)))
            batch = phantom.to_device(make_batch(shape))
            for step in (1, 2):
                arm.model.zero_grad()
                with phantom.counting() as seen:
                    arm.forward(batch).backward()
                    arm.after(step)
        found[name] = {"launches": seen.total, "reads": sum(seen.reads.values())}
    plain = found["untouched"]
    return {name: {key: one[key] - (name != "untouched") * plain[key] for key in one} for name, one in found.items()}
