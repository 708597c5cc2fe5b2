"""A run that is killed goes on, and ends where one ends that was never killed."""

from __future__ import annotations

import json
import logging
import multiprocessing
import random
import time
from pathlib import Path

import pytest

import strategies
from experiments.cli import main
from lifelong_ens.report.records import SCHEMA

# BatchNorm, momentum and weight decay in all of them; augmentation and dropout-like randomness too
COMMON = [
    "--stream",
    "split_digits",
    "--network",
    "resnet20",
    "--width",
    "4",
    "--seeds",
    "1",
    "--device",
    "cpu",
]
COMMON += ["--epochs", "2", "--limit", "80", "--augment", "flip", "--strategies"]

# less of what takes time
LESS = {
    "rcl": ["--trials", "2"],
    "structured_ensemble": ["--mask_epochs", "2"],
    "ewc": ["--fisher_images", "50"],
    "gem": ["--memory", "50"],
}


def start(strategy: str, out: Path) -> multiprocessing.process.BaseProcess:
    """Run the command in a process of its own that has everything imported already."""
    arguments = ["compare", *COMMON, strategy, *LESS.get(strategy, []), "--out", str(out)]
    process = multiprocessing.get_context("fork").Process(target=main, args=(arguments,))
    process.start()
    return process


def finished(out: Path) -> dict:
    (path,) = (out / "records").glob("*.json")
    return json.loads(path.read_text())


# joint has no task to go on from
@pytest.mark.parametrize("strategy", [name for name in strategies.BUILDERS if name != "joint"])
def test_killed_at_random_moments_equals_uninterrupted_to_the_bit(strategy, tmp_path):
    whole = start(strategy, tmp_path / "whole")
    begin = time.monotonic()
    whole.join()
    duration = time.monotonic() - begin
    assert whole.exitcode == 0
    moments = random.Random(strategy)
    killed = 0
    # five for one method of every kind, which keep what is shared, whole networks, columns, masks; two for the others
    for _ in range(5 if strategy in ("finetune", "independent", "batch_ensemble", "pnn", "packnet") else 2):
        process = start(strategy, tmp_path / "killed")
        process.join(moments.uniform(0.1, 0.4) * duration)
        killed += process.is_alive()
        process.kill()
        process.join()
    assert killed, "the runs ended before they could be killed"
    last = start(strategy, tmp_path / "killed")
    last.join()
    assert last.exitcode == 0
    expected, found = finished(tmp_path / "whole"), finished(tmp_path / "killed")
    assert found["accuracy"] == expected["accuracy"]
    assert found["state_sha256"] == expected["state_sha256"]
    for row, other in zip(expected["costs"], found["costs"], strict=True):
        assert row == other
    for row, other in zip(expected["tasks"], found["tasks"], strict=True):
        same = {name: value for name, value in row.items() if not name.startswith("seconds")}
        assert same == {name: value for name, value in other.items() if not name.startswith("seconds")}


def test_goes_on_after_the_last_finished_task(tmp_path, caplog, monkeypatch):
    from strategies.batch_ensemble import BatchEnsemble

    trained: list[int] = []
    original = BatchEnsemble.fit_task

    def stop_at_third(self, validation):
        trained.append(self.network.num_tasks)
        if len(trained) == 3:
            raise KeyboardInterrupt
        original(self, validation)

    monkeypatch.setattr(BatchEnsemble, "fit_task", stop_at_third)
    arguments = ["compare", *COMMON, "batch_ensemble", "--out", str(tmp_path)]
    assert main(arguments) == 130
    with caplog.at_level(logging.INFO):
        assert main(arguments) == 0
    assert trained == [1, 2, 3, 3, 4, 5]
    assert "going on after task 2" in caplog.text


def test_a_finished_run_is_not_repeated_unless_forced(tmp_path, monkeypatch):
    arguments = ["compare", *COMMON, "finetune", "--epochs", "1", "--out", str(tmp_path)]
    assert main(arguments) == 0
    (path,) = (tmp_path / "records").glob("*.json")
    before = path.stat().st_mtime_ns
    assert main(arguments) == 0
    assert path.stat().st_mtime_ns == before
    assert main([*arguments, "--force"]) == 0
    assert path.stat().st_mtime_ns != before


def test_damaged_checkpoint_is_named_and_the_run_starts_again(tmp_path, caplog):
    arguments = ["compare", *COMMON, "finetune", "--epochs", "1", "--out", str(tmp_path)]
    assert main(arguments) == 0
    expected = finished(tmp_path)
    (record,) = (tmp_path / "records").glob("*.json")
    record.unlink()
    (state,) = (tmp_path / "checkpoints").glob("*/task_*.safetensors")
    data = bytearray(state.read_bytes())
    data[-5] ^= 1
    state.write_bytes(bytes(data))
    assert main(arguments) == 0
    assert state.name in caplog.text
    assert finished(tmp_path)["state_sha256"] == expected["state_sha256"]


@pytest.mark.parametrize("damage", [b"", b"{", b'{"schema": 99}'])
def test_damaged_record_is_named_and_made_again_others_are_not_touched(tmp_path, caplog, damage):
    arguments = ["compare", *COMMON, "finetune,batch_ensemble", "--epochs", "1", "--out", str(tmp_path)]
    assert main(arguments) == 0
    first, second = sorted((tmp_path / "records").glob("*.json"))
    untouched = second.stat().st_mtime_ns
    first.write_bytes(damage)
    assert main(arguments) == 0
    assert first.name in caplog.text
    assert json.loads(first.read_text())["schema"] == SCHEMA
    assert second.stat().st_mtime_ns == untouched
