"""The pictures of README and docs, from a real run: python examples/readme_pictures.py (a CPU, some minutes; chromium).

A small Mixtral is trained on prose and then tuned on code under watch; both states are profiled on the same text, and
one text is traced through both. What is written to docs/images are screenshots of the pages that users get.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import _text_job as job
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

import chronomoe_hf
from chronomoe_hf import ChronoConfig
from chronomoe_hf.report import write_report

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
TEXT = """def read_config(path):
    with open(path) as file:
        return json.load(file)

The with statement wraps the execution of a block with methods that a context manager defines. It is evaluated once.
"""
SIZE = job.ModelSize(hidden=64, intermediate=64, vocab=1024, length=64)
SHOTS = {
    "report.png": ("report.html", ["#verdict", "#neff", "#before-after"]),
    "changed.png": ("changed.html", ["#against"]),
    "domains.png": ("changed.html", ["#expert-domain", "#flow"]),
    "trace.png": ("trace.html", ["#tokens"]),
}
"""File -> the page, and the sections that are shown."""


def main() -> None:
    """Make every page, and a screenshot of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of the fine-tune")
    parser.add_argument("--base-steps", type=int, default=100, help="optimizer steps of the base model")
    parser.add_argument("--images", type=Path, default=IMAGES, help="where the screenshots go")
    parser.add_argument("--pages", type=Path, help="keep the pages here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        pages = options.pages or Path(scratch) / "pages"
        pages.mkdir(parents=True, exist_ok=True)
        make_pages(pages, Path(scratch), options.steps, options.base_steps)
        options.images.mkdir(parents=True, exist_ok=True)
        for name, (page, sections) in SHOTS.items():
            screenshot(pages / page, sections, options.images / name)
            print(options.images / name)


def make_pages(pages: Path, scratch: Path, steps: int, base_steps: int) -> None:
    """``report.html`` of the run, ``changed.html`` of the two profiles, ``trace.html`` of one text."""
    size = SIZE
    base = job.pretrain_base("mixtral", size, job.Training(steps=base_steps))
    tokenizer = AutoTokenizer.from_pretrained(base)
    code = job.load_domain("code", tokenizer, size, "mixtral")
    model = AutoModelForCausalLM.from_pretrained(base)
    arguments = job.training_arguments(job.Training(steps=steps), scratch / "run", logging_steps=max(1, steps // 20))
    trainer = Trainer(model, arguments, train_dataset=code.train)
    chronomoe_hf.attach(trainer, ChronoConfig.observe())
    trainer.train()
    write_report(scratch / "run", pages / "report.html")
    chronomoe_hf.detach(trainer)
    text = {name: list(job.load_text(name)["valid"]["text"]) for name in ("prose", "code")}
    before = AutoModelForCausalLM.from_pretrained(base)
    for name, each in (("base", before), ("tuned", model)):
        chronomoe_hf.profile(
            each,
            tokenizer,
            text,
            output_dir=scratch / name,
            tokens=20_000,
            length=SIZE.length,
            model_name=name,
            progress=False,
        )
    write_report(scratch / "tuned", pages / "changed.html", against=scratch / "base")
    names = {"model_name": "base", "against_name": "tuned"}
    chronomoe_hf.trace(before, tokenizer, TEXT, against=model, length=SIZE.length, **names).save(pages / "trace.html")


def screenshot(page: Path, sections: list[str], target: Path) -> None:
    """The named sections of a page, below each other."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        shown = browser.new_context(viewport={"width": 1120, "height": 900}, offline=True).new_page()
        shown.goto(page.resolve().as_uri())
        shown.wait_for_load_state("load")
        shown.evaluate(
            """keep => {
                for (const part of document.querySelectorAll("main > section, details, .tools"))
                    if (!keep.includes("#" + part.id)) part.style.display = "none";
                const slider = document.getElementById("layer");
                if (slider) { slider.value = slider.max; slider.dispatchEvent(new Event("input")); }
                window.dispatchEvent(new Event("resize"));
            }""",
            sections,
        )
        shown.wait_for_timeout(300)
        shown.locator("main").screenshot(path=str(target))
        browser.close()


if __name__ == "__main__":
    main()
