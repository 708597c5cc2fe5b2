"""What stands on a page, without a browser."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest

from lifelong_ens.errors import InputError
from lifelong_ens.report.page import render, write_page
from lifelong_ens.report.page.figures import pareto
from lifelong_ens.report.samples import PER_TASK, read_samples, write_samples
from lifelong_ens.store import write_json

BINS = {"count": [0, 4, 6], "confidence": [None, 0.5, 0.9], "accuracy": [None, 0.75, 1.0]}
JOINT = [[None] * 3, [None] * 3, [0.9, 0.9, 0.6]]


class Text(HTMLParser):
    """The rows of tables as texts, and every start tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += " " + data.strip()

    def row(self, name: str) -> list[str]:
        return next([" ".join(cell.split()) for cell in row] for row in self.rows if row and name in row[0])


@pytest.fixture
def folder(record, tmp_path):
    for seed in range(3):
        low = [[0.9, None, None], [0.7, 0.8, None], [0.6, 0.75, 0.8 + 0.02 * seed]]
        write_json(
            tmp_path / "records" / f"a{seed}.json", record(seed=seed, accuracy=low) | {"reliability": BINS}
        )
        high = [[0.9, None, None], [0.9, 0.95, None], [0.9, 0.95, 0.93 + 0.01 * seed]]
        write_json(tmp_path / "records" / f"b{seed}.json", record("<pnn>", seed=seed, accuracy=high, scale=4))
        joint = record("joint", seed=seed, accuracy=JOINT, options={"width": 3})
        write_json(tmp_path / "records" / f"c{seed}.json", joint)
    return tmp_path


def test_the_numbers_are_those_of_the_records(folder):
    page = Text(render([folder]))
    finetune, pnn = page.row("finetune"), page.row("<pnn>")
    mean = 100 * (0.6 + 0.75 + 0.82) / 3
    assert finetune[1] == "3"
    assert finetune[2].startswith(f"{mean:.2f} ")
    half = 100 * 0.02 / 3 * 4.302653 / 3**0.5
    assert f"{mean - half:.2f} to {mean + half:.2f}" in finetune[2]
    assert pnn[2].startswith("93.00 clearly best")
    assert finetune[4] == "1.00x 4.12 kB"  # as much as joint
    assert pnn[4] == "4.00x 16.5 kB"
    assert page.row("joint")[3] == "–"


def test_nothing_is_fetched_and_names_are_escaped(folder):
    page = render([folder])
    assert "<pnn>" not in page
    assert "&lt;pnn&gt;" in page
    for tag, attributes in Text(page).tags:
        for name in ("src", "href", "xlink:href", "action"):
            value = attributes.get(name) or "#"
            assert value.startswith(("data:", "#")), (tag, value)
    assert "url(http" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page
    assert len(page.encode()) < 5_000_000


def test_pictures_are_said_in_words_and_tables_have_heads(folder):
    page = Text(render([folder]))
    pictures = [one for tag, one in page.tags if tag == "div" and one.get("role") == "img"]
    assert len(pictures) == sum(tag == "svg" for tag, _ in page.tags) >= 10
    assert all(len(one["aria-label"] or "") > 30 for one in pictures)
    assert all(one.get("alt") for tag, one in page.tags if tag == "img")
    assert all(one.get("scope") in ("col", "row") for tag, one in page.tags if tag == "th")


def test_plots_are_svg_with_a_group_for_every_series(folder):
    page = render([folder])
    figures = re.findall(r"<svg .*?</svg>", page, re.DOTALL)
    for figure in figures:
        ET.fromstring(figure)
    assert {"0", "1", "2"} <= set(re.findall(r'class="series" data-series="(\d)"', figures[0]))
    assert "#000000" not in "".join(figures)
    ids = [re.findall(r' id="([^"]+)"', figure) for figure in figures]
    assert len({one for own in ids for one in own}) == sum(len(set(one)) for one in ids)


