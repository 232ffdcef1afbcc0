"""The smallest closed loop: one real Mixtral MoE block learns a regression task while its routing is governed.

No Trainer, no tokenizer, no files: a `MixtralSparseMoeBlock`, `chronomoe_hf.wrap`, and `system.step` once per optimizer
step. Three acts in one run of about ten seconds:

1. the block learns; every 10 steps beta follows coherence and the state of the routing is printed;
2. one expert is turned against the others (its output is negated) and the block is held still: its coherence falls, its
   beta falls, and the dry-run lifecycle makes a case against it without touching a weight;
3. on a second copy, a bias that would overrule the router is forced in, and the bridge veto takes it out again.

At the end five outcomes are checked; the exit status is 1 if one of them fails.

    python examples/vertical_slice.py

Shape suffixes: B batch, S positions, D width, E experts, C clusters of the task.
"""

from __future__ import annotations

import copy
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

import chronomoe_hf
from chronomoe_hf import ChronoConfig, ChronoSystem, PruneDecision, SystemSnapshot
from chronomoe_hf.config import BetaConfig, DryRunConfig, LifecycleConfig, VetoConfig

D, E, K, CLUSTERS = 32, 8, 2, 16
BATCH, LENGTH = 8, 32
INTERVAL, LEARNING_STEPS, HELD_STEPS, VETO_STEPS = 10, 160, 80, 20
TURNED = 2  # the expert that is turned against the others


def build_block() -> MixtralSparseMoeBlock:
    """One Mixtral MoE block with random weights."""
    config = MixtralConfig(
        hidden_size=D, intermediate_size=2 * D, num_local_experts=E, num_experts_per_tok=K, num_hidden_layers=1
    )
    config._experts_implementation = "grouped_mm"
    block = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2)
    return block.train()


class Task:
    """Targets that share a direction and differ by cluster: experts can specialise, and agree on the common part."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.centre_CD = torch.randn(CLUSTERS, D, generator=self.generator)
        self.target_CD = 0.5 * torch.randn(CLUSTERS, D, generator=self.generator)
        self.common_D = torch.randn(D, generator=self.generator)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets, ``[B, S, D]``."""
        cluster_BS = torch.randint(CLUSTERS, (BATCH, LENGTH), generator=self.generator)
        noise_BSD = 0.3 * torch.randn(BATCH, LENGTH, D, generator=self.generator)
        return self.centre_CD[cluster_BS] + noise_BSD, self.common_D + self.target_CD[cluster_BS]


class HostReads(TorchDispatchMode):
    """Counts operations by which a tensor's value reaches Python."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; note whether it reads."""
        self.reads += func._schema.name.removeprefix("aten::") in self.READS
        return func(*args, **(kwargs or {}))


@dataclass
class Log:
    """What the outcomes are judged by."""

    snapshots: list[SystemSnapshot] = field(default_factory=list)
    beta_changes: list[list[float]] = field(default_factory=list)
    phi_slow: list[list[float]] = field(default_factory=list)
    beta_turned: list[float] = field(default_factory=list)
    reads_between: int = 0
    transfers: int = 0
    hashes_differ: int = 0
    effect: float = 0.0
    cases: list[PruneDecision] = field(default_factory=list)


def weight_hash(block: nn.Module) -> str:
    """sha256 of every weight of the block."""
    digest = hashlib.sha256()
    for value in block.state_dict().values():
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def count_transfers(system: ChronoSystem, log: Log) -> None:
    """Count calls of the one function that brings a window's state to the host."""
    host = system.step_state.host

    def counted() -> dict[str, Any]:
        log.transfers += 1
        return host()

    system.step_state.host = counted  # type: ignore[method-assign]


