from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments import reproduce
from experiments.cli import main
from experiments.reproduce.translation import REPRODUCTION
from experiments.translation import running, text
from experiments.translation.running import read_setting
from experiments.translation.setting import Row
from experiments.translation.table import Table, load_records, steps_to
from lifelong_ens.errors import DamagedFileError, InputError

TINY = [
    *("--limit", "150"),
    *("--width", "8"),
    *("--heads", "2"),
    *("--layers", "1"),
    *("--epochs", "2"),
    *("--batch_size", "32"),
    *("--evaluate_every", "4"),
    *("--vocabulary_size", "400"),
    *("--max_tokens", "40"),
]


@pytest.fixture(scope="module")
def few_phrases() -> Iterator[None]:
    """Fewer to look at and to translate than there are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "PHRASES", {"train": 24_000, "valid": 40, "test": 40})
        yield


@pytest.fixture(scope="module")
def finished(few_phrases: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which two seeds of a tiny form have run."""
    out = tmp_path_factory.mktemp("translation")
    REPRODUCTION.run({"out": out, "device": "cpu", "seeds": "1,2"}, TINY)
    return out


def again(out: Path, *rest: str, **given: Any) -> Any:
    table, folder = REPRODUCTION.run({"out": out, "device": "cpu", "seeds": "1,2", **given}, [*TINY, *rest])
    assert folder == out
    return table


def test_every_row_and_seed_has_a_record(finished: Path) -> None:
    records = load_records(finished)
    assert sorted((record["row"]["num_members"], record["seed"]) for record in records) == [
        (1, 1),
        (1, 2),
        (4, 1),
        (4, 2),
    ]
    assert len({record["setting"] for record in records}) == 1
    for record in records:
        assert [point["step"] for point in record["curve"]] == [4, 8, 10]
        assert record["text"]["pairs"] == {"train": 150, "valid": 40, "test": 40}
        assert record["vocabulary"]["size"] == 400
        assert len(record["examples"]) == 10
        assert record["bleu_signature"].startswith("nrefs:1")
        assert 1 < record["test_perplexity"] < 1000
        assert record["test_perplexity"] <= record["test_perplexity_member"] * (1 + 1e-6)
    single, ensemble = (
        next(record for record in records if record["row"]["num_members"] == members) for members in (1, 4)
    )
    # two attentions of width 8: r, s and three biases more of each of four projections
    fast = 2 * 4 * 4 * 2 * 8
    assert ensemble["parameters"]["fast_weights"] == fast
    more = sum(ensemble["parameters"].values()) - sum(single["parameters"].values())
    assert more == fast + 2 * 4 * 3 * 8
    assert ensemble["flops_training"] > 3.9 * single["flops_training"]


def test_what_has_a_record_is_not_repeated(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in (finished / "records").iterdir()}
    written = (finished / "table.md").read_text()

    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(running, "run_row", never)
    assert again(finished).markdown() == written
    assert {path: path.read_bytes() for path in (finished / "records").iterdir()} == before


