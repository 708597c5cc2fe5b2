"""The model that answers from a folder of tasks."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lifelong_ens.errors import DamagedFileError, InputError
from lifelong_ens.layers.exported import log_mean_probability
from lifelong_ens.metrics.uncertainty import TaskInference, task_certainty
from lifelong_ens.networks.member_body import MemberBody
from lifelong_ens.networks.task import by_task
from lifelong_ens.serving.description import BuildNetwork, ImageInput
from lifelong_ens.serving.heads import SlotHeads
from lifelong_ens.serving.store import Task, TaskStore, version
from lifelong_ens.serving.tensors import (
    base_tensors,
    check_members,
    max_task_bytes,
    named_banks,
    networks_of,
)
from lifelong_ens.store import natural
from lifelong_ens.training.data import channels_last

Tasks = str | int | Sequence[str] | Tensor
# how long a file is trusted not to have been written into, where no file of its folder was replaced
_TRUSTED_SECONDS = 0.1
# rows that all tasks together are shown in one pass when the task of an image is not known
_ROWS_PER_PASS = 1024


@dataclass
class _Loaded:
    """A task in memory: a slot in the banks, or networks of its own."""

    path: str
    version: Hashable
    checked: float
    labels: tuple[str, ...]
    about: Mapping[str, Any]
    slot: int | None
    networks: tuple[nn.Module, ...] = ()


class ServedModel:
    """Answers for any of the tasks in a folder, and for rows of many of them in one forward pass.

    A task is read when it is first asked for. What is added to the folder, replaced or removed by whomever is noticed
    at the next call (a file that is written into, not replaced, a tenth of a second later); a call answers with all of
    a task as it was, or as it is. Calls from several threads wait for each other.

    Attributes:
        store: The folder.
        tasks: Names of the tasks that this model has met, at first all there are. It only ever grows: a position in it
            goes on meaning the same task.

    Args:
        folder: One that ``lifelong-ens export`` or ``export_network`` wrote.
        build_network: Makes the network where its builder is not one of ours.
        device: Where it runs.

    Raises:
        InputError: The folder holds no model, or its network is not one of ours.
        DamagedFileError: A file of it is damaged.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        build_network: BuildNetwork | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.store, self.device = TaskStore(folder), torch.device(device)
        about = self.store.description
        self._body: Any = about.build(build_network)
        self._max_bytes = max_task_bytes(self._body, about.members_per_task)
        self._network = None if about.layout is None else self._shared(self._body)
        self.tasks = self.store.names()
        self._met = set(self.tasks)
        self._loaded: dict[str, _Loaded] = {}
        self._free: list[int] = []
        self._seen: Hashable = None
        self._lock = threading.RLock()

    @property
    def images(self) -> ImageInput:
        """How an image file becomes what the network reads.

        Raises:
            InputError: The model does not say.
        """
        if self.store.description.images is None:
            raise InputError(
                f"{self.store.folder} does not say what images it reads; give it tensors, from Python."
            )
        return self.store.description.images

    def __call__(self, x: Tensor, task: Tasks) -> Tensor:
        """Logits ``(batch, classes)``; where a task holds several members, the logarithm of their mean probability.

        Args:
            x: Normalised images ``(batch, C, H, W)``.
            task: The task of all rows by its name or its position in ``tasks``; or one for each row, as a list of names
                or as positions, int64 ``(batch,)``. Then the logits are as wide as the widest of these tasks and -inf
                behind the classes of a narrower one; ``num_classes`` tells how many each row has.

        Raises:
            InputError: There is no such task, or not one for each row.
            DamagedFileError: The file of a task cannot be used.
        """
        logits = self.member_logits(x, task)
        return logits[0] if len(logits) == 1 else log_mean_probability(logits)

    def member_logits(self, x: Tensor, task: Tasks) -> Tensor:
        """Logits of each member that a task holds, ``(members, batch, classes)``; see ``__call__``."""
        x = channels_last(x.to(self.device))
        names, position = self._rows(task, len(x))
        with self._lock:
            loaded = self._ready(names)
            if position is None or len(names) == 1:
                return self._of_one(x, loaded[0])
            slots = torch.tensor([-1 if one.slot is None else one.slot for one in loaded])
            slots_of_rows = slots[position].to(self.device)
            shared: Any = self._network
            if min(slots.tolist()) >= 0:
                return shared.member_logits(x, slots_of_rows)
            # those with a slot go through the shared network together, each of the others through its own
            passes = torch.where(slots < 0, torch.arange(len(slots)), -1)[position].to(self.device)

            def run(rows: Tensor, one: int) -> Tensor:
                if one < 0:
                    return shared.member_logits(rows, slots_of_rows[passes < 0])
                return self._of_one(rows, loaded[one])

            return by_task(x, passes, run)

    def num_classes(self, task: Tasks, rows: int | None = None) -> Tensor:
        """How many classes each row's task has, int64 ``(rows,)``; ``rows`` is needed for one task alone."""
        names, position = self._rows(task, rows)
        with self._lock:
            counts = torch.tensor([len(one.labels) for one in self._ready(names)])
        return counts.expand(rows or 1) if position is None else counts[position]

    def labels(self, task: str) -> tuple[str, ...]:
        """The names of a task's classes, in the order of its logits."""
        with self._lock:
            return self._ready([task])[0].labels

    def about(self, task: str) -> Mapping[str, Any]:
        """What is known of a task: method, metrics, versions."""
        with self._lock:
            return self._ready([task])[0].about

    def infer_task(self, x: Tensor, rule: TaskInference = "entropy") -> list[str]:
        """The task of each row where it is not known: all tasks answer, the surest is believed.

        Args:
            x: As in ``__call__``.
            rule: As in ``task_certainty``.
        """
        names = self.store.names()
        if not names:
            raise InputError(f"{self.store.folder} has no tasks.")
        step = max(_ROWS_PER_PASS // max(len(x), 1), 1)
        certainty = []
        for start in range(0, len(names), step):
            some = names[start : start + step]
            rows = [name for name in some for _ in range(len(x))]
            logits = self(x.repeat(len(some), *[1] * (x.dim() - 1)), rows).unflatten(0, (len(some), len(x)))
            classes = torch.tensor([len(self.labels(name)) for name in some], device=logits.device)
            certainty.append(task_certainty(logits.float().log_softmax(dim=-1), classes, rule))
        return [names[index] for index in torch.cat(certainty).argmax(dim=0).tolist()]

    def _shared(self, body: nn.Module) -> Any:
        """The body with banks that have no members yet, and the base's tensors as they lie in their file."""
        about = self.store.description
        with torch.random.fork_rng(devices=[]):
            shared, selection = about.layout.with_members(body, 0)  # pyright: ignore
        base, path = self.store.base(), self.store.folder
        expected = base_tensors(shared)
        wrong = {
            name
            for name in expected.keys() | base.keys()
            if name not in base
            or name not in expected
            or (base[name].shape, base[name].dtype) != (expected[name].shape, expected[name].dtype)
        }
        if wrong:
            raise DamagedFileError(
                f"the base in {path} does not fit its network at {', '.join(sorted(wrong)[:3])}; export it again."
            )
        shared.load_state_dict(base, strict=False, assign=True)
        network: Any = MemberBody(shared.to(self.device), selection)
        network.heads = SlotHeads(shared.num_features)  # pyright: ignore
        network.members_per_task = about.members_per_task
        return network.requires_grad_(False).eval()

    def _rows(self, task: Tasks, rows: int | None) -> tuple[list[str], Tensor | None]:
        """The tasks that are asked for, each once, and for each row which of them it is; None where it is one."""
        if isinstance(task, str):
            return [task], None
        if isinstance(task, int):
            return [self._name(task)], None
        if isinstance(task, Tensor):
            if task.dim() != 1 or task.is_floating_point():
                raise InputError(
                    f"tasks are int64 (batch,), one for each row, not {task.dtype} {tuple(task.shape)}."
                )
            present, position = task.cpu().unique(return_inverse=True)
            names = [self._name(one) for one in present.tolist()]
        else:
            order = {name: index for index, name in enumerate(dict.fromkeys(task))}
            names, position = list(order), torch.tensor([order[name] for name in task], dtype=torch.long)
        if len(position) != (len(position) if rows is None else rows) or not names:
            raise InputError(
                f"{len(position)} tasks were given for {rows} rows; give one for each, or one for all."
            )
        return names, position

    def _name(self, position: int) -> str:
        if not 0 <= position < len(self.tasks):
            raise InputError(f"there is no task at position {position}; the model has met {len(self.tasks)}.")
        return self.tasks[position]

    def _of_one(self, x: Tensor, task: _Loaded) -> Tensor:
        """Member logits of rows that all belong to one task."""
        if task.slot is None or self._network is None:
            return torch.stack([network(x) for network in task.networks])
        return self._network.member_logits(x, task.slot)

    def _ready(self, names: Iterable[str]) -> list[_Loaded]:
        """These tasks as they are in the folder now."""
        seen, now = version(self.store.tasks_folder), time.monotonic()
        trusted = now - _TRUSTED_SECONDS
        if seen != self._seen:
            self._look_round()
            self._seen, trusted = seen, now
        found = []
        for name in names:
            loaded = self._loaded.get(name)
            if loaded is None or loaded.checked <= trusted:
                loaded = self._check(name, loaded)
                loaded.checked = now
            found.append(loaded)
        return found

    def _check(self, name: str, loaded: _Loaded | None) -> _Loaded:
        """The task as it is in its file now."""
        path = str(self.store.path(name)) if loaded is None else loaded.path
        try:
            now = version(path)
        except FileNotFoundError as error:
            raise self.store.unknown(name) from error
        return self._load(name, path, now) if loaded is None or loaded.version != now else loaded

    def _look_round(self) -> None:
        """Take note of new tasks, and drop those that are gone."""
        found = self.store.found()
        for name in natural(found - self._met):
            self._met.add(name)
            self.tasks.append(name)
        for name in self._loaded.keys() - found:
            gone = self._loaded.pop(name)
            if gone.slot is not None:
                self._free.append(gone.slot)

    def _load(self, name: str, path: str, now: Hashable) -> _Loaded:
        """Read a task, check all of it, and only then put it in the place of what there was."""
        task = self.store.read(name, self._max_bytes)
        before = self._loaded.get(name)
        slot = None if before is None else before.slot
        networks: tuple[nn.Module, ...] = ()
        if task.kind == "members":
            slot = self._put(task, slot, path)
        else:
            networks = self._own_networks(task, path)
            if slot is not None:
                self._free.append(slot)
            slot = None
        self._loaded[name] = loaded = _Loaded(path, now, 0.0, task.labels, task.about, slot, networks)
        return loaded

    def _put(self, task: Task, slot: int | None, path: str) -> int:
        """Write a task's rows into a slot of the banks, a new one where it has none and none is free."""
        if self._network is None:
            raise DamagedFileError(f"{path} belongs to a base, and this model has none; take it out.")
        count, heads = self._network.members_per_task, self._network.heads
        check_members(task.tensors, self._network.body, count, task.labels, path)
        if slot is None:
            slot = self._free.pop() if self._free else len(heads)
        with torch.no_grad():
            for name, bank in named_banks(self._network.body):
                rows = task.tensors[name]
                if slot == len(heads):
                    bank.append(rows)
                    bank.commit()
                else:
                    for member in range(count):
                        bank.row(slot * count + member).copy_(rows[member])
        heads.put(slot, *(task.tensors[f"head.{name}"].to(self.device) for name in ("weight", "bias")))
        return slot

    def _own_networks(self, task: Task, path: str) -> tuple[nn.Module, ...]:
        """A task's own networks; that their layers fit each other is seen by running them."""
        count = self.store.description.members_per_task
        networks = networks_of(task.tensors, self._body, count, task.labels, path)
        shape = self.store.description.image_shape
        try:
            if shape is not None:
                with torch.no_grad():
                    for network in networks:
                        network(torch.zeros(1, *shape))
        except RuntimeError as error:
            raise DamagedFileError(
                f"{path} does not fit this model: {str(error).splitlines()[0][:200]}; export it again."
            ) from error
        return tuple(network.to(self.device) for network in networks)
