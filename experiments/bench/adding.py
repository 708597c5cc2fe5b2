"""Adding a task beside many, and what it takes in the store."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from experiments.bench.measuring import Call, Goal, Race
from experiments.bench.shared import NUM_CLASSES
from lifelong_ens.networks.batch_ensemble import BatchEnsembleNetwork
from lifelong_ens.networks.plain import resnet18
from lifelong_ens.serving import ServedModel, Task, TaskStore, export_network
from lifelong_ens.serving.tensors import member_tensors


def add_task(
    device: torch.device, *, tasks: tuple[int, ...] = (10, 100, 1000), width: int = 64
) -> Iterator[Race]:
    """Adding a task to a ResNet-18 that knows 10, 100 or 1,000, stored on disk; and its bytes, without its head.

    Args:
        device: Where the network is.
        tasks: How many there are with the first one that is added.
        width: Channels of the first stage.
    """
    with tempfile.TemporaryDirectory() as folder:
        names = [f"task {count:,}" for count in tasks]
        builders: list[Callable[[], Call]] = [
            lambda count=count: _adding(count, width, Path(folder) / str(count), device) for count in tasks
        ]
        contestants = dict(zip(names, builders, strict=True))
        goals = tuple(Goal(names[0], "<=", 1.2, ours=name) for name in names[1:])
        # calls=1: each adds a task
        yield Race(f"ResNet-18, width {width}, network, store and served model", contestants, goals, calls=1)
        yield _bytes_per_task(width, Path(folder) / "bytes", device)


def _adding(count: int, width: int, folder: Path, device: torch.device) -> Call:
    """A network with all tasks before the ``count``-th, all stored and served; each call adds one more."""
    network = BatchEnsembleNetwork(resnet18(width=width)).to(device)
    network.regrow([NUM_CLASSES] * (count - 1))
    store = export_network(network, folder, body={"name": "resnet18", "options": {"width": width}})
    model = ServedModel(folder, device=device)
    for name in store.names():
        model.labels(name)
    return lambda: add_one(network, store, model)


def add_one(network: BatchEnsembleNetwork, store: TaskStore, model: ServedModel) -> None:
    """Add a task to a network, to its store, and to a model that serves it: all that it takes beside its training."""
    network.begin_task(NUM_CLASSES)
    network.finish_task()
    index = network.num_tasks - 1
    labels = tuple(map(str, range(NUM_CLASSES)))
    store.write(
        f"{index + 1}", Task("members", labels, member_tensors(network.body, network.heads, index, 1), {})
    )
    model.labels(f"{index + 1}")


def _bytes_per_task(width: int, folder: Path, device: torch.device) -> Race:
    """What the store grows by with a task, the numbers of its head left out, beside what it holds for all tasks."""
    network = BatchEnsembleNetwork(resnet18(width=width)).to(device).regrow([NUM_CLASSES])
    store = export_network(network, folder, body={"name": "resnet18", "options": {"width": width}})
    task = store.path(store.names()[0]).stat().st_size
    shared = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) - task
    head = sum(one.nbytes for one in network.heads[0].parameters())
    contestants: dict[str, Callable[[], Call]] = {
        "a task, less its head": lambda: lambda: task - head,
        "what all tasks share": lambda: lambda: shared,
    }
    goals = (Goal("what all tasks share", "<=", 0.005),)
    return Race(f"ResNet-18, width {width}, bytes stored", contestants, goals, unit="B", timed=False)
