"""export of a live model: adapters, state, interruptions, and whatever must be refused before anything is written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import models as tiny
from support import texts
from support.cut_plans import plan_of
from support.jobs import Job, make_trainer

import chronomoe_hf
from chronomoe_hf import ChronoConfig, lifecycle
from chronomoe_hf.config import BetaConfig
from chronomoe_hf.errors import ExportError, PlanError, PlanMismatchError
from chronomoe_hf.export.verify import logits_of, probe_batches
from chronomoe_hf.lifecycle import PlannedLayer, PrunePlan


def only(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def masked_logits(model: Any, plan: PrunePlan) -> torch.Tensor:
    with lifecycle.masked(model, plan):
        (value,) = logits_of(model, probe_batches(model.config))
    return value


# ---- what is written -----------------------------------------------------------------------------------------------


def test_the_directory_says_what_it_is(tmp_path: Path) -> None:
    model = tiny.tiny_model("qwen3_moe", vocab_size=texts.VOCAB)
    plan = plan_of(model)
    report = lifecycle.export(model, plan, tmp_path / "out", tokenizer=texts.tokenizer())
    assert only(tmp_path) == ["out"] and model.training
    record = json.loads((tmp_path / "out" / "prune_plan.json").read_text())
    assert PrunePlan.from_dict(record["plan"]) == plan == PrunePlan.load(tmp_path / "out" / "prune_plan.json")
    for planned, mapping in zip(plan.layers, record["old_to_new"], strict=True):
        assert {int(old): new for old, new in mapping["ids"].items()} == planned.new_ids
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers") and card.count("<!-- chronomoe:export:start -->") == 1
    assert f"{plan.num_kept} of 8 experts stay" in card
    assert report.parameters_after == sum(p.numel() for p in type(model).from_pretrained(tmp_path / "out").parameters())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_experts"] == config["num_local_experts"] == plan.num_kept
    mode = (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777
    assert mode == (tmp_path / "out" / "config.json").stat().st_mode & 0o777
    assert not (tmp_path / "out" / "chronomoe").exists() and not (tmp_path / "out" / "chronomoe.json").exists()


def test_an_exported_model_can_be_cut_again(tmp_path: Path) -> None:
    model = tiny.tiny_model("mixtral")
    lifecycle.export(model, plan_of(model), tmp_path / "one")
    small = type(model).from_pretrained(tmp_path / "one")
    plan = plan_of(small)
    lifecycle.export(small, plan, tmp_path / "two")
    smaller = type(model).from_pretrained(tmp_path / "two")
    assert smaller.config.num_local_experts == plan.num_kept < small.config.num_local_experts < 8
    lifecycle.export_checkpoint(tmp_path / "one", plan, tmp_path / "files")
    card = (tmp_path / "files" / "README.md").read_text()
    assert card.count("<!-- chronomoe:export:start -->") == 1 and f"{plan.num_kept} of 5 experts stay" in card


def test_stock_transformers_loads_and_generates(tmp_path: Path) -> None:
    model = tiny.tiny_model("qwen3_moe", vocab_size=texts.VOCAB)
    lifecycle.export(model, plan_of(model), tmp_path / "out", tokenizer=texts.tokenizer())
    code = f"""
        import sys
        sys.modules["chronomoe_hf"] = None  # an import of it would fail
        from transformers import AutoModelForCausalLM, AutoTokenizer
        model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r})
        tokenizer = AutoTokenizer.from_pretrained({str(tmp_path / "out")!r})
        inputs = tokenizer("The for statement", return_tensors="pt")
        print(model.generate(**inputs, max_new_tokens=4, do_sample=False).shape[1] - inputs["input_ids"].shape[1])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "4"


# ---- adapters and our own state ------------------------------------------------------------------------------------


def test_a_merged_adapter_is_exported_and_an_unmerged_one_refused(tmp_path: Path) -> None:
    model = tiny.tiny_model("mixtral")
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], target_parameters=["experts.down_proj"], r=2))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    plan = plan_of(tiny.tiny_model("mixtral"))
    with pytest.raises(ExportError, match=r"an adapter is not merged .*merge_and_unload"):
        lifecycle.export(adapted, plan, tmp_path / "out")
    assert only(tmp_path) == []
    merged = adapted.merge_and_unload()
    want = masked_logits(merged, plan)
    plain = masked_logits(tiny.tiny_model("mixtral"), plan)
    assert not torch.allclose(want, plain, atol=1e-3), "bad test setup: the adapter does nothing"
    lifecycle.export(merged, plan, tmp_path / "out")
    (got,) = logits_of(type(model).from_pretrained(tmp_path / "out"), probe_batches(model.config))
    assert float((got - want).abs().max()) <= 1e-5


