"""One run on several processes: what one process learns, however many there are, and nobody waits for the dead."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import experiments.cli
from experiments.cli import main
from lifelong_ens.errors import InputError
from lifelong_ens.networks import mlp
from lifelong_ens.training import joining
from lifelong_ens.training.devices import Devices
from lifelong_ens.training.fit import Fit
from strategies import finetune
from strategies.loader import evaluation_batches

# momentum, weight decay, clipping and augmentation; the last mini-batch of an epoch has a single image, so that each
# process computes it, or a number of images that two processes do not share evenly
COMMON = ["compare", "--stream", "split_digits", "--device", "cpu", "--augment", "crop_flip", "--epochs", "2"]
COMMON += ["--clip_norm", "5", "--momentum", "0.9", "--weight_decay", "1e-3"]
SMALL = [*COMMON, "--num_tasks", "3", "--limit", "25", "--batch_size", "37", "--hidden", "[32, 16]"]
MLP = [*SMALL, "--memory", "30", "--rcl.trials", "2", "--mask_epochs", "1", "--agem.reference_rows", "9"]
NORMS = [*COMMON, "--num_tasks", "2", "--limit", "9", "--batch_size", "15", "--network", "resnet20"]
NORMS += ["--width", "4", "--epochs", "1", "--task_inference", "entropy"]
EXACT = "finetune,joint,independent,batch_ensemble,pnn,structured_ensemble,packnet,supsup,den,rcl"
EXACT += ",ewc,synaptic_intelligence,lwf,replay,agem,gem"
WITH_NORMS = "batch_ensemble,bn_tuned,replay,gem"
FLOAT = torch.float32


@pytest.fixture(autouse=True)
def _no_tables(monkeypatch):
    """Tables, plots and pages take longer than all the rest."""
    monkeypatch.setattr("experiments.compare.write_page", lambda _: None)
    monkeypatch.setattr("lifelong_ens.report.Report.write", lambda *_: None)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("", 0))
        return one.getsockname()[1]


def as_torchrun(rank: int, count: int) -> dict[str, str]:
    """What it sets for a process, beside where the first one is found."""
    ranks = dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
    return ranks | dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(count))


def _run(arguments: list[str], said: Path, environment: dict[str, str]) -> None:
    """As a fresh process would, but with everything imported already."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    # a job in the background of a script has it ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.getLogger().handlers.clear()  # pytest's
    # what starts other processes starts this again
    sys.modules["__main__"], sys.argv = experiments.cli, ["lifelong-ens", *arguments]
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
        sys.exit(main(arguments))


class Ranks:
    """The processes of a run, and what each has said; with a count of None one that starts the others itself."""

    def __init__(self, arguments: list[str], said: Path, count: int | None = 2) -> None:
        said.mkdir(parents=True, exist_ok=True)
        self.folder = said
        where = {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environments = [where | as_torchrun(rank, count) for rank in range(count)] if count else [{}]
        fork = multiprocessing.get_context("fork")
        self.processes = [
            fork.Process(target=_run, args=(arguments, said / str(rank), environment))
            for rank, environment in enumerate(environments)
        ]
        for process in self.processes:
            process.start()

    def send(self, number: int, ranks: Iterable[int]) -> None:
        """A signal to these."""
        for rank in ranks:
            os.kill(self.processes[rank].pid, number)

    def end(self, seconds: float = 120) -> list[int | None]:
        """Their exit codes."""
        for process in self.processes:
            process.join(seconds)
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        return codes

    def said(self, rank: int) -> str:
        return (self.folder / str(rank)).read_text()

    def lines(self) -> list[str]:
        """Whatever any process has said."""
        everything = "\n".join(self.said(rank) for rank in range(len(self.processes)))
        assert "Traceback" not in everything, everything
        return [line for line in everything.splitlines() if line]


def records(out: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in (out / "records").glob("*.json")}


def check_equal(out: Path, other: Path, strategies: str) -> None:
    """Final states, what they answer and what they cost; 1e-5 is asked for, rounding makes 1e-7 of it."""
    ours, theirs = records(out), records(other)
    assert {record["strategy"]["name"] for record in ours.values()} == set(strategies.split(","))
    assert ours.keys() == theirs.keys()
    for key, record in ours.items():
        (path,) = (out / "checkpoints" / key).glob("*.safetensors")
        state, reference = load_file(path), load_file(other / "checkpoints" / key / path.name)
        assert state.keys() == reference.keys()
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, reference[name], rtol=1e-5, atol=1e-5, msg=f"{key} {name}")
        assert record["accuracy"] == theirs[key]["accuracy"]
        for measured, expected in zip(record["uncertainty"], theirs[key]["uncertainty"], strict=True):
            assert measured["nll"] == pytest.approx(expected["nll"], abs=1e-5)
        last, expected = record["tasks"][-1], theirs[key]["tasks"][-1]
        for name in ("task_identification_accuracy", "class_incremental_accuracy"):
            assert last.get(name) == expected.get(name)
        # more where every device merges weights, or computes a single image, for itself
        assert 0.99 < last["flops_training"] / expected["flops_training"] < 1.3
        assert last["saved_bytes"] < expected["saved_bytes"]


