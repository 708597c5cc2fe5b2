"""The main job on real images, from the command line."""

from __future__ import annotations

import pandas as pd
import pytest

from experiments.cli import main

pytestmark = pytest.mark.data


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LIFELONG_ENS_CACHE", str(tmp_path / "cache"))


def test_split_cifar100_on_a_conv_net_with_batch_norm(unpacked, tmp_path):
    arguments = [
        "compare",
        "--stream",
        "split_cifar100",
        "--root",
        str(unpacked("cifar100")),
        "--num_tasks",
        "5",
    ]
    arguments += [
        "--network",
        "resnet20",
        "--width",
        "4",
        "--limit",
        "150",
        "--epochs",
        "3",
        "--augment",
        "crop_flip",
    ]
    arguments += [
        "--init",
        "ones",
        "--strategies",
        "finetune,batch_ensemble,pnn",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(arguments) == 0
    runs = pd.read_csv(tmp_path / "out/runs.csv").set_index("strategy")
    # two classes a task, on a net of 4 to 16 channels that learns its shared weights on the first two
    assert (runs.loc[["finetune", "pnn"], "learning_accuracy"] > 0.62).all()
    assert runs.loc["batch_ensemble", "learning_accuracy"] > 0.55
    assert (runs.loc[["batch_ensemble", "pnn"], "forgetting"] == 0).all()
    costs = pd.read_csv(tmp_path / "out/costs.csv")
    ours = costs[(costs["strategy"] == "batch_ensemble") & (costs["trained_task"] == 4)].set_index(
        "component"
    )
    assert {"shared", "fast_weights", "norm_affine", "norm_statistics", "head", "optimizer"} <= set(
        ours.index
    )
    assert ours.loc["norm_statistics", "parameters"] == 0 < ours.loc["norm_statistics", "bytes"]


def test_split_mnist_is_learnt(unpacked, tmp_path):
    arguments = ["compare", "--stream", "split_mnist", "--root", str(unpacked("mnist")), "--limit", "600"]
    arguments += ["--strategies", "finetune,independent,batch_ensemble", "--epochs", "4", "--device", "cpu"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    runs = pd.read_csv(tmp_path / "out/runs.csv").set_index("strategy")
    assert runs.loc["independent", "average_accuracy"] > 0.97
    assert runs.loc["batch_ensemble", "average_accuracy"] > 0.92
    assert runs.loc["batch_ensemble", "forgetting"] == 0 < runs.loc["finetune", "forgetting"]
