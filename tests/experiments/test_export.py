"""From ``compare`` over ``export`` to ``predict``: the same answers as the strategy's own."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.cli import main
from experiments.export import find_record, task_names
from lifelong_ens.serving import ServedModel
from streams import image_table, split_cifar100, split_digits


def run(capsys, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    (line,) = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("lifelong-ens: error: ")
    ]
    return line


def compared(capsys, out: Path, *arguments: object) -> Path:
    """Runs ``compare`` for one strategy; the record."""
    run(capsys, "compare", *arguments, "--epochs", 2, "--device", "cpu", "--out", out)
    (record,) = (out / "records").glob("*.json")
    return record


def write_images(folder: Path, benchmark, task: int, count: int = 12) -> None:
    """Test images of a task as files, as anybody would have them."""
    folder.mkdir()
    data = benchmark.test_stream[task].dataset.image_data
    for number, row in enumerate(data.rows[:count].tolist()):
        pixels = data.images[row].numpy()
        image = Image.fromarray(
            pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))
        )
        image.save(folder / f"{number:03d}.png")


def check_against_the_run(capsys, tmp_path: Path, record: Path, benchmark, names: list[str]) -> None:
    """What ``predict`` prints of images is what was measured of them as tensors."""
    model = ServedModel(tmp_path / "model")
    measured = json.loads(record.read_text())["accuracy"][-1]
    for task, name in enumerate(names):
        data = benchmark.test_stream[task].dataset
        x, y, _ = data.batch(torch.arange(len(data)))
        with torch.no_grad():
            logits = model(x, name)
        assert float((logits.argmax(-1) == y).double().mean()) == pytest.approx(measured[task])
        write_images(tmp_path / f"images{task}", benchmark, task)
        text = run(capsys, "predict", tmp_path / "model", tmp_path / f"images{task}", "--task", name)
        probabilities = logits.softmax(-1)
        rows = list(csv.DictReader(io.StringIO(text)))
        assert len(rows) == min(12, len(y))
        for row, expected in zip(rows, probabilities, strict=False):
            assert row["label"] == benchmark.class_names[task][int(expected.argmax())]
            assert float(row["probability"]) == pytest.approx(float(expected.max()), abs=1e-5)


@pytest.mark.parametrize("strategy", ["batch_ensemble", "finetune", "packnet"])
def test_digits(strategy, tmp_path, capsys):
    options = ["--num_tasks", 3, "--strategies", strategy, "--network", "resnet20", "--width", 4]
    record = compared(capsys, tmp_path / "runs", *options, "--limit", 20)
    out = run(capsys, "export", record, "--out", tmp_path / "model")
    benchmark = split_digits(num_tasks=3, limit=20)
    names = ["-".join(one) for one in benchmark.class_names]
    assert f"{tmp_path / 'model'}: 3 tasks of " in out
    assert f"lifelong-ens predict {tmp_path / 'model'} IMAGES --task" in out
    check_against_the_run(capsys, tmp_path, record, benchmark, names)
    about = ServedModel(tmp_path / "model").about(names[0])
    assert about["method"] == {"name": strategy, "options": {}}
    assert about["metrics"]["accuracy"] == json.loads(record.read_text())["accuracy"][-1][0]


def test_only_some_tasks_and_more_later(tmp_path, capsys):
    record = compared(capsys, tmp_path / "runs", "--strategies", "batch_ensemble", "--limit", 10)
    names = ["-".join(one) for one in split_digits().class_names]
    run(capsys, "export", record, "--out", tmp_path / "model", "--tasks", f"2,{names[4]}")
    assert set(ServedModel(tmp_path / "model").tasks) == {names[1], names[4]}
    line = refused(capsys, "export", record, "--out", tmp_path / "model", "--tasks", "6")
    assert "--tasks 6: there is no such task" in line
    run(capsys, "export", record, "--out", tmp_path / "model")
    assert set(ServedModel(tmp_path / "model").tasks) == set(names)


def test_options_come_back_from_the_record(tmp_path, capsys):
    options = [
        "--strategies",
        "batch_ensemble",
        "--hidden",
        "[16, 8]",
        "--members_per_task",
        2,
        "--norm",
        "shared_frozen",
    ]
    record = compared(
        capsys, tmp_path / "runs", *options, "--batch_ensemble.learning_rate", 0.1, "--seeds", "3,"
    )
    run(capsys, "export", record, "--out", tmp_path / "model")
    model = ServedModel(tmp_path / "model")
    assert model.store.description.members_per_task == 2
    assert model.tasks == sorted("-".join(one) for one in split_digits(seed=3).class_names)
    assert main(["predict", str(tmp_path / "model"), str(tmp_path / "none"), "--task", "1"]) == 2


def test_a_run_is_found_by_its_strategy_and_seed(tmp_path, capsys):
    options = ["--hidden", "[16]", "--epochs", 1, "--device", "cpu", "--out", tmp_path]
    run(capsys, "compare", "--strategies", "finetune,packnet", "--seeds", 2, *options)
    assert "holds runs of finetune, packnet; say which" in refused(
        capsys, "export", tmp_path, "--out", tmp_path / "m"
    )
    asked = ["--strategy", "packnet", "--out", tmp_path / "m"]
    assert "packnet seed 1" in refused(capsys, "export", tmp_path, *asked, "--seed", 2)
    assert "holds no records" in refused(capsys, "export", tmp_path / "records", *asked)
    assert find_record(tmp_path, "packnet", 1).name.startswith("split_digits-packnet-1-")
    run(capsys, "export", tmp_path, *asked)
    model = ServedModel(tmp_path / "m")
    about = model.about(model.tasks[0])
    assert (about["method"]["name"], about["seed"]) == ("packnet", 0)


def test_runs_that_cannot_be_exported(tmp_path, capsys):
    record = compared(capsys, tmp_path / "runs", "--strategies", "pnn", "--limit", 5)
    export = ["export", record, "--out", tmp_path / "model"]
    assert "a task of ProgressiveNetwork is more than its body and a head" in refused(capsys, *export)
    assert not (tmp_path / "model").exists()
    (state,) = (tmp_path / "runs/checkpoints").glob("*/*.safetensors")
    state.write_bytes(state.read_bytes()[:-1])
    assert "has the sha256" in refused(capsys, *export)
    shutil.rmtree(tmp_path / "runs/checkpoints")
    assert "any more; the same compare command with --force runs it again" in refused(capsys, *export)
    assert "there is no record" in refused(capsys, "export", tmp_path / "x.json", "--out", tmp_path / "model")
    assert "is not a model" in refused(capsys, "predict", tmp_path, record)


def test_names_of_tasks():
    assert task_names([["cat", "dog"], ["3/4", "b"]]) == ["cat-dog", "3_4-b"]
    same = [["0", "1"]] * 10
    assert task_names(same) == [f"{number:02d}" for number in range(1, 11)]
    assert task_names([["x" * 61], ["y"]]) == ["1", "2"]
    assert task_names([["cat", "dog"]] * 2, ["day", "a/b"]) == ["day", "a_b"]


@pytest.mark.data
@pytest.mark.slow
def test_cifar100_as_files(unpacked, tmp_path, capsys):
    root = unpacked("cifar100")
    options = ["--stream", "split_cifar100", "--root", root, "--num_tasks", 2, "--limit", 20]
    record = compared(
        capsys, tmp_path / "runs", *options, "--strategies", "batch_ensemble", "--network", "lenet5"
    )
    run(capsys, "export", record, "--out", tmp_path / "model")
    benchmark = split_cifar100(root=root, num_tasks=2, limit=20)
    check_against_the_run(capsys, tmp_path, record, benchmark, task_names(benchmark.class_names))


def test_a_table_of_domains(tmp_path, capsys, monkeypatch):
    """From a table to answers: tasks keep their names, labels theirs, and files are read as in training."""
    monkeypatch.setenv("LIFELONG_ENS_CACHE", str(tmp_path / "cache"))
    numbers = np.random.default_rng(0)
    lines = ["path,label,task"]
    for task, brightness in (("night", 20), ("day", 120)):
        for label, more in (("cat", 0), ("dog", 80)):
            for number in range(6):
                shape = (int(numbers.integers(20, 60)), int(numbers.integers(20, 60)))
                pixels = numbers.integers(0, 40, shape, dtype=np.uint8) + np.uint8(brightness + more)
                name = f"{task}_{label}_{number}.png"
                Image.fromarray(pixels).save(tmp_path / name)
                lines.append(f"{name},{label},{task}")
    (tmp_path / "my.csv").write_text("\n".join(lines))
    options = ["--stream", "image_table", "--table", tmp_path / "my.csv", "--image_size", 16]
    record = compared(
        capsys, tmp_path / "runs", *options, "--strategies", "batch_ensemble", "--network", "mlp"
    )
    run(capsys, "export", record, "--out", tmp_path / "model")
    model = ServedModel(tmp_path / "model")
    assert set(model.tasks) == {"night", "day"}
    benchmark = image_table(table=tmp_path / "my.csv", image_size=16)
    measured = json.loads(record.read_text())["accuracy"][-1]
    for task, name in enumerate(["night", "day"]):
        assert model.labels(name) == ("cat", "dog")
        data = benchmark.test_stream[task].dataset
        x, y, _ = data.batch(torch.arange(2))
        with torch.no_grad():
            logits = model(x, name)
        assert float((logits.argmax(-1) == y).double().mean()) == pytest.approx(measured[task])
        pixels = [model.images.read(str(tmp_path / f"{name}_cat_{number}.png")) for number in range(6)]
        cats = [i for i in range(len(data)) if y[i] == 0]
        read = model.images.normalised(torch.from_numpy(np.stack(pixels)))
        assert any(torch.equal(one, x[cats[0]]) for one in read)


def test_a_folder_of_photographs(tmp_path, capsys):
    """Files of many sizes are cropped and resized in serving as in training."""
    numbers = np.random.default_rng(0)
    for part in ("train", "test"):
        for label in ("cat", "dog", "elk", "fox"):
            (tmp_path / "data" / part / label).mkdir(parents=True)
            for number in range(3):
                shape = (int(numbers.integers(20, 60)), int(numbers.integers(20, 60)), 3)
                pixels = numbers.integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / part / label / f"{number}.jpg")
    options = ["--stream", "image_folder", "--root", tmp_path / "data", "--num_tasks", 2, "--image_size", 16]
    record = compared(
        capsys, tmp_path / "runs", *options, "--strategies", "batch_ensemble", "--network", "lenet5"
    )
    run(capsys, "export", record, "--out", tmp_path / "model")
    model = ServedModel(tmp_path / "model")
    for name in model.tasks:
        text = run(
            capsys, "predict", tmp_path / "model", tmp_path / "data/test" / name.split("-")[0], "--task", name
        )
        assert len(text.splitlines()) == 4
    from streams import image_folder

    benchmark = image_folder(root=tmp_path / "data", num_tasks=2, image_size=16)
    for experience, names in zip(benchmark.test_stream, benchmark.class_names, strict=True):
        x, y, _ = experience.dataset.batch(torch.arange(6))
        for label in (0, 1):
            files = sorted((tmp_path / "data/test" / names[label]).iterdir())
            pixels = torch.from_numpy(np.stack([model.images.read(str(file)) for file in files]))
            assert torch.equal(model.images.normalised(pixels), x[y == label])