@pytest.fixture
def double(request, monkeypatch):
    """Everything in float64: steps of a deep network on few images make 1e-2 of what is 1e-7 in a float32."""
    if request.param:
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
        monkeypatch.setattr(torch, "float32", torch.float64)
        torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(FLOAT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "strategies", "double"),
    [(MLP, EXACT, False), (NORMS, WITH_NORMS, True)],
    indirect=["double"],
)
@pytest.mark.usefixtures("double")
def test_several_processes_learn_what_one_learns(tmp_path, monkeypatch, arguments, strategies):
    def small_batches(data, _, device):
        return evaluation_batches(data, 8, device)

    # several to answer, which are shared out
    monkeypatch.setattr("strategies.evaluation.evaluation_batches", small_batches)
    arguments = [*arguments, "--strategies", strategies, "--out"]
    assert main([*arguments, str(tmp_path / "one")]) == 0
    ranks = Ranks([*arguments, str(tmp_path / "many")], tmp_path / "said")
    assert ranks.end() == [0, 0], ranks.said(0)
    check_equal(tmp_path / "many", tmp_path / "one", strategies)
    assert "finetune seed 0: started, run 1 of" in ranks.said(0) or "finetune" not in strategies
    assert not ranks.said(1)
    assert not (tmp_path / "many" / "unfinished").exists()
    assert {record["device"] for record in records(tmp_path / "many").values()} == {"2 x cpu"}


@pytest.mark.slow
def test_a_process_that_starts_the_others_itself(tmp_path):
    arguments = [*SMALL, "--strategies", "finetune", "--out"]
    assert main([*arguments, str(tmp_path / "one")]) == 0
    many = tmp_path / "many"
    ranks = Ranks(
        [*arguments, str(many), "--devices", "2", "--log_to", "tensorboard"], tmp_path / "said", None
    )
    assert ranks.end() == [0], ranks.said(0)
    check_equal(many, tmp_path / "one", "finetune")
    # when it begins, when it ends, and its row of the table
    assert sum(line.startswith("finetune") for line in ranks.lines()) == 3
    assert len(list(many.glob("tensorboard/*/*"))) == 1


@pytest.mark.slow
def test_what_torchrun_sets(tmp_path):
    from torch.distributed import run

    script = tmp_path / "script.py"
    script.write_text(
        "import json, os\n"
        "json.dump(dict(os.environ), open(os.path.join(os.path.dirname(__file__), os.environ['RANK']), 'w'))"
    )
    words = ["--standalone", "--nproc_per_node", "2", str(script)]
    process = multiprocessing.get_context("fork").Process(target=run.main, args=(words,))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    for rank in range(2):
        told = json.loads((tmp_path / str(rank)).read_text())
        assert as_torchrun(rank, 2).items() <= told.items()
        assert {"TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"} <= told.keys()


