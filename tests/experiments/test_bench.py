from __future__ import annotations

import pandas as pd
import pytest
import torch

from experiments import bench
from experiments.cli import main
from lifelong_ens.errors import InputError


def test_bench_loop_measures_every_variant_on_the_same_work(tmp_path, capsys):
    threads = torch.get_num_threads()
    state = torch.get_rng_state()
    arguments = ["bench", "loop", "--repeats", "1", "--images", "70", "--epochs", "1", "--out", str(tmp_path)]
    assert main(arguments) == 0
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)

    measured = pd.read_csv(tmp_path / "bench_loop.csv")
    settings = ["network", "batch_size", "variant"]
    assert len(measured) == 2 * 2 * len(bench.VARIANTS) * bench.NUM_TASKS
    assert (measured.groupby(settings).size() == bench.NUM_TASKS).all()
    assert (measured["iterations"] == measured["batch_size"].map({64: 2, 256: 1})).all()
    assert (measured["seconds"] > 0).all()

    goals = pd.read_csv(tmp_path / "bench_loop_ratios.csv")
    assert len(goals) == 2 * 2 * 4
    assert set(goals["verdict"]) <= {"reached", "missed"}
    printed = capsys.readouterr().out
    assert "milliseconds per iteration" in printed
    assert "stock / ours" in printed


@pytest.mark.parametrize(("ours", "verdict"), [(1.04, "reached"), (1.06, "missed")])
def test_ratios_compare_what_was_measured_together(ours, verdict):
    times = {"bare": 1.0, "ours": ours, "hooks": 1.0, "tensors": 4.0, "stock": 16.0}
    rows = [
        {
            "network": network,
            "batch_size": 64,
            "repeat": 0,
            "task": task,
            "variant": variant,
            "ms_per_iteration": (task + 1) * time,
        }
        for network in bench.EPOCHS
        for task in range(3)
        for variant, time in times.items()
    ]
    table = bench.ratios(pd.DataFrame(rows)).set_index(["ratio", "network"])
    row = table.loc[("ours / bare", "mlp")]
    assert row["median"] == pytest.approx(ours)
    assert row["quartile_1"] == pytest.approx(row["quartile_3"])
    assert row["verdict"] == verdict
    assert table.loc[("stock / ours", "mlp"), "median"] == pytest.approx(16 / ours)
    assert table.loc[("stock / ours", "mlp"), "bare_loop"] == pytest.approx(16)


def test_different_work_is_refused():
    work = bench.Work()
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], 0.1)
    with work.counted():
        optimizer.step()
    optimizer.step()
    assert work.steps == 1
    with pytest.raises(RuntimeError, match=r"ours did 1 steps on 0 rows; expected \(2, 0\)"):
        work.check("ours", (2, 0))


@pytest.mark.parametrize("options", [{"repeats": 0}, {"epochs": 0}, {"images": 0}, {"images": 100_000}])
def test_bad_sizes_are_named(options):
    with pytest.raises(InputError):
        bench.bench_loop(**options)
