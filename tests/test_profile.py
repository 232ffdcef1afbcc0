"""profile: per domain, the counts of an independent recount, and records that readers of runs can read."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import _text_job
import datasets
import pytest
import torch
from safetensors.torch import load_file
from support import models as tiny
from support import moe_zoo, texts
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from chronomoe_hf.errors import ChronoError, DataError, NonFiniteLossError
from chronomoe_hf.profiling.data import Domain, sequences
from chronomoe_hf.telemetry import read_jsonl, read_manifest

LENGTH = 24


def model_of(family: str = "mixtral", **fields: Any) -> Any:
    return tiny.tiny_model(family, vocab_size=texts.VOCAB, **fields)


def domains() -> dict[str, list[str]]:
    docs = texts.documents(12)
    return {"first": list(docs[:5]), "second": list(docs[5:])}


def cut(docs: list[str], budget: int | None = None) -> list[list[int]]:
    """Every document in pieces of LENGTH tokens, `budget` tokens in all."""
    pieces, left = [], math.inf if budget is None else budget
    for doc in docs:
        ids = texts.tokenizer()(doc)["input_ids"]
        for start in range(0, len(ids), LENGTH):
            piece = ids[start : start + LENGTH][: int(min(left, LENGTH))]
            if piece:
                pieces.append(piece)
                left -= len(piece)
    return pieces


class Alone:
    """The plain model on one unpadded sequence at a time: choices, pairs and loss, from the routers' own outputs."""

    def __init__(self, model: Any) -> None:
        self.model = copy.deepcopy(model).eval()
        found = moe_zoo.routers_of(self.model)
        self.counts: list[Counter[int]] = [Counter() for _ in found]
        self.pairs: list[Counter[tuple[int, int]]] = [Counter() for _ in found]
        self.loss, self.targets = 0.0, 0
        for at, (adapter, router, _) in enumerate(found):
            router.register_forward_hook(self._hook(at, adapter))

    def _hook(self, at: int, adapter: Any) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            for chosen in adapter.read(module, output).index_TK.tolist():
                self.counts[at].update(chosen)
                self.pairs[at].update((i, j) for i in chosen for j in chosen)

        return hook

    @torch.no_grad()
    def feed(self, pieces: list[list[int]]) -> Alone:
        for piece in pieces:
            ids = torch.tensor([piece])
            log_p = self.model(input_ids=ids).logits[0].double().log_softmax(-1)
            for position, target in enumerate(piece[1:]):
                self.loss -= float(log_p[position, target])
                self.targets += 1
        return self

    def lists(self, num_experts: int) -> list[list[int]]:
        return [[counts[e] for e in range(num_experts)] for counts in self.counts]


def run(model: Any, data: Any, **options: Any) -> Any:
    options = {"length": LENGTH, "batch_size": 3, "interval": 2, "progress": False, "tokens": None, **options}
    return chronomoe_hf.profile(model, texts.tokenizer(), data, **options)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_counts_and_losses_are_those_of_unpadded_sequences(family: str) -> None:
    if family == "deepseek_v3":
        model = moe_zoo.build(family, vocab_size=texts.VOCAB)
        moe_zoo.randomise(model)
    else:
        model = model_of(family)
    report = run(model, domains())
    assert list(report.domains) == ["first", "second"]
    for name, docs in domains().items():
        found, alone = report.domains[name], Alone(model).feed(cut(docs))
        assert {len(piece) for piece in cut(docs)} != {LENGTH}, "bad test setup: nothing is padded"
        assert found.tokens == sum(map(len, cut(docs))) and found.sequences == len(cut(docs))
        assert found.counts == alone.lists(8)
        assert found.loss == pytest.approx(alone.loss / alone.targets, rel=1e-5)


def test_records_are_those_of_a_run(tmp_path: Path) -> None:
    model = model_of()
    report = run(model, domains(), output_dir=tmp_path / "out", model_name="tiny")
    for name, found in report.domains.items():
        directory = tmp_path / "out" / "domains" / name
        events, broken = read_jsonl(directory / "chronomoe" / "routing_events.jsonl")
        assert broken == 0 and {event["mode"] for event in events} == {"INFER"}
        for layer in (0, 1):
            rows = [event["expert_token_counts"] for event in events if event["layer_id"] == layer]
            assert [sum(column) for column in zip(*rows, strict=True)] == found.counts[layer]
            last = [event for event in events if event["layer_id"] == layer][-1]
            assert all(v is None or -1.0 <= v <= 1.0 for v in last["phi_slow"]) and any(last["contribution"])
        manifest = read_manifest(directory)
        assert manifest is not None and manifest["kind"] == "profile" and manifest["domain"] == name
    together, _ = read_jsonl(tmp_path / "out" / "chronomoe" / "routing_events.jsonl")
    tokens = sum(event["tokens"] for event in together if event["layer_id"] == 0)
    assert tokens == report.tokens
    steps = [event["step"] for event in together if event["layer_id"] == 0]
    assert steps == sorted(set(steps))
    written = json.loads((tmp_path / "out" / "chronomoe" / "profile.json").read_text())
    assert written == json.loads(json.dumps(report.to_record()))


