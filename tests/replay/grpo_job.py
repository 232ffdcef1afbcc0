"""Small GRPO and RLOO runs for the tests of replay, and what is recounted in them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import datasets
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from chronomoe_hf.system import ChronoSystem
from chronomoe_hf.trainer.replay import LOGPS

WORDS = 60


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w3, w4, ... and the three special tokens."""
    vocab = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, WORDS)}
    core = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def prompts(rows: int = 16) -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [{"prompt": " ".join(f"w{3 + (7 * i + j) % 50}" for j in range(3 + i % 4))} for i in range(rows)]
    )


def reward(completions: list[Any], **kwargs: Any) -> list[float]:
    return [float(len(set(str(completion).split()))) for completion in completions]


def make(kind: str, model: Any, directory: Path, *, peft: bool = False, **fields: Any) -> Any:
    """A GRPOTrainer or RLOOTrainer that runs in seconds on the CPU."""
    import trl

    rollout_func = fields.pop("rollout_func", None)
    extra: dict[str, Any] = {} if rollout_func is None else {"rollout_func": rollout_func}
    if peft:
        import peft as library

        extra["peft_config"] = library.LoraConfig(target_modules=["q_proj", "v_proj"], r=4)
    arguments = {
        "output_dir": str(directory),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": False,
        "seed": 5,
        **fields,
    }
    if kind == "GRPO":
        arguments.setdefault("router_aux_loss_coef", 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(trl, f"{kind}Trainer")(
            model=model,
            reward_funcs=reward,
            args=getattr(trl, f"{kind}Config")(**arguments),
            train_dataset=prompts(),
            processing_class=tokenizer(),
            **extra,
        )


class Passes:
    """What old-policy and gradient passes of a trainer use, row by row, and their log-probabilities.

    A recount of its own: it hooks the experts and TRL's own function, and keys rows by their tokens.
    """

    def __init__(self, trainer: Any, system: ChronoSystem) -> None:
        self.trainer, self.system = trainer, system
        self.used: dict[int, Tensor] = {}
        self.before: dict[tuple[int, ...], tuple[Tensor, Tensor, int]] = {}
        self.flips = self.choices = 0
        self.ratios: list[tuple[bool, float]] = []
        self.references = 0
        self.grads: list[float] = []
        self.counts = [torch.zeros(layer.num_experts, dtype=torch.int64) for layer in system.layers]
        for layer in system.layers:
            assert layer.experts is not None
            layer.experts.register_forward_pre_hook(self._hook(layer.layer_id))
        self.original = getattr(trainer, LOGPS)
        trainer.__dict__[LOGPS] = self._logps
        self.calls: list[dict[int, Tensor]] = []

    def _hook(self, layer_id: int) -> Any:
        def hook(module: Any, args: Any) -> None:
            if torch._C._current_graph_task_id() == -1:
                if layer_id == 0:
                    self.calls.append({})
                self.calls[-1][layer_id] = args[1].detach().sort(-1)[0]

        return hook

    def _logps(self, model: Any, input_ids: Tensor, attention_mask: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.calls.clear()
        result = self.original(model, input_ids, attention_mask, *args, **kwargs)
        if not self.calls:  # another model: a reference of its own
            self.references += 1
            return result
        gradient = torch.is_grad_enabled()
        if not gradient and self.system.replay.passes.adapters.elsewhere:
            self.references += 1
            return result
        routes = [torch.cat([call[at] for call in self.calls]) for at in range(len(self.system.layers))]
        used = torch.stack(routes).view(len(routes), *input_ids.shape, -1)
        step = self.trainer.state.global_step
        for row in range(len(input_ids)):
            real = attention_mask[row].bool()
            if gradient:
                for counted, mine in zip(self.counts, used[:, row, real], strict=True):
                    counted += mine.flatten().bincount(minlength=len(counted))
            key = tuple(input_ids[row][real].tolist())
            mine, logps = used[:, row, real], result[0][row].detach()
            if not gradient:
                self.before[key] = mine, logps, step
            elif key in self.before:
                old, old_logps, at = self.before[key]
                self.flips += int((old != mine).any(-1)[:, :-1].sum())  # what the last token chooses is not used
                self.choices += old[:, :-1, 0].numel()
                num = min(len(logps), len(old_logps))
                tail = attention_mask[row][-num:].bool()
                ratio = (logps[-num:] - old_logps[-num:]).exp()[tail]
                self.ratios.append((at == step, float((ratio - 1).abs().max()) if tail.any() else 0.0))
        return result

    def watch_gradients(self) -> None:
        """Remember the size of every router's gradient at every optimizer step."""
        from transformers import TrainerCallback

        outer = self

        class Watch(TrainerCallback):
            def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
                for layer in outer.system.layers:
                    grad = layer.adapter.weight(layer.router).grad
                    outer.grads.append(0.0 if grad is None else float(grad.abs().sum()))

        self.trainer.add_callback(Watch())