def test_runs_that_did_not_finish_are_shown_as_such(folder):
    about = {"schema": 1, "setting": "a1b2c3d4", "seed": 5, "problem": None, "options": {"rank": 2}}
    write_json(folder / "unfinished" / "w.json", about | {"name": "waiting"})
    write_json(
        folder / "unfinished" / "f.json", about | {"name": "diverged", "problem": "loss was nan & void"}
    )
    write_json(folder / "unfinished" / "p.json", about | {"name": "stopped", "setting": "other"})
    write_json(
        folder / "checkpoints" / "p" / "task_0002.json", {"progress": {"num_tasks": 3, "tasks": [{}, {}]}}
    )
    write_json(folder / "unfinished" / "a0.json", about | {"name": "has a record"})
    (folder / "records" / "broken.json").write_text("{")
    write_json(folder / "records" / "new.json", {"schema": 99})
    page = re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", render([folder])))
    assert "missing waiting(rank=2), seed 5 did not finish a task" in page
    assert "failed diverged(rank=2), seed 5 loss was nan &amp; void" in page
    assert "partial stopped(rank=2), seed 5 stopped after 2 of 3 tasks" in page
    assert "has a record" not in page
    assert "broken.json is not valid JSON" in page
    assert "has schema 99" in page


def test_a_folder_in_which_nothing_finished_has_a_page_too(tmp_path):
    with pytest.raises(InputError, match="no records"):
        render([tmp_path])
    about = {"schema": 1, "setting": "x", "seed": 0, "problem": "too hot", "options": {}}
    write_json(tmp_path / "unfinished" / "w.json", about | {"name": "f"})
    assert "too hot" in write_page([tmp_path]).read_text()


def test_of_several_folders_the_same_run_is_named_by_its_folder(record, tmp_path):
    for out, names in {"one": ["finetune", "pnn"], "two": ["finetune", "ewc"]}.items():
        for name in names:
            scale = 2 if out == "two" else 1
            write_json(tmp_path / out / "records" / f"{name}.json", record(name, scale=scale))
    page = write_page([tmp_path / "one", tmp_path / "two"], tmp_path / "p.html").read_text()
    text = Text(page)
    assert text.row("finetune (out=one)")[4].startswith("1.00x")
    assert text.row("finetune (out=two)")[4].startswith("1.00x")
    assert text.row("pnn")
    assert text.row("ewc")[4].startswith("1.00x")


def test_samples_are_kept_and_shown(folder):
    images = np.zeros((3, PER_TASK, 3, 8, 6))
    images[1, 2, 0] = 1.0
    assert "Sample images were not kept" in render([folder])
    write_samples(folder, "a1b2c3d4", 7, images)
    seed, strips = read_samples(folder, "a1b2c3d4", 3)
    assert seed == 7
    assert [(one.width, one.height) for one in strips] == [(18 * PER_TASK, 24)] * 3
    found = [one for tag, one in Text(render([folder])).tags if tag == "img"]
    assert [one["alt"] for one in found] == [
        f"Task {t + 1}: test images of classes {2 * t}, {2 * t + 1}" for t in range(3)
    ]


def test_large_images_are_made_small_and_a_damaged_picture_is_left_out(tmp_path):
    write_samples(tmp_path, "s", 0, np.random.default_rng(0).random((2, PER_TASK, 1, 100, 200)))
    _, strips = read_samples(tmp_path, "s", 2)
    assert (strips[0].width, strips[0].height) == (48 * PER_TASK, 24)
    next((tmp_path / "samples").iterdir()).write_bytes(b"no picture")
    assert read_samples(tmp_path, "s", 2) is None


def test_a_large_comparison_fits_into_5_megabytes(record, tmp_path):
    tasks = 20
    matrix = [[0.5 + 0.02 * j if j <= i else None for j in range(tasks)] for i in range(tasks)]
    for n in range(14):
        write_json(tmp_path / "records" / f"{n}.json", record(f"s{n}" if n else "finetune", accuracy=matrix))
    write_samples(tmp_path, "a1b2c3d4", 0, np.random.default_rng(0).random((tasks, PER_TASK, 3, 48, 48)))
    assert len(render([tmp_path]).encode()) < 5_000_000


def test_the_front_is_what_nothing_beats():
    x, y = np.array([1.0, 2.0, 2.0, 3.0, 4.0]), np.array([5.0, 7.0, 8.0, 6.0, 9.0])
    assert pareto(x, y, lower=False) == ([1.0, 2.0, 4.0], [5.0, 8.0, 9.0])
    assert pareto(x, y, lower=True) == ([1.0], [5.0])
