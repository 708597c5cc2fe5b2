"""Line-aligned text of two languages: from files, or the phrases that need none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from experiments.translation import phrases
from experiments.translation.setting import Setting
from lifelong_ens.errors import InputError

SPLITS = ("train", "valid", "test")
# pairs of phrases; all English phrases differ, so that no pair is in two splits
PHRASES = {"train": 24_000, "valid": 500, "test": 500}


@dataclass(frozen=True)
class Pairs:
    """Sentences and their translations, in the same order."""

    source: tuple[str, ...]
    target: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.source)


@dataclass(frozen=True)
class Corpus:
    """Text to train on, to look at in training, and to test on.

    Attributes:
        splits: ``train``, ``valid`` and ``test``.
        about: What text it is.
        left_out: Pairs of each split with an empty side, which are not in it.
    """

    splits: Mapping[str, Pairs]
    about: str
    left_out: Mapping[str, int]

    @property
    def sha256(self) -> str:
        """Of all its text; where the files lie is no part of it."""
        text = [[pairs.source, pairs.target] for pairs in self.splits.values()]
        return hashlib.sha256(json.dumps(text).encode()).hexdigest()


def load_corpus(setting: Setting) -> Corpus:
    """The text that a setting asks for.

    Raises:
        InputError: A file is missing, empty, not UTF-8, or has another number of lines than its translation.
    """
    if setting.root is None:
        return _phrases(setting)
    splits, left_out = {}, {}
    for split in SPLITS:
        paths = [setting.root / f"{split}.{language}" for language in (setting.source, setting.target)]
        limit = setting.limit if split == "train" else None
        splits[split], left_out[split] = read_pairs(paths[0], paths[1], limit)
    return Corpus(splits, f"{setting.source}-{setting.target} text of files", left_out)


def read_pairs(source: Path, target: Path, limit: int | None = None) -> tuple[Pairs, int]:
    """The first ``limit`` pairs of lines with something on both sides, and how many had not.

    Raises:
        InputError: As in ``load_corpus``.
    """
    first, second = read_lines(source), read_lines(target)
    if len(first) != len(second):
        raise InputError(
            f"{source} has {len(first)} lines and {target} {len(second)}; line n of one is to be the translation of "
            "line n of the other."
        )
    both = list(zip(first, second, strict=True))[:limit]
    kept = [(one, other) for one, other in both if one and other]
    if not kept:
        raise InputError(f"no line of {source} has a translation in {target}: one side is always empty.")
    return Pairs(*map(tuple, zip(*kept, strict=True))), len(both) - len(kept)


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, without the white space around them.

    Raises:
        InputError: There is no such file, it is empty or not UTF-8.
    """
    if not path.is_file():
        names = ", ".join(f"{split}{path.suffix}" for split in SPLITS)
        raise InputError(
            f"there is no {path}; --root names the folder that holds {names} and their translations."
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(
            f"{path} is not UTF-8, see line {line}; convert it, as with iconv -t UTF-8."
        ) from error
    # not splitlines, which also breaks at characters that stand inside sentences of real corpora, on one side only
    lines = [line.strip() for line in text.removesuffix("\n").split("\n")]
    if not any(lines):
        raise InputError(f"{path} is empty.")
    return lines


def _phrases(setting: Setting) -> Corpus:
    if (setting.source, setting.target) != phrases.LANGUAGES:
        raise InputError(
            f"the phrases are from en to de, not {setting.source} to {setting.target}; name text with --root DIR."
        )
    wanted = {**PHRASES, "train": min(setting.limit or PHRASES["train"], PHRASES["train"])}
    pairs, splits = phrases.phrases(sum(wanted.values())), {}
    # the same validation and test phrases whatever the limit
    for split in ("valid", "test", "train"):
        chosen, pairs = pairs[: wanted[split]], pairs[wanted[split] :]
        splits[split] = Pairs(*map(tuple, zip(*chosen, strict=True)))
    return Corpus({split: splits[split] for split in SPLITS}, phrases.ABOUT, dict.fromkeys(SPLITS, 0))
