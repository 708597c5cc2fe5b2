"""Reinforced Continual Learning (Xu and Zhu, NeurIPS 2018, arXiv 1805.12369)."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from avalanche.benchmarks import CLExperience
from avalanche.core import SupervisedPlugin
from torch import Tensor, nn

from lifelong_ens.errors import InputError
from lifelong_ens.networks.growing import GrowingNetwork
from lifelong_ens.training.fit import Fit
from strategies.base import Strategy
from strategies.controller import Controller
from strategies.evaluation import accuracy
from strategies.loader import experience_of, hold_out

log = logging.getLogger(__name__)

# the released code's 30 actions
MOST_UNITS = 29
NEEDED = "rcl judges its trials on validation images: give the stream a fraction, --validation 0.1"


@dataclass(frozen=True)
class Search:
    """How the units of a task are searched for; see ``rcl``."""

    trials: int = 20
    max_units: int | None = None
    alpha: float = 1e-4
    controller_learning_rate: float = 0.01
    holdout: float = 0.1
    released: bool = False

    def __post_init__(self) -> None:
        if self.trials < 1 or (self.max_units is not None and self.max_units < 1):
            raise InputError(f"trials and max_units are at least 1, not {self.trials} and {self.max_units}.")
        if self.alpha < 0 or self.controller_learning_rate <= 0:
            raise InputError(
                "alpha is at least 0 and controller_learning_rate above 0, "
                f"not {self.alpha} and {self.controller_learning_rate}."
            )
        if not 0 <= self.holdout < 1:
            raise InputError(f"holdout is at least 0 and below 1, not {self.holdout}.")


PRESETS = {
    "paper": Search(),
    "released_code": Search(trials=50, max_units=MOST_UNITS, controller_learning_rate=0.001, released=True),
}


def rcl(
    body: nn.Module,
    *,
    preset: Literal["paper", "released_code"] = "paper",
    trials: int | None = None,
    max_units: int | None = None,
    alpha: float = 1e-4,
    controller_learning_rate: float | None = None,
    holdout: float = 0.1,
    fit: Fit | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    plugins: Sequence[SupervisedPlugin] = (),
) -> Strategy:
    """A controller tries how many units to add for a task, training each try, and learns from what they reach.

    Args:
        body: The first task's network; a classifier's last linear layer is taken off.
        preset: paper (its equations, and numbers with which the controller learns) or released_code (its numbers).
        trials: Trainings per task after the first, of which the best is kept; paper 20, released_code 50.
        max_units: Most units that a group of channels gains in a task; paper: a quarter of its first width, 29 at
            most; released_code 29.
        alpha: What one added unit costs, in validation accuracy.
        controller_learning_rate: Of Adam; paper 0.01, released_code 0.001 (with which it hardly learns).
        holdout: Share of a task's training images that trials are judged on where the stream has no validation
            images.
        fit: How each trial is trained.
        seed: Of all randomness.
        device: Where it is trained.
        plugins: Avalanche plugins.
    """
    given = {
        "trials": trials,
        "max_units": max_units,
        "controller_learning_rate": controller_learning_rate,
    }
    given = {name: value for name, value in given.items() if value is not None}
    search = replace(PRESETS[preset], alpha=alpha, holdout=holdout, **given)
    if fit is not None and fit.compile:
        log.warning("rcl trains networks of ever new widths: it runs without torch.compile")
        fit = replace(fit, compile=False)
    return Rcl(
        network=ReinforcedNetwork(body), search=search, fit=fit, seed=seed, device=device, plugins=plugins
    )


class Rcl(Strategy):
    """Trains the first task plainly and every later one in trials; the trial with the best reward is its network.

    A trial adds the units that the controller draws to the network as earlier tasks left it, trains them with a new
    head, and is worth ``R = A - alpha * sum_i k_i``: accuracy on validation images less the number of added units.
    The controller is a new one for every task and is not stored. All trials count in the ledger, with their training
    FLOPs and, judging them included, their time.

    Source: the paper as far as its equations are known to us, else the authors' code (see ``Controller``), which
    has fully connected layers only; filters are added in the same way, and where channels are summed they grow
    together. In the code one layer is added to with at most 29 units, whatever its width (312 and 128); the preset
    ``paper`` adds at most a quarter of a narrow one. With either preset we differ from the code in this: batches are
    shuffled, the best trial is kept whatever its sign (there, none whose reward is below 0), new units and heads
    start as torch's layers do, and networks with batch norms have norms for each task.

    Args:
        network: What is trained.
        search: How units are searched for.
        options: As in ``Strategy``.
    """

    network: ReinforcedNetwork

    def __init__(self, *, network: ReinforcedNetwork, search: Search, **options: Any) -> None:
        super().__init__(network=network, **options)
        self.search = search

    def steps_for(self, images: int, task: int = 0) -> int:
        """Those of all trials, on what is left where images are held out."""
        if task == 0:
            return super().steps_for(images, task)
        return self.search.trials * super().steps_for(images - math.ceil(self.search.holdout * images))

    def grows_by_learning(self) -> str | None:
        """See ``Strategy.grows_by_learning``."""
        return "a controller finds how many units each task adds"

    def fit_task(self, validation: Sequence[CLExperience]) -> None:
        """Train the first task, search for the units of every other one."""
        if not validation and self.search.holdout == 0:
            raise InputError(f"{NEEDED}, or leave --holdout out.")
        if self.network.num_tasks == 1:
            super().fit_task(validation)
            return
        validation = validation or self._hold_out()
        controller = Controller(
            self._limits(),
            learning_rate=self.search.controller_learning_rate,
            released=self.search.released,
        )
        best: tuple[float, list[int], dict[str, Tensor]] | None = None
        for trial in range(self.search.trials):
            if self.on_phase is not None:
                self.on_phase(f"trial {trial + 1}/{self.search.trials}")
            units = controller.sample()
            reward = self.run_trial(units, validation)
            controller.learn(units, reward)
            if best is None or reward > best[0]:
                state = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
                best = reward, units, state
        if best is not None:
            self.network.settle(*best, trials=self.search.trials)

    def run_trial(self, units: Sequence[int], validation: Sequence[CLExperience]) -> float:
        """Train the network with these units added and return its reward."""
        self.network.discard()
        self.network.grow(units)
        self.start_phase()
        self.run_epochs(self.fit.epochs, validation)
        return accuracy(self, validation) - self.search.alpha * sum(units)

    def _limits(self) -> list[int]:
        """Most units that each group of channels may gain."""
        widths = (group.size for group in self.network.groups)
        return [self.search.max_units or min(max(width // 4, 1), MOST_UNITS) for width in widths]

    def _hold_out(self) -> list[CLExperience]:
        """Take images for validation out of those that the task is trained on."""
        seed = self._task_seed(self.network.num_tasks) + 2
        kept, held = hold_out(self.adapted_dataset, self.search.holdout, seed)
        if not len(held):
            raise InputError(f"{NEEDED}; task {self.network.num_tasks} has too few images to hold any out.")
        self.adapted_dataset = kept
        self.make_train_dataloader()
        return [experience_of(held, self.experience)]  # pyright: ignore[reportArgumentType]


class ReinforcedNetwork(GrowingNetwork):
    """A growing network that notes how the units of each task were found.

    Attributes:
        searches: Number of trials and best reward of each task, ``(tasks, 2)``; zeros in the first.
    """

    searches: Tensor

    def __init__(self, body: nn.Module) -> None:
        super().__init__(body)
        self.register_buffer("searches", torch.zeros(0, 2))

    def add_task(self, num_classes: int) -> None:
        """See ``GrowingNetwork``."""
        super().add_task(num_classes)
        self.searches = torch.cat([self.searches, self.searches.new_zeros(1, 2)])

    def settle(self, reward: float, units: Sequence[int], state: dict[str, Tensor], *, trials: int) -> None:
        """Make the newest task what it was in an earlier trial, whose ``state_dict`` is given."""
        self.discard()
        self.grow(units)
        self.load_state_dict(state)
        self.searches[-1] = torch.tensor([trials, reward])

    def notes(self) -> list[str]:
        """What each task added, and how good its best trial was."""
        names = ", ".join(group.name for group in self.groups)
        found = [
            f"task {task + 1} added {', '.join(map(str, self.added(task)))} units; "
            f"best of {trials:.0f} trials, reward {reward:.4f}"
            for task, (trials, reward) in enumerate(self.searches.tolist())
            if task
        ]
        return [f"units are those of {names}", *found] if found else []
