"""The trainers of TRL beside SFTTrainer: what they train on and evaluate is counted once, everything else not at all.

Reference models, KL terms, scoring, teachers and generation all run the same routers; a recount of the passes that are
the policy's own, made with hooks of the test, has to agree with the records in every count.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _text_job as job
import datasets
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import MixtralConfig, MixtralForSequenceClassification

import chronomoe_hf
from chronomoe_hf import ChronoConfig, ChronoRouter

pytestmark = pytest.mark.slow

SMALL = job.ModelSize(layers=2, hidden=32, intermediate=16, heads=2, experts=4, top_k=2, vocab=400, length=64)
STEPS, ROWS = 2, 16
CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}</s>{% endgeneration %}{% else %}{{ message['content'] }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = job.build_tokenizer(job.load_text("prose")["train"]["text"], SMALL.vocab)
    made.chat_template = CHAT
    return made


@pytest.fixture(scope="module")
def words() -> list[str]:
    return " ".join(job.load_text("prose")["train"]["text"][:40]).split()


class Passes:
    """Routing of the policy's own passes, counted from the routers' outputs and the masks that the decoder is given."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.model = trainer.model
        self.decoder = next(m for m in self.model.modules() if type(m).__name__ == "MixtralModel")
        self.routers = [m for m in self.model.modules() if isinstance(m, ChronoRouter)]
        self.counts = {mode: [[0] * SMALL.experts for _ in self.routers] for mode in ("train", "eval")}
        self.others = {"train": 0, "eval": 0}
        self.mode: str | None = None
        self.flags: list[bool] = []
        self.in_loss = 0
        self.mismatched: list[torch.Tensor] = []
        self.decoder.register_forward_pre_hook(self._begin, with_kwargs=True)
        self.decoder.register_forward_hook(self._end)
        for position, router in enumerate(self.routers):
            router.register_forward_hook(self._hook(position))
        trainer.compute_loss = self._inside(type(trainer).compute_loss)
        if "get_batch_loss_metrics" in dir(trainer):  # ORPO and CPO evaluate without compute_loss
            trainer.prediction_step = self._inside(type(trainer).prediction_step)
        if type(trainer).__name__ == "OnlineDPOTrainer":  # it trains without compute_loss
            trainer.training_step = self._inside(type(trainer).training_step)
        collate = trainer.data_collator
        trainer.data_collator = lambda features: self._collated(collate(features))

    def _collated(self, batch: Any) -> Any:
        if isinstance(batch, dict) and "KL_input_ids" in batch:
            self.mismatched.append(batch["KL_input_ids"].clone())
        return batch

    def _inside(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.in_loss += 1
            try:
                return function(self.trainer, *args, **kwargs)
            finally:
                self.in_loss -= 1

        return call

    def _own(self, ids: torch.Tensor) -> bool:
        adapters = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        if any(module.disable_adapters or module.active_adapters != ["default"] for module in adapters):
            return False
        if any(ids.shape == other.shape and torch.equal(ids, other) for other in self.mismatched):
            return False
        return self.in_loss > 0 and (torch.is_grad_enabled() or not self.decoder.training)

    def _begin(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        mode = "train" if module.training else "eval"
        ids = args[0] if args else kwargs["input_ids"]
        if not self._own(ids):
            self.others[mode] += 1
            return
        self.mode = mode
        mask = kwargs.get("attention_mask")
        self.flags = [True] * ids.numel() if mask is None else [bool(value) for value in mask.flatten().tolist()]

    def _end(self, module: Any, args: Any, output: Any) -> None:
        self.mode = None

    def _hook(self, position: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            if self.mode is None or torch._C._current_graph_task_id() != -1:  # recompute
                return
            assert len(self.flags) == output[2].shape[0]
            for chosen, real in zip(output[2].tolist(), self.flags, strict=True):
                for expert in chosen if real else []:
                    self.counts[self.mode][position][expert] += 1

        return hook


def rewards(completions: list[Any], **kwargs: Any) -> list[float]:
    return [float(len(set(str(completion)))) for completion in completions]


def pick(words: list[str], index: int, length: int) -> str:
    return " ".join(words[index * 7 % 400 :][:length])


def preference(words: list[str]) -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [
            {
                "prompt": pick(words, i, 3 + i % 4),
                "chosen": " " + pick(words, i + 50, 2 + i % 7),
                "rejected": " " + pick(words, i + 90, 2 + i % 5),
            }
            for i in range(ROWS)
        ]
    )


def prompts(words: list[str]) -> datasets.Dataset:
    return preference(words).remove_columns(["chosen", "rejected"])


def labelled(words: list[str]) -> datasets.Dataset:
    rows = preference(words)
    return (
        rows.remove_columns("rejected")
        .rename_column("chosen", "completion")
        .add_column("label", [i % 3 != 0 for i in range(ROWS)])
    )


def chats(words: list[str]) -> datasets.Dataset:
    rows = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["chosen"].strip()}]}
        for r in preference(words)
    ]
    return datasets.Dataset.from_list(rows)


