"""Pictures: what is drawn equals a recount; SVG, PNG and HTML are what they should be."""

from __future__ import annotations

import builtins
import math
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from safetensors.numpy import load_file
from support import models as tiny
from support import moe_zoo, texts

import chronomoe_hf
from chronomoe_hf.errors import ConfigError
from chronomoe_hf.pictures.domains import DomainLoads
from chronomoe_hf.pictures.drawing import Drawing, Look
from chronomoe_hf.pictures.flows import flow_picture, strongest
from chronomoe_hf.pictures.loads import Load, before_after_picture, load_picture, moved
from chronomoe_hf.report import write_report
from chronomoe_hf.report.data import load_run
from chronomoe_hf.report.pictures import domain_loads, profile_figures

SVG = "{http://www.w3.org/2000/svg}"


def made_loads(domains: int = 2, layers: int = 3, experts: int = 8, k: int = 2, tokens: int = 4000) -> DomainLoads:
    """A table of counts in which no expert has more than every token."""
    generator = np.random.default_rng(0)
    counts, given = [], []
    for _ in range(domains):
        rows = [generator.dirichlet(np.ones(experts)) for _ in range(layers)]
        counts.append([np.minimum((k * tokens * row).astype(int), tokens).tolist() for row in rows])
        given.append([(row * generator.random(experts)).tolist() for row in rows])
    labels = [str(at) for at in range(layers)]
    return DomainLoads([f"d{at}" for at in range(domains)], labels, [k] * layers, counts, given)


def test_the_numbers_of_expert_by_domain_are_a_recount() -> None:
    loads = made_loads(domains=3)
    lifts = loads.lifts()
    assert len(lifts) == 3 * 3 * 8
    for lift in lifts:
        layer, domain = int(lift.layer), loads.names.index(lift.domain)
        counts = [np.array(table[layer], dtype=float) for table in loads.counts]
        shares = [c / c.sum() for c in counts]
        assert lift.tokens == counts[domain][lift.expert]
        assert lift.relative == pytest.approx(shares[domain][lift.expert] * 8)
        assert lift.part == pytest.approx(shares[domain][lift.expert] / sum(s[lift.expert] for s in shares))
        smooth = [(c + 0.5) / (c.sum() + 4.0) for c in counts]
        others = [smooth[at][lift.expert] for at in range(3) if at != domain]
        assert lift.log2 == pytest.approx(math.log2(smooth[domain][lift.expert] / (sum(others) / 2)))
        given = [np.array(table[layer]) for table in loads.contribution or []]
        assert lift.contribution == pytest.approx(given[domain][lift.expert] / given[domain].sum())


def test_the_error_of_a_lift_is_that_of_drawing_the_tokens_again() -> None:
    generator = np.random.default_rng(1)
    share_E = np.array([0.3, 0.25, 0.2, 0.15, 0.1])
    tokens, drawn = 2000, []
    for _ in range(400):
        counts = [[generator.multinomial(tokens, share_E).tolist()] for _ in range(2)]
        loads = DomainLoads(["a", "b"], ["0"], [1], counts)
        drawn.append([lift for lift in loads.lifts() if lift.domain == "a"])
    for expert in range(5):
        values = [lifts[expert].log2 for lifts in drawn]
        said = np.mean([lifts[expert].error for lifts in drawn])
        assert said == pytest.approx(np.std(values), rel=0.12)
        beyond = np.mean([lifts[expert].beyond for lifts in drawn])
        assert beyond <= 0.02, "the same text twice is no difference"


def test_an_expert_that_serves_one_domain_only_is_named() -> None:
    counts = [[[0, 500, 300, 200]], [[400, 300, 297, 3]]]
    loads = DomainLoads(["prose", "code"], ["0"], [1], counts)
    head, rows = loads.only_table()
    assert [row[:3] for row in rows] == [["code", "0", "0"], ["prose", "0", "3"]]
    assert "1 only prose, 1 only code" in loads.sentence(loads.lifts()) and len(head) == len(rows[0])
    few = DomainLoads(["prose", "code"], ["0"], [1], [[[0, 500]], [[40, 460]]])
    assert few.only_table()[1] == [], "40 tokens are too few to say so"


