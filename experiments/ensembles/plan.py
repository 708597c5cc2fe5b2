"""From the words of ``lifelong-ens ensemble`` to cells, and from cells to a report."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments import catalogue
from experiments.compare import choose_device, raise_or_warn, taken, warm_up
from experiments.engines import OPTIONS as ENGINE
from experiments.engines import Engine, make_engine
from experiments.ensembles.data import Images, read_foreign, read_images, reader
from experiments.ensembles.evaluation import Protocol, check_protocol
from experiments.ensembles.reproduction import EnsembleReproduction
from experiments.ensembles.run import EnsembleCell, discard, finished_record, protocol_dict, run_cell
from experiments.grid import run_grid
from experiments.options import Owner, check_required, make_fit, of_owner, read_options, whole
from experiments.pace import EnsemblePace
from experiments.plan import FIT_OWNER, first_given, names_of, parse_seeds, read_config, short
from experiments.progress import Display
from experiments.run import Named, check_writable
from experiments.samples import keep_samples
from lifelong_ens.corruptions import CORRUPTIONS, check_name
from lifelong_ens.ensembles.ensemble import Ensemble
from lifelong_ens.errors import InputError, NonFiniteLossError
from lifelong_ens.report.ensembles import EnsembleReport
from lifelong_ens.report.page import write_page
from lifelong_ens.training.fit import Fit

GENERAL: dict[str, Any] = {
    "data": "digits",
    "methods": "deep,batch_ensemble",
    "network": None,
    "members": 4,
    "seeds": 1,
    "held_out": 0,
    "ood": None,
    "corruptions": "none",
    "corrupted_images": None,
    "cifar_c": None,
    "calibrate": False,
    "out": None,
    "device": "auto",
    "force": False,
    **dict.fromkeys(ENGINE),
}
# one network, and one trained for as long as all members together: without them no table tells what an ensemble is for
ALWAYS = ("single", "single_equal_cost")
ABOUT_TASKS = frozenset({"num_tasks", "class_order"})
SMALL_IMAGES = ("digits", "mnist", "fashion_mnist")


@dataclass(frozen=True)
class EnsemblePlan:
    """A comparison of ensembles that is ready to run.

    Attributes:
        cells: Each with its method's function.
        build_network: Makes a network for images of a shape and so many classes.
        network_options: What else it is called with.
        data: Name of the data set.
        data_options: Its options, ``root`` included.
        foreign: Name and folder of each set of foreign images.
        protocol: What is measured.
        out: The folder.
        device: As it was asked for.
        force: Repeat what has a record.
        engine: Where cells run at once; None for this process, one after the other.
    """

    cells: list[tuple[EnsembleCell, Callable[..., Ensemble]]]
    build_network: Callable[..., nn.Module]
    network_options: Mapping[str, Any]
    data: str
    data_options: dict[str, Any]
    protocol: Protocol
    out: Path
    device: str = "auto"
    force: bool = False
    foreign: Mapping[str, Path | None] = field(default_factory=dict)
    engine: Engine | None = None

    def run(self, progress: bool = True) -> EnsembleReport:
        """Run what has no record yet and report on everything in the folder.

        Raises:
            NonFiniteLossError: Some runs met a loss that is no number; raised after all others are done.
            UnfitNetworkError: No method can run on its network; of several, those that cannot are named in a warning.
        """
        work = TrainEnsemble(self)
        check_writable(self.out)
        images = work.images
        check_protocol(self.protocol, images)
        self.network_for(images)  # one that does not fit is refused before anything is written
        wanted = protocol_dict(self.protocol, images)
        if self.force:
            for cell, _ in self.cells:
                discard(cell, self.out)
        first = self.cells[0][0]
        keep_samples([images.test], self.out, first.setting, first.seed)
        records = {cell.key: finished_record(cell, wanted, self.out) for cell, _ in self.cells}
        left = sum(record is None for record in records.values())
        engine = self.engine if left else None
        run = functools.partial(
            run_grid, self.cells, work, lambda cell: records[cell.key], out=self.out, progress=progress
        )
        try:
            with engine or contextlib.nullcontext():
                if engine is not None and left < engine.slots:
                    # too few cells to keep all workers busy: their members run at once, the cells in turn
                    work.engine = engine
                    with engine.threads_here():
                        problems = run()
                else:
                    problems = run(engine=engine)
        except KeyboardInterrupt:
            if any((self.out / "records").glob("*.json")):
                EnsembleReport.load(self.out).write(self.out)
            write_page([self.out])
            raise
        write_page([self.out])
        raise_or_warn(
            [(cell.label(), problem) for cell, problem in problems], len(problems) == len(self.cells)
        )
        report = EnsembleReport.load(self.out)
        report.write(self.out)
        return report

    def images(self) -> Images:
        """What members are trained, chosen and tested on."""
        cell = self.cells[0][0]
        images = read_images(self.data, self.data_options, cell.held_out)
        for name, root in self.foreign.items():
            images.foreign[name] = read_foreign(name, root, images)
        return images

    def network_for(self, images: Images) -> Callable[[], nn.Module]:
        """The builder of a network for these images; the one that is saved with an ensemble.

        Raises:
            InputError: Its network cannot take them, or does not tell so many classes apart.
        """
        shape, classes = images.train.image_shape, len(images.class_names)
        arguments = {"input_shape": shape, "num_classes": classes}
        offered = taken(self.build_network, arguments, only_named={"input_shape"})
        build = functools.partial(self.build_network, **offered, **self.network_options)
        size = "x".join(map(str, shape))
        try:
            with torch.random.fork_rng(), torch.no_grad():
                out = build().eval()(torch.zeros(1, *shape))
        except RuntimeError as error:
            raise InputError(f"the network does not fit images of {size}: {error}") from error
        if tuple(out.shape) != (1, classes):
            raise InputError(
                f"the network answers {tuple(out.shape[1:])} numbers to an image of {size}; expected {classes}, "
                "one for each class."
            )
        return build


class TrainEnsemble:
    """Trains and measures a cell of a plan; see ``experiments.grid.Work``.

    Attributes:
        plan: The plan.
        engine: That members run on at once, entered; None for one after the other.
    """

    def __init__(self, plan: EnsemblePlan) -> None:
        self.plan = plan
        self.engine: Engine | None = None

    def __call__(
        self, item: tuple[EnsembleCell, Callable[..., Ensemble]], out: Path, display: Display
    ) -> dict[str, Any]:
        """See ``Work``."""
        cell, function = item
        warm_up(self.device)
        batch_size = int(cell.method.options.get("batch_size", cell.fit.batch_size))
        pace = EnsemblePace(cell, len(self.images.train), batch_size, self.device)
        each = map if self.engine is None else functools.partial(self._members_at_once, self.engine, pace)
        protocol = self.plan.protocol
        with display.running(cell, pace.status):
            try:
                return run_cell(
                    cell,
                    function,
                    self.build,
                    self.images,
                    protocol,
                    out=out,
                    device=self.device,
                    pace=pace,
                    each=each,
                )
            except NonFiniteLossError as error:
                raise NonFiniteLossError(
                    f"{cell.label()}: {error}; the others are kept, try a lower --learning_rate"
                ) from error

    def __getstate__(self) -> dict[str, Any]:
        """For a worker, which has a device and images of its own."""
        return {"plan": replace(self.plan, engine=None), "engine": None}

    @staticmethod
    def _members_at_once(
        engine: Engine, pace: EnsemblePace, function: Callable[[Any], Any], items: Iterable[Any]
    ) -> list[Any]:
        """As ``map`` does, by the workers of an engine."""
        items = list(items)
        futures = [
            engine.submit(function, item, f"{pace.cell.label()}, network {number + 1} of {len(items)}")
            for number, item in enumerate(items)
        ]
        for done, future in enumerate(as_completed(futures)):
            future.result()
            pace.phase(f"networks {done + 1}/{len(items)}", 0)
        return [future.result() for future in futures]

    @functools.cached_property
    def device(self) -> torch.device:
        """Where members are trained."""
        return choose_device(self.plan.device)

    @functools.cached_property
    def images(self) -> Images:
        """The same for all cells."""
        return self.plan.images()

    @functools.cached_property
    def build(self) -> Callable[[], nn.Module]:
        """The builder of their network."""
        return self.plan.network_for(self.images)


def plan_ensembles(parsed: Mapping[str, Any], rest: Sequence[str]) -> EnsemblePlan:
    """Everything checked that can be checked before images are read.

    Args:
        parsed: General options from the command line, None where not given, and ``config``.
        rest: The other arguments, options of data, network, methods and training.

    Raises:
        InputError: Something named or given cannot be used.
    """
    config = read_config(parsed.get("config"))
    general = {name: first_given(parsed.get(name), config.pop(name, None), GENERAL[name]) for name in GENERAL}
    data = str(general["data"])
    network_name = str(general["network"] or ("mlp" if data in SMALL_IMAGES else "resnet20"))
    network = catalogue.load(catalogue.target_of("network", network_name))
    names = [*ALWAYS, *(name for name in names_of("methods", general["methods"]) if name not in ALWAYS)]
    methods = {
        name: Owner(short(name), catalogue.load(catalogue.target_of("method", name)), beside=Fit)
        for name in names
    }
    data_owner = Owner(data, reader(data), hidden=ABOUT_TASKS)
    network_owner, fit_owner = Owner(short(network_name), network), Owner(FIT_OWNER, Fit)
    owners = [data_owner, network_owner, *methods.values(), fit_owner]
    given = read_options(owners, rest, config, also=parsed)
    check_required(owners, given)
    members = whole("members", general["members"], 1)
    data_options = of_owner(data_owner, given)
    network_options = of_owner(network_owner, given)
    fit = make_fit(of_owner(fit_owner, given))
    named = _without_root(data, data_options)
    cells = [
        (
            EnsembleCell(
                named,
                Named(name, of_owner(owner, given)),
                Named(network_name, network_options),
                fit,
                members,
                whole("held_out", general["held_out"], 0),
                seed,
            ),
            owner.function,
        )
        for seed in parse_seeds(general["seeds"])
        for name, owner in methods.items()
    ]
    return EnsemblePlan(
        cells,
        network,
        network_options,
        data,
        data_options,
        _protocol(general),
        Path(general["out"] or Path("results") / f"ensembles_{data}"),
        str(general["device"]),
        bool(general["force"]),
        _foreign(general["ood"]),
        make_engine(general),
    )


def plan_rows(
    declared: EnsembleReproduction, given: Mapping[str, Any], rest: Sequence[str], out: Path
) -> EnsemblePlan:
    """The cells of a declared table, ready to run.

    Args:
        declared: Methods with their options, data, network and training.
        given: ``seeds``, ``device`` and ``force`` from the command line, None where not given.
        rest: The other arguments, options of data and training.
        out: The folder.

    Raises:
        InputError: Something given cannot be used.
    """
    network = catalogue.load(catalogue.target_of("network", declared.network))
    data_owner, fit_owner = (
        Owner(declared.data, reader(declared.data), hidden=ABOUT_TASKS),
        Owner(FIT_OWNER, Fit),
    )
    options = read_options([data_owner, fit_owner], rest, {})
    data_options = {**declared.data_options, **of_owner(data_owner, options)}
    fit = make_fit({**declared.fit, **of_owner(fit_owner, options)})
    cells = [
        (
            EnsembleCell(
                _without_root(declared.data, data_options),
                Named(row.method, row.options),
                Named(declared.network, declared.network_options),
                fit,
                declared.num_members,
                0,
                seed,
            ),
            catalogue.load(catalogue.target_of("method", row.method)),
        )
        for seed in parse_seeds(first_given(given.get("seeds"), declared.seeds))
        for row in declared.rows
    ]
    device, force = str(given.get("device") or "auto"), bool(given.get("force"))
    return EnsemblePlan(
        cells,
        network,
        declared.network_options,
        declared.data,
        data_options,
        Protocol(),
        out,
        device,
        force,
        engine=make_engine(given),
    )


def _without_root(data: str, options: Mapping[str, Any]) -> Named:
    """Where images lie is no part of what a run is, so that records mean the same on every machine."""
    return Named(data, {name: value for name, value in options.items() if name != "root"})


def _protocol(general: Mapping[str, Any]) -> Protocol:
    wanted = str(general["corruptions"])
    names = (
        CORRUPTIONS if wanted == "all" else () if wanted == "none" else tuple(names_of("corruptions", wanted))
    )
    for name in names:
        check_name(name)
    count = general["corrupted_images"]
    return Protocol(
        names,
        None if count is None else whole("corrupted_images", count, 1),
        None if general["cifar_c"] is None else Path(general["cifar_c"]),
        bool(general["calibrate"]),
    )


def _foreign(value: Any) -> dict[str, Path | None]:
    """``name`` or ``name=DIR``, joined by commas."""
    foreign: dict[str, Path | None] = {}
    for part in names_of("ood", value) if value else ():
        name, equals, root = part.partition("=")
        foreign[name] = Path(root).expanduser() if equals else None
    return foreign