GENERATING = {"max_completion_length": 8, "num_generations": 2}
# Trainer: module, data, fields of its config, arguments of the trainer, policy under PEFT.
TRAINERS: dict[str, tuple[str, Any, dict[str, Any], dict[str, Any], bool]] = {
    "DPO": ("trl", preference, {}, {}, False),
    "DPO peft": ("trl", preference, {}, {}, True),
    "Reward": ("trl", preference, {}, {}, False),
    "KTO": ("trl", labelled, {"train_sampling_strategy": "sequential"}, {}, False),
    "KTO peft": ("trl", labelled, {"train_sampling_strategy": "sequential"}, {}, True),
    "GRPO": ("trl", prompts, {**GENERATING, "beta": 0.04}, {"reward_funcs": rewards}, False),
    "GRPO peft": ("trl", prompts, {**GENERATING, "beta": 0.04}, {"reward_funcs": rewards}, True),
    "RLOO": ("trl", prompts, GENERATING, {"reward_funcs": rewards}, False),
    "ORPO": ("trl.experimental.orpo", preference, {}, {}, False),
    "CPO": ("trl.experimental.cpo", preference, {}, {}, False),
    "GKD": ("trl.experimental.gkd", chats, {"lmbda": 0.5, "max_new_tokens": 6}, {"teacher": True}, False),
    "OnlineDPO": ("trl.experimental.online_dpo", prompts, {"max_new_tokens": 6}, {"reward_funcs": rewards}, False),
}


def make(name: str, tokenizer: Any, words: list[str], directory: Path) -> Any:
    module, data, fields, extra, peft = TRAINERS[name]
    kind = name.split()[0]
    where = importlib.import_module(module)
    model: Any = job.build_model("mixtral", SMALL)
    # Transformers' auxiliary loss cannot take the mask of a cached step of generation.
    model.config.output_router_logits = "max_new_tokens" not in fields and "max_completion_length" not in fields
    if kind == "Reward":
        torch.manual_seed(0)
        config = MixtralConfig(**{**model.config.to_dict(), "num_labels": 1})
        model = MixtralForSequenceClassification(config)
    else:  # TRL loads the reference of a policy from where the policy came from
        model.save_pretrained(directory / "start")
        model = type(model).from_pretrained(directory / "start")
    if peft:
        import peft as library

        extra = {**extra, "peft_config": library.LoraConfig(target_modules=["q_proj", "v_proj"], r=4)}
    if extra.pop("teacher", False):
        extra["teacher_model"] = job.build_model("mixtral", SMALL, seed=1)
    arguments = {
        "output_dir": str(directory),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": False,
        **fields,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(where, f"{kind}Trainer")(
            model=model,
            args=getattr(where, f"{kind}Config")(**arguments),
            train_dataset=data(words),
            eval_dataset=data(words).select(range(4)),
            processing_class=tokenizer,
            **extra,
        )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(TRAINERS))
def test_counts_equal_a_recount_of_the_policys_own_passes(
    name: str, tokenizer: Any, words: Any, tmp_path: Path
) -> None:
    trainer = make(name, tokenizer, words, tmp_path)
    callback = chronomoe_hf.attach(trainer, ChronoConfig.observe(interval=STEPS))
    passes = Passes(trainer)
    trainer.train()
    system = callback.system
    assert system is not None and system.last_snapshot is not None and trainer.state.global_step == STEPS
    assert [layer.expert_token_counts for layer in system.last_snapshot.layers] == passes.counts["train"]
    assert sum(passes.counts["train"][0]) > 0
    if name.split()[0] in ("GRPO", "RLOO", "OnlineDPO", "KTO") or "peft" in name:
        assert passes.others["train"] > 0, "bad test setup: no pass to leave out"
    logged = [entry for entry in trainer.state.log_history if "moe/neff_mean" in entry]
    assert len(logged) == 1 and "loss" in logged[0]
    if name == "OnlineDPO":
        return  # its evaluation is Trainer's own, over prompts
    passes.others["eval"] = 0
    passes.counts["eval"] = [[0] * SMALL.experts for _ in passes.routers]
    metrics = trainer.evaluate()
    assert system.last_evaluation is not None
    assert [layer.expert_token_counts for layer in system.last_evaluation.layers] == passes.counts["eval"]
    assert sum(passes.counts["eval"][0]) > 0 and "eval_moe/neff_mean" in metrics
    if name.split()[0] in ("GRPO", "RLOO", "KTO") or "peft" in name:
        assert passes.others["eval"] > 0, "bad test setup: no pass to leave out"