def test_what_moved_is_judged_by_its_error() -> None:
    generator = np.random.default_rng(2)
    share_E = generator.dirichlet(np.ones(16))
    before, same = (Load("0", generator.multinomial(20_000, share_E).tolist(), 1) for _ in range(2))
    assert len(moved(before, same).beyond) <= 1
    other = share_E.copy()
    other[3] += 0.1
    after = Load("0", generator.multinomial(20_000, other / other.sum()).tolist(), 1)
    found = moved(before, after)
    assert 3 in found.beyond
    one, two = (np.array(load.counts) / sum(load.counts) for load in (before, after))
    assert found.share == pytest.approx(0.5 * np.abs(one - two).sum())
    picture = before_after_picture([before], [after], ("base", "tuned"))
    assert f"{len(found.beyond)} of 16 experts" in picture.sentence


def test_an_svg_is_well_formed_and_says_every_place() -> None:
    picture = before_after_picture([Load("0", [5, 0, 3, None])], [Load("0", [2, 2, 2, None])], ("<b>", "&"))
    root = ElementTree.fromstring(picture.svg())
    tips = [title.text or "" for title in root.iter(f"{SVG}title")]
    assert len(tips) == 3 and all(tip.startswith("layer 0, expert") for tip in tips)
    assert "<b> (x fair) 1.88" in tips[0]
    for element in root.iter(f"{SVG}path"):
        assert "nan" not in element.attrib["d"] and "inf" not in element.attrib["d"]


@pytest.mark.parametrize("width", [1000, 344])
def test_nothing_is_drawn_beyond_the_ground(width: int) -> None:
    loads = made_loads(domains=3, layers=4, experts=32)
    rng = np.random.default_rng(0)
    flows = [rng.integers(0, 90, (32, 32)) for _ in range(3)]
    one = [Load(str(at), row, 2) for at, row in enumerate(loads.counts[0])]
    two = [Load(str(at), row, 2) for at, row in enumerate(loads.counts[1])]
    flow = flow_picture(list("0123"), flows)
    assert flow is not None
    for picture in (before_after_picture(one, two), loads.picture(), load_picture(one, "t"), flow):
        for view in range(len(picture.views)):
            drawn = picture.drawing(view, width)
            assert drawn.width == width and drawn.places and len(drawn.places[0])
            for shape in drawn.shapes:
                ends = shape.at[:2] if shape.kind in ("rect", "dot") else shape.at[:4]
                assert all(-1 <= x <= width + 1 for x in ends[::2]) and all(
                    -1 <= y <= drawn.height + 1 for y in ends[1::2]
                )
            for text in drawn.texts:
                assert 0 <= text.y <= drawn.height
                reach = 0 if text.turn else 0.5 * text.size * len(text.text)  # no letter is narrower on average
                start = text.x - reach * {"start": 0, "middle": 0.5, "end": 1}[text.anchor]
                assert -2 <= start and start + reach <= width + 2, (picture.key, text)


def test_files(tmp_path: Path) -> None:
    picture = load_picture([Load("0", [5, 0, 3, 4])], "Who does the work")
    assert "1 of 4 experts got no token" in picture.sentence
    assert picture.save(tmp_path / "a.svg").read_text().startswith("<svg xmlns=")
    from PIL import Image

    image = Image.open(picture.save(tmp_path / "a.png"))
    drawn = picture.drawing()
    assert image.size == (round(2 * drawn.width), round(2 * drawn.height)) and len(image.getcolors(1 << 20) or []) > 8
    assert "default-src 'none'" in picture.save(tmp_path / "a.html").read_text()
    with pytest.raises(ConfigError, match=r"\.svg, \.png or \.html"):
        picture.save(tmp_path / "a.pdf")
    with pytest.raises(ConfigError, match="no view 3; it has 0"):
        picture.drawing(3)


