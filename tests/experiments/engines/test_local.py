"""Runs in several processes of this machine come to what they come to one after the other, whatever dies meanwhile."""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cloudpickle
import psutil
import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin

from experiments.cli import main
from experiments.compare import compare
from experiments.engines import LostWorkerError
from experiments.engines.local import Local
from experiments.engines.worker import check_versions, versions_here
from experiments.grid import InWorker
from experiments.plan import plan_comparison
from experiments.progress import Display
from lifelong_ens.errors import InputError
from lifelong_ens.networks.plain import mlp
from lifelong_ens.training.fit import Fit
from strategies import finetune
from streams import split_digits

# workers cannot import this file
cloudpickle.register_pickle_by_value(sys.modules[__name__])

FIT = Fit(epochs=3, learning_rate=0.05, momentum=0.9, weight_decay=1e-3)


class Follows(SupervisedPlugin):
    """Writes down which task is learnt in which process, and dies before one of them for so many times."""

    def __init__(self, path: Path, deaths: int) -> None:
        super().__init__()
        self.path, self.deaths = path, deaths

    def before_training_exp(self, strategy, **kwargs) -> None:
        task = strategy.experience.current_experience
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        with self.path.open("a") as file:
            file.write(f"{os.getpid()} {task}\n")
        if task == 2 and sum(line.endswith(" 2") for line in lines) < self.deaths:
            os.kill(os.getpid(), signal.SIGKILL)


def build(path: Path | None, deaths: int, builder, *, benchmark, seed, device):
    torch.manual_seed(seed)
    plugins = [Follows(path, deaths)] if path else []
    body = mlp(input_shape=benchmark.image_shape, hidden=(16,))
    return builder(body, fit=FIT, seed=seed, device=device, plugins=plugins)


def lasting(folder: Path) -> dict[str, dict]:
    """Records without times and dates, by file."""

    def plain(value):
        if isinstance(value, dict):
            skip = ("started", "finished", "commit")
            return {
                name: plain(one)
                for name, one in value.items()
                if name not in skip and not name.startswith("seconds")
            }
        return [plain(one) for one in value] if isinstance(value, list) else value

    return {path.name: plain(json.loads(path.read_text())) for path in (folder / "records").glob("*.json")}


def words(out: Path, *more: str) -> list[str]:
    return ["--epochs", "2", "--weight_decay", "0.001", "--device", "cpu", "--out", str(out), *more]


def test_records_are_the_same_to_the_bit(tmp_path):
    command = ["compare", "--strategies", "finetune,batch_ensemble", "--seeds", "2"]
    assert main([*command, *words(tmp_path / "one")]) == 0
    assert main([*command, *words(tmp_path / "two", "--jobs", "2")]) == 0
    assert len(lasting(tmp_path / "one")) == 4
    assert lasting(tmp_path / "two") == lasting(tmp_path / "one")
    assert not list((tmp_path / "two").glob(".*")), "nothing is left of the workers"
    assert not (tmp_path / "two" / "unfinished").exists()
    kept = {
        path.name: path.read_bytes() for path in (tmp_path / "two" / "checkpoints").rglob("*.safetensors")
    }
    assert kept == {
        path.name: path.read_bytes() for path in (tmp_path / "one" / "checkpoints").rglob("*.safetensors")
    }


def test_a_worker_that_dies_costs_only_its_task(tmp_path, caplog):
    told = tmp_path / "told"
    strategies = {
        "dies": functools.partial(build, told, 1, finetune),
        "lives": functools.partial(build, None, 0, finetune),
    }
    with caplog.at_level(logging.WARNING):
        compare(split_digits, strategies, out=tmp_path / "two", engine=Local(2), progress=False)
    assert "dies seed 0: its process died (SIGKILL); another one goes on with it" in caplog.text
    lines = [line.split() for line in told.read_text().splitlines()]
    first, second = dict.fromkeys(pid for pid, _ in lines)
    assert [task for pid, task in lines if pid == first] == ["0", "1", "2"]
    assert [task for pid, task in lines if pid == second] == ["2", "3", "4"], "goes on from its checkpoint"
    told.unlink()
    alone = {name: functools.partial(one.func, None, 0, one.args[2]) for name, one in strategies.items()}
    compare(split_digits, alone, out=tmp_path / "one", progress=False)
    found, expected = lasting(tmp_path / "two"), lasting(tmp_path / "one")
    assert [one["state_sha256"] for one in found.values()] == [
        expected[name]["state_sha256"] for name in found
    ]


def test_a_run_whose_process_always_dies_is_given_up_and_named(tmp_path):
    strategies = {
        "dies": functools.partial(build, tmp_path / "told", 99, finetune),
        "lives": functools.partial(build, None, 0, finetune),
    }
    with pytest.raises(LostWorkerError, match=r"dies seed 0: its process died 3 times \(SIGKILL\)"):
        compare(split_digits, strategies, out=tmp_path / "out", engine=Local(1), progress=False)
    assert [record["strategy"]["name"] for record in lasting(tmp_path / "out").values()] == ["lives"]
    (left,) = (tmp_path / "out" / "unfinished").glob("*.json")
    assert "died 3 times" in json.loads(left.read_text())["problem"]


def start(out: Path) -> subprocess.Popen:
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "import sys; from experiments.cli import main; sys.exit(main())"
    command = ["compare", "--strategies", "finetune,batch_ensemble", "--epochs", "200", "--jobs", "2"]
    command += ["--device", "cpu", "--out", str(out)]
    return subprocess.Popen([sys.executable, "-c", code, *command], stderr=subprocess.PIPE, text=True)


