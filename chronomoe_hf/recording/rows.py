"""Which rows of a batch are real tokens, from what a forward is given, without a host read.

Rules, the first that applies:

1. an ``attention_mask``: 2-D; or 4-D (3-D), bool or additive, reduced to its keys where that is unambiguous;
2. the labels of an encoder-decoder model, for its decoder: what follows a row's last label is padding. A padded row
   then counts as many tokens as the same row alone would;
3. a padding-free batch (one row, explicit ``position_ids``; with several position axes, of all of them) marks its tail
   of padding by zeros. Positions that only count up say nothing: models that are given images make them themselves;
4. token ids with a known ``pad_token_id``: the runs of it before and after a row's text are padding, one inside the
   text is not. Where the pad token also begins or ends texts, the one next to the text is the text's own.

A language model inside one for images or sound is given embeddings; the ids are those that the model around it was
given.

Shape suffixes: B batch, S sequence, T = B * S router rows, K keys.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
DECODER_LABELS = "chrono_decoder_labels"
"""Name under which a decoder's scope finds the labels, which only the model around the decoder is given."""


@dataclass(frozen=True)
class PadToken:
    """The padding token of a model.

    Args:
        token_id: its id; None = unknown.
        begins: it also begins texts (``bos_token_id``, or ``decoder_start_token_id`` as in T5).
        ends: it also ends them (``eos_token_id``: the usual choice for models without a pad token).
    """

    token_id: int | None = None
    begins: bool = False
    ends: bool = False

    @classmethod
    def of(cls, config: Any) -> PadToken:
        """Read off a model's config, or unknown where it names none."""
        pad = getattr(config, "pad_token_id", None)
        if not isinstance(pad, int):
            inner = config.get_text_config() if hasattr(config, "get_text_config") else config
            return cls() if inner is config else cls.of(inner)
        begin = (getattr(config, "bos_token_id", None), getattr(config, "decoder_start_token_id", None))
        end = getattr(config, "eos_token_id", None)
        return cls(pad, pad in begin, pad in end if isinstance(end, list | tuple) else pad == end)


def real_tokens(named: Mapping[str, Any], pad: PadToken, around: bool = False) -> tuple[Tensor | None, str | None]:
    """Which rows of a flattened batch are real tokens, by the rules at the top of this file.

    Args:
        named: arguments of the forward of the module that owns the routers, by name.
        pad: the model's padding token.
        around: the ids are those of the model around this one, which may have made the positions.

    Returns:
        bool ``(B * S,)``, or None where every row counts as real; and why padding may be among them, or None.
    """
    tokens = named.get("input_ids")
    shaped = tokens if isinstance(tokens, Tensor) else named.get("inputs_embeds")
    if not isinstance(shaped, Tensor) or shaped.dim() < 2:
        return None, None
    batch, length = shaped.shape[0], shaped.shape[1]
    mask = named.get("attention_mask")
    if mask is not None:
        return _from_mask(mask, batch, length)
    labels = named.get(DECODER_LABELS)
    if isinstance(labels, Tensor) and labels.shape == (batch, length):
        return _followed(labels != IGNORED).reshape(-1), None
    by_ids = isinstance(tokens, Tensor) and tokens.dim() == 2 and pad.token_id is not None
    position_S = _positions(named.get("position_ids"), length) if batch == 1 else None
    if position_S is not None:
        own = named["position_ids"].dim() == 2 and not around
        return _from_positions(position_S, tokens, pad, own or not by_ids), None
    if by_ids:
        return _from_ids(tokens, pad).reshape(-1), None  # type: ignore[arg-type]
    return None, None if pad.token_id is None else _counted("a forward with embeddings, and neither ids nor a mask,")


def _positions(positions: Any, length: int) -> Tensor | None:
    """Positions of the one row, ``(S,)``; with several axes, whether any of them has advanced; None = not known."""
    if not isinstance(positions, Tensor) or length < 2:
        return None
    if positions.shape == (1, length):
        return positions[0]
    if positions.dim() == 3 and positions.shape[1:] == (1, length):
        return (positions[:, 0] != 0).any(0)
    return None


def _followed(flag_BS: Tensor) -> Tensor:
    """Where the flag is set here or later in the row."""
    return flag_BS.flip(1).cumsum(1).flip(1) > 0


def _from_ids(tokens_BS: Tensor, pad: PadToken) -> Tensor:
    assert pad.token_id is not None
    text_BS = tokens_BS.ne(pad.token_id)
    real_BS = _followed(text_BS) & (text_BS.cumsum(1) > 0)
    wider_BS = real_BS
    if pad.ends:
        wider_BS = wider_BS | torch.nn.functional.pad(real_BS, (1, 0))[:, :-1]
    if pad.begins:
        wider_BS = wider_BS | torch.nn.functional.pad(real_BS, (0, 1))[:, 1:]
    return wider_BS


