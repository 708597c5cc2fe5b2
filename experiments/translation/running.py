"""From a declared table of translation to runs and a table in a folder."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from experiments.compare import choose_device
from experiments.engines import make_engine
from experiments.options import Owner, make_fit, of_owner, read_options
from experiments.plan import FIT_OWNER, parse_seeds
from experiments.run import check_writable, commit_here, device_name
from experiments.translation.setting import Row, Setting
from experiments.translation.table import NAME, SCHEMA, Table, load_records, read_record
from experiments.translation.text import Corpus, load_corpus
from experiments.translation.training import Task, build, members_of, scores, stored, train
from lifelong_ens.errors import DamagedFileError, InputError
from lifelong_ens.store import write_bytes, write_json
from lifelong_ens.training.fit import Fit

if TYPE_CHECKING:
    from experiments.reproduce.translation import Translation

log = logging.getLogger(__name__)

PACKAGES = ("tokenizers", "sacrebleu", "num2words", "babel")
# options of training that are for images, or that no row of a comparison by steps may have
NOT_FOR_TEXT = ("augment", "compile", "patience")


def reproduce(declared: Translation, given: Mapping[str, Any], rest: Sequence[str]) -> tuple[Table, Path]:
    """Run what has no record yet; write ``table.md``, ``table.csv`` and ``curves.csv`` beside the records.

    Args:
        declared: The table.
        given: ``quick``, ``seeds``, ``out``, ``device`` and ``force`` from the command line, None where not given.
        rest: The other arguments, options of ``Setting`` and of training.

    Returns:
        The table, and the folder that it was written to.

    Raises:
        InputError: Something given cannot be used, or a package is missing.
    """
    if make_engine(given) is not None:
        raise InputError("translation runs one network after the other; leave --jobs and --engine out.")
    setting, fit = read_setting(declared, rest, bool(given.get("quick")))
    seeds = declared.quick_seeds if given.get("quick") else declared.seeds
    seeds = parse_seeds(seeds if given.get("seeds") is None else given["seeds"])
    _require(PACKAGES)
    out = Path(given.get("out") or Path("results") / f"{NAME}{'-quick' if given.get('quick') else ''}")
    check_writable(out)
    device = choose_device(str(given.get("device") or "auto"))
    corpus = load_corpus(setting)
    task: Task | None = None
    for seed in seeds:
        for row in declared.rows:
            path = out / "records" / f"{record_name(row, setting, fit, corpus, seed)}.json"
            if not given.get("force") and _is_finished(path):
                log.info("%s seed %d: has a record, not repeated", row.label, seed)
                continue
            task = task or Task.of(corpus, setting)
            write_json(path, run_row(row, task, setting, fit, seed, device))
    table = Table.of(
        declared, load_records(out), setting_key(setting, fit, corpus), setting.target_perplexity
    )
    write_bytes(out / "table.md", table.markdown().encode())
    write_bytes(out / "table.csv", table.numbers().to_csv(index=False).encode())
    write_bytes(out / "curves.csv", table.curves().to_csv(index=False).encode())
    return table, out


def read_setting(declared: Translation, rest: Sequence[str], quick: bool) -> tuple[Setting, Fit]:
    """The declared options with those that were given.

    Raises:
        InputError: An option that there is not, or a value that it cannot have.
    """
    owners = [Owner(NAME, Setting), Owner(FIT_OWNER, Fit)]
    options = read_options(owners, rest, {})
    changed = (declared.quick_setting, declared.quick_fit) if quick else ({}, {})
    setting = Setting(**{**changed[0], **of_owner(owners[0], options)})
    fit = make_fit({**declared.fit, **changed[1], **of_owner(owners[1], options)})
    for name in NOT_FOR_TEXT:
        if getattr(fit, name) != getattr(Fit(), name):
            raise InputError(f"--{name} is not for translation; leave it out.")
    return setting, fit


def run_row(
    row: Row, task: Task, setting: Setting, fit: Fit, seed: int, device: torch.device
) -> dict[str, Any]:
    """Build, train and test one network; the record of it."""
    started = datetime.now(UTC).isoformat(timespec="milliseconds")
    network = build(row, setting, len(task.vocabulary), seed).to(device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        trained = train(network, task, setting, fit, seed, device, f"{row.label}, seed {seed}")
    corpus = task.corpus
    return {
        "schema": SCHEMA,
        "reproduction": NAME,
        "row": _run_of(row),
        "seed": seed,
        "setting": setting_key(setting, fit, corpus),
        "options": _shared(setting),
        "fit": fit.as_dict(),
        "text": {
            "about": corpus.about,
            "pairs": {split: len(sentences) for split, sentences in task.sentences.items()},
            "left_out": {
                **corpus.left_out,
                "too_long": len(corpus.splits["train"]) - len(task.sentences["train"]),
            },
            "sha256": corpus.sha256,
        },
        "vocabulary": {"size": len(task.vocabulary), "sha256": task.vocabulary.sha256},
        "members": members_of(network),
        "parameters": stored(network),
        **trained,
        **scores(network, task, setting, device),
        "versions": {package: version(package) for package in ("lifelong-ens", "torch", *PACKAGES)},
        "commit": commit_here(),
        "device": device_name(device),
        "started": started,
        "finished": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }


def record_name(row: Row, setting: Setting, fit: Fit, corpus: Corpus, seed: int) -> str:
    """Readable, and different for different runs."""
    kind = "single" if row.num_members == 1 else "batch_ensemble"
    return f"{NAME}-{kind}-{seed}-{_digest([setting_key(setting, fit, corpus), _run_of(row)])}"


def setting_key(setting: Setting, fit: Fit, corpus: Corpus) -> str:
    """8 hex digits that are the same for runs that may be compared: same text, network and training."""
    return _digest([_shared(setting), fit.as_dict(), corpus.sha256])


def _shared(setting: Setting) -> dict[str, Any]:
    """The options that a run depends on: not where its text lies, nor what its steps are counted to."""
    options = dataclasses.asdict(setting)
    return {name: value for name, value in options.items() if name not in ("root", "target_perplexity")}


def _run_of(row: Row) -> dict[str, Any]:
    """What a row runs, without how the table shows it."""
    if row.num_members == 1:
        return {"num_members": 1}
    return {"num_members": row.num_members, "members_in": row.members_in, "init": row.init}


def _digest(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def _is_finished(path: Path) -> bool:
    try:
        return path.exists() and bool(read_record(path))
    except DamagedFileError as error:
        log.warning("running again: %s", error)
        return False


def _require(packages: Sequence[str]) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise InputError(f"translation needs {', '.join(missing)}: pip install 'lifelong-ens[translation]'.")
