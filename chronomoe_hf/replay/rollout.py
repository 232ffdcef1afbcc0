"""What Transformers' own ``generate`` chooses: every forward of it is kept until it ends, then read in one transfer.

Shape suffixes: B rows of a batch, S positions of one forward, N tokens of a row, L layers, K experts a token, V
vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from chronomoe_hf.errors import ReplayError
from chronomoe_hf.replay.store import Array, Record


@dataclass
class _Sequence:
    """One batch of rows that grows forward by forward."""

    mask: Tensor | None
    ids: list[Tensor] = field(default_factory=list)
    routes: list[Tensor] = field(default_factory=list)
    logps: list[Tensor] = field(default_factory=list)
    logits_BV: Tensor | None = None

    @property
    def length(self) -> int:
        return sum(ids.shape[1] for ids in self.ids)


class RolloutTape:
    """Forwards of a rollout, told apart by their masks: one that is as long as its tokens begins new rows.

    Args:
        temperature: that the sampling used; log-probabilities are of logits divided by it.
        pad_token_id: of the rows' ends; None = rows end together.
    """

    def __init__(self, temperature: float = 1.0, pad_token_id: int | None = None) -> None:
        self.temperature = temperature
        self.pad_token_id = pad_token_id
        self.sequences: list[_Sequence] = []
        self.unreadable = 0
        """Forwards that could not be put together (rows reordered, a cache that was cut back, no token ids)."""

    def forward(self, ids_BS: Tensor | None, mask: Tensor | None, routes_LTK: Tensor, past: int | None) -> None:
        """One forward of the model.

        Args:
            ids_BS: token ids; None = the model was given something else.
            mask: 2-D attention mask over all tokens so far, or None.
            routes_LTK: what was chosen, small integers, on the device.
            past: tokens in the cache before it; None = unknown.
        """
        if ids_BS is None:
            self.unreadable += 1
            return
        width = None if mask is None else mask.shape[1]
        begins = ids_BS.shape[1] == width if width is not None else not past
        if begins:
            if self._again(ids_BS):  # without a cache every forward holds all tokens: the last one is enough
                self.sequences.pop()
            self.sequences.append(_Sequence(mask))
        current = self.sequences[-1] if self.sequences else None
        if current is None or (width is not None and width != current.length + ids_BS.shape[1]):
            self.unreadable += 1
            return
        if current.ids and current.ids[0].shape[0] != ids_BS.shape[0]:
            self.unreadable += 1
            return
        if current.logits_BV is not None and ids_BS.shape[1] == 1:
            self._score(current, ids_BS[:, 0])
        current.ids.append(ids_BS.detach())
        current.routes.append(routes_LTK)

    def _again(self, ids_BS: Tensor) -> bool:
        if not self.sequences or len(self.sequences[-1].ids) != 1:
            return False
        before = self.sequences[-1].ids[0]
        return before.shape[0] == ids_BS.shape[0] and before.shape[1] + 1 == ids_BS.shape[1]

    def logits(self, logits: Tensor) -> None:
        """The logits ``(B, S, V)`` that the last forward returned; the next token is scored with them."""
        if self.sequences:
            self.sequences[-1].logits_BV = logits[:, -1].detach()

    def end(self, tokens_BN: Tensor | None) -> None:
        """The rollout has returned its rows: the last token, which is fed to no forward, is scored."""
        current = self.sequences[-1] if self.sequences else None
        if current is None or tokens_BN is None or current.logits_BV is None:
            return
        if tokens_BN.shape[1] == current.length + 1 and tokens_BN.shape[0] == current.ids[0].shape[0]:
            self._score(current, tokens_BN[:, -1])
            current.ids.append(tokens_BN[:, -1:])

    def _score(self, current: _Sequence, next_B: Tensor) -> None:
        assert current.logits_BV is not None
        logp_BV = (current.logits_BV.float() / self.temperature).log_softmax(-1)
        current.logps.append(logp_BV.gather(-1, next_B[:, None]))
        current.logits_BV = None

    def records(self, dtype: np.dtype[np.generic]) -> list[Record]:
        """One record a row."""
        return [record for sequence in self.sequences if sequence.ids for record in self._rows(sequence, dtype)]

    def _rows(self, sequence: _Sequence, dtype: np.dtype[np.generic]) -> list[Record]:
        ids_BN = torch.cat(sequence.ids, 1).cpu().numpy().astype(np.int64)
        batch, prompt = sequence.ids[0].shape
        parts = [part_LTK.view(part_LTK.shape[0], batch, -1, part_LTK.shape[-1]) for part_LTK in sequence.routes]
        routes_BNLK = torch.cat(parts, 2).permute(1, 2, 0, 3).cpu().numpy().astype(dtype)
        mask_BN = np.ones_like(ids_BN, dtype=bool)
        if sequence.mask is not None:
            mask_BN[:, :prompt] = sequence.mask[:, :prompt].cpu().numpy() != 0
        logps_BN = np.full(ids_BN.shape, np.nan, dtype=np.float32)
        if len(sequence.logps) == ids_BN.shape[1] - prompt and sequence.logps:
            logps_BN[:, prompt:] = torch.cat(sequence.logps, 1).cpu().numpy()
        out = []
        for ids_N, mask_N, routes_NLK, logps_N in zip(ids_BN, mask_BN, routes_BNLK, logps_BN, strict=True):
            stop = self._end_of(ids_N, prompt)
            real_N = np.flatnonzero(mask_N[:stop])
            routed_N = real_N[real_N < len(routes_NLK)]
            known = None if np.isnan(logps_N).all() else logps_N[real_N]
            out.append(Record(ids_N[real_N], routes_NLK[routed_N], known, int(mask_N[:prompt].sum())))
        return out

    def _end_of(self, ids_N: Array, prompt: int) -> int:
        """Where a row ends: the first of the padding tokens at its end is kept, it may be the end of the text."""
        if self.pad_token_id is None:
            return len(ids_N)
        text = np.flatnonzero(ids_N[prompt:] != self.pad_token_id)
        last = prompt + (int(text[-1]) + 1 if text.size else 0)
        return min(len(ids_N), last + 1)

    def check(self) -> None:
        """Raise where nothing of a rollout could be put together.

        Raises:
            ReplayError: beam search, assisted decoding and inputs without token ids cannot be followed.
        """
        if self.unreadable and not self.sequences:
            raise ReplayError(
                f"the rollout could not be followed: {self.unreadable} forwards had no token ids or did not continue "
                "their rows (beam search and assisted decoding reorder or cut them); sample without them, or give the "
                "routes yourself with system.replay.add(tokens, routes)"
            )
