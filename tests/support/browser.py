"""A real browser on a file: Debian's chromium, driven by playwright, offline."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def opened(path: Path, width: int = 1150, scheme: str = "light") -> Iterator[tuple[Any, list[str], list[str]]]:
    """The page of a file, what it wrote to the console or threw, and every address it asked for.

    Skips the test where no chromium is installed.
    """
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine: apt-get install chromium fonts-dejavu-core")
    from playwright.sync_api import sync_playwright

    said: list[str] = []
    asked: list[str] = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        try:
            page = browser.new_context(
                viewport={"width": width, "height": 900}, offline=True, color_scheme=scheme, accept_downloads=True
            ).new_page()
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("request", lambda request: asked.append(request.url))
            page.goto(path.as_uri())
            page.wait_for_load_state("load")
            yield page, said, asked
        finally:
            browser.close()


def plots(page: Any) -> dict[str, dict[str, str]]:
    """Figure -> what its plot says about itself (``drawn``, ``dead``, ``sum``, ``step``)."""
    found = page.evaluate("[...document.querySelectorAll('.plot')].map(p => ({...p.dataset}))")
    return {each["figure"]: each for each in found}


def colours(page: Any, figure: str) -> list[int]:
    """Number of distinct colours of each canvas of a plot: 1 is blank."""
    script = """(key) => [...document.querySelectorAll(
        `.plot[data-figure="${key}"] > canvas, .plot[data-figure="${key}"] .panels canvas`)].map(c => {
            const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data, seen = new Set();
            for (let i = 0; i < d.length; i += 4) seen.add((d[i] << 24) | (d[i+1] << 16) | (d[i+2] << 8) | d[i+3]);
            return seen.size;
        })"""
    return list(page.evaluate(script, figure))
