"""profile: text through a model in eval mode, domain by domain, in any number of processes.

Shape suffixes: L layers, R numbers of one accumulator row.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from chronomoe_hf import distributed
from chronomoe_hf.api import system_of, unwrap, wrap
from chronomoe_hf.config import ChronoConfig, CoherenceConfig, DryRunConfig, LifecycleConfig
from chronomoe_hf.errors import DataError, NonFiniteLossError
from chronomoe_hf.lifecycle.live.model import input_device
from chronomoe_hf.profiling.batches import Batch, call_arguments, collate, dealt, loss_sum, pad_id
from chronomoe_hf.profiling.data import TEXT, Domain, Source, named_domains, sequences
from chronomoe_hf.profiling.records import DomainProfile, ProfileReport, Records, load_distances, write_summary
from chronomoe_hf.profiling.together import CoActivation, distributed_device, strongest_pairs
from chronomoe_hf.system import ChronoSystem
from chronomoe_hf.wrapping.owner import find_system


def profile(
    model: nn.Module,
    tokenizer: Any,
    datasets: Source,
    *,
    output_dir: str | Path | None = None,
    tokens: int | None = 100_000,
    length: int = 1024,
    batch_size: int = 4,
    interval: int = 10,
    column: str = TEXT,
    rows: int | None = 1024,
    model_name: str = "",
    progress: bool = True,
) -> ProfileReport:
    """Send text through a model in eval mode and record its routing, per domain. No weight changes.

    In several processes (torchrun, each with a copy of the model) every process takes its part of the batches, and
    rank 0 writes.

    Args:
        model: any model that `wrap` accepts, wrapped or not, in any dtype, also dispatched by ``device_map``. A wrapped
            one is recorded as it is governed, and its training state is left alone.
        tokenizer: of the model; None if the data are token ids.
        datasets: ``{"name": source}`` for several domains, or one source: a file (.txt, .jsonl, .parquet, .csv, ...),
            a Hub name (``owner/name:config:split``), a ``datasets`` object, or an iterable of strings, of mappings, or
            of token ids.
        output_dir: records of all domains go to ``<output_dir>/chronomoe``, those of one to
            ``<output_dir>/domains/<name>/chronomoe``; each is a run directory for `report` and `plan`. None: no files.
        tokens: most tokens of a domain; None reads it to its end.
        length: most tokens of a sequence; longer documents are cut.
        batch_size: sequences in a forward.
        interval: forwards (of each process) in a window.
        column: of the text in tables; a column of conversations goes through the tokenizer's chat template.
        rows: tokens of a forward and layer whose expert outputs are read; None reads all.
        model_name: for the records.
        progress: show a progress bar on rank 0.

    Returns:
        Loads, losses, co-activation and distances of the domains.

    Raises:
        DataError: a source is unreadable, has no such column or holds no text; `output_dir` holds records already.
        NonFiniteLossError: a loss is not finite.
        WrapError: the model cannot be wrapped.
    """
    for what, given, loader in (("model", model, "AutoModelForCausalLM"), ("tokenizer", tokenizer, "AutoTokenizer")):
        if isinstance(given, str | Path):
            raise DataError(
                f"profile() takes a loaded {what}, got the name {str(given)!r}; give "
                f"{loader}.from_pretrained({str(given)!r}), or use the command: chronomoe profile {given} --data FILE"
            )
    domains = named_domains(datasets, column)
    for name, value in (("tokens", tokens), ("length", length), ("batch_size", batch_size), ("interval", interval)):
        if value is not None and value < 1:
            raise DataError(f"{name} is at least 1, got {value}")
    streams = {domain.name: _started(sequences(domain, tokenizer, length, tokens)) for domain in domains}
    directory = None if output_dir is None else _fresh(Path(output_dir))
    started = time.perf_counter()
    with recording(model, interval, rows) as system:
        run = _Run(model, system, directory, interval, model_name, pad_id(model, tokenizer), batch_size)
        try:
            for domain in domains:
                run.domain(domain, streams[domain.name], tokens, progress and distributed.is_main())
        finally:
            run.close()
        found = run.found
        report = ProfileReport(
            directory=None if directory is None else str(directory),
            run_id=run.overall.run_id,
            model_name=model_name,
            model_class=type(system.model).__name__,
            layers=[layer.table_row() for layer in system.layers],
            domains=found,
            distances=load_distances([domain.counts for domain in found.values()]),
            seconds=time.perf_counter() - started,
        )
    if directory is not None and distributed.is_main():
        write_summary(directory, report, run.pairs, run.flows)
    return report


def _started(stream: Iterator[list[int]]) -> Iterator[list[int]]:
    """The stream with its first sequence read: a source without text is refused before anything is written."""
    return itertools.chain([next(stream)], stream)


def _fresh(directory: Path) -> Path:
    taken = [path for name in ("chronomoe", "domains") if (path := directory / name).exists()]
    # Rank 0 may be creating it while another rank looks: only its answer counts.
    found = distributed.broadcast_object(str(taken[0]) if taken else None)
    if found is not None:
        raise DataError(f"{found} exists already; profile into a new directory")
    return directory


@contextlib.contextmanager
def recording(model: nn.Module, interval: int, rows: int | None) -> Iterator[ChronoSystem]:
    """`model` in eval mode and observed; left as it was found.

    Args:
        model: wrapped or not.
        interval: forwards in a window.
        rows: tokens of a forward and layer whose expert outputs are read; None reads all.
    """
    ours = find_system(model) is None
    modes = {module: module.training for module in model.modules()}
    if ours:
        lifecycle = LifecycleConfig(dry_run=DryRunConfig(enabled=False))
        wrap(
            model,
            ChronoConfig.observe(interval=interval, coherence=CoherenceConfig(max_tokens=rows), lifecycle=lifecycle),
        )
    system = system_of(model)
    model.eval()
    try:
        with torch.no_grad(), system.recording_eval():
            take_sums(system)  # what an earlier evaluation left behind
            yield system
    finally:
        for module, training in modes.items():
            module.training = training
        if ours:
            unwrap(model)


def take_sums(system: ChronoSystem) -> Tensor:
    """Sums of the eval-mode forwards since the last call, over all ranks, float64 ``(L, R)``. Collective."""
    row_LR = system.take_sums("eval")
    return row_LR


@dataclass
class _Losses:
    """Summed loss of a domain over all ranks."""

    total: float = 0.0
    targets: int = 0
    tokens: int = 0
    sequences: int = 0

    @property
    def mean(self) -> float | None:
        return self.total / self.targets if self.targets else None


class _Run:
    def __init__(
        self,
        model: nn.Module,
        system: ChronoSystem,
        directory: Path | None,
        interval: int,
        model_name: str,
        pad: int,
        batch_size: int,
    ) -> None:
        self.model, self.system, self.directory = model, system, directory
        self.pad, self.batch_size = pad, batch_size
        self.arguments = call_arguments(system.model)
        self.device = input_device(model)
        config: Any = getattr(system.model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.vocabulary = int(getattr(text, "vocab_size", 0) or 0)
        self.options: dict[str, Any] = {"interval": interval, "model_name": model_name}
        self.options["run_id"] = str(distributed.broadcast_object(f"profile-{uuid.uuid4().hex[:8]}"))
        self.overall = Records(system, directory, about={"domain": None}, **self.options)
        self.together = CoActivation(system.layers)
        self.found: dict[str, DomainProfile] = {}
        self.pairs: dict[str, list[Tensor]] = {}
        self.flows: dict[str, list[Tensor | None]] = {}

    def close(self) -> None:
        self.together.remove()
        self.overall.close()

    def domain(self, domain: Domain, stream: Iterator[list[int]], budget: int | None, progress: bool) -> None:
        """Feed one domain to its end or budget."""
        at = None if self.directory is None else self.directory / "domains" / domain.name
        records = Records(self.system, at, about={"domain": domain.name}, **self.options)
        losses = _Losses()
        bar = transformers_logging.tqdm(total=budget, unit="tok", desc=domain.name, disable=not progress, leave=False)
        for share in dealt(stream, self.batch_size, distributed.rank(), distributed.world_size()):
            fed = self._step(domain, share, losses)
            row_LR = take_sums(self.system)
            records.add(row_LR, losses.mean)
            self.overall.add(row_LR, losses.mean)
            bar.update(fed)
        bar.close()
        records.close_window(losses.mean)
        self.overall.close_window(losses.mean)
        records.close()
        self.pairs[domain.name] = self.together.take()
        self.flows[domain.name] = self.together.take_flows()
        self.found[domain.name] = DomainProfile(
            name=domain.name,
            source=domain.describe(),
            tokens=losses.tokens,
            sequences=losses.sequences,
            loss=losses.mean,
            counts=records.counts(),
            pairs=[strongest_pairs(pair) for pair in self.pairs[domain.name]],
            contribution=records.contribution(),
        )

    def _step(self, domain: Domain, share: list[list[int]] | None, losses: _Losses) -> int:
        """One forward of every rank; its loss and tokens summed over the ranks. Returns the tokens."""
        total, targets, tokens, num = 0.0, 0, 0, 0
        if share is not None:
            batch = collate(share, self.system.model, self.pad)
            measured = self._forward(batch)
            total, targets = (0.0, 0) if measured is None else measured
            tokens, num = batch.tokens, len(share)
        sums = torch.tensor([total, targets, tokens, num], dtype=torch.float64)
        all_sums = distributed.all_reduce_sum_(sums.to(distributed_device(self.system.layers))).cpu().tolist()
        if not math.isfinite(all_sums[0]):
            raise NonFiniteLossError(
                f"the loss is {all_sums[0]} in domain {domain.name!r} after {losses.tokens} tokens: the model gives "
                "NaN or infinities on this text; try bfloat16 or float32 instead of float16, and check the weights"
            )
        losses.total += all_sums[0]
        losses.targets += round(all_sums[1])
        losses.tokens += round(all_sums[2])
        losses.sequences += round(all_sums[3])
        return round(all_sums[2])

    def _forward(self, batch: Batch) -> tuple[float, int] | None:
        self.together.mask = {"": batch.inputs["attention_mask"]}
        if "decoder_attention_mask" in batch.inputs:
            self.together.mask["decoder"] = batch.inputs["decoder_attention_mask"]
        inputs = {name: value.to(self.device) for name, value in batch.inputs.items()}
        output = self.model(**inputs, **self.arguments)
        measured = loss_sum(output, batch.labels_BS, self.vocabulary)
        return None if measured is None else (float(measured[0]), measured[1])
