"""GRPO with replay under torchrun: ``replay_worker.py output_dir``.

Ranks sample completions of different lengths; in the last run the engine of rank 1 hands out no routes.
"""

from __future__ import annotations

import copy
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from replay.grpo_job import Passes, make, tokenizer
from support import gloo_exit, models
from torch import Tensor

import chronomoe_hf
from chronomoe_hf import ChronoConfig

LENGTHS = (8, 4)
"""Longest completion on each rank."""
RUNS = {"rollout": "rollout", "old": "old", "silent": "rollout"}


class Recount(Passes):
    """Counts per layer, on this rank, real tokens and those whose native choice is not the used one."""

    def __init__(self, trainer: Any, system: Any) -> None:
        self.hidden: list[dict[int, Tensor]] = []
        self.differs: dict[str, list[int]] = {}
        self.tokens: dict[str, int] = {}
        self.rows: dict[str, int] = {}
        for layer in system.layers:
            layer.router.register_forward_pre_hook(self._saw(layer.layer_id))
        super().__init__(trainer, system)

    def _saw(self, layer_id: int) -> Any:
        def hook(module: Any, args: Any) -> None:
            if torch._C._current_graph_task_id() == -1:
                if layer_id == 0:
                    self.hidden.append({})
                self.hidden[-1][layer_id] = args[0].detach().reshape(-1, args[0].shape[-1])

        return hook

    def _logps(self, model: Any, input_ids: Tensor, attention_mask: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.hidden.clear()
        result = super()._logps(model, input_ids, attention_mask, *args, **kwargs)
        kind = "gradient" if torch.is_grad_enabled() else "old"
        real = attention_mask.reshape(-1).bool()
        differs = self.differs.setdefault(kind, [0] * len(self.system.layers))
        for layer in self.system.layers:
            at = layer.layer_id
            hidden = torch.cat([call[at] for call in self.hidden])
            used = torch.cat([call[at] for call in self.calls])
            native = (hidden @ layer.adapter.weight(layer.router).T).topk(used.shape[-1]).indices.sort(-1)[0]
            differs[at] += int((native != used).any(-1)[real].sum())
        self.tokens[kind] = self.tokens.get(kind, 0) + int(real.sum())
        self.rows[kind] = self.rows.get(kind, 0) + len(input_ids)
        return result


def silent_engine(model: Any, rank: int) -> Any:
    """A ``rollout_func`` of a copy of the model in bf16: on rank 1 it hands out no routes."""
    engine, words = copy.deepcopy(model).to(torch.bfloat16).eval(), tokenizer()
    chronomoe_hf.wrap(engine, ChronoConfig.observe(replay__mode="measure"))

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        replay = chronomoe_hf.system_of(engine).replay
        engine.load_state_dict(trainer.accelerator.unwrap_model(trainer.model).state_dict())
        out: dict[str, list[Any]] = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "routed_experts": []}
        for prompt in prompts:
            ids = torch.tensor([words(prompt)["input_ids"]])
            with replay.rollout(pad_token_id=0) as tape, torch.no_grad():
                done = engine.generate(
                    ids, max_new_tokens=LENGTHS[rank], min_new_tokens=LENGTHS[rank], do_sample=True, pad_token_id=0
                )
                tape.end(done)
            (record,) = tape.records(replay.passes.dtype)
            out["prompt_ids"].append(ids[0].tolist())
            out["completion_ids"].append(record.tokens_N[ids.shape[1] :].tolist())
            out["logprobs"].append(record.logps_N[ids.shape[1] :].tolist())  # type: ignore[index]
            out["routed_experts"].append(None if rank else record.routes_NLK)
        return out

    return rollout


def run(name: str, mode: str, directory: Path, rank: int) -> dict[str, Any]:
    """One training; what this rank counted, and what its window says."""
    torch.manual_seed(0)
    model = models.tiny_model("qwen3_moe", num_experts_per_tok=2)
    fields: dict[str, Any] = {"num_iterations": 2, "gradient_checkpointing": True, "beta": 0.0}
    if name == "silent":
        fields["rollout_func"] = silent_engine(model, rank)
    trainer = make("GRPO", model, directory / name / str(rank), **fields)
    # No row ends early: then of every row all tokens but the last are routed by the rollout.
    trainer.generation_config.max_new_tokens = trainer.generation_config.min_new_tokens = LENGTHS[rank]
    callback = chronomoe_hf.attach(trainer, ChronoConfig.observe(interval=2, replay__mode=mode))
    system = callback.system
    assert system is not None
    recount = Recount(trainer, system)
    windows: list[dict[str, Any]] = []
    window = system.replay.window
    system.replay.window = lambda device: windows.append(window(device)) or windows[-1]
    trainer.train()
    return {
        "windows": windows,
        "flips": recount.flips,
        "choices": recount.choices,
        "ratios": recount.ratios,
        "differs": recount.differs,
        "tokens": recount.tokens,
        "rows": recount.rows,
        "lengths": sorted({int(call[1].shape[0]) for call in recount.before.values()}),
        "alerts": {alert.kind: alert.detail for alert in system.alerts.active},
    }


def main(output_dir: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    found = {name: run(name, mode, Path(output_dir), rank) for name, mode in RUNS.items()}
    torch.save(found, Path(output_dir, f"{rank}.pt"))
    gloo_exit.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
