"""The command as a user types it, small enough for every run of the tests."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from experiments.cli import main

SMALL = [
    "--limit",
    "200",
    "--width",
    "16",
    "--layers",
    "1",
    "--evaluate_every",
    "5",
    "--vocabulary_size",
    "300",
]


def test_the_quick_form_prints_perplexity_and_bleu_of_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["reproduce", "translation", "--quick", "--device", "cpu", "--out", str(tmp_path), *SMALL]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "test perplexity" in shown
    assert "BLEU" in shown
    numbers = pd.read_csv(tmp_path / "table.csv").set_index("row")
    assert (numbers["test_perplexity"] < 200).all()  # of 300 tokens: something was learnt
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "records").iterdir()}
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "records").iterdir()} == before
