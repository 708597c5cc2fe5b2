"""What ensembles, declared tables and searches are said to cost before they run, and that saying so writes nothing."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from experiments import estimate
from experiments.cli import main
from experiments.ensembles.estimate import estimate_ensemble
from experiments.ensembles.plan import plan_ensembles
from experiments.ensembles.run import fit_members
from experiments.reproduce.be_cost_table import REPRODUCTION as COSTS
from experiments.reproduce.declaration import Row
from experiments.reproduce.ensemble_orderings import REPRODUCTION as ORDERINGS
from experiments.reproduce.ensembles_cifar import REPRODUCTION as ENSEMBLES
from lifelong_ens.ensembles import METHODS
from lifelong_ens.ensembles.training import silent
from lifelong_ens.errors import InputError
from lifelong_ens.training.loop import Optimisation

CPU = torch.device("cpu")
SMALL = ["--limit", "40", "--epochs", "3", "--batch_size", "16", "--hidden", "[16, 8]"]
OWN = {"structured": ["--mask_epochs", "2"], "hyper_deep": ["--num_candidates", "3"]}
OWN["fixed_init_hyper"] = OWN["hyper_deep"]
# trainings of hyper_deep are counted before it is known which are needed; of the others only the size is a bound
MARKS = {
    "hyper_deep": ("≤", "≤"),
    "fixed_init_hyper": ("≤", ""),
    "structured": ("≈", "≈"),
    "dst": ("≤", ""),
    "edst": ("≤", ""),
}
PHASES = {"prune_finetune": 2, "structured": 4}


def planned(name, *options):
    given = {"methods": name, "members": 2, "device": "cpu"}
    plan = plan_ensembles(given, [*SMALL, *OWN.get(name, []), *options])
    ((cell, function),) = [(cell, one) for cell, one in plan.cells if cell.method.name == name]
    images = plan.images()
    return cell, function, plan.network_for(images), images


@pytest.fixture
def least_steps(monkeypatch):
    """Makes no more steps than it must; returns those that were made."""
    monkeypatch.setattr(estimate, "WARM_SECONDS", 0.0)
    made, step = [], Optimisation.step

    def counted(self, loss):
        made.append(self)
        step(self, loss)

    monkeypatch.setattr(Optimisation, "step", counted)
    return made


def agrees(said: float, found: float, mark: str) -> bool:
    return said >= found > 0 if mark == "≤" else said == pytest.approx(found, rel=0.2 if mark else 1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_an_estimate_is_what_the_ensemble_costs(least_steps, tmp_path, name):
    arguments = planned(name)
    said = estimate_ensemble(*arguments, CPU)
    assert 0 < len(least_steps) <= 4 * PHASES.get(name, 1)
    ensemble = fit_members(*arguments, CPU, silent)
    found = ensemble.cost(arguments[-1].test.batch(torch.arange(4))[0])
    size, cost = MARKS.get(name, ("", ""))
    assert (said.size.mark if said.size else "", said.cost.mark if said.cost else "") == (size, cost)
    assert agrees(said.parameters, found.parameters, size)
    assert agrees(said.bytes, found.bytes, size)
    assert agrees(said.flops_forward, found.flops_forward, "≤" if size else "")
    assert agrees(said.flops_training, ensemble.spent.flops, cost)
    assert said.disk_bytes == pytest.approx(ensemble.save(tmp_path).stat().st_size, abs=64) or size
    assert said.seconds_training > 0


def test_a_structured_ensemble_that_compares_within_layers_is_known(least_steps):
    arguments = planned("structured", "--scope", "local")
    said, ensemble = estimate_ensemble(*arguments, CPU), fit_members(*arguments, CPU, silent)
    found = ensemble.cost(arguments[-1].test.batch(torch.arange(4))[0])
    assert said.size is said.cost is None
    assert (said.parameters, said.bytes) == (found.parameters, found.bytes)
    assert said.flops_training == ensemble.spent.flops


def test_hyper_deep_costs_at_most_every_choice_with_every_seed(least_steps):
    one = estimate_ensemble(*planned("single"), CPU)
    search = estimate_ensemble(*planned("hyper_deep", "--num_candidates", "5"), CPU)
    assert search.flops_training == (5 + 2 * 1) * one.flops_training


def test_patience_makes_it_the_most_that_it_can_be(least_steps):
    said = estimate_ensemble(*planned("deep", "--patience", "1"), CPU)
    never = estimate_ensemble(*planned("deep"), CPU)
    assert said.cost is not None
    assert "stop early" in said.cost.why
    assert said.flops_training == never.flops_training


def test_a_method_of_one_s_own_is_not_trained(least_steps):
    cell, function, build, images = planned("deep")
    own = dataclasses.replace(cell, method=dataclasses.replace(cell.method, name="mine:fit"))
    with pytest.raises(InputError, match="only its run can tell"):
        estimate_ensemble(own, function, build, images, CPU)
    assert not least_steps


def rows_of(text: str) -> dict[str, str]:
    return {line.split()[0]: line for line in text.splitlines() if line.strip()}


def test_ensembles_that_are_new_finished_or_to_be_measured(tmp_path, capsys):
    out = tmp_path / "o"
    arguments = ["ensemble", *SMALL, "--device", "cpu", "--members", "2", "--out", str(out)]
    assert main([*arguments, "--methods", "deep", "--seeds", "1"]) == 0
    for path in (out / "records").glob("*single_equal*"):
        path.unlink()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    both = ["--methods", "batch_ensemble,deep", "--seeds", "2", "--dry_run"]
    capsys.readouterr()
    assert main([*arguments, *both]) == 0
    text = capsys.readouterr().out
    rows = rows_of(text)
    assert "digits, 10 classes, " in rows["data:"]
    assert "members: 2" in rows["network:"]
    assert "2 new" in rows["batch_ensemble"]
    assert "1 new, 1 finished" in rows["deep"]
    assert "1 new, 1 to be measured" in rows["single_equal_cost"]
    assert "5 runs" in rows["total"]
    assert main([*arguments, *both, "--force"]) == 0
    assert "2 new" in rows_of(capsys.readouterr().out)["deep"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_declared_tables(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = (Row("v", "finetune"), Row("b", "batch_ensemble"), Row("r", "batch_ensemble", {"rank": 2}))
    mlp, fit = {"hidden": [16, 8]}, {"epochs": 2}
    table = dataclasses.replace(
        COSTS,
        stream="split_digits",
        stream_options={"limit": 20},
        network="mlp",
        network_options=mlp,
        fit=fit,
        rows=rows,
        seeds=2,
    )
    found = rows_of(table.dry_run({}, ["--epochs", "1"]))
    assert "2 new" in found["finetune"]
    assert "2 new" in found["batch_ensemble(rank=2)"]
    assert "1 epochs a task" in found["network:"]
    kept = tuple(row for row in ENSEMBLES.rows if row.method in ("single", "batch_ensemble"))
    digits = dataclasses.replace(
        ENSEMBLES, data="digits", network="mlp", network_options=mlp, fit=fit, rows=kept
    )
    found = rows_of(digits.dry_run({"quick": True}, []))
    assert {"single", "batch_ensemble(preset=paper)", "batch_ensemble(preset=fast)"} <= set(found)
    part = dataclasses.replace(ORDERINGS.parts[0], rows=ORDERINGS.parts[0].rows[:1])
    text = dataclasses.replace(ORDERINGS, parts=(part, part)).dry_run({"quick": True}, [])
    assert text.count("data: digits") == 2
    assert list(tmp_path.iterdir()) == []


def test_translation_says_that_it_has_none(capsys):
    assert main(["reproduce", "translation", "--dry_run"]) == 2
    assert "translation has no dry run" in capsys.readouterr().err


def test_trials_that_are_missing(tmp_path, capsys):
    out = tmp_path / "t"
    arguments = ["tune", *SMALL, "--validation", "0.2", "--device", "cpu", "--strategies", "finetune"]
    arguments += ["--seeds", "2", "--out", str(out), "--num_tasks_used", "2"]
    assert main([*arguments, "--trials", "3", "--dry_run"]) == 0
    new = capsys.readouterr().out
    assert "6 new" in rows_of(new)["finetune"]
    assert "finetune searches learning_rate" in new
    assert not out.exists()
    assert main([*arguments, "--trials", "1"]) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    assert main([*arguments, "--trials", "3", "--dry_run"]) == 0
    row = rows_of(capsys.readouterr().out)["finetune"]
    assert "4 new, 2 finished" in row
    assert main([*arguments, "--trials", "3", "--dry_run", "--weight_decay", "0.1"]) == 2
    assert "study of another space" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
