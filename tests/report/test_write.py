from __future__ import annotations

import math
import os
import struct
import sys

import numpy as np
import pandas as pd
import pytest

from lifelong_ens.errors import DamagedFileError
from lifelong_ens.report import Report
from lifelong_ens.report.headline import duration, percent, quantity, with_ratio
from lifelong_ens.report.labelling import wrapped

FILES = [
    "accuracy.csv", "costs.csv", "runs.csv", "tasks.csv", "summary.md",
    "accuracy_over_tasks.png", "forgetting_matrix.png", "accuracy_against_memory.png",
]  # fmt: skip
JOINT = [[None] * 3, [None] * 3, [0.9, 0.9, 0.6]]


def test_headline_of_one_seed_and_of_several(record):
    exact = [[0.9, None], [0.9, 0.8]]
    rows = Report.from_records(
        [
            record(),
            record("pnn", scale=2),
            record("pnn", seed=1, scale=2, accuracy=exact),
            record("be", accuracy=exact),
        ]
    ).headline()
    assert list(rows.index) == ["finetune", "pnn", "be"]
    assert rows.loc["finetune"].tolist() == [
        "73.33", "17.50", "1.03 k (1.00x)", "5.00 kB (1.00x)", "55", "3.00 k (1.00x)", "4.50 s (1.00x)",
    ]  # fmt: skip
    assert rows.loc["pnn", "accuracy %"] == "79.17 ± 8.25"
    assert rows.loc["be", "forgetting, points"] == "0"
    assert not rows.map(lambda cell: "nan" in cell).to_numpy().any()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (percent([0.8421, 0.8469]), "84.45 ± 0.34"),
        (percent([0.0, 0.0]), "0"),
        (percent([-1e-9]), "0.00"),
        (percent([math.nan, 0.5]), "–"),
        (quantity([1_163_300.0]), "1.16 M"),
        (quantity([999.0]), "999"),
        (quantity([999_600.0], "B"), "1.00 MB"),
        (quantity([61_156.0, 61_156.0]), "61.2 k"),
        (quantity([1000.0, 3000.0], "B"), "2.00 ± 1.41 kB"),
        (quantity([0.0]), "0"),
        (quantity([math.nan]), "–"),
        (duration([12.34]), "12.3 s"),
        (duration([3600.0]), "60.0 min"),
        (duration([86_400.0]), "24.0 h"),
        (with_ratio("1 M", [1.1, 1.2]), "1 M (1.15x)"),
        (with_ratio("1 M", [math.nan]), "1 M"),
    ],
)
def test_numbers_as_people_read_them(text, expected):
    assert text == expected


def test_write_makes_every_file_and_nothing_else(record, tmp_path):
    records = [record(s, seed=k, scale=n) for n, s in ((1, "finetune"), (9, "pnn")) for k in (0, 1)]
    report = Report.from_records([*records, record("joint", accuracy=JOINT)])
    assert [path.name for path in report.write(tmp_path)] == FILES
    assert sorted(os.listdir(tmp_path)) == sorted(FILES)
    for name in ("accuracy", "costs", "runs", "tasks"):
        read = pd.read_csv(tmp_path / f"{name}.csv")
        table = getattr(report, name)
        assert list(read.columns) == list(table.columns)
        for column in table.columns:
            if pd.api.types.is_numeric_dtype(table[column]):
                assert np.allclose(read[column], table[column], rtol=1e-15, atol=0, equal_nan=True)
    for name in FILES[5:]:
        data = (tmp_path / name).read_bytes()
        assert data.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", data[16:24])
        assert 800 <= width <= 1600
        assert height > 300


