"""The page in a real browser: offline, quiet, drawn, and untouched by what names try to inject."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.browser import colours, opened, plots
from support.made_runs import random_run, run_with_roles, train_into

from chronomoe_hf.report import write_report

pytestmark = pytest.mark.slow


def change(directory: Path, **fields: object) -> None:
    """Set fields of every layer of every window."""
    path = directory / "chronomoe" / "snapshots.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        for layer in record["layers"]:
            layer.update(fields)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def empty(directory: Path) -> None:
    random_run(directory, windows=0)


def one_step(directory: Path) -> None:
    train_into(directory, steps=1)


def one_layer(directory: Path) -> None:
    random_run(directory, layers=1, windows=5)


def without_numbers(directory: Path) -> None:
    random_run(directory, windows=3)
    change(
        directory,
        n_effective=None,
        max_violation=None,
        gini=None,
        load_cv=None,
        coherence_mean=None,
        top2_relative=None,
    )


def large(directory: Path) -> None:
    random_run(directory, layers=48, experts=128, top_k=8, windows=100)


def governed(directory: Path) -> None:
    train_into(directory, steps=6, arguments={"save_strategy": "steps", "save_steps": 6})


def with_roles_and_evaluation(directory: Path) -> None:
    run_with_roles(directory)


FIGURES = {
    empty: set(),
    one_step: {"neff", "work", "imbalance", "coherence", "governor"},
    one_layer: {"neff", "work", "imbalance", "coherence", "governor", "timeline"},
    without_numbers: {"work", "governor"},
    large: {"neff", "work", "imbalance", "coherence", "governor"},
    governed: {"neff", "work", "imbalance", "coherence", "governor", "timeline"},
    with_roles_and_evaluation: {"evaluation", "neff", "work", "imbalance", "coherence", "governor", "timeline"},
}


SIZES = [(1280, "light"), (390, "light"), (1280, "dark"), (390, "dark")]
LIGHT_ONLY = (empty, one_step, one_layer, without_numbers)


@pytest.mark.parametrize(("width", "scheme"), SIZES)
@pytest.mark.parametrize("make", FIGURES, ids=lambda make: make.__name__)
def test_every_plot_is_drawn_and_nothing_else_is_asked_for(
    make: Callable[[Path], None], width: int, scheme: str, tmp_path: Path
) -> None:
    if scheme == "dark" and make in LIGHT_ONLY:
        pytest.skip("drawn by the same lines as the others")
    make(tmp_path)
    path = write_report(tmp_path)
    assert path.stat().st_size < 3e6
    with opened(path, width, scheme) as (page, said, asked):
        assert said == [] and asked == [path.as_uri()]
        drawn = plots(page)
        assert set(drawn) == FIGURES[make] and all(plot["drawn"] == "yes" for plot in drawn.values())
        for figure in drawn:
            assert min(colours(page, figure)) > 2, figure
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("#verdict .headline").inner_text()


def test_the_slider_changes_the_cells_and_the_dead_marks(tmp_path: Path) -> None:
    random_run(tmp_path, windows=10)  # the last expert of layer 0 dies half way
    with opened(write_report(tmp_path)) as (page, said, _):
        slider = page.locator("#work input[type=range]")
        seen = {}
        for at in (9, 4, 0):
            slider.fill(str(at))
            now = plots(page)["work"]
            seen[now["step"]] = (now["dead"], now["sum"])
            assert page.locator("#work output").inner_text() == now["step"]
        assert {step: dead for step, (dead, _) in seen.items()} == {"step 100": "1", "step 50": "0", "step 10": "0"}
        assert len({total for _, total in seen.values()}) == 3
        assert said == []


def test_a_pointer_on_a_cell_shows_its_number(tmp_path: Path) -> None:
    random_run(tmp_path, windows=4)
    with opened(write_report(tmp_path)) as (page, said, _):
        page.locator("#neff .plot canvas").first.hover(position={"x": 300, "y": 10})
        assert "Neff / E 0." in page.locator("#neff .tip").inner_text()
        assert said == []


HOSTILE = "</script><img src=x onerror=window.hit=1><svg onload=window.hit=1>{{7*7}}`\x1b[2J\u202e"


def test_names_inject_nothing(tmp_path: Path) -> None:
    random_run(tmp_path, windows=3, run_id=HOSTILE)
    change(tmp_path, layer_id=HOSTILE, layer_name=HOSTILE, notes=[HOSTILE])
    directory = tmp_path / "chronomoe"
    record = {"schema": 1, "run_id": HOSTILE, "attempt": 0, "step": 10}
    alert = {"kind": HOSTILE, "layer_id": HOSTILE, "state": "raised", "detail": HOSTILE}
    case = {"layer_id": HOSTILE, "expert": HOSTILE, "reason": HOSTILE, "state": "confirmed", "evidence": {}}
    decision = {"layer_id": 0, "scale": 0, "abstain_reason": HOSTILE}
    for kind, line in (("alerts", alert), ("lifecycle_decisions", case), ("control_decisions", decision)):
        with (directory / f"{kind}.jsonl").open("a") as file:
            file.write(json.dumps({**record, **line}) + "\n")
    manifest = directory / "attempts.jsonl"
    first = json.loads(manifest.read_text().splitlines()[0])
    first["manifest"].update(
        model_class=HOSTILE, notes=[HOSTILE], versions={HOSTILE: HOSTILE}, config={HOSTILE: HOSTILE}
    )
    manifest.write_text(json.dumps(first) + "\n")
    with opened(write_report(tmp_path)) as (page, said, asked):
        assert said == [] and len(asked) == 1
        assert page.evaluate("window.hit === undefined")
        assert page.locator("img, iframe, object, link, svg:not(.picture svg)").count() == 0
        assert page.locator("script").count() == 4
        assert "onerror=window.hit" in page.locator("h1").inner_text()
        assert "{{7*7}}" in page.locator("h1").inner_text()


@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_runs_beside_each_other(width: int, scheme: str, tmp_path: Path) -> None:
    random_run(tmp_path / "a", windows=5)
    random_run(tmp_path / "b", windows=8, experts=8, layers=3)
    with opened(write_report(tmp_path / "a", other=tmp_path / "b"), width, scheme) as (page, said, _):
        assert said == [] and plots(page)["compare"]["drawn"] == "yes"
        assert min(colours(page, "compare")) > 2
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("#compare h2").inner_text() == "a beside b"


def test_a_policy_stops_what_the_page_did_not_bring(tmp_path: Path) -> None:
    random_run(tmp_path, windows=2)
    path = write_report(tmp_path)
    path.write_text(path.read_text().replace("</body>", "<script>window.hit = 1</script></body>"))
    with opened(path) as (page, said, _):
        assert page.evaluate("window.hit === undefined") and any("Content Security Policy" in line for line in said)
