"""Every row runs at a tiny size; nothing here depends on how fast anything is."""

from __future__ import annotations

import sys

import pandas as pd
import pytest
import torch

from experiments.bench import CPU_ONLY, QUICK, ROWS
from experiments.bench.adding import add_task
from experiments.bench.calibrate import measure_constants
from experiments.bench.ensembles import _goal
from experiments.bench.layers import layers
from experiments.bench.loop import EPOCHS, NUM_TASKS, Work, loop
from experiments.bench.measuring import Effort, run_race
from experiments.bench.running import _rows, run_bench
from experiments.bench.table import COLUMNS, Table
from experiments.catalogue import describe, load
from experiments.cli import main
from lifelong_ens.errors import InputError
from lifelong_ens.layers.plan import DEFAULTS, constants_file, constants_of

CPU = torch.device("cpu")
ONE_ROUND = Effort(0.0, 0.0, 1, 1)
TINY = {
    "step_later_task": ["--batch_size=2"],
    "saved_bytes": ["--batch_size=2", "--num_members=2"],
    "saved_bytes_frozen": ["--batch_size=2"],
    "ensemble_inference": ["--batch_sizes=[1,2]"],
    "ensemble_training": ["--batch_size=2"],
    "layers": ["--features=6", "--channels=4", "--rows=8"],
    "mixed_tasks": ["--batch_size=6", "--num_tasks=3"],
    "add_task": ["--tasks=[2,3,4]", "--width=2"],
    "exported": ["--batch_sizes=[2]", "--image_size=32"],
    "structured": ["--batch_size=1"],
    "sparse": ["--batch_size=2", "--width=32"],
    "loop": ["--images=70", "--epochs=1", "--batch_sizes=[64]"],
    "evaluation": ["--num_tasks=3", "--images=4"],
    "streaming": [
        "--images=6",
        "--image_size=16",
        "--classes=[10,11]",
        "--images_per_class=2",
        "--workers=1",
    ],
    "grid": ["--strategies=[finetune,joint]", "--seeds=1", "--epochs=1"],
}
# who may fail, and only at what is shown as failing; any peer package may be absent
MAY_BREAK = {"torch-uncertainty", "tabm"}
PACKAGES = ("torch-uncertainty", "tabm", "peft", "ray")


# a cluster leaves sockets to the garbage collector
@pytest.mark.filterwarnings("default::ResourceWarning")
@pytest.mark.filterwarnings("default::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_measured(name, tmp_path):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    table = run_bench([name], repeats=1, out=tmp_path, arguments=TINY[name])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads

    lines = pd.read_csv(tmp_path / "bench.csv")
    assert list(lines.columns) == list(COLUMNS)
    assert set(lines["row"]) == {name}
    assert (lines["ours_median"] > 0).all()
    assert not lines["verdict"].str.contains("ours:").any()
    for against, verdict, ratio in zip(lines["against"], lines["verdict"], lines["ratio"], strict=True):
        kind = verdict.partition(" ")[0]
        allowed = {"reached", "missed"}
        allowed |= {"broken"} if against in MAY_BREAK else set()
        allowed |= {"absent"} if against.startswith(PACKAGES) else set()
        assert kind in allowed, verdict
        assert (ratio > 0) == (kind in ("reached", "missed"))
    assert (tmp_path / "table.md").read_text() == table.markdown()


def test_every_row_is_described_has_a_tiny_size_and_options_that_exist():
    assert set(TINY) == set(ROWS)
    assert set(ROWS) >= CPU_ONLY
    for name, target in ROWS.items():
        entry = describe(target)
        assert entry.summary.endswith(".")
        assert all(option.help for option in entry.options)
        assert set(QUICK.get(name, {})) <= {option.name for option in entry.options}


def test_a_missing_package_is_absent(monkeypatch):
    for package in ("torch_uncertainty", "torch_uncertainty.layers.batch_ensemble", "tabm", "peft"):
        monkeypatch.setitem(sys.modules, package, None)
    lines = run_bench(
        ["layers", "mixed_tasks"], repeats=1, arguments=TINY["layers"] + TINY["mixed_tasks"]
    ).lines
    packaged = lines[[against.startswith(PACKAGES) for against in lines["against"]]]
    assert packaged["verdict"].str.match(r"absent \(.* is not installed\)").all()
    assert packaged["ratio"].isna().all()
    assert set(packaged["row"]) == {"layers", "mixed_tasks"}


@pytest.mark.parametrize("package", ["torch_uncertainty", "tabm"])
def test_layers_of_others_are_given_the_same_weights(package):
    pytest.importorskip(package)
    name = package.replace("_", "-")
    for race in layers(CPU, features=6, channels=4, rows=8):
        for line in run_race(race, ONE_ROUND, CPU):
            if line.against == name and line.case.endswith((" x 8 rows", " x 2 rows")):
                assert line.verdict in ("reached", "missed"), line


def test_each_call_of_add_task_adds_one(monkeypatch):
    from experiments.bench import adding

    known = []
    add_one = adding.add_one

    def spy(network, store, model):
        known.append((network.num_tasks, len(store.names()), len(model.tasks)))
        add_one(network, store, model)

    monkeypatch.setattr(adding, "add_one", spy)
    race = next(iter(add_task(CPU, tasks=(2, 4), width=2)))
    run_race(race, ONE_ROUND, CPU)
    # to warm up; to see how long it takes; in the one round
    assert known == [(count,) * 3 for count in (1, 3, 2, 4, 3, 5)]


def test_the_loop_trains_every_task_in_turn_and_refuses_other_work():
    (race, *_) = loop(CPU, images=70, epochs=1, batch_sizes=(64,))
    assert race.case.startswith("mlp, batch 64")
    assert {line.ours for line in run_race(race, ONE_ROUND, CPU)} < set(race.contestants)
    assert len(list(loop(CPU, images=70))) == 2 * len(EPOCHS)
    assert NUM_TASKS == 5

    work = Work()
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], 0.1)
    with work.counted():
        optimizer.step()
    optimizer.step()
    assert work.steps == 1
    with pytest.raises(RuntimeError, match=r"1 steps on 0 rows instead of \(2, 0\)"):
        work.check((2, 0))


