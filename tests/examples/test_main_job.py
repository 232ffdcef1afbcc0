"""The main job and its parts: text, tokenizer, blocks, cache, and the job itself end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path

import _text_job as job
import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer

SMALL = job.ModelSize(layers=2, hidden=32, intermediate=16, heads=2, experts=4, top_k=2, vocab=400, length=32)


@pytest.fixture(scope="module")
def tokenizer() -> job.PreTrainedTokenizerFast:
    return job.build_tokenizer(job.load_text("prose")["train"]["text"], SMALL.vocab)


@pytest.mark.parametrize("domain", ["prose", "code"])
def test_domains_are_split_by_document(domain: str) -> None:
    text = job.load_text(domain)
    train, valid = set(text["train"]["name"]), set(text["valid"]["name"])
    assert not train & valid
    assert len(train) > 50
    assert len(valid) > 5
    characters = [sum(map(len, text[part]["text"])) for part in ("train", "valid")]
    assert 0.05 < characters[1] / sum(characters) < 0.25


def test_the_domains_are_different_text() -> None:
    prose, code = (" ".join(job.load_text(domain)["train"]["text"]) for domain in ("prose", "code"))
    assert code.count("self.") / len(code) > 5 * prose.count("self.") / len(prose)


def test_unknown_domains_are_refused() -> None:
    with pytest.raises(ValueError, match="poetry.*prose, code"):
        job.load_text("poetry")


def test_max_chars_stops_after_the_document_that_reaches_it() -> None:
    short = job.load_text("code", max_chars=100_000)
    names = [*short["train"]["name"], *short["valid"]["name"]]
    lengths = [len(text) for part in short.values() for text in part["text"]]
    assert names
    assert sum(lengths) >= 100_000
    assert sum(lengths) - max(lengths) < 100_000


def test_the_tokenizer_is_reproducible_and_lossless(tokenizer: job.PreTrainedTokenizerFast) -> None:
    again = job.build_tokenizer(job.load_text("prose")["train"]["text"], SMALL.vocab)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert len(tokenizer) == SMALL.vocab
    assert tokenizer.convert_tokens_to_ids([job.PAD, job.BOS, job.EOS]) == [0, 1, 2]
    text = "def f(x):\n\treturn x ** 2  # größe\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_blocks_are_the_text_cut_in_order(tokenizer: job.PreTrainedTokenizerFast) -> None:
    documents = job.load_text("prose")["valid"]
    rows = job.blocks(documents, tokenizer, 32)
    expected: list[int] = []
    for text in documents["text"]:
        expected += [*tokenizer(text)["input_ids"], 2]
    flat = [token for row in rows["input_ids"] for token in row]
    assert len(flat) > 1000
    assert flat == expected[: len(flat)]
    assert len(expected) - len(flat) < 32
    assert rows["labels"][:] == rows["input_ids"][:]
    halves = job.blocks(documents, tokenizer, 32, seq2seq=True)
    assert [a + b for a, b in zip(halves["input_ids"], halves["labels"], strict=True)] == rows["input_ids"][:]


@pytest.mark.parametrize("arch", job.ARCHITECTURES)
def test_models_have_the_asked_shape(arch: str) -> None:
    model = job.build_model(arch, SMALL, seed=3)
    experts = [module for name, module in model.named_modules() if name.endswith(".experts")]
    assert len(experts) == SMALL.layers
    again = job.build_model(arch, SMALL, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_unknown_architectures_are_refused() -> None:
    with pytest.raises(ValueError, match="gpt2.*mixtral"):
        job.build_model("gpt2", SMALL)


def test_the_cache_key_depends_on_everything_that_decides_the_result() -> None:
    plain = ("mixtral", SMALL, job.Training(), "text")
    variants = [
        plain,
        ("qwen3_moe", *plain[1:]),
        ("mixtral", job.ModelSize(), *plain[2:]),
        ("mixtral", SMALL, job.Training(seed=1), "text"),
        ("mixtral", SMALL, job.Training(), "other"),
    ]
    assert len({job.cache_key(*variant) for variant in variants}) == len(variants)
    assert job.cache_key(*plain) == job.cache_key(*plain)


def test_pretraining_is_cached_and_loads_with_from_pretrained(tmp_path: Path) -> None:
    training = job.Training(steps=3, batch=4)
    path = job.pretrain_base("mixtral", SMALL, training, root=tmp_path)
    assert sorted(tmp_path.iterdir()) == [path], "the scratch directory must be gone"
    stamp = (path / "model.safetensors").stat().st_mtime_ns
    assert job.pretrain_base("mixtral", SMALL, training, root=tmp_path) == path
    assert (path / "model.safetensors").stat().st_mtime_ns == stamp
    assert len(AutoTokenizer.from_pretrained(path)) == SMALL.vocab
    from finetune_mixtral import load_model

    model = load_model(path, "mixtral", 1)
    assert model.config.num_experts_per_tok == 1
    assert model.model.layers[0].mlp.gate.top_k == 1
    fresh = job.build_model("mixtral", SMALL)
    assert not torch.equal(model.model.embed_tokens.weight, fresh.model.embed_tokens.weight)


def check_run(path: Path, presets: list[str], layers: int) -> None:
    """What every run of the job must leave behind."""
    arms = json.loads((path / "verdict.json").read_text())
    assert [arm["preset"] for arm in arms] == presets
    for arm in arms:
        assert len(arm["layers"]) == layers
        assert math.isfinite(arm["loss_before"])
        assert arm["loss_after"] < arm["loss_before"]
        for row in arm["layers"]:
            assert 1 / row["n_experts"] <= row["neff_fraction"] <= 1
            assert 0 <= row["dead"] < row["n_experts"]
        directory = path / arm["preset"]
        records = (directory / "chronomoe" / "snapshots.jsonl").read_text().splitlines()
        assert len(records) > 1
        final = directory / "final"
        assert {"chronomoe/state.json", "chronomoe/state.tensors", "model.safetensors", "tokenizer.json"} <= {
            str(file.relative_to(final)) for file in final.rglob("*")
        }


@pytest.mark.parametrize(("arch", "preset"), [("mixtral", "protect"), ("switch_transformers", "balance")])
def test_the_job_runs_end_to_end(
    arch: str,
    preset: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import finetune_mixtral
    from _verdict import print_verdict, save_report, save_verdict

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = finetune_mixtral.Options(
        arch=arch, preset=preset, compare=True, steps=12, pretrain_steps=3, interval=4, size=SMALL, output_dir=tmp_path
    )
    arms = finetune_mixtral.run(options)
    path = save_verdict(arms)
    report = save_report(arms)
    print_verdict(arms, path, Console(width=80), report)
    check_run(tmp_path, ["observe", preset], SMALL.layers)
    # Both arms start from the same weights and see the same text; `observe` changes no number before training.
    assert arms[0].loss_before == arms[1].loss_before
    printed = capsys.readouterr().out
    last = printed.strip().splitlines()
    assert last[-1].strip() == str(report) and "Content-Security-Policy" in report.read_text(encoding="utf-8")
    assert f"{preset} ends with" in printed and "beside observe" in " ".join(printed.split())
    for word in ("Neff/E", "max violation", "active alerts", "loss before", preset, "routing_events.jsonl"):
        assert word in printed


def test_the_command_line_fills_the_options() -> None:
    import finetune_mixtral

    options = finetune_mixtral.parse_arguments(
        ["--arch", "qwen3_moe", "--preset", "balance", "--compare", "--steps", "5", "--top-k", "2"]
    )
    assert (options.arch, options.preset, options.compare, options.steps, options.top_k) == (
        "qwen3_moe",
        "balance",
        True,
        5,
        2,
    )
    assert finetune_mixtral.parse_arguments([]) == finetune_mixtral.Options()
    with pytest.raises(SystemExit):
        finetune_mixtral.parse_arguments(["--preset", "guard"])