def show(snapshot: SystemSnapshot, system: ChronoSystem, loss: float) -> None:
    """One line of the table."""
    layer, state = snapshot.layers[0], system.router_state(0)
    beta = state.beta_coeff
    js = "-" if layer.disagreement_js is None else f"{layer.disagreement_js:.1e}"
    flip = "-" if layer.disagreement_flip is None else f"{layer.disagreement_flip:.4f}"
    print(
        f"{snapshot.step:5d} {loss:8.4f} {js:>9} {flip:>7} {float(state.relevance):9.3f} "
        f"{float(beta.mean()):+9.1e} {float(beta.std()):8.4f} {float(beta.abs().max()):8.4f} {layer.n_effective:6.2f}"
    )


def steps(block: nn.Module, system: ChronoSystem, task: Task, first: int, num: int, learning: bool, log: Log) -> None:
    """Run `num` steps; with `learning` off the weights are held still."""
    optimizer = torch.optim.Adam(block.parameters(), lr=3e-3)
    for step in range(first, first + num):
        closing = step % INTERVAL == 0
        x_BSD, y_BSD = task.batch()
        before_E = system.router_state(0).beta_coeff.clone()
        with HostReads() as guard:
            loss = nn.functional.mse_loss(block(x_BSD), y_BSD)
            loss.backward()
            snapshot = None if closing else system.step(step)
        log.reads_between += guard.reads
        if learning:
            optimizer.step()
        optimizer.zero_grad()
        if not closing:
            continue
        weights = weight_hash(block)
        snapshot = system.step(step)
        assert snapshot is not None
        log.hashes_differ += weight_hash(block) != weights
        show(snapshot, system, loss.item())
        record(snapshot, system, before_E, log)


def record(snapshot: SystemSnapshot, system: ChronoSystem, before_E: Tensor, log: Log) -> None:
    """Keep what beta did in this update, apart from forgetting, and the coherence it answered to."""
    beta_E = system.router_state(0).beta_coeff
    log.snapshots.append(snapshot)
    log.beta_changes.append((beta_E / system.decisions[0].beta_multiplier - before_E).tolist())
    log.phi_slow.append([value or 0.0 for value in snapshot.layers[0].phi_slow or []])
    log.beta_turned.append(float(beta_E[TURNED]))


@dataclass(frozen=True)
class Veto:
    """One step under a forced bias: relevance, probability that the full bias moves, and the largest bias in force."""

    relevance: float
    moved: float
    applied: float


def forced_veto(block: nn.Module, task: Task, size: float) -> Iterator[Veto]:
    """Train a copy on which a bias of `size` logit deviations is forced, and watch the veto, step by step."""
    # The signal "overlap" is the probability that beta moves, so a bias that sends every token to one expert of eight
    # reads 7/8; its JS divergence, the default signal, only comes near the 0.6 nats at which beta is fully withdrawn.
    config = ChronoConfig(interval=10 * VETO_STEPS, beta=BetaConfig(k_max=1000.0), veto=VetoConfig(signal="overlap"))
    block = chronomoe_hf.wrap(chronomoe_hf.unwrap(copy.deepcopy(block)), config)
    system = chronomoe_hf.system_of(block)
    optimizer = torch.optim.Adam(block.parameters(), lr=1e-3)
    state = system.router_state(0)
    system.switch_beta_on()
    for step in range(1, VETO_STEPS + 1):
        x_BSD, y_BSD = task.batch()
        nn.functional.mse_loss(block(x_BSD), y_BSD).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:  # the first step has measured the spread of the logits; the bias acts from the second on
            idle = min(range(E), key=system.snapshot().layers[0].expert_token_counts.__getitem__)
            state.beta_coeff.fill_(-size / (E - 1))[idle] = size
        system.step(step)
        yield Veto(float(state.relevance), float(state.overlap_only), float(state.beta_applied.abs().max()))


