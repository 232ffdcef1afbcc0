"""Who counts right: moewatch, forward hooks, router logits and chronomoe_hf against a recount, and what each costs.

Every tool sees the same training run (same weights, same data, one fresh model per tool) and is compared with a
token-by-token recount of that run. The cost of a step is measured in one process, steps of all arms in turn.

    python benchmarks/rivals/run.py [--case padded ...] [--rounds 60] [--output DIRECTORY]

moewatch is installed from the package index into a temporary folder; where that fails the table says so.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import logging
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import Trainer, TrainingArguments
from transformers.models.qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import _text_job as job

from chronomoe_hf import ChronoConfig
from rivals import recount as recounting
from rivals import table, tools

STEPS = 4
SMALL = job.ModelSize(layers=2, hidden=32, intermediate=16, heads=2, experts=8, top_k=2, vocab=400, length=32)
K8 = job.ModelSize(layers=2, hidden=32, intermediate=16, heads=2, experts=32, top_k=8, vocab=400, length=32)
RIVALS: tuple[type[tools.Tool], ...] = (
    tools.Ours,
    tools.Hooks,
    tools.RouterLogits,
    tools.CarefulLogits,
    tools.MoEWatch,
)


def make_model(arch: str, size: job.ModelSize, seed: int = 0) -> Any:
    """A small model whose routers tell tokens apart, and whose first expert in each layer gets no token.

    All embeddings share a direction; the row of the first expert in every router points against it.
    """
    model = job.build_model(arch, size, seed=seed)
    model.config.output_router_logits = False
    generator = torch.Generator().manual_seed(seed)
    shared = torch.nn.functional.normalize(torch.randn(size.hidden, generator=generator), dim=0)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.normal_(generator=generator).add_(4 * shared)
        for router in recounting.routers_of(model):
            router.weight.normal_(0, 0.3, generator=generator)
            router.weight -= (router.weight @ shared)[:, None] * shared
            router.weight[0] = -4 * shared
            if hasattr(router, "e_score_correction_bias"):
                router.e_score_correction_bias.normal_(0, 0.2, generator=generator)
    return model


def arguments(directory: str, **fields: Any) -> dict[str, Any]:
    """What every trainer here is given."""
    common = {
        "output_dir": directory,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": False,
    }
    return {**common, **fields}


def rows(length: int, count: int, ragged: bool) -> list[dict[str, Any]]:
    """Blocks of real text; with `ragged` row i keeps its first tokens only and is padded on the right."""
    tokenizer = _tokenizer()
    stream = tokenizer(" ".join(job.load_text("prose")["train"]["text"][:60]))["input_ids"]
    made = []
    for at in range(count):
        ids = torch.tensor(stream[at * length : (at + 1) * length])
        mask = torch.ones_like(ids)
        if ragged:
            mask[6 + (7 * at) % (length - 6) :] = 0
        made.append({"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return made


def _tokenizer() -> Any:
    if not hasattr(_tokenizer, "made"):
        _tokenizer.made = job.build_tokenizer(job.load_text("prose")["train"]["text"], SMALL.vocab)
    return _tokenizer.made


def plain(
    directory: str, *, arch: str = "mixtral", size: job.ModelSize = SMALL, ragged: bool = False, **fields: Any
) -> Any:
    """Transformers' Trainer on blocks of text."""
    data = rows(size.length, 64, ragged)
    model = make_model(arch, size)
    made = TrainingArguments(**arguments(directory, **fields))
    return Trainer(model, made, train_dataset=data, eval_dataset=data[:12])


def preferences(directory: str, kind: str) -> Any:
    """DPOTrainer or GRPOTrainer of TRL on a saved and reloaded Mixtral."""
    import trl

    words = " ".join(job.load_text("prose")["train"]["text"][:40]).split()

    def pick(at: int, length: int) -> str:
        return " ".join(words[at * 7 % 400 :][:length])

    data = [
        {
            "prompt": pick(i, 3 + i % 4),
            "chosen": " " + pick(i + 50, 2 + i % 7),
            "rejected": " " + pick(i + 90, 2 + i % 5),
        }
        for i in range(32)
    ]
    model = make_model("mixtral", SMALL)
    model.save_pretrained(Path(directory) / "start")
    model = type(model).from_pretrained(Path(directory) / "start").train()
    fields: dict[str, Any] = {"gradient_checkpointing": False}
    extra: dict[str, Any] = {}
    if kind == "GRPO":
        data = [{"prompt": row["prompt"]} for row in data]
        fields |= {"max_completion_length": 8, "num_generations": 2}
        extra["reward_funcs"] = lambda completions, **_: [float(len(set(text))) for text in completions]
    return getattr(trl, f"{kind}Trainer")(
        model=model,
        args=getattr(trl, f"{kind}Config")(**arguments(directory, **fields)),
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=_tokenizer(),
        **extra,
    )


def checkpointed(reentrant: bool) -> dict[str, Any]:
    """Activation checkpointing of one kind."""
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}


