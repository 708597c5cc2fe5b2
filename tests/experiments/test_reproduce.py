"""Reproductions: what is declared can be built, what was published is in the table, and README shows the records."""

from __future__ import annotations

import dataclasses
import inspect
import json
import pkgutil
from pathlib import Path

import pandas as pd
import pytest
import torch

from experiments import catalogue, reproduce
from experiments.cli import main
from experiments.reproduce.declaration import Quick, Reproduction, Row
from experiments.reproduce.readme import DOCUMENTS, RESULTS, folders, refreshed, table_of
from experiments.reproduce.running import plan_reproduction
from experiments.reproduce.running import reproduce as run_reproduction
from experiments.reproduce.table import Table
from lifelong_ens.errors import InputError
from lifelong_ens.report.records import load_records

# the others have engines, and tests, of their own
OVER_STREAMS = [name for name in reproduce.NAMES if isinstance(reproduce.find(name), Reproduction)]

REPOSITORY = Path(__file__).resolve().parents[2]

SMALL = Reproduction(
    name="small",
    summary="a table for this test",
    source="Somebody 2020, Table 7",
    stream="split_digits",
    stream_options={"num_tasks": 2},
    network="mlp",
    network_options={"hidden": [16]},
    fit={"epochs": 3},
    seeds=3,
    rows=(
        Row("vanilla", "finetune", memory=1, computation=1),
        Row("ours", "batch_ensemble", {"init": "ones"}, memory=1.07),
        Row("wide", "independent", {}, {"hidden": [32]}, computation=12.345),
    ),
    quick=Quick(
        fit={"epochs": 1}, stream={"limit": 20}, strategies={"batch_ensemble": {"init": "previous"}}, seeds=2
    ),
    images="nowhere",
    notes=("The digits are not theirs.",),
    reference="vanilla",
)


def run(out: Path, declared: Reproduction = SMALL, *rest: str, **given) -> Table:
    table, folder = run_reproduction(declared, {"out": out, "device": "cpu", **given}, rest)
    assert folder == out
    assert (out / "table.md").read_text() == table.markdown()
    return table


@pytest.mark.parametrize("name", OVER_STREAMS)
@pytest.mark.parametrize("quick", [False, True])
def test_every_row_names_builders_and_options_that_exist(name, quick):
    declared = reproduce.find(name)
    assert declared.name == name
    plan = plan_reproduction(declared, {"quick": quick}, [])
    assert len(plan.cells) == len(declared.rows) * (declared.quick.seeds if quick else declared.seeds)
    assert len({cell.key for cell, _ in plan.cells}) == len(plan.cells)
    assert len({cell.setting for cell, _ in plan.cells}) == 1
    for row in declared.quickened().rows if quick else declared.rows:
        builder = catalogue.load(catalogue.target_of("strategy", row.strategy))
        network = catalogue.load(catalogue.target_of("network", declared.network))
        body = network(**declared.network_options, **row.network)
        builder(body, seed=0, device=torch.device("cpu"), **row.options)
    stream = catalogue.load(catalogue.target_of("stream", declared.stream))
    stream_options = {**declared.stream_options, **declared.quick.stream}
    inspect.signature(stream).bind_partial(**stream_options)


@pytest.mark.parametrize("name", OVER_STREAMS)
def test_rows_have_one_label_each_and_a_vanilla_network(name):
    declared = reproduce.find(name)
    labels = [row.label for row in declared.rows]
    assert len(set(labels)) == len(labels)
    assert sum(row.strategy == "finetune" for row in declared.rows) == 1
    assert "finetune" not in labels
    assert declared.reference is None or declared.reference in labels
    assert bool(declared.source) == any(row.memory or row.computation for row in declared.rows)


def test_every_module_that_declares_one_is_named():
    own = {"declaration", "readme", "running", "shared", "table"}
    modules = {module.name for module in pkgutil.iter_modules(reproduce.__path__)}
    assert modules - own == set(reproduce.NAMES)


def test_the_cost_table_has_the_published_numbers():
    rows = {row.label: (row.computation, row.memory) for row in reproduce.find("be_cost_table").rows}
    assert rows["vanilla"] == (1, 1)
    assert rows["batch_ensemble"] == (1.11, 1.10)
    assert rows["pnn"] == rows["pnn, narrow"] == (1.12, 4.16)


def test_narrow_columns_of_pnn_have_the_published_memory():
    (row,) = [row for row in reproduce.find("be_cost_table").rows if row.label == "pnn, narrow"]
    vanilla, narrow = (
        sum(
            parameter.numel()
            for parameter in catalogue.load(catalogue.target_of("strategy", strategy))(
                catalogue.load(catalogue.target_of("network", "lenet5"))(**network), **options
            )
            .network.regrow([10] * 10)
            .parameters()
        )
        for strategy, network, options in (("finetune", {}, {}), (row.strategy, row.network, row.options))
    )
    assert narrow / vanilla == pytest.approx(row.memory, abs=0.005)