@pytest.mark.slow
def test_a_run_goes_on_whoever_is_killed_or_stopped_and_says_one_line(tmp_path):
    arguments = [
        *SMALL,
        "--num_tasks",
        "4",
        "--strategies",
        "pnn",
        "--epochs",
        "150",
        "--out",
    ]  # long enough to be hit
    assert main([*arguments, str(tmp_path / "one")]) == 0
    begin, out = datetime.now(UTC).isoformat(), tmp_path / "many"
    died = "device {} of {} has died; the same command goes on after what is finished"
    stopped = "is kept after 3 of 4 tasks; the same command goes on from there"
    for task, (count, number, who, line) in enumerate(
        [
            (3, signal.SIGKILL, [1], died.format(1, 3)),
            (2, signal.SIGKILL, [0], died.format(0, 2)),
            # as a terminal does it
            (2, signal.SIGINT, [0, 1], stopped),
        ],
        start=1,
    ):
        ranks = Ranks([*arguments, str(out)], tmp_path / f"said{task}", count)
        deadline = time.monotonic() + 60
        while not list(out.glob(f"checkpoints/*/task_{task:04d}.json")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        ranks.send(number, who)
        sent = time.monotonic()
        codes = ranks.end()
        assert time.monotonic() - sent < 10
        assert all(codes)
        assert codes[who[0]] == (130 if number == signal.SIGINT else -number)
        (said,) = [one for one in ranks.lines() if "seed 0: " not in one]
        assert said.endswith(line)
    (unfinished,) = (out / "unfinished").glob("*.json")
    status = json.loads(unfinished.read_text())["status"]
    assert (status["state"], status["pid"]) == ("stopped", ranks.processes[0].pid)
    again = Ranks([*arguments, str(out)], tmp_path / "again")
    assert again.end() == [0, 0], again.said(0)
    (record,) = records(out).values()
    assert begin < record["started"] < record["finished"]
    check_equal(out, tmp_path / "one", "pnn")


@pytest.mark.slow
def test_stopped_while_the_processes_come_together(tmp_path, monkeypatch):
    def stopped(devices):
        if devices.first:
            signal.raise_signal(signal.SIGTERM)
        return lifeline(devices)

    lifeline = joining.Lifeline
    monkeypatch.setattr(joining, "Lifeline", stopped)
    ranks = Ranks([*SMALL, "--strategies", "finetune", "--out", str(tmp_path / "out")], tmp_path / "said")
    codes = ranks.end()
    assert codes[0] == 143
    assert codes[1]
    assert ranks.lines() == ["stopped; the same command goes on after what is finished"]


PLUGIN = """
import os
from lifelong_ens.errors import InputError
from strategies import finetune, Strategy
from lifelong_ens import MultiHead

def only_here(body, *, fit, seed, device):
    if os.environ.get("RANK") == "1":
        raise InputError("no such file on this machine")
    return finetune(body, fit=fit, seed=seed, device=device)

class Local(Strategy):
    def fit_task(self, validation):
        super().fit_task(validation)
        self.network.heads[0].bias.data += self.devices.rank

def local(body, *, fit, seed, device):
    return Local(network=MultiHead(body), fit=fit, seed=seed, device=device)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategies", "more", "lines"),
    [
        ("plugin_for_devices:only_here", [], ["device 1 of 2: no such file on this machine"]),
        (
            "plugin_for_devices:local",
            [],
            ["local does not run on several devices: its processes have learnt different"],
        ),
        (
            "structured_ensemble,experiments.avalanche_strategies:ewc",
            ["--members_per_task", "2"],
            [
                "members_per_task above 1 does not run on several devices",
                "ewc does not run on several devices: it is Avalanche's own",
            ],
        ),
        ("finetune", ["--learning_rate", "1e30"], ["the loss is"]),
    ],
)
def test_an_error_anywhere_is_one_line(tmp_path, monkeypatch, strategies, more, lines):
    (tmp_path / "plugin_for_devices.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    ranks = Ranks(
        [*SMALL, "--strategies", strategies, *more, "--out", str(tmp_path / "out")], tmp_path / "said"
    )
    codes = ranks.end(60)
    assert all(codes), codes
    (error,) = [line for line in ranks.lines() if line.startswith("lifelong-ens: error: ")]
    assert all(line in error for line in lines)


@pytest.mark.parametrize(
    ("fit", "line"),
    [
        (Fit(batch_size=1), "a batch_size of 1 is too small for 2 devices"),
        (Fit(batch_size=8, accumulate=5), "a batch_size of 8 in 5 parts is too small for 2 devices"),
        (Fit(compile=True), "compile does not run on several devices yet"),
    ],
)
def test_training_that_cannot_be_shared(fit, line):
    with pytest.raises(InputError, match=line):
        finetune(mlp(input_shape=(1, 8, 8)), fit=fit).share_with(Devices(0, 2, torch.device("cpu")))


def refused(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("command", ["tune", "ensemble", "reproduce"])
def test_other_commands_run_on_one_device(capsys, monkeypatch, command):
    assert f"{command} runs on one device: leave --devices out" in refused(capsys, command, "--devices", "2")
    for name, value in (as_torchrun(0, 2) | {"TORCHELASTIC_RUN_ID": "x"}).items():
        monkeypatch.setenv(name, value)
    assert f"{command} runs on one device: start it without torchrun" in refused(capsys, command)


def test_devices_that_are_not_there_and_a_package_that_is_missing(tmp_path, capsys, monkeypatch):
    whole = ["compare", "--out", str(tmp_path)]
    assert "--dry_run measures on one device" in refused(capsys, *whole, "--devices", "2", "--dry_run")
    assert "--devices is at least 1" in refused(capsys, *whole, "--devices", "0")
    assert "--devices two: expected int" in refused(capsys, *whole, "--devices", "two")
    arguments = [*whole, "--devices", "2", "--device"]
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    assert "pip install 'lifelong-ens[devices]'" in refused(capsys, *arguments, "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "this machine has 1 CUDA device; use --devices 1" in refused(capsys, *arguments, "cuda")
    for name, value in (as_torchrun(0, 2) | {"TORCHELASTIC_RUN_ID": "x"}).items():
        monkeypatch.setenv(name, value)
    assert "--devices 3: torchrun has started 2 processes" in refused(capsys, *whole, "--devices", "3")
