"""From a trained network to a folder that serves its tasks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from lifelong_ens.errors import InputError, UnfitNetworkError
from lifelong_ens.networks.task import TaskNetwork
from lifelong_ens.serving.description import BuildNetwork, Description, ImageInput
from lifelong_ens.serving.model import ServedModel
from lifelong_ens.serving.store import Task, TaskStore, file_name
from lifelong_ens.serving.tensors import base_tensors, member_tensors
from lifelong_ens.store import tensors_sha256
from lifelong_ens.training.loop import evaluating

# noise that a network and what is served of it are shown, to see that they are the same
_ROWS = 4


def export_network(
    network: TaskNetwork,
    folder: str | os.PathLike[str],
    *,
    body: Mapping[str, Any],
    tasks: Mapping[int, str] | None = None,
    labels: Sequence[Sequence[str]] | None = None,
    about: Mapping[str, Any] | None = None,
    metrics: Sequence[Mapping[str, Any]] | None = None,
    images: ImageInput | None = None,
    build_network: BuildNetwork | None = None,
) -> TaskStore:
    """Write tasks that a network has learnt into a folder for ``ServedModel``; each is asked to answer as the network.

    A folder that holds tasks of the same model already gets these beside them, or in the place of those of their names.

    Args:
        network: It has learnt its tasks; nothing of it changes.
        folder: Where they go.
        body: ``name`` and ``options`` of the builder of its body, such as
            ``{"name": "resnet18", "options": {"width": 20, "input_shape": [3, 32, 32]}}``.
        tasks: Which tasks, index to name; all by their numbers from 1 if not given.
        labels: Of every task of the network, the names of its classes; numbers if not given.
        about: What the file of every task should say beside, such as the method's name.
        metrics: What is known of every task of the network, such as its accuracy.
        images: What image files become.
        build_network: Makes the body where its builder is not one of ours; it is needed again to serve it.

    Returns:
        The folder.

    Raises:
        InputError: A task was not learnt, or a name cannot be used.
        UnfitNetworkError: A task of this network has no form that can be served.
    """
    count = network.num_tasks
    width = len(str(count))
    chosen = {index: f"{index + 1:0{width}d}" for index in range(count)} if tasks is None else dict(tasks)
    if not chosen or not set(chosen) <= set(range(count)) or len(set(chosen.values())) < len(chosen):
        raise InputError(
            f"name at least one of the {count} tasks that were learnt, each by a name of its own."
        )
    for name in chosen.values():
        file_name(name)
    classes = network.classes_per_task
    labels = labels or [[str(label) for label in range(size)] for size in classes]
    if [len(one) for one in labels] != classes:
        raise InputError(f"the tasks have {classes} classes; give as many labels for each.")
    base = {} if network.layout is None else base_tensors(network.body)  # pyright: ignore
    description = Description(
        {"name": str(body["name"]), "options": dict(body["options"])},
        tensors_sha256(base),
        network.layout,
        network.members_per_task,
        images,
    )
    metrics = metrics or [{} for _ in range(count)]
    exported = (
        (
            index,
            Task(_kind(network), tuple(labels[index]), tensors, {**(about or {}), "metrics": metrics[index]}),
        )
        for index, tensors in _tensors(network, sorted(chosen))
    )
    first = next(exported)  # what cannot be exported is refused before anything is written
    store = TaskStore.create(folder, description, base)
    for index, task in (first, *exported):
        store.write(chosen[index], task)
    _compare(network, store, chosen, build_network)
    return store


def _kind(network: TaskNetwork) -> Any:
    return "network" if network.layout is None else "members"


def _tensors(network: TaskNetwork, tasks: Sequence[int]) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """What each task has for itself."""
    members = network.members_per_task
    for task in tasks:
        if network.layout is not None:
            yield task, member_tensors(network.body, network.heads, task, members)  # pyright: ignore
        else:
            plain = [network.export_task(task, member) for member in range(members)]
            if any(isinstance(one, fx.GraphModule) for each in plain for one in each.modules()):
                raise UnfitNetworkError(
                    f"a task of {type(network).__name__} is more than its body and a head, and cannot be served; "
                    "network.export_task gives it as a module."
                )
            own = [one.state_dict() for one in plain]
            yield (
                task,
                {f"{member}.{name}": one for member, state in enumerate(own) for name, one in state.items()},
            )


def _compare(
    network: TaskNetwork, store: TaskStore, tasks: Mapping[int, str], build_network: BuildNetwork | None
) -> None:
    """Show noise to the network and to what is served of it; tasks that do not answer alike are taken out again."""
    shape = store.description.image_shape
    if shape is None:
        return
    model = ServedModel(store.folder, build_network)
    device = next(network.parameters()).device
    noise = torch.randn(_ROWS, *shape, generator=torch.Generator().manual_seed(0))
    with evaluating(network):
        for index, name in tasks.items():
            own, served = network(noise.to(device), index).cpu().float(), model(noise, name).float()
            if not torch.allclose(own, served, rtol=1e-3, atol=1e-3 * float(own.abs().max())):
                for each in tasks.values():
                    Path(store.path(each)).unlink(missing_ok=True)
                raise UnfitNetworkError(
                    f"task {name} of this {type(network).__name__} answers otherwise than what would be served of it; "
                    "only networks that compute as their base class does can be exported."
                )
