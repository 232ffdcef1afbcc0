"""trace: every token's experts, weights, scores and margin equal what the plain router says, padded and packed."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import models as tiny
from support import moe_zoo, texts
from typer.testing import CliRunner

import chronomoe_hf
from chronomoe_hf.cli.main import app
from chronomoe_hf.errors import ConfigError, DataError
from chronomoe_hf.tracing.layer import NOWHERE
from chronomoe_hf.tracing.tokens import texts_of

FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe", "switch_transformers"]
CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"


def model_of(family: str, **fields: Any) -> Any:
    return tiny.tiny_model(family, vocab_size=texts.VOCAB, train=False, **fields)


def some_texts(num: int = 5) -> list[str]:
    return [document[: 30 + 23 * at] for at, document in enumerate(texts.documents(num))]


class Plain:
    """What the routers of an untouched copy return for the inputs of a forward, row by row."""

    def __init__(self, model: Any) -> None:
        self.model = copy.deepcopy(model).eval()
        self.outputs: list[list[Any]] = []
        found = moe_zoo.routers_of(self.model)
        self.adapters = [adapter for adapter, _, _ in found]
        self.routers = [router for _, router, _ in found]
        for at, router in enumerate(self.routers):
            router.register_forward_hook(lambda module, args, output, at=at: self.outputs[-1].insert(at, output))

    def __call__(self, **inputs: Any) -> list[tuple[Any, Any, Any]]:
        """``(ids, weights, logits)`` of every layer, flat over the rows."""
        self.outputs.append([])
        with torch.no_grad():
            self.model(**inputs)
        out = []
        for adapter, router, output in zip(self.adapters, self.routers, self.outputs[-1], strict=True):
            routing = adapter.read(router, output)
            weights = output[adapter.weights_index].reshape(routing.index_TK.shape)
            out.append((routing.index_TK, weights, routing.logits_TE))
        return out


def check(layer: Any, tokens: list[int], expected: tuple[Any, Any, Any], rows: list[int], scores: Any) -> None:
    """Tokens of one layer against rows of the plain router's output."""
    index_TK, weight_TK, logits_TE = (value[rows] for value in expected)
    assert np.array_equal(layer.index_TK[tokens], index_TK.numpy())
    assert np.array_equal(layer.weight_TK[tokens], weight_TK.float().numpy())
    score_TE = scores(logits_TE).float()
    for at, token in enumerate(tokens):
        chosen = index_TK[at].tolist()
        others = [e for e in range(layer.num_experts) if e not in chosen]
        best = max(others, key=lambda e: float(score_TE[at, e]))
        lowest = min(float(score_TE[at, e]) for e in chosen)
        assert layer.next_T[token] == best
        assert layer.margin_T[token] == pytest.approx(lowest - float(score_TE[at, best]), abs=1e-6)
        assert layer.score_TK[token].tolist() == pytest.approx([float(score_TE[at, e]) for e in chosen], abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_has_the_routers_own_output_with_padding(family: str) -> None:
    model = model_of(family)
    plain = Plain(model)
    given = some_texts()
    found = chronomoe_hf.trace(model, texts.tokenizer(), given, batch_size=3, length=64)
    coded = [texts.tokenizer()(text)["input_ids"] for text in given]
    assert found.ids == [one for ids in coded for one in ids] and "".join(found.pieces) == "".join(given)
    pieces = [ids[start : start + 64] for ids in coded for start in range(0, len(ids), 64)]
    assert len({len(piece) for piece in pieces}) > 2, "no padding is tested"
    start = 0
    for at in range(0, len(pieces), 3):
        rows = pieces[at : at + 3]
        start = check_batch(found, plain, family, rows, start)
    assert start == len(found.ids)


def check_batch(found: Any, plain: Plain, family: str, rows: list[list[int]], start: int) -> int:
    from chronomoe_hf.profiling.batches import collate

    batch = collate(rows, plain.model, 0)
    layers = plain(**batch.inputs)
    encoder = family == "switch_transformers"
    for at, layer in enumerate(found.layers):
        writes = encoder and "decoder" in layer.name.split(".")
        mask = batch.inputs["decoder_attention_mask" if writes else "attention_mask"]
        place, tokens = start, []
        for row in rows:
            half = (len(row) + 1) // 2
            own = range(place, place + len(row))
            tokens += list(own[half:] if writes else own[:half] if encoder else own)
            place += len(row)
        real = torch.nonzero(mask.reshape(-1))[:, 0].tolist()
        if writes:  # the row of a position that writes nothing stands for no token
            assert len(real) == len(tokens)
        scores = lambda logits, at=at: plain.adapters[at].distribution(plain.routers[at], logits)  # noqa: E731
        check(layer, tokens, layers[at], real, scores)
        unseen = sorted(set(range(start, place)) - set(tokens))
        assert (layer.index_TK[unseen] == NOWHERE).all() and bool(unseen) is encoder
    return place


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "switch_transformers"])
def test_every_token_has_the_routers_own_output_when_packed(family: str) -> None:
    model = model_of(family)
    plain = Plain(model)
    given = some_texts(3)
    found = chronomoe_hf.trace(model, texts.tokenizer(), given, packed=True, length=1000)
    coded = [texts.tokenizer()(text)["input_ids"] for text in given]
    row = list(itertools.chain(*coded))
    position = [at for ids in coded for at in range(len(ids))]
    layers = plain(input_ids=torch.tensor([row]), position_ids=torch.tensor([position]), use_cache=False)
    tokens = list(range(len(row)))
    for at, layer in enumerate(found.layers):
        scores = lambda logits, at=at: plain.adapters[at].distribution(plain.routers[at], logits)  # noqa: E731
        check(layer, tokens, layers[at], tokens, scores)
    if family in ("mixtral", "qwen2_moe", "qwen3_moe"):  # texts of a packed row do not see each other
        alone = chronomoe_hf.trace(model, texts.tokenizer(), given, length=1000)
        for one, other in zip(found.layers, alone.layers, strict=True):
            assert np.array_equal(one.index_TK, other.index_TK)
            assert np.allclose(one.weight_TK, other.weight_TK, atol=1e-5)


