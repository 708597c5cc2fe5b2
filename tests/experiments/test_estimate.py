"""What a run is said to cost before it is run is what its record says afterwards."""

from __future__ import annotations

import pytest

from experiments.cli import main
from experiments.estimate import Estimate, TaskCost, estimate
from experiments.run import Cell, Named, Run
from lifelong_ens import Fit
from lifelong_ens.networks import mlp
from strategies import BUILDERS
from streams import split_digits

SMALL = ["--limit", "20", "--num_tasks", "2", "--epochs", "3", "--batch_size", "16", "--hidden", "[16, 8]"]
# those that need more than a network, images and few epochs to be quick
OPTIONS = {"rcl": {"trials": 2}, "structured_ensemble": {"mask_epochs": 2}}


def builder(name, fit):
    import strategies

    build = getattr(strategies, BUILDERS[name].partition(":")[2])
    options = OPTIONS.get(name, {})
    return lambda seed: build(mlp(input_shape=(1, 8, 8), hidden=(16, 8)), fit=fit, seed=seed, **options)


def estimated_and_record(tmp_path, name: str, num_tasks: int, fit: Fit, limit: int | None = 20):
    benchmark = split_digits(num_tasks=num_tasks, limit=limit)
    found = estimate(builder(name, fit), benchmark, seed=0)
    cell = Cell(Named("split_digits"), Named(name), Named("mlp"), {}, seed=0)
    return found, Run(cell, benchmark, builder(name, fit), tmp_path).execute()


FIT = Fit(epochs=3, batch_size=16)
KNOWN = [name for name in BUILDERS if name not in ("rcl", "den", "bn_tuned")]


@pytest.mark.parametrize("name", KNOWN)
def test_an_estimate_is_what_the_record_says(tmp_path, name):
    found, record = estimated_and_record(tmp_path, name, num_tasks=2, fit=FIT)
    end = record["tasks"][-1]
    last = [row for row in record["costs"] if row["trained_task"] == end["trained_task"]]
    assert found.parameters == sum(row["parameters"] for row in last)
    assert found.bytes == sum(row["bytes"] for row in last)
    assert found.disk_bytes == end["disk_bytes"]
    assert found.flops_forward == end["flops_forward"]
    assert found.flops_training == pytest.approx(end["flops_training"], rel=1e-9)
    assert found.seconds_training > 0
    assert found.size is found.cost is None


@pytest.mark.parametrize("name", ["finetune", "agem"])
def test_steps_in_parts_are_left_out_as_a_whole(tmp_path, monkeypatch, name):
    monkeypatch.setattr("experiments.estimate.WARM_SECONDS", 0.0)
    found, record = estimated_and_record(tmp_path, name, 2, Fit(epochs=3, batch_size=16, accumulate=4), 40)
    assert found.flops_training == pytest.approx(record["tasks"][-1]["flops_training"], rel=1e-9)


@pytest.mark.parametrize("name", ["rcl", "den"])
def test_what_grows_by_learning_is_at_least_so_large(tmp_path, name):
    found, record = estimated_and_record(tmp_path, name, num_tasks=2, fit=FIT)
    end = record["tasks"][-1]
    last = [row for row in record["costs"] if row["trained_task"] == end["trained_task"]]
    assert found.size is not None
    assert found.size.mark == "≥"
    assert 0 < found.parameters <= sum(row["parameters"] for row in last)
    assert 0 < found.disk_bytes <= end["disk_bytes"]


@pytest.mark.parametrize("name", ["batch_ensemble", "pnn"])
def test_tasks_between_the_measured_ones_lie_on_a_parabola(tmp_path, name):
    found, record = estimated_and_record(tmp_path, name, num_tasks=10, fit=Fit(epochs=2), limit=10)
    assert found.measured == (0, 1, 5, 9)
    assert len(found.tasks) == 10
    end = record["tasks"][-1]
    assert found.flops_training == pytest.approx(end["flops_training"], rel=1e-9)
    assert found.disk_bytes == end["disk_bytes"]


def test_training_that_may_stop_early_costs_at_most_so_much():
    benchmark = split_digits(num_tasks=2, limit=20, validation=0.2)
    sooner = estimate(builder("finetune", Fit(epochs=4, patience=1)), benchmark, seed=0)
    never = estimate(builder("finetune", Fit(epochs=4)), benchmark, seed=0)
    assert sooner.size is never.cost is None
    assert sooner.cost is not None
    assert "stop early" in sooner.cost.why
    assert sooner.flops_training == never.flops_training


def test_dry_run_says_what_is_left_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["compare", "--strategies", "finetune,pnn,bn_tuned", *SMALL, "--device", "cpu", "--out", "o"]
    assert main([*arguments, "--seeds", "3", "--dry_run"]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert "split_digits, 2 tasks of 5 classes, each with 100 training" in rows["stream:"]
    assert "3 new" in rows["finetune"]
    assert "9 runs" in rows["total"]
    assert "bn_tuned trains norms" in rows["–"]
    assert list(tmp_path.iterdir()) == []

    main([*arguments, "--strategies", "finetune,pnn", "--seeds", "1"])
    (record,) = (tmp_path / "o/records").glob("*pnn*.json")
    record.unlink()
    (checkpoint,) = (tmp_path / "o/checkpoints").glob("*pnn*/task_*.json")
    checkpoint.rename(checkpoint.with_name("task_0001.json"))
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert main([*arguments, "--seeds", "2", "--dry_run"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "1 new, 1 finished" in rows["finetune"]
    assert "1 new, 1 after task 1" in rows["pnn"]
    assert sorted(tmp_path.rglob("*")) == before


def test_sums():
    cost = Estimate(1, 4, 8, 2, (TaskCost(1.0, 0.5), TaskCost(2.0, 0.25)), (0, 1))
    assert (cost.flops_training, cost.seconds_training) == (3.0, 0.75)
