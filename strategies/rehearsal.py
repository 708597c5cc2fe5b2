"""Experience replay: every mini-batch also holds images of earlier tasks."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import torch
from avalanche.benchmarks import CLExperience
from avalanche.core import SupervisedPlugin
from torch import Tensor, nn

from lifelong_ens.training.fit import Fit
from strategies.base import Strategy
from strategies.loader import Batch
from strategies.memory import RehearsalNetwork, RehearsalStrategy


def replay(
    body: nn.Module,
    *,
    memory: int = 500,
    fit: Fit | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    plugins: Sequence[SupervisedPlugin] = (),
) -> Strategy:
    """Experience replay: every mini-batch is joined by as many remembered images of earlier tasks.

    Args:
        body: The network; a classifier's last linear layer is taken off.
        memory: Images kept, of all tasks together, at least 0.
        fit: How each task is trained.
        seed: Of all randomness.
        device: Where it is trained.
        plugins: Avalanche plugins.
    """
    network = RehearsalNetwork(body)
    return Replay(network=network, memory=memory, fit=fit, seed=seed, device=device, plugins=plugins)


class Replay(RehearsalStrategy):
    """Training on mini-batches of new rows and as many remembered ones, or all that there are.

    Source: experience replay as in Chaudhry et al. 2019, "On tiny episodic memories in continual learning", arXiv
    1902.10486, with tasks known: the rows of one mixed batch pass through the body together, so that batch norms
    normalise with and remember the statistics of old and new rows alike, and each row goes on to its own head. The loss
    is the mean over all rows.

    Avalanche's ``ReplayPlugin`` (0.6.0) keeps its samples as views of the data sets, out of reach of ``state_dict``,
    chosen by torch's global generator and balanced over tasks but not over classes; its batches hold ``batch_size``
    remembered rows beside a last batch of new ones, however small that is.
    """

    def fit_task(self, validation: Sequence[CLExperience]) -> None:
        """Train the newest task among images of earlier ones."""
        tasks: dict[int, int] = self.model.tasks  # pyright: ignore
        labels = {task: label for label, task in tasks.items()}
        self._labels = torch.tensor([labels[task] for task in range(len(labels))], device=self.device)
        super().fit_task(validation)

    def counted(self, batches: Any, shared: bool = True, saved: bool = True) -> Generator[Batch, None, None]:
        """See ``Strategy.counted``; with rows of earlier tasks among those of each batch."""
        if len(self.past):
            self._task_label = None
            batches = self._mixed(batches)
        yield from super().counted(batches, shared, saved)

    def _mixed(self, batches: Iterable[Sequence[Tensor]]) -> Iterator[Batch]:
        for x, y, *_, labels in batches:
            images, classes, tasks = self.recall(self.draw(len(y)))
            parts = (x, images), (y, classes), (labels, self._labels[tasks])
            yield [torch.cat([new, old.to(new.device)]) for new, old in parts]