def test_switch_cannot_be_packed() -> None:
    with pytest.raises(DataError, match="packed"):
        chronomoe_hf.trace(model_of("switch_transformers"), texts.tokenizer(), "some text", packed=True)


def test_the_model_is_left_as_it_was_and_phi_is_a_cosine() -> None:
    model = model_of("qwen3_moe").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    found = chronomoe_hf.trace(model, texts.tokenizer(), some_texts(2))
    assert model.training and [type(module) for module in model.modules()] == classes
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for layer in found.layers:
        used = set(layer.index_TK.ravel().tolist())
        known = {expert for expert, phi in enumerate(layer.phi) if phi is not None}
        assert known and known <= used
        assert all(-1.0 <= phi <= 1.0 for phi in layer.phi if phi is not None)


def test_two_models_on_one_text() -> None:
    one, same, other = model_of("mixtral"), model_of("mixtral"), model_of("mixtral", seed=1)
    assert_same = chronomoe_hf.trace(one, texts.tokenizer(), some_texts(2), against=same)
    assert [assert_same.changed(at) for at in range(2)] == [0.0, 0.0]
    found = chronomoe_hf.trace(one, texts.tokenizer(), some_texts(2), against=other)
    assert found.other is not None
    for at in range(2):
        expected = float((found.layers[at].first_T != found.other.layers[at].first_T).mean())
        assert found.changed(at) == expected > 0.0
    assert (found.title, found.other.title) == ("MixtralForCausalLM (1)", "MixtralForCausalLM (2)")
    assert [view.label for view in found.figure().views] == [found.title, found.other.title]
    named = chronomoe_hf.trace(one, texts.tokenizer(), "a text", against=other, model_name="a", against_name="b")
    assert named.other is not None and (named.title, named.other.title) == ("a", "b")
    with pytest.raises(DataError, match="MoE layers"):
        chronomoe_hf.trace(one, texts.tokenizer(), "a text", against=model_of("mixtral", num_hidden_layers=1))


def test_a_conversation_goes_through_the_template() -> None:
    reader = texts.tokenizer()
    messages = [{"role": "user", "content": "what is a list?"}, {"role": "assistant", "content": "a sequence"}]
    with pytest.raises(DataError, match="no chat template"):
        texts_of(messages, reader)
    reader.chat_template = CHAT
    found = chronomoe_hf.trace(model_of("mixtral"), reader, messages)
    rendered = reader.apply_chat_template(messages, tokenize=False)
    assert "".join(found.pieces) == rendered
    assert found.ids == reader(rendered, add_special_tokens=False)["input_ids"]
    assert len(texts_of([messages, "and a text"], reader)) == 2


@pytest.mark.parametrize("text", [5, [], "", [5], [[]], None])
def test_what_is_no_text_is_refused(text: Any) -> None:
    with pytest.raises(DataError, match="text"):
        chronomoe_hf.trace(model_of("mixtral"), texts.tokenizer(), text)


def test_a_letter_of_several_tokens_stands_once() -> None:
    text = "naïve 👩‍🔬 ünïcode   spaces\n\tand tabs "
    (tokens,) = texts_of(text, texts.tokenizer())
    assert "".join(tokens.pieces) == text and len(tokens) > 20 and "" in tokens.pieces


