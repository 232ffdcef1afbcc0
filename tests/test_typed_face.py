"""The public names are typed for users: mypy refuses a name that is not there and an argument that does not exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Libraries are left out: what they hold is not looked at here, and reading them takes minutes.
CONFIG = """[mypy]
strict = true
[mypy-torch.*,transformers.*,accelerate.*,datasets.*,peft.*,trl.*,safetensors.*,numpy.*,huggingface_hub.*]
follow_imports = skip
ignore_missing_imports = true
[mypy-chronomoe_hf.patches.*]
ignore_missing_imports = true
[mypy-chronomoe_hf.*]
ignore_errors = true
"""
RIGHT = """
import chronomoe_hf
from chronomoe_hf import ChronoConfig, RoutingEvent, attach, lifecycle, wrap
from chronomoe_hf.router import update_beta

wrap.__doc__, attach.__doc__, RoutingEvent.__name__, update_beta.__doc__
config: ChronoConfig = chronomoe_hf.ChronoConfig.observe(interval=5)
plan = chronomoe_hf.lifecycle.PrunePlan.load("plan.json")
reveal_type(lifecycle.export)
reveal_type(plan)
chronomoe_hf.telemetry, chronomoe_hf.errors.ChronoError
"""
WRONG = (
    ("chronomoe_hf.warp(1)", "attr-defined"),
    ("from chronomoe_hf import warp", "attr-defined"),
    ("lifecycle.plan_prnue(3)", "attr-defined"),
    ("lifecycle.export(3, 4, nonsense=1)", "call-arg"),
    ("router.update_betas(1)", "attr-defined"),
    ("chronomoe_hf.telemtry", "attr-defined"),
    ("chronomoe_hf.attach(1, conf=2)", "call-arg"),
    ('chronomoe_hf.ChronoCallback("obsreve")', "arg-type"),
)


def checked(source: str, directory: Path) -> str:
    (directory / "mypy.ini").write_text(CONFIG, encoding="utf-8")
    (directory / "user.py").write_text(source, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", ".cache", "user.py"]
    done = subprocess.run(
        command, cwd=directory, env={"MYPYPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True
    )
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


def test_a_typo_on_the_public_face_is_refused_and_right_code_is_not(tmp_path: Path) -> None:
    head = "import chronomoe_hf\nfrom chronomoe_hf import lifecycle, router\n"
    said = checked(head + "\n".join(line for line, _ in WRONG) + "\n", tmp_path)
    for number, (line, code) in enumerate(WRONG, start=head.count("\n") + 1):
        assert re.search(rf"^user.py:{number}: error: .*\[{code}\]$", said, flags=re.M), f"{line} passes:\n{said}"
    said = checked(RIGHT, tmp_path)
    assert " error: " not in said, said
    assert "def (model:" in said and "PrunePlan" in said, f"these are untyped:\n{said}"
