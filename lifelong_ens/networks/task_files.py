"""A BatchEnsemble network on disk: the shared base once, and a small file for every task.

``FOLDER/base.safetensors`` holds what all tasks share, ``FOLDER/tasks/0001.safetensors`` what the first task owns:
its members' rows of every bank and its head. A task file names the hash of the base that it was trained beside.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from lifelong_ens.errors import DamagedFileError, InputError
from lifelong_ens.layers.bank import Bank
from lifelong_ens.networks.batch_ensemble import BatchEnsembleNetwork
from lifelong_ens.store import read_metadata, read_tensors, tensors_sha256, write_tensors

BASE = "base.safetensors"


def save_tasks(network: BatchEnsembleNetwork, folder: str | os.PathLike[str]) -> list[Path]:
    """Write the base and all finished tasks; what is there already and fits is left as it is.

    Raises:
        InputError: The folder holds another base.
    """
    folder = Path(folder)
    base = _base_tensors(network)
    digest = tensors_sha256(base)
    path = folder / BASE
    if not path.exists():
        write_tensors(path, base)
    elif tensors_sha256(read_tensors(path)) != digest:
        raise InputError(f"{path} is the base of another network; choose an empty folder.")
    written = []
    for task, num_classes in enumerate(network.classes_per_task):
        task_path = folder / "tasks" / f"{task + 1:04d}.safetensors"
        if not task_path.exists():
            write_tensors(task_path, _task_tensors(network, task), {"base": digest, "classes": num_classes})
            written.append(task_path)
    return written


def load_tasks(network: BatchEnsembleNetwork, folder: str | os.PathLike[str]) -> BatchEnsembleNetwork:
    """Fill a network that has no tasks yet, built with the same options, from a folder of ``save_tasks``.

    Raises:
        DamagedFileError: A file is damaged, of another network, or a task belongs to another base; it is named.
    """
    if network.num_tasks:
        raise InputError("load_tasks needs a network without tasks; build a new one.")
    folder = Path(folder)
    base = read_tensors(folder / BASE)
    _fill(_base_tensors(network), base, folder / BASE)
    digest = tensors_sha256(base)
    for path in sorted((folder / "tasks").glob("*.safetensors")):
        metadata = read_metadata(path)
        if metadata.get("base") != digest:
            raise DamagedFileError(
                f"{path} was trained beside another base ({str(metadata.get('base'))[:12]}, "
                f"not {digest[:12]}); take the task and {BASE} from the same folder."
            )
        tensors = read_tensors(path)
        network.regrow([int(metadata["classes"])])
        _fill(_task_tensors(network, network.num_tasks - 1), tensors, path)
    return network


def _base_tensors(network: BatchEnsembleNetwork) -> dict[str, Tensor]:
    """What all tasks share: the body without its banks."""
    private = {
        f"{name}.{leaf}"
        for name, module in network.body.named_modules()
        if isinstance(module, Bank)
        for leaf in ("committed", "active")
    }
    return {name: tensor for name, tensor in network.body.state_dict().items() if name not in private}


def _task_tensors(network: BatchEnsembleNetwork, task: int) -> dict[str, Tensor]:
    """What one task owns, as views: its members' rows of every bank, ``(members, *shape)``, and its head."""
    count = network.members_per_task
    tensors = {f"head.{name}": tensor for name, tensor in network.heads[task].state_dict().items()}
    for name, bank in network.body.named_modules():
        if isinstance(bank, Bank):
            for member in range(count):
                stored_nowhere = bank.first is not None and task * count + member == 0
                if not stored_nowhere:
                    tensors[f"{name}.{member}"] = bank.row(task * count + member).detach()
    return tensors


def _fill(targets: dict[str, Tensor], sources: dict[str, Tensor], path: Path) -> None:
    """Copy tensors into a network's own, after checking that all of them fit."""
    wrong = {
        name for name in targets.keys() | sources.keys() if _shape(targets, name) != _shape(sources, name)
    }
    if wrong:
        raise DamagedFileError(
            f"{path} does not fit this network at {', '.join(sorted(wrong)[:3])}"
            f"{' and more' if len(wrong) > 3 else ''}; build the network with the options it was saved with."
        )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(sources[name])


def _shape(tensors: dict[str, Tensor], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None
