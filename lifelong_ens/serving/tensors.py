"""Which tensors all tasks share and which are one task's, of a network and in a file."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lifelong_ens.errors import DamagedFileError
from lifelong_ens.layers.bank import Bank
from lifelong_ens.networks.growing import take_shapes
from lifelong_ens.networks.task import Heads

# a network that grew is larger than the one it was built as; a file that says it is larger than this is wrong
_MOST_GROWN = 16
_HEADER_BYTES = 4 * 2**20
_MOST_CLASSES = 100_000


def named_banks(body: nn.Module) -> Iterator[tuple[str, Bank]]:
    """Every bank of a body, with its name."""
    return ((name, module) for name, module in body.named_modules() if isinstance(module, Bank))


def base_tensors(body: nn.Module) -> dict[str, Tensor]:
    """What all tasks share: the body without its banks."""
    private = {f"{name}.{leaf}" for name, _ in named_banks(body) for leaf in ("committed", "active")}
    return {name: tensor for name, tensor in body.state_dict().items() if name not in private}


def member_tensors(body: nn.Module, heads: Heads, task: int, members: int) -> dict[str, Tensor]:
    """What one task has for itself: its members' rows of every bank, ``(members, *shape)``, and its head."""
    own = range(task * members, task * members + members)
    rows = {name: torch.stack([bank.row(one).detach() for one in own]) for name, bank in named_banks(body)}
    return {f"head.{name}": tensor for name, tensor in heads[task].state_dict().items()} | rows


def check_members(
    tensors: Mapping[str, Tensor], body: Any, members: int, labels: tuple[str, ...], source: str
) -> None:
    """Check that a task's tensors are those of ``member_tensors``, before any of them is used.

    Raises:
        DamagedFileError: A tensor is missing, too many, or of another shape or dtype.
    """
    like = next(body.parameters()).dtype
    expected = {
        name: ((members, *bank.committed.shape[1:]), bank.committed.dtype) for name, bank in named_banks(body)
    }
    expected["head.weight"] = ((len(labels), body.num_features), like)
    expected["head.bias"] = ((len(labels),), like)
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    _check_labels(found.get("head.weight", (None,))[0], labels, source)
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise DamagedFileError(
            f"{source} does not fit this model at {', '.join(wrong[:3])}{' and more' if len(wrong) > 3 else ''}; "
            "export it again, from the network that the model was made of."
        )


def networks_of(
    tensors: Mapping[str, Tensor], body: nn.Module, members: int, labels: tuple[str, ...], source: str
) -> tuple[nn.Module, ...]:
    """The plain networks of a task, one for each member, as wide as their tensors.

    Args:
        tensors: ``MEMBER.NAME`` to tensor, the names being those of ``TaskNetwork.export_task``.
        body: The untrained body; it is copied.
        members: How many.
        labels: Of the classes.
        source: Named in errors.

    Raises:
        DamagedFileError: The tensors are not those of such networks.
    """
    networks = []
    for member in range(members):
        head = nn.Linear(body.num_features, len(labels))  # pyright: ignore
        network: Any = nn.Sequential(copy.deepcopy(body), head).requires_grad_(False).eval()
        prefix = f"{member}."
        own = {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}
        _check_labels(tuple(own["1.weight"].shape) if "1.weight" in own else None, labels, source)
        take_shapes(network, own, "")
        try:
            network.load_state_dict(own)
        except RuntimeError as error:
            line = str(error).splitlines()[-1].strip()
            raise DamagedFileError(
                f"{source} does not fit this model: {line[:200]}; export it again."
            ) from error
        networks.append(network)
    if len(tensors) != sum(len(network.state_dict()) for network in networks):
        raise DamagedFileError(f"{source} holds more than {members} networks of this model; export it again.")
    return tuple(networks)


def max_task_bytes(body: Any, members: int) -> int:
    """More bytes than any task's file has."""
    network = sum(tensor.numel() * tensor.element_size() for tensor in body.state_dict().values())
    head = _MOST_CLASSES * (body.num_features + 1) * 4
    return members * (_MOST_GROWN * network + head) + _HEADER_BYTES


def _check_labels(shape: tuple[int, ...] | None, labels: tuple[str, ...], source: str) -> None:
    if shape and shape[0] != len(labels):
        raise DamagedFileError(
            f"{source} has {len(labels)} labels for a head of {shape[0]} classes; export it again."
        )
