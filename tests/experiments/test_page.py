"""compare, ensemble and report write the page, keep sample images, and say what did not finish."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from PIL import Image

from experiments.cli import main
from experiments.compare import compare
from lifelong_ens import Fit
from lifelong_ens.errors import NonFiniteLossError
from lifelong_ens.networks import mlp
from lifelong_ens.report import Report
from strategies import finetune
from streams import split_digits

FIT = Fit(epochs=1)
STREAM = functools.partial(split_digits, num_tasks=2)


def build(seed, device):
    return finetune(mlp(input_shape=(1, 8, 8), hidden=(8,)), fit=FIT, seed=seed, device=device)


def diverging(seed, device):
    fit = Fit(epochs=1, learning_rate=1e30)
    return finetune(mlp(input_shape=(1, 8, 8), hidden=(8,)), fit=fit, seed=seed, device=device)


def test_compare_writes_a_page_with_samples_and_reliability(tmp_path):
    report = compare(STREAM, {"f": build}, out=tmp_path, progress=False)
    page = (tmp_path / "report.html").read_text()
    assert "Reliability of f" in page
    assert page.count("<img ") == 2
    assert "not finished" not in page
    assert not (tmp_path / "unfinished").exists()
    (samples,) = (tmp_path / "samples").iterdir()
    with Image.open(samples) as picture:
        assert picture.size == (5 * 24, 2 * 24)
    setting = report.runs["setting"].iloc[0]
    assert samples.name == f"{setting}-0.png"
    tests = STREAM(seed=0).streams["test"]
    images = len(tests[0].dataset) + len(tests[1].dataset)
    assert report.reliability["count"].sum() == images
    bins = report.reliability[report.reliability["count"] > 0]
    gap = (bins["count"] * (bins["accuracy"] - bins["confidence"]).abs()).sum() / images
    assert gap == pytest.approx(report.runs["ece"].iloc[0], abs=1e-6)


def test_what_failed_and_what_was_not_reached_is_on_the_page(tmp_path):
    def interrupted(seed, device):
        raise KeyboardInterrupt

    strategies = {"bad": diverging, "good": build}
    with pytest.raises(NonFiniteLossError):
        compare(STREAM, strategies, out=tmp_path, progress=False)
    page = (tmp_path / "report.html").read_text()
    assert '<strong class="state">failed</strong> bad, seed 0' in page
    assert "1 run not finished" in page
    with pytest.raises(KeyboardInterrupt):
        compare(STREAM, {"late": interrupted, "later": build}, out=tmp_path, progress=False)
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    for name in ("late", "later"):
        assert f'<strong class="state">missing</strong> {name}, seed 0' in page
    compare(STREAM, {"bad": build, "late": build, "later": build}, out=tmp_path, progress=False)
    assert "not finished" not in (tmp_path / "report.html").read_text()


def test_when_all_fail_there_is_a_page_and_report_says_where(tmp_path, capsys):
    with pytest.raises(NonFiniteLossError):
        compare(STREAM, {"bad": diverging}, out=tmp_path, progress=False)
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == f"page: {tmp_path / 'report.html'}"
    assert "bad, seed 0" in (tmp_path / "report.html").read_text()


def test_several_folders_and_ensembles(tmp_path, capsys):
    for name in ("one", "two"):
        compare(STREAM, {name: build}, out=tmp_path / name, progress=False)
    arguments = ["--methods", "mc_dropout", "--members", "2", "--epochs", "1", "--held_out", "2"]
    assert main(["ensemble", *arguments, "--device", "cpu", "--out", str(tmp_path / "e")]) == 0
    page = (tmp_path / "e" / "report.html").read_text()
    assert "single_equal_cost" in page
    assert page.count("<img ") == 1
    capsys.readouterr()
    target = tmp_path / "both.html"
    assert main(["report", str(tmp_path / "one"), str(tmp_path / "two"), "--page", str(target)]) == 0
    assert capsys.readouterr().out.strip() == f"page: {target}"
    assert "2 strategies, 2 runs" in target.read_text()
    assert main(["report", str(tmp_path / "one"), str(tmp_path / "e")]) == 2
    assert "make a page for each" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "no records in" in capsys.readouterr().err


def test_a_report_shows_itself_and_goes_into_papers(tmp_path):
    report = compare(STREAM, {"a_b": build, "c": build}, seeds=range(2), out=tmp_path, progress=False)
    latex, shown = report.to_latex(), report._repr_html_()
    assert latex.startswith("\\begin{tabular}{lrrrrrrr}\n\\toprule")
    assert "a\\_b & " in latex
    assert "$\\pm$" in latex
    assert "±" not in latex
    assert shown.startswith("<table")
    assert "<td>a_b</td>" in shown
    assert report.to_markdown().splitlines()[0].startswith("| strategy ")
    assert set(report.uncertainty) >= {"nll", "ece", "brier", "entropy", "trained_task", "eval_task"}
    assert "accuracy" not in report.uncertainty
    loaded = Report.load(tmp_path)
    assert loaded.to_latex() == latex


def test_records_say_that_they_have_schema_2(tmp_path):
    compare(STREAM, {"f": build}, out=tmp_path, progress=False)
    (path,) = (tmp_path / "records").iterdir()
    record = json.loads(path.read_text())
    assert record["schema"] == 2
    assert len(record["reliability"]["count"]) == 15
    assert torch.tensor(record["reliability"]["count"]).sum() > 100
