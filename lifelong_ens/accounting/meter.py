"""What the training of a task costs: FLOPs, bytes saved for backward, seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from lifelong_ens.accounting.flops import FlopMeter


class TrainingMeter:
    """Measures one step of every kind and counts the rows that are trained like it.

    A step of a phase of training (same network, same trainable weights) costs the same for every row, so one
    measured step and the number of rows give the whole, without slowing down the others.

    Attributes:
        rows: Trained so far by this process.
        flops: Training FLOPs so far, rank-1 products included.
        flops_rank1: The part of ``flops`` that is rank-1 products and their gradients.
        saved_bytes: Most bytes that a measured step kept for its backward pass, the weights left out.
        seconds: Time spent training.
    """

    def __init__(self) -> None:
        self.flops = self.flops_rank1 = 0.0
        self.rows = self.saved_bytes = 0
        self.seconds = 0.0
        self._per_row: tuple[float, float] | None = None

    @property
    def measured(self) -> bool:
        """Whether the present phase has its measured step."""
        return self._per_row is not None

    def new_phase(self) -> None:
        """From here on another network, or other weights, are trained: measure again."""
        self._per_row = None

    @contextmanager
    def measure(self, network: nn.Module, rows: int, saved: bool = True) -> Iterator[None]:
        """Run one step on ``rows`` images inside; it stands for all others of this phase.

        Args:
            network: What is trained.
            rows: Images of the step.
            saved: Whether to measure what is kept for backward too; inside torch.func it cannot be.
        """
        with FlopMeter(network) as flops, saved_bytes(network) if saved else nullcontext({}) as kept:
            yield
        self._per_row = flops.total / rows, flops.rank1 / rows
        self.saved_bytes = max(self.saved_bytes, sum(kept.values()))

    def count(self, rows: int) -> None:
        """So many rows were trained, the measured step's included."""
        if self._per_row is None:
            raise RuntimeError("TrainingMeter.count: measure a step of this phase first.")
        self.rows += rows
        self.flops += self._per_row[0] * rows
        self.flops_rank1 += self._per_row[1] * rows

    def add(self, other: TrainingMeter) -> None:
        """What another meter has counted, of a training apart."""
        self.rows += other.rows
        self.flops += other.flops
        self.flops_rank1 += other.flops_rank1
        self.saved_bytes = max(self.saved_bytes, other.saved_bytes)
        self.seconds += other.seconds

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Add the time inside to ``seconds``, the device's queued work included."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds += time.perf_counter() - start


@contextmanager
def saved_bytes(network: nn.Module) -> Iterator[dict[int, int]]:
    """Collect what autograd keeps for backward: storages, address to bytes, each once, weights left out."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    saved: dict[int, int] = {}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
            # while it is held, no other storage can take the same address and hide behind it
            kept.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
    kept.clear()
