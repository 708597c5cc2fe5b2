"""The page of efficient ensembles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lifelong_ens.report.ensembles import EnsembleReport
from lifelong_ens.report.page import figures
from lifelong_ens.report.page.command import ensemble_commands
from lifelong_ens.report.page.measures import (
    Measure,
    count,
    percent,
    ratio,
    seconds,
    size,
    table_block,
    three,
)
from lifelong_ens.report.page.model import Block, Comparison, Figure, Series, series_of
from lifelong_ens.report.page.shared import Source, named, options_block, samples, states, training, where
from lifelong_ens.report.records import flat

_Pandas = Any
_Record = Mapping[str, Any]

HEADLINE = (
    Measure("num_members", "members", "in the ensemble", "", lambda value: f"{value:g}"),
    Measure(
        "accuracy", "accuracy, %", "of the mean probability, on test images", "up", percent, bounds=(0, 1)
    ),
    Measure("nll", "NLL, nats", "negative log-likelihood", "down", three, bounds=(0, math.inf)),
    Measure("ece", "ECE", "expected calibration error, 15 bins", "down", three, bounds=(0, 1)),
    Measure(
        "brier", "Brier", "squared distance of the probabilities from the label", "down", three, bounds=(0, 2)
    ),
    Measure(
        "ratio_bytes",
        "memory",
        "of all tensors, relative to one network",
        "down",
        ratio,
        True,
        ("bytes", size),
    ),
    Measure(
        "ratio_flops_effective",
        "computation, answer",
        "FLOPs of one image, without products of zeros; to one network",
        "down",
        ratio,
        True,
        ("flops_effective", count),
    ),
    Measure(
        "ratio_flops_training_effective",
        "computation, training",
        "FLOPs of all training, relative to one network",
        "down",
        ratio,
        True,
        ("flops_training_effective", count),
    ),
)
DOUBT = (
    Measure(
        "normalised_disagreement",
        "disagreement",
        "share of images on which members differ, over their mean error",
        "",
        three,
    ),
    Measure(
        "error_correlation",
        "error correlation",
        "of members' errors, mean over pairs",
        "",
        three,
        bounds=(-1, 1),
    ),
    Measure("kl", "KL, nats", "between members, over ordered pairs", "", three),
    Measure(
        "member_accuracy", "a member alone, %", "mean accuracy of the members", "up", percent, bounds=(0, 1)
    ),
    Measure(
        "auroc", "foreign images, AUROC", "of telling them by 1 - max probability", "up", three, bounds=(0, 1)
    ),
    Measure(
        "corrupted_accuracy",
        "corrupted, accuracy %",
        "mean over corruptions and severities",
        "up",
        percent,
        bounds=(0, 1),
    ),
    Measure(
        "corrupted_nll",
        "corrupted, NLL",
        "mean over corruptions and severities",
        "down",
        three,
        bounds=(0, math.inf),
    ),
    Measure(
        "corrupted_ece",
        "corrupted, ECE",
        "mean over corruptions and severities",
        "down",
        three,
        bounds=(0, 1),
    ),
)
COSTS = (
    Measure("seconds_training", "training", "time of all training", "down", seconds, bounds=(0, math.inf)),
    Measure(
        "seconds_inference",
        "asking",
        "time of asking for all test images",
        "down",
        seconds,
        bounds=(0, math.inf),
    ),
    Measure("flops_training", "training FLOPs", "as it runs; 1 multiply-add is 2 FLOPs", "down", count, True),
    Measure(
        "flops_forward", "forward FLOPs", "of one image through all members, as it runs", "down", count, True
    ),
    Measure("parameters", "parameters", "learned numbers that are stored", "down", count, True),
    Measure("bytes", "memory", "of all tensors as they are saved", "down", size, True),
    Measure("saved_bytes", "kept for backward", "peak over training steps", "down", size, True),
    Measure("trainings", "trainings", "networks that were trained", "", count),
)


def comparisons(sources: Sequence[Source]) -> list[Comparison]:
    """One for each data set and setting."""
    records = [
        record | ({"out": source.out.name} if len(sources) > 1 else {})
        for source in sources
        for record in source.records
    ]
    report = EnsembleReport.from_records(records)
    found = []
    groups: Any = report.runs.groupby(["data", "setting"], sort=False)
    for i, ((data, setting), runs) in enumerate(groups):
        own = [records[row] for row in runs.index]
        bins: Any = report.reliability
        bins = bins[(bins["data"] == data) & (bins["setting"] == setting)]
        title = data if len(groups) == 1 else f"{data}, {named(own[0]['network'])}, {setting}"
        found.append(_comparison(title, own, runs, bins, sources, f"c{i}"))
    return found


def _comparison(
    title: str, records: list[_Record], runs: _Pandas, bins: _Pandas, sources: Sequence[Source], salt: str
) -> Comparison:
    first = records[0]
    series = series_of(list(runs["method"]))
    runs = runs.rename(columns={"method": "name"})
    data = first["data"]
    classes, left_out = data["classes"], data.get("held_out")
    shown, note = samples(sources, first["setting"], [f"{len(classes)} classes"])
    folder = next(source.out for source in sources if first.get("out", source.out.name) == source.out.name)
    collapsed = runs.loc[runs["collapsed"] == True, "name"].unique()  # noqa: E712
    warned = (
        f"The members of {', '.join(collapsed)} are one network in all but cost." if len(collapsed) else ""
    )
    blocks = [
        table_block("Results", runs, series, HEADLINE, warned),
        _fronts(runs, series, salt),
        _reliability(bins, series, salt),
        table_block("Diversity and doubt", runs, series, DOUBT),
        table_block("Time and computation", runs, series, COSTS),
        options_block(records, list(runs["name"]), "method", _shared(first), series),
    ]
    facts = [
        ("data", named(data)),
        (
            "images",
            "{num_train:,} to train, {num_validation:,} to choose, {num_test:,} to test".format(**data),
        ),
        ("classes", f"{len(classes)}" + (f", {left_out} left out as foreign images" if left_out else "")),
        ("network", named(first["network"])),
        ("training", training(first["fit"])),
        *where(records),
    ]
    return Comparison(
        title,
        f"{len(series)} ways to answer with one or more networks, {len(records)} runs. single is one network, "
        "single_equal_cost one that was trained for as long as all members of a deep ensemble.",
        "methods",
        list(series.values()),
        facts,
        shown,
        note,
        blocks,
        ensemble_commands(records, str(folder)),
        "Where it says DIR, the records do not say where the images lay.",
        states(sources, first["setting"]),
    )


def _shared(record: _Record) -> dict[str, Any]:
    return {
        "data": record["data"]["name"],
        **flat(record["data"].get("options") or {}, "data."),
        "held_out": record["data"].get("held_out", 0),
        "network": record["network"]["name"],
        **flat(record["network"].get("options") or {}, "network."),
        "members": record["asked_members"],
        **flat(record["fit"], "training."),
        **flat(record["protocol"], "measured."),
    }


def _fronts(runs: _Pandas, series: Mapping[str, Series], salt: str) -> Block:
    costs = {
        "ratio_bytes": "memory",
        "ratio_flops_effective": "computation of an answer",
        "ratio_flops_training_effective": "computation of training",
    }
    points = runs.assign(y=runs["nll"])
    found = []
    for column, words in costs.items():
        if runs[column].isna().all():
            continue
        own = points.assign(x=runs[column])
        middle = own.groupby("name", sort=False)[["x", "y"]].mean().dropna()
        said = ", ".join(f"{name} {x:.2f}x and {y:.3f}" for name, (x, y) in middle.iterrows())
        picture = figures.front(
            own, series, (f"{words}, ratio to one network", "NLL, nats"), True, f"{salt}-{column}"
        )
        caption = (
            f"NLL against {words}; down and to the left is better. The line joins what nothing beats in both."
        )
        found.append(Figure(picture, f"NLL against {words}: {said}.", caption))
    return Block("What certainty costs", figures=found, missing="" if found else "single did not run.")


def _reliability(bins: _Pandas, series: Mapping[str, Series], salt: str) -> Block:
    found = []
    for one in series.values():
        own = bins[bins["method"] == one.name]
        found.append(
            Figure(
                figures.reliability(own, one.style["color"], f"{salt}-r{one.index}"),
                figures.reliability_words(one.name, own),
                one.name,
                one,
            )
        )
    return Block("Reliability", figures.RELIABILITY_TEXT.format("the test images"), found, small=True)