GOVERN = ChronoConfig.balance(interval=2, beta=BetaConfig(law="balance", rate=0.3))


def governed(steps: int = 6) -> Any:
    model = chronomoe_hf.wrap(tiny.tiny_model("mixtral"), GOVERN)
    system = chronomoe_hf.system_of(model)
    for step in range(1, steps + 1):
        model(**tiny.tiny_batch("mixtral", seed=step)).loss.backward()
        system.step(step)
    return model


def test_state_is_cut_along(tmp_path: Path) -> None:
    model = governed()
    system = chronomoe_hf.system_of(model)
    plan = plan_of(model)
    report = lifecycle.export(model, plan, tmp_path / "out")
    assert report.state
    small = chronomoe_hf.wrap(type(model).from_pretrained(tmp_path / "out"), GOVERN)
    restored = chronomoe_hf.system_of(small)
    assert restored.load(tmp_path / "out") is not None and restored.global_step == 6
    for planned in plan.layers:
        at, kept = planned.spec.layer_id, list(planned.kept)
        old, new = system.router_state(at), restored.router_state(at)
        assert torch.equal(new.beta_coeff, old.beta_coeff[kept]) and old.beta_coeff.abs().max() > 0
        before, after = system.coherence(at).snapshot(6), restored.coherence(at).snapshot(6)
        for number, expert in enumerate(kept):
            assert {**vars(after[number]), "expert_id": 0} == {**vars(before[expert]), "expert_id": 0}
    # Governed, the cut model routes as the governed model does under the mask.
    want = masked_logits(model, plan)
    (got,) = logits_of(small, probe_batches(small.config))
    assert float((got - want).abs().max()) <= 1e-5
    (plain,) = logits_of(type(model).from_pretrained(tmp_path / "out"), probe_batches(small.config))
    assert float((plain - want).abs().max()) > 1e-4, "bad test setup: beta does nothing"
    small(**tiny.tiny_batch("mixtral")).loss.backward()
    restored.step(7)


def test_a_runs_checkpoint_with_our_state_is_cut_from_its_files(tmp_path: Path) -> None:
    job = Job(output_dir=str(tmp_path / "run"), preset="balance", config={"interval": 2})
    job.arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4}
    trainer = make_trainer(job)
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-4"
    plan = plan_of(trainer.model)
    report = lifecycle.export_checkpoint(checkpoint, plan, tmp_path / "out")
    assert report.state and report.checked == "logits" and report.max_difference <= 1e-4
    assert not {"trainer_state.json", "optimizer.pt", "training_args.bin"} & set(only(tmp_path / "out"))
    system = chronomoe_hf.system_of(trainer.model)
    small = chronomoe_hf.wrap(type(system.model).from_pretrained(tmp_path / "out"), system.config)
    restored = chronomoe_hf.system_of(small)
    assert restored.load(tmp_path / "out") is not None
    for planned in plan.layers:
        at, kept = planned.spec.layer_id, list(planned.kept)
        assert torch.equal(restored.router_state(at).beta_coeff, system.router_state(at).beta_coeff[kept])
    # And training goes on from it, with a new optimizer.
    job = Job(output_dir=str(tmp_path / "more"), preset="balance", config={"interval": 2})
    job.pretrained, job.arguments = str(tmp_path / "out"), {"max_steps": 2}
    more = make_trainer(job)
    more.train()
    assert more.state.global_step == 2


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_a_directory_that_exists_is_refused(tmp_path: Path) -> None:
    model = tiny.tiny_model("mixtral")
    (tmp_path / "out").mkdir()
    with pytest.raises(ExportError, match="exists already"):
        lifecycle.export(model, plan_of(model), tmp_path / "out")
    assert only(tmp_path) == ["out"] and only(tmp_path / "out") == []


