"""GRPO and RLOO of an unmodified TRL: what old-policy and gradient pass use, and that measuring changes nothing."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import models

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from chronomoe_hf.config import BetaConfig, LensConfig, ReplayConfig
from chronomoe_hf.errors import ConfigError
from chronomoe_hf.telemetry import read_jsonl

from .grpo_job import Passes, make

pytestmark = pytest.mark.filterwarnings("ignore")


def tiny(family: str = "qwen3_moe", **fields: Any) -> Any:
    torch.manual_seed(0)
    return models.tiny_model(family, num_experts_per_tok=2, **fields)


# kind, steps_per_generation, num_iterations, checkpointing, reentrant, peft
FAST = [
    ("GRPO", 1, 2, True, False, False),
    ("RLOO", 4, 1, False, None, False),
    ("GRPO", 1, 2, True, False, True),
]
EVERY = [
    (kind, per, iterations, reentrant is not None, reentrant, peft)
    for kind in ("GRPO", "RLOO")
    for per, iterations in ((1, 2), (4, 1), (4, 2))  # 1 and 1 has no old-policy pass: a test of its own
    for reentrant, peft in ((None, False), (False, False), (True, False), (False, True))
]
CASES = [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in EVERY if case not in FAST)]


UNCLIPPED = {"epsilon": 5.0}  # what is clipped has no gradient, and RLOO clips whole rows


def fields_of(per_generation: int, iterations: int, checkpointing: bool, reentrant: bool | None) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "steps_per_generation": per_generation,
        "num_iterations": iterations,
        "gradient_checkpointing": checkpointing,
    }
    if reentrant is not None:
        fields["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
    return fields


@pytest.mark.parametrize(("kind", "per", "iterations", "checkpointing", "reentrant", "peft"), CASES)
@pytest.mark.parametrize("mode", ["old", "rollout"])
def test_used_flips_are_zero_and_the_ratio_is_one_at_equal_weights(
    mode: str,
    kind: str,
    per: int,
    iterations: int,
    checkpointing: bool,
    reentrant: bool | None,
    peft: bool,
    tmp_path: Path,
) -> None:
    fields = fields_of(per, iterations, checkpointing, reentrant) | UNCLIPPED
    trainer = make(kind, tiny(), tmp_path, peft=peft, beta=0.1 if peft else 0.0, **fields)
    callback = chronomoe_hf.attach(trainer, ChronoConfig.observe(interval=4, replay__mode=mode))
    system = callback.system
    assert system is not None
    passes = Passes(trainer, system)
    if not peft:
        passes.watch_gradients()
    trainer.train()
    assert passes.choices > 0 and passes.flips == 0, f"{passes.flips} of {passes.choices} used choices flipped"
    equal = [ratio for same, ratio in passes.ratios if same]
    assert equal and max(equal) <= 1e-5
    moved = [ratio for same, ratio in passes.ratios if not same]
    if moved and not peft:
        assert max(moved) > 1e-4, "the weights did not move: shows nothing"
    assert all(size > 0 for size in passes.grads)
    assert passes.references > 0 or not peft, "bad test setup: no reference pass"
    for layer, counted in zip(system.last_snapshot.layers, passes.counts, strict=True):  # type: ignore[union-attr]
        assert layer.expert_token_counts == counted.tolist(), "the counts are of what the gradient pass has used"
    record = system.last_snapshot.replay  # type: ignore[union-attr]
    assert record is not None and record["coverage"] == 1.0 and record["unknown_rows"] == 0
    assert record["tokens_repeated"] > 0 and record["passes"]["gradient"] == 4
    expected = "rollout_gradient" if mode == "rollout" else "old_gradient"
    assert record["pairs"][expected]["mean"] < 0.5 and record["logps"][expected]["tokens"] > 0
    if checkpointing:
        assert record["passes"]["gradient"] and record["recompute"]["tokens"][0] > 0
    kinds = {alert.kind for alert in system.alerts.active}
    assert not kinds & {"REPLAY_UNCOVERED", "REPLAY_INVALID", "REPLAY_IDLE"}, kinds
    written, _ = read_jsonl(tmp_path / "chronomoe" / "replay.jsonl")
    assert written[-1]["pairs"] == json.loads(json.dumps(record["pairs"]))
    scalars = [entry for entry in trainer.state.log_history if "moe/replay_covered_min" in entry]
    assert scalars and ("moe/rollout_k3" in scalars[-1]) == (mode == "rollout")
    chronomoe_hf.detach(trainer)
    assert "generate" not in vars(trainer.model) and trainer._get_per_token_logps_and_entropies
    assert not hasattr(system.model, "_chrono_system")


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_without_an_old_pass_the_rollout_is_repeated(kind: str, reentrant: bool | None, tmp_path: Path) -> None:
    """steps_per_generation and num_iterations of 1: no old-policy pass; the gradient pass repeats the rollout."""
    fields = fields_of(1, 1, reentrant is not None, reentrant) | UNCLIPPED
    trainer = make(kind, tiny(), tmp_path, beta=0.0, **fields)
    callback = chronomoe_hf.attach(trainer, ChronoConfig.observe(interval=4, replay__mode="rollout"))
    system = callback.system
    assert system is not None
    passes = Passes(trainer, system)
    passes.watch_gradients()
    trainer.train()
    record = system.last_snapshot.replay  # type: ignore[union-attr]
    assert record is not None and record["coverage"] == 1.0 and record["unknown_rows"] == 0
    assert record["tokens_repeated"] > 0 and record["passes"]["gradient"] == 4
    assert record["pairs"]["rollout_gradient"]["mean"] == 0.0, "the weights of the rollout are those of its pass"
    assert all(size > 0 for size in passes.grads)
    for layer, counted in zip(system.last_snapshot.layers, passes.counts, strict=True):  # type: ignore[union-attr]
        assert layer.expert_token_counts == counted.tolist()
    assert not {"REPLAY_UNCOVERED", "REPLAY_INVALID"} & {alert.kind for alert in system.alerts.active}


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_measuring_changes_no_bit_of_a_run(kind: str, tmp_path: Path) -> None:
    weights = []
    for measured in (False, True):
        trainer = make(kind, tiny(), tmp_path / str(measured), beta=0.0, **fields_of(2, 2, True, False))
        if measured:
            callback = chronomoe_hf.attach(trainer, ChronoConfig.observe(interval=4, replay__mode="measure"))
        trainer.train()
        weights.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    record = callback.system.last_snapshot.replay
    assert set(record["pairs"]) == {"rollout_old", "rollout_gradient", "old_gradient"}
    assert record["coverage"] == 1.0
    assert record["pairs"]["rollout_old"]["mean"] <= record["pairs"]["rollout_gradient"]["mean"]
    assert record["logps"]["rollout_old"]["logp_diff_max"] < 1e-3, "log-probabilities of the rollout are shifted"


def test_without_replay_choices_do_flip(tmp_path: Path) -> None:
    """What the first test can find."""
    trainer = make("GRPO", tiny(), tmp_path, **fields_of(1, 2, True, False))
    callback = chronomoe_hf.attach(trainer, ChronoConfig.observe(interval=4))
    passes = Passes(trainer, callback.system)  # type: ignore[arg-type]
    trainer.train()
    assert passes.flips > 0


def test_routes_of_a_rollout_func_are_replayed(tmp_path: Path) -> None:
    """An engine of another precision: its choices differ from the trainer's, and are used by it."""
    model = tiny()
    engine = copy.deepcopy(model).to(torch.bfloat16).eval()
    chronomoe_hf.wrap(engine, ChronoConfig.observe(replay__mode="measure"))
    from .grpo_job import tokenizer

    words = tokenizer()

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        replay = chronomoe_hf.system_of(engine).replay
        out: dict[str, list[Any]] = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "routed_experts": []}
        engine.load_state_dict(trainer.model.state_dict())
        for prompt in prompts:
            ids = torch.tensor([words(prompt)["input_ids"]])
            with replay.rollout(pad_token_id=0) as tape, torch.no_grad():
                done = engine.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=True, pad_token_id=0)
                tape.end(done)
            (record,) = tape.records(replay.passes.dtype)
            out["prompt_ids"].append(ids[0].tolist())
            out["completion_ids"].append(done[0, ids.shape[1] :].tolist())
            out["logprobs"].append(record.logps_N[ids.shape[1] :].tolist())  # type: ignore[index]
            out["routed_experts"].append(record.routes_NLK)
        return out

    trainer = make("GRPO", model, tmp_path, rollout_func=rollout, **fields_of(1, 2, True, False))
    callback = chronomoe_hf.attach(trainer, ChronoConfig.observe(interval=4, replay__mode="rollout"))
    assert callback.system is not None
    passes = Passes(trainer, callback.system)
    trainer.train()
    record = callback.system.last_snapshot.replay  # type: ignore[union-attr]
    assert record is not None and record["coverage"] == 1.0
    assert passes.choices > 0 and passes.flips == 0
    assert record["pairs"]["rollout_old"]["mean"] > 0.0, "bf16 and fp32 chose alike everywhere: shows nothing"
    assert record["logps"]["rollout_old"]["tokens"] > 0


