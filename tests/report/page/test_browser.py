"""The page in a real browser: Debian's Chromium. It opens from disk, sorts, toggles, and asks nobody for anything."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lifelong_ens.report.page import write_page
from lifelong_ens.store import write_json

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; apt-get install chromium")


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        profile = tmp_path_factory.mktemp("profile")
        context = started.chromium.launch_persistent_context(profile, executable_path=CHROMIUM, args=FLAGS)
        yield context
        context.close()


@pytest.fixture
def page(browser, record, tmp_path) -> Iterator:
    """A page of three strategies; what it says to the console and asks for is in ``said`` and ``asked``."""
    scores = {"finetune": 0.85, "batch_ensemble": 0.95, "pnn": 0.9}
    for seed in range(2):
        for scale, (name, score) in enumerate(scores.items()):
            matrix = [[0.9, None], [0.8, score + 0.01 * seed]]
            one = record(name, seed=seed, accuracy=matrix, scale=scale + 1)
            write_json(tmp_path / "records" / f"{name}{seed}.json", one)
    opened = browser.new_page()
    opened.said, opened.asked = [], []
    opened.on("console", lambda message: opened.said.append(message.text))
    opened.on("pageerror", lambda error: opened.said.append(str(error)))
    opened.on("request", lambda request: opened.asked.append(request.url))
    opened.goto(Path(write_page([tmp_path])).as_uri())
    yield opened
    opened.close()


def names(page) -> list[str]:
    return [text.split()[-1] for text in page.locator("table").first.locator("tbody th").all_inner_texts()]


def test_it_opens_without_an_error_or_a_request(page, tmp_path):
    assert page.said == []
    assert [url for url in page.asked if not url.startswith("data:")] == [(tmp_path / "report.html").as_uri()]
    assert page.locator("svg").count() >= 8
    assert page.title().endswith("lifelong_ens")


def test_a_column_sorts_by_number_in_both_directions(page):
    assert names(page) == ["batch_ensemble", "finetune", "pnn"]
    head = page.locator("table").first.get_by_role("columnheader", name="accuracy")
    head.get_by_role("button").click()
    assert names(page) == ["finetune", "pnn", "batch_ensemble"]
    assert head.get_attribute("aria-sort") == "ascending"
    head.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert names(page) == ["batch_ensemble", "pnn", "finetune"]
    assert head.get_attribute("aria-sort") == "descending"
    assert page.said == []


def test_a_strategy_goes_from_tables_and_plots_and_comes_back(page):
    box = page.get_by_role("checkbox", name="pnn")
    parts = page.locator('[data-series="2"]')
    shown = parts.evaluate_all("all => all.filter(one => one.getClientRects().length > 0).length")
    assert shown >= 8
    box.focus()
    page.keyboard.press("Space")
    assert parts.evaluate_all("all => all.filter(one => one.getClientRects().length > 0).length") == 0
    assert page.locator('tr[data-series="1"]').first.is_visible()
    assert page.locator(".front").first.is_hidden()
    box.check()
    assert parts.evaluate_all("all => all.filter(one => one.getClientRects().length > 0).length") == shown
    assert page.said == []


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_can_be_read(page, width, scheme):
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(CONTRASTS) >= 4.5


# the least contrast (WCAG 2) of any text in HTML with the ground that is behind it
CONTRASTS = """
() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, w, i) => {
    const v = c[i] / 255;
    return sum + w * (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  }, 0);
  const ground = (one) => {
    for (let at = one; at; at = at.parentElement) {
      const c = parse(getComputedStyle(at).backgroundColor);
      if (c.length < 4 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  let least = 21;
  for (const one of document.querySelectorAll("body :not(svg *):not(script):not(.mark)")) {
    if (![...one.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
    const [a, b] = [light(parse(getComputedStyle(one).color)), light(ground(one))].sort((x, y) => y - x);
    least = Math.min(least, (a + 0.05) / (b + 0.05));
  }
  return least;
}
"""
