"""Records that earlier versions wrote are kept here and still read; what a later version wrote is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lifelong_ens.errors import InputError
from lifelong_ens.report import Report, ensemble_records, records
from lifelong_ens.report.ensembles import EnsembleReport
from lifelong_ens.report.page import render
from lifelong_ens.store import write_json

KEPT = Path(__file__).parent / "records"
KINDS = {
    "compare": (Report, records.SCHEMA),
    "ensemble": (EnsembleReport, ensemble_records.SCHEMA),
}


@pytest.mark.parametrize("kind", KINDS)
def test_there_is_a_record_of_every_version(kind):
    kept = {
        int(path.stem.split("-")[1]): json.loads(path.read_text()) for path in KEPT.glob(f"{kind}-*.json")
    }
    assert sorted(kept) == list(range(1, KINDS[kind][1] + 1))
    assert all(record["schema"] == number for number, record in kept.items())


@pytest.mark.parametrize("path", sorted(KEPT.glob("*.json")), ids=lambda path: path.stem)
def test_every_version_is_read(path, tmp_path):
    write_json(tmp_path / "records" / path.name, json.loads(path.read_text()))
    report = KINDS[path.stem.split("-")[0]][0].load(tmp_path)
    assert len(report.runs) == 1
    assert report.runs["bytes"].iloc[0] > 0
    assert "<h3>Results</h3>" in render([tmp_path])


@pytest.mark.parametrize("kind", KINDS)
def test_a_later_version_is_refused_with_one_line(kind, tmp_path):
    report, schema = KINDS[kind]
    record = json.loads((KEPT / f"{kind}-1.json").read_text()) | {"schema": schema + 1}
    write_json(tmp_path / "records" / "1.json", record)
    with pytest.raises(
        InputError, match=f"has schema {schema + 1}, this version reads up to {schema}; upgrade"
    ) as e:
        report.load(tmp_path)
    assert "\n" not in str(e.value)


def test_reliability_is_new_in_schema_2(tmp_path):
    for number, bins in ((1, 0), (2, 15)):
        record = json.loads((KEPT / f"compare-{number}.json").read_text())
        report = Report.from_records([record])
        assert len(report.reliability) == bins
        assert set(report.reliability.columns) >= {"bin", "count", "confidence", "accuracy"}
    filled = report.reliability[report.reliability["count"] > 0]
    gap = (filled["count"] * (filled["accuracy"] - filled["confidence"]).abs()).sum() / filled["count"].sum()
    assert gap == pytest.approx(report.runs["ece"].iloc[0], abs=1e-6)
