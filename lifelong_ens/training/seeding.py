"""Random numbers that depend on a seed alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generators inside; afterwards they are where they were."""
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        torch.manual_seed(seed)
        yield


def derived_seed(seed: int, part: int) -> int:
    """A seed for one part of what ``seed`` stands for, such as a member; part 0 has the seed itself."""
    return (seed * 1_000_003 + part * 7_919) % 2**62 if part else seed


def generator_on(device: torch.device | str, seed: int) -> torch.Generator:
    """A generator with its seed, on a device; for the meta device, where nothing has a value, on the CPU."""
    kind = torch.device(device)
    return torch.Generator("cpu" if kind.type == "meta" else kind).manual_seed(seed)
