from __future__ import annotations

import random

import pytest

from experiments.translation import phrases
from experiments.translation.phrases import phrases as make


def test_the_same_phrases_every_time_and_none_twice() -> None:
    pairs = make(3000)
    assert pairs == make(3000)
    assert pairs[:1000] == make(1000)
    assert pairs != make(3000, seed=1)
    assert len({english for english, _ in pairs}) == len(pairs) == 3000
    assert all(text == " ".join(text.split()) and text for pair in pairs for text in pair)


class Fixed(random.Random):
    """Draws the largest, or what was given."""

    def __init__(self, *values: int) -> None:
        super().__init__(0)
        self.values = list(values)

    def randrange(self, *args: int) -> int:  # type: ignore[override]
        return self.values.pop(0)

    def randint(self, a: int, b: int) -> int:
        return self.values.pop(0)

    def choice(self, seq):  # type: ignore[no-untyped-def, override]
        return seq[0]


@pytest.mark.parametrize(
    ("kind", "drawn", "english", "german"),
    [
        (phrases._number, [3, 342], "three hundred and forty-two", "dreihundertzweiundvierzig"),
        (phrases._ordinal, [2, 20], "twenty-first", "einundzwanzigste"),
        (phrases._year, [1985], "nineteen eighty-five", "neunzehnhundertfünfundachtzig"),
        (phrases._decimal, [2708], "twenty-seven point zero eight", "siebenundzwanzig Komma null acht"),
        (
            phrases._amount,
            [2135],
            "twenty-one euro, thirty-five cents",
            "einundzwanzig Euro und fünfunddreißig Cent",
        ),
        (phrases._list, [3, 3, 17, 90], "three, seventeen, and ninety", "drei, siebzehn und neunzig"),
        (phrases._date, [46345], "Saturday, November 21, 2026", "Samstag, 21. November 2026"),
        (
            phrases._moment,
            [46345, 15, 45],
            "Saturday, November 21, 2026, 3:45 PM",
            "Samstag, 21. November 2026, 15:45",
        ),
        (phrases._measure, [2, 125], "12.5 kilometers", "12,5 Kilometer"),
    ],
)
def test_what_the_libraries_write(kind, drawn: list[int], english: str, german: str) -> None:
    write = kind(Fixed(*drawn))
    assert [phrases._plain(write(language)) for language in phrases.LANGUAGES] == [english, german]


def test_prices_are_written_as_each_language_does() -> None:
    found = dict(make(2000))
    prices = {english: german for english, german in found.items() if english.startswith("€")}
    assert len(prices) > 10
    for english, german in prices.items():
        swapped = english[1:].translate(str.maketrans(",.", ".,"))
        assert german == f"{swapped} €"
