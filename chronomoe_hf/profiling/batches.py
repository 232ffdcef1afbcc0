"""Padded batches of a domain, dealt to the ranks, and the loss of a model on one.

Shape suffixes: B sequences, S positions, V vocabulary.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from chronomoe_hf.profiling.data import TEXT, Domain, Source, sequences
from chronomoe_hf.recording.rows import IGNORED

_LOSS_ROWS = 1024  # positions whose logits are widened to fp32 at a time


@dataclass(frozen=True)
class Batch:
    """One forward's inputs.

    Args:
        inputs: what the model is called with; int64 ``(B, S)``, padded on the right.
        labels_BS: next-token targets, `IGNORED` where there is none.
        tokens: real tokens, of encoder and decoder together.
    """

    inputs: dict[str, Tensor]
    labels_BS: Tensor
    tokens: int


def dealt(sequences: Iterable[list[int]], batch_size: int, rank: int, world: int) -> Iterator[list[list[int]] | None]:
    """This rank's share of the batches, step by step; None in a last step that has no batch for it.

    Every rank reads the same sequences, so all of them count the same steps without talking.
    """
    iterator = iter(sequences)
    batches = iter(lambda: list(itertools.islice(iterator, batch_size)), [])
    while step := list(itertools.islice(batches, world)):
        yield step[rank] if rank < len(step) else None


def collate(sequences: list[list[int]], model: nn.Module, pad: int) -> Batch:
    """Pad to the longest; for an encoder-decoder, the first half of a sequence is read and the second is written."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        halves = [((len(s) + 1) // 2, s) for s in sequences]
        read_BS, mask_BS = _padded([s[:half] for half, s in halves], pad)
        write_BS, write_mask_BS = _padded([s[half:] or [pad] for half, s in halves], pad)
        start = getattr(config, "decoder_start_token_id", None)
        shifted_BS = write_BS.roll(1, dims=1)
        shifted_BS[:, 0] = pad if start is None else start
        inputs = {"input_ids": read_BS, "attention_mask": mask_BS}
        inputs |= {"decoder_input_ids": shifted_BS, "decoder_attention_mask": write_mask_BS}
        labels_BS = write_BS.masked_fill(write_mask_BS == 0, IGNORED)
        return Batch(inputs, labels_BS, int(mask_BS.sum() + write_mask_BS.sum()))
    ids_BS, mask_BS = _padded(sequences, pad)
    labels_BS = torch.full_like(ids_BS, IGNORED)
    labels_BS[:, :-1] = ids_BS[:, 1:].masked_fill(mask_BS[:, 1:] == 0, IGNORED)
    return Batch({"input_ids": ids_BS, "attention_mask": mask_BS}, labels_BS, int(mask_BS.sum()))


def _padded(sequences: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    width = max(len(s) for s in sequences)
    ids_BS = torch.tensor([s + [pad] * (width - len(s)) for s in sequences])
    mask_BS = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences])
    return ids_BS, mask_BS


def call_arguments(model: nn.Module) -> dict[str, Any]:
    """What every forward is called with besides the batch: no key-value cache where the model takes that."""
    accepted = inspect.signature(type(model).forward).parameters
    return {"use_cache": False} if "use_cache" in accepted else {}


def loss_sum(output: Any, labels_BS: Tensor, vocabulary: int) -> tuple[Tensor, int] | None:
    """Summed next-token loss in nats (fp64, 0-dim) and the number of targets; None for a model without such a head."""
    logits = output.get("logits") if hasattr(output, "get") else None
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[-1] < vocabulary:
        return None
    if logits.shape[:2] != labels_BS.shape:
        return None
    target_T = labels_BS.reshape(-1).to(logits.device)
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for rows, targets in zip(logits.flatten(0, 1).split(_LOSS_ROWS), target_T.split(_LOSS_ROWS), strict=True):
        loss = nn.functional.cross_entropy(rows.float(), targets, ignore_index=IGNORED, reduction="sum")
        total = total + loss.double()
    return total, int((labels_BS != IGNORED).sum())


def text_batches(
    model: nn.Module,
    tokenizer: Any,
    source: Source,
    *,
    tokens: int | None = 16_384,
    length: int = 512,
    batch_size: int = 8,
    column: str = TEXT,
) -> list[dict[str, Tensor]]:
    """Batches for ``lifecycle.measure`` and ``lifecycle.refit`` from anything that `profile` reads.

    Args:
        model: whose inputs they are.
        tokenizer: of the model; None if the data are token ids.
        source: see :data:`chronomoe_hf.profiling.data.Source`; not a mapping of domains.
        tokens: at most so many; None reads to the end.
        length: most tokens of a sequence.
        batch_size: sequences in a batch.
        column: of the text in a table.

    Returns:
        Dictionaries with ``input_ids``, ``attention_mask`` and ``labels`` (-100 where padding is), int64 ``(B, S)``.

    Raises:
        DataError: the source cannot be read, has no such column, or holds no text.
    """
    domain = Domain("text", source, column)
    shares = dealt(sequences(domain, tokenizer, length, tokens), batch_size, 0, 1)
    pad = pad_id(model, tokenizer)
    batches = []
    for share in shares:
        assert share is not None
        batch = collate(share, model, pad)
        labels_BS = batch.labels_BS
        if "decoder_input_ids" not in batch.inputs:  # a decoder's labels are its inputs, the loss shifts them
            labels_BS = batch.inputs["input_ids"].masked_fill(batch.inputs["attention_mask"] == 0, IGNORED)
        batches.append({**batch.inputs, "labels": labels_BS})
    return batches


def pad_id(model: nn.Module, tokenizer: Any) -> int:
    """Token to pad with: the tokenizer's, the config's, or 0 (the mask says that it is none)."""
    config = getattr(model, "config", None)
    for value in (getattr(tokenizer, "pad_token_id", None), getattr(config, "pad_token_id", None)):
        if isinstance(value, int) and value >= 0:
            return value
    return 0
