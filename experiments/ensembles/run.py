"""One cell: a method, trained on one data set with one seed, kept as a model and measured, as one JSON record."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.ensembles.data import Images
from experiments.ensembles.evaluation import Protocol, evaluate
from experiments.pace import EnsemblePace
from experiments.run import PACKAGES, Named, commit_here, device_name, digest
from lifelong_ens.ensembles.ensemble import Ensemble
from lifelong_ens.ensembles.training import Each, Progress
from lifelong_ens.errors import DamagedFileError, InputError
from lifelong_ens.report.ensemble_records import SCHEMA, check_ensemble_record
from lifelong_ens.store import read_json, write_json
from lifelong_ens.training.fit import Fit

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EnsembleCell:
    """What is run.

    Attributes:
        data: The data set and its options.
        method: The method and its options, options of training that it has for itself included.
        network: The network and its options.
        fit: How a network is trained, the same for all methods of a comparison.
        num_members: How many members were asked for.
        held_out: Classes left out of everything.
        seed: Of everything random.
    """

    data: Named
    method: Named
    network: Named
    fit: Fit
    num_members: int
    held_out: int
    seed: int

    @property
    def setting(self) -> str:
        """8 hex digits that are the same for what may be compared: same data, network, training and members."""
        shared = [
            self.data.as_dict(),
            self.network.as_dict(),
            self.fit.as_dict(),
            self.num_members,
            self.held_out,
        ]
        return digest(shared)

    @property
    def key(self) -> str:
        """The name of its files."""
        name = self.method.name.replace(":", ".")
        return f"{self.data.name}-{name}-{self.seed}-{digest([self.setting, self.method.as_dict()])}"

    @property
    def named(self) -> Named:
        """What tells it from the others of a comparison, with the seed."""
        return self.method

    def label(self) -> str:
        """For people."""
        return f"{self.method.name} seed {self.seed}"


def run_cell(
    cell: EnsembleCell,
    function: Callable[..., Ensemble],
    build_network: Callable[[], nn.Module],
    images: Images,
    protocol: Protocol,
    *,
    out: Path,
    device: torch.device,
    pace: EnsemblePace,
    each: Each = map,
) -> dict[str, Any]:
    """Train what is not there yet, measure it, write and return the record."""
    started = datetime.now(UTC).isoformat(timespec="milliseconds")
    folder = model_folder(cell, out)
    ensemble = _trained(folder, build_network, device)
    if ensemble is None:
        ensemble = fit_members(cell, function, build_network, images, device, pace.phase, each)
        ensemble.save(folder)
    pace.measuring = True
    record = {
        "schema": SCHEMA,
        "data": {
            **cell.data.as_dict(),
            "held_out": cell.held_out,
            "classes": list(images.class_names),
            "num_train": len(images.train),
            "num_validation": len(images.validation),
            "num_test": len(images.test),
        },
        "method": cell.method.as_dict(),
        "network": cell.network.as_dict(),
        "fit": cell.fit.as_dict(),
        "asked_members": cell.num_members,
        "seed": cell.seed,
        "setting": cell.setting,
        "protocol": protocol_dict(protocol, images),
        **evaluate(ensemble, images, protocol),
        "spent": asdict(ensemble.spent),
        "versions": {package: version(package) for package in PACKAGES},
        "commit": commit_here(),
        "device": device_name(device),
        "started": started,
        "finished": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }
    write_json(record_path(cell, out), record)
    return record


def record_path(cell: EnsembleCell, out: Path) -> Path:
    """Where the record of a cell goes."""
    return out / "records" / f"{cell.key}.json"


def model_folder(cell: EnsembleCell, out: Path) -> Path:
    """Where the trained ensemble of a cell goes."""
    return out / "models" / cell.key


def protocol_dict(protocol: Protocol, images: Images) -> dict[str, Any]:
    """What was measured, as a record says it; where the files of a set lie is no part of it."""
    return {
        "corruptions": ["cifar_c"] if protocol.cifar_c else list(protocol.corruptions),
        "corrupted_images": protocol.corrupted_images,
        "calibrate": protocol.calibrate,
        "foreign": sorted(images.foreign),
    }


def finished_record(cell: EnsembleCell, protocol: Mapping[str, Any], out: Path) -> dict[str, Any] | None:
    """The record of a cell that was run and measured in this way; a damaged one is named and counts as not run."""
    path = record_path(cell, out)
    if not path.exists():
        return None
    try:
        record = read_json(path)
        check_ensemble_record(record, str(path))
    except DamagedFileError as error:
        log.warning("%s: running again: %s", cell.label(), error)
        return None
    return record if record["protocol"] == protocol else None


def discard(cell: EnsembleCell, out: Path) -> None:
    """Remove a cell's record and model."""
    record_path(cell, out).unlink(missing_ok=True)
    for path in model_folder(cell, out).glob("*"):
        path.unlink()


def _trained(folder: Path, build_network: Callable[[], nn.Module], device: torch.device) -> Ensemble | None:
    """The ensemble that was trained before, measured in another way."""
    if not folder.exists():
        return None
    try:
        return Ensemble.load(folder, build_network, device)
    except InputError as error:
        log.warning("training again: %s", error)
        return None


def fit_members(
    cell: EnsembleCell,
    function: Callable[..., Ensemble],
    build_network: Callable[[], nn.Module],
    images: Images,
    device: torch.device,
    progress: Progress,
    each: Each = map,
) -> Ensemble:
    """Call a cell's method with all that is its own."""
    names = inspect.signature(function).parameters
    own = {name: value for name, value in cell.method.options.items() if name in names}
    training = {name: value for name, value in cell.method.options.items() if name not in names}
    offered = {"num_members": cell.num_members, "each": each}
    offered = {name: value for name, value in offered.items() if name in names}
    return function(
        build_network,
        images.train,
        images.validation,
        **offered,
        fit=Fit(**{**asdict(cell.fit), **training}),
        seed=cell.seed,
        device=device,
        progress=progress,
        **own,
    )
