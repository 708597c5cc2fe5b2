"""Files of ``lifelong-ens new`` run as they are, and are not written over anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from experiments.cli import main

NAME = "adapted_features"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder in which they were written."""
    folder = tmp_path_factory.mktemp("own") / "methods"
    assert main(["new", "strategy", NAME, "--out", str(folder)]) == 0
    assert sorted(path.name for path in folder.iterdir()) == [f"{NAME}.py", f"test_{NAME}.py"]
    return folder


def test_the_method_runs_beside_ours(written, tmp_path, monkeypatch):
    monkeypatch.chdir(written)
    monkeypatch.setattr(sys, "path", list(sys.path))
    words = ["--strategies", f"{NAME}:{NAME},finetune", "--rank", "2", "--epochs", "1", "--limit", "20"]
    assert main(["compare", *words, "--num_tasks", "2", "--device", "cpu", "--out", str(tmp_path)]) == 0
    runs = pd.read_csv(tmp_path / "runs.csv").set_index("strategy")
    added = 2 * (2 * 256 * 2 + 2 + 256)
    (own,) = (name for name in runs.index if name.startswith(NAME))
    assert runs.loc[own, "parameters"] == runs.loc["finetune", "parameters"] + added
    assert runs.loc[own, "forgetting"] == 0


def test_its_test_passes(written):
    # each check has been asked of all our strategies; here some, of the template
    wanted = "mlp and (past or exported or several or its_size) or units"
    command = [
        sys.executable,
        "-m",
        "pytest",
        f"test_{NAME}.py",
        "-q",
        "-k",
        wanted,
        "-p",
        "no:cacheprovider",
    ]
    result = subprocess.run(command, cwd=written, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert "5 passed" in result.stdout


def test_what_is_written_is_clean(written):
    config = str(Path(__file__).resolve().parents[2] / "pyproject.toml")
    for words in (["check"], ["format", "--check"]):
        # there, where our packages are somebody else's
        command = [sys.executable, "-m", "ruff", *words, "--config", config, "--no-cache", "."]
        result = subprocess.run(command, cwd=written, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout


REFUSED = {
    "dashes": ("my-method", "such as my_method"),
    "keyword": ("class", "such as my_class"),
    "digit": ("3d", "such as my_3d"),
    "ours": ("finetune", "a strategy of ours"),
    "our stream": ("split_digits", "a stream of ours"),
    "module": ("numpy", "numpy is a module already"),
    "package of ours": ("strategies", "is a module already"),
}


@pytest.mark.parametrize(("name", "hint"), REFUSED.values(), ids=REFUSED.keys())
def test_a_name_that_cannot_be_used_is_one_line(tmp_path, capsys, name, hint):
    assert main(["new", "strategy", name, "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert hint in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there", ["mine.py", "test_mine.py"])
def test_nothing_is_overwritten(tmp_path, capsys, there):
    (tmp_path / there).write_text("precious")
    assert main(["new", "strategy", "mine", "--out", str(tmp_path)]) == 2
    assert f"{there} is there already" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]
