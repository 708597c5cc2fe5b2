"""One run: a strategy over a stream, measured after every task, resumable, as one JSON record."""

from __future__ import annotations

import json
import logging
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from avalanche.benchmarks import CLExperience, CLScenario
from avalanche.training.templates import SupervisedTemplate

from experiments.examination import Evaluate, Examination
from lifelong_ens.errors import DamagedFileError, InputError, NonFiniteLossError, UnfitNetworkError
from lifelong_ens.report.records import SCHEMA, check_record
from lifelong_ens.store import read_json, read_tensors, tensors_sha256, write_json, write_tensors
from lifelong_ens.training.devices import ALONE, Devices
from lifelong_ens.training.seeding import seeded
from strategies.base import Strategy
from strategies.costs import component_sizes, forward_cost, metered, network_of

log = logging.getLogger(__name__)

Build = Callable[[int], SupervisedTemplate]
PACKAGES = ("lifelong-ens", "torch", "torchvision", "avalanche-lib", "numpy")


@dataclass(frozen=True)
class Named:
    """A name and the options it was given, as they stand in a record."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; what JSON cannot hold is written as text."""
        return {"name": self.name, "options": json.loads(json.dumps(dict(self.options), default=_plain))}


@dataclass(frozen=True)
class Cell:
    """What one run is: one cell of a comparison.

    Attributes:
        stream: The stream and its options, without the seed.
        strategy: The strategy and its own options, with those of training that it has for itself.
        network: The network and its options.
        fit: How each task is trained, as a dictionary; what all strategies of a comparison share.
        seed: Of everything random.
        task_inference: How the task of a test image is guessed beside being told: ``none``, ``entropy`` or
            ``max_probability``.
        evaluate: What is asked after every task, where a strategy's past cannot change: the ``new`` task, or ``all``
            again. Both give the same numbers, so that it is no part of what the run is.
        tuning: How options of the strategy were tuned, see ``lifelong_ens.report.records``; None where they were
            given. It says where a run comes from and is no part of what the run is.
    """

    stream: Named
    strategy: Named
    network: Named
    fit: Mapping[str, Any]
    seed: int
    task_inference: Literal["none", "entropy", "max_probability"] = "none"
    evaluate: Evaluate = "new"
    tuning: Mapping[str, Any] | None = None

    @property
    def setting(self) -> str:
        """8 hex digits that are the same for runs that may be compared: same stream, network and training."""
        return digest([self.stream.as_dict(), self.network.as_dict(), dict(self.fit)])

    @property
    def key(self) -> str:
        """The name of its files: readable, and different for different options."""
        inference = [] if self.task_inference == "none" else [self.task_inference]
        told = digest([self.setting, self.strategy.as_dict(), *inference])
        name = self.strategy.name.replace(":", ".").replace("/", ".")
        return f"{self.stream.name.replace(':', '.')}-{name}-{self.seed}-{told}"

    @property
    def named(self) -> Named:
        """What tells it from the others of a comparison, with the seed."""
        return self.strategy

    def label(self) -> str:
        """For people."""
        return f"{self.strategy.name} seed {self.seed}"


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def digest(value: Any) -> str:
    """8 hex digits that stand for a value that JSON can hold."""
    return sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:8]


@dataclass
class Progress:
    """What a run has measured so far; a checkpoint holds it as it is."""

    num_tasks: int
    accuracy: list[list[float | None]] = field(default_factory=list)
    uncertainty: list[dict[str, Any]] = field(default_factory=list)
    costs: list[dict[str, Any]] = field(default_factory=list)
    tasks: list[dict[str, Any]] = field(default_factory=list)
    task_labels: list[int] = field(default_factory=list)
    reliability: dict[str, list[float]] = field(default_factory=dict)
    seconds_evaluation: float = 0.0

    def __post_init__(self) -> None:
        self.accuracy = self.accuracy or [[None] * self.num_tasks for _ in range(self.num_tasks)]


