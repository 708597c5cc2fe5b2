from __future__ import annotations

import logging
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from lifelong_ens.errors import DamagedFileError, InputError
from lifelong_ens.report import Report
from lifelong_ens.store import write_json

FIXED = {
    "runs": "stream strategy seed "
    "average_accuracy forgetting backward_transfer forward_transfer learning_accuracy "
    "parameters bytes flops_forward flops_training seconds_training seconds_evaluation "
    "ratio_parameters ratio_bytes ratio_flops_forward ratio_flops_training "
    "ratio_seconds_training ratio_seconds_evaluation disk_bytes ratio_disk_bytes saved_bytes "
    "nll ece brier task_identification_accuracy class_incremental_accuracy "
    "setting tuning_trials tuning num_tasks network device commit version_python version_torch",
    "accuracy": "stream strategy seed trained_task eval_task accuracy setting nll ece brier entropy "
    "task_identification_accuracy class_incremental_accuracy disagreement",
    "costs": "stream strategy seed trained_task component parameters bytes flops_forward setting",
}
JOINT = [[None] * 3, [None] * 3, [0.9, 0.9, 0.6]]


@pytest.mark.parametrize("table", FIXED)
def test_columns_are_fixed(record, table):
    report = Report.from_records([record()])
    assert list(getattr(report, table).columns) == FIXED[table].split()


@pytest.mark.parametrize("table", ["runs", "accuracy", "costs", "tasks", "uncertainty", "reliability"])
def test_every_column_is_documented_in_order(record, table):
    report = Report.from_records([record(), record("joint", accuracy=JOINT)])
    documented = report.columns()
    assert list(documented.columns) == ["name", "table", "dtype", "unit", "meaning"]
    assert list(documented.loc[documented["table"] == table, "name"]) == list(getattr(report, table).columns)
    assert documented["meaning"].str.len().min() > 5
    kinds = documented.set_index(["table", "name"])["dtype"]
    assert kinds["runs", "average_accuracy"] == kinds["accuracy", "accuracy"] == "float64"
    assert kinds["runs", "parameters"] == kinds["costs", "bytes"] == kinds["tasks", "trained_task"] == "int64"


def test_a_run_by_hand(record):
    run = Report.from_records([record()]).runs.iloc[0]
    assert run["average_accuracy"] == pytest.approx((0.6 + 0.75 + 0.85) / 3)
    assert run["forgetting"] == pytest.approx((0.3 + 0.05) / 2)
    assert run["backward_transfer"] == pytest.approx(-0.175)
    assert run["learning_accuracy"] == pytest.approx(0.85)
    assert np.isnan(run["forward_transfer"])
    assert run["parameters"] == 1030
    assert run["bytes"] == 4120
    assert run["flops_forward"] == 55
    assert run["flops_training"] == 3000
    assert run["seconds_training"] == 4.5
    assert run["seconds_evaluation"] == 1.5
    assert run["disk_bytes"] == 5002
    assert run["saved_bytes"] == 128
    assert run["num_tasks"] == 3


def test_forward_transfer_needs_the_untrained_accuracy(record):
    full = [[0.9, 0.2, 0.1], [0.7, 0.8, 0.3], [0.6, 0.75, 0.85]]
    with_baseline = record(accuracy=full) | {"baseline": [None, 0.1, 0.1]}
    runs = Report.from_records([with_baseline, record(accuracy=full, seed=1)]).runs
    assert runs["forward_transfer"][0] == pytest.approx(0.15)
    assert np.isnan(runs["forward_transfer"][1])


def test_ratios_are_to_the_vanilla_run_of_the_same_seed_and_setting(record):
    records = [record("pnn", scale=6), record(scale=2), record("pnn", seed=1, scale=5), record(seed=1)]
    records += [record("pnn", setting="other", fit={"epochs": 2}), record("pnn", seed=2)]
    runs = Report.from_records(records).runs
    for cost in FIXED["runs"].split()[8:14]:
        assert runs[f"ratio_{cost}"].tolist() == pytest.approx([3, 1, 5, 1, np.nan, np.nan], nan_ok=True)
    assert runs["ratio_disk_bytes"][0] == pytest.approx(30002 / 10002)


