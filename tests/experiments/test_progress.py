"""What is shown of runs while they go on, and what they write for others, changes nothing of what they compute."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import socket
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

import experiments.compare
import experiments.progress
from experiments import screen
from experiments.cli import main
from experiments.compare import compare
from experiments.ensembles.data import read_images
from experiments.ensembles.run import EnsembleCell
from experiments.pace import EnsemblePace, Speed
from experiments.run import Named
from lifelong_ens.ensembles.separate import fit_deep
from lifelong_ens.networks import mlp
from lifelong_ens.report.status import Status, as_read, as_written, finished_status, read_statuses
from lifelong_ens.report.unfinished import find_unfinished
from lifelong_ens.store import write_json
from lifelong_ens.training.fit import Fit
from strategies.baselines import finetune
from streams import split_digits

STREAM = partial(split_digits, num_tasks=3)
RUNNING = Status(
    "pnn seed 1",
    "pnn",
    "running",
    task=2,
    num_tasks=5,
    epoch=7,
    epochs=10,
    loss=0.25,
    accuracy=0.984,
    images_per_second=12_345.0,
    share=0.34,
    seconds=60.0,
    seconds_left=125.0,
    memory_bytes=812_000_000,
)


def build(seed, device, epochs=25):
    # momentum and weight decay; a batch that leaves a rest
    fit = Fit(epochs=epochs, batch_size=32, momentum=0.9, weight_decay=1e-3)
    return finetune(mlp(input_shape=(1, 8, 8)), fit=fit, seed=seed, device=device)


def rendered(what, width: int) -> list[str]:
    from rich.console import Console

    console = Console(width=width, highlight=False)
    with console.capture() as captured:
        console.print(what)
    return captured.get().splitlines()


@pytest.mark.parametrize("width", [80, 120])
def test_a_table_has_a_line_for_each_run_and_one_for_all(width):
    others = [
        Status("pnn seed 2", "pnn"),
        Status("f seed 0", "f", "finished", accuracy=0.5, share=1.0, seconds=20),
    ]
    lines = rendered(screen.drawn([*others, RUNNING], [*others, RUNNING]), width)
    assert max(map(len, lines)) <= width
    head, running, waiting, finished, total = lines
    assert head.split() == ["run", "task", "epoch", "loss", "accuracy", "images/s", "left"]
    assert running.split() == ["pnn", "seed", "1", "2/5", "7/10", "0.2500", "98.4", "%", "12.3", "k", "2:05"]
    assert waiting.split() == ["pnn", "seed", "2", "waiting"]
    assert finished.split() == ["f", "seed", "0", "finished", "50.0", "%"]
    # what waits takes as long as the other run of its strategy, 60 + 125 s, after the 125 s
    assert total.endswith("45 % 1 of 3 runs, 5:10 left, memory 812 MB")


def test_of_more_runs_than_fit_the_finished_ones_are_left_out():
    many = [Status(f"f seed {seed}", "f", "finished", share=1.0) for seed in range(50)]
    lines = rendered(screen.drawn([*many, RUNNING], [*many, RUNNING], height=10), 80)
    assert len(lines) == 9
    assert lines[1].startswith("pnn seed 1")
    assert lines[-2].strip() == "and 45 more"


def test_a_line_for_a_log():
    assert screen.line(RUNNING, [RUNNING]) == (
        "pnn seed 1: task 2 of 5, epoch 7 of 10, loss 0.25, accuracy 98.4 %, 12.3 k images/s, 2:05 left; "
        "0 of 1 run, 2:05 left, memory 812 MB"
    )
    failed = Status("f seed 0", "f", "failed", reason="no")
    assert screen.together([failed]) == "0 of 1 run, 1 failed"
    assert screen.clock(3_725) == "1:02:05"


def test_several_processes_share_what_is_left():
    assert screen.seconds_left([RUNNING, RUNNING]) == 125
    assert screen.seconds_left([Status("a")]) is None


def test_a_process_that_is_gone_has_stopped():
    written = as_written(RUNNING)
    assert as_read(written) == RUNNING
    here = {"pid": os.getpid(), "host": socket.gethostname()}
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert as_read({**written, "pid": gone.pid}).state == "stopped"
    assert as_read({**written, "pid": gone.pid, "host": "elsewhere"}).state == "running"
    assert as_read({**written, **here, "written": time.time() - 61}).state == "stopped"
    assert as_read({**written, "of a later version": 1}) == RUNNING
    assert as_written(Status("a", loss=float("nan")))["loss"] is None


def test_speed_is_that_of_the_time_in_which_images_are_trained(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    speed = Speed()
    assert speed.after(0) is None
    for _ in range(50):
        now[0] += 0.5
        rows = speed._rows + 100
        found = speed.after(rows)
    assert found == pytest.approx(200)
    now[0] += 60
    assert speed.after(rows) == found  # an evaluation


def lasting(out) -> dict:
    """All records of a folder without times and dates."""
    found = {}
    for path in (out / "records").glob("*.json"):
        record = json.loads(path.read_text())
        kept = {name: value for name, value in record.items() if name not in ("started", "finished", "tasks")}
        rows = [
            {name: row[name] for name in row if not name.startswith("seconds")} for row in record["tasks"]
        ]
        found[path.name] = kept | {"tasks": rows}
    assert found
    return found


@pytest.fixture
def no_report(monkeypatch):
    """Tables and plots take longer than the runs."""
    monkeypatch.setattr(experiments.compare, "_write_report", lambda *_: None)


@pytest.fixture
def often(monkeypatch):
    """Everything as often as it can be: with each look a drawing or a line, and a file."""
    for name in ("LOOK", "WRITE", "SAY"):
        monkeypatch.setattr(experiments.progress, name, 0.01)


def test_lines_say_how_far_a_run_is_and_files_too(tmp_path, caplog, often, no_report, monkeypatch):
    statuses = []
    note = experiments.progress.note_status

    def noted(cell, status, out):
        note(cell, status, out)
        statuses.append(read_statuses(out)[cell.key])

    monkeypatch.setattr(experiments.progress, "note_status", noted)
    with caplog.at_level(logging.INFO):
        compare(STREAM, {"f": build}, seeds=range(2), out=tmp_path, device="cpu")
    assert "f seed 0: started, run 1 of 2" in caplog.text
    assert "f seed 1: started, run 2 of 2" in caplog.text
    assert any(
        "task 2 of 3, epoch" in line and "1 of 2 runs" in line and "images/s" in line
        for line in caplog.messages
    )
    assert not any("\x1b" in line for line in caplog.messages)
    assert {one.state for one in statuses} == {"running"}
    assert {one.task for one in statuses} == {0, 1, 2, 3} or {one.task for one in statuses} == {1, 2, 3}
    assert {one.num_tasks for one in statuses if one.task} == {3}
    shares = [one.share for one in statuses if one.label == "f seed 0"]
    assert shares == sorted(shares)
    assert 0.8 < shares[-1] <= 1
    assert not (tmp_path / "unfinished").exists()
    quiet = tmp_path / "quiet"
    compare(STREAM, {"f": build}, seeds=range(2), out=quiet, device="cpu", progress=False)
    assert lasting(tmp_path) == lasting(quiet)


def test_nothing_is_said_without_progress(caplog, capsys, often):
    with caplog.at_level(logging.INFO):
        compare(STREAM, {"f": partial(build, epochs=2)}, device="cpu", progress=False)
    assert not caplog.messages
    assert capsys.readouterr() == ("", "")


def test_watch_once_shows_what_there_is_and_the_page_too(tmp_path, capsys):
    about = {"schema": 2, "setting": "x", "seed": 0, "problem": None, "options": {}, "status": None}
    files = tmp_path / "unfinished"
    stopped = {**as_written(RUNNING), "written": 0.0}
    write_json(files / "a.json", about | {"name": "waits"})
    write_json(files / "b.json", about | {"name": "pnn", "status": as_written(RUNNING)})
    write_json(files / "c.json", about | {"name": "gone", "status": stopped})
    write_json(files / "d.json", about | {"name": "bad", "problem": "the loss is nan"})
    (files / "e.json").write_text("{")
    assert main(["watch", str(tmp_path), "--once"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert [line.split()[:4] for line in lines[1:5]] == [
        ["pnn", "seed", "1", "2/5"],
        ["bad", "seed", "0", "failed"],
        ["pnn", "seed", "1", "stopped"],
        ["waits", "seed", "0", "waiting"],
    ]
    assert "bad seed 0: the loss is nan" in out
    reasons = {one.label: (one.state, one.reason) for one in find_unfinished(tmp_path)}
    assert reasons["gone, seed 0"] == (
        "missing",
        "stopped in task 2 of 5, epoch 7 of 10; no task is finished",
    )
    assert reasons["pnn, seed 0"][0] == "running"
    assert "task 2 of 5, epoch 7 of 10" in reasons["pnn, seed 0"][1]


def test_watch_ends_when_nothing_is_left_that_could_finish(tmp_path, capsys, no_report):
    compare(STREAM, {"f": partial(build, epochs=1)}, out=tmp_path, device="cpu", progress=False)
    assert main(["watch", str(tmp_path)]) == 0
    assert "1 of 1 run" in capsys.readouterr().out
    (record,) = (tmp_path / "records").glob("*.json")
    status = finished_status(json.loads(record.read_text()))
    assert (status.state, status.task, status.num_tasks) == ("finished", 3, 3)


def test_watch_of_nothing_is_one_clear_line(tmp_path, capsys):
    assert main(["watch", str(tmp_path / "nowhere")]) == 2
    assert "no folder" in capsys.readouterr().err
    assert main(["watch", str(tmp_path)]) == 2
    assert "holds no runs" in capsys.readouterr().err


def test_ensembles_say_how_far_they_are():
    fit, images = Fit(epochs=3, batch_size=100), read_images("digits", {}, 0)
    cell = EnsembleCell(Named("digits"), Named("deep"), Named("mlp"), fit, 2, 0, 0)
    pace = EnsemblePace(cell, len(images.train), fit.batch_size, torch.device("cpu"))
    statuses = [pace.status()]

    def watched(label: str, steps: int):
        step = pace.phase(label, steps)
        return lambda: (step(), statuses.append(pace.status()))

    network = partial(mlp, input_shape=images.train.image_shape, num_classes=10)
    fit_deep(network, images.train, None, num_members=2, fit=fit, seed=0, device="cpu", progress=watched)
    steps = -(-len(images.train) // 100)
    assert [one.doing for one in statuses] == [
        "starting",
        *["deep 1/2"] * 3 * steps,
        *["deep 2/2"] * 3 * steps,
    ]
    assert [one.epoch for one in statuses[1 : 2 * steps]] == [1] * (steps - 1) + [2] * steps
    assert {one.epochs for one in statuses[1:]} == {3}
    assert [one.share for one in statuses] == pytest.approx([n / (6 * steps) for n in range(6 * steps + 1)])
    pace.measuring = True
    assert (pace.status().doing, pace.status().epoch) == ("measuring", 0)


LOGGERS = [name for name in ("tensorboard", "wandb") if importlib.util.find_spec(name)]


@pytest.mark.parametrize("name", LOGGERS)
def test_loggers_hear_of_a_run_and_change_nothing_of_it(name, tmp_path, no_report, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    told = []
    if name == "wandb":
        from experiments.logs import WandB

        log_one = WandB.log_single_metric
        monkeypatch.setattr(
            WandB,
            "log_single_metric",
            lambda self, *metric: (told.append(metric), log_one(self, *metric)),
        )
    strategies = {"f": partial(build, epochs=3)}
    report = compare(STREAM, strategies, out=tmp_path, device="cpu", progress=False, log_to=[name])
    compare(STREAM, strategies, out=tmp_path / "plain", device="cpu", progress=False)
    assert lasting(tmp_path) == lasting(tmp_path / "plain")
    if name == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (folder,) = (tmp_path / "tensorboard").iterdir()
        events = EventAccumulator(str(folder))
        events.Reload()
        told = [(tag, one.value, one.step) for tag in events.Tags()["scalars"] for one in events.Scalars(tag)]
    else:
        assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    row = report.accuracy.query("trained_task == 2")
    for task, accuracy in zip(row["eval_task"], row["accuracy"], strict=True):
        values = [(value, step) for tag, value, step in told if tag.endswith(f"Task{task:03}/Exp{task:03}")]
        assert len(values) == 3 - task
        assert values[-1][0] == pytest.approx(accuracy, abs=1e-6)
    losses = [
        (value, step) for tag, value, step in told if tag == "Loss_Epoch/train_phase/train_stream/Task000"
    ]
    assert len(losses) == 3
    assert losses[0][0] > losses[-1][0] > 0
    assert [3 * step for _, step in losses] == [losses[-1][1] * n for n in (1, 2, 3)]


def test_a_logger_that_is_missing_or_unknown_is_named_before_anything_is_trained(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    arguments = ["compare", "--strategies", "finetune", "--out", str(tmp_path / "x"), "--log_to"]
    assert main([*arguments, "wandb"]) == 2
    assert "pip install 'lifelong-ens[log]'" in capsys.readouterr().err
    assert main([*arguments, "tensorboard,nothing"]) == 2
    assert "there is no such logger" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
