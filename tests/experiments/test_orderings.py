"""Claims about the order of methods against runs, and the declared tables of ensembles."""

from __future__ import annotations

import pandas as pd
import pytest

from experiments import reproduce
from experiments.ensembles.orderings import Claim, Orderings, OrderingsTable
from experiments.ensembles.reproduction import EnsembleTable, Published
from lifelong_ens.ensembles import METHODS


def table(nlls: dict[str, list[float]], *claims: Claim) -> OrderingsTable:
    runs = pd.DataFrame(
        [
            {"data": "digits", "method": method, "seed": seed, "nll": nll}
            for method, values in nlls.items()
            for seed, nll in enumerate(values)
        ]
    )
    about = {
        "data": {"name": "digits", "num_train": 100},
        "network": {"name": "mlp"},
        "fit": {"epochs": 2},
        "asked_members": 4,
        "seed": 0,
    }
    return OrderingsTable(Orderings("x", "y", (), claims, ""), runs, [about])


def test_verdicts_are_means_over_seeds_with_the_p_of_a_paired_test():
    nlls = {"a": [0.1, 0.2, 0.3], "b": [0.2, 0.25, 0.5], "c": [0.05, 0.05, 0.05]}
    claims = [
        Claim("a", "b", "a before b", "?"),
        Claim("b", None, "b on top", "?"),
        Claim("a", "d", "no d", "?"),
    ]
    block = table(nlls, *claims).block()
    # differences -0.1, -0.05, -0.2: t = -2.65 with two degrees of freedom
    assert "yes: -0.117 (p 0.12)" in block
    assert "no: 3 of 3" in block
    assert "digits: mlp, 100 training images, 2 epochs, 4 members, 1 seed" in block
    assert next(line for line in block.splitlines() if "no d" in line).rstrip(" |").endswith("–")
    assert "0.200" in table(nlls, *claims).markdown()


@pytest.mark.parametrize("name", ["ensembles_cifar", "ensemble_orderings"])
def test_what_is_declared_exists(name):
    declared = reproduce.find(name)
    parts = getattr(declared, "parts", (declared,))
    for part in parts:
        assert {row.method for row in part.rows} <= set(METHODS)
        quick = part.quickened()
        assert quick.seeds == 1
        assert quick.fit["epochs"] < part.fit["epochs"]


def test_the_part_on_digits_needs_no_folder_of_images(tmp_path):
    declared = reproduce.find("ensemble_orderings")
    small = Orderings("o", "s", declared.parts[:1], declared.claims, declared.images)
    table, out = small.run({"quick": True, "device": "cpu", "out": tmp_path / "out"}, ["--root", "nowhere"])
    assert "hyper_deep at least as good as deep" in (out / "table.md").read_text()
    assert len(table.records) == len(declared.parts[0].rows)


@pytest.mark.data
def test_the_table_of_cifar_has_published_rows_beside_ours(unpacked, tmp_path):
    declared = reproduce.find("ensembles_cifar")
    few = type(declared)(
        **{**vars(declared), "rows": declared.rows[:1] + declared.rows[3:5], "num_members": 2}
    )
    arguments = ["--root", str(unpacked("cifar100")), "--limit", "6"]
    table, _ = few.run({"quick": True, "device": "cpu", "out": tmp_path}, arguments)
    assert isinstance(table, EnsembleTable)
    text = (tmp_path / "table.md").read_text()
    assert "82.7 % / 0.666 / 0.021" in text
    assert "**Not at full settings:** epochs is 1, declared 60" in text
    single, deep = (
        next(line for line in text.splitlines() if line.startswith(f"| {name} "))
        for name in ("single", "deep")
    )
    assert "78.3 % / 0.093" in single
    assert "81.0 % / 0.068" in deep
    assert str(Published()) == "–"
