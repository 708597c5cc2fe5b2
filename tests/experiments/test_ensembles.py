"""``lifelong-ens ensemble``: from words to tables, measured again without training, and what it refuses."""

from __future__ import annotations

import json
import multiprocessing
import time

import numpy as np
import pandas as pd
import pytest
import torch

from experiments.cli import main
from experiments.ensembles.data import fitted, read_foreign, read_images
from experiments.ensembles.evaluation import evenly
from lifelong_ens.ensembles.ensemble import Ensemble
from lifelong_ens.report.ensembles import EnsembleReport

FAST = ("--limit", "30", "--epochs", "3", "--members", "2", "--device", "cpu")


def run(out, *arguments) -> int:
    return main(["ensemble", "--out", str(out), *FAST, *map(str, arguments)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("ensembles")
    assert (
        run(out, "--methods", "deep,batch_ensemble", "--seeds", 2, "--corruptions", "fog", "--held_out", 2)
        == 0
    )
    return out


def test_tables_say_what_the_records_say(folder):
    records = [json.loads(path.read_text()) for path in (folder / "records").glob("*.json")]
    assert len(records) == 8
    runs = pd.read_csv(folder / "runs.csv").set_index(["method", "seed"])
    assert set(runs.index) == {
        (name, seed) for name in ("single", "single_equal_cost", "deep", "batch_ensemble") for seed in (0, 1)
    }
    for record in records:
        row = runs.loc[(record["method"]["name"], record["seed"])]
        assert row["nll"] == record["uncertainty"][0]["nll"]
        assert row["parameters"] == record["cost"]["parameters"]
        fog = [one for one in record["uncertainty"] if one["images"] == "fog"]
        assert [one["severity"] for one in fog] == [1, 2, 3, 4, 5]
        assert row["corrupted_nll"] == pytest.approx(np.mean([one["nll"] for one in fog]))
        assert record["data"]["classes"] == [str(digit) for digit in range(8)]
    assert (runs.loc["single", "ratio_bytes"] == 1).all()
    assert (runs.loc["deep", "ratio_bytes"].between(1.99, 2.01)).all()
    assert (runs.loc["deep", "ratio_flops_training"] == 2).all()
    assert (runs.loc["single_equal_cost", "ratio_flops_training"] == 2).all()
    assert (runs.loc["batch_ensemble", "ratio_bytes"] < 1.15).all()
    assert runs["auroc"].between(0.3, 1).all()


def test_files_that_people_read(folder, capsys):
    summary = (folder / "summary.md").read_text()
    for word in ("single_equal_cost", "NLL - single", "reliability.png", "### uncertainty.csv"):
        assert word in summary
    assert (folder / "reliability.png").read_bytes()[:4] == b"\x89PNG"
    assert (folder / "nll_against_cost.png").stat().st_size > 10_000
    table = pd.read_csv(folder / "uncertainty.csv")
    assert set(table["images"]) == {"test", "fog", "held_out"}
    report = EnsembleReport.load(folder)
    documented = report.columns()
    assert list(documented[documented["table"] == "runs"]["name"]) == list(report.runs.columns)
    assert list(documented[documented["table"] == "uncertainty"]["name"]) == list(report.uncertainty.columns)
    assert main(["report", str(folder)]) == 0
    assert "single_equal_cost" in capsys.readouterr().out


def test_the_saved_model_is_what_was_measured(folder):
    images = read_images("digits", {"limit": 30}, held_out=2)
    x, labels = images.test.batch(torch.arange(len(images.test)))
    runs = pd.read_csv(folder / "runs.csv").set_index(["method", "seed"])
    for path in (folder / "models").glob("*"):
        ensemble = Ensemble.load(path)
        seed = int(path.name.split("-")[-2])
        with torch.no_grad():
            accuracy = float((ensemble.probs(x).argmax(dim=1) == labels).double().mean())
        assert accuracy == pytest.approx(runs.loc[(ensemble.method, seed), "accuracy"])


def test_measuring_in_another_way_trains_nothing_again(folder, tmp_path, caplog):
    import shutil

    out = tmp_path / "copy"
    shutil.copytree(folder, out)
    before = pd.read_csv(out / "runs.csv")
    arguments = ["--methods", "deep,batch_ensemble", "--seeds", 2, "--held_out", 2]
    assert run(out, *arguments, "--corruptions", "fog") == 0
    assert not [one for one in caplog.records if "trained in" in one.message]
    models = {path: path.stat().st_mtime_ns for path in (out / "models").rglob("*.safetensors")}
    assert run(out, *arguments, "--corruptions", "contrast", "--calibrate") == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "models").rglob("*.safetensors")} == models
    after = pd.read_csv(out / "runs.csv")
    assert set(pd.read_csv(out / "uncertainty.csv")["images"]) == {"test", "contrast", "held_out"}
    pd.testing.assert_series_equal(
        after.set_index(["method", "seed"])["seconds_training"].sort_index(),
        before.set_index(["method", "seed"])["seconds_training"].sort_index(),
    )
    assert (after["temperature"] != 1).all()
    pd.testing.assert_series_equal(
        after.set_index(["method", "seed"])["accuracy"].sort_index(),
        before.set_index(["method", "seed"])["accuracy"].sort_index(),
    )


