"""``system.replay``: what a loop of one's own, ``attach`` and engines use.

Shape suffixes: B rows of a batch, S positions of a row, C positions of a completion, N tokens of a row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from chronomoe_hf import distributed
from chronomoe_hf.config import ReplayConfig
from chronomoe_hf.errors import ConfigError, ReplayError, shown
from chronomoe_hf.replay.layers import ReplayLayer, replayable
from chronomoe_hf.replay.passes import Passes
from chronomoe_hf.replay.rollout import RolloutTape
from chronomoe_hf.replay.sources import Axis, read_routes
from chronomoe_hf.replay.store import Record, ReplayStore, Source
from chronomoe_hf.replay.sums import LogpSums, Pair, ReplaySums


class Replay:
    """Choices of another pass, for one wrapped model on one rank.

    Args:
        config: settings.
        root: the wrapped model.
        layers: all of its layers.
        num_owners: modules whose forward owns routers.
        counts_own: what is recorded is the router's own choice, where it is told another one (the balance law moves
            biases by it, and a choice that they cannot change would wind it up).

    Attributes:
        passes: what the routers ask.
        invalid: what was wrong with the routes that engines handed out since the last window; None = nothing.

    Raises:
        UnsupportedArchitectureError, ConfigError: see ``replay.layers.replayable``.
    """

    def __init__(
        self,
        config: ReplayConfig,
        root: nn.Module,
        layers: Sequence[ReplayLayer],
        num_owners: int = 1,
        counts_own: bool = False,
    ) -> None:
        self.config = config
        self.root = root
        compared = replayable(layers, config, num_owners, type(root).__name__) if config.on else []
        self.passes = Passes(config, root, layers, compared, counts_own)
        text = getattr(root, "config", None)
        text = getattr(text, "text_config", None) or text
        self.axis = Axis(layers, compared, getattr(text, "num_hidden_layers", None), config.layers)
        self.invalid: str | None = None
        self.num_invalid = 0

    @property
    def on(self) -> bool:
        """Whether anything is compared or repeated."""
        return self.config.on

    @property
    def store(self) -> ReplayStore:
        """The records."""
        return self.passes.store

    # ---- records ---------------------------------------------------------------------------------------------------

    def add(
        self,
        tokens: Any,
        routes: Any,
        *,
        logps: Any = None,
        prompt: int = 0,
        start: int = 0,
    ) -> None:
        """Keep what an engine chose for one row.

        Args:
            tokens: ids of the row as the trainer will see it, prompt and completion, without padding.
            routes: ``(tokens or tokens - 1, layers, k)`` as an array, a tensor, base64 of ``.npy`` (vLLM) or of int32
                (SGLang), or the prompt's and completion's parts as a pair (vLLM 0.21); None = the engine returned none.
            logps: log-probabilities of the completion's tokens by the engine, or None.
            prompt: tokens of the prompt.
            start: first token that the routes are about.

        Raises:
            ConfigError: replay is off.
            ReplayError: the routes do not fit the row or the model.
        """
        self._require_mode("add")
        tokens_N = _tokens(tokens)
        if routes is None:
            self._note(len(tokens_N), "the engine returned no routes (start it with --enable-return-routed-experts)")
            return
        read = read_routes(routes, len(tokens_N), self.axis, self.passes.dtype, start)
        if read.invalid is not None:
            self._note(read.num_invalid, read.invalid)
        logps_N = None
        if logps is not None:
            tail = np.asarray(logps, dtype=np.float32).reshape(-1)
            if len(tail) > len(tokens_N):
                raise ReplayError(f"{len(tail)} log-probabilities for a row of {len(tokens_N)} tokens")
            logps_N = np.full(len(tokens_N), np.nan, dtype=np.float32)
            logps_N[len(tokens_N) - len(tail) :] = tail
            prompt = prompt or len(tokens_N) - len(tail)
        self.store.add("rollout", Record(tokens_N, read.routes_RLK, logps_N, prompt))

    def _note(self, num: int, words: str) -> None:
        self.num_invalid += num
        self.invalid = words

    def _require_mode(self, verb: str) -> None:
        if self.config.mode == "off":
            raise ConfigError(
                f"system.replay.{verb} needs ReplayConfig(mode=...), for example "
                "ChronoConfig.observe(replay__mode='measure')"
            )

    @contextlib.contextmanager
    def rollout(self, temperature: float = 1.0, pad_token_id: int | None = None) -> Iterator[RolloutTape]:
        """Around ``model.generate``: what its routers choose is the record of its rows.

        ``attach`` does this for a Trainer that generates with Transformers.

        Args:
            temperature: of the sampling.
            pad_token_id: that fills finished rows; None = the model's.

        Raises:
            ConfigError: replay is off.
            ReplayError: nothing of the rollout could be followed.
        """
        self._require_mode("rollout")
        if pad_token_id is None:
            known = getattr(getattr(self.root, "config", None), "pad_token_id", None)
            pad_token_id = known if isinstance(known, int) else None
        tape = RolloutTape(temperature, pad_token_id)
        before, self.passes.tape = self.passes.tape, tape
        hook = self.root.register_forward_hook(_read_logits(tape))
        try:
            yield tape
        finally:
            hook.remove()
            self.passes.tape = before
        tape.check()
        for record in tape.records(self.passes.dtype):
            self.store.add("rollout", record)

    def apart(self) -> contextlib.AbstractContextManager[None]:
        """Around forwards that are none of the policy's (a teacher, a reference of your own)."""
        return self.passes.apart()

    # ---- log-probabilities -----------------------------------------------------------------------------------------

    def logps(self, tokens_BS: Tensor, mask_BS: Tensor, logps_BC: Tensor, gradient: bool) -> None:
        """Log-probabilities of completions in the old-policy or the gradient pass: compared with those before.

        Args:
            tokens_BS: prompt and completion.
            mask_BS: their attention mask.
            logps_BC: of the last C tokens.
            gradient: of the gradient pass.
        """
        tokens_BS, mask_BS = tokens_BS.cpu(), mask_BS.cpu() != 0
        logps = logps_BC.detach().float().cpu().numpy()
        num = logps.shape[1]
        for tokens_S, mask_S, logps_C in zip(tokens_BS.numpy(), mask_BS.numpy(), logps, strict=True):
            full_S = np.full(len(tokens_S), np.nan, dtype=np.float32)
            full_S[len(full_S) - num :] = logps_C
            tokens_N, logps_N = tokens_S[mask_S].astype(np.int64), full_S[mask_S]
            pairs: list[tuple[Source, Pair]] = [("rollout", "rollout_old")]
            if gradient:
                pairs = [("rollout", "rollout_gradient"), ("old", "old_gradient")]
            for source, pair in pairs:
                match = self.store.find(source, tokens_N)
                if match is not None and match.record.logps_N is not None:
                    sums = self.passes.sums.logps.setdefault(pair, LogpSums())
                    sums.add(match.record.logps_N[: match.length], logps_N[: match.length])
            if not gradient:
                self.store.add("old", Record(tokens_N, None, logps_N))

    # ---- the window ------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Before the optimizer moves: raise where a recompute was not of its forward (see ``Pending.check``)."""
        if self.config.mode in ("old", "rollout") or self.config.recompute == "pin":
            self.passes.pending.check()

    def stepped(self) -> None:
        """After an optimizer step: what waits for a backward will see none any more."""
        self.check()
        self.passes.pending.clear()

    def window(self, device: torch.device) -> dict[str, Any] | None:
        """Everything since the last window, over all ranks; it starts at zero again. Collective, unless replay is off.

        Args:
            device: where the collective runs.

        Returns:
            The record that ``docs/replay.md`` describes; None while replay is off.
        """
        if not self.on:
            return None
        sums, pending = self.passes.sums, self.passes.pending
        sums.recompute_flips, sums.recompute_tokens = pending.flips, pending.seen
        record = sums.reduced(len(self.axis.layers), device)
        record["layers"] = [layer.layer_id for layer in self.axis.compared]
        record["mode"], record["recompute_mode"] = self.config.mode, self.config.recompute
        record |= self._said()
        self.passes.sums = ReplaySums(len(self.axis.compared))
        pending.flips, pending.seen = {}, {}
        self.invalid, self.num_invalid = None, 0
        return record

    def _said(self) -> dict[str, Any]:
        """What the ranks' stores hold, and what was wrong with their engines' routes, on every rank. Collective."""
        store = {"records": len(self.store), "bytes": self.store.nbytes, "dropped": self.store.dropped}
        mine = {"store": store, "num": self.num_invalid, "why": self.invalid, "misaligned": self.passes.misaligned}
        ranks: list[Any] = distributed.gather_objects(mine)
        words = [rank["why"] for rank in ranks if rank["why"]]
        return {
            "store": {name: sum(rank["store"][name] for rank in ranks) for name in store},
            "invalid": {"tokens": sum(rank["num"] for rank in ranks), "why": words[0]} if words else None,
            "misaligned": next((rank["misaligned"] for rank in ranks if rank["misaligned"]), None),
        }

    def discard(self) -> None:
        """Throw away what waits and what was summed; the records stay."""
        self.passes.abandon()
        self.passes.pending.clear()
        self.passes.sums = ReplaySums(len(self.axis.compared))


def _tokens(tokens: Any) -> Any:
    array = tokens.detach().cpu().numpy() if isinstance(tokens, Tensor) else np.asarray(tokens)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer) or not array.size:
        raise ReplayError(f"tokens are the ids of one row, a list or 1-D array of integers, got {shown(tokens)}")
    return array.astype(np.int64)


def _read_logits(tape: RolloutTape) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        logits = getattr(output, "logits", None)
        if isinstance(logits, Tensor) and logits.dim() == 3:
            tape.logits(logits)

    return hook