def test_files_and_tables(tmp_path: Path) -> None:
    found = chronomoe_hf.trace(model_of("mixtral"), texts.tokenizer(), some_texts(4), tokens=40)
    assert len(found.ids) == 40
    record = json.loads(found.save(tmp_path / "t.json").read_text())
    assert record["layers"][0]["experts"] == found.layers[0].index_TK.tolist()
    page = found.save(tmp_path / "t.html").read_text()
    assert "default-src 'none'" in page and "http:" not in page
    table = found.to_pandas()
    assert len(table) == 40 * 2 * 2 and set(table["layer"]) == {0, 1}
    row = table[(table.token == 7) & (table.layer == 1) & (table.slot == 0)].iloc[0]
    assert row.expert == found.layers[1].index_TK[7, 0] and row.weight == found.layers[1].weight_TK[7, 0]
    assert len(repr(found)) < 100 and "<svg" in found._repr_html_()
    with pytest.raises(ConfigError, match=r"\.html or \.json"):
        found.save(tmp_path / "t.txt")


def test_the_page_holds_what_the_trace_holds(tmp_path: Path) -> None:
    import base64
    import re

    found = chronomoe_hf.trace(model_of("mixtral"), texts.tokenizer(), "</script><b>text</b>", model_name="<i>m</i>")
    page = found.save(tmp_path / "t.html").read_text()
    assert "<i>m</i>" not in page and page.count("</script>") == 3
    data = json.loads(re.search(r'id="chronomoe-page">(.*?)</script>', page, re.S)[1])  # type: ignore[index]
    assert data["pieces"] == found.pieces
    for shown, layer in zip(data["models"][0]["layers"], found.layers, strict=True):
        index = np.frombuffer(base64.b64decode(shown["index"]), "<u2").reshape(layer.index_TK.shape)
        weight = np.frombuffer(base64.b64decode(shown["weight"]), "<u2").reshape(layer.index_TK.shape)
        margin = np.frombuffer(base64.b64decode(shown["margin"]), "<i2")
        assert np.array_equal(index, layer.index_TK)
        assert np.allclose(weight / 65535 * shown["top"], layer.weight_TK, atol=1e-4)
        assert np.allclose(margin / 32767, layer.margin_T, atol=1e-4)


def test_a_long_text_of_a_large_model_stays_below_three_megabytes() -> None:
    from chronomoe_hf.tracing.layer import TracedLayer
    from chronomoe_hf.tracing.page import trace_page
    from chronomoe_hf.tracing.records import Trace

    generator, tokens = np.random.default_rng(0), 4000
    layers = [
        TracedLayer(
            layer_id=at,
            name=f"model.layers.{at}.mlp.gate",
            num_experts=128,
            top_k=8,
            index_TK=generator.integers(0, 128, (tokens, 8)).astype(np.int32),
            weight_TK=generator.random((tokens, 8)).astype(np.float32),
            kept_TK=np.ones((tokens, 8), dtype=bool),
            score_TK=generator.random((tokens, 8)).astype(np.float32),
            margin_T=generator.random(tokens).astype(np.float32),
            next_T=generator.integers(0, 128, tokens).astype(np.int32),
            phi=[0.1] * 128,
        )
        for at in range(48)
    ]
    fields = {"ids": list(range(tokens)), "pieces": ["word "] * tokens, "special": [False] * tokens}
    made = Trace(model_name="m", model_class="M", text_of=[0] * tokens, layers=layers, **fields)
    page = trace_page([made, made], made.figure())
    assert len(page.encode()) < 3e6 and "The page shows the first" in page


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    model_of("qwen3_moe").save_pretrained(directory)
    texts.tokenizer().save_pretrained(directory)
    return directory


def test_the_command(saved: Path, tmp_path: Path) -> None:
    page, file = tmp_path / "t.html", tmp_path / "a.txt"
    file.write_text("def f(x):\n    return x")
    run = CliRunner().invoke(
        app, ["trace", str(saved), "--text", "one", "--file", str(file), "-o", str(page), "--json"]
    )
    assert run.exit_code == 0, run.output
    said = json.loads(run.output)
    assert said["trace"] == str(page) and len(said["layers"]) == 2 and '"(","x",")"' in page.read_text()
    run = CliRunner().invoke(app, ["trace", str(saved), "--text", "one", "--against", str(saved), "-o", str(page)])
    assert run.exit_code == 0 and "0.0 % of the tokens have another first expert" in run.output


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere"], 2, "--text"),
        (["nowhere", "--text", "x", "-o", "t.pdf"], 2, ".html"),
        (["nowhere", "--file", "nofile.txt"], 1, "no file nofile.txt"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(arguments: list[str], code: int, words: str) -> None:
    run = CliRunner().invoke(app, ["trace", *arguments])
    assert run.exit_code == code
    assert words in (run.output if code == 2 else str(run.exception))