def test_repeated_runs_and_mended_ones_come_to_the_same(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    for path in (finished / "records").iterdir():
        (tmp_path / "records" / path.name).write_bytes(path.read_bytes())
    (damaged,) = (tmp_path / "records").glob("translation-batch_ensemble-2-*")
    damaged.write_text("{")
    again(tmp_path)
    measured = ("curve", "test_perplexity", "bleu", "exact", "flops_training", "examples", "vocabulary")
    for path in (finished / "records").iterdir():
        first, second = (
            json.loads((folder / "records" / path.name).read_text()) for folder in (finished, tmp_path)
        )
        assert {name: first[name] for name in measured} == {name: second[name] for name in measured}


def test_the_table(finished: Path) -> None:
    table = Table.of(REPRODUCTION, load_records(finished))
    cells = table.strings().set_index("network")
    assert list(cells.index) == ["single", "batch_ensemble of 4"]
    assert list(cells["published"]) == ["4.30", "4.26"]
    assert cells.loc["single", "parameters"].endswith("(1.00x)")
    assert all("±" in cell for cell in cells["validation perplexity"])
    shown = table.markdown()
    assert (finished / "table.md").read_text() == shown
    assert "**Not at full settings:**" in shown
    for difference in ("limit 150", "width 8 instead of 64", "epochs 2 instead of 3", "seeds 2 instead of 3"):
        assert difference in shown
    assert "newstest2013" in shown
    assert "it is not prose" in shown
    numbers = pd.read_csv(finished / "table.csv")
    assert len(numbers) == 4
    curves = pd.read_csv(finished / "curves.csv")
    assert len(curves) == 4 * 3
    best = curves.groupby(["row", "seed"])["perplexity"].min()
    for _, row in numbers.iterrows():
        assert row["valid_perplexity"] == best[row["row"], row["seed"]]
        assert row["target_perplexity"] == best["single", row["seed"]]
    single = numbers[numbers["row"] == "single"]
    assert (single["steps_to_target"] == single["best_step"]).all()


def test_steps_are_counted_to_the_first_look_at_or_below_the_target() -> None:
    record = {"curve": [{"step": 10 * i, "perplexity": p} for i, p in enumerate((9.0, 4.0, 2.0, 3.0))]}
    assert steps_to(record, 4.0) == 10
    assert steps_to(record, 3.9) == 20
    assert math.isnan(steps_to(record, 1.9))


def test_a_target_of_ones_own_uses_the_same_runs(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(running, "run_row")
    cells = again(finished, "--target_perplexity", "100000").strings().set_index("network")
    assert list(cells["steps to 100000"]) == ["4 ± 0 (1.00x)", "4 ± 0 (1.00x)"]
    cells = again(finished, "--target_perplexity", "1.0001").strings()
    assert list(cells["steps to 1.0001"]) == ["not reached"] * 2
    again(finished)


def test_a_row_that_has_not_run_is_empty(finished: Path) -> None:
    later = dataclasses.replace(REPRODUCTION, rows=(*REPRODUCTION.rows, Row("all", 4, "all")))
    cells = Table.of(later, load_records(finished)).strings().set_index("network").loc["all"]
    assert cells["BLEU"] == cells["parameters"] == cells["test perplexity"] == "–"


def test_text_of_files(tmp_path: Path) -> None:
    root, out = tmp_path / "text", tmp_path / "out"
    root.mkdir()
    for split, lines in (("train", 40), ("valid", 5), ("test", 5)):
        for language in ("fr", "en"):
            sentences = "".join(f"{language} {i % 7} {'x' * (i % 3)}\n" for i in range(lines))
            (root / f"{split}.{language}").write_text(sentences)
    more = ["--root", str(root), "--source", "fr", "--target", "en", "--vocabulary_size", "300"]
    single = dataclasses.replace(REPRODUCTION, rows=REPRODUCTION.rows[:1])
    table, _ = single.run({"out": out, "device": "cpu", "seeds": 1}, [*TINY, *more])
    assert "fr-en text of files, 40 training pairs" in table.markdown()
    assert str(tmp_path) not in next((out / "records").iterdir()).read_text()


def test_full_and_quick_settings() -> None:
    full, fit = read_setting(REPRODUCTION, [], quick=False)
    small, quick_fit = read_setting(REPRODUCTION, ["--dropout", "0.3"], quick=True)
    assert (full.limit, fit.epochs, full.dropout) == (None, 3, 0.1)
    assert (small.limit, quick_fit.epochs, small.dropout) == (6000, 6, 0.3)


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        (["--widht", "8"], "did you mean width"),
        (["--augment", "flip"], "--augment is not for translation"),
        (["--patience", "2"], "--patience is not for translation"),
        (["--compile", "true"], "--compile is not for translation"),
        (["--epochs", "0"], "epochs is at least 1"),
        (["--heads", "three"], "--heads three: expected int"),
    ],
)
def test_options_that_cannot_be_used(rest: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_setting(REPRODUCTION, rest, quick=False)


def test_missing_packages_are_named_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("tokenizers", "babel") else there(name)
    )
    assert main(["reproduce", "translation", "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "needs tokenizers, babel: pip install 'lifelong-ens[translation]'" in line


def test_a_foreign_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "other.json").write_text('{"schema": 1}')
    with pytest.raises(DamagedFileError, match=r"other\.json is not a record of translation"):
        load_records(tmp_path)
    with pytest.raises(InputError, match="no records of translation"):
        Table.of(REPRODUCTION, [])


def test_it_is_one_of_the_reproductions() -> None:
    assert reproduce.find("translation") is REPRODUCTION
