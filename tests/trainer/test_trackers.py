"""What reaches TensorBoard, W&B (offline) and trackio in a real training: pictures and alerts; the model card."""

from __future__ import annotations

import json
import logging
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support import moe_zoo
from support.made_runs import train_into

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from chronomoe_hf.report.data import load_run
from chronomoe_hf.telemetry import LayerSnapshot, SystemSnapshot, read_jsonl
from chronomoe_hf.trainer import logs as trackers
from chronomoe_hf.trainer.model_card import model_card_section, write_model_card

# Under these every window raises an alert.
ALWAYS = {"alerts": {"neff_floor": 1.0, "pre_after": 1, "min_window_tokens": 0}}


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "TRACKIO_DIR", "TENSORBOARD_LOGGING_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    yield


def snapshot(*counts: list[int]) -> SystemSnapshot:
    layers = [LayerSnapshot(layer_id=i, n_experts=len(c), top_k=1, expert_token_counts=c) for i, c in enumerate(counts)]
    return SystemSnapshot(step=1, layers=layers)


def test_the_heatmap_shows_each_expert_on_one_scale() -> None:
    picture = trackers.heatmap(snapshot([1, 1, 1, 1], [8, 0, 0, 0], [0, 0, 0, 0], [1, 3]), least=16)
    assert picture.shape == (16, 16, 3) and picture.dtype == np.uint8
    cell = picture[::4, ::4]
    assert (cell[0] == 247).all()  # the fair share
    assert (cell[1, 1:] == 0).all()  # no token
    assert cell[1, 0].tolist() == [178, 24, 43]  # four times
    assert (cell[2] == 225).all() and (cell[3, 2:] == 225).all()  # nothing known
    assert cell[3, 1, 0] > cell[3, 1, 2] and cell[3, 0, 2] > cell[3, 0, 0]  # red above, blue below


