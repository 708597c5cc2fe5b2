"""``lifelong-ens bench``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments.bench import ROWS
from experiments.catalogue import describe, option_lines
from lifelong_ens.errors import InputError

HELP = "speed and memory beside named peers"
EXAMPLES = """
examples:
  lifelong-ens bench --quick
  lifelong-ens bench layers mixed_tasks --out results/bench
  lifelong-ens bench calibrate"""
# named like a row, but it compares nothing
CALIBRATE = "calibrate"
_DESCRIPTION = """\
Measure rows of the table of speed and memory beside named peers, which take turns at the same work. A peer that is not
installed (pip install 'lifelong-ens[bench]') is shown as absent. `calibrate` is no row: it measures what elementwise
work costs on the device."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    parser.description, parser.epilog = _DESCRIPTION, _epilog()
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"rows, or {CALIBRATE} (default: all rows)")
    parser.add_argument(
        "--quick", action="store_true", help="fewer rounds, and not the longest cases: minutes for all"
    )
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or mps (default: cpu)")
    parser.add_argument("--repeats", type=int, help="rounds of every case (default: as many as fit its time)")
    parser.add_argument(
        "--out", type=Path, help="folder for bench.csv and table.md; other rows there are kept"
    )


def run(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    """Measure what was asked for and print it.

    Args:
        parsed: What ``add_arguments`` describes.
        rest: The other arguments, options of rows by name.

    Raises:
        InputError: Something given cannot be used.
    """
    if CALIBRATE in parsed.names:
        _calibrate(parsed, rest)
        return
    from experiments.bench.running import run_bench

    table = run_bench(
        parsed.names,
        quick=parsed.quick,
        device=parsed.device,
        repeats=parsed.repeats,
        out=parsed.out,
        arguments=rest,
    )
    print(table.block())


def _calibrate(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    if rest or set(parsed.names) != {CALIBRATE}:
        raise InputError(f"{CALIBRATE} goes alone and takes nothing but --device.")
    from experiments.bench.calibrate import measure_constants
    from experiments.compare import choose_device
    from lifelong_ens.layers.plan import device_name, save_constants

    device = choose_device(parsed.device)
    constants = measure_constants(device)
    path = save_constants(device.type, constants)
    print(
        f"{device_name(device.type)}: {constants.launch_seconds * 1e6:.2f} us a launch, "
        f"{constants.bytes_per_second / 1e9:.1f} GB/s\nwrote {path}; delete it to go back to the defaults"
    )


def _epilog() -> str:
    lines = ["rows, and their options by name:"]
    for name, target in ROWS.items():
        lines += [f"  {name:20} {describe(target).summary}"]
        lines += [f"    {line}" for line in option_lines(target)]
    return "\n".join([*lines, EXAMPLES])
