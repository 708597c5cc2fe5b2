"""Options of the chosen stream, network, strategies and training, from the command line and a YAML file."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jsonargparse

from experiments.catalogue import filled
from lifelong_ens.errors import InputError, nearest
from lifelong_ens.training.fit import Fit


@dataclass(frozen=True)
class Owner:
    """Something with options: its name on the command line and what it is called with."""

    name: str
    function: Callable[..., Any]
    # a stream's seed is the run's own unless it is given by its full name
    only_dotted: frozenset[str] = frozenset()
    # what a user cannot set here
    hidden: frozenset[str] = frozenset()
    # a strategy takes options of training for itself alone, by their full names
    beside: Callable[..., Any] | None = None

    def types(self) -> dict[str, Any]:
        """The type of every argument that a user can set."""
        beside = {} if self.beside is None else Owner(self.name, self.beside).types()
        return beside | self.own_types()

    def own_types(self) -> dict[str, Any]:
        """The type of every argument that a user can set, of ``function`` alone."""
        hints, names = _hints(self.function), inspect.signature(self.function).parameters
        given = filled(names) | self.hidden
        return {name: hints.get(name, Any) for name in names if name not in given or name in self.only_dotted}

    def defaults(self) -> dict[str, Any]:
        """The defaults of ``function``'s arguments."""
        parameters = inspect.signature(self.function).parameters
        return {name: parameter.default for name, parameter in parameters.items()}

    def required(self) -> list[str]:
        """The arguments of ``function`` that a user has to set."""
        parameters = inspect.signature(self.function).parameters.values()
        without = {one.name for one in parameters if one.default is one.empty and "VAR" not in one.kind.name}
        return [name for name in self.own_types() if name in without]

    def plain(self) -> set[str]:
        """The names that can be given without the owner's."""
        return self.own_types().keys() - self.only_dotted


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The types of a function's arguments; its return type may be known to type checkers only."""
    if inspect.isclass(function):
        return typing.get_type_hints(function)
    arguments = {name: hint for name, hint in function.__annotations__.items() if name != "return"}
    holder = types.SimpleNamespace(__annotations__=arguments)
    return typing.get_type_hints(holder, globalns=getattr(function, "__globals__", {}))


def read_options(
    owners: Sequence[Owner], arguments: Sequence[str], config: Mapping[str, Any], also: Iterable[str] = ()
) -> dict[str, Any]:
    """What was set, by the names under which it was given; ``of_owner`` says what goes to whom.

    The command line wins over the YAML file.

    Args:
        owners: Stream, network, strategies, training.
        arguments: What is left of the command line: ``--name value`` or ``--owner.name=value``.
        config: What is left of the YAML file; an owner's own options may be nested under its name.
        also: Other names that may have been meant.

    Raises:
        InputError: An option that nobody takes, with the nearest names; a value of the wrong type.
    """
    kinds: dict[str, Any] = {}
    for owner in owners:
        for name, kind in owner.types().items():
            kinds.setdefault(f"{owner.name}.{name}", kind)
            if name in owner.plain():
                kinds.setdefault(name, kind)
    given = _gathered({**flatten(config), **_pairs(arguments)}, kinds)
    for name in given:
        if name not in kinds:
            valid = [one for one in [*kinds, *also] if ("." in one) == ("." in name)]
            raise InputError(f"unknown option --{name}; {nearest(name, valid)}")
    return {name: typed(name, value, kinds[name]) for name, value in given.items()}


def _gathered(given: Mapping[str, Any], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of an option that is a dataclass, ``owner.option.field``, together as one dictionary."""
    gathered: dict[str, Any] = {}
    for name, value in given.items():
        whole, _, field = name.rpartition(".")
        if name not in kinds and _dataclass_in(kinds.get(whole)) is not None:
            gathered.setdefault(whole, {})[field] = value
        else:
            gathered[name] = value
    return gathered


def _dataclass_in(kind: Any) -> Any:
    """A dataclass, also if it may be None; None where it is something else."""
    options = [kind, *typing.get_args(kind)]
    return next((one for one in options if isinstance(one, type) and dataclasses.is_dataclass(one)), None)


def check_required(owners: Iterable[Owner], given: Mapping[str, Any]) -> None:
    """See that nothing is missing.

    Raises:
        InputError: An owner has an argument without a default that was not given.
    """
    for owner in owners:
        for name in owner.required():
            if name not in of_owner(owner, given):
                raise InputError(
                    f"{owner.name} needs --{name}; lifelong-ens list {owner.name} says what it is"
                )


def of_owner(owner: Owner, values: Mapping[str, Any]) -> dict[str, Any]:
    """An option under its own name goes to every owner that takes it; ``owner.option`` to that one, and wins."""
    taken = owner.plain()
    plain = {name: value for name, value in values.items() if name in taken}
    prefix = f"{owner.name}."
    dotted = {name[len(prefix) :]: value for name, value in values.items() if name.startswith(prefix)}
    return plain | dotted


def _pairs(arguments: Sequence[str]) -> dict[str, Any]:
    """``--name value``, ``--name=value`` and a bare ``--name`` (true) as a dictionary of texts."""
    pairs: dict[str, Any] = {}
    position = 0
    while position < len(arguments):
        token = arguments[position]
        position += 1
        if not token.startswith("--"):
            raise InputError(f"did not expect {token!r}; options are written --name value.")
        name, equals, value = token[2:].partition("=")
        if not equals:
            is_value = position < len(arguments) and not arguments[position].startswith("--")
            value = arguments[position] if is_value else "true"
            position += is_value
        pairs[name.replace("-", "_")] = value
    return pairs


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options as one level, named as on the command line: ``owner.option``."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= (
            flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
        )
    return flat


def whole(name: str, value: Any, least: int = 1) -> int:
    """A whole number.

    Raises:
        InputError: It is something else, or too small.
    """
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = least - 1
    if number < least:
        raise InputError(f"--{name} {value}: expected a whole number of at least {least}.")
    return number


def typed(name: str, value: Any, kind: Any) -> Any:
    """A value checked and converted by the type that its function asks for.

    Raises:
        InputError: It is of another type.
    """
    together = _dataclass_in(kind)
    if together is not None and isinstance(value, Mapping):
        kinds = typing.get_type_hints(together)
        for field in value:
            if field not in kinds:
                raise InputError(f"unknown option --{name}.{field}; {nearest(field, kinds)}")
        return together(
            **{field: typed(f"{name}.{field}", one, kinds[field]) for field, one in value.items()}
        )
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    try:
        parsed = (
            parser.parse_args([f"--value={value}"])
            if isinstance(value, str)
            else parser.parse_object({"value": value})
        )
        return parsed.value
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise InputError(f"--{name} {value}: expected {readable(kind)}.") from error


def readable(kind: Any) -> str:
    """A type in words: the choices of a literal, else its name."""
    if (together := _dataclass_in(kind)) is not None:
        return "its fields, each by name: " + ", ".join(one.name for one in dataclasses.fields(together))
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    return (
        kind.__name__
        if isinstance(kind, type)
        else str(kind).replace("typing.", "").replace("collections.abc.", "")
    )


def make_fit(options: Mapping[str, Any]) -> Fit:
    """The training that the options ask for."""
    return dataclasses.replace(Fit(), **options)