def outcomes(log: Log, extreme: list[Veto], mild: list[Veto]) -> list[tuple[str, bool, str]]:
    """The five outcomes as (name, passed, evidence)."""
    measured = [s.layers[0].disagreement_js for s in log.snapshots[1:]]
    windows = len(log.snapshots)
    rises = [change[phi.index(max(phi))] for change, phi in zip(log.beta_changes, log.phi_slow, strict=True)]
    falls = [change[phi.index(min(phi))] for change, phi in zip(log.beta_changes, log.phi_slow, strict=True)]
    held = LEARNING_STEPS // INTERVAL
    closed = all(veto.relevance == veto.applied == 0.0 and veto.moved > 0.5 for veto in extreme[1:])
    partly = [veto.relevance for veto in mild[1:]]
    jump = max(abs(after - before) for before, after in pairwise(partly))
    confirmed = [case for case in log.cases if case.state == "confirmed"]
    return [
        (
            "beta is applied and its disagreement with the plain router is logged",
            log.effect > 0 and all(js is not None and js > 0 for js in measured),
            f"it moves the output by up to {log.effect:.2g}; JS in {len(measured)} of {windows - 1} later windows",
        ),
        (
            "coherence stays on the device: one transfer per interval",
            log.transfers == windows and log.reads_between == 0,
            f"{log.transfers} transfers in {windows} windows, {log.reads_between} host reads between them",
        ),
        (
            "low coherence lowers beta, high coherence raises it",
            min(rises) > 0 > max(falls) and log.beta_turned[-1] < log.beta_turned[held - 1],
            f"highest phi {min(rises):+.1e} or more, lowest {max(falls):+.1e} or less; "
            f"turned expert {log.beta_turned[held - 1]:+.4f} -> {log.beta_turned[-1]:+.4f}",
        ),
        (
            "large disagreement suppresses beta, without oscillation",
            extreme[0].relevance == 1.0 and closed and 0.0 < min(partly) <= max(partly) < 1.0 and jump < 0.25,
            f"relevance {' '.join(f'{veto.relevance:g}' for veto in extreme[:6])} ...; under a milder bias "
            f"{min(partly):.2f} to {max(partly):.2f}, from step to step at most {jump:.2f}",
        ),
        (
            "a decoherent expert becomes a confirmed prune candidate, and no weight changes",
            [(c.expert, c.reason) for c in confirmed[:1]] == [(TURNED, "low_coherence")] and log.hashes_differ == 0,
            f"confirmed: {[(c.expert, c.reason, c.step) for c in confirmed]}; "
            f"weights changed in {log.hashes_differ} of {windows} evaluations",
        ),
    ]


def main() -> int:
    """Run the three acts and judge them."""
    torch.manual_seed(0)
    task, log = Task(), Log()
    config = ChronoConfig(
        interval=INTERVAL,
        beta=BetaConfig(eta=0.05),
        lifecycle=LifecycleConfig(dry_run=DryRunConfig(confirmations=3, coherence_tokens=1000)),
    )
    block = chronomoe_hf.wrap(build_block(), config)
    system = chronomoe_hf.system_of(block)
    count_transfers(system, log)
    print(" step     loss        JS    flip relevance beta mean      std      max   Neff")
    steps(block, system, task, 1, LEARNING_STEPS, True, log)

    learned = copy.deepcopy(block)
    x_BSD, _ = task.batch()
    with torch.no_grad():
        plain = chronomoe_hf.unwrap(copy.deepcopy(learned))
        log.effect = float((learned(x_BSD) - plain(x_BSD)).abs().max())

    print(f"      expert {TURNED} is turned against the others; the weights are held still from here on")
    with torch.no_grad():
        block.experts.down_proj[TURNED].neg_()
    steps(block, system, task, LEARNING_STEPS + 1, HELD_STEPS, False, log)
    log.cases = system.prune_decisions

    extreme = list(forced_veto(learned, task, 100.0))
    mild = list(forced_veto(learned, task, 1.2))
    print()
    failed = 0
    for number, (name, passed, evidence) in enumerate(outcomes(log, extreme, mild), start=1):
        failed += not passed
        print(f"{'PASS' if passed else 'FAIL'} ({number}) {name}\n         {evidence}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
