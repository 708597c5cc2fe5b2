"""Strategies over one stream, seed by seed: runs, records, tables."""

from __future__ import annotations

import functools
import inspect
import logging
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from avalanche.benchmarks import CLScenario
from avalanche.training.templates import SupervisedTemplate
from torch import nn

from experiments.engines import Engine
from experiments.grid import run_grid
from experiments.logs import RunLog, check_loggers
from experiments.pace import Pace
from experiments.progress import Display
from experiments.run import Cell, Named, Progress, Run, check_writable, discard, finished_record, state_tuning
from experiments.samples import keep_samples
from lifelong_ens.accounting.meter import TrainingMeter
from lifelong_ens.errors import InputError, UnfitNetworkError
from lifelong_ens.report import Report
from lifelong_ens.report.page import write_page
from lifelong_ens.training.devices import ALONE, Devices
from lifelong_ens.training.fit import Fit
from lifelong_ens.training.joining import joined, started
from lifelong_ens.training.loop import Optimisation
from strategies.base import Strategy

log = logging.getLogger(__name__)

BuildStrategy = Callable[..., SupervisedTemplate]


def compare(
    stream: CLScenario | Callable[..., CLScenario],
    strategies: Mapping[str, BuildStrategy],
    *,
    seeds: Iterable[int] = range(1),
    out: str | Path | None = None,
    device: str = "auto",
    force: bool = False,
    progress: bool = True,
    log_to: Sequence[str] = (),
    devices: int | None = None,
    engine: Engine | None = None,
) -> Report:
    """Run every strategy over the stream with every seed and report on all.

    Args:
        stream: A benchmark with task labels, or a builder that is called with ``seed=``, such as
            ``functools.partial(split_cifar100, root="data", num_tasks=20)``.
        strategies: Name to builder; a builder is called with those of ``seed=`` and ``device=`` that it takes and
            returns an Avalanche strategy. The keywords of a ``functools.partial`` go into the record.
        seeds: One run of every strategy for each.
        out: Folder for records, checkpoints, tables, plots and ``report.html``; None keeps nothing. A run whose
            record is there is not repeated, one that was interrupted goes on, and the tables hold everything in the
            folder.
        device: ``auto``, or a torch device.
        force: Repeat runs whose records are there.
        progress: Show what runs: live in a terminal, elsewhere in the log, at its level INFO.
        log_to: ``tensorboard`` (in ``OUT/tensorboard``), ``wandb`` or both.
        devices: Processes, each with a device of its own, that share the rows of every step; they are started where
            torchrun or SLURM has not. Each runs the script that calls this, and gets the report.
        engine: Where runs go on at once, ``experiments.engines.local.Local(jobs)`` or ``.ray.Ray(address)``; None for
            this process, one run after the other.

    Raises:
        NonFiniteLossError: Some runs met a loss that is no number; raised after all others are done.
        UnfitNetworkError: No strategy can run on its network; of several, those that cannot are named in a warning.
        LostWorkerError: The process of a run died again and again; raised after all others are done.
    """
    cells = [
        (Cell(_named(stream), Named(name, _keywords(build)), Named("given"), {}, seed), build)
        for seed in seeds
        for name, build in strategies.items()
    ]
    make = stream if callable(stream) else lambda **_: stream
    return run_cells(
        cells,
        make,
        out=out,
        device=device,
        force=force,
        progress=progress,
        log_to=log_to,
        devices=devices,
        engine=engine,
    )


def run_cells(
    cells: Sequence[tuple[Cell, BuildStrategy]],
    make_benchmark: Callable[..., CLScenario],
    *,
    out: str | Path | None,
    device: str = "auto",
    force: bool = False,
    progress: bool = True,
    log_to: Sequence[str] = (),
    devices: int | None = None,
    engine: Engine | None = None,
) -> Report:
    """Run every cell that has no record yet; see ``compare``."""
    if not cells:
        raise InputError("nothing to run: name at least one strategy and one seed.")
    log_to = check_loggers(log_to)
    if engine is not None:
        _check_one_device(devices)
        work = RunStrategy(make_benchmark, device, log_to)
        return _run_cells(cells, work, out, force, progress, engine)
    with joined(devices, choose_device(device)) as here:
        # the other processes show, log and keep nothing: their files go with their scratch folder
        work = RunStrategy(make_benchmark, device, log_to if here.first else (), here)
        folder = out if here.first else None
        return here.same(_run_cells(cells, work, folder, force, progress and here.first))