def workers_of(process: subprocess.Popen, out: Path) -> list[psutil.Process]:
    """Once both are at work."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        states = [json.loads(path.read_text())["status"] for path in (out / "unfinished").glob("*.json")]
        if len(states) == 2 and all(status and status["task"] > 1 for status in states):
            return psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.1)
    pytest.fail("the workers did not start")


def test_ctrl_c_ends_the_workers_and_the_same_command_goes_on(tmp_path):
    out = tmp_path / "out"
    process = start(out)
    workers = workers_of(process, out)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped; 0 of 2 runs are finished" in said
    assert "is kept after" in said
    assert "Traceback" not in said
    assert "resource_tracker" not in said
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
    states = [json.loads(path.read_text())["status"]["state"] for path in (out / "unfinished").glob("*.json")]
    assert set(states) <= {"stopped", "running"}, (
        "what a worker wrote last is known to be of a process that is gone"
    )


def test_workers_end_when_their_driver_is_killed(tmp_path):
    process = start(tmp_path / "out")
    workers = workers_of(process, tmp_path / "out")
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive


def test_a_worker_that_does_not_see_the_folder_sends_its_files(tmp_path):
    plan = plan_comparison({"out": tmp_path / "out"}, ["--epochs", "1"])
    plan.run()
    item = plan.cells[1]
    work_of_driver = RecordingWork(plan)
    heard: list = []
    record, files = InWorker(work_of_driver, tmp_path / "elsewhere" / "sign", heard.append)(item)
    (name,) = (name for name in files if name.startswith("records/"))
    assert json.loads(files[name])["state_sha256"] == record["state_sha256"]
    assert any(name.endswith(".safetensors") for name in files), "what export reads comes too"
    assert lasting(tmp_path / "out")[Path(name).name]["accuracy"] == record["accuracy"]
    assert heard
    assert all(key == item[0].key and written["state"] == "running" for key, written in heard)
    assert not (tmp_path / "elsewhere").exists()


class RecordingWork:
    """The work of a plan that says now and then how far it is, as a long run would."""

    def __init__(self, plan) -> None:
        from experiments.compare import RunStrategy

        self.work = RunStrategy(plan.make_benchmark, "cpu", ())

    def __call__(self, item, out: Path, display: Display):
        from lifelong_ens.report.status import Status

        display.note(item[0], Status("finetune seed 0", state="running"))
        return self.work(item, out, display)


def test_a_folder_that_workers_cannot_write_to_is_named(tmp_path, monkeypatch):
    (tmp_path / "sign").touch()

    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", refused)
    with pytest.raises(InputError, match=r"the worker on .* cannot write to .*: Permission denied"):
        InWorker(lambda *_: {}, tmp_path / "sign", None)((None, None))


def test_other_versions_in_a_worker_are_named():
    here = versions_here()
    check_versions(here)
    with pytest.raises(InputError, match=r"has torch .* \(driver: 0\.1\), .*; install the same versions"):
        check_versions({**here, "torch": "0.1", "numpy": "9"})


@pytest.mark.parametrize("jobs", [2, 16])
def test_ensembles_are_the_same_with_cells_or_members_at_once(tmp_path, jobs):
    """With fewer cells than workers it is members that run at once."""
    command = ["ensemble", "--methods", "deep,hyper_deep,dst,structured", "--members", "2"]
    command += ["--hyper_deep.num_candidates", "2", "--structured.mask_epochs", "1", "--validation", "0.2"]
    assert main([*command, *words(tmp_path / "one")]) == 0
    assert main([*command, *words(tmp_path / "two", "--jobs", str(jobs))]) == 0
    assert len(lasting(tmp_path / "one")) == 6
    assert lasting(tmp_path / "two") == lasting(tmp_path / "one")


def test_tuning_tries_the_same_options_with_strategies_at_once(tmp_path):
    command = ["tune", "--strategies", "finetune,batch_ensemble", "--trials", "3", "--num_tasks_used", "2"]
    command += ["--validation", "0.2"]
    assert main([*command, *words(tmp_path / "one")]) == 0
    assert main([*command, *words(tmp_path / "two", "--jobs", "2")]) == 0

    def tried(out: Path) -> list[str]:
        return [line.rpartition(",")[0] for line in (out / "trials.csv").read_text().splitlines()]

    assert len(tried(tmp_path / "one")) == 7
    assert tried(tmp_path / "two") == tried(tmp_path / "one")


def test_what_cannot_be_sent_is_said_in_one_line():
    lock = threading.Lock()
    strategies = {"own": lambda *, seed: lock}
    with pytest.raises(InputError, match="cannot be sent to workers"):
        compare(split_digits, strategies, engine=Local(1), progress=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--engine", "rai"], "did you mean ray"),
        (["--jobs", "0"], "--jobs 0: expected"),
        (["--engine", "ray", "--jobs", "2"], "--jobs is of --engine local"),
        (["--engine", "local", "--ray_address", "auto"], "--ray_address is of --engine ray"),
        (["--jobs", "2", "--resources", "gpus=1"], "--resources gpus is of --engine ray"),
        (["--resources", "cpus"], "expected NAME=AMOUNT"),
        (["--resources", "cpus=-1"], "expected a number above 0"),
        (["--jobs", "2", "--devices", "2"], "leave --devices out"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(given, message, tmp_path, capsys):
    assert main(["compare", "--epochs", "1", "--out", str(tmp_path / "out"), *given]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert not (tmp_path / "out" / "unfinished").exists()
