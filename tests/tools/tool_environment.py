"""A tool's packages in a folder of their own, and a process that sees them.

A folder (`pip install --no-deps --target`, below TOOLS_DIR, else build/tools) stands in front of the environment that
runs this, so that torch is there once.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples")]

from support import tool_inputs

PLACE = Path(os.environ.get("TOOLS_DIR", ROOT / "build" / "tools"))
QUIET = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
    "DO_NOT_TRACK": "1", "AXOLOTL_DO_NOT_TRACK": "1", "PYTHONWARNINGS": "ignore",
}  # fmt: skip
LIMIT = 900  # seconds a process may take
Result = dict[str, Any]


@dataclass
class Run:
    """What a case is given: its tool's packages, an empty folder, and how to start a process there."""

    tool: Tool
    folder: Path

    def start(self, *command: str, recount: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        """Run Python on `command` with the tool's packages; `recount` names the files that its own counts go to."""
        return self.command(sys.executable, *command, recount=recount, **env)

    def command(self, *command: str, recount: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        """The same for any command; the tool's console scripts (see `scripts`) are found by name."""
        path = [str(PLACE / name) for name in (self.tool.name, *self.tool.beside)]
        paths = os.pathsep.join([*path, str(ROOT / "tests"), str(ROOT / "examples")])
        words = os.pathsep.join([str(self.folder / "bin"), os.environ.get("PATH", "")])
        full = {**os.environ, **QUIET, "PYTHONPATH": paths, "PATH": words, **env}
        if recount:
            full = tool_inputs.recount_environment(self.folder / recount, full)
        return subprocess.run(
            command, cwd=self.folder, env=full, capture_output=True, text=True, timeout=LIMIT, check=False
        )

    def scripts(self, *names: str) -> None:
        """Put these console scripts of the installed packages on the path of `command`, as pip writes them."""
        (self.folder / "bin").mkdir(exist_ok=True)
        for each in distributions(path=[str(PLACE / self.tool.name), *sys.path]):
            for entry in each.entry_points:
                target = self.folder / "bin" / entry.name
                if entry.group == "console_scripts" and entry.name in names and not target.exists():
                    call = f"import sys\nfrom {entry.module} import {entry.attr}\n"
                    call += f"if __name__ == '__main__':\n    sys.exit({entry.attr}())\n"
                    target.write_text(f"#!{sys.executable}\n{call}")
                    target.chmod(0o755)

    def equal(self, output: str, recount: str = "recount") -> Result:
        """Whether the records of a run say what the process has counted."""
        ours, theirs = tool_inputs.recorded(self.folder / output), tool_inputs.recounted(self.folder / recount)
        return {
            "result": "ok" if ours == theirs else "FAILED",
            "counts": "EQUAL" if ours == theirs else "DIFFERENT",
            "assignments": sum(map(sum, ours)),
        }


@dataclass
class Tool:
    """A tool, what is installed for it, and its cases: name -> function of a Run that returns a result or several."""

    name: str
    packages: tuple[str, ...]
    cases: dict[str, Callable[[Run], Result | list[Result]]]
    beside: tuple[str, ...] = ()
    notes: str = ""
    stubs: dict[str, str] = field(default_factory=dict)


def build(tool: Tool, tools: list[Tool]) -> str | None:
    """Make (or reuse) the tool's folder; why that is not possible, or None."""
    for beside in tool.beside:
        missing = build(next(each for each in tools if each.name == beside), tools)
        if missing is not None:
            return missing
    if not tool.packages:
        return None
    PLACE.mkdir(parents=True, exist_ok=True)
    with open(PLACE / f"{tool.name}.lock", "w") as lock:  # tests on several workers want the same folder
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _install(tool)


def _install(tool: Tool) -> str | None:
    home = PLACE / tool.name
    if not (home / ".installed").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        pip += ["--no-deps", "--no-compile", "--target", str(home)]
        done = subprocess.run([*pip, *tool.packages], capture_output=True, text=True, check=False)
        if done.returncode:
            return done.stderr.strip().splitlines()[-1][:200]
        for name, text in tool.stubs.items():
            (home / name).write_text(text)
        (home / ".installed").touch()
    return None


def versions(tool: Tool) -> dict[str, str]:
    """Versions that a tool's processes see, of what matters."""
    wanted = ["transformers", "trl", "peft", "accelerate", *[each.split("==")[0] for each in tool.packages[:1]]]
    own = [str(PLACE / name) for name in (tool.name, *tool.beside)]
    found: dict[str, str] = {}
    for each in distributions(path=[*own, *sys.path]):
        found.setdefault(each.metadata["Name"].lower().replace("_", "-"), each.version)
    return {name: found[name] for name in wanted if name in found}