def test_pairs_are_counted_and_ranked(tmp_path: Path) -> None:
    model = model_of()
    report = run(model, domains(), output_dir=tmp_path / "out")
    stored = load_file(tmp_path / "out" / "chronomoe" / "coactivation.safetensors")
    for name, docs in domains().items():
        alone = Alone(model).feed(cut(docs))
        for layer, pairs in enumerate(alone.pairs):
            want = [[pairs[i, j] for j in range(8)] for i in range(8)]
            assert stored[f"{name}.{layer}"].tolist() == want
            listed = report.domains[name].pairs[layer]
            assert listed and [p["lift"] for p in listed] == sorted((p["lift"] for p in listed), reverse=True)
            for pair in listed:
                i, j = pair["experts"]
                tokens = sum(map(len, cut(docs)))
                chance = want[i][i] * want[j][j] / tokens * (1 * 8) / (2 * 7)
                assert pair["tokens"] == want[i][j] and pair["lift"] == pytest.approx(want[i][j] / chance, rel=1e-3)
                assert pair["lift"] > 1.0


def test_distances_follow_the_definition() -> None:
    report = run(model_of(), domains())

    def entropy(values: list[float]) -> float:
        return -sum(v * math.log2(v) for v in values if v > 0)

    for layer in (0, 1):
        loads = [report.domains[name].counts[layer] for name in ("first", "second")]
        p, q = ([c / sum(load) for c in load] for load in loads)
        mean = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        want = math.sqrt(entropy(mean) - (entropy(p) + entropy(q)) / 2)
        assert report.distances[layer][0][1] == pytest.approx(want, abs=1e-9)
        assert report.distances[layer][0][0] == 0.0
    mean_distance = (report.distances[0][0][1] + report.distances[1][0][1]) / 2
    assert report.distance("first", "second") == pytest.approx(mean_distance) and mean_distance > 0.0


def test_the_budget_is_exact_and_per_domain() -> None:
    model = model_of()
    report = run(model, domains(), tokens=100)
    assert [domain.tokens for domain in report.domains.values()] == [100, 100]
    alone = Alone(model).feed(cut(domains()["first"], 100))
    assert report.domains["first"].counts == alone.lists(8)


