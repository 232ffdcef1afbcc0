"""Is a smaller checkpoint the masked model? Tensors bit for bit, logits within a tolerance.

Shape suffixes: B sequences, S positions, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from chronomoe_hf.errors import ExportError
from chronomoe_hf.lifecycle.live.model import Batch, forward_arguments, quiet
from chronomoe_hf.lifecycle.pruning.measure import masked
from chronomoe_hf.lifecycle.pruning.plan import PrunePlan
from chronomoe_hf.router.state import HANDLE

EXACT = 1e-5  # largest difference of an fp32 logit
ROUNDINGS = 4  # rounding steps of a 16-bit dtype
TIES = 0.05  # share of positions that may differ in 16 bits, where two experts can tie
_SHAPE = (2, 24)


@dataclass(frozen=True)
class Comparison:
    """Two sets of logits.

    Args:
        difference: largest over all positions (16 bits: over all but the `TIES` that differ most).
        limit: largest that was allowed.
    """

    difference: float
    limit: float


def probe_batches(config: PreTrainedConfig) -> list[Batch]:
    """One batch of made-up token ids, none of them special; the same on every call."""
    text = config.get_text_config()
    vocabulary = int(text.vocab_size)
    special = {
        value
        for node in (config, text)
        for name, value in vars(node).items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    usable = torch.tensor([token for token in range(vocabulary) if token not in special])
    generator = torch.Generator().manual_seed(0)
    ids_BS = usable[torch.randint(len(usable), _SHAPE, generator=generator)]
    batch: Batch = {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS)}
    if config.is_encoder_decoder:
        batch |= {"decoder_input_ids": ids_BS.flip(1), "decoder_attention_mask": torch.ones_like(ids_BS)}
    return [batch]


def masked_logits(model: PreTrainedModel, plan: PrunePlan, batches: Sequence[Batch]) -> list[Tensor]:
    """Logits of the live model without the dropped experts and without anything of ours that steers, on the CPU."""
    with masked(model, plan), _unsteered(model):
        return logits_of(model, batches)


def logits_of(model: PreTrainedModel, batches: Sequence[Batch]) -> list[Tensor]:
    """Logits (or last hidden states) of every batch, ``(B, S, V)`` on the CPU, in the model's dtype.

    Raises:
        ExportError: the model cannot be run on these inputs.
    """
    with quiet(model):
        try:
            outputs = [model(**forward_arguments(model, batch, logits=True)) for batch in batches]
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            raise ExportError(
                f"{type(model).__name__} cannot be run for the comparison: {str(error)[:300]}; pass `batches` with the "
                "inputs that it takes"
            ) from error
        return [_values(output).detach().cpu() for output in outputs]


def _values(output: Any) -> Tensor:
    value = output.get("logits")
    return output["last_hidden_state"] if value is None else value  # type: ignore[no-any-return]


@contextlib.contextmanager
def _unsteered(model: nn.Module) -> Iterator[None]:
    """beta and lenses of a wrapped model closed; afterwards they are what they were."""
    handles = [m.__dict__[HANDLE] for m in model.modules() if HANDLE in m.__dict__]
    before = [(handle, handle.state.beta_on, handle.lens) for handle in handles]
    try:
        for handle in handles:
            handle.state.beta_on, handle.lens = False, None
        yield
    finally:
        for handle, beta_on, lens in before:
            handle.state.beta_on, handle.lens = beta_on, lens


def require_close(
    want: Sequence[Tensor], model: PreTrainedModel, batches: Sequence[Batch], tolerance: float | None
) -> Comparison:
    """Compare the saved model's logits with those wanted.

    Raises:
        ExportError: they differ by more than `tolerance` (None: see ``export``).
    """
    got = logits_of(model, batches)
    dtype = model.dtype
    exact = dtype.itemsize >= 4
    scale = max(1.0, *(float(value.float().abs().max()) for value in want))
    limit = tolerance
    if limit is None:
        limit = EXACT * scale if exact else ROUNDINGS * torch.finfo(dtype).eps * scale
    far_P = torch.cat([_distance(a, b) for a, b in zip(want, got, strict=True)]).sort().values
    last = len(far_P) - 1 - (0 if exact else int(TIES * len(far_P)))
    difference = float(far_P[last])
    if not difference <= limit:  # NaN fails too
        raise ExportError(
            f"the logits of the saved checkpoint differ from those of the masked model by {difference:.2g}, at most "
            f"{limit:.2g} is allowed; the directory was not written. Please report the model's family"
        )
    return Comparison(difference, limit)


def _distance(want: Tensor, got: Tensor) -> Tensor:
    if want.shape != got.shape:
        raise ExportError(f"the saved checkpoint gives outputs of shape {list(got.shape)}, expected {list(want.shape)}")
    return (want.double() - got.double()).abs().flatten(0, -2).amax(-1)


def require_same_weights(reloaded: nn.Module, written: nn.Module) -> None:
    """Every tensor of the loaded model is the one that was written, in the dtype it was loaded with.

    Raises:
        ExportError: one is not.
    """
    want = written.state_dict()
    for name, value in reloaded.state_dict().items():
        if name not in want or not torch.equal(value.cpu(), want[name].to(value.dtype).cpu()):
            raise ExportError(f"{name} came back from the saved checkpoint with other values; nothing was written")
