"""One rank of benchmarks/throughput/run.py: steps under Transformers' expert parallelism, with and without balance.

All models come from one checkpoint; their steps alternate. The batch differs from rank to rank (data parallel), the
experts are split between the ranks, and every layer sends each token to the rank that holds its expert.

Legend: L layers, E experts.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.models.qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from support import gloo_exit

import chronomoe_hf
from throughput.model import ARMS, arm_config


def skewed_model(shape: dict[str, int], skew: float) -> Qwen3MoeForCausalLM:
    """A Qwen3-MoE whose embeddings share a direction; the routers of the first rank's experts are turned towards it."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": shape["hidden"] // 4}
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=shape["hidden"],
        intermediate_size=shape["width"],
        moe_intermediate_size=shape["width"],
        num_hidden_layers=shape["layers"],
        num_experts=shape["experts"],
        num_experts_per_tok=shape["top_k"],
        use_cache=False,
        **heads,
    )
    model = Qwen3MoeForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    shared = torch.nn.functional.normalize(torch.randn(shape["hidden"], generator=generator), dim=0)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(generator=generator).add_(4 * shared)
        for layer in model.model.layers:
            weight = layer.mlp.gate.weight.normal_(0, 0.3, generator=generator)
            weight -= (weight @ shared)[:, None] * shared
            weight[: shape["experts"] // 2] += skew * shared
    return model


class Arm:
    """One model under expert parallelism."""

    def __init__(self, directory: str, arm: str, shape: dict[str, int]) -> None:
        size = dist.get_world_size()
        layout = DistributedConfig(fsdp_size=size, ep_size=size)
        self.model = AutoModelForCausalLM.from_pretrained(directory, distributed_config=layout).train()
        chronomoe_hf.wrap(self.model, arm_config(arm))
        self.system = chronomoe_hf.system_of(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        self.shape, self.steps = shape, 0

    def step(self, batch: int) -> dict[str, Any]:
        """One optimizer step on `batch` sequences a rank: its time on every rank, and the counts of all ranks."""
        self.steps += 1
        generator = torch.Generator().manual_seed(1000 * self.steps + dist.get_rank())
        ids = torch.randint(2, 512, (batch, self.shape["length"]), generator=generator)
        dist.barrier()
        start, start_cpu = time.perf_counter(), time.process_time()
        self.model(input_ids=ids, labels=ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        count_LE = self._counts()
        self.system.step(self.steps)
        cpu = time.process_time() - start_cpu
        dist.barrier()
        seconds = time.perf_counter() - start
        every = [torch.zeros(1, dtype=torch.float64) for _ in range(dist.get_world_size())]
        dist.all_gather(every, torch.tensor([cpu], dtype=torch.float64))
        dist.all_reduce(count_LE)
        return {"seconds": seconds, "cpu": [float(each) for each in every], "counts": count_LE.tolist()}

    def _counts(self) -> Tensor:
        """Assignments since the last step on this rank, int64 (L, E)."""
        sums_LR = self.system.sums.on("train", self.system.step_state.device)
        return sums_LR[:, : self.shape["experts"]].long()


def measure(place: Path, shape: dict[str, int], skew: float, settle: int, pairs: int) -> dict[str, Any]:
    """`settle` steps of each arm on one sequence a rank, then `pairs` rounds of one step of each arm."""
    if dist.get_rank() == 0:
        skewed_model(shape, skew).save_pretrained(place / f"skew{skew}")
    dist.barrier()
    arms = {name: Arm(str(place / f"skew{skew}"), name, shape) for name in ARMS}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in ARMS}
    settling = {name: [arm.step(1)["counts"] for _ in range(settle)] for name, arm in arms.items()}
    for pair in range(pairs):
        for name in list(arms) if pair % 2 == 0 else list(reversed(arms)):
            rows[name].append(arms[name].step(shape["batch"]))
    experts = type(arms["none"].model.model.layers[0].mlp.experts).__name__
    local = arms["none"].model.model.layers[0].mlp.experts.num_experts
    return {"skew": skew, "rows": rows, "settling": settling, "experts": experts, "local_experts": local}


def main() -> None:
    """``worker.py JOB OUTPUT``: both JSON files; the job is what `measure` takes for several skews."""
    job_file, output = map(Path, sys.argv[1:])
    job = json.loads(job_file.read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dist.init_process_group("gloo")
    found = []
    for skew in job["skews"]:
        found.append(measure(job_file.parent, job["shape"], skew, job["settle"], job["pairs"]))
    if dist.get_rank() == 0:
        output.write_text(json.dumps(found), encoding="utf-8")
    gloo_exit.leave()


if __name__ == "__main__":
    main()