@pytest.mark.parametrize("arguments", [["--epochs=0"], ["--images=0"], ["--images=100000"]])
def test_bad_sizes_of_the_loop_are_named(arguments):
    with pytest.raises(InputError, match=arguments[0].partition("=")[0].strip("-")):
        run_bench(["loop"], repeats=1, arguments=arguments)


def test_rows_of_one_folder_are_replaced_and_kept(tmp_path):
    first = run_bench(["saved_bytes"], repeats=1, out=tmp_path, arguments=TINY["saved_bytes"])
    run_bench(["sparse"], repeats=1, out=tmp_path, arguments=TINY["sparse"])
    again = run_bench(["saved_bytes"], quick=True, repeats=2, out=tmp_path, arguments=["--batch_size=1"])
    assert list(again.lines["row"].unique()) == ["saved_bytes", "sparse"]
    assert len(again.lines[again.lines["row"] == "saved_bytes"]) == len(first.lines)
    assert set(again.lines.loc[again.lines["row"] == "saved_bytes", "rounds"]) == {2}
    assert Table.load(tmp_path).markdown() == again.markdown()


def test_rows_come_in_the_order_of_the_table_and_fit_the_device():
    assert _rows([], CPU) == list(ROWS)
    assert _rows(["loop", "layers"], CPU) == ["layers", "loop"]
    cuda = torch.device("cuda")
    assert set(_rows([], cuda)) == set(ROWS) - CPU_ONLY
    with pytest.raises(InputError, match="loop is measured on the CPU alone"):
        _rows(["loop"], cuda)
    with pytest.raises(InputError, match="did you mean layers"):
        _rows(["layer"], CPU)


def test_bench_prints_its_table(tmp_path, capsys):
    command = ["bench", "saved_bytes", "--repeats", "1", "--out", str(tmp_path), *TINY["saved_bytes"]]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "| saved_bytes" in printed
    assert printed.strip() == Table.load(tmp_path).block()
    assert main(["bench", "saved_bytes", "--repeats", "0"]) == 2
    assert main(["bench", "saved_bytes", "--no_such", "1"]) == 2
    assert main(["bench", "calibrate", "layers"]) == 2


def test_calibrate_measures_what_plans_need_and_keeps_it(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("LIFELONG_ENS_CACHE", str(tmp_path))
    constants = measure_constants(CPU)
    assert 1e-8 < constants.launch_seconds < 1e-2
    assert 1e7 < constants.bytes_per_second < 1e13
    try:
        assert main(["bench", "calibrate"]) == 0
        assert str(constants_file("cpu")) in capsys.readouterr().out
        assert constants_of("cpu").launch_seconds == pytest.approx(constants.launch_seconds, rel=20)
        assert constants_of("cpu") != DEFAULTS["cpu"]
    finally:
        constants_of.cache_clear()


def test_help_names_every_row_and_loads_no_torch():
    import subprocess

    code = (
        "import sys; from experiments.cli import main\n"
        "try: main(['bench', '--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(f"\n  {name} " in done.stdout for name in ROWS)


def test_the_functions_of_rows_are_loadable():
    assert all(callable(load(target)) for target in ROWS.values())


@pytest.mark.parametrize(
    ("kind", "batch_size", "expected"),
    [("cpu", 32, "<= 1.05"), ("cuda", 1, "<= 1.05"), ("cuda", 32, ">= 3.00")],
)
def test_an_ensemble_is_to_be_faster_where_small_kernels_leave_a_gpu_idle(kind, batch_size, expected):
    assert str(_goal(torch.device(kind), batch_size, 3.0)) == expected
