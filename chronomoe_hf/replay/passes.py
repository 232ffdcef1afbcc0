"""Which pass a forward is, what its routers are told, and what is kept of it.

=========  ==================================================  ==========================================
pass       how it is known                                     what happens
=========  ==================================================  ==========================================
rollout    inside ``system.replay.rollout()`` (``attach`` puts  recorded
           it around the model's ``generate``)
old        no gradient, in training mode, adapters as trained  recorded; ``mode="rollout"`` repeats
gradient   gradient                                            ``"old"`` and ``"rollout"`` repeat
recompute  inside backward                                     as its own forward was
none       anything else: a reference (adapters off or         neither recorded nor repeated
           others), evaluation, ``torch.func``
=========  ==================================================  ==========================================

Shape suffixes: L layers that are compared, T rows of a router (tokens), K experts a token, B rows of a batch, S
positions of a row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, compiler, nn

from chronomoe_hf import private
from chronomoe_hf.config import ReplayConfig
from chronomoe_hf.errors import ReplayError
from chronomoe_hf.replay.adapters import AdapterWatch
from chronomoe_hf.replay.alignment import misaligned
from chronomoe_hf.replay.layers import ReplayLayer
from chronomoe_hf.replay.recompute import Pending, same_sets
from chronomoe_hf.replay.rollout import RolloutTape
from chronomoe_hf.replay.store import Array, Record, ReplayStore, Source, smallest_dtype
from chronomoe_hf.replay.sums import Pair, ReplaySums, position_class

Phase = Literal["none", "rollout", "old", "gradient", "recompute"]
COMPARED: dict[tuple[Source, str], Pair] = {
    ("rollout", "old"): "rollout_old",
    ("rollout", "gradient"): "rollout_gradient",
    ("old", "gradient"): "old_gradient",
}


@dataclass
class _Forward:
    """The running forward: its real rows, what is known of them, what its routers chose."""

    rows: list[tuple[Array, Array]] = field(default_factory=list)  # (places in T, token ids) of every row
    num: int = 0
    targets: dict[Source, Tensor] = field(default_factory=dict)  # small integers (L, T, K) on the device
    classes: dict[Source, Array] = field(default_factory=dict)
    own: dict[int, Tensor] = field(default_factory=dict)
    cut: dict[int, Tensor] = field(default_factory=dict)
    named: Mapping[str, Any] = field(default_factory=dict)
    past: int | None = 0  # tokens in the cache before it


class Passes:
    """Tells routers what to choose, and remembers what they chose; see the top of this file.

    Args:
        config: settings.
        root: the wrapped model.
        layers: all of its layers.
        compared: the layers whose choices are compared and repeated, see ``layers.replayable``.
        counts_own: what is recorded is the router's own choice, where it is told another one.
    """

    def __init__(
        self,
        config: ReplayConfig,
        root: nn.Module,
        layers: Sequence[ReplayLayer],
        compared: Sequence[ReplayLayer],
        counts_own: bool,
    ) -> None:
        self.config = config
        self.layers = {layer.layer_id: layer for layer in layers}
        self.column = {layer.layer_id: at for at, layer in enumerate(compared)}
        self.width = max((layer.top_k for layer in compared), default=1)
        self.dtype = smallest_dtype(max((layer.num_experts for layer in compared), default=1))
        self.small = {"int8": torch.int8, "int16": torch.int16, "int32": torch.int32}[self.dtype.name]
        self.store = ReplayStore(config.max_bytes)
        self.sums = ReplaySums(len(compared))
        self.pending = Pending()
        self.adapters = AdapterWatch(root)
        self.counts_own = counts_own
        self.phase: Phase = "none"
        self.tape: RolloutTape | None = None
        self.checked = False
        self.misaligned: str | None = None
        self._apart = 0
        self._forward = _Forward()

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle of the model takes no records with it."""
        fresh = {"store": ReplayStore(self.config.max_bytes), "pending": Pending(), "tape": None}
        return {**self.__dict__, **fresh, "_forward": _Forward(), "phase": "none"}

    # ---- which pass ----------------------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """See ``router.state.Replayer``."""
        if compiler.is_compiling():
            return False
        return self.phase != "none" or (self._remembers and private.in_backward())

    @property
    def repeats(self) -> Source | None:
        """The source whose choices the running pass repeats; None = it chooses itself."""
        if self.config.mode == "rollout" and self.phase in ("old", "gradient"):
            return "rollout"
        return "old" if self.config.mode == "old" and self.phase == "gradient" else None

    @property
    def _remembers(self) -> bool:
        return self.config.mode in ("old", "rollout") or self.config.recompute != "off"

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Forwards in here are of no pass: neither recorded nor repeated."""
        self._apart += 1
        try:
            yield
        finally:
            self._apart -= 1

    def _phase(self, training: bool) -> Phase:
        if private.in_backward():
            return "recompute"
        if self._apart or private.in_transform():
            return "none"
        if self.tape is not None:
            return "rollout"
        if torch.is_grad_enabled():
            self.adapters.training()
            return "gradient"
        if self.config.mode == "off" or not training or self.adapters.elsewhere:
            return "none"
        return "old"

    # ---- a forward ------------------------------------------------------------------------------------------------

    def open(self, training: bool, named: Mapping[str, Any], mask_T: Tensor | None) -> None:
        """The owner's forward begins.

        Args:
            training: it is in training mode.
            named: its arguments by name.
            mask_T: bool, real tokens; None = all are.

        Raises:
            ReplayError: the pass needs records, and its rows cannot be looked up (packed rows, no token ids), or
                ``on_missing="raise"`` and there are none; or a recompute did not match its forward.
        """
        self.abandon()
        if compiler.is_compiling():
            return
        self.phase = self._phase(training)
        past = _cached(named) if self.phase in ("old", "rollout") else 0
        if self.phase == "old" and past:
            self.phase = "none"  # a step of somebody else's generation
        if self.phase == "none":
            return
        self.sums.count(self.phase)
        self._forward = _Forward(named=named, past=past)
        if self.phase == "gradient":
            if self.config.mode != "off":
                self.pending.check()
            self.pending.begin()
        if self.phase in ("old", "gradient") and self.config.mode != "off":
            self._read_rows(named, mask_T)
            for source in self._sources():
                self._aim(source)

    def _sources(self) -> tuple[Source, ...]:
        if self.config.mode == "measure":
            return ("rollout",) if self.phase == "old" else ("rollout", "old")
        if self.config.mode == "rollout":
            return ("rollout",)
        return ("old",) if self.phase == "gradient" else ()

    def _read_rows(self, named: Mapping[str, Any], mask_T: Tensor | None) -> None:
        ids = named.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise ReplayError(
                "replay looks rows up by their token ids, and this forward was given none (inputs_embeds, or a model "
                "with images, where equal ids can mean different inputs); use replay.mode='off' here"
            )
        packed = any(named.get(name) is not None for name in ("cu_seq_lens_q", "cu_seqlens", "seq_idx"))
        positions = named.get("position_ids")
        unmasked = named.get("attention_mask") is None
        if unmasked and isinstance(positions, Tensor) and positions.shape == ids.shape and ids.shape[1] > 1:
            packed = packed or bool((positions[:, 1:] <= positions[:, :-1]).any())
        if packed:
            raise ReplayError(
                "replay looks rows up from their first token on, and these rows are packed (several texts in one); "
                "switch packing, padding-free batches and shared prefixes off, or use replay.mode='off'"
            )
        ids_BS = ids.cpu().numpy().astype(np.int64)
        mask_BS = np.ones_like(ids_BS, dtype=bool) if mask_T is None else mask_T.cpu().numpy().reshape(ids_BS.shape)
        self._forward.num = ids_BS.size
        for at, (ids_S, mask_S) in enumerate(zip(ids_BS, mask_BS, strict=True)):
            places = np.flatnonzero(mask_S)
            self._forward.rows.append((places + at * ids_BS.shape[1], ids_S[places]))

    def _aim(self, source: Source) -> None:
        """Look every row up and lay what is known of it out for the routers."""
        forward = self._forward
        target_TLK = np.full((forward.num, len(self.column), self.width), -1, dtype=self.dtype)
        position_T = np.full(forward.num, -1, dtype=np.int64)
        wanted = covered = unknown = 0
        for places, tokens in forward.rows:
            match = self.store.find(source, tokens)
            routed = 0 if match is None else match.routed
            if match is not None and match.record.routes_NLK is not None and routed:
                target_TLK[places[:routed]] = match.record.routes_NLK[:routed]
                if match.record.prompt:
                    position_T[places[:routed]] = np.arange(routed) - match.record.prompt
            need = max(0, len(tokens) - 1)  # what the last token chooses is used by no logit that counts
            wanted, covered = wanted + need, covered + min(routed, need)
            unknown += routed < (1 if match is None or not match.record.prompt else match.record.prompt)
        device = forward.named["input_ids"].device
        forward.targets[source] = torch.from_numpy(target_TLK).to(device).permute(1, 0, 2)
        forward.classes[source] = position_class(np.maximum(position_T, -1))
        if source == (self.repeats or "rollout"):
            self._account(source, wanted, covered, unknown)

    def _account(self, source: Source, wanted: int, covered: int, unknown: int) -> None:
        rows = len(self._forward.rows)
        self.sums.wanted += wanted
        self.sums.covered += covered
        self.sums.rows += rows
        self.sums.unknown_rows += unknown
        self.sums.repeated += covered if self.repeats else 0
        if self.config.on_missing == "raise" and self.repeats and covered < wanted:
            raise ReplayError(
                f"replay.on_missing='raise': of {wanted} tokens of this {self.phase} pass {wanted - covered} have no "
                f"record of the {source} pass ({unknown} of {rows} rows are unknown; {self.store.count(source)} "
                f"records are kept, {self.store.dropped} went because of max_bytes); see docs/replay.md"
            )

    def given(self, layer_id: int, own_TK: Tensor, masked_E: Tensor | None) -> Tensor | None:
        """See ``router.state.Replayer``."""
        layer = self.layers[layer_id]
        if self.phase in ("none", "recompute"):
            if not (self._remembers and private.in_backward()):
                return None
            return self.pending.recompute(layer_id, own_TK, layer.name, self.config.mode in ("old", "rollout"))
        forward = self._forward
        if layer_id in forward.own and self.config.mode != "off":
            raise ReplayError(f"{layer.name} is called twice in one forward: choices cannot be told apart there")
        forward.own[layer_id] = own_TK
        given_TK = self._target(layer_id, own_TK, masked_E)
        if self.phase == "gradient" and self._remembers:
            if self.config.recompute == "pin" and not layer.samples:
                told_TK = torch.full_like(own_TK, -1) if given_TK is None else given_TK
                given_TK = torch.where((told_TK < 0).any(-1, keepdim=True), own_TK, told_TK)
            self.pending.remember(layer_id, own_TK, given_TK)
        return given_TK

    def _target(self, layer_id: int, own_TK: Tensor, masked_E: Tensor | None) -> Tensor | None:
        """What this pass repeats in a layer; rows that were not recorded, or hold a cut expert, are -1."""
        source = self.repeats
        if source is None or layer_id not in self.column or source not in self._forward.targets:
            return None
        target_TK = self._forward.targets[source][self.column[layer_id], :, : own_TK.shape[-1]].to(own_TK.device).long()
        if target_TK.shape != own_TK.shape:
            raise ReplayError(
                f"{self.layers[layer_id].name} routes {own_TK.shape[0]} rows, the batch has {target_TK.shape[0]} "
                "tokens: they are split over ranks or dropped inside the model (context or sequence parallel); use "
                "replay.mode='off' there"
            )
        if masked_E is not None:
            cut_T1 = (masked_E[target_TK.clamp_min(0)] & (target_TK >= 0)).any(-1, keepdim=True)
            self._forward.cut[layer_id] = cut_T1[:, 0]
            zero = torch.zeros((), dtype=torch.float64, device=own_TK.device)
            self.sums.masked[layer_id] = self.sums.masked.get(layer_id, zero) + cut_T1.sum()
            target_TK = target_TK.masked_fill(cut_T1, -1)
        return target_TK

    def close(self) -> None:
        """The owner's forward has ended: compare and keep.

        Raises:
            ReplayError: the first records of an engine are not of these tokens, layers or weights.
        """
        try:
            with torch.no_grad():
                self._close()
        finally:
            self.abandon()

    def _close(self) -> None:
        forward = self._forward
        if self.phase == "rollout" and self.tape is not None and forward.own:
            ids, mask = forward.named.get("input_ids"), forward.named.get("attention_mask")
            ids_BS = ids if isinstance(ids, Tensor) and ids.dim() == 2 else None
            mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
            self.tape.forward(ids_BS, mask, self._stacked(), forward.past)
        if self.phase not in ("old", "gradient") or not forward.rows:
            return
        own_LTK = self._stacked()
        for source, target_LTK in forward.targets.items():
            self._compare(source, target_LTK, own_LTK)
        if self.phase == "old" and self.config.mode in ("old", "measure"):
            routes_TLK = own_LTK.permute(1, 0, 2).cpu().numpy().astype(self.dtype)
            for places, tokens in forward.rows:
                self.store.add("old", Record(tokens, routes_TLK[places]))

    def _stacked(self) -> Tensor:
        """What all compared layers chose themselves, small integers ``(L, T, K)``; -1 beyond a layer's k."""
        parts = []
        for layer_id in self.column:
            own_TK = self._forward.own.get(layer_id)
            if own_TK is None:
                raise ReplayError(f"{self.layers[layer_id].name} did not run in this forward; its choice is not known")
            part = own_TK.to(self.small)
            parts.append(nn.functional.pad(part, (0, self.width - part.shape[-1]), value=-1))
        home = parts[0].device
        return torch.stack([part.to(home) for part in parts])

    def _compare(self, source: Source, target_LTK: Tensor, own_LTK: Tensor) -> None:
        forward, device = self._forward, own_LTK.device
        target_LTK = target_LTK.to(device)
        known_LT = target_LTK[..., 0] >= 0
        for layer_id, cut_T in forward.cut.items():
            known_LT[self.column[layer_id]] &= ~cut_T.to(device)
        differs_LT = ~same_sets(target_LTK, own_LTK)
        pair = COMPARED[source, self.phase]
        class_T = torch.from_numpy(forward.classes[source]).to(device)
        self.sums.pair(pair, device).add(differs_LT, known_LT, class_T)
        if source == "rollout" and not self.checked:
            self._check_alignment(target_LTK, own_LTK, differs_LT, known_LT)

    def _check_alignment(self, target_LTK: Tensor, own_LTK: Tensor, differs_LT: Tensor, known_LT: Tensor) -> None:
        known, differs = int(known_LT.sum()), int((differs_LT & known_LT).sum())
        if not known:
            return
        self.checked = True
        if differs / known <= self.config.max_mismatch:
            return
        rows = [places for places, _ in self._forward.rows]
        repeated = self.repeats is not None
        self.misaligned = misaligned(target_LTK, own_LTK, rows, differs / known, self.config.max_mismatch, repeated)
        if self.config.mode == "rollout":
            raise ReplayError(self.misaligned)

    def abandon(self) -> None:
        """Forget the running forward."""
        self.phase = "none"
        self._forward = _Forward()


def _cached(named: Mapping[str, Any]) -> int | None:
    cache = named.get("past_key_values")
    if cache is None:
        return 0
    length = getattr(cache, "get_seq_length", None)
    return int(length()) if callable(length) else None
