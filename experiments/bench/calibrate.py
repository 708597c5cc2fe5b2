"""What elementwise work costs on a device, for plans that choose between scaling activations and merging weights."""

from __future__ import annotations

import torch

from experiments.bench.measuring import Call, collected, one_thread, quartiles, seconds_per_call

ROUNDS = 15
# images of a small convolutional network, and one of its larger weights
ACTIVATIONS, WEIGHT = (64, 64, 16, 16), (256, 256, 3, 3)
SAMPLE_SECONDS = 0.02


def measure_constants(device: torch.device) -> dict[str, float]:
    """Seconds and bytes per second of elementwise work on one thread, medians.

    Returns:
        ``launch_seconds``: of an operation on next to no numbers; ``bytes_per_second``: read and written while
        activations are scaled by channel; ``merge_bytes_per_second``: while a weight is, ``W * (s r^T)``.
    """
    with torch.no_grad(), one_thread(), collected():
        tiny, few = torch.ones(8, device=device), torch.ones(8, device=device)
        x, r = torch.ones(ACTIVATIONS, device=device), torch.ones(ACTIVATIONS[1], 1, 1, device=device)
        weight = torch.ones(WEIGHT, device=device)
        out, into = (torch.ones(size, device=device) for size in WEIGHT[:2])
        launch = _seconds(lambda: tiny * few, device)
        scaling = _seconds(lambda: x * r, device)
        merging = _seconds(lambda: weight * (out.unsqueeze(1) * into)[:, :, None, None], device)
    return {
        "launch_seconds": launch,
        "bytes_per_second": 2 * x.nbytes / max(scaling - launch, 1e-9),
        # two operations: the outer product is made first
        "merge_bytes_per_second": 2 * weight.nbytes / max(merging - 2 * launch, 1e-9),
    }


def _seconds(call: Call, device: torch.device) -> float:
    """The median of several samples of one call."""
    call()
    count = max(1, round(SAMPLE_SECONDS / max(seconds_per_call(call, 10, device), 1e-7)))
    return quartiles([seconds_per_call(call, count, device) for _ in range(ROUNDS)])[1]
