from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from experiments.cli import main


@pytest.mark.slow
def test_the_quick_form_learns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "translation", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "test perplexity" in shown
    assert "BLEU" in shown
    numbers = pd.read_csv(tmp_path / "table.csv").set_index("row")
    assert (numbers["test_perplexity"] < 4).all()
    assert (numbers["bleu"] > 20).all()
