"""From the names of rows to their table."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from experiments.bench import CPU_ONLY, QUICK, ROWS
from experiments.bench.measuring import FULL, Effort, Line, one_thread, run_race
from experiments.bench.measuring import QUICK as QUICK_EFFORT
from experiments.bench.table import Table
from experiments.catalogue import load
from experiments.compare import choose_device
from experiments.options import Owner, of_owner, read_options
from experiments.run import check_writable
from lifelong_ens.errors import InputError, nearest

PACKAGES = ("torch", "torchvision", "numpy", "avalanche-lib", "torch-uncertainty", "tabm", "peft")


def run_bench(
    names: Sequence[str],
    *,
    quick: bool = False,
    device: str = "cpu",
    repeats: int | None = None,
    out: Path | None = None,
    arguments: Sequence[str] = (),
) -> Table:
    """Measure rows and return their table.

    Args:
        names: Of rows; all that the device can run where there are none.
        quick: Fewer rounds, and fewer or smaller cases where one takes long.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        repeats: Rounds of every case, instead of as many as fit a time.
        out: Folder for ``bench.csv`` and ``table.md``, written after every row; what they hold of other rows, or of the
            same on another device, stays.
        arguments: Options of rows, ``--name value``.

    Raises:
        InputError: Something given cannot be used.
    """
    chosen = choose_device(device)
    names = _rows(names, chosen)
    effort = QUICK_EFFORT if quick else FULL
    if repeats is not None:
        if repeats < 1:
            raise InputError(f"repeats is at least 1, not {repeats}.")
        effort = dataclasses.replace(effort, fewest=repeats, most=repeats)
    owners = [Owner(name, load(ROWS[name])) for name in names]
    given = read_options(owners, arguments, {})
    options = {
        owner.name: {**(QUICK.get(owner.name, {}) if quick else {}), **of_owner(owner, given)}
        for owner in owners
    }
    if out is not None:
        check_writable(out)
    table = Table.load(out) if out is not None and Table.exists(out) else Table.empty()
    with tqdm(owners, desc="bench", unit="row", disable=None) as bar:
        for owner in bar:
            lines = _measure(owner, options[owner.name], effort, chosen, bar)
            table = table.with_rows(pd.DataFrame([{**line, "quick": quick} for line in lines]))
            if out is not None:
                table.write(out)
    return table


def _rows(names: Sequence[str], device: torch.device) -> list[str]:
    """The names, checked, in the order of the table."""
    for name in names:
        if name not in ROWS:
            raise InputError(f"no row of the benchmark is called {name!r}; {nearest(name, ROWS)}")
        if name in CPU_ONLY and device.type != "cpu":
            raise InputError(f"{name} is measured on the CPU alone; leave out --device {device.type}.")
    wanted = names or [name for name in ROWS if device.type == "cpu" or name not in CPU_ONLY]
    return [name for name in ROWS if name in wanted]


def _measure(
    owner: Owner, options: Mapping[str, Any], effort: Effort, device: torch.device, bar: Any
) -> Iterator[dict[str, Any]]:
    """The lines of one row, as the table has them."""
    where = _device_label(device)
    devices = [device] if device.type == "cuda" else []
    with one_thread(), torch.random.fork_rng(devices=devices), _silent():
        torch.manual_seed(0)
        for race in owner.function(device, **options):
            bar.set_postfix_str(f"{owner.name}: {race.case}")
            for line in run_race(race, effort, device):
                yield {
                    "row": owner.name,
                    **_fields(line),
                    "device": where,
                    "versions": _versions(),
                    "measured": datetime.now(UTC).isoformat(timespec="seconds"),
                }


def _fields(line: Line) -> dict[str, Any]:
    return {field.name: getattr(line, field.name) for field in dataclasses.fields(line)}


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without what peers print, and without their warnings."""
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def _device_label(device: torch.device) -> str:
    """The kind of the device and, where it has one, its name."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return f"{device.type} ({name})" if name else device.type


def _processor() -> str:
    """What the CPU calls itself; empty where nobody says."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _versions() -> str:
    """Of Python, torch and every peer that is installed."""
    found = [f"python {sys.version.split()[0]}"]
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return ", ".join(found)