def _check_one_device(devices: int | None) -> None:
    outside = started()
    if outside is not None or devices not in (None, 1):
        by = f"leave {outside.by} out" if outside is not None else "leave --devices out"
        raise InputError(
            f"an engine runs each cell on one device: {by}, or --engine, --jobs and --ray_address."
        )


def _run_cells(
    cells: Sequence[tuple[Cell, BuildStrategy]],
    work: RunStrategy,
    out: str | Path | None,
    force: bool,
    progress: bool,
    engine: Engine | None = None,
) -> Report:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch if out is None else out)
        check_writable(folder)
        if force:
            for cell, _ in cells:
                discard(cell, folder)
        try:
            problems = run_grid(
                cells,
                work,
                functools.partial(work.finished, folder),
                out=folder,
                progress=progress,
                engine=engine,
            )
        except KeyboardInterrupt:
            if out is not None:
                _write_report(folder)
            raise
        report = Report.load(folder) if len(problems) < len(cells) and work.speaks else None
        if out is not None:
            _write_report(folder, report)
    raise_or_warn([(cell.strategy.name, problem) for cell, problem in problems], len(problems) == len(cells))
    return report  # pyright: ignore[reportReturnType]


def _write_report(folder: Path, report: Report | None = None) -> None:
    """Tables and plots of what is finished, if anything is, and the page of all runs."""
    if report is None and any((folder / "records").glob("*.json")):
        report = Report.load(folder)
    if report is not None:
        report.write(folder)
    write_page([folder])


def raise_or_warn(problems: Sequence[tuple[str, InputError]], stop: bool) -> None:
    """Raise what failed; name the strategies that cannot run on the network, in an error if nothing else ran."""
    failed = [error for _, error in problems if not isinstance(error, UnfitNetworkError)]
    if failed:
        raise type(failed[0])("; ".join(map(str, failed)))
    unfit = {name: str(error) for name, error in problems}
    if stop:
        raise UnfitNetworkError("; ".join(unfit.values()))
    for name, reason in unfit.items():
        log.warning("%s did not run: %s", name, reason)


