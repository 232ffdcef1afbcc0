"""The pictures in a real browser, at a desk and on a telephone, light and dark: drawn, quiet, alive."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import models as tiny
from support import texts
from support.browser import colours, opened, plots
from support.made_runs import train_into

import chronomoe_hf
from chronomoe_hf.report import write_report

pytestmark = pytest.mark.slow
SIZES = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]
MADE = ("profile", "run", "trace")


def domains() -> dict[str, list[str]]:
    docs = list(texts.documents(9))
    return {"a": docs[:3], "b": docs[3:6], "c": docs[6:]}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pages")
    one, two = (tiny.tiny_model("mixtral", vocab_size=texts.VOCAB, seed=seed) for seed in (0, 1))
    for name, model in (("before", one), ("after", two)):
        chronomoe_hf.profile(model, texts.tokenizer(), domains(), output_dir=root / name, model_name=name)
    train_into(root / "run", steps=6)
    text = "def f(x):\n    return x\nSome words, and </script> in them. " * 4
    trace = chronomoe_hf.trace(one, texts.tokenizer(), [text, "another text"], against=two)
    return {
        "profile": write_report(root / "after", root / "profile.html", against=root / "before"),
        "run": write_report(root / "run", root / "run.html"),
        "trace": trace.save(root / "trace.html"),
    }


def drawn(page: Any) -> dict[str, bool]:
    """Picture -> whether it is alive, and its visible view has shapes and lies within the page."""
    script = """() => [...document.querySelectorAll('.picture')].map(p => {
        const view = [...p.querySelectorAll('.view')].filter(v => v.getClientRects().length);
        const box = view.length === 1 ? view[0].getBoundingClientRect() : null;
        const fine = box && box.right <= innerWidth + 1 && box.height > 40 && view[0].querySelector('path');
        return [p.dataset.picture, p.dataset.drawn === 'yes' && Boolean(fine)];
    })"""
    return dict(page.evaluate(script))


@pytest.mark.parametrize(("width", "scheme"), SIZES)
@pytest.mark.parametrize("name", MADE)
def test_every_picture_is_drawn(name: str, width: int, scheme: str, pages: dict[str, Path]) -> None:
    expected = {
        "profile": {"before-after", "work", "expert-domain", "flow"},
        "run": {"before-after"},
        "trace": {"layers"},
    }[name]
    with opened(pages[name], width, scheme) as (page, said, asked):
        assert said == [] and asked == [pages[name].as_uri()]
        found = drawn(page)
        assert set(found) == expected and all(found.values()), found
        charts = plots(page)
        assert set(charts) >= ({"domains"} if name == "profile" else {"neff"} if name == "run" else set())
        assert all(chart["drawn"] == "yes" and min(colours(page, key)) > 2 for key, chart in charts.items())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        style = "getComputedStyle(document.querySelector('section'))"
        ink, paper = page.evaluate(f"[{style}.color, {style}.backgroundColor]")
        light = [sum(map(int, colour[4:-1].split(","))) > 380 for colour in (ink, paper)]
        assert light == ([True, False] if scheme == "dark" else [False, True])


def test_a_tip_says_the_numbers_and_zoom_goes_in_and_out(pages: dict[str, Path]) -> None:
    with opened(pages["profile"], 1280) as (page, said, _):
        box = page.locator('[data-picture="before-after"] .view.wide svg')
        size = box.bounding_box()
        page.mouse.move(size["x"] + 120, size["y"] + 90)
        tip = page.locator('[data-picture="before-after"] .tip')
        assert tip.is_visible() and tip.inner_text().startswith("layer 0, expert ") and "change" in tip.inner_text()
        whole = box.get_attribute("viewBox")
        page.locator('[data-picture="before-after"] .tool', has_text="+").click()
        near = box.get_attribute("viewBox")
        assert near != whole and float(near.split()[2]) < float(whole.split()[2])
        page.locator('[data-picture="before-after"] .tool', has_text="whole").click()
        assert [float(v) for v in box.get_attribute("viewBox").split()] == [float(v) for v in whole.split()]
        assert said == []


def test_views_tables_and_words(pages: dict[str, Path]) -> None:
    with opened(pages["profile"], 1280) as (page, said, _):
        picture = page.locator('[data-picture="expert-domain"]')
        picture.locator(".choice", has_text="contribution").click()
        shown = picture.locator(".view.wide:visible")
        assert shown.count() == 1 and shown.get_attribute("data-view") == "1"
        page.locator("#expert-domain summary").click()
        head = page.locator("#expert-domain th", has_text="assignments")
        for order in ("descending", "ascending"):
            head.locator("button").click()
            assert head.get_attribute("aria-sort") == order
            cells = page.locator("#expert-domain tbody tr td:nth-child(4)").all_inner_texts()
            numbers = [int(cell) for cell in cells]
            assert numbers == sorted(numbers, reverse=order == "descending") and len(set(numbers)) > 3
        page.locator(".sentence .term").first.click()
        entry = page.locator(".entry")
        assert entry.is_visible() and len(entry.inner_text()) > 30
        page.keyboard.press("Escape")
        assert not entry.is_visible() and said == []


@pytest.mark.parametrize("kind", ["SVG", "PNG"])
def test_a_picture_is_saved_from_the_page(kind: str, pages: dict[str, Path], tmp_path: Path) -> None:
    with opened(pages["profile"], 1280) as (page, said, _):
        with page.expect_download() as waiting:
            page.locator('[data-picture="work"] .tool', has_text=kind).click()
        path = tmp_path / "saved"
        waiting.value.save_as(path)
        data = path.read_bytes()
        assert data.startswith(b"<svg" if kind == "SVG" else b"\x89PNG") and len(data) > 1000 and said == []


@pytest.mark.parametrize("width", [1280, 390])
def test_a_chart_is_saved_with_its_heading_and_its_legend(width: int, pages: dict[str, Path], tmp_path: Path) -> None:
    """What was saved has the chart in it, and ink above it (the heading) and in every row of its legend."""
    from PIL import Image

    with opened(pages["run"], width) as (page, said, _):
        keys = page.evaluate("[...document.querySelectorAll('.plot')].map(p => p.dataset.figure)")
        assert {"neff", "imbalance", "timeline"} <= set(keys)
        for key in keys:
            with page.expect_download() as waiting:
                page.locator(f"section#{key} > .tools .tool").click()
            path = tmp_path / f"{key}.png"
            waiting.value.save_as(path)
            assert waiting.value.suggested_filename == f"chronomoe_{key}.png"
            box = page.locator(f'.plot[data-figure="{key}"]').bounding_box()
            image = Image.open(path).convert("L")
            assert image.width == int(2 * (box["width"] + 28)) and image.height > 2 * box["height"] + 100
            paper = image.getpixel((1, 1))
            parts = {"head": (0, 0, image.width, 60), "chart": (0, 130, image.width, image.height)}
            for name, part in parts.items():
                low, high = image.crop(part).getextrema()
                assert max(abs(low - paper), abs(high - paper)) > 60, (key, name)
        assert said == []


@pytest.mark.parametrize("width", [1280, 390])
def test_the_text_of_a_trace_is_alive(width: int, pages: dict[str, Path]) -> None:
    with opened(pages["trace"], width) as (page, said, _):
        data = json.loads(page.locator("#chronomoe-page").inner_text(timeout=2000) or "null") or page.evaluate(
            "JSON.parse(document.getElementById('chronomoe-page').textContent)"
        )
        tokens = page.locator('.text[data-model="0"] .t')
        assert tokens.count() == len(data["pieces"])
        first = page.evaluate("[...document.querySelectorAll('.text[data-model=\"0\"] .t')].map(t => t.dataset.expert)")
        slider = page.locator("#layer")
        slider.focus()
        page.keyboard.press("ArrowRight")
        assert page.locator("#tokens").get_attribute("data-layer") == "1"
        then = page.evaluate("[...document.querySelectorAll('.text[data-model=\"0\"] .t')].map(t => t.dataset.expert)")
        assert first != then and len(set(then)) > 1
        tokens.nth(2).click()
        told = page.locator("#detail").inner_text()
        assert told.count("margin to the next expert") == 2 and "phi" in told and "token 2" in told
        other = page.locator('.text[data-model="1"] .t.other').count()
        assert other > 0, "the two models route alike"
        page.locator("#keys button").first.click()
        assert page.locator('.text[data-model="0"] .t.dim').count() > 0
        assert said == []
