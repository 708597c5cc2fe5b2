"""A sparse network in training: its masks hold at every step and move every so many steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from lifelong_ens.accounting.flops import layer_calls
from lifelong_ens.accounting.meter import TrainingMeter
from lifelong_ens.ensembles.training import Training
from lifelong_ens.errors import InputError
from lifelong_ens.layers.sparse import Growth, Masks, forget
from lifelong_ens.training.data import ImageData
from lifelong_ens.training.fit import Fit

Decay = Literal["constant", "cosine"]
GrownMomentum = Literal["zero", "kept"]
LEAST_RATE = 0.005


@dataclass(frozen=True)
class MaskUpdates:
    """When and how the masks of a network in training move.

    The published training on CIFAR (FreeTickets' released code) is ``MaskUpdates(every=1000, rate=0.5,
    decay="constant", until=1.0, grown_momentum="kept")``, with either growth. The defaults are for trainings of tens of
    epochs, in which what grows late, or in place of much, does not recover.

    Attributes:
        growth: Connections begin where the ``gradient`` of the last step is largest (RigL), or at ``random`` (SET).
        every: Steps from one update to the next; None for one update an epoch.
        rate: Share of a layer's connections that an update replaces, at first.
        decay: Of the rate over a phase of training: ``constant``, or ``cosine`` down to 0.005.
        until: Share of a phase of training in which masks move; in the rest what has grown is trained. The last step
            of a phase never moves them.
        grown_momentum: What becomes of the optimizer's state where a connection begins: ``zero`` (RigL), or ``kept``
            (FreeTickets), which is the momentum of a connection that was not there, from the dense gradients of all
            steps. These are then counted as training FLOPs.
    """

    growth: Growth = "gradient"
    every: int | None = None
    rate: float = 0.3
    decay: Decay = "cosine"
    until: float = 0.75
    grown_momentum: GrownMomentum = "zero"

    def __post_init__(self) -> None:
        for name, kind in (("growth", Growth), ("decay", Decay), ("grown_momentum", GrownMomentum)):
            if getattr(self, name) not in get_args(kind):
                raise InputError(f"{name} is {' or '.join(get_args(kind))}, not {getattr(self, name)}.")
        if self.every is not None and self.every < 1:
            raise InputError(f"masks are updated every 1 step or more, not every {self.every}.")
        if not 0 < self.rate < 1:
            raise InputError(f"rate is between 0 and 1, the share of connections replaced, not {self.rate}.")
        if not 0 < self.until <= 1:
            raise InputError(f"until is above 0 and at most 1, a share of the training, not {self.until}.")

    def rate_at(self, progress: float) -> float:
        """The share of connections that is replaced after a share ``progress`` of a phase."""
        if self.decay == "constant":
            return self.rate
        return LEAST_RATE + (self.rate - LEAST_RATE) / 2 * (1 + math.cos(math.pi * progress))


class SparseTraining:
    """The training of a network under masks.

    A norm that ``fit.clip_norm`` limits is that of the dense gradient, connections that are off included.

    Attributes:
        masks: What holds now.
        training: The training itself.
        num_updates: How often masks have moved.

    Args:
        network: What is trained, with the zeros of its masks.
        masks: Its masks.
        updates: When and how they move; None for never.
        data: The images.
        fit: How it is trained.
        seed: Of the order of the data, and of growth at random.
        meter: Counts what runs.
        epochs: Of the whole schedule; None for those of ``fit``.
    """

    def __init__(
        self,
        network: nn.Module,
        masks: Masks,
        updates: MaskUpdates | None,
        data: ImageData,
        fit: Fit,
        *,
        seed: int,
        meter: TrainingMeter,
        epochs: int | None = None,
    ) -> None:
        self.masks, self.updates = masks, updates
        self._zero_flops = zero_flops(network, masks, data)
        self._before = meter.flops
        self.training = Training(
            network, data, fit, seed=seed, meter=meter, epochs=epochs, after_step=self._after_step
        )
        self._generator = torch.Generator().manual_seed(seed)
        self.num_updates = self._steps = self._dense_steps = 0
        self.begin_phase(self.training.epochs)

    def begin_phase(self, epochs: int) -> None:
        """A phase of so many epochs begins: the rate of replacement and the share of quiet at the end start anew."""
        self._start, self._end = self._steps, self._steps + epochs * self.training.steps_per_epoch

    def move(self, rate: float) -> None:
        """Prune and grow now, this share of the connections of every layer that is not full."""
        if self.updates is None:
            raise RuntimeError("SparseTraining.move: its masks stand still.")
        # what has grown is zero until it is trained, and a look ahead may not train it
        if not self.training.ahead:
            grown = self.masks.update(rate, self.updates.growth, self._generator)
            if self.updates.grown_momentum == "zero":
                forget(self.training.optimisation.optimizer, grown)
        self.num_updates += 1
        self._dense_steps += self.updates.growth == "gradient" and self.updates.grown_momentum == "zero"

    def _after_step(self, left_out: bool) -> None:
        if not left_out:
            self.masks.apply()
        self._steps += 1
        if self.updates is None:
            return
        self._dense_steps += self.updates.grown_momentum == "kept"
        every = self.updates.every or self.training.steps_per_epoch
        # once an epoch is in its middle: what has just been pruned is not what validation sees
        offset = 0 if self.updates.every else every // 2
        progress = (self._steps - self._start) / max(self._end - self._start, 1)
        if self._steps % every == offset and progress <= self.updates.until and progress < 1:
            self.move(self.updates.rate_at(progress))

    @property
    def flops_effective(self) -> float:
        """FLOPs so far without products of weights that masks hold at zero.

        The gradients of such weights are left out at steps that do not need them: all but those before growth by
        gradient, or none where momentum is kept.
        """
        rows = self.training.epochs_done * len(self.training.data)
        quiet = 1 - self._dense_steps / max(self._steps, 1)
        activations, weights = self._zero_flops
        return self.training.meter.flops - self._before - rows * (activations + quiet * weights)


def zero_flops(network: nn.Module, masks: Masks, data: ImageData) -> tuple[float, float]:
    """FLOPs of one image that are products of weights that masks hold at zero.

    Args:
        network: With masks.
        masks: Their densities, which do not change.
        data: One of its images is shown to the network.

    Returns:
        Those of the outputs and of the gradients of inputs; and those of the gradients of weights.
    """
    image, _ = data.batch(torch.zeros(1, dtype=torch.long), next(network.parameters()).device)
    activations = weights = 0.0
    for call in layer_calls(network, image, gradients=True):
        zeros = call.flops * (1 - masks.density_of(call.weight))
        activations += zeros * (1 + call.input_learns)
        weights += zeros
    return activations, weights