def test_tensorboard_gets_pictures_and_alerts(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_into(tmp_path / "run", steps=4, interval=2, config=ALWAYS, arguments={"report_to": "tensorboard"})
    (file,) = tmp_path.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file.parent), size_guidance={"images": 0, "histograms": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    assert [event.step for event in events.Images("train/moe/load_heatmap")] == [2, 4]
    histograms = events.Histograms("train/moe/load_histogram")
    assert [event.step for event in histograms] == [2, 4]
    assert histograms[-1].histogram_value.num == 16  # 2 layers of 8 experts
    assert histograms[-1].histogram_value.sum == pytest.approx(16)  # in units of the fair share
    text = events.Tensors("train/moe/alerts/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "PRE_COLLAPSE raised" in text
    assert "train/moe/neff_mean" in tags["scalars"]


def test_wandb_offline_gets_pictures_and_alerts(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb", reason="pip install chronomoe_hf[wandb]")
    train_into(tmp_path / "run", steps=4, interval=2, config=ALWAYS, arguments={"report_to": "wandb"})
    wandb.finish()
    assert len(list(tmp_path.rglob("media/images/**/load_heatmap*.png"))) == 2
    (log,) = tmp_path.rglob("run-*.wandb")
    wanted = (b"load_histogram", b"PRE_COLLAPSE raised (layer 0)")
    ends = time.monotonic() + 60  # W&B's own process writes it, when it gets to it
    while not all(word in log.read_bytes() for word in wanted) and time.monotonic() < ends:
        time.sleep(0.2)
    assert all(word in log.read_bytes() for word in wanted)


def test_trackio_gets_pictures_and_alerts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio", reason="pip install chronomoe_hf[trackio]")
    # It reads TRACKIO_DIR when it is first imported, which another test of this process may have done.
    known, here = Path(sys.modules["trackio.utils"].TRACKIO_DIR), tmp_path / "trackio_dir"
    for module in [module for name, module in sys.modules.items() if name.split(".")[0] == "trackio"]:
        for name, value in list(vars(module).items()):
            if isinstance(value, Path) and value.is_relative_to(known):
                monkeypatch.setattr(module, name, here / value.relative_to(known))
    train_into(tmp_path / "run", steps=4, interval=2, config=ALWAYS, arguments={"report_to": "trackio"})
    stores = [path for path in tmp_path.rglob("*.db") if path.stat().st_size]
    rows = []
    for path in stores:
        with sqlite3.connect(path) as store:
            tables = [name for (name,) in store.execute("select name from sqlite_master where type='table'")]
            rows += [str(row) for table in tables for row in store.execute(f'select * from "{table}"')]
    text = "\n".join(rows)
    assert "train/moe/load_heatmap" in text and "train/moe/load_histogram" in text and "PRE_COLLAPSE raised" in text


def test_a_tracker_that_fails_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class TensorBoardCallback:
        @property
        def tb_writer(self) -> None:
            raise RuntimeError("disk full")

    trainer = train_into(tmp_path, steps=1)
    system = trainer.callback_handler.callbacks[0].system
    with caplog.at_level(logging.ERROR):
        for run in (1, 2):
            log = trackers.WindowLog()
            for _ in range(2):
                log.publish([TensorBoardCallback()], system, snapshot([1, 1]))  # type: ignore[list-item]
            assert caplog.text.count("training goes on") == run, "once a run"


def test_losses_stand_beside_the_records(tmp_path: Path) -> None:
    trainer = train_into(tmp_path, steps=4, arguments={"eval_strategy": "steps", "eval_steps": 2})
    logged = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 4 and load_run(tmp_path).loss == logged
    records, _ = read_jsonl(tmp_path / "chronomoe" / "logs.jsonl")
    assert [record["step"] for record in records if "eval_loss" in record] == [2, 4]


START, END = "<!-- chronomoe:routing:start -->", "<!-- chronomoe:routing:end -->"

# ---- model card ------------------------------------------------------------------------------------------------------


def test_the_model_card_gets_one_section(tmp_path: Path) -> None:
    trainer = train_into(tmp_path, steps=2)
    trainer.create_model_card()
    first = (tmp_path / "README.md").read_text()
    assert first.count(START) == first.count(END) == 1 and "| 0 | 8 |" in first
    trainer.create_model_card()
    assert (tmp_path / "README.md").read_text().count(START) == 1


def test_what_stands_outside_the_markers_is_kept(tmp_path: Path) -> None:
    system = train_into(tmp_path / "run", steps=2).callback_handler.callbacks[0].system
    card = tmp_path / "README.md"
    assert not write_model_card(tmp_path, system) and not card.exists()
    card.write_text("---\ntags: [x]\n---\n# Mine\n\nText.\n")
    assert write_model_card(tmp_path, system)
    once = card.read_text()
    assert once.startswith("---\ntags: [x]\n---\n# Mine\n\nText.\n\n" + START)
    card.write_text(once + "\nAfter.\n")
    assert write_model_card(tmp_path, system)
    assert card.read_text() == once + "\nAfter.\n"
    snapshot_row = json.loads((tmp_path / "run" / "chronomoe" / "snapshots.jsonl").read_text().splitlines()[-1])
    assert f"| {snapshot_row['layers'][1]['n_effective']:.2f} |" in once


@pytest.mark.parametrize(
    ("family", "preset", "words"),
    [
        ("mixtral", "observe", "Nothing acted"),
        ("mixtral", "balance", "A bias or a lens acted"),
        ("deepseek_v3", "balance", "a plain load routes as trained"),
    ],
)
def test_the_card_says_what_a_plain_load_loses(family: str, preset: str, words: str, tmp_path: Path) -> None:
    if family == "mixtral":
        system = train_into(tmp_path, steps=2, preset=preset).callback_handler.callbacks[0].system
    else:
        model = chronomoe_hf.wrap(moe_zoo.build(family), ChronoConfig.preset(preset, interval=1))
        system = chronomoe_hf.system_of(model)
        model.train()
        model(torch.randint(2, 60, (4, 16)))
        system.step(1)
    assert words in model_card_section(system)
