"""The command line: what works, and one clear line for what does not."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from experiments.cli import COMMANDS, main

QUICK = ["--epochs", "1", "--seeds", "1", "--device", "cpu"]


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return code, output.out, output.err


def refused(capsys, *arguments: object) -> str:
    """The one line of a refusal."""
    code, _, err = run(capsys, *arguments)
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("lifelong-ens: error: ")]
    assert "Traceback" not in err
    return line


def test_compare_writes_every_file_and_prints_the_table(tmp_path, capsys):
    names = "finetune,joint,independent,batch_ensemble,pnn"
    code, out, _ = run(capsys, "compare", "--strategies", names, *QUICK, "--out", tmp_path)
    assert code == 0
    assert all(name in out for name in names.split(","))
    for name in ("accuracy.csv", "costs.csv", "runs.csv", "tasks.csv", "summary.md"):
        assert (tmp_path / name).stat().st_size > 100
    for name in ("accuracy_over_tasks", "forgetting_matrix", "accuracy_against_memory"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5_000
    runs = pd.read_csv(tmp_path / "runs.csv").set_index("strategy")
    assert (runs.loc[["batch_ensemble", "pnn", "independent"], "forgetting"] == 0).all()
    assert runs.loc["batch_ensemble", "ratio_bytes"] < 1.5 < runs.loc["pnn", "ratio_bytes"]
    assert runs.loc["batch_ensemble", "ratio_flops_training"] < 1


def test_report_makes_the_tables_again(tmp_path, capsys):
    _, first, _ = run(capsys, "compare", "--strategies", "finetune", *QUICK, "--out", tmp_path)
    (tmp_path / "runs.csv").unlink()
    code, second, _ = run(capsys, "report", tmp_path)
    assert code == 0
    assert (tmp_path / "runs.csv").exists()
    assert first == second


def test_options_reach_stream_network_strategy_and_training(tmp_path, capsys):
    options = [
        "--num_tasks",
        "2",
        "--hidden",
        "[16, 8]",
        "--batch_ensemble.init",
        "ones",
        "--momentum",
        "0.5",
    ]
    strategies = "finetune,batch_ensemble"
    code, _, _ = run(capsys, "compare", "--strategies", strategies, *options, *QUICK, "--out", tmp_path)
    assert code == 0
    runs = pd.read_csv(tmp_path / "runs.csv").set_index("strategy")
    assert runs.loc["finetune", "num_tasks"] == 2
    heads = 2 * 5 * 9
    assert runs.loc["finetune", "parameters"] == 64 * 16 + 16 + 16 * 8 + 8 + heads


def test_yaml_gives_the_same_options_and_the_command_line_wins(tmp_path, capsys):
    config = tmp_path / "e.yaml"
    config.write_text(
        "strategies: [finetune, batch_ensemble]\nepochs: 1\nnum_tasks: 2\nhidden: [16, 8]\n"
        "batch_ensemble:\n  members_per_task: 2\nseeds: [4]\n"
    )
    code, _, _ = run(capsys, "compare", "--config", config, "--num_tasks", "5", "--out", tmp_path / "out")
    assert code == 0
    runs = pd.read_csv(tmp_path / "out/runs.csv")
    assert set(runs["seed"]) == {4}
    assert set(runs["num_tasks"]) == {5}
    accuracy = pd.read_csv(tmp_path / "out/accuracy.csv")
    several = accuracy[accuracy["strategy"].str.startswith("batch_ensemble")]
    assert several["disagreement"].notna().all()
    assert accuracy[accuracy["strategy"] == "finetune"]["disagreement"].isna().all()


OWN_STRATEGY = '''
"""A strategy of a user's own."""
from lifelong_ens import MultiHead
from strategies import Strategy


class Frozen(MultiHead):
    """Trains the body on the first task only."""

    frozen_past = True

    def add_task(self, num_classes):
        self.requires_grad_(self.num_tasks == 0)
        super().add_task(num_classes)


def frozen_body(body, *, fit, seed, device, twice: bool = False):
    return Strategy(network=Frozen(body), fit=fit, seed=seed, device=device)
