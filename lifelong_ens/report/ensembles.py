"""The report of a comparison of ensembles: tidy tables, a summary and plots."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lifelong_ens.errors import InputError
from lifelong_ens.report.columns import Column, names, version_column
from lifelong_ens.report.ensemble_records import COST, SPENT, check_ensemble_record, load_ensemble_records
from lifelong_ens.report.headline import duration, mean_and_std, percent, quantity, with_ratio
from lifelong_ens.report.markdown import markdown_table
from lifelong_ens.report.records import flat
from lifelong_ens.store import write_bytes

KEYS = ["data", "setting", "method", "seed"]
RATIOS = (
    "parameters",
    "bytes",
    "flops_forward",
    "flops_effective",
    "flops_training",
    "flops_training_effective",
)
DIVERSITY = ("disagreement", "normalised_disagreement", "kl", "cosine", "error_correlation", "collapsed")
# of a test set -> its mean over all corruptions and severities
CORRUPTED = {"accuracy": "corrupted_accuracy", "nll": "corrupted_nll", "ece": "corrupted_ece"}

_MEAN = "of the members' mean probability"
ANSWERS = (
    Column("accuracy", "[0, 1]", f"{_MEAN}, on the test images"),
    Column("nll", "nats", f"mean negative log-likelihood {_MEAN}"),
    Column("brier", "[0, 2]", f"mean squared distance {_MEAN} from the label"),
    Column("ece", "[0, 1]", f"expected calibration error {_MEAN}, 15 bins of equal width"),
    Column("adaptive_ece", "[0, 1]", "the same with 15 bins of equally many images"),
    Column(
        "classwise_ece", "[0, 1]", "mean over classes of the calibration error of each class's probability"
    ),
    Column("aurc", "[0, 1]", "area under the risk-coverage curve: mean error among the surest answers"),
    Column("member_accuracy", "[0, 1]", "mean accuracy of the members, each alone"),
    Column("member_nll", "nats", "mean NLL of the members, each alone"),
    Column("entropy", "nats", f"mean entropy {_MEAN}"),
)
_KEY_COLUMNS = (
    Column("data", "", "name of the data set"),
    Column(
        "setting", "", "hash of data, network, shared training and members asked for; runs compare within one"
    ),
    Column("method", "", "name of the method; with its options where it ran with several"),
    Column("seed", "", "seed of the run"),
)
RUNS = (
    *_KEY_COLUMNS,
    Column("num_members", "members", "in the ensemble; those whose share is zero are not kept"),
    *ANSWERS,
    Column("disagreement", "[0, 1]", "share of test images on which two members differ, mean over pairs"),
    Column("normalised_disagreement", "", "disagreement divided by the members' mean error"),
    Column("kl", "nats", "mean KL divergence between members, over ordered pairs"),
    Column("cosine", "[0, 1]", "1 - mean cosine similarity of members' probabilities"),
    Column("error_correlation", "[-1, 1]", "mean correlation of members' errors over pairs"),
    Column("collapsed", "", "whether the members are so alike that they are one network in all but cost"),
    Column("corrupted_accuracy", "[0, 1]", "mean accuracy over corruptions and severities (cAcc)"),
    Column("corrupted_nll", "nats", "mean NLL over corruptions and severities (cNLL)"),
    Column("corrupted_ece", "[0, 1]", "mean ECE over corruptions and severities (cECE)"),
    Column("auroc", "[0, 1]", "of telling foreign images by 1 - max probability, mean over the foreign sets"),
    Column("temperature", "", "fitted on validation images; 1 where that was not asked for"),
    Column("parameters", "numbers", "learned numbers that are stored"),
    Column("bytes", "bytes", "of all tensors as they are saved, masks as packed bits"),
    Column("flops_forward", "FLOPs", "of one image through all members, as it runs"),
    Column("flops_effective", "FLOPs", "the same without products of weights that are zero"),
    Column("flops_training", "FLOPs", "of all training that the method needs, as it runs"),
    Column(
        "flops_training_effective", "FLOPs", "the same without products of weights that a mask holds at zero"
    ),
    Column("seconds_training", "seconds", "of that training"),
    Column("seconds_inference", "seconds", "of asking for all test images, in batches of 256"),
    Column("saved_bytes", "bytes", "kept for backward, peak over training steps"),
    Column("trainings", "networks", "that were trained"),
    *(
        Column(f"ratio_{name}", "x single", f"{name} divided by that of `single` of the same seed")
        for name in RATIOS
    ),
    Column("network", "", "name of the network, with its options"),
    Column("device", "", "that the run was on"),
    Column("commit", "", "of the code that ran"),
)
UNCERTAINTY = (
    *_KEY_COLUMNS,
    Column(
        "images", "", "`test`, the name of a corruption of the test images, or of a set of foreign images"
    ),
    Column("severity", "1-5", "of the corruption; empty where there is none"),
    *ANSWERS,
    Column("auroc", "[0, 1]", "of telling these foreign images from test images by 1 - max probability"),
    Column("aupr", "[0, 1]", "area under the precision-recall curve, foreign images positive"),
    Column("fpr95", "[0, 1]", "share of test images taken for foreign when 95 % of the foreign ones are"),
)


@dataclass(frozen=True, eq=False)
class EnsembleReport:
    """The ensembles of one or more comparisons.

    Attributes:
        runs: one row per run: metrics on test images, diversity, costs, ratios to the single network.
        uncertainty: one row per run and set of images.
        reliability: one row per run and bin of confidence: ``count``, ``confidence``, ``accuracy``.
    """

    runs: pd.DataFrame
    uncertainty: pd.DataFrame
    reliability: pd.DataFrame

    @classmethod
    def from_records(cls, records: Iterable[Mapping[str, Any]]) -> EnsembleReport:
        """The report of records in memory, methods in the order in which they come.

        Raises:
            InputError: There is none, or (DamagedFileError) one of them is no record.
        """
        checked = list(records)
        for i, record in enumerate(checked):
            check_ensemble_record(record, f"record {i}")
        if not checked:
            raise InputError(
                "a report needs at least one record, got none; run `lifelong-ens ensemble` first"
            )
        labels = _method_labels(checked)
        runs = pd.DataFrame([_run(record, label) for record, label in zip(checked, labels, strict=True)])
        rows = [
            {**_key(record, label), **row}
            for record, label in zip(checked, labels, strict=True)
            for row in record["uncertainty"]
        ]
        bins = [
            {**_key(record, label), "bin": index, **dict(zip(record["reliability"], values, strict=True))}
            for record, label in zip(checked, labels, strict=True)
            for index, values in enumerate(zip(*record["reliability"].values(), strict=True))
        ]
        versions = sorted(name for name in runs.columns if name.startswith("version_"))
        runs = _with_ratios(runs).reindex(columns=[*names(RUNS), *versions])
        uncertainty = pd.DataFrame(rows).reindex(columns=names(UNCERTAINTY))
        return cls(runs, uncertainty, pd.DataFrame(bins))

    @classmethod
    def load(cls, out: str | os.PathLike[str]) -> EnsembleReport:
        """The report of ``out/records/*.json``; a damaged record is left out with a warning that names it.

        Raises:
            InputError: No record can be read.
        """
        return cls.from_records(load_ensemble_records(out))

    def headline(self) -> pd.DataFrame:
        """The table to print: strings, one row per method in first-seen order, under its data and setting."""
        rows, index = [], []
        groups: Any = self.runs.groupby(["data", "setting"], sort=False)
        for (data, _), group in groups:
            single = group[group["method"] == "single"].set_index("seed")["nll"]
            for method, own in group.groupby("method", sort=False):
                index.append((data, method))
                rows.append(_row(own, single))
        table = pd.DataFrame(rows, index=pd.MultiIndex.from_tuples(index, names=["data", "method"]))
        table = table.loc[:, (table != "–").any()]
        return table.droplevel("data") if len(groups) == 1 else table

    def columns(self) -> pd.DataFrame:
        """Every column of the tables: name, table, unit, meaning."""
        versions = [version_column(name) for name in self.runs.columns if name.startswith("version_")]
        documented = {"runs": (*RUNS, *versions), "uncertainty": UNCERTAINTY}
        rows = [
            (one.name, table, one.unit, one.meaning) for table, group in documented.items() for one in group
        ]
        return pd.DataFrame(rows, columns=pd.Index(["name", "table", "unit", "meaning"]))

    def write(self, out: str | os.PathLike[str]) -> list[Path]:
        """Write ``runs.csv``, ``uncertainty.csv``, ``summary.md`` and the plots into ``out``; returns their paths."""
        from lifelong_ens.report.ensemble_plots import draw_all

        plots = draw_all(self.runs, self.reliability)
        files = {
            f"{name}.csv": getattr(self, name).to_csv(index=False).encode()
            for name in ("runs", "uncertainty")
        }
        files |= {"summary.md": self._summary(plots).encode(), **plots}
        for name, data in files.items():
            write_bytes(Path(out) / name, data)
        return [Path(out) / name for name in files]

    def _summary(self, plots: Iterable[str]) -> str:
        parts = ["# Summary", markdown_table(self.headline().reset_index()), _NOTES.rstrip()]
        warned = self.runs.loc[self.runs["collapsed"] == True, "method"].unique()  # noqa: E712
        if len(warned):
            parts.append(
                f"**Collapsed**: the members of {', '.join(f'`{one}`' for one in warned)} are one network."
            )
        parts += [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in plots]
        parts.append("## Columns")
        for table, group in self.columns().groupby("table", sort=False):
            rows = zip(group["name"], group["unit"], group["meaning"], strict=True)
            items = [f"* `{name}`{f' ({unit})' if unit else ''}: {meaning}" for name, unit, meaning in rows]
            parts.append(f"### {table}.csv\n\n" + "\n".join(items))
        return "\n\n".join(parts) + "\n"


_NOTES = """\
* mean ± standard deviation over seeds; no ± where all seeds gave the same number or there was one seed.
* **NLL - single**: mean difference to the single network of the same seed, in nats; below 0 the ensemble is better.
* **ECE**: expected calibration error, 15 bins of equal width. **AUROC**: of telling foreign images by the ensemble's
  doubt, mean over the sets. **cAcc**, **cNLL**, **cECE**: means over corruptions and severities.
* **disagreement**: share of test images on which two members differ, divided by the members' mean error.
* **on disk**: tensors as they are saved. **FLOPs**: 1 multiply-add is 2; without the products of weights that are zero,
  which dense kernels compute all the same.
* **(1.10x)**: the ratio to `single`, one network, of the same seed. `single_equal_cost` is one network that was trained
  for as many FLOPs as all members of a deep ensemble.
"""


def _row(group: Any, single: Any) -> dict[str, str]:
    def values(name: str) -> list[float]:
        return [math.nan if value is None else float(value) for value in group[name]]

    difference = group.set_index("seed")["nll"] - single
    return {
        "members": f"{round(mean_and_std(values('num_members'))[0], 1):g}",
        "accuracy %": percent(values("accuracy")),
        "NLL": _number(values("nll")),
        "NLL - single": _signed([float(value) for value in difference.dropna()]),
        "ECE": _number(values("ece")),
        "AUROC %": percent(values("auroc")) if group["auroc"].notna().all() else "–",
        "cAcc %": percent(values("corrupted_accuracy")) if group["corrupted_accuracy"].notna().all() else "–",
        "cNLL": _number(values("corrupted_nll")),
        "cECE": _number(values("corrupted_ece")),
        "disagreement": _number(values("normalised_disagreement")),
        "on disk": with_ratio(quantity(values("bytes"), "B"), values("ratio_bytes")),
        "forward FLOPs": with_ratio(quantity(values("flops_effective")), values("ratio_flops_effective")),
        "training FLOPs": with_ratio(
            quantity(values("flops_training_effective")), values("ratio_flops_training_effective")
        ),
        "training time": duration(values("seconds_training")),
        "asking": duration(values("seconds_inference")),
    }


def _number(values: list[float]) -> str:
    """Three decimals, with the standard deviation over seeds."""
    mean, std = mean_and_std(values)
    if math.isnan(mean):
        return "–"
    return f"{mean:.3f}" if math.isnan(std) or len(set(values)) == 1 else f"{mean:.3f} ± {std:.3f}"


def _signed(values: list[float]) -> str:
    if not values:
        return "–"
    mean = mean_and_std(values)[0]
    return f"{mean:+.3f}" if abs(mean) >= 5e-4 else "0"


def _key(record: Mapping[str, Any], label: str) -> dict[str, Any]:
    return {
        "data": record["data"]["name"],
        "setting": record["setting"],
        "method": label,
        "seed": record["seed"],
    }


def _run(record: Mapping[str, Any], label: str) -> dict[str, Any]:
    rows = record["uncertainty"]
    test = next(row for row in rows if row["images"] == "test")
    bad = [row for row in rows if row.get("severity") is not None]
    foreign = [row["auroc"] for row in rows if row.get("auroc") is not None]
    options = ", ".join(
        f"{name}={value}" for name, value in flat(record["network"].get("options") or {}).items()
    )
    return {
        **_key(record, label),
        "num_members": record["num_members"],
        **{name: value for name, value in test.items() if name not in ("images", "severity")},
        **{name: record["diversity"].get(name) for name in DIVERSITY},
        **{
            new: sum(row[old] for row in bad) / len(bad) if bad else math.nan
            for old, new in CORRUPTED.items()
        },
        "auroc": sum(foreign) / len(foreign) if foreign else math.nan,
        "temperature": record.get("temperature"),
        **{name: record["cost"][name] for name in COST},
        **{_SPENT_COLUMNS[name]: record["spent"][name] for name in SPENT},
        "seconds_inference": record["seconds_inference"],
        "network": f"{record['network']['name']}({options})" if options else record["network"]["name"],
        "device": record["device"],
        "commit": record.get("commit"),
        **{f"version_{name}": value for name, value in record["versions"].items()},
    }


_SPENT_COLUMNS = {
    "flops": "flops_training",
    "flops_effective": "flops_training_effective",
    "seconds": "seconds_training",
    "saved_bytes": "saved_bytes",
    "trainings": "trainings",
}


def _with_ratios(runs: pd.DataFrame) -> pd.DataFrame:
    """Each cost divided by that of the single network of the same data, setting and seed."""
    keys = ["data", "setting", "seed"]
    table: Any = runs
    single = table[table["method"] == "single"].drop_duplicates(keys, keep="last").set_index(keys)
    wanted = pd.MultiIndex.from_frame(table[keys])
    for name in RATIOS:
        runs[f"ratio_{name}"] = runs[name].to_numpy(dtype=float) / single[name].reindex(wanted).to_numpy(
            dtype=float
        )
    return runs


def _method_labels(records: list[Mapping[str, Any]]) -> list[str]:
    """The method of each record, with those options that tell two of its kind in one setting apart."""
    by_name: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        options = flat(record["method"].get("options") or {})
        group = by_name.setdefault((record["setting"], record["method"]["name"]), [])
        if options not in group:
            group.append(options)
    labels = []
    for record in records:
        name, options = record["method"]["name"], flat(record["method"].get("options") or {})
        group = by_name[record["setting"], name]
        telling = [key for key in options if any(other.get(key) != options[key] for other in group)]
        # an option that the others leave at its default tells them apart too
        shown = ", ".join(f"{key}={options[key]}" for key in telling)
        labels.append(f"{name}({shown})" if shown else name)
    return labels