def test_mode_old_without_an_old_pass_says_what_to_set(tmp_path: Path) -> None:
    trainer = make("GRPO", tiny(), tmp_path, max_steps=2)
    callback = chronomoe_hf.attach(trainer, ChronoConfig.observe(interval=1, replay__mode="old"))
    trainer.train()
    (alert,) = [a for a in callback.system.alerts.active if a.kind == "REPLAY_IDLE"]  # type: ignore[union-attr]
    assert "num_iterations=2" in alert.detail


def test_an_engine_that_returns_no_routes_is_named(tmp_path: Path) -> None:
    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        rows = [[5, 6, 7] for _ in prompts]
        return {"prompt_ids": rows, "completion_ids": [[9, 9]] * len(rows), "logprobs": [[-1.0, -1.0]] * len(rows)}

    trainer = make("GRPO", tiny(), tmp_path, rollout_func=rollout, max_steps=2)
    callback = chronomoe_hf.attach(trainer, ChronoConfig.observe(interval=1, replay__mode="rollout"))
    trainer.train()
    active = {a.kind: a.detail for a in callback.system.alerts.active}  # type: ignore[union-attr]
    assert {"REPLAY_IDLE", "REPLAY_INVALID", "REPLAY_UNCOVERED"} <= set(active)
    assert "--enable-return-routed-experts" in active["REPLAY_INVALID"]