'''


def test_a_user_s_own_strategy_is_one_file_elsewhere(tmp_path, capsys, monkeypatch):
    (tmp_path / "my_strategy.py").write_text(OWN_STRATEGY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = "my_strategy:frozen_body"
    code, out, _ = run(
        capsys, "compare", "--strategies", f"finetune,{name}", *QUICK, "--twice", "true", "--out", "o"
    )
    assert code == 0
    assert name in out
    runs = pd.read_csv("o/runs.csv")
    own = runs[runs["strategy"].str.startswith("my_strategy")]
    assert (own["forgetting"] == 0).all()
    line = refused(capsys, "compare", "--strategies", "my_strategy:frozen_bod", *QUICK, "--out", "o")
    assert "frozen_body" in line


def test_avalanche_s_own_strategies_join(tmp_path, capsys):
    names = "finetune,experiments.avalanche_strategies:ewc,experiments.avalanche_strategies:replay"
    options = ["--memory_size", "50"]
    code, _, _ = run(capsys, "compare", "--strategies", names, *options, *QUICK, "--out", tmp_path)
    assert code == 0
    costs = pd.read_csv(tmp_path / "costs.csv")
    buffers = costs[costs["component"] == "buffer"].groupby("strategy")["bytes"].max()
    samples = 50 * (64 + 8)
    assert samples <= buffers["experiments.avalanche_strategies:replay"] <= samples + 50 * 8
    body = 4 * (64 * 256 + 256 + 256 * 256 + 256)
    assert buffers["experiments.avalanche_strategies:ewc"] >= 2 * 5 * body / 5


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_has_examples(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    help_text = capsys.readouterr().out
    assert end.value.code == 0
    assert f"  lifelong-ens {command} " in help_text.partition("examples:")[2]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["list"], ["list", "batch_ensemble"], *([name, "--help"] for name in COMMANDS)]
)
def test_help_and_list_load_neither_torch_nor_avalanche(arguments):
    code = (
        "import sys\nfrom experiments.cli import COMMANDS, main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'avalanche', 'pandas', 'matplotlib', 'sklearn', 'optuna', 'shtab'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    assert len(result.stdout.splitlines()) > 5


def image_folder(root: Path, classes: int = 4, images: int = 6) -> Path:
    for split in ("train", "test"):
        for one in range(classes):
            folder = root / split / f"class{one}"
            folder.mkdir(parents=True)
            for index in range(images):
                Image.new("RGB", (20, 20), (40 * one, 10 * index, 0)).save(folder / f"{index}.png")
    return root


def test_own_images_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LIFELONG_ENS_CACHE", str(tmp_path / "cache"))
    root = image_folder(tmp_path / "images")
    options = ["--root", root, "--num_tasks", "2", "--image_size", "16", "--network", "lenet5"]
    code, out, _ = run(
        capsys, "compare", "--stream", "image_folder", *options, *QUICK, "--out", tmp_path / "o"
    )
    assert code == 0
    assert "batch_ensemble" in out


BAD = {
    "stream": (["--stream", "split_digit"], "split_digits"),
    "strategy": (["--strategies", "batch_ensembel"], "batch_ensemble"),
    "network": (["--network", "lenet"], "lenet5"),
    "option": (["--epoch", "3"], "epochs"),
    "dotted option": (["--batch_ensemble.inti", "ones"], "batch_ensemble.init"),
    "choice": (["--init", "zeros"], "random_sign"),
    "type": (["--epochs", "ten"], "int"),
    "range": (["--epochs", "0"], "at least 1"),
    "seeds": (["--seeds", "x"], "--seeds"),
    "more tasks than classes": (["--num_tasks", "11"], "10 classes"),
    "class order": (["--class_order", "[0, 1]"], "class_order"),
    "validation": (["--validation", "1.5"], "validation"),
    "image too small": (["--network", "lenet5"], "16x16"),
    "device": (["--device", "tpu"], "--device"),
    "no config": (["--config", "nowhere.yaml"], "nowhere.yaml"),
    "no module": (["--strategies", "nowhere.at_all:f"], "nowhere.at_all"),
    "no root": (
        ["--stream", "image_folder"],
        "image_folder needs --root; lifelong-ens list image_folder says",
    ),
    "no such root": (["--stream", "image_folder", "--root", "nowhere"], "nowhere"),
    "stray word": (["digits"], "digits"),
    "patience without validation": (["--patience", "2"], "--validation"),
}


@pytest.mark.parametrize(("arguments", "hint"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_that_says_what_to_do(tmp_path, capsys, arguments, hint):
    line = refused(
        capsys, "compare", "--strategies", "finetune,batch_ensemble", *QUICK, "--out", tmp_path, *arguments
    )
    assert hint in line


def test_yaml_with_an_unknown_option_is_refused(tmp_path, capsys):
    (tmp_path / "e.yaml").write_text("epoch: 3\n")
    line = refused(capsys, "compare", "--config", tmp_path / "e.yaml", "--out", tmp_path / "o")
    assert "epochs" in line


def test_corrupt_image_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LIFELONG_ENS_CACHE", str(tmp_path / "cache"))
    root = image_folder(tmp_path / "images")
    (root / "train/class2/3.png").write_bytes(b"\x89PNG\r\n\x1a\n not an image")
    options = [
        "--stream",
        "image_folder",
        "--root",
        root,
        "--num_tasks",
        "2",
        *QUICK,
        "--out",
        tmp_path / "o",
    ]
    assert "class2/3.png" in refused(capsys, "compare", *options)


def test_empty_class_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LIFELONG_ENS_CACHE", str(tmp_path / "cache"))
    root = image_folder(tmp_path / "images")
    for path in (root / "train/class1").iterdir():
        path.unlink()
    options = [
        "--stream",
        "image_folder",
        "--root",
        root,
        "--num_tasks",
        "2",
        *QUICK,
        "--out",
        tmp_path / "o",
    ]
    assert "class1" in refused(capsys, "compare", *options)


def test_nan_loss_keeps_what_was_finished_and_other_runs(tmp_path, capsys, monkeypatch):
    from strategies.base import Strategy

    original = Strategy.fit_task

    def explode_in_third_task(self, validation):
        if self.network.num_tasks == 3 and not self.network.frozen_past:
            for group in self.optimizer.param_groups:
                group["initial_lr"] = group["lr"] = float("nan")
            self.optimisation.scheduler.base_lrs = [float("nan")] * len(self.optimizer.param_groups)
        original(self, validation)

    monkeypatch.setattr(Strategy, "fit_task", explode_in_third_task)
    line = refused(capsys, "compare", "--strategies", "finetune,batch_ensemble", *QUICK, "--out", tmp_path)
    assert "finetune seed 0" in line
    assert "task 3" in line
    assert "step 2" in line
    assert "2 finished tasks are kept" in line
    (record,) = (tmp_path / "records").glob("*.json")
    assert "batch_ensemble" in record.name
    assert list((tmp_path / "checkpoints").glob("*finetune*/task_0002.json"))


def test_output_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    line = refused(capsys, "compare", *QUICK, "--out", tmp_path / "file" / "out")
    assert "cannot write to" in line


def test_full_disk_is_one_line(tmp_path, capsys, monkeypatch):
    from experiments import run as run_module

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "task_0001.safetensors")

    monkeypatch.setattr(run_module, "write_tensors", full)
    line = refused(capsys, "compare", "--strategies", "finetune", *QUICK, "--out", tmp_path)
    assert "No space left on device: task_0001.safetensors" in line


def test_debug_shows_where_the_error_was_raised(tmp_path, capsys, caplog):
    code, _, _ = run(capsys, "compare", "--num_tasks", "11", *QUICK, "--out", tmp_path, "--debug")
    assert code == 2
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("rule", ["entropy", "max_probability"])
def test_task_inference_finds_tasks_better_than_chance(tmp_path, capsys, rule):
    arguments = ["compare", "--strategies", "independent,batch_ensemble", "--task_inference", rule]
    code, _, _ = run(capsys, *arguments, "--epochs", "8", "--device", "cpu", "--out", tmp_path)
    assert code == 0
    runs = pd.read_csv(tmp_path / "runs.csv").set_index("strategy")
    assert (runs["task_identification_accuracy"] > 0.3).all()
    assert (runs["class_incremental_accuracy"] <= runs["task_identification_accuracy"]).all()
    accuracy = pd.read_csv(tmp_path / "accuracy.csv")
    # with one task there is nothing to guess
    first = accuracy[accuracy["trained_task"] == 0]
    assert (first["task_identification_accuracy"] == 1).all()
    assert (first["class_incremental_accuracy"] - first["accuracy"]).abs().max() < 1e-9