def test_end_to_end(tmp_path):
    table = run(tmp_path)
    strings = table.strings().set_index("strategy")
    assert list(strings.index) == ["vanilla", "ours", "wide"]
    assert list(strings["published memory"]) == ["1.00x", "1.07x", "–"]
    assert list(strings["published computation"]) == ["1.00x", "–", "12.35x"]
    assert strings.loc["vanilla", "memory"].endswith("(1.00x)")
    vanilla, wide = 64 * 16 + 16 + 2 * 17 * 5, 2 * (64 * 32 + 32 + 33 * 5)
    assert strings.loc["wide", "memory"].endswith(f"({wide / vanilla:.2f}x)")
    assert all("±" in cell for cell in strings["accuracy %"])
    assert strings.loc["vanilla", "points to `vanilla`"] == "–"
    assert "p = " in strings.loc["ours", "points to `vanilla`"]
    text = table.markdown()
    assert "Somebody 2020, Table 7" in text
    assert "* The digits are not theirs." in text
    assert "Not at full settings" not in text
    numbers = pd.read_csv(tmp_path / "table.csv").set_index("row")
    runs = pd.read_csv(tmp_path / "runs.csv")
    ours = runs[runs["strategy"].str.startswith("batch_ensemble")]
    assert numbers.loc["ours", "average_accuracy"] == pytest.approx(ours["average_accuracy"].mean())
    assert numbers.loc["ours", "seeds"] == 3


def test_quick_says_so_and_stands_beside_the_full_runs(tmp_path):
    full = run(tmp_path, seeds=1).strings()
    quick = run(tmp_path, quick=True).markdown()
    assert "**Not at full settings:**" in quick
    for difference in (
        "epochs 1 instead of 3",
        "limit 20",
        "seeds 2 instead of 3",
        "init of ours previous instead of ones",
    ):
        assert difference in quick
    records = list((tmp_path / "records").glob("*.json"))
    again = run(tmp_path, seeds=1)
    assert again.strings().equals(full)
    assert list((tmp_path / "records").glob("*.json")) == records


def test_options_of_stream_and_training_are_taken_and_said(tmp_path):
    table = run(tmp_path, SMALL, "--epochs", "2", "--limit", "15", seeds="7,")
    assert "epochs 2 instead of 3, limit 15, seeds 1 instead of 3" in table.markdown()
    assert {record["seed"] for record in table.records} == {7}
    with pytest.raises(InputError, match="--init"):
        run(tmp_path, SMALL, "--init", "ones")


def test_a_row_that_has_not_run_shows_what_was_published(tmp_path):
    run(tmp_path, seeds=1)
    later = dataclasses.replace(SMALL, rows=(*SMALL.rows, Row("new", "pnn", {}, {}, 4.16, 1.12)))
    cells = Table.of(later, load_records(tmp_path)).strings().set_index("strategy").loc["new"]
    assert cells["published memory"] == "4.16x"
    assert cells["accuracy %"] == cells["memory"] == "–"
    with pytest.raises(InputError, match="no records of other"):
        Table.of(dataclasses.replace(SMALL, name="other", rows=()), load_records(tmp_path))


def test_memory_after_tasks_counts_what_is_stored(tmp_path):
    declared = dataclasses.replace(SMALL, after_tasks=(1, 2), reference=None)
    numbers = run(tmp_path, declared, seeds=1).numbers.set_index("row")
    head = 17 * 5 * 4
    assert numbers.loc["vanilla", "bytes_after_1"] == (64 * 16 + 16) * 4 + head
    assert numbers.loc["vanilla", "bytes_of_last_task"] == head
    assert numbers.loc["wide", "bytes_after_2"] == 2 * numbers.loc["wide", "bytes_after_1"]
    assert (tmp_path / "memory_over_tasks.png").stat().st_size > 5_000


def test_records_do_not_say_where_the_images_lie(tmp_path):
    declared = reproduce.find("be_cost_table")
    here, there = (plan_reproduction(declared, {}, ["--root", root]) for root in ("a", str(tmp_path)))
    assert [cell.key for cell, _ in here.cells] == [cell.key for cell, _ in there.cells]
    assert "root" not in json.dumps(here.cells[0][0].stream.as_dict())


@pytest.mark.parametrize("name", ["split_tiny_imagenet", "be_cost_table"])
def test_without_images_one_line_says_where_to_get_them(name, tmp_path, capsys, monkeypatch):
    import torchvision.datasets

    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", no_network)
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", name, "--device", "cpu"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "--root DIR" in line


def test_names_are_listed(capsys):
    assert main(["reproduce"]) == 0
    assert main(["list", "reproductions"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == 2 * list(reproduce.NAMES)
    assert main(["reproduce", "be_cost"]) == 2
    assert "did you mean be_cost_table" in capsys.readouterr().err


@pytest.mark.parametrize("name", reproduce.NAMES)
def test_its_options_are_listed(name, capsys):
    assert main(["list", name]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{name} (")  # one is called as its stream is, whose options it takes
    assert "\n  --" in shown


def test_tables_of_documents_are_made_from_the_committed_results():
    documents = [(REPOSITORY / document).read_text() for document in DOCUMENTS]
    for text in documents:
        assert refreshed(text, REPOSITORY / RESULTS) == text
    for folder in folders(REPOSITORY / RESULTS):
        assert (folder / "table.md").read_text() == table_of(folder).markdown()
        assert sum(f"<!-- table {folder.name} -->" in text for text in documents) == 1