def with_lens(mode: Any) -> ChronoConfig:
    return ChronoConfig(beta=BetaConfig(law="none"), lens=LensConfig(), replay=ReplayConfig(mode=mode))


@pytest.mark.parametrize(
    ("mode", "config"),
    [("old", with_lens("old")), ("measure", with_lens("measure")), ("old", ChronoConfig.protect(replay__mode="old"))],
)
def test_what_steers_goes_with_the_modes_in_which_no_engine_is_repeated(
    mode: str, config: ChronoConfig, tmp_path: Path
) -> None:
    trainer = make("GRPO", tiny(), tmp_path, rollout_func=lambda *a: {})
    callback = chronomoe_hf.attach(trainer, config)
    assert callback.system is not None and callback.system.config.replay.mode == mode


def packed(trainer: Any) -> None:
    trainer.args.packing = True


def padding_free(trainer: Any) -> None:
    trainer.args.padding_free = True


def asynchronous(trainer: Any) -> None:
    trainer.__class__ = type("AsyncGRPOTrainer", (type(trainer),), {})


def context_parallel(trainer: Any) -> None:
    from accelerate.parallelism_config import ParallelismConfig

    trainer.accelerator.state.parallelism_config = ParallelismConfig(cp_size=2)


def with_images(trainer: Any) -> None:
    trainer.model.config.vision_config = {"hidden_size": 8}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (packed, "packing=True joins them"),
        (padding_free, "padding_free=True joins them"),
        (asynchronous, "AsyncGRPO packs rows"),
        (context_parallel, "cp_size > 1 splits"),
        (with_images, "takes images"),
    ],
)
def test_rows_that_are_no_texts_are_refused_at_attach_and_leave_nothing(
    change: Any, words: str, tmp_path: Path
) -> None:
    trainer = make("GRPO", tiny(), tmp_path)
    change(trainer)
    try:
        with pytest.raises(ConfigError, match=words):
            chronomoe_hf.attach(trainer, ChronoConfig.observe(replay__mode="measure"))
        assert not hasattr(trainer.model, "_chrono_system") and "save_model" not in vars(trainer)
    finally:
        if change is context_parallel:
            trainer.accelerator.state.parallelism_config = None


@pytest.mark.parametrize(
    ("fields", "config", "words"),
    [
        ({"torch_compile": True}, ChronoConfig.observe(replay__mode="measure"), "torch_compile=False"),
        (
            {"use_transformers_continuous_batching": True},
            ChronoConfig.observe(replay__mode="rollout"),
            "continuous batching",
        ),
        ({"rollout_func": lambda *a: {}}, ChronoConfig.protect(replay__mode="rollout"), "beta.law='coherence'"),
        ({"rollout_func": lambda *a: {}}, ChronoConfig.balance(replay__mode="rollout"), "beta.law='balance'"),
        ({"rollout_func": lambda *a: {}}, with_lens("rollout"), "rollout' with lens.enabled=True"),
    ],
)
def test_what_cannot_be_had_together_is_refused_at_attach_and_leaves_nothing(
    fields: dict[str, Any], config: ChronoConfig, words: str, tmp_path: Path
) -> None:
    try:
        trainer = make("GRPO", tiny(), tmp_path, **{k: v for k, v in fields.items() if k == "rollout_func"})
    except Exception as error:
        pytest.skip(f"this TRL refuses it first: {error}")
    for name, value in fields.items():
        if name != "rollout_func":
            setattr(trainer.args, name, value)
    with pytest.raises(ConfigError, match=words):
        chronomoe_hf.attach(trainer, config)
    assert not hasattr(trainer.model, "_chrono_system")
    assert "save_model" not in vars(trainer)