def _from_positions(position_S: Tensor, tokens: Any, pad: PadToken, own: bool) -> Tensor:
    """The tail of zero positions is padding; the pad token settles whether a single one is a one-token document.

    Positions that are not the batch's own, but made by the model around, say nothing where they only count up: then the
    ids tell.
    """
    advanced_S = (position_S != 0).flip(0).cumsum(0).flip(0) > 0
    if isinstance(tokens, Tensor) and pad.token_id is not None:
        real_S = advanced_S | (tokens[0] != pad.token_id)
        return real_S if own else torch.where((position_S[1:] == 0).any(), real_S, _from_ids(tokens, pad)[0])
    # Without token ids the first trailing zero is read as a one-token document only if it stands alone.
    return advanced_S | ((~advanced_S).sum() == 1)


def _from_mask(mask: Any, batch: int, length: int) -> tuple[Tensor | None, str | None]:
    if isinstance(mask, Mapping):  # one mask for each kind of attention: padding is the same in all
        mask = mask.get("full_attention", next(iter(mask.values()), None))
        if mask is None:
            return None, None
    if not isinstance(mask, Tensor):
        return None, _counted(f"a mask of type {type(mask).__name__}")
    if mask.dim() == 2 and mask.shape[0] == batch and mask.shape[1] >= length:
        return (mask[:, mask.shape[1] - length :] != 0).reshape(-1), None  # while generating, the last are the rows'
    if mask.dim() in (3, 4) and mask.shape[0] in (1, batch) and mask.shape[-1] == length:
        mask_BSK = mask if mask.dim() == 3 else mask[:, 0]
        if mask_BSK.shape[1] == 1:  # the same keys for every row
            return _seen(mask_BSK[:, 0].expand(batch, length)).reshape(-1), None
        if mask_BSK.shape[1] == length:
            return _attended(_seen(mask_BSK.expand(batch, length, length))).reshape(-1), None
    return None, _counted(f"a mask of shape {tuple(mask.shape)} for {batch} rows of {length} tokens")


def _seen(mask: Tensor) -> Tensor:
    """Where a mask lets a token through: bool, or additive with very negative numbers where it does not."""
    return mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask != 0


def _attended(seen_BSK: Tensor) -> Tensor:
    """Real tokens of a square mask: a token attends to itself, unless it is padding.

    A padded row that would attend to nothing is often opened to every key (SDPA cannot take an empty row). Such a row
    counts as real only if rows that are not open attend to it, if all rows are open (no mask at all), or if it is the
    last, which sees everything in a causal mask.
    """
    own_BS = seen_BSK.diagonal(dim1=1, dim2=2)
    open_BS = seen_BSK.all(-1)
    asked_BS = (seen_BSK & ~open_BS[:, :, None]).any(1)
    last_S = torch.arange(open_BS.shape[1], device=open_BS.device) == open_BS.shape[1] - 1
    return own_BS & (~open_BS | asked_BS | open_BS.all(-1, keepdim=True) | last_S)


def _counted(what: str) -> str:
    return (
        f"padding is counted as real tokens: {what} does not say which rows are padding; pass a 2-D attention_mask "
        "(batch, length)"
    )


# Which tokens of a call are read: up to a limit, spread evenly over the real ones, chosen without the host.
#
# Shape suffixes: T rows (tokens) of a call, S tokens read.


@dataclass(frozen=True)
class TokenSample:
    """Tokens read of one call.

    Args:
        position_S: int64 rows of the call; None = all rows, in order (S = T).
        valid_S: bool, False = filler; None = every row counts.
        scale: real tokens / tokens read: what a sum over the sample is multiplied with.
    """

    position_S: Tensor | None
    valid_S: Tensor | None
    scale: Tensor | float

    @functools.cached_property
    def filler_S(self) -> Tensor | None:
        """fp32, 0 for tokens read and -inf for filler; None where there is none."""
        return None if self.valid_S is None else self.valid_S.float().log_()

    def pick(self, value_T: Tensor, dim: int = 0) -> Tensor:
        """The rows read of `value_T`."""
        return value_T if self.position_S is None else value_T.index_select(dim, self.position_S)


def sample_tokens(mask_T: Tensor | None, num_rows: int, limit: int | None, device: torch.device) -> TokenSample:
    """Up to `limit` real tokens, spread evenly over the call, chosen without talking to the host.

    Args:
        mask_T: bool, real tokens; None = all.
        num_rows: T.
        limit: most tokens to read; None = all.
        device: of the call.
    """
    if limit is None or num_rows <= limit:
        return TokenSample(None, None if mask_T is None else mask_T.to(device), 1.0)
    slot_S = torch.arange(limit, device=device)
    if mask_T is None:
        return TokenSample(slot_S * num_rows // limit, None, num_rows / limit)
    rank_T = mask_T.to(device).cumsum(0)
    total = rank_T[-1]
    spread = total.clamp_min(limit)  # fewer real tokens than slots: one a slot, then filler
    wanted_S = slot_S * spread // limit
    position_S = torch.searchsorted(rank_T, wanted_S, right=True).clamp_(max=num_rows - 1)
    return TokenSample(position_S, wanted_S < total, spread / limit)