def choose_device(name: str) -> torch.device:
    """The device that ``auto``, ``cpu``, ``cuda`` or ``mps`` stands for here.

    Raises:
        InputError: This machine has no such device.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name} is not a device; choose auto, cpu, cuda or mps.") from error
    if not available.get(device.type, False):
        raise InputError(f"--device {name}: this machine has none; use --device auto.")
    return device


@functools.cache
def warm_up(device: torch.device) -> None:
    """One step of a tiny network, so that what torch loads at its first step is not booked on the first run."""
    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(4, 2)).to(device)
    optimisation = Optimisation([{"params": list(network.parameters())}], Fit(), steps_per_epoch=1)
    with TrainingMeter().measure(network, rows=1):
        optimisation.step(network(torch.zeros(1, 1, 2, 2, device=device)).sum())


class RunStrategy:
    """Runs a cell of a comparison; see ``experiments.grid.Work``.

    Args:
        make_benchmark: Builder of the stream.
        device: ``auto``, or a torch device, wherever this is.
        log_to: Loggers.
        devices: That a run is shared by; for this process alone.
    """

    def __init__(
        self,
        make_benchmark: Callable[..., CLScenario],
        device: str,
        log_to: Sequence[str],
        devices: Devices | None = None,
    ) -> None:
        self.make_benchmark, self.device, self.log_to = make_benchmark, device, log_to
        self._devices = devices
        self._benchmark: tuple[int, CLScenario] | None = None

    def __call__(self, item: tuple[Cell, BuildStrategy], out: Path, display: Display) -> dict[str, Any]:
        """See ``Work``."""
        cell, build = item
        devices = self._devices or replace(ALONE, device=choose_device(self.device))
        warm_up(devices.device)
        benchmark = self._benchmark_of(cell.seed, devices)

        def build_here(seed: int) -> SupervisedTemplate:
            return build(**taken(build, {"device": devices.device, "benchmark": benchmark, "seed": seed}))

        tests = [experience.dataset for experience in benchmark.streams["test"]]  # pyright: ignore
        keep_samples(tests, out, cell.setting, cell.seed)
        pace = Pace(cell)
        with RunLog(self.log_to, cell, out, pace) as told, display.running(cell, pace.status):

            def on_task(measured: Progress) -> None:
                pace.task()
                told.task(measured)

            run = Run(cell, benchmark, build_here, out, pace.step, told.epoch, on_task, devices)
            if isinstance(run.strategy, Strategy):
                run.strategy.on_phase = pace.phase
            run.resume()
            pace.begin(run)
            return run.execute()

    def __getstate__(self) -> dict[str, Any]:
        """For a worker, which has a device and images of its own."""
        return {**vars(self), "_devices": None, "_benchmark": None}

    @property
    def speaks(self) -> bool:
        """Whether this is the process that makes the report."""
        return self._devices is None or self._devices.first

    def finished(self, out: Path, cell: Cell) -> dict[str, Any] | None:
        """The record of a cell that has one, which then says how the cell was tuned."""
        record = finished_record(cell, out)
        record = record if self._devices is None else self._devices.same(record)
        if record is not None:
            state_tuning(cell, record, out)
        return record

    def _benchmark_of(self, seed: int, devices: Devices) -> CLScenario:
        """The strategies of a seed share its benchmark."""
        if self._benchmark is None or self._benchmark[0] != seed:
            self._benchmark = (
                None  # the images of one seed leave the memory before those of the next are read
            )
            made = devices.first_alone(
                lambda: self.make_benchmark(**taken(self.make_benchmark, {"seed": seed}))
            )
            self._benchmark = seed, made
        return self._benchmark[1]


def taken(
    function: Callable[..., Any], offered: Mapping[str, Any], only_named: Collection[str] = ()
) -> dict[str, Any]:
    """Those keywords that a function takes and that a partial has not set already.

    Args:
        function: May take all keywords, as ``**kwargs``.
        offered: What it could be called with.
        only_named: What is given only where it is an argument of its own: ``**kwargs`` may be meant for others.
    """
    parameters, already = inspect.signature(function).parameters, _keywords(function)
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {
        name: value
        for name, value in offered.items()
        if ((takes_all and name not in only_named) or name in parameters) and name not in already
    }


def _keywords(function: Any) -> dict[str, Any]:
    return dict(function.keywords) if isinstance(function, functools.partial) else {}


def _named(stream: Any) -> Named:
    if isinstance(stream, functools.partial):
        return Named(
            stream.func.__name__, {key: value for key, value in stream.keywords.items() if key != "seed"}
        )
    if callable(stream):
        return Named(getattr(stream, "__name__", type(stream).__name__))
    return Named(getattr(stream, "name", type(stream).__name__))


def strategy_builder(
    builder: BuildStrategy,
    network: Callable[..., nn.Module],
    network_options: Mapping[str, Any],
    fit: Fit,
    **options: Any,
) -> BuildStrategy:
    """A strategy's builder joined with its network, made to fit the benchmark's images; for ``run_cells``."""

    def build(*, benchmark: Any, seed: int, device: torch.device) -> SupervisedTemplate:
        shape = getattr(benchmark, "image_shape", None) or tuple(
            benchmark.streams["train"][0].dataset[0][0].shape
        )
        body = network(**taken(network, {"input_shape": shape}, {"input_shape"}), **network_options)
        try:
            with torch.no_grad():
                body.eval()(torch.zeros(1, *shape))
        except RuntimeError as error:
            raise InputError(
                f"the network does not fit images of {'x'.join(map(str, shape))}: {error}"
            ) from error
        return builder(
            body.train(), **taken(builder, {"fit": fit, "seed": seed, "device": device}), **options
        )

    return build
