"""The ways to count routing that benchmarks/rivals/run.py compares, each used as documented.

Every tool is attached to a trainer before training and read after it.
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from rivals.recount import Reading, entropy_of, routers_of


class Tool:
    """One way to count. `attach` to a trainer, or `start` on a model of one's own loop with `step` after every step."""

    name = ""
    how = ""
    every = 10  # optimizer steps between two reports in a loop of one's own

    def attach(self, trainer: Any) -> None:
        """Begin on a trainer that has not trained."""
        self.start(trainer.model)

    def start(self, model: Any) -> None:
        """Begin on a model."""

    def step(self, step: int) -> None:
        """After optimizer step `step`, counted from 1, of a loop of one's own."""
        if step % self.every == 0:
            self.read()

    def read(self) -> Reading:
        """What the tool says now."""
        raise NotImplementedError


class Ours(Tool):
    """`chronomoe_hf.attach`, preset observe."""

    name = "chronomoe_hf"
    how = "`chronomoe_hf.attach(trainer, ChronoConfig.observe())`; the last snapshot"

    def __init__(self, steps: int = Tool.every) -> None:
        self.config = ChronoConfig.observe(interval=steps)

    def attach(self, trainer: Any) -> None:
        """The one line of the README."""
        self.callback = chronomoe_hf.attach(trainer, self.config)

    def start(self, model: Any) -> None:
        """wrap, then step in the loop."""
        self.system = chronomoe_hf.system_of(chronomoe_hf.wrap(model, self.config))

    def step(self, step: int) -> None:
        """A window closes every `interval` steps."""
        self.system.step(step)

    def read(self) -> Reading:
        """The last snapshot; the window is as long as the run."""
        snapshot = self.callback.system.last_snapshot
        counts = [list(layer.expert_token_counts) for layer in snapshot.layers]
        dead = [[e for e, n in enumerate(c) if n == 0] for c in counts]
        if [len(d) for d in dead] != [layer.dead_experts for layer in snapshot.layers]:
            raise RuntimeError("dead_experts of the snapshot differs from its counts")
        layers = snapshot.layers
        return Reading(counts, dead, [la.entropy for la in layers], [la.n_effective for la in layers])


class Hooks(Tool):
    """The recipe of many private callbacks: a forward hook on every router, bincount of its ids."""

    name = "forward hooks"
    how = "`register_forward_hook` on every router, `torch.bincount` of its top-k ids, summed"

    def start(self, model: Any) -> None:
        """One hook per router."""
        routers = routers_of(model)
        self.counts = [torch.zeros(router.weight.shape[0], dtype=torch.long) for router in routers]
        for layer, router in enumerate(routers):
            router.register_forward_hook(lambda m, a, out, layer=layer: self._hook(layer, out[2]))

    def _hook(self, layer: int, ids: torch.Tensor) -> None:
        self.counts[layer] += torch.bincount(ids.flatten(), minlength=self.counts[layer].numel())

    def read(self) -> Reading:
        """The sums so far."""
        return Reading.of_counts([count.tolist() for count in self.counts])


class RouterLogits(Tool):
    """`output_router_logits=True`, softmax, top-k, bincount; as Transformers' own auxiliary loss reads them."""

    name = "router logits"
    how = (
        "`config.output_router_logits = True`; softmax, top-k and bincount of `outputs.router_logits` of every forward"
    )
    careful = False

    def attach(self, trainer: Any) -> None:
        """TRL asks for router logits in its own loss passes; its generation fails where the config asks for them."""
        self.start(trainer.model)
        if getattr(trainer, "aux_loss_enabled", False):
            trainer.model.config.output_router_logits = False

    def start(self, model: Any) -> None:
        """Read the outputs of every forward."""
        self.k = model.config.num_experts_per_tok
        self.counts = [torch.zeros(router.weight.shape[0], dtype=torch.long) for router in routers_of(model)]
        model.config.output_router_logits = True
        owner = model.model if self.careful else model
        owner.register_forward_hook(self._read_outputs, with_kwargs=True)

    def _read_outputs(self, model: Any, args: Any, kwargs: dict[str, Any], outputs: Any) -> None:
        if self.careful and not (model.training and torch.is_grad_enabled()):
            return
        for layer, logits in enumerate(getattr(outputs, "router_logits", None) or ()):
            ids = torch.softmax(logits.detach().float(), dim=-1).topk(self.k, dim=-1).indices
            if self.careful and kwargs.get("attention_mask") is not None:
                ids = ids[kwargs["attention_mask"].flatten().bool()]
            self.counts[layer] += torch.bincount(ids.flatten(), minlength=self.counts[layer].numel())

    def read(self) -> Reading:
        """The sums so far."""
        if not sum(int(count.sum()) for count in self.counts):
            raise RuntimeError("no output carried router_logits")
        return Reading.of_counts([count.tolist() for count in self.counts])


class CarefulLogits(RouterLogits):
    """The same with what a careful user adds."""

    name = "router logits, masked"
    how = (
        "the same of the outputs of the decoder (`model.model`), with the attention mask applied, only in training "
        "mode with gradients on"
    )
    careful = True


# Its README, the docstring of its RoutingEvent, its README again.
MOEWATCH_SAYS = {
    "tracks": "tracks dead and cold experts per layer across the full training run",
    "counts": "how many tokens were routed to each expert",
    "cost": "`sample_every=10` keeps instrumentation below 2 % in production",
}


class MoEWatch(Tool):
    """The package of that name, from PyPI."""

    name = "moewatch"
    how = '`MoEWatch(model, WatchConfig(sample_every=1, output="silent")).attach(trainer)`'
    sample_every = 1

    def _make(self, model: Any) -> None:
        import moewatch

        # Every forward, "for maximum fidelity" (its README); the default of every 10th could not be compared.
        self.config = moewatch.WatchConfig(sample_every=self.sample_every, log_every=self.every, output="silent")
        self.watcher = moewatch.MoEWatch(model, config=self.config)

    def attach(self, trainer: Any) -> None:
        """As its README does."""
        self._make(trainer.model)
        self.watcher.attach(trainer)
        self.collector = self.watcher._collector  # it lets go of what it collected when training ends

    def start(self, model: Any) -> None:
        """As its README does in a custom loop."""
        self._make(model)
        self.watcher.start()

    def step(self, step: int) -> None:
        """Its own tick."""
        self.watcher.step(step)

    def read(self) -> Reading:
        """Its collector through its own two analyzers; bits become nats."""
        from moewatch.analyzer.collapse import CollapseDetector
        from moewatch.analyzer.entropy import EntropyAnalyzer

        stats = self.collector.get_all_stats()
        counts = [layer.expert_counts.tolist() for layer in stats.values()]
        reports = CollapseDetector(config=self.config).detect(stats).values()
        results = EntropyAnalyzer(config=self.config).analyze(stats).results.values()
        return Reading(
            counts,
            [[status.expert_idx for status in report.dead_experts()] for report in reports],
            [result.entropy_bits * math.log(2) for result in results],
            [math.exp(entropy_of(layer)) for layer in counts],
            per_token=all(result.source == "logits" for result in results),
        )


class MoEWatchDefault(MoEWatch):
    """With its defaults: every tenth forward. Only timed."""

    name = "moewatch, every 10th"
    how = "the same with its default `sample_every=10`"
    sample_every = 10


def install_moewatch(folder: Path) -> str | None:
    """Install moewatch alone into `folder` and make it importable; None, or why that failed."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), "moewatch"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["pip failed"])[-1]
    sys.path.insert(0, str(folder))
    return None