def test_pixels_are_where_the_shapes_are() -> None:
    from chronomoe_hf.pictures.raster import paint

    drawing = Drawing(40, 40)
    drawing.rect(10, 10, 10, 10, Look("#ff0000"))
    drawing.rect(25, 10, 10, 10, Look("#0000ff", 0.5))
    image = paint(drawing, 1.0)
    assert image.getpixel((15, 15)) == (255, 0, 0) and image.getpixel((5, 5)) == (255, 255, 255)
    red, green, blue = image.getpixel((30, 15))
    assert (blue, abs(red - 127) <= 2, abs(green - 127) <= 2) == (255, True, True)


def test_without_the_optional_packages_one_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] in ("pandas", "PIL"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    picture = load_picture([Load("0", [1, 2])], "t")
    monkeypatch.setattr(builtins, "__import__", refuse)
    from chronomoe_hf.pictures.tables import frame

    with pytest.raises(ConfigError, match=r"chronomoe_hf\[notebook\]"):
        frame([{"a": 1}])
    with pytest.raises(ConfigError, match=r"chronomoe_hf\[notebook\]"):
        picture.save("x.png")


def test_a_large_model_fits_into_a_page(tmp_path: Path) -> None:
    from chronomoe_hf.pictures.page import picture_page

    loads = made_loads(domains=4, layers=48, experts=128, k=8, tokens=20_000)
    one, two = ([Load(str(at), row, 8) for at, row in enumerate(loads.counts[d])] for d in (0, 1))
    rng = np.random.default_rng(0)
    flow = flow_picture([str(at) for at in range(48)], [rng.integers(0, 900, (128, 128)) for _ in range(47)])
    assert flow is not None
    sizes = {
        p.key: len(picture_page([p], "t").encode()) for p in (loads.picture(), flow, before_after_picture(one, two))
    }
    assert all(size < 2e6 for size in sizes.values()), sizes
    assert sum(sizes.values()) < 2.7e6, sizes


def test_the_flow_of_a_profile_is_a_recount(tmp_path: Path) -> None:
    model = tiny.tiny_model("mixtral", vocab_size=texts.VOCAB, train=False)
    chosen: list[list[list[int]]] = [[], []]
    running: list[bool] = []  # wrapping calls a router by itself once
    handles = [
        model.register_forward_pre_hook(lambda m, a: running.append(True)),
        model.register_forward_hook(lambda m, a, out: running.clear()),
    ]

    def keep(at: int, adapter: Any) -> Any:
        return lambda m, a, out: chosen[at].extend(adapter.read(m, out).index_TK.tolist() if running else [])

    for at, (adapter, router, _) in enumerate(moe_zoo.routers_of(model)):
        handles.append(router.register_forward_hook(keep(at, adapter)))
    docs = {"a": list(texts.documents(4)), "b": list(texts.documents(8))[4:]}
    chronomoe_hf.profile(model, texts.tokenizer(), docs, output_dir=tmp_path, batch_size=1)
    for handle in handles:
        handle.remove()
    saved = load_file(tmp_path / "chronomoe" / "flow.safetensors")
    tokens_a = int(saved["a.0"].sum()) // 4  # two experts a token in both layers
    expected, of_a = np.zeros((2, 8, 8), dtype=np.int64)
    for number, (one, two) in enumerate(zip(*chosen, strict=True)):
        for i in one:
            for j in two:
                expected[i, j] += 1
                of_a[i, j] += number < tokens_a
    assert set(saved) == {"a.0", "b.0"} and np.array_equal(saved["a.0"] + saved["b.0"], expected)
    assert np.array_equal(saved["a.0"], of_a)
    best = strongest([expected])
    assert best is not None
    layer, one_expert, other, lift = best
    chance = expected.sum(1)[one_expert] * expected.sum(0)[other] / expected.sum()
    assert layer == 0 and lift == pytest.approx(expected[one_expert, other] / chance)
    run = load_run(tmp_path)
    loads = domain_loads(run)
    assert loads is not None and loads.contribution is not None
    counts = np.array([np.bincount(np.ravel(rows), minlength=8) for rows in chosen])
    assert np.array_equal(np.array(loads.counts).sum(0), counts), "sums over the profile, never a window"
    figures = {figure.key: figure for figure in profile_figures(run)}
    assert {"work", "expert-domain", "flow"} <= figures.keys()
    flow = figures["flow"].picture
    assert [view.label for view in flow.views] == ["layers 0 to 1", "a, layers 0 to 1", "b, layers 0 to 1"]
    for view, table in enumerate((expected, of_a, saved["b.0"])):
        (places,) = flow.drawing(view).places
        shown = {(one, other): share for _, one, _, other, share, _ in zip(*places.columns, strict=True)}
        for (one, other), share in shown.items():
            assert share == pytest.approx(table[int(one), int(other)] / table.sum()), (view, one, other)
        assert len(shown) == int((table >= 0.004 * table.sum()).sum())
    page = write_report(tmp_path).read_text()
    assert 'class="sortable"' in page and 'id="glossary"' in page


def test_a_profile_in_either_order_of_domains_gives_the_same_pictures(tmp_path: Path) -> None:
    model = tiny.tiny_model("mixtral", vocab_size=texts.VOCAB, train=False)
    docs = {"a": list(texts.documents(4)), "b": list(texts.documents(8))[4:]}
    chronomoe_hf.profile(model, texts.tokenizer(), docs, output_dir=tmp_path / "ab", interval=1)
    chronomoe_hf.profile(model, texts.tokenizer(), dict(reversed(docs.items())), output_dir=tmp_path / "ba", interval=1)
    figures = [{f.key: f for f in profile_figures(load_run(tmp_path / name))} for name in ("ab", "ba")]
    assert figures[0].keys() == figures[1].keys() >= {"work", "expert-domain", "flow"}
    for key in ("work", "flow"):
        assert figures[0][key].sentence == figures[1][key].sentence
    assert sorted(figures[0]["expert-domain"].rows) == sorted(figures[1]["expert-domain"].rows)


def test_damaged_records_draw_less_and_break_nothing(tmp_path: Path) -> None:
    import json

    model = tiny.tiny_model("mixtral", vocab_size=texts.VOCAB, train=False)
    docs = {"a": list(texts.documents(4)), "b": list(texts.documents(8))[4:]}
    chronomoe_hf.profile(model, texts.tokenizer(), docs, output_dir=tmp_path)
    (tmp_path / "chronomoe" / "flow.safetensors").write_bytes(b"no tensors")
    path = tmp_path / "chronomoe" / "profile.json"
    record = json.loads(path.read_text())
    for damage in (
        {"counts": None},
        {"counts": [[1, 2]]},
        {"counts": [["x"] * 8] * 2},
        {"contribution": 5},
        {"name": 7},
    ):
        path.write_text(json.dumps({**record, "domains": [{**record["domains"][0], **damage}, record["domains"][1]]}))
        keys = {figure.key for figure in profile_figures(load_run(tmp_path))}
        assert "flow" not in keys
        write_report(tmp_path)


def test_pictures_load_no_torch() -> None:
    code = (
        "import sys, chronomoe_hf.pictures.loads, chronomoe_hf.pictures.domains, chronomoe_hf.pictures.flows\n"
        "import chronomoe_hf.pictures.shown, chronomoe_hf.report.pictures, chronomoe_hf.telemetry.looks\n"
        "assert not {'torch', 'pandas', 'PIL', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
