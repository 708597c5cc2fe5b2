"""Four members that share their weights, against four networks that give the same answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state  # pyright: ignore

from experiments.bench.measuring import Call, Goal, Race
from experiments.bench.shared import ENSEMBLED, answering, images, training_step
from lifelong_ens.convert import MemberNetwork, batch_ensemble

OURS, LOOP, VMAP = "batch_ensemble", "separate networks in a loop", "torch.func.vmap over stacked weights"
NUM_MEMBERS = 4
AT_MOST = 1.05
# the batch for which ours is to be faster on CUDA, not only no slower
CUDA_BATCH = 32


def ensemble_inference(
    device: torch.device, *, batch_sizes: tuple[int, ...] = (1, 32, 256)
) -> Iterator[Race]:
    """The answers of four members, against four networks in a loop and torch.func.vmap.

    Args:
        device: Where.
        batch_sizes: Images, which all members see.
    """
    for name, ensemble, x in _cases(device, batch_sizes):
        ensemble.eval()
        separate = _exported(ensemble)
        against_loop = _goal(device, len(x), 3.0)
        yield Race(
            name,
            {
                OURS: partial(answering, partial(ensemble, x)),
                LOOP: partial(answering, partial(_one_by_one, separate, x)),
                VMAP: partial(_vmap, separate, x),
            },
            (against_loop, Goal(VMAP, "<=", AT_MOST, same_answer=True)),
        )


def ensemble_training(device: torch.device, *, batch_size: int = 32) -> Iterator[Race]:
    """A training step of four members on one batch, against four networks trained in turn.

    Args:
        device: Where.
        batch_size: Images, which all members see.
    """
    goal = _goal(device, batch_size, 2.0)
    for name, ensemble, x in _cases(device, (batch_size,)):
        labels = torch.randint(10, (batch_size,), device=device)
        ensemble.train()
        separate = _exported(ensemble)
        tiled = labels.repeat(NUM_MEMBERS)

        def ours(ensemble: MemberNetwork = ensemble, x: Tensor = x, tiled: Tensor = tiled) -> Call:
            return training_step(lambda: ensemble(x).flatten(0, 1), tiled, ensemble.parameters())

        def loop(nets: Sequence[nn.Module] = separate, x: Tensor = x, labels: Tensor = labels) -> Call:
            steps = [training_step(lambda one=one: one(x), labels, one.parameters()) for one in nets]
            return lambda: torch.cat([step() for step in steps])

        yield Race(name, {OURS: ours, LOOP: loop}, (goal,))


def _goal(device: torch.device, batch_size: int, times_as_fast: float) -> Goal:
    """Beside the loop: no slower, or, where a GPU would be idle between small kernels, so many times as fast."""
    if device.type == "cuda" and batch_size == CUDA_BATCH:
        return Goal(LOOP, ">=", times_as_fast, same_answer=True)
    return Goal(LOOP, "<=", AT_MOST, same_answer=True)


def _cases(device: torch.device, batch_sizes: Sequence[int]) -> Iterator[tuple[str, MemberNetwork, Tensor]]:
    """Every network with members and every batch, named; convolutions in both memory formats where that is usual."""
    for name, (build, shape) in ENSEMBLED.items():
        formats = {"": torch.contiguous_format}
        if "MLP" not in name:
            formats[", channels last"] = torch.channels_last
        for words, memory_format in formats.items():
            ensemble = batch_ensemble(build(), NUM_MEMBERS).to(device, memory_format=memory_format)  # pyright: ignore
            for size in batch_sizes:
                x = images(size, shape, device)[0].contiguous(memory_format=memory_format)
                yield f"{name}{words}, batch {size}", ensemble, x


def _exported(ensemble: MemberNetwork) -> list[nn.Module]:
    return [ensemble.export_member(member) for member in range(NUM_MEMBERS)]


def _one_by_one(networks: Sequence[nn.Module], x: Tensor) -> Tensor:
    return torch.stack([network(x) for network in networks])


def _vmap(networks: Sequence[nn.Module], x: Tensor) -> Call:
    """All networks at once, their weights stacked beforehand."""
    parameters, buffers = stack_module_state(networks)  # pyright: ignore

    def one(parameters: Any, buffers: Any) -> Tensor:
        return functional_call(networks[0], (parameters, buffers), (x,))

    return answering(partial(torch.func.vmap(one), parameters, buffers))
