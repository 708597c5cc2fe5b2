"""The table of translation, made from records: ours beside the published numbers, and what differs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from experiments.options import make_fit
from experiments.translation.setting import Row, Setting
from lifelong_ens.errors import DamagedFileError, InputError
from lifelong_ens.report.headline import duration, mean_and_std, quantity, with_ratio
from lifelong_ens.report.markdown import markdown_table
from lifelong_ens.store import read_json

if TYPE_CHECKING:
    from experiments.reproduce.translation import Translation

NAME, SCHEMA = "translation", 1
_UNKNOWN = "–"
_NETWORK = ("width", "heads", "layers", "dropout", "label_smoothing")
_PACKAGES = ("torch", "num2words", "babel")
_TRAINING = ("epochs", "batch_size", "optimizer", "learning_rate", "schedule", "warmup_epochs", "clip_norm")

Record = Mapping[str, Any]


def load_records(folder: Path) -> list[Record]:
    """All records of translation under ``folder``, by file name.

    Raises:
        DamagedFileError: A file is not such a record.
    """
    return [read_record(path) for path in sorted((folder / "records").glob("*.json"))]


def read_record(path: Path) -> Record:
    """One record.

    Raises:
        DamagedFileError: The file is not a record of translation, or of a later version.
    """
    record = read_json(path)
    if (
        not isinstance(record, Mapping)
        or record.get("reproduction") != NAME
        or record.get("schema") != SCHEMA
    ):
        raise DamagedFileError(f"{path} is not a record of translation that this version reads; move it away")
    return record


@dataclass(frozen=True, eq=False)
class Table:
    """The table of one setting.

    Attributes:
        declared: What was declared, at full settings.
        records: One for each row and seed that has run.
        target: The validation perplexity that steps are counted to; None for the first row's best, seed by seed.
    """

    declared: Translation
    records: Sequence[Record]
    target: float | None = None

    @classmethod
    def of(
        cls,
        declared: Translation,
        records: Sequence[Record],
        setting: str | None = None,
        target: float | None = None,
    ) -> Table:
        """The table of the runs in one setting, that of the newest if not given; other records are left out.

        Raises:
            InputError: There are no records.
        """
        if not records:
            raise InputError(f"there are no records of {NAME}; run lifelong-ens reproduce {NAME} first")
        setting = setting or max(records, key=lambda record: str(record["started"]))["setting"]
        return cls(declared, [record for record in records if record["setting"] == setting], target)

    def markdown(self) -> str:
        """The whole of ``table.md``."""
        notes = "\n".join(f"* {note}" for note in self.declared.notes)
        return f"# {self.declared.name}: {self.declared.summary}\n\n{self.block()}\n\n{notes}\n"

    def block(self) -> str:
        """The table and the setting it is of, without title and notes; what README shows."""
        other = list(self._other_than_declared())
        warning = f"**Not at full settings:** {', '.join(other)}. " if other else ""
        spread = " ± is a standard deviation over seeds." if len(self._seeds()) > 1 else ""
        source = f"Published: {self.declared.source}."
        return f"{markdown_table(self.strings())}\n\n{warning}{source} Ours: {self._setting()}{spread}"

    def numbers(self) -> pd.DataFrame:
        """One line for each run: what was measured, and its steps to the target (NaN where it never came there)."""
        lines = []
        for row in self.declared.rows:
            for record in self._of(row):
                target = self._target(record["seed"])
                lines.append(
                    {
                        "row": row.label,
                        "seed": record["seed"],
                        "parameters": sum(record["parameters"].values()),
                        "valid_perplexity": best(record)["perplexity"],
                        "valid_perplexity_member": best(record)["perplexity_member"],
                        "best_step": best(record)["step"],
                        "target_perplexity": target,
                        "steps_to_target": steps_to(record, target),
                        "test_perplexity": record["test_perplexity"],
                        "test_perplexity_member": record["test_perplexity_member"],
                        "bleu": record["bleu"],
                        "exact": record["exact"],
                        "flops_training": record["flops_training"],
                        "seconds_training": record["seconds_training"],
                        "seconds_translating": record["seconds_translating"],
                    }
                )
        return pd.DataFrame(lines)

    def curves(self) -> pd.DataFrame:
        """Loss and validation perplexity at every look of every run."""
        return pd.DataFrame(
            [
                {"row": row.label, "seed": record["seed"], **point}
                for row in self.declared.rows
                for record in self._of(row)
                for point in record["curve"]
            ]
        )

    def strings(self) -> pd.DataFrame:
        """The cells as people read them."""
        numbers = self.numbers()
        groups: list[Any] = [numbers[numbers["row"] == row.label] for row in self.declared.rows]
        return pd.DataFrame(
            [
                self._cells(row, group, groups[0])
                for row, group in zip(self.declared.rows, groups, strict=True)
            ]
        )

    def _cells(self, row: Row, group: pd.DataFrame, first: pd.DataFrame) -> dict[str, str]:
        def shown(name: str, decimals: int, scale: float = 1.0) -> str:
            return _mean_std([scale * value for value in group[name]], decimals)

        def ratio(name: str) -> list[float]:
            pairs = group.merge(first, on="seed")
            return [math.nan] if pairs.empty else list(pairs[f"{name}_x"] / pairs[f"{name}_y"])

        def cost(name: str, show: Any) -> str:
            return with_ratio(show(list(group[name])), ratio(name)) if len(group) else _UNKNOWN

        goal = f"`{self.declared.rows[0].label}`'s best" if self.target is None else f"{self.target:g}"
        published = row.published_perplexity
        return {
            "network": row.label,
            "parameters": cost("parameters", quantity),
            "validation perplexity": shown("valid_perplexity", 3),
            "published": _UNKNOWN if published is None else f"{published:.2f}",
            "a member's": shown("valid_perplexity_member", 3),
            f"steps to {goal}": _steps(list(group["steps_to_target"]), ratio("steps_to_target")),
            "published steps": row.published_steps,
            "test perplexity": shown("test_perplexity", 3),
            "BLEU": shown("bleu", 1),
            "exact %": shown("exact", 1, 100),
            "training FLOPs": cost("flops_training", quantity),
            "training time": cost("seconds_training", duration),
        }

    def _of(self, row: Row) -> list[Record]:
        """The row's runs, by seed."""
        ours = [record for record in self.records if _runs(row, record["row"])]
        return sorted(ours, key=lambda record: record["seed"])

    def _seeds(self) -> list[int]:
        return sorted({record["seed"] for record in self.records})

    def _target(self, seed: int) -> float:
        if self.target is not None:
            return self.target
        first = [record for record in self._of(self.declared.rows[0]) if record["seed"] == seed]
        return best(first[0])["perplexity"] if first else math.nan

    def _setting(self) -> str:
        record, seeds = self.records[0], self._seeds()
        text, options, fit, versions = (record[name] for name in ("text", "options", "fit", "versions"))
        parts = [
            f"{text['about']}, {text['pairs']['train']} training pairs and {record['vocabulary']['size']} tokens",
            ", ".join(f"{name} {options[name]}" for name in _NETWORK),
            ", ".join(f"{name} {fit[name]}" for name in _TRAINING),
            f"{record['curve'][-1]['step']} steps",
            f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}",
            f"{record['device']}, " + ", ".join(f"{name} {versions[name]}" for name in _PACKAGES),
        ]
        return f"{'; '.join(parts)}."

    def _other_than_declared(self) -> Iterator[str]:
        """What these runs were given instead of the declared settings."""
        record = self.records[0]
        pairs = [(asdict(Setting()), record["options"]), (asdict(make_fit(self.declared.fit)), record["fit"])]
        for declared, given in pairs:
            for name, value in given.items():
                if value != declared[name]:
                    yield f"{name} {value}" + (
                        "" if declared[name] is None else f" instead of {declared[name]}"
                    )
        if len(self._seeds()) != self.declared.seeds:
            yield f"seeds {len(self._seeds())} instead of {self.declared.seeds}"