def test_the_model_is_left_as_it_was() -> None:
    model = model_of()
    model.model.layers[0].eval()
    before = [(name, type(m), m.training, set(m.__dict__)) for name, m in model.named_modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    run(model, domains())
    assert [(name, type(m), m.training, set(m.__dict__)) for name, m in model.named_modules()] == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    with pytest.raises(DataError):
        run(model, {"empty": [""]})
    assert [(name, type(m), m.training, set(m.__dict__)) for name, m in model.named_modules()] == before


def test_a_wrapped_model_keeps_its_training_state() -> None:
    model = chronomoe_hf.wrap(model_of(), ChronoConfig(interval=2))
    system = chronomoe_hf.system_of(model)
    batch = tiny.tiny_batch("mixtral")
    model(**batch).loss.backward()
    system.step(1)
    before = system.state_dict()
    report = run(model, domains())
    after = system.state_dict()
    assert all(torch.equal(value, after["tensors"][name]) for name, value in before["tensors"].items())
    assert before["meta"] == after["meta"] and chronomoe_hf.system_of(model) is system
    plain = run(chronomoe_hf.unwrap(copy.deepcopy(model)), domains())
    assert report.domains["first"].counts == plain.domains["first"].counts


def test_an_encoder_decoder_reads_and_writes() -> None:
    model = model_of("switch_transformers", expert_capacity=64)
    report = run(model, domains())
    found = report.domains["first"]
    pieces = cut(domains()["first"])
    read, written = sum((len(p) + 1) // 2 for p in pieces), sum(max(len(p) // 2, 1) for p in pieces)
    assert [sum(layer) for layer in found.counts] == [read, read, written, written]
    assert found.loss is not None and 0.0 < found.loss < 50.0


# ---- sources -------------------------------------------------------------------------------------------------------


def test_every_kind_of_source_gives_the_same_tokens(tmp_path: Path) -> None:
    docs = list(texts.documents(4))
    table = datasets.Dataset.from_dict({"text": docs, "id": [1, 2, 3, 4]})
    table.to_json(tmp_path / "a.jsonl")
    table.to_parquet(tmp_path / "a.parquet")
    table.to_csv(tmp_path / "a.csv")
    table.save_to_disk(str(tmp_path / "saved"))
    ids = [texts.tokenizer()(doc)["input_ids"] for doc in docs]
    want = cut(docs)
    sources: list[Any] = [docs, table, table.to_iterable_dataset(), ids, [{"input_ids": row} for row in ids]]
    sources += [tmp_path / name for name in ("a.jsonl", "a.parquet", "a.csv", "saved")]
    for source in sources:
        assert list(sequences(Domain("d", source), texts.tokenizer(), LENGTH, None)) == want, source
    (tmp_path / "a.txt").write_text("\n".join(docs))
    (only,) = [cut(["\n".join(docs)])]
    assert list(sequences(Domain("d", tmp_path / "a.txt"), texts.tokenizer(), LENGTH, None)) == only
    other = Domain("d", datasets.Dataset.from_dict({"body": docs}), column="body")
    assert list(sequences(other, texts.tokenizer(), LENGTH, None)) == want


def test_conversations_go_through_the_chat_template() -> None:
    tokenizer = texts.tokenizer()
    rows = [{"messages": [{"role": "user", "content": "def"}, {"role": "assistant", "content": "a function"}]}]
    domain = Domain("d", rows, column="messages")
    with pytest.raises(DataError, match="no chat template"):
        list(sequences(domain, tokenizer, 99, None))
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    assert list(sequences(domain, tokenizer, 99, None)) == [tokenizer("[user]def[assistant]a function")["input_ids"]]


LIST = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
QUIET = "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}[{{ m.content }}]{% endif %}{% endfor %}"
JOINS = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
PARTS = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
DEMANDS = "{{ raise_exception('roles must alternate') }}"


def chatting(template: str) -> Any:
    tokenizer = texts.tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [LIST, QUIET, JOINS, PARTS])
@pytest.mark.parametrize(
    "messages",
    [
        [{"from": "human", "value": "def a"}, {"from": "gpt", "value": "a function"}],
        [{"role": "user", "content": "def a"}, {"role": "assistant", "content": "a function"}],
        [
            {"role": "user", "content": [{"type": "text", "text": "def "}, {"type": "text", "text": "a"}]},
            {"role": "assistant", "content": "a function"},
        ],
        [
            {"role": "user", "content": "def a"},
            {"role": "assistant", "content": None, "tool_calls": []},
            {"role": "assistant", "content": "a function"},
        ],
    ],
    ids=["sharegpt", "messages", "parts", "tool call"],
)
def test_what_is_said_arrives_in_every_form(messages: list[Any], template: str) -> None:
    tokenizer = chatting(template)
    domain = Domain("d", [{"conversations": messages}], column="conversations")
    (tokens,) = sequences(domain, tokenizer, 99, None)
    text = tokenizer.decode(tokens)
    assert "def a" in text and "a function" in text and "from" not in text and "type" not in text


@pytest.mark.parametrize(
    ("template", "message", "words"),
    [
        (LIST, {"speaker": "me", "text": "hello"}, r"row 1: a message is \{role, content\}.*got speaker, text"),
        (
            QUIET,
            {"role": "narrator", "content": "once upon"},
            r"row 1: the chat template leaves out.*once .*narrator",
        ),
        (
            DEMANDS,
            {"role": "user", "content": "hello"},
            r"row 1: .*not take the conversation: roles must alternate",
        ),
        (
            LIST,
            {"role": "user", "content": [{"type": "image", "url": "x"}]},
            r"row 1: .*holds image, and a profile",
        ),
        (LIST, {"role": "user", "content": 7}, r"row 1: the content of a message is text.*got int"),
    ],
    ids=["no role", "unknown role", "template error", "image", "number"],
)
def test_a_conversation_whose_text_does_not_arrive_is_refused(
    template: str, message: dict[str, Any], words: str
) -> None:
    domain = Domain("d", [{"messages": [message]}], column="messages")
    with pytest.raises(DataError, match=words):
        list(sequences(domain, chatting(template), 99, None))


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "switch_transformers"])
def test_a_checkpoint_without_a_tokenizer_is_named(family: str, tmp_path: Path) -> None:
    moe_zoo.build(family).save_pretrained(tmp_path)
    empty = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"has no vocabulary .*--tokenizer"):
        list(sequences(Domain("d", ["the dog runs"]), empty, 99, None))
    empty.chat_template = LIST
    with pytest.raises(DataError, match=r"has no vocabulary .*--tokenizer"):
        list(sequences(Domain("d", [[{"role": "user", "content": "hello"}]]), empty, 99, None))


