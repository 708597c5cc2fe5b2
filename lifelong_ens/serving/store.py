"""A folder with what all tasks share, once, and a small file for every task.

``model.json`` says what the model is, ``base.safetensors`` holds what all tasks share, and ``tasks/NAME.safetensors``
what one task has for itself, with its labels and where it comes from in the header of the same file. Each file is
replaced in one step, so that a reader sees a task as it was or as it is. Nothing is pickled, and to add, replace or
remove a task concerns one file, however many there are.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from lifelong_ens.errors import DamagedFileError, InputError, nearest
from lifelong_ens.serving.description import Description
from lifelong_ens.store import (
    map_tensors,
    natural,
    read_json,
    read_labelled,
    tensors_sha256,
    write_json,
    write_tensors,
)

Kind = Literal["members", "network"]
MODEL, BASE, TASKS, SUFFIX = "model.json", "base.safetensors", "tasks", ".safetensors"
# clocks of file systems tick every few milliseconds: two changes within one tick have one time
_TICK_NS = 100_000_000


@dataclass(frozen=True)
class Task:
    """What one task has for itself.

    Attributes:
        kind: ``members`` of the base's banks and a head, or a ``network`` of its own for each member.
        labels: The names of its classes, in the order of its logits.
        tensors: By name: ``head.weight``, ``head.bias`` and the rows of every bank, ``(members, *shape)``; of a network
            the tensors of each member, ``MEMBER.NAME``.
        about: What else is known of it, as JSON can hold it: method, metrics, versions.
    """

    kind: Kind
    labels: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    about: Mapping[str, Any] = field(default_factory=dict)


class TaskStore:
    """The tasks in a folder.

    Attributes:
        folder: Where it is.
        tasks_folder: Where the tasks are in it.
        description: What the model is.

    Args:
        folder: One that ``create`` made.

    Raises:
        InputError: There is no model in the folder.
        DamagedFileError: ``model.json`` cannot be used.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        path = self.folder / MODEL
        if not path.is_file():
            raise InputError(
                f"{self.folder} is not a model: there is no {MODEL} in it; see lifelong-ens export."
            )
        self.tasks_folder = self.folder / TASKS
        self.description = Description.from_json(read_json(path), str(path))

    @classmethod
    def create(
        cls, folder: str | os.PathLike[str], description: Description, base: Mapping[str, Tensor]
    ) -> TaskStore:
        """A folder for the tasks of a model; one that holds the same model already is opened.

        Raises:
            InputError: The folder holds another model.
        """
        folder = Path(folder)
        if (folder / MODEL).exists():
            store = cls(folder)
            if store.description != description:
                raise InputError(f"{folder} holds another model; choose another folder.")
            return store
        write_tensors(folder / BASE, base)
        (folder / TASKS).mkdir(exist_ok=True)
        write_json(folder / MODEL, description.to_json())
        return cls(folder)

    def base(self) -> dict[str, Tensor]:
        """What all tasks share, mapped into memory; its hash is checked.

        Raises:
            DamagedFileError: It is not what ``model.json`` says.
        """
        path = self.folder / BASE
        try:
            tensors = map_tensors(path)
        except FileNotFoundError as error:
            raise DamagedFileError(f"{path} is missing; restore it, or export the model again.") from error
        if tensors_sha256(tensors) != self.description.base:
            raise DamagedFileError(f"{path} is not the base that {MODEL} names; restore it from a copy.")
        return tensors

    def summary(self) -> str:
        """How many tasks there are, and how many bytes what they share and one of them take."""
        sizes = [self.path(name).stat().st_size for name in self.found()]
        base = (self.folder / BASE).stat().st_size
        mean = sum(sizes) // max(len(sizes), 1)
        return f"{self.folder}: {len(sizes)} tasks of {mean:,} bytes beside {base:,} bytes that they share"

    def found(self) -> set[str]:
        """The names of the tasks there are."""
        files = os.listdir(self.tasks_folder)
        return {name.removesuffix(SUFFIX) for name in files if name.endswith(SUFFIX) and name[0] != "."}

    def names(self) -> list[str]:
        """The names of the tasks there are, numbers in their order."""
        return natural(self.found())

    def path(self, name: str) -> Path:
        """Where a task is, or would be.

        Raises:
            InputError: A file cannot have this name, or it would lie elsewhere.
        """
        return self.tasks_folder / file_name(name)

    def write(self, name: str, task: Task) -> Path:
        """Add a task, or replace it, in one step.

        Raises:
            InputError: The name cannot be used.
        """
        path = self.path(name)
        header = {"kind": task.kind, "base": self.description.base, "labels": list(task.labels)}
        write_tensors(path, task.tensors, {**header, "about": dict(task.about)})
        return path

    def read(self, name: str, max_bytes: int | None = None) -> Task:
        """A task as its file says; whether it fits the network is for the model to see.

        Args:
            name: Of the task.
            max_bytes: A larger file is refused without reading it.

        Raises:
            InputError: There is no such task.
            DamagedFileError: The file is damaged, or belongs to another base.
        """
        path = self.path(name)
        try:
            tensors, header = read_labelled(path, max_bytes=max_bytes)
        except FileNotFoundError as error:
            raise self.unknown(name) from error
        if header.get("base") != self.description.base:
            raise DamagedFileError(
                f"{path} was trained beside another base ({str(header.get('base'))[:12]}, not "
                f"{self.description.base[:12]}); take it out, or put it beside its own."
            )
        kind, labels, about = (header.get(key) for key in ("kind", "labels", "about"))
        if kind not in ("members", "network") or not isinstance(labels, list) or not isinstance(about, dict):
            raise DamagedFileError(f"{path} is not a task of this version; export it again.")
        return Task(kind, tuple(map(str, labels)), tensors, about)

    def delete(self, name: str) -> None:
        """Remove a task.

        Raises:
            InputError: There is no such task.
        """
        try:
            self.path(name).unlink()
        except FileNotFoundError as error:
            raise self.unknown(name) from error

    def unknown(self, name: str) -> InputError:
        """The error that there is no such task."""
        names = self.names()
        return InputError(
            f"{self.folder} has no task {name!r}; {nearest(name, names) if names else 'it has none.'}"
        )


def file_name(task: str) -> str:
    """What the file of a task is called.

    Raises:
        InputError: No file can be called so, or it would lie elsewhere.
    """
    usable = task and task[0] != "." and not re.search(r"[/\\\x00-\x1f\x7f]", task)
    if not usable or len(os.fsencode(task)) > 200:
        raise InputError(
            f"a task cannot be called {task[:50]!r}: a name has at most 200 bytes, no slash, and no dot in front."
        )
    return f"{task}{SUFFIX}"


def version(path: str | os.PathLike[str]) -> Hashable:
    """What changes when a file does, or when a file in a folder is added, replaced by another or removed.

    Raises:
        FileNotFoundError: There is none.
    """
    status = os.stat(path)
    now = time.time_ns()
    # what was changed just now may be changed again without a trace: it counts as new at every look
    fresh = now if abs(now - status.st_mtime_ns) < _TICK_NS else 0
    return status.st_ino, status.st_mtime_ns, status.st_size, fresh