def test_killed_it_goes_on_with_what_is_not_there(tmp_path):
    fork = multiprocessing.get_context("fork")
    arguments = ("--methods", "deep", "--seeds", 2, "--epochs", 20)
    process = fork.Process(target=run, args=(tmp_path / "killed", *arguments))
    process.start()
    deadline = time.monotonic() + 120
    while not len(list((tmp_path / "killed" / "records").glob("*.json"))) >= 2:
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    assert run(tmp_path / "killed", *arguments) == 0
    assert run(tmp_path / "whole", *arguments) == 0
    columns = ["method", "seed", "nll", "ece", "parameters", "flops_training"]
    tables = [
        pd.read_csv(tmp_path / name / "runs.csv")[columns].sort_values(columns[:2])
        for name in ("killed", "whole")
    ]
    pd.testing.assert_frame_equal(*(table.reset_index(drop=True) for table in tables))


def test_options_of_one_method_and_two_variants_of_it(tmp_path):
    assert run(tmp_path, "--methods", "batch_ensemble", "--batch_ensemble.preset", "fast") == 0
    assert run(tmp_path, "--methods", "batch_ensemble", "--batch_ensemble.learning_rate", 0.2) == 0
    runs = pd.read_csv(tmp_path / "runs.csv")
    assert "batch_ensemble(preset=fast)" in set(runs["method"])
    assert "batch_ensemble(learning_rate=0.2)" in set(runs["method"])
    assert (runs["method"] == "single").sum() == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "deap"], "did you mean deep"),
        (["--methods", ""], "--methods names nothing"),
        (["--data", "digit"], "unknown data"),
        (["--members", "0"], "at least 1"),
        (["--members", "many"], "whole number"),
        (["--limit", "1"], "too few to hold one out"),
        (["--validation", "0"], "--validation 0.1"),
        (["--held_out", "9"], "expected 1 to 8"),
        (["--corruptions", "rain"], "no corruption of this name"),
        (["--cifar_c", "nowhere"], "nowhere"),
        (["--ood", "elsewhere"], "--ood elsewhere=DIR"),
        (["--ood", "elsewhere=/nowhere"], "/nowhere is not a readable folder"),
        (["--methods", "mc_dropout", "--mc_dropout.rate", "1.5"], "above 0 and below 1"),
        (["--deep.preset", "fast"], "unknown option --deep.preset"),
        (["--num_tasks", "3"], "unknown option --num_tasks"),
        (["--network", "torchvision.models:resnet18"], "does not fit images of 1x8x8"),
        (["--network", "lifelong_ens.networks.plain:vgg11_half"], "at least 32x32"),
        (["--learning_rate", "1e12", "--epochs", "2"], "try a lower --learning_rate"),
    ],
)
def test_bad_input_is_one_line(arguments, words, tmp_path, capsys):
    assert (
        main(["ensemble", "--out", str(tmp_path / "out"), "--limit", "20", "--epochs", "1", *arguments]) == 2
    )
    lines = capsys.readouterr().err.strip().splitlines()
    assert words in lines[-1]
    assert lines[-1].startswith("lifelong-ens: error: ")


def test_a_damaged_model_is_named_and_trained_again(folder, tmp_path, caplog):
    import shutil

    out = tmp_path / "copy"
    shutil.copytree(folder, out)
    path = next(out.glob("models/digits-deep-0-*/ensemble.safetensors"))
    path.write_bytes(path.read_bytes()[:-50])
    arguments = ["--methods", "deep,batch_ensemble", "--seeds", 2, "--held_out", 2]
    assert run(out, *arguments, "--calibrate") == 0
    assert any("training again" in one.message and str(path) in one.message for one in caplog.records)
    Ensemble.load(path.parent)


@pytest.mark.data
def test_not_mnist_and_photographs_are_foreign_to_mnist_and_cifar(unpacked, caplog):
    caplog.set_level("INFO")
    mnist = read_images("mnist", {"root": str(unpacked("mnist")), "limit": 20})
    letters = read_foreign("notmnist", unpacked("notmnist"), mnist)
    assert letters.image_shape == (1, 28, 28)
    assert len(letters) == 10_000
    assert torch.equal(letters.mean, mnist.test.mean)
    cifar = read_images("cifar100", {"root": str(unpacked("cifar100")), "limit": 20})
    assert cifar.class_names[0] == "apple"
    photographs = read_foreign("other", unpacked("tiny-ood"), cifar)
    assert photographs.image_shape == (3, 32, 32)
    grey = read_foreign("mnist", unpacked("mnist"), cifar)
    assert grey.image_shape == (3, 32, 32)
    assert any("mnist: images of 1x28x28 are made 3x32x32" in one.message for one in caplog.records)


def test_official_corruptions_of_other_classes_are_refused_before_training(tmp_path, capsys):
    np.save(tmp_path / "gaussian_noise.npy", np.zeros((50_000, 32, 32, 3), np.uint8))
    np.save(tmp_path / "labels.npy", np.arange(50_000) % 10)
    out = tmp_path / "out"
    assert main(["ensemble", "--out", str(out), "--limit", "20", "--cifar_c", str(tmp_path)]) == 2
    assert "digits has 10 of 1x8x8: take --corruptions instead" in capsys.readouterr().err
    assert not (out / "models").exists()


def test_images_made_to_fit():
    pixels = torch.arange(4 * 4 * 3, dtype=torch.uint8).view(1, 3, 4, 4)
    assert torch.equal(fitted(pixels, (3, 4, 4)), pixels)
    assert torch.equal(fitted(pixels, (1, 4, 4))[0, 0], pixels[0].float().mean(dim=0).round().to(torch.uint8))
    assert fitted(pixels, (1, 8, 8)).shape == (1, 1, 8, 8)
    assert evenly(10, 3).tolist() == [0, 3, 6]
    assert evenly(10, None).tolist() == list(range(10))
