from __future__ import annotations

from itertools import islice

import pytest
import torch

from experiments.translation.text import Pairs
from experiments.translation.tokens import END, PAD, POOL, START, Sentences, Vocabulary
from lifelong_ens.errors import InputError

TEXTS = ["seven hundred and one", "siebenhunderteins", "seven hundred euros", "siebenhundert Euro"] * 20


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(TEXTS, 290)


def test_text_comes_back_as_it_was(vocabulary: Vocabulary) -> None:
    texts = [*TEXTS[:4], "Grüße, 1.234,50 €!", "日本 🙂", "a</s>b <pad> <s>", "two  spaces"]
    rows = vocabulary.encode(texts)
    assert all(row[-1] == END and not {PAD, START, END} & set(row[:-1]) for row in rows)
    assert vocabulary.decode(rows) == texts
    # what stands after the end is not read
    assert vocabulary.decode([[*rows[0], *rows[1], PAD, PAD]]) == texts[:1]
    assert vocabulary.encode(["u\u0308ber"]) == vocabulary.encode(["\u00fcber"])


def test_what_is_frequent_in_training_is_one_token(vocabulary: Vocabulary) -> None:
    assert len(vocabulary.encode(["siebenhundert"])[0]) == 2
    assert len(vocabulary.encode(["rebuhtneib"])[0]) > 8
    assert len(vocabulary) == 290


def test_the_same_text_gives_the_same_vocabulary(vocabulary: Vocabulary) -> None:
    assert Vocabulary(TEXTS, 290).sha256 == vocabulary.sha256
    assert Vocabulary(TEXTS, 280).sha256 != vocabulary.sha256


def sentences(lengths: list[int]) -> Sentences:
    """Row i holds the token 3 + i."""
    rows = [[3 + i] * length + [END] for i, length in enumerate(lengths)]
    return Sentences(rows, rows)


def test_a_batch_is_padded_and_begins_with_the_start() -> None:
    source, target = sentences([1, 3]).batch([0, 1])
    assert source.tolist() == [[3, END, PAD, PAD], [4, 4, 4, END]]
    assert target.tolist() == [[START, 3, END, PAD, PAD], [START, 4, 4, 4, END]]


def test_an_epoch_has_every_pair_once_and_like_lengths_together() -> None:
    lengths = [1 + (7 * i) % 30 for i in range(2 * POOL + 5)]
    text = sentences(lengths)
    batches = text.epochs(2, torch.Generator().manual_seed(0))
    steps = -(-len(text) // 2)
    orders = []
    for _ in range(2):
        epoch = list(islice(batches, steps))
        firsts = [int(row[0]) - 3 for source, _ in epoch for row in source]
        assert sorted(firsts) == list(range(len(text)))
        orders.append(firsts)
        spans = [
            abs(lengths[one] - lengths[other]) for one, other in zip(firsts[::2], firsts[1::2], strict=False)
        ]
        assert sum(spans) / len(spans) < 2
    assert orders[0] != orders[1]
    again = islice(text.epochs(2, torch.Generator().manual_seed(0)), steps)
    assert [int(row[0]) - 3 for source, _ in again for row in source] == orders[0]


def test_by_length_has_every_row_once() -> None:
    rows = list(sentences([5, 1, 4, 1, 3]).by_length(2))
    assert rows == [[1, 3], [4, 2], [0]]


def test_long_pairs_are_left_out() -> None:
    text = sentences([1, 9, 3])
    assert text.up_to(4).source == [text.source[0], text.source[2]]
    with pytest.raises(InputError, match="max_tokens 1"):
        text.up_to(1)


def test_pairs_become_ids(vocabulary: Vocabulary) -> None:
    text = Sentences.of(Pairs(("seven",), ("sieben",)), vocabulary)
    assert vocabulary.decode(text.source) == ["seven"]
    assert vocabulary.decode(text.target) == ["sieben"]
