from __future__ import annotations

from pathlib import Path

import pytest

from experiments.translation.setting import Setting
from experiments.translation.text import SPLITS, load_corpus, read_pairs
from lifelong_ens.errors import InputError


def write(folder: Path, **texts: str | bytes) -> Path:
    """Files named as keywords, ``train_en``; the others have two lines."""
    for split in SPLITS:
        for language in ("en", "de"):
            text = texts.get(f"{split}_{language}", f"{split} one {language}\n{split} two {language}\n")
            data = text if isinstance(text, bytes) else text.encode()
            (folder / f"{split}.{language}").write_bytes(data)
    return folder


def test_line_n_belongs_to_line_n(tmp_path: Path) -> None:
    corpus = load_corpus(Setting(root=write(tmp_path)))
    assert corpus.splits["valid"].source == ("valid one en", "valid two en")
    assert corpus.splits["valid"].target == ("valid one de", "valid two de")
    turned = load_corpus(Setting(root=tmp_path, source="de", target="en"))
    assert turned.splits["test"].source == corpus.splits["test"].target
    assert turned.sha256 != corpus.sha256


def test_only_line_feeds_end_lines(tmp_path: Path) -> None:
    write(tmp_path, train_en="a\u2028b\x85c\x0bd\nsecond\n", train_de="\ufeffeins\r\nzwei")
    pairs, left_out = read_pairs(tmp_path / "train.en", tmp_path / "train.de")
    assert pairs.source == ("a\u2028b\x85c\x0bd", "second")
    assert pairs.target == ("eins", "zwei")
    assert left_out == 0


def test_pairs_with_an_empty_side_are_left_out_and_counted(tmp_path: Path) -> None:
    write(tmp_path, train_en="a\n\nc\nd\ne\n", train_de="A\nB\n \nD\nE\n")
    corpus = load_corpus(Setting(root=tmp_path, limit=4))
    assert corpus.splits["train"].source == ("a", "d")
    assert corpus.splits["train"].target == ("A", "D")
    assert corpus.left_out == {"train": 2, "valid": 0, "test": 0}


def test_where_the_files_lie_is_no_part_of_the_text(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    first, second = (load_corpus(Setting(root=write(folder))) for folder in folders)
    assert first.sha256 == second.sha256


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"train_en": "one\n"}, r"train\.en has 1 lines and .*train\.de 2"),
        ({"valid_de": ""}, r"valid\.de is empty"),
        ({"valid_de": "\n \n"}, r"valid\.de is empty"),
        ({"test_en": "good\nb\u00e4d\n".encode("latin-1")}, r"test\.en is not UTF-8, see line 2.*iconv"),
        ({"train_en": "a\n\n", "train_de": "\nb\n"}, "no line of .* has a translation"),
    ],
)
def test_text_that_cannot_be_used(texts: dict[str, str | bytes], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as error:
        load_corpus(Setting(root=write(tmp_path, **texts)))
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "valid.de").unlink()
    with pytest.raises(InputError, match=r"no .*valid\.de; --root.*train\.de, valid\.de, test\.de"):
        load_corpus(Setting(root=tmp_path))


def test_the_phrases_are_split_without_overlap() -> None:
    corpus = load_corpus(Setting())
    assert {split: len(pairs) for split, pairs in corpus.splits.items()} == {
        "train": 24_000,
        "valid": 500,
        "test": 500,
    }
    sources = [source for pairs in corpus.splits.values() for source in pairs.source]
    assert len(set(sources)) == 25_000
    small = load_corpus(Setting(limit=100))
    assert small.splits["train"].source == corpus.splits["train"].source[:100]
    assert small.splits["test"] == corpus.splits["test"]
    with pytest.raises(InputError, match="from en to de, not de to en"):
        load_corpus(Setting(source="de", target="en"))


@pytest.mark.parametrize(
    "options",
    [
        {"vocabulary_size": 258},
        {"evaluate_every": 0},
        {"limit": 0},
        {"max_tokens": 1},
        {"label_smoothing": 1.0},
        {"target_perplexity": 1.0},
        {"source": "de"},
    ],
)
def test_settings_that_cannot_be(options: dict[str, object]) -> None:
    (name,) = options
    with pytest.raises(InputError, match=name):
        Setting(**options)  # type: ignore[arg-type]
