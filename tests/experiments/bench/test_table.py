from __future__ import annotations

import math

import pandas as pd

from experiments.bench.table import COLUMNS, Table


def line(row: str, **given):
    values = {
        "row": row,
        "case": "case",
        "ours": "ours",
        "against": "peer",
        "goal": "<= 1.05",
        "ratio": 0.98765,
        "quartile_1": 0.9,
        "quartile_3": 1.1,
        "verdict": "reached",
        "ours_median": 0.0123456,
        "against_median": 0.000045678,
        "unit": "s",
        "rounds": 7,
        "quick": False,
        "device": "cpu (X)",
        "versions": "torch 2",
        "measured": "2026-11-01T00:00:00+00:00",
    }
    return values | given


def table(*lines) -> Table:
    return Table.empty().with_rows(pd.DataFrame(lines))


def test_cells_are_written_as_people_read_them():
    shown = table(
        line("layers"),
        line("layers", ratio=math.nan, against_median=math.nan, verdict="absent (peer is not installed)"),
        line(
            "add_task",
            unit="B",
            ours_median=80_300,
            against_median=44.7e6,
            ratio=0.0018,
            quartile_1=0.0018,
            quartile_3=0.0018,
        ),
        line("loop", ours_median=2.5, against_median=1e-3),
    ).strings()
    assert list(shown.columns) == ["row", "case", "ours", "against", "goal", "ratio", "verdict"]
    assert list(shown["row"]) == ["layers", "layers", "add_task", "loop"]
    assert list(shown["ours"]) == ["ours: 12.3 ms", "ours: 12.3 ms", "ours: 80.3 kB", "ours: 2.5 s"]
    assert list(shown["against"]) == ["peer: 45.7 us", "peer", "peer: 44.7 MB", "peer: 1 ms"]
    assert list(shown["ratio"]) == ["0.99 (0.90 to 1.10)", "–", "0.0018", "0.99 (0.90 to 1.10)"]


def test_it_says_where_and_how_it_was_measured():
    several = table(
        line("layers", verdict="missed"),
        line("loop", quick=True, rounds=3),
        line("layers", device="cuda (Y)", verdict="broken (RuntimeError: no)", rounds=9),
    )
    block = several.block()
    assert (
        "**Quick, few rounds:** loop. 1 reached, 1 missed, 1 broken. cpu (X); cuda (Y); torch 2; rounds: 3 to 9."
        in block
    )
    assert list(several.strings()["device"]) == ["cpu", "cuda", "cpu"]
    assert "Quick" not in table(line("layers")).block()


def test_rows_replace_those_of_the_same_name_on_the_same_device():
    before = table(
        line("layers", ratio=1.0), line("layers", ratio=2.0), line("layers", device="cuda (Y)"), line("loop")
    )
    after = before.with_rows(pd.DataFrame([line("layers", ratio=3.0), line("step_later_task")]))
    assert list(after.lines["row"]) == ["step_later_task", "layers", "layers", "loop"]
    assert list(after.lines["device"]) == ["cpu (X)", "cpu (X)", "cuda (Y)", "cpu (X)"]
    assert after.lines["ratio"].iloc[1] == 3.0


def test_what_is_written_is_read_again(tmp_path):
    assert not Table.exists(tmp_path)
    written = table(
        line("layers"), line("loop", ratio=math.nan, ours_median=math.nan, verdict="broken (ours: no, no)")
    )
    written.write(tmp_path)
    assert Table.exists(tmp_path)
    read = Table.load(tmp_path)
    assert list(read.lines.columns) == list(COLUMNS)
    assert read.markdown() == written.markdown() == (tmp_path / "table.md").read_text()
