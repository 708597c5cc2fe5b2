"""Files for a strategy of one's own: the method and its test, both of which run as they are."""

from __future__ import annotations

import importlib.util
import keyword
import re
from importlib.resources import files
from pathlib import Path
from string import Template

from experiments.catalogue import KINDS
from lifelong_ens.errors import InputError


def write_strategy(name: str, out: Path) -> list[Path]:
    """Write ``NAME.py`` and ``test_NAME.py`` into a folder and return them, the method first.

    Args:
        name: Of the strategy, its module and its function.
        out: The folder; it is made if it is not there.

    Raises:
        InputError: The name cannot be used, or a file of that name is there.
    """
    check_name(name)
    targets = {out / f"{name}.py": "strategy.py.txt", out / f"test_{name}.py": "test_strategy.py.txt"}
    for path in targets:
        if path.exists():
            raise InputError(f"{path} is there already: take another name, or another --out.")
    check_importable(name)
    values = {"name": name, "class_name": f"{class_name(name)}Network"}
    out.mkdir(parents=True, exist_ok=True)
    for path, template in targets.items():
        text = (files("experiments") / "templates" / template).read_text(encoding="utf-8")
        # x: a file that has come meanwhile is not overwritten either
        with open(path, "x", encoding="utf-8") as file:
            file.write(Template(text).substitute(values))
    return list(targets)


def check_name(name: str) -> None:
    """Refuse what cannot be a function's name here.

    Raises:
        InputError: Says what to take instead.
    """
    if not name.isidentifier() or keyword.iskeyword(name):
        better = re.sub(r"\W+", "_", name).strip("_") or "my_strategy"
        better = f"my_{better}" if not better.isidentifier() or keyword.iskeyword(better) else better
        raise InputError(
            f"{name!r} cannot name a Python module and function: letters, digits and _ can, such as {better}."
        )
    for kind, ours in KINDS.items():
        if name in ours:
            raise InputError(f"{name} is a {kind} of ours: take another name, such as my_{name}.")


def check_importable(name: str) -> None:
    """Refuse a name under which Python finds a module already.

    Raises:
        InputError: The file would hide that module, or be hidden by it.
    """
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # __main__ has no spec
        found = None
    if found is not None:
        where = found.origin or "Python itself"
        raise InputError(f"{name} is a module already ({where}): take another name, such as my_{name}.")


def class_name(name: str) -> str:
    """``own_method`` as ``OwnMethod``."""
    return "".join(part[:1].upper() + part[1:] for part in name.split("_"))
