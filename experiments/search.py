"""What ``tune`` searches: how a range or a choice is written, and what is searched where nothing is said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lifelong_ens.errors import InputError, nearest

if TYPE_CHECKING:
    from experiments.options import Owner

# An option under its own name is searched for every strategy that takes it, each by itself. Every default value is
# in its range, for the first trial. Nothing here shares out capacity among tasks, such as packnet.prune: the first
# tasks cannot tell what later ones need.
DEFAULT_SEARCH: dict[str, str] = {
    "learning_rate": "log:0.0003:0.3",
    "batch_ensemble.init": "null,gaussian,ones",
    "batch_ensemble.fast_learning_rate": "null,0.003,0.03,0.3",
    "supsup.score_learning_rate": "null,0.003,0.03,0.3",
    "structured_ensemble.mask_learning_rate": "log:0.0001:0.1",
}
FORMS = "log:LOW:HIGH, LOW:HIGH or A,B,C"


@dataclass(frozen=True)
class Space:
    """Where one option is searched: between ``low`` and ``high``, both included, or among ``choices``.

    Attributes:
        text: As it was written.
        low: Of the type of the option, integers stay integers.
        high: Above ``low``.
        log: Whether every factor, not every difference, is as likely as another.
        choices: Empty for a range.
    """

    text: str
    low: float = 0
    high: float = 0
    log: bool = False
    choices: tuple[Any, ...] = ()

    def holds(self, value: Any) -> bool:
        """Whether the search could propose a value."""
        if self.choices:
            return value in self.choices
        return isinstance(value, int | float) and self.low <= value <= self.high


def parse_space(name: str, written: Any, kind: Any) -> Space:
    """The range or choices of one option.

    Args:
        name: Of the option.
        written: ``log:1e-4:1e-1``, ``0.5:0.9``, ``sgd,adam``, or a list of choices.
        kind: The option's type.

    Raises:
        InputError: It is none of these, or not of the option's type.
    """
    from experiments.options import readable, typed

    text = (
        ",".join("null" if one is None else str(one) for one in written)
        if isinstance(written, list)
        else written
    )
    start = f"--search {name}={text}:"
    if not isinstance(text, str):
        raise InputError(f"{start} expected {FORMS}; in YAML, a range stands in quotes.")
    log = text.startswith("log:")
    is_range = log or ":" in text
    parts = text.removeprefix("log:").split(":") if is_range else text.split(",")
    try:
        values = [typed(name, part.strip(), kind) for part in parts]
    except InputError as error:
        raise InputError(f"{start} expected {FORMS}, each of them {readable(kind)}.") from error
    if not is_range:
        if len(set(map(repr, values))) < max(len(values), 2) or not all(map(_is_plain, values)):
            raise InputError(f"{start} expected {FORMS}, at least two different plain values.")
        return Space(text, choices=tuple(values))
    if len(values) != 2 or not all(_is_number(value) for value in values):
        raise InputError(f"{start} expected {FORMS}; only numbers have a range.")
    low, high = values
    if not low < high or (log and low <= 0):
        raise InputError(f"{start} LOW is below HIGH{' and above 0' if log else ''}.")
    return Space(text, low, high, log)


def spaces(
    search: Mapping[str, Any] | None, strategies: Mapping[str, Owner], given: Mapping[str, Any]
) -> dict[str, dict[str, Space]]:
    """What is searched for each strategy: option to space, by the strategy's name.

    Args:
        search: Option, or ``strategy.option``, to what was written; None for the defaults, less what was given.
        strategies: Name to the owner of its options.
        given: The options that are fixed.

    Raises:
        InputError: An option that no strategy takes, one that is given too, a strategy with nothing to search.
    """
    if search is not None:
        _check_names(search, strategies, given)
    found = {}
    for strategy, owner in strategies.items():
        written = DEFAULT_SEARCH if search is None else search
        named = {key: value for key, value in written.items() if key in owner.types()}
        prefix = f"{owner.name}."
        named |= {
            key.removeprefix(prefix): value
            for key, value in written.items()
            if key.startswith(prefix) and key.removeprefix(prefix) in owner.types()
        }
        fixed = given.keys() if search is None else {key for key in given if "." in key}
        free = {key: value for key, value in named.items() if not {key, prefix + key} & fixed}
        if not free:
            raise InputError(f"nothing to search for {strategy}; give --search {owner.name}.OPTION={FORMS}.")
        found[strategy] = {key: parse_space(key, value, owner.types()[key]) for key, value in free.items()}
    return found


def _check_names(
    search: Mapping[str, Any], strategies: Mapping[str, Owner], given: Mapping[str, Any]
) -> None:
    plain = {name for owner in strategies.values() for name in owner.types()}
    dotted = {f"{owner.name}.{name}" for owner in strategies.values() for name in owner.types()}
    for name in search:
        if name not in plain | dotted:
            hint = nearest(name, dotted if "." in name else plain)
            raise InputError(f"--search {name}: no option of training or of these strategies; {hint}")
        if name in given:
            raise InputError(f"--{name} is given and searched; leave out one of the two.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)