def best(record: Record) -> Mapping[str, Any]:
    """The look at the validation text with the lowest perplexity, the first of equal ones."""
    return min(record["curve"], key=lambda point: point["perplexity"])


def steps_to(record: Record, target: float) -> float:
    """The first step at which validation perplexity was seen at or below the target; NaN if it never was."""
    reached = [point["step"] for point in record["curve"] if point["perplexity"] <= target]
    return min(reached, default=math.nan)


def _steps(steps: Sequence[float], ratios: Sequence[float]) -> str:
    """How many, with the ratio to the first row; or that the target was not reached."""
    missed = sum(map(math.isnan, steps))
    if missed:
        return "not reached" if missed == len(steps) else f"not reached by {missed} of {len(steps)} seeds"
    return with_ratio(_mean_std(steps, 0), ratios)


def _runs(row: Row, run: Mapping[str, Any]) -> bool:
    """Whether a record is of this row; a single network has no options of members."""
    return all(getattr(row, name) == value for name, value in run.items())


def _mean_std(values: Sequence[float], decimals: int) -> str:
    """``mean ± std``, without ± for one value; a dash where a value is not known."""
    if not values or any(map(math.isnan, values)):
        return _UNKNOWN
    mean, std = mean_and_std(values)
    return f"{mean:.{decimals}f}" if math.isnan(std) else f"{mean:.{decimals}f} ± {std:.{decimals}f}"