def test_summary_has_the_table_the_notes_and_where_it_ran(record, tmp_path):
    Report.from_records([record(), record("pnn", scale=2)]).write(tmp_path)
    text = (tmp_path / "summary.md").read_text()
    assert "| strategy" in text
    assert "| pnn " in text
    assert "2.06 k (2.00x)" in text
    assert "2.9.0" in text
    assert "`ratio_bytes` (x vanilla)" in text
    assert "nan" not in text.lower().replace("finance", "")
    for name in FILES[5:]:
        assert f"]({name})" in text


def test_write_of_two_streams(record, tmp_path):
    four = [[0.9, None, None, None], [0.9, 0.8, None, None], [0.9, 0.8, 0.7, None], [0.9, 0.8, 0.7, 0.6]]
    records = [
        record(),
        record(stream="split_mnist", accuracy=four),
        record("pnn", stream="split_mnist", accuracy=four),
    ]
    Report.from_records(records).write(tmp_path)
    text = (tmp_path / "summary.md").read_text()
    assert "## split_digits" in text
    assert "## split_mnist" in text


@pytest.mark.parametrize(
    "accuracy",
    [[[0.5]], [[1.0, None], [1.0, 1.0]], [[None, None], [None, None]], [[None, None], [None, 0.0]]],
    ids=["one task", "all right", "nothing measured", "all wrong"],
)
def test_plots_of_odd_matrices(record, tmp_path, accuracy):
    one = (
        record(accuracy=accuracy)
        if accuracy[-1][-1] is not None
        else record() | {"accuracy": [[None] * 3] * 3}
    )
    Report.from_records([one]).write(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(FILES)


def test_plots_of_many_strategies_without_vanilla(record, tmp_path):
    records = [record(f"my_package.module:strategy_{i}", scale=1 + i % 3) for i in range(23)]
    Report.from_records(records).write(tmp_path)
    assert (tmp_path / FILES[-1]).stat().st_size > 10_000


def test_plots_leave_matplotlib_as_it_was(record, tmp_path):
    Report.from_records([record()]).write(tmp_path)
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_same_records_same_files(record, tmp_path):
    for name in ("a", "b"):
        Report.from_records([record(), record("pnn", scale=2)]).write(tmp_path / name)
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_wrapping_breaks_where_names_have_joints():
    assert wrapped("my_package.module:my_strategy", 24) == "my_package.module:my_\nstrategy"
    assert wrapped("short", 24) == "short"
    assert wrapped("abcdefghijklm", 5) == "abcde\nfghij\nklm"
    assert wrapped("init=a, b", 7) == "init=a,\nb"


PROTOCOL = {
    "tuned_on": "validation images of the first 3 tasks",
    "objective": "mean accuracy",
    "sampler": "TPE",
    "search": {"learning_rate": "log:0.001:0.1"},
    "seeds": [0, 1],
    "num_tasks_used": 3,
    "trials": 20,
    "best": {"learning_rate": 0.02},
    "best_validation_accuracy": 0.9753,
    "flops": 12_300_000_000,
    "seconds": 4.5,
}


def test_how_a_strategy_was_tuned_is_said_once_and_counted(record, tmp_path):
    tuned = [record("pnn", seed) | {"tuning": PROTOCOL} for seed in range(2)]
    report = Report.from_records([record(), *tuned])
    assert report.runs["tuning_trials"].tolist() == [0, 20, 20]
    report.write(tmp_path)
    text = (tmp_path / "summary.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("* `pnn` on split_digits: ")]
    for part in (
        "20 trials",
        "first 3 tasks",
        "seeds 0, 1",
        "log:0.001:0.1",
        "learning_rate=0.02",
        "97.53 %",
    ):
        assert part in line
    assert "1.23e+10 training FLOPs and 4.5 s" in line
    Report.from_records([record()]).write(tmp_path)
    assert "## Tuning" not in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize("damage", [{"trials": "20"}, {"best": None}, {"search": []}])
def test_an_ill_formed_protocol_is_refused(record, damage):
    with pytest.raises(DamagedFileError, match="tuning"):
        Report.from_records([record() | {"tuning": PROTOCOL | damage}])
