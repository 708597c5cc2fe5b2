"""compare from Python, as architecture and README show it."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from experiments.compare import compare
from lifelong_ens import Fit, Report, TaskNetwork, batch_ensemble
from lifelong_ens.errors import InputError
from lifelong_ens.networks import mlp, resnet18
from strategies import Strategy, batch_ensemble_lifelong, bn_tuned, finetune, pnn
from streams import split_digits

FIT = Fit(epochs=2, batch_size=32)
BODY = functools.partial(mlp, input_shape=(1, 8, 8), hidden=(32, 16))


def strategies() -> dict:
    return {
        "finetune": lambda seed, device: finetune(BODY(), fit=FIT, seed=seed, device=device),
        "pnn": lambda seed: pnn(BODY(), fit=FIT, seed=seed),
        "batch_ensemble": lambda seed: batch_ensemble_lifelong(BODY(), fit=FIT, seed=seed),
    }


def test_tables_are_tidy(tmp_path):
    stream = functools.partial(split_digits, num_tasks=3)
    report = compare(stream, strategies(), seeds=range(2), out=tmp_path, progress=False)
    assert len(report.runs) == 6
    assert len(report.accuracy) == 6 * (1 + 2 + 3)
    assert report.accuracy["accuracy"].between(0, 1).all()
    assert set(report.costs["trained_task"]) == {0, 1, 2}
    summary = report.summary()
    assert list(summary.index.names) == ["stream", "strategy"]
    assert ("average_accuracy", "mean") in summary.columns
    again = Report.load(tmp_path)
    assert again.runs.equals(report.runs)


def test_forward_flops_of_components_add_up(tmp_path):
    report = compare(split_digits(num_tasks=2), strategies(), progress=False)
    parts = report.costs.groupby(["strategy", "trained_task"])["flops_forward"].sum()
    whole = report.tasks.set_index(["strategy", "trained_task"])["flops_forward"]
    assert (parts.sort_index() == whole.sort_index()).all()
    fast = report.costs[(report.costs["component"] == "fast_weights") & (report.costs["trained_task"] == 0)]
    assert int(fast["flops_forward"].iloc[0]) == 64 + 32 + 32 + 16


def test_seeds_permute_classes_and_a_benchmark_is_used_as_it_is():
    by_seed = compare(split_digits, {"f": strategies()["finetune"]}, seeds=range(2), progress=False)
    accuracies = by_seed.runs["average_accuracy"].tolist()
    assert accuracies[0] != accuracies[1]


def test_nothing_to_run_is_said():
    with pytest.raises(ValueError, match="nothing to run"):
        compare(split_digits, {}, progress=False)


def test_a_strategy_that_cannot_run_on_the_network_does_not_stop_the_others(caplog):
    unfit = {"bn_tuned": lambda seed: bn_tuned(BODY(), fit=FIT, seed=seed)}
    report = compare(split_digits, {**unfit, "f": strategies()["finetune"]}, progress=False)
    assert report.runs["strategy"].tolist() == ["f"]
    assert "bn_tuned did not run: bn_tuned trains norms" in caplog.text
    with pytest.raises(InputError, match="use a network with norms"):
        compare(split_digits, unfit, progress=False)


class ProgressiveHeads(TaskNetwork):
    """The smallest method of one's own: a frozen random body and a head for each task."""

    frozen_past = True

    def __init__(self, body: torch.nn.Module) -> None:
        super().__init__()
        self.body = body.requires_grad_(False)

    def add_task(self, num_classes: int) -> None:
        self.requires_grad_(False)
        self.heads.add(self.body.num_features, num_classes)

    def forward(self, x: Tensor, task: int | Tensor) -> Tensor:
        return self.heads(self.body(x), task)


def test_a_new_method_is_one_small_class():
    build = {"heads": lambda seed: Strategy(network=ProgressiveHeads(BODY()), fit=Fit(epochs=20), seed=seed)}
    report = compare(split_digits, build, progress=False)
    assert report.runs["forgetting"].tolist() == [0.0]
    assert report.runs["average_accuracy"].iloc[0] > 0.8


def test_ensemble_snippet():
    ensemble = batch_ensemble(resnet18(num_classes=10, width=4), num_members=4).eval()
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert ensemble(x).shape == (4, 3, 10)
        assert ensemble(x, members=[2]).shape == (1, 3, 10)
        torch.testing.assert_close(ensemble.export_member(2)(x), ensemble(x)[2], rtol=1e-5, atol=1e-6)


def test_calibration_of_every_task_is_beside_its_accuracy():
    report = compare(split_digits, {"f": strategies()["finetune"]}, progress=False)
    assert report.accuracy[["nll", "ece", "brier", "entropy"]].notna().all().all()
    assert report.accuracy["ece"].between(0, 1).all()
    assert report.accuracy["brier"].between(0, 2).all()
    # one member cannot disagree with itself
    assert report.accuracy["disagreement"].isna().all()


def test_calibration_over_the_stream_pools_all_tasks():
    report = compare(split_digits(num_tasks=3), {"f": strategies()["finetune"]}, progress=False)
    last = report.tasks.iloc[-1]
    run = report.runs.iloc[0]
    assert run[["nll", "ece", "brier"]].tolist() == last[["nll", "ece", "brier"]].tolist()
    final = report.accuracy[report.accuracy["trained_task"] == 2]
    # the mean of tasks bounds what pooling them gives, where bins are compared; for sums they are weighted means
    assert final["nll"].min() < run["nll"] < final["nll"].max()
    assert run["ece"] <= (final["ece"] * 1.2).max()
