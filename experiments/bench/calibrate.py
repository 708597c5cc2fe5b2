"""What elementwise work costs on a device, for plans that choose between scaling activations and merging weights."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from experiments.bench.measuring import Call, collected, one_thread, quartiles, seconds_per_call
from lifelong_ens.layers.plan import Constants

ROUNDS = 15
# images of a small convolutional network; several of them, together larger than caches, as in training
ACTIVATIONS, COPIES = (64, 32, 32, 32), 8
SAMPLE_SECONDS = 0.02


def measure_constants(device: torch.device) -> Constants:
    """What the plans of rank-1 layers reckon with: a module that does next to nothing, and scaling by channel."""
    with torch.no_grad(), one_thread(), collected():
        tiny, module = torch.ones(8, device=device), nn.ReLU()
        tensors = [torch.ones(ACTIVATIONS, device=device) for _ in range(COPIES)]
        factors, turn = torch.ones(ACTIVATIONS[1], 1, 1, device=device), itertools.cycle(tensors)
        launch = _seconds(lambda: module(tiny), device)
        scaling = _seconds(lambda: next(turn) * factors, device)
    return Constants(launch, 2 * tensors[0].nbytes / max(scaling - launch, 1e-9))


def _seconds(call: Call, device: torch.device) -> float:
    """The median of several samples of one call."""
    call()
    count = max(1, round(SAMPLE_SECONDS / max(seconds_per_call(call, 10, device), 1e-7)))
    return quartiles([seconds_per_call(call, count, device) for _ in range(ROUNDS)])[1]
