"""English phrases and their German ones as num2words and Babel (CLDR) write them: numbers, dates, amounts, units.

Real formatting rules of both languages, and no more than that: it is not prose, and a network that learns it does
not translate sentences.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import date, datetime, timedelta
from itertools import cycle
from typing import Any

LANGUAGES = ("en", "de")
ABOUT = "phrases of numbers, dates, amounts and units that num2words and Babel write in English and German"
UNITS = (
    "length-kilometer",
    "length-meter",
    "length-centimeter",
    "mass-kilogram",
    "mass-gram",
    "mass-tonne",
    "volume-liter",
    "area-hectare",
    "area-square-kilometer",
    "speed-kilometer-per-hour",
    "speed-meter-per-second",
    "temperature-celsius",
    "duration-second",
    "duration-minute",
    "duration-hour",
    "duration-day",
    "duration-week",
    "duration-month",
    "duration-year",
    "energy-kilowatt-hour",
    "power-watt",
)
CURRENCIES = ("EUR", "USD", "GBP", "CHF")

Write = Callable[[str], str]
Kind = Callable[[random.Random], Write]


def phrases(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """``count`` pairs with no English phrase twice; a longer list begins with a shorter one's pairs.

    Args:
        count: How many.
        seed: Of the choice of numbers, dates and units.
    """
    generator = random.Random(seed)
    pairs: dict[str, str] = {}
    for kind in cycle(_KINDS):
        if len(pairs) >= count:
            break
        english, german = (_plain(text) for text in map(kind(generator), LANGUAGES))
        pairs.setdefault(english, german)
    return list(pairs.items())


def _plain(text: str) -> str:
    """With ordinary spaces in place of CLDR's narrow and unbreakable ones."""
    return " ".join(text.split())


def _words(value: float, language: str, **options: Any) -> str:
    from num2words import num2words

    return num2words(value, lang=language, **options)


def _integer(generator: random.Random) -> int:
    """As many of few digits as of many."""
    return generator.randrange(10 ** generator.randint(1, 6))


def _day(generator: random.Random) -> date:
    return date(1900, 1, 1) + timedelta(days=generator.randrange(73_000))


def _number(generator: random.Random) -> Write:
    value = _integer(generator)
    return lambda language: _words(value, language)


def _ordinal(generator: random.Random) -> Write:
    value = 1 + _integer(generator)
    return lambda language: _words(value, language, to="ordinal")


def _year(generator: random.Random) -> Write:
    value = generator.randrange(1000, 2100)
    return lambda language: _words(value, language, to="year")


def _decimal(generator: random.Random) -> Write:
    value = generator.randrange(100_000) / 100
    return lambda language: _words(value, language)


def _amount(generator: random.Random) -> Write:
    value, currency = generator.randrange(1_000_000) / 100, generator.choice(CURRENCIES[:3])
    return lambda language: _words(value, language, to="currency", currency=currency)


def _list(generator: random.Random) -> Write:
    values = [generator.randrange(1000) for _ in range(generator.randint(2, 4))]

    def write(language: str) -> str:
        from babel.lists import format_list

        return format_list([_words(value, language) for value in values], locale=language)

    return write


def _date(generator: random.Random) -> Write:
    day, style = _day(generator), generator.choice(["full", "long", "medium"])

    def write(language: str) -> str:
        from babel.dates import format_date

        return format_date(day, style, locale=language)

    return write


def _moment(generator: random.Random) -> Write:
    day = _day(generator)
    moment = datetime(day.year, day.month, day.day, generator.randrange(24), generator.randrange(60))

    def write(language: str) -> str:
        from babel.dates import format_date, format_time

        return f"{format_date(moment, 'full', language)}, {format_time(moment, 'short', locale=language)}"

    return write


def _interval(generator: random.Random) -> Write:
    start = _day(generator)
    stop = start + timedelta(days=generator.randint(1, 100))

    def write(language: str) -> str:
        from babel.dates import format_interval

        return format_interval(start, stop, "yMMMd", locale=language)

    return write


def _price(generator: random.Random) -> Write:
    value = generator.randrange(10 ** generator.randint(3, 8)) / 100
    currency, named = generator.choice(CURRENCIES), generator.random() < 0.5

    def write(language: str) -> str:
        from babel.numbers import format_currency

        return format_currency(value, currency, locale=language, format_type="name" if named else "standard")

    return write


def _measure(generator: random.Random) -> Write:
    value, unit = generator.randrange(10 ** generator.randint(2, 6)) / 10, generator.choice(UNITS)

    def write(language: str) -> str:
        from babel.units import format_unit

        return format_unit(value, unit, "long", locale=language)

    return write


_KINDS: tuple[Kind, ...] = (
    _number,
    _ordinal,
    _year,
    _decimal,
    _amount,
    _list,
    _date,
    _moment,
    _interval,
    _price,
    _measure,
)
