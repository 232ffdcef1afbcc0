"""What Trainer prints holds three of our numbers; what trackers and the history get holds them all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.jobs import Job, make_trainer
from transformers import PrinterCallback, TrainerCallback

import chronomoe_hf
from chronomoe_hf.trainer.printed import few


class Keeps(TrainerCallback):
    """A tracker: keeps what it is given."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


class Prints(PrinterCallback):
    """A printing callback that remembers what it was given."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []
        self.metrics: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        super().on_log(args, state, control, logs=logs, **kwargs)
        self.logs.append(dict(logs))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        metrics.pop("epoch", None)
        self.metrics.append(dict(metrics))


def ours(names: Any) -> set[str]:
    return {name for name in names if "moe/" in name}


def test_three_of_ours_are_printed_and_all_are_tracked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = {"max_steps": 4, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 4, "disable_tqdm": True}
    trainer = make_trainer(Job(output_dir=str(tmp_path), preset="observe", config={"interval": 2}, arguments=arguments))
    tracker, printer = Keeps(), Prints()
    trainer.add_callback(tracker)
    trainer.add_callback(printer)  # after attach
    plain = printer.on_log
    trainer.train()
    printed = [entry for entry in printer.logs if ours(entry)]
    assert printed and all(len(ours(entry)) <= 3 for entry in printed)
    assert any(ours(entry) == {"moe/neff_mean", "moe/dead_experts", "moe/alerts_active"} for entry in printed)
    tracked = [entry for entry in tracker.logs if ours(entry)]
    assert tracked and all(len(ours(entry)) > 8 for entry in tracked)
    assert any(len(ours(entry)) > 8 for entry in trainer.state.log_history)
    (metrics,) = printer.metrics
    assert 1 <= len(ours(metrics)) <= 3 and "eval_loss" in metrics
    assert "moe/gini_mean" not in capsys.readouterr().out
    assert all("total_flos" not in entry for entry in printer.logs)
    chronomoe_hf.detach(trainer)
    assert printer.on_log == plain and "on_log" not in vars(printer)


def test_only_names_of_ours_are_left_out() -> None:
    given = {"loss": 1.0, "removoe/x": 2.0, "moe/gini_mean": 3.0, "eval_moe/gini_mean": 4.0, "eval_moe/neff_mean": 5.0}
    assert few(given) == {"loss": 1.0, "removoe/x": 2.0, "eval_moe/neff_mean": 5.0}
    assert few({"remoe/gini_mean": 1.0}) == {"remoe/gini_mean": 1.0}