CASES: dict[str, Callable[[str], Any]] = {
    "plain": lambda d: plain(d),
    "padded": lambda d: plain(d, ragged=True),
    "accumulated": lambda d: plain(d, gradient_accumulation_steps=4),
    "checkpointed": lambda d: plain(d, **checkpointed(False)),
    "checkpointed, reentrant": lambda d: plain(d, **checkpointed(True)),
    "evaluated": lambda d: plain(d, eval_strategy="steps", eval_steps=2),
    "k = 8": lambda d: plain(d, arch="qwen3_moe", size=K8),
    "DeepSeek-V3's router": lambda d: plain(d, arch="deepseek_v3"),
    "DPO": lambda d: preferences(d, "DPO"),
    "GRPO": lambda d: preferences(d, "GRPO"),
}


def compare(case: str, kind: type[tools.Tool]) -> dict[str, Any]:
    """Train the case once with the tool on it; its reading against the recount of the same run."""
    row: dict[str, Any] = {"case": case, "tool": kind.name}
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.set_seed(0)
        trainer = CASES[case](directory)
        recount = recounting.Recount(trainer)
        tool = tools.Ours(STEPS) if kind is tools.Ours else kind()
        try:
            tool.attach(trainer)
            trainer.train()
            got = tool.read()
        except Exception as error:  # a rival that cannot do a case is a row of the table
            if kind is tools.Ours:
                raise
            return {**row, "error": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
    row["trainer_asks"] = bool(getattr(trainer, "aux_loss_enabled", False))
    row["first_loss"] = trainer.state.log_history[0]["loss"]
    row["first_choices"] = got.counts == recount.first_choices()
    return {**row, **table.errors(got, recount.reading(got.per_token))}


def timing_model() -> Qwen3MoeForCausalLM:
    """Two layers of 32 experts, k = 4, hidden size 256."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64}
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(vocab_size=512, num_experts=32, num_experts_per_tok=4, **sizes, **heads)
    ).train()


def cost(kinds: list[type[tools.Tool]], rounds: int) -> list[dict[str, Any]]:
    """Median ratio of a step to the untouched model's in the same round; the order turns from round to round."""
    ids = torch.randint(2, 512, (4, 128), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    base = timing_model()
    arms: dict[str, tuple[Any, tools.Tool | None, Any]] = {}
    for name, kind in {"untouched": None, "untouched, a copy": None, **{k.name: k for k in kinds}}.items():
        model = copy.deepcopy(base)
        tool = kind() if kind is not None else None
        if tool is not None:
            tool.start(model)
        arms[name] = (model, tool, torch.optim.SGD(model.parameters(), lr=1e-4))
    wall: dict[str, list[float]] = {name: [] for name in arms}
    cpu: dict[str, list[float]] = {name: [] for name in arms}
    order = list(arms)
    for number in range(1, rounds + 3):
        for name in order:
            model, tool, optimizer = arms[name]
            start, start_cpu = time.perf_counter(), time.process_time()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if tool is not None:
                tool.step(number)
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - start_cpu)
        order = order[1:] + order[:1]
    found = []
    for name in list(arms)[1:]:
        row: dict[str, Any] = {"tool": name}
        for clock, seconds in (("wall", wall), ("cpu", cpu)):
            ratios = [a / b for a, b in zip(seconds[name][2:], seconds["untouched"][2:], strict=True)]
            row[clock] = [round(value, 4) for value in statistics.quantiles(ratios, n=4)]
        row["cpu_of_all"] = round(sum(cpu[name][2:]) / sum(cpu["untouched"][2:]), 4)
        found.append(row)
    return found


def main() -> None:
    """Measure, write, print; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--no-moewatch", action="store_true", help="do not install or compare moewatch")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parents[1] / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message=r"\[moewatch\] sample_every")
    logging.getLogger("moewatch").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        reason = "not asked for" if options.no_moewatch else tools.install_moewatch(Path(folder))
        kinds = [kind for kind in RIVALS if reason is None or kind is not tools.MoEWatch]
        results: dict[str, Any] = {
            "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s)",
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl")},
            "moewatch_left_out": reason,
            "steps": STEPS,
            "how": {kind.name: kind.how for kind in kinds},
            "moewatch_says": tools.MOEWATCH_SAYS,
            "rows": [],
        }
        if reason is None:
            found = next(importlib.metadata.distributions(name="moewatch", path=[folder]))
            results["versions"]["moewatch"] = found.version
        for case in options.case:
            for kind in kinds:
                row = compare(case, kind)
                results["rows"].append(row)
                print(json.dumps(row), flush=True)
        timed = [*kinds, *([tools.MoEWatchDefault] if reason is None else [])]
        results["interval"] = {"here": tools.Tool.every, "default": ChronoConfig.observe().interval}
        results["rounds"], results["cost"] = options.rounds, cost(timed, options.rounds)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "rivals.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (options.output / "rivals.md").write_text(table.markdown(results), encoding="utf-8")
    print(table.markdown(results))


if __name__ == "__main__":
    main()