def test_a_ratio_to_nothing_is_nan(record):
    runs = Report.from_records([record(scale=0), record("pnn")]).runs
    assert runs["ratio_bytes"].isna().all()


def test_accuracy_has_a_row_per_measured_cell(record):
    accuracy = Report.from_records([record()]).accuracy
    assert accuracy[["trained_task", "eval_task", "accuracy"]].to_numpy().tolist() == [
        [0, 0, 0.9], [1, 0, 0.7], [1, 1, 0.8], [2, 0, 0.6], [2, 1, 0.75], [2, 2, 0.85],
    ]  # fmt: skip


def test_costs_and_tasks_keep_every_row(record):
    report = Report.from_records([record()])
    assert len(report.costs) == 9
    assert report.costs["bytes"].sum() == 4 * (3 * 1000 + 10 + 20 + 30 + 3 * 777)
    assert report.tasks["average_accuracy"].tolist() == pytest.approx([0.9, 0.75, 2.2 / 3])
    assert report.tasks["flops_training"].tolist() == [1000, 2000, 3000]


def test_joint_has_only_an_end(record):
    report = Report.from_records([record(), record("joint", accuracy=JOINT)])
    joint = report.runs.iloc[1]
    assert joint["average_accuracy"] == pytest.approx(0.8)
    assert joint[["forgetting", "backward_transfer", "learning_accuracy"]].isna().all()
    assert joint["parameters"] == 1030
    assert len(report.tasks) == 4
    assert report.headline().loc["joint", "forgetting, points"] == "–"


def test_unknown_costs_stay_unknown(record):
    one = record()
    one["tasks"][-1]["flops_training"] = None
    one["costs"][-3]["parameters"] = None  # the shared weights of the last task
    run = Report.from_records([one]).runs.iloc[0]
    assert np.isnan(run["flops_training"])
    assert np.isnan(run["parameters"])
    assert run["bytes"] == 4120


def test_summary_is_mean_and_sample_std_per_stream_and_strategy(record):
    end = [[[0.5, None], [0.5, share]] for share in (0.1, 0.3)]
    report = Report.from_records(
        [record(accuracy=end[0]), record(seed=1, accuracy=end[1]), record("pnn", accuracy=end[0])]
    )
    summary = report.summary()
    assert summary.index.names == ["stream", "strategy"]
    assert summary.loc[("split_digits", "finetune"), ("average_accuracy", "mean")] == pytest.approx(0.35)
    assert summary.loc[("split_digits", "finetune"), ("average_accuracy", "std")] == pytest.approx(
        0.02**0.5 / 2
    )
    assert np.isnan(summary.loc[("split_digits", "pnn"), ("average_accuracy", "std")])
    assert np.isnan(summary.loc[("split_digits", "pnn"), ("forward_transfer", "mean")])
    assert {name for _, name in summary.columns} == {"mean", "std"}


def test_a_metric_undefined_for_one_seed_is_undefined_in_the_mean(record):
    report = Report.from_records([record(), record(seed=1, accuracy=JOINT)])
    assert np.isnan(report.summary()["forgetting", "mean"].item())


def test_two_settings_of_a_stream_are_not_mixed(record):
    records = [record(setting="1" * 8, scale=2), record(setting="2" * 8, fit={"epochs": 5}, scale=4)]
    report = Report.from_records([*records, record("pnn", setting="2" * 8, fit={"epochs": 5}, scale=8)])
    names = ["split_digits (epochs=1)", "split_digits (epochs=5)"]
    summary = report.summary()
    assert list(summary.index) == [(names[0], "finetune"), (names[1], "finetune"), (names[1], "pnn")]
    assert summary["parameters", "mean"].tolist() == [2060, 4120, 8240]
    assert summary["ratio_parameters", "mean"].tolist() == [1, 1, 2]
    assert list(report.headline().index) == list(summary.index)


