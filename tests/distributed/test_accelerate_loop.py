"""examples/accelerate_loop.py: killed and resumed it is the uninterrupted run, bit for bit, under DDP and FSDP2."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate_loop
import pytest
import torch
from safetensors.torch import load_file
from support.run_records import assert_same, later_records
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from chronomoe_hf.checkpoint.state_file import read_state

HERE = Path(__file__).parent
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "MixtralDecoderLayer",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}
# One pass over the text is 25 steps or so: the checkpoint at step 40 lies in the second pass, and inside a window.
STEPS, KEPT = 46, 40
ARGUMENTS = ["--steps", str(STEPS), "--save-every", "20", "--interval", "6"]


def kill_after(process: subprocess.Popen[str], line: str) -> None:
    """SIGKILL everything as soon as `line` is printed."""
    assert process.stdout is not None
    seen = []
    for printed in process.stdout:
        seen.append(printed)
        if line in printed:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return
    pytest.fail(f"{line!r} was never printed:\n{''.join(seen)[-4000:]}")


def final_weights(output_dir: Path) -> dict[str, torch.Tensor]:
    final = output_dir / "final"
    if (final / "model.safetensors").is_file():
        return load_file(final / "model.safetensors")
    dcp_to_torch_save(final / "pytorch_model_fsdp_0", output_dir / "whole.pt")
    flat = torch.load(output_dir / "whole.pt", weights_only=True)
    return dict(flat.get("model", flat))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_killed_and_resumed(
    engine: str, tmp_path: Path, start_script: Callable[..., Any], open_script: Callable[..., Any]
) -> None:
    script, environment = HERE / "loop.py", FSDP if engine == "fsdp" else {}
    whole, parted = tmp_path / "a" / "whole", tmp_path / "b" / "parted"
    returncode, output = start_script(script, [*ARGUMENTS, "--output-dir", str(whole)], 2, environment)
    assert returncode == 0, output[-6000:]
    for word in ("worst Neff/E", "protect: last window", "routing_events.jsonl", "verdict.json"):
        assert word in output
    (arm,) = json.loads((whole.parent / "verdict.json").read_text())
    assert arm["loss_after"] < arm["loss_before"] - 0.5
    kill_after(open_script(script, [*ARGUMENTS, "--output-dir", str(parted)], 2, environment), f"step-{KEPT}\n")
    assert not (parted / "final").exists()
    returncode, output = start_script(script, [*ARGUMENTS, "--output-dir", str(parted), "--resume"], 2, environment)
    assert returncode == 0, output[-6000:]

    tensors, meta = read_state(whole / "final")
    found, found_meta = read_state(parted / "final")
    assert meta["step"] == STEPS and meta["governed"]
    assert_same(found, tensors)
    for name in ("controller", "lifecycle", "alerts", "steering"):
        assert found_meta[name] == meta[name]
    assert_same(final_weights(parted), final_weights(whole))
    theirs, ours = (later_records(path, KEPT) for path in (whole, parted))
    assert [record["step"] for record in theirs["snapshots"]] == [42, STEPS]
    assert ours == theirs


def test_one_process_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accelerate_loop.main(
        ["--steps", "6", "--interval", "3", "--save-every", "4", "--output-dir", str(tmp_path / "run")]
    )
    assert "Verdict" in capsys.readouterr().out
    assert accelerate_loop.last_checkpoint(tmp_path / "run").name == "step-4"
    _, meta = read_state(tmp_path / "run" / "step-4")
    assert meta["step"] == 4 and meta["window_steps"] == 1


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no complete checkpoint in .*start without --resume"):
        accelerate_loop.last_checkpoint(tmp_path)


def test_the_command_line_fills_the_options() -> None:
    assert accelerate_loop.parse_arguments([]) == accelerate_loop.Options()
    options = accelerate_loop.parse_arguments(["--preset", "balance", "--steps", "9", "--resume"])
    assert (options.preset, options.steps, options.resume) == ("balance", 9, True)
