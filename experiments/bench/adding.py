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
from lifelong_ens.networks.task_files import save_tasks


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
        yield Race(f"ResNet-18, width {width}, begin, finish and store", contestants, goals, calls=1)
        yield _bytes_per_task(width, Path(folder) / "bytes", device)


def _adding(count: int, width: int, folder: Path, device: torch.device) -> Call:
    """A network with all tasks before the ``count``-th, all stored; each call adds one more."""
    network = BatchEnsembleNetwork(resnet18(width=width)).to(device)
    network.regrow([NUM_CLASSES] * (count - 2))
    add_one(network, folder)
    return lambda: add_one(network, folder)


def add_one(network: BatchEnsembleNetwork, folder: Path) -> None:
    """Add a task to a network and to its store: all that it takes beside its training."""
    network.begin_task(NUM_CLASSES)
    network.finish_task()
    save_tasks(network, folder)


def _bytes_per_task(width: int, folder: Path, device: torch.device) -> Race:
    """What the store grows by with a task, the numbers of its head left out, beside what it holds for all tasks."""
    network, stored = BatchEnsembleNetwork(resnet18(width=width)).to(device), [0]
    for _ in range(2):
        add_one(network, folder)
        stored.append(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))
    task, head = stored[2] - stored[1], sum(one.nbytes for one in network.heads[1].parameters())
    contestants: dict[str, Callable[[], Call]] = {
        "a task, less its head": lambda: lambda: task - head,
        "what all tasks share": lambda: lambda: stored[1] - task,
    }
    goals = (Goal("what all tasks share", "<=", 0.005),)
    return Race(f"ResNet-18, width {width}, bytes stored", contestants, goals, unit="B", timed=False)