def test_two_streams_have_a_level_in_the_headline(record):
    report = Report.from_records([record(), record(stream="split_mnist"), record("pnn")])
    assert list(report.headline().index) == [
        ("split_digits", "finetune"),
        ("split_digits", "pnn"),
        ("split_mnist", "finetune"),
    ]


def test_one_strategy_with_several_options_is_several_rows(record):
    records = [
        record("be", seed=seed, options={"init": {"r": r}}) for r in ("ones", "sign") for seed in (0, 1)
    ]
    report = Report.from_records(records)
    assert list(report.headline().index) == ["be (init.r=ones)", "be (init.r=sign)"]
    assert len(report.runs) == 4


def test_of_two_records_of_one_run_the_later_is_used(record, caplog):
    late = record(scale=3) | {"finished": "2025-02-01T00:00:00+00:00"}
    for pair in ([late, record()], [record(), late]):
        runs = Report.from_records(pair).runs
        assert runs["parameters"].tolist() == [3090]
    assert "the later is used" in caplog.text


def test_load_skips_and_names_the_damaged(record, tmp_path, caplog):
    for i in range(3):
        write_json(tmp_path / "records" / f"{i}.json", record(seed=i))
    (tmp_path / "records" / "1.json").write_text('{"schema": 1, "stream"')
    write_json(tmp_path / "records" / "3.json", record(seed=3) | {"schema": 3})
    write_json(tmp_path / "records" / "4.json", {"something": "else"})
    with caplog.at_level(logging.WARNING):
        report = Report.load(tmp_path)
    assert report.runs["seed"].tolist() == [0, 2]
    for name in ("1.json", "3.json", "4.json"):
        assert name in caplog.text
    assert "upgrade" in caplog.text
    assert len(caplog.records) == 3


def test_load_equals_what_was_written(record, tmp_path):
    records = [record(), record("pnn", scale=2), record("joint", accuracy=JOINT)]
    for i, one in enumerate(records):
        write_json(tmp_path / "records" / f"{i}.json", one)
    loaded, made = Report.load(tmp_path), Report.from_records(records)
    for table in ("runs", "accuracy", "costs", "tasks"):
        pd.testing.assert_frame_equal(getattr(loaded, table), getattr(made, table))


def test_load_of_nothing_readable_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="no records"):
        Report.load(tmp_path)
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "a.json").write_text("[")
    with pytest.raises(InputError, match=r"none of the 1 records.*a\.json"):
        Report.load(tmp_path)
    with pytest.raises(InputError, match="at least one"):
        Report.from_records([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 3}, "upgrade"),
        ({"reliability": {"count": [1]}}, "reliability"),
        ({"reliability": {"count": [1], "confidence": [0.5], "accuracy": []}}, "reliability"),
        ({"schema": None}, "no schema"),
        ({"seed": "0"}, "`seed` is a str"),
        ({"accuracy": [[0.5, None], [0.5, 0.5]]}, "3 x 3"),
        ({"accuracy": [[50.0, None, None], [0, 0, None], [0, 0, 0]]}, r"50\.0"),
        ({"baseline": [0.1]}, "baseline"),
        ({"costs": []}, "no rows"),
        ({"tasks": [{"trained_task": 3}]}, "`trained_task` is 3"),
        ({"network": {}}, r"network\.name"),
    ],
)
def test_what_is_no_record_is_refused(record, change, message):
    with pytest.raises(DamagedFileError, match=message):
        Report.from_records([record() | change])


@pytest.mark.parametrize(
    "key", ["stream", "strategy", "fit", "seed", "setting", "costs", "tasks", "versions"]
)
def test_a_record_without_a_key_is_refused(record, key):
    one = record()
    del one[key]
    with pytest.raises(DamagedFileError, match=f"record 0: `{key}` is missing"):
        Report.from_records([one])


def test_importing_the_report_does_not_import_torch_or_matplotlib():
    code = (
        "import sys, lifelong_ens.report; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'matplotlib', 'avalanche')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