def test_a_plan_of_another_model_is_refused(tmp_path: Path) -> None:
    plan = plan_of(tiny.tiny_model("mixtral"))
    for other in (tiny.tiny_model("qwen3_moe"), tiny.tiny_model("mixtral", num_hidden_layers=3)):
        with pytest.raises(PlanMismatchError, match="make a plan from evidence of this model"):
            lifecycle.export(other, plan, tmp_path / "out")
    assert only(tmp_path) == []


def test_no_plan_can_leave_too_few_or_unequal_groups() -> None:
    (spec, _) = lifecycle.layer_specs(tiny.tiny_model("mixtral"))
    with pytest.raises(PlanError, match="1 survivors, but every token needs 2"):
        PlannedLayer(spec=spec, kept=(3,), scores=(None,) * 8)
    from support import moe_zoo

    grouped = lifecycle.layer_specs(moe_zoo.build("deepseek_v3"))[0]
    assert grouped.num_groups == 2
    with pytest.raises(PlanError, match=r"\[4, 1\] survivors in its 2 routing groups"):
        PlannedLayer(spec=grouped, kept=(0, 1, 2, 3, 4), scores=(None,) * 8)


def test_weights_that_are_not_here_are_refused(tmp_path: Path) -> None:
    model = tiny.tiny_model("mixtral")
    plan = plan_of(model)
    with torch.device("meta"):
        hollow = type(model)(model.config)
    with pytest.raises(ExportError, match=r"not whole in this process .*export_checkpoint"):
        lifecycle.export(hollow, plan, tmp_path / "out")
    with pytest.raises(ExportError, match="no Transformers model"):
        lifecycle.export(model.model.layers[0].mlp, plan, tmp_path / "out")
    assert only(tmp_path) == []


def test_a_checkpoint_that_is_not_the_masked_model_is_refused(tmp_path: Path) -> None:
    model = tiny.tiny_model("mixtral")
    plan = plan_of(model)
    handle = model.lm_head.register_forward_hook(lambda module, args, output: output + 1e-3)
    with pytest.raises(ExportError, match=r"differ from those of the masked model by 0.001, at most "):
        lifecycle.export(model, plan, tmp_path / "out")
    assert only(tmp_path) == []
    lifecycle.export(model, plan, tmp_path / "out", tolerance=0.01)
    handle.remove()


def test_inputs_that_the_model_cannot_take_are_named(tmp_path: Path) -> None:
    model = tiny.tiny_model("mixtral")
    with pytest.raises(ExportError, match=r"cannot be run for the comparison: .*; pass `batches`"):
        lifecycle.export(model, plan_of(model), tmp_path / "out", batches=[{"input_ids": torch.zeros(1, 2, 3, 4)}])
    batches = [{"input_ids": torch.tensor([[5, 6, 7]])}]
    assert lifecycle.export(model, plan_of(model), tmp_path / "out", batches=batches).max_difference <= 1e-5


def test_an_export_that_is_killed_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
        from support import models as tiny
        from support.cut_plans import plan_of
        from chronomoe_hf import lifecycle
        model = tiny.tiny_model("mixtral", hidden_size=256, intermediate_size=2048)
        print("ready", flush=True)
        while True:
            report = lifecycle.export(model, plan_of(model), {str(tmp_path / "out")!r})
            break
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 60
    while not any(tmp_path.glob(".out.partial-*/*")) and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "out").exists(), "bad test setup: the export was faster than the kill"
    assert all(name.startswith(".out.partial-") for name in only(tmp_path)) and only(tmp_path)
    model = tiny.tiny_model("mixtral")
    lifecycle.export(model, plan_of(model), tmp_path / "out")
    assert type(model).from_pretrained(tmp_path / "out").config.num_local_experts == 5


@pytest.mark.slow
def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    code = f"""
        import resource, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
        from support import models as tiny
        from support.cut_plans import plan_of
        from chronomoe_hf import lifecycle
        model = tiny.tiny_model("mixtral")
        plan = plan_of(model)
        model.save_pretrained({str(tmp_path / "source")!r})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        failed = 0
        source, out = {str(tmp_path / "source")!r}, {str(tmp_path / "out")!r}
        for write in (lambda: lifecycle.export(model, plan, out),
                      lambda: lifecycle.export_checkpoint(source, plan, out)):
            try:
                write()
            except Exception as error:
                failed += 1
        print(failed)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("2"), done.stderr
    assert only(tmp_path) == ["source"]
