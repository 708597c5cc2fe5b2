"""How far the runs of a folder are: what a process that runs one writes down, and what others read of it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from lifelong_ens.errors import DamagedFileError
from lifelong_ens.store import read_json

# where a run that has no record yet has its small file, and the version of these files
FOLDER = "unfinished"
SCHEMA = 2
# a process on another machine that has written nothing for so long is gone
STALE_SECONDS = 60.0

State = Literal["waiting", "running", "stopped", "failed", "finished"]


@dataclass(frozen=True)
class Status:
    """One run and how far it is.

    Attributes:
        label: For people.
        name: Of its strategy or method; runs of one take about as long as each other.
        state: ``waiting``, ``running``, ``stopped``, ``failed`` or ``finished``.
        doing: Beside training, or what part of it: ``evaluating``, ``trial 3/20``, ``deep 2/4``.
        task: That is being learnt, the first is 1; 0 where there are no tasks.
        num_tasks: Of the stream.
        epoch: Of this task's training, the first is 1; 0 where it is not known.
        epochs: Of a task; 0 where it is not known.
        loss: Of the newest step.
        accuracy: Of the newest evaluation, the mean over tasks, in [0, 1].
        images_per_second: That are trained.
        share: Of its work that is done, in [0, 1].
        seconds: That it has taken.
        seconds_left: Until it is finished, if it goes on as it did.
        memory_bytes: Most that its process had in memory.
        device_bytes: Most that was allocated on its accelerator.
        reason: Why it failed.
    """

    label: str
    name: str = ""
    state: State = "waiting"
    doing: str = ""
    task: int = 0
    num_tasks: int = 0
    epoch: int = 0
    epochs: int = 0
    loss: float | None = None
    accuracy: float | None = None
    images_per_second: float | None = None
    share: float = 0.0
    seconds: float = 0.0
    seconds_left: float | None = None
    memory_bytes: int | None = None
    device_bytes: int | None = None
    reason: str = ""

    def where(self) -> str:
        """``task 3 of 5, epoch 7 of 10``."""
        task = [f"task {self.task} of {self.num_tasks}"] if self.task else []
        epoch = [f"epoch {self.epoch}" + (f" of {self.epochs}" if self.epochs else "")] if self.epoch else []
        return ", ".join([*task, *epoch, *([self.doing] if self.doing else [])])


def as_written(status: Status) -> dict[str, Any]:
    """What a run's file says of its status: with the process, and when that was."""
    loss = status.loss
    known = replace(status, loss=loss if loss is None or abs(loss) < float("inf") else None)
    return {**asdict(known), "pid": os.getpid(), "host": socket.gethostname(), "written": time.time()}


def as_read(written: Mapping[str, Any]) -> Status:
    """The status in a run's file; ``stopped`` where the process that wrote it is gone."""
    names = {one.name for one in fields(Status)}
    status = Status(**{"label": "?", **{name: value for name, value in written.items() if name in names}})
    gone = status.state == "running" and not _alive(written)
    return replace(status, state="stopped", seconds_left=None) if gone else status


def read_statuses(out: str | os.PathLike[str]) -> dict[str, Status]:
    """All runs of a folder that have no record, by the name of their files."""
    found = {}
    for path in sorted((Path(out) / FOLDER).glob("*.json")):
        about = read_about(path)
        if about:
            found[path.stem] = status_of(about)
    return found


def status_of(about: Mapping[str, Any]) -> Status:
    """The status that a run's file tells of."""
    name = str(about.get("name", "?"))
    written = about.get("status")
    status = as_read(written) if isinstance(written, Mapping) else Status(f"{name} seed {about.get('seed')}")
    status = replace(status, name=name)
    return replace(status, state="failed", reason=str(about["problem"])) if about.get("problem") else status


def finished_status(record: Mapping[str, Any]) -> Status:
    """What a record, of a strategy or an ensemble, tells of its run."""
    named = record.get("strategy") or record["method"]
    status = Status(f"{named['name']} seed {record['seed']}", named["name"], "finished", share=1.0)
    if "strategy" not in record:
        accuracy, seconds = record["uncertainty"][0]["accuracy"], record["spent"]["seconds"]
        return replace(status, accuracy=accuracy, seconds=seconds)
    last = record["tasks"][-1]
    return replace(
        status,
        accuracy=mean_accuracy(record["accuracy"]),
        task=len(record["accuracy"]),
        num_tasks=len(record["accuracy"]),
        seconds=last["seconds_training"] + last["seconds_evaluation"],
    )


def mean_accuracy(matrix: list[list[float | None]]) -> float | None:
    """Mean of the newest row of an accuracy matrix that has any entry."""
    rows = ([value for value in row if value is not None] for row in reversed(matrix))
    newest = next((row for row in rows if row), None)
    return sum(newest) / len(newest) if newest else None


def read_about(path: Path) -> dict[str, Any]:
    """What stands in a small file; nothing where there is none or it cannot be read."""
    try:
        found = read_json(path)
    except (DamagedFileError, FileNotFoundError):
        return {}
    return found if isinstance(found, dict) else {}


def _alive(written: Mapping[str, Any]) -> bool:
    if time.time() - float(written.get("written") or 0) > STALE_SECONDS:
        return False
    if written.get("host") != socket.gethostname():
        return True
    try:
        os.kill(int(written.get("pid") or 0), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