def test_a_text_that_the_tokenizer_does_not_know_is_named() -> None:
    words = Tokenizer(WordLevel({"[UNK]": 0, "[PAD]": 1, "known": 2, "word": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    assert len(list(sequences(Domain("d", ["known word " * 40]), tokenizer, 99, None))) == 1
    with pytest.raises(DataError, match=r"80 of the first 120 tokens are unknown.*--tokenizer"):
        list(sequences(Domain("d", ["known strange thing " * 40]), tokenizer, 99, None))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d / "missing.txt", r"no file .*missing\.txt"),
        (lambda d: _file(d / "a.pdf", "x"), r"suffix '\.pdf'; known are \.txt"),
        (lambda d: _file(d / "a.txt", ""), r"a\.txt holds no text"),
        (lambda d: _file(d / "a.txt", " \n\n"), r"a\.txt holds no text"),
        (lambda d: _file(d / "a.jsonl", '{"txet": "hello"}\n'), r"no column 'text', it has txet; did you mean 'txet'"),
        (lambda d: _file(d / "a.jsonl", '{"text": '), r"a\.jsonl cannot be read"),
        (lambda d: _file(d / "a.jsonl", '{"text": 3}\n'), r"row 1: expected text.*got int"),
        (lambda d: _file(d / "a.txt", b"\xff\xfe\x00\x81"), r"a\.txt cannot be read: .*utf-8"),
        (lambda d: [], "list holds no text"),
        (lambda d: 7, "cannot read text from a int"),
        (lambda d: {}, "no data: pass"),
        (lambda d: {"a/b": ["x"]}, "a domain needs a name"),
        (lambda d: d, "a directory that datasets cannot load"),
        (lambda d: "some/hub-name", "some/hub-name cannot be read.*needs the network"),
    ],
)
def test_data_that_cannot_be_read_is_refused_before_anything_is_written(
    make: Any, message: str, tmp_path: Path
) -> None:
    source = make(tmp_path)
    with pytest.raises(DataError, match=message):
        run(model_of(), source, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _file(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_other_mistakes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer was given"):
        chronomoe_hf.profile(model_of(), None, ["text"], progress=False)
    with pytest.raises(DataError, match="tokens is at least 1, got 0"):
        run(model_of(), domains(), tokens=0)
    run(model_of(), domains(), tokens=50, output_dir=tmp_path / "out")
    with pytest.raises(DataError, match="exists already"):
        run(model_of(), domains(), tokens=50, output_dir=tmp_path / "out")


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    model = model_of()
    with torch.no_grad():
        model.lm_head.weight.mul_(math.nan)
    with pytest.raises(NonFiniteLossError, match="loss is nan in domain 'first'"):
        run(model, domains())
    assert issubclass(NonFiniteLossError, ChronoError) and not hasattr(model, "_chrono_system")


# ---- dtypes and devices ------------------------------------------------------------------------------------


def test_bf16_and_a_model_that_is_partly_on_disk(tmp_path: Path) -> None:
    model_of(dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    model = type(model_of()).from_pretrained(tmp_path / "model", dtype="auto")
    assert model.dtype == torch.bfloat16
    whole = run(model, domains())
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    split = type(model).from_pretrained(
        tmp_path / "model", dtype="auto", device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    assert any(parameter.is_meta for parameter in split.parameters()), "bad test setup: nothing is on disk"
    parts = run(split, domains())
    for name in domains():
        assert parts.domains[name].counts == whole.domains[name].counts
        assert parts.domains[name].loss == pytest.approx(whole.domains[name].loss, abs=1e-6)


@pytest.mark.slow
def test_a_model_that_the_demo_pretrained(tmp_path: Path) -> None:
    size = _text_job.ModelSize(layers=2, hidden=64, intermediate=64, vocab=512, length=64)
    base = _text_job.pretrain_base("mixtral", size, _text_job.Training(steps=30, batch=8), root=tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    docs = {name: list(_text_job.load_text(name)["valid"]["text"])[:6] for name in ("prose", "code")}
    options: dict[str, Any] = {"tokens": 3_000, "length": 100, "batch_size": 4, "progress": False}
    report = chronomoe_hf.profile(model, tokenizer, docs, **options)
    for name, rows in docs.items():
        pieces = [piece for row in rows for piece in pieces_of(tokenizer(row)["input_ids"], 100)]
        fed, left = [], 3_000
        for piece in pieces:
            fed += [piece[:left]] if left else []
            left -= len(fed[-1]) if left else 0
        alone = Alone(model).feed(fed)
        assert report.domains[name].counts == alone.lists(8) and report.domains[name].tokens == 3_000
        assert report.domains[name].loss == pytest.approx(alone.loss / alone.targets, rel=1e-4)
    assert report.distance("prose", "code") > 0.01


def pieces_of(ids: list[int], length: int) -> list[list[int]]:
    return [ids[start : start + length] for start in range(0, len(ids), length)]
