"""The errors that are the user's to mend: one line each, what was expected, what came and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """What was given cannot be used. The command line prints the message alone and exits with 2."""


class UnfitNetworkError(InputError):
    """A method cannot run on this network, whatever its options; others can."""


class DamagedFileError(InputError):
    """A file of ours is truncated, altered, foreign or of another version; the message names it."""


class NonFiniteLossError(InputError):
    """Training met a loss that is NaN or infinite. What was finished before is kept."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint that ends an error message: the valid names closest to ``name``, or all where none is close."""
    names = sorted(valid)
    close = get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {', '.join(close)}?" if close else f"choose from {', '.join(names)}"
