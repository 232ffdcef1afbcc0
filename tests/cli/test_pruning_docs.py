"""Every block of docs/profile_and_export.md runs, in order, and leaves what the text says."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from support import models as tiny
from support import texts
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from chronomoe_hf.cli.main import app
from chronomoe_hf.export.cut_model import REFUSED

PAGE = Path(__file__).resolve().parents[2] / "docs" / "profile_and_export.md"


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```", text, flags=re.M | re.S)
    assert [kind for kind, _ in blocks] == ["bash", "python", "bash", "python"]
    monkeypatch.chdir(tmp_path)
    tiny.tiny_model("mixtral", vocab_size=texts.VOCAB).save_pretrained("model")
    texts.tokenizer().save_pretrained("model")
    docs = texts.documents(30, 600)
    Path("prose.txt").write_text("\n\n".join(docs[:10]))
    for name, part in (("code", docs[10:20]), ("heldout", docs[20:])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps({"text": doc}) + "\n" for doc in part))
    names: dict[str, Any] = {}
    for kind, block in blocks:
        if kind == "python":
            exec(compile(block, str(PAGE), "exec"), names)
            continue
        for line in block.splitlines():
            command, *arguments = shlex.split(line)
            assert command == "chronomoe"
            done = CliRunner().invoke(app, arguments)
            assert done.exit_code == 0, (line, done.output, done.exception)
    assert re.search(r"^from_python: 8 -> 6 experts a layer", capsys.readouterr().out, flags=re.M)
    for name in ("smaller", "refitted", "from_python", "from_files"):
        assert AutoModelForCausalLM.from_pretrained(name).config.num_local_experts == 6
        assert Path(name, "prune_plan.json").is_file() and "Experts removed" in Path(name, "README.md").read_text()
    assert {path.name for path in Path("profile/domains").iterdir()} == {"prose", "code"}
    refused = re.search(r"the families (.*?), each with its reason", text, flags=re.S)
    assert refused is not None and set(re.findall(r"`(\w+)`", refused[1])) == set(REFUSED)
