"""From a declared reproduction to runs and a table in a folder."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import catalogue
from experiments.compare import strategy_builder
from experiments.engines import make_engine
from experiments.options import Owner, make_fit, of_owner, read_options
from experiments.plan import FIT_OWNER, Plan, parse_seeds
from experiments.reproduce.declaration import Options, Reproduction
from experiments.reproduce.table import Table
from experiments.run import Cell, Named
from lifelong_ens.errors import InputError
from lifelong_ens.report.plots import memory_over_tasks
from lifelong_ens.report.records import load_records
from lifelong_ens.store import write_bytes
from lifelong_ens.training.fit import Fit


def reproduce(full: Reproduction, given: Mapping[str, Any], rest: Sequence[str]) -> tuple[Table, Path]:
    """Run what has no record yet and write ``table.md`` and ``table.csv`` beside the records.

    Where the table is of memory over tasks, ``memory_over_tasks.png`` has all of the curve.

    Args:
        full: What is declared.
        given: ``quick``, ``seeds``, ``out``, ``device`` and ``force`` from the command line, None where not given.
        rest: The other arguments, options of the stream and of training.

    Returns:
        The table, and the folder that it was written to.

    Raises:
        InputError: Something given cannot be used, or there are no images.
    """
    plan = plan_reproduction(full, given, rest)
    plan.run()
    # a folder may hold runs at several sizes; the table is of those asked for
    table = Table.of(full, load_records(plan.out), setting=plan.cells[0][0].setting)
    write_bytes(plan.out / "table.md", table.markdown().encode())
    write_bytes(plan.out / "table.csv", table.numbers.to_csv(index=False).encode())
    if full.after_tasks:
        curve = memory_over_tasks(table.report.costs, table.report.runs, table.report.labels)
        write_bytes(plan.out / "memory_over_tasks.png", curve)
    return table, plan.out


def plan_reproduction(full: Reproduction, given: Mapping[str, Any], rest: Sequence[str]) -> Plan:
    """Everything checked that can be checked before images are read; see ``reproduce``."""
    wanted = full.quickened() if given.get("quick") else full
    stream = catalogue.load(catalogue.target_of("stream", wanted.stream))
    network = catalogue.load(catalogue.target_of("network", wanted.network))
    owners = [Owner(wanted.stream, stream, only_dotted=frozenset({"seed"})), Owner(FIT_OWNER, Fit)]
    options = read_options(owners, rest, {})
    fit = make_fit({**wanted.fit, **of_owner(owners[1], options)})
    stream_options = {**wanted.stream_options, **of_owner(owners[0], options)}
    # where the images lie is no part of what a run is, so that records mean the same on every machine
    root = {name: stream_options.pop(name) for name in ("root",) if name in stream_options}
    seeds = parse_seeds(wanted.seeds if given.get("seeds") is None else given["seeds"])
    cells = [
        (
            Cell(
                Named(wanted.stream, stream_options),
                Named(row.strategy, row.recorded_options()),
                Named(wanted.network, wanted.network_options),
                fit.as_dict(),
                seed,
            ),
            strategy_builder(
                catalogue.load(catalogue.target_of("strategy", row.strategy)),
                network,
                {**wanted.network_options, **row.network},
                fit,
                **row.options,
            ),
        )
        for seed in seeds
        for row in wanted.rows
    ]
    out = given.get("out") or Path("results") / f"{full.name}{'-quick' if given.get('quick') else ''}"
    make_benchmark = _benchmark(stream, {**stream_options, **root}, full.images)
    device, force = str(given.get("device") or "auto"), bool(given.get("force"))
    return Plan(cells, make_benchmark, out, device, force, engine=make_engine(given))


def _benchmark(stream: Callable[..., Any], options: Options, images: str) -> Callable[..., Any]:
    """The stream's builder; without images it says where to get them."""
    needed = inspect.signature(stream).parameters.get("root")

    def build(*, seed: int) -> Any:
        if needed is None or "root" in options:
            return stream(**{"seed": seed, **options})
        if needed.default is inspect.Parameter.empty:
            raise InputError(f"no images; {images}.")
        try:
            return stream(**{"seed": seed, **options})
        except InputError as error:
            raise InputError(f"{error}; {images}.") from error

    return build
