"""The report of ensembles, from records in memory."""

from __future__ import annotations

import copy
import json
import math

import pytest

from lifelong_ens.errors import DamagedFileError, InputError
from lifelong_ens.report.ensemble_records import check_ensemble_record, holds_ensembles
from lifelong_ens.report.ensembles import EnsembleReport


def record(method="single", seed=0, nll=0.5, data="digits", collapsed=False, **options):
    """A record as ``lifelong-ens ensemble`` writes it, of a method that costs twice what ``single`` does."""
    factor = 1 if method == "single" else 2
    answers = {"accuracy": 0.9, "brier": 0.2, "ece": 0.05, "nll": nll, "member_nll": nll}
    return {
        "schema": 1,
        "data": {"name": data},
        "method": {"name": method, "options": options},
        "network": {"name": "mlp", "options": {"hidden": [8]}},
        "fit": {},
        "seed": seed,
        "setting": "0123abcd",
        "protocol": {},
        "uncertainty": [
            {"images": "test", "severity": None, **answers},
            {"images": "fog", "severity": 1, **answers, "nll": 1.0},
            {"images": "fog", "severity": 2, **answers, "nll": 2.0},
            {"images": "letters", "severity": None, "auroc": 0.8},
            {"images": "photographs", "severity": None, "auroc": 0.9},
        ],
        "diversity": {"normalised_disagreement": math.nan if factor == 1 else 0.4, "collapsed": collapsed},
        "reliability": {"count": [1, 3], "confidence": [0.4, 0.9], "accuracy": [1.0, 2 / 3]},
        "cost": {
            "parameters": 10 * factor,
            "bytes": 40 * factor,
            "flops_forward": 100,
            "flops_effective": 50 * factor,
        },
        "spent": {
            "flops": 1000 * factor,
            "flops_effective": 1000 * factor,
            "seconds": 1.5,
            "saved_bytes": 7,
            "trainings": factor,
        },
        "num_members": factor,
        "asked_members": 2,
        "seconds_inference": 0.1,
        "versions": {"torch": "2.6"},
        "device": "cpu",
        "started": f"2026-01-01T00:00:0{seed}",
    }


def test_means_ratios_and_differences_are_of_the_same_seed():
    records = [
        record(seed=0, nll=0.5),
        record(seed=1, nll=0.7),
        record("deep", 0, 0.4),
        record("deep", 1, 0.5),
    ]
    report = EnsembleReport.from_records(records)
    deep = report.runs[report.runs["method"] == "deep"]
    assert (deep["ratio_bytes"] == 2).all()
    assert (deep["corrupted_nll"] == 1.5).all()
    assert deep["auroc"].tolist() == pytest.approx([0.85, 0.85])
    table = report.headline()
    assert table.loc["deep", "NLL"] == "0.450 ± 0.071"
    assert table.loc["deep", "NLL - single"] == "-0.150"
    assert table.loc["single", "NLL - single"] == "0"
    assert table.loc["deep", "on disk"] == "80 B (2.00x)"
    assert table.loc["single", "disagreement"] == "–"
    assert report.runs["network"].unique().tolist() == ["mlp(hidden=[8])"]


def test_several_data_sets_and_variants_have_rows_of_their_own():
    records = [record(), record("be", preset="a"), record("be", preset="b"), record(data="mnist")]
    table = EnsembleReport.from_records(records).headline()
    assert table.index.tolist() == [
        ("digits", "single"),
        ("digits", "be(preset=a)"),
        ("digits", "be(preset=b)"),
        ("mnist", "single"),
    ]


def test_without_a_single_network_or_corruptions_there_is_nothing_to_compare_with(tmp_path):
    one = record("deep")
    one["uncertainty"] = one["uncertainty"][:1]
    report = EnsembleReport.from_records([one])
    table = report.headline()
    assert not {"NLL - single", "cNLL", "AUROC %"} & set(table.columns)
    assert table.loc["deep", "on disk"] == "80 B"
    report.write(tmp_path)
    assert (tmp_path / "nll_against_cost.png").exists()


def test_a_collapse_is_written_out(tmp_path):
    EnsembleReport.from_records([record(), record("deep", collapsed=True)]).write(tmp_path)
    assert "**Collapsed**: the members of `deep` are one network." in (tmp_path / "summary.md").read_text()


def test_damaged_records_are_named_and_left_out(tmp_path, caplog):
    (tmp_path / "records").mkdir()
    (tmp_path / "records/a.json").write_text(json.dumps(record() | {"diversity": {}}))
    (tmp_path / "records/b.json").write_text("{")
    assert len(EnsembleReport.load(tmp_path).runs) == 1
    assert "b.json" in caplog.text
    assert holds_ensembles(tmp_path)
    assert not holds_ensembles(tmp_path / "records")
    (tmp_path / "records/a.json").unlink()
    with pytest.raises(InputError, match=r"none of the 1 records"):
        EnsembleReport.load(tmp_path)
    with pytest.raises(InputError, match="run `lifelong-ens ensemble"):
        EnsembleReport.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda one: one.pop("schema"), "states no schema"),
        (lambda one: one.update(schema=99), "upgrade"),
        (lambda one: one.pop("spent"), "`spent` is missing"),
        (lambda one: one["cost"].update(bytes="many"), "`cost.bytes` is 'many'"),
        (lambda one: one["uncertainty"].pop(0), "nothing of the test images"),
        (lambda one: one["uncertainty"].append({}), "which images"),
    ],
)
def test_what_is_no_record_is_refused(change, words):
    broken = copy.deepcopy(record())
    change(broken)
    with pytest.raises(DamagedFileError, match=words):
        check_ensemble_record(broken, "x.json")
