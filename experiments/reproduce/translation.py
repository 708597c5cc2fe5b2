"""BatchEnsemble of four on the self-attention of a Transformer that translates, against the Transformer alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.reproduce.declaration import Options, Shown
from experiments.translation.setting import Row
from lifelong_ens.errors import InputError


@dataclass(frozen=True)
class Translation:
    """A table of translation: networks, text and training, what was published, and how the two settings differ.

    Attributes:
        name: On the command line.
        summary: One line.
        source: Where the published numbers stand.
        rows: In the order of the table; the first is what the others are compared with.
        fit: Options of training, the same for all rows.
        seeds: How many.
        quick_setting: What ``--quick`` changes of the defaults of text and network.
        quick_fit: What ``--quick`` changes of ``fit``.
        quick_seeds: How many seeds ``--quick`` has.
        notes: A sentence for each thing that differs from the published setting, or that one must know.
        options: Whose options it takes beside those of training.
    """

    name: str
    summary: str
    source: str
    rows: tuple[Row, ...]
    fit: Options
    seeds: int
    quick_setting: Options
    quick_fit: Options
    quick_seeds: int
    notes: tuple[str, ...]
    options: str = "experiments.translation.setting:Setting"

    def run(self, given: Mapping[str, Any], rest: Sequence[str]) -> tuple[Shown, Path]:
        """See ``experiments.translation.running.reproduce``."""
        from experiments.translation.running import reproduce

        return reproduce(self, given, rest)

    def dry_run(self, given: Mapping[str, Any], rest: Sequence[str]) -> str:
        """Refused: nothing counts the steps of a translation ahead.

        Raises:
            InputError: Always; the line says what to do.
        """
        raise InputError("translation has no dry run; leave out --dry_run, or take the smaller --quick.")

    def table_of(self, folder: Path) -> Shown:
        """The table of the newest runs whose records are in ``folder``."""
        from experiments.translation.table import Table, load_records

        return Table.of(self, load_records(folder))


REPRODUCTION = Translation(
    name="translation",
    summary="BatchEnsemble of 4 on a Transformer's self-attention: perplexity, BLEU and steps to a perplexity",
    source="Wen, Tran and Ba, submission to ICLR 2020 (OpenReview Sklf1yrYDr), Table 1 and section 4.2: WMT16 "
    "English-German, Transformer big, validation perplexity on newstest2013",
    rows=(
        Row("single", published_perplexity=4.30, published_steps="1x"),
        Row("batch_ensemble of 4", 4, published_perplexity=4.26, published_steps="about 1/1.5x"),
    ),
    fit={
        "epochs": 3,
        "batch_size": 64,
        "optimizer": "adam",
        "learning_rate": 0.003,
        "weight_decay": 0.0,
        "warmup_epochs": 0.3,
        "clip_norm": 1.0,
    },
    seeds=3,
    quick_setting={"limit": 6000},
    quick_fit={"epochs": 6},
    quick_seeds=1,
    notes=(
        "Without `--root` the text is not WMT: it is 24,000 phrases of numbers, dates, amounts and units as num2words "
        "and Babel (CLDR) write them in English and German, 500 more for validation and 500 for the test, no English "
        "phrase twice. Both libraries follow the real rules of both languages, but it is not prose, and perplexity "
        "and BLEU of it cannot be compared with the published ones.",
        "The published network is Transformer big, with 213 million parameters, on about 30,000 tokens a step; here it "
        "has two layers of width 64, for two cores and minutes. `--root DIR` with `train.en`, `train.de`, `valid.*` "
        "and `test.*`, and `--width`, `--layers`, `--vocabulary_size`, `--batch_size`, `--epochs`, come nearer to it.",
        "As published, all self-attention has members and everything else, cross-attention included, is shared; fast "
        "weights start as random signs; both rows have the same training, step by step.",
        "Each member sees every pair of a step, as in the authors' later code, so a step of 4 members costs about 4 "
        "steps of one; fewer steps are not less computation. Dropout differs between the members, so that the shared "
        "weights also see each pair under four masks a step, which by itself may speed learning up.",
        "Perplexity is of one token of our vocabulary, the end token included, of the probabilities averaged over "
        "members; `a member's` is the geometric mean of theirs. Weights are those of the step with the best "
        "validation perplexity.",
        "BLEU is sacrebleu's, of greedy translations in which members' probabilities are averaged at every token; its "
        "signature is in the records. Many phrases are shorter than four words. `exact` is the share of translations "
        "equal to the reference.",
        "Training times were taken on two cores that had much other work to do, and mean little; FLOPs are exact.",
        "The paper says that BLEU rises faster with BatchEnsemble, and is not necessarily better in the end.",
    ),
)