class Run:
    """A strategy on its way through a stream.

    Args:
        cell: What it is, for the record.
        benchmark: An Avalanche benchmark with task labels.
        build: Makes the strategy; called with torch seeded.
        out: Folder of ``records/`` and ``checkpoints/``.
        on_step: Called after every training step.
        on_epoch: Called with the mean loss after every epoch.
        on_task: Called when a task is finished, with what has been measured so far.
        devices: That train it; the first process alone writes and reads files.
    """

    def __init__(
        self,
        cell: Cell,
        benchmark: CLScenario,
        build: Build,
        out: Path,
        on_step: Callable[[], object] | None = None,
        on_epoch: Callable[[float], object] | None = None,
        on_task: Callable[[Progress], object] | None = None,
        devices: Devices = ALONE,
    ) -> None:
        self.cell, self.benchmark, self.out, self.devices = cell, benchmark, out, devices
        with _seeded(cell.seed):
            self.strategy = build(cell.seed)
        if isinstance(self.strategy, Strategy):
            self.strategy.share_with(devices)
        elif devices.count > 1:
            raise UnfitNetworkError(
                f"{cell.strategy.name} does not run on several devices: it is Avalanche's own, not a "
                "strategies.Strategy; run it on one."
            )
        self.costs = metered(self.strategy)
        self.costs.on_step, self.costs.on_epoch, self.on_task = on_step, on_epoch, on_task
        self.experiences: list[CLExperience] = list(benchmark.streams["train"])
        self.tests: list[CLExperience] = list(benchmark.streams["test"])
        classes = getattr(benchmark, "classes", None)
        self.examination = Examination(self.tests, cell.task_inference, cell.evaluate, classes)
        self.progress = Progress(len(self.experiences))
        self.started = datetime.now(UTC).isoformat(timespec="milliseconds")
        self.doing = ""  # beside training; for whoever looks on

    @property
    def record_path(self) -> Path:
        """Where the record goes."""
        return self.out / "records" / f"{self.cell.key}.json"

    @property
    def checkpoints(self) -> Path:
        """The folder of this run's checkpoints."""
        return self.out / "checkpoints" / self.cell.key

    def execute(self) -> dict[str, Any]:
        """Train what is left to train, write the record and return it; ``resume`` first to go on from a checkpoint.

        Raises:
            NonFiniteLossError: A loss was NaN or infinite; the tasks before it are kept as a checkpoint.
        """
        try:
            if getattr(self.strategy, "joint", False):
                if not self.progress.tasks:
                    self._learn(self.experiences, len(self.experiences) - 1)
            else:
                for task in range(len(self.progress.tasks), len(self.experiences)):
                    self._learn([self.experiences[task]], task)
        except NonFiniteLossError as error:
            done = len(self.progress.tasks)
            raise NonFiniteLossError(
                f"{self.cell.label()}: {error}; {done} finished tasks are kept, try a lower --learning_rate"
            ) from error
        self.doing = "writing"
        record = self._record()
        if self.devices.first:
            write_json(self.record_path, record)
        return record

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one; a damaged one is named and left aside."""
        if not isinstance(self.strategy, Strategy):
            return
        found = self.devices.same(self._newest_checkpoint() if self.devices.first else None)
        if found is not None:
            self._restore(self.strategy, *found)
            log.info("%s: going on after task %d", self.cell.label(), len(self.progress.tasks))

    def _newest_checkpoint(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """What was saved and the state's tensors."""
        for path in sorted(self.checkpoints.glob("task_*.json"), reverse=True):
            try:
                saved = read_json(path)
                return saved, read_tensors(path.with_suffix(".safetensors"), saved["sha256"])
            except (DamagedFileError, FileNotFoundError) as error:
                log.warning("%s: starting this run again: %s", self.cell.label(), error)
        return None

    def _restore(self, strategy: Strategy, saved: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
        progress = Progress(**saved["progress"])
        strategy.network.regrow(saved["classes_per_task"]).load_state_dict(tensors)
        strategy.model.tasks.update({label: task for task, label in enumerate(progress.task_labels)})  # pyright: ignore
        for name, value in saved["meter"].items():
            setattr(strategy.meter, name, value)
        self.progress, self.started = progress, saved["started"]

    def _learn(self, experiences: Sequence[CLExperience], task: int) -> None:
        """Train on the experiences, measure everything, write a checkpoint."""
        valid = self.benchmark.streams.get("valid")
        held_out = [] if valid is None else [list(valid)[one.current_experience] for one in experiences]
        with _seeded(self.cell.seed * 1_000_003 + task):
            self.strategy.train(
                experiences if len(experiences) > 1 else experiences[0], eval_streams=held_out
            )
        self.doing = "evaluating"
        self.progress.task_labels += [label for one in experiences for label in one.task_labels]  # pyright: ignore
        entry = self._measure(task)
        state = self.checkpoints / f"task_{task + 1:04d}.safetensors"
        tensors, state_digest = network_of(self.strategy).state_dict(), ""
        if self.devices.count > 1:
            self.devices.check_alike(tensors_sha256(tensors), self.cell.strategy.name)
        if self.devices.first:
            state_digest = write_tensors(state, tensors)
            entry["disk_bytes"] = state.stat().st_size
        entry |= self._evaluate(task)
        entry["seconds_evaluation"] = self.progress.seconds_evaluation
        self.progress.tasks.append(entry)
        if self.devices.first:
            self._commit_checkpoint(state, state_digest)
        self.doing = ""
        if self.on_task is not None:
            self.on_task(self.progress)

    def _measure(self, task: int) -> dict[str, Any]:
        """The ledger after a task; before anything is evaluated."""
        meter = self.costs.meter
        test: Any = self.tests[task].dataset
        image = test.batch(torch.tensor([0]))[0] if hasattr(test, "batch") else test[0][0].unsqueeze(0)
        forward = forward_cost(self.strategy, image, self.progress.task_labels[-1])
        stored = component_sizes(self.strategy)
        for component in sorted({*stored, *forward.by_component}):
            size = stored.get(component)
            self.progress.costs.append(
                {
                    "trained_task": task,
                    "component": component,
                    "parameters": size.parameters if size else 0,
                    "bytes": size.bytes if size else 0,
                    "flops_forward": forward.by_component.get(component, 0),
                }
            )
        return {
            "trained_task": task,
            "num_classes": len(set(map(int, test.targets))),
            "flops_forward": sum(forward.by_component.values()),
            "flops_forward_rank1": forward.rank1_forward,
            "flops_training": round(meter.flops),
            "flops_training_rank1": round(meter.flops_rank1),
            "saved_bytes": meter.saved_bytes,
            "seconds_training": meter.seconds,
        }

    def _evaluate(self, task: int) -> dict[str, float]:
        """Row ``task`` of the accuracy matrix, over the tasks that have been learnt; calibration over all of them."""
        start = time.perf_counter()
        last = task == len(self.tests) - 1
        row = self.examination.examine(self.strategy, self.progress.task_labels, last)
        for index, share in row.accuracy.items():
            self.progress.accuracy[task][index] = share
        self.progress.uncertainty += [{"trained_task": task, **entry} for entry in row.uncertainty]
        self.progress.reliability = row.reliability
        self.progress.seconds_evaluation += time.perf_counter() - start
        return row.over_stream

    def _commit_checkpoint(self, state: Path, state_digest: str) -> None:
        """Write what goes with the state; with this file the task is finished. Then the earlier ones may go."""
        meter, strategy = self.costs.meter, self.strategy
        checkpoint: dict[str, Any] = {
            "sha256": state_digest,
            "started": self.started,
            "progress": vars(self.progress),
            "meter": {
                name: getattr(meter, name) for name in ("flops", "flops_rank1", "saved_bytes", "seconds")
            },
        }
        if isinstance(strategy, Strategy):
            checkpoint["classes_per_task"] = strategy.network.classes_per_task
        write_json(state.with_suffix(".json"), checkpoint)
        for old in sorted(self.checkpoints.glob("task_*")):
            if old.stem != state.stem:
                old.unlink(missing_ok=True)

    def _record(self) -> dict[str, Any]:
        classes = getattr(self.benchmark, "classes", None)
        stream = self.cell.stream.as_dict()
        return {
            "schema": SCHEMA,
            "stream": {**stream, "num_tasks": len(self.experiences), "classes": classes},
            "strategy": self.cell.strategy.as_dict(),
            "network": self.cell.network.as_dict(),
            "fit": dict(self.cell.fit),
            "seed": self.cell.seed,
            "task_inference": self.cell.task_inference,
            "evaluate": self.examination.mode(self.strategy),
            "tuning": self.cell.tuning,
            "setting": self.cell.setting,
            "accuracy": self.progress.accuracy,
            "uncertainty": self.progress.uncertainty,
            "reliability": self.progress.reliability,
            "costs": self.progress.costs,
            "tasks": self.progress.tasks,
            "notes": self.strategy.network.notes() if isinstance(self.strategy, Strategy) else [],
            "state_sha256": tensors_sha256(network_of(self.strategy).state_dict()),
            "versions": {package: version(package) for package in PACKAGES},
            "commit": commit_here(),
            "device": f"{self.devices.count} x " * (self.devices.count > 1)
            + device_name(self.strategy.device),
            "started": self.started,
            "finished": datetime.now(UTC).isoformat(timespec="milliseconds"),
        }


def finished_record(cell: Cell, out: Path) -> dict[str, Any] | None:
    """The record of a cell that has been run, or None; a damaged one is named and counts as not run."""
    path = out / "records" / f"{cell.key}.json"
    if not path.exists():
        return None
    try:
        record = read_json(path)
        check_record(record, str(path))
    except DamagedFileError as error:
        log.warning("%s: running again: %s", cell.label(), error)
        return None
    return record


def state_tuning(cell: Cell, record: Mapping[str, Any], out: Path) -> None:
    """A finished run that has since been found by tuning says so; the run is the same."""
    if cell.tuning is not None and record.get("tuning") != cell.tuning:
        write_json(out / "records" / f"{cell.key}.json", {**record, "tuning": cell.tuning})


def discard(cell: Cell, out: Path) -> None:
    """Remove a cell's record and checkpoints."""
    (out / "records" / f"{cell.key}.json").unlink(missing_ok=True)
    for path in (out / "checkpoints" / cell.key).glob("task_*"):
        path.unlink()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed all global generators inside; a foreign strategy may use any of them. They are put back afterwards."""
    states = random.getstate(), np.random.get_state()
    try:
        with seeded(seed):
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def commit_here() -> str | None:
    """The commit of the checkout that this file is in, if it is in one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def device_name(device: torch.device) -> str:
    """As records state it."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def check_writable(out: Path) -> None:
    """Fail now, before anything is trained, if nothing can be written to ``out``.

    Raises:
        InputError: Says why.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out):
            pass
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}; choose another --out.") from error
