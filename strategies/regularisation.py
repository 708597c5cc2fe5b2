"""Weights of the shared body held by how much they matter to the past: EWC and Synaptic Intelligence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
import torch.nn.functional as F
from avalanche.benchmarks import CLExperience
from avalanche.core import SupervisedPlugin
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lifelong_ens.errors import InputError
from lifelong_ens.networks.task import MultiHead
from lifelong_ens.training.fit import Fit
from lifelong_ens.training.loop import evaluating
from lifelong_ens.training.proximal import step_size
from strategies.base import Strategy
from strategies.loader import evaluation_batches
from strategies.model import task_indices

# numbers that the gradients of one chunk of images may take: 128 MiB
CHUNK = 2**25


def ewc(
    body: nn.Module,
    *,
    ewc_lambda: float = 300.0,
    fisher_decay: float | None = None,
    fisher_images: int = 1024,
    fit: Fit | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    plugins: Sequence[SupervisedPlugin] = (),
) -> Strategy:
    """Elastic weight consolidation: weights that earlier tasks are sensitive to are pulled back to their old values.

    Args:
        body: The network; a classifier's last linear layer is taken off.
        ewc_lambda: Strength of the pull, at least 0; the paper's lambda, with its factor of lambda / 2.
        fisher_decay: If given, online EWC: a pull to the newest weights, with older importance times this, in (0, 1].
        fisher_images: Images of a task from which the Fisher information is estimated, at least 1; all if it has fewer.
        fit: How each task is trained.
        seed: Of all randomness.
        device: Where it is trained.
        plugins: Avalanche plugins.
    """
    _at_least_zero("ewc_lambda", ewc_lambda)
    if fisher_decay is not None and not 0 < fisher_decay <= 1:
        raise InputError(f"fisher_decay is above 0 and at most 1, not {fisher_decay}.")
    if fisher_images < 1:
        raise InputError(f"fisher_images is at least 1, not {fisher_images}.")
    network = AnchoredNetwork(body, centred=fisher_decay is None)
    strategy = ElasticWeightConsolidation(network=network, fit=fit, seed=seed, device=device, plugins=plugins)
    strategy.strength, strategy.decay, strategy.fisher_images = ewc_lambda, fisher_decay or 1.0, fisher_images
    return strategy


def synaptic_intelligence(
    body: nn.Module,
    *,
    si_lambda: float = 10.0,
    damping: float = 0.001,
    fit: Fit | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    plugins: Sequence[SupervisedPlugin] = (),
) -> Strategy:
    """Synaptic intelligence: weights are held by how much their own path lowered the loss of earlier tasks.

    Args:
        body: The network; a classifier's last linear layer is taken off.
        si_lambda: Strength of the pull, at least 0; the paper's c.
        damping: Added to a weight's squared distance that its share of the loss is divided by, above 0; the paper's xi.
        fit: How each task is trained.
        seed: Of all randomness.
        device: Where it is trained.
        plugins: Avalanche plugins.
    """
    _at_least_zero("si_lambda", si_lambda)
    if not damping > 0:
        raise InputError(f"damping is above 0, not {damping}.")
    network = AnchoredNetwork(body, centred=False)
    strategy = SynapticIntelligence(network=network, fit=fit, seed=seed, device=device, plugins=plugins)
    # the gradient of c * Omega * distance ** 2
    strategy.strength, strategy.damping = 2 * si_lambda, damping
    return strategy


def _at_least_zero(name: str, value: float) -> None:
    if not value >= 0:
        raise InputError(f"{name} is at least 0, not {value}.")


class Anchor(nn.Module):
    """How much each weight of the body matters to earlier tasks, and where it is held. Flat, ``(weights,)``.

    Attributes:
        importance: Zero where nothing is held.
        centre: Where weights are pulled to; None where that is where they are when a task starts.
        path: In training alone, what each weight has contributed to the fall of the loss (SI).
    """

    component = "buffer"
    importance: Tensor
    centre: Tensor | None
    path: Tensor | None

    def __init__(self, weights: int, centred: bool) -> None:
        super().__init__()
        self.register_buffer("importance", torch.zeros(weights))
        self.register_buffer("centre", torch.zeros(weights) if centred else None)
        self.register_buffer("path", None)


class AnchoredNetwork(MultiHead):
    """One body and a head per task; the body's weights have an anchor.

    Heads have none: a head gets no gradient once its task is over, so that nothing moves it.

    Args:
        body: A network with ``num_features``, or a classifier whose last linear layer is taken off.
        centred: Whether the anchor keeps a centre.
    """

    def __init__(self, body: nn.Module, *, centred: bool) -> None:
        super().__init__(body)
        if not self.weights():
            raise InputError("the body has no trainable weights to hold; use finetune.")
        self.anchor = Anchor(sum(weight.numel() for weight in self.weights().values()), centred)

    def weights(self) -> dict[str, nn.Parameter]:
        """What is anchored: the body's trainable parameters, by name."""
        named = self.body.named_parameters(prefix="body")
        return {name: parameter for name, parameter in named if parameter.requires_grad}

    def flat_weights(self) -> Tensor:
        """A copy of their values, ``(weights,)``."""
        return torch.cat([weight.detach().flatten() for weight in self.weights().values()])

    def split(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat vector, ``(weights,)``, in the shapes of the weights."""
        weights = list(self.weights().values())
        parts = flat.split([weight.numel() for weight in weights])
        return [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]


class AnchoredStrategy(Strategy):
    """Training under the pull ``strength * importance * (weight - centre)``, the gradient of a quadratic penalty.

    It is added to the gradient itself, before clipping, as far as a step can follow it: with momentum, weights that are
    pulled with ``(1 - momentum) / learning rate`` swing around their centre, and many of them swing out of all bounds.
    What a pull is stronger than that acts after the step, ``w <- c + (w - c) / (1 + step_size * rest)``, which holds a
    weight the firmer the stronger it is.

    Attributes:
        strength: What the importance is multiplied by.
    """

    network: AnchoredNetwork
    strength = 0.0

    def fit_task(self, validation: Sequence[CLExperience]) -> None:
        """Train the newest task under the pull of earlier ones."""
        network, anchor = self.network, self.network.anchor
        self._weights = list(network.weights().values())
        self._start = network.flat_weights()
        self._centres = network.split(self._start if anchor.centre is None else anchor.centre.clone())
        pull = self.strength * anchor.importance
        self._strongest = float(pull.max())
        self._pulls = network.split(pull)
        super().fit_task(validation)

    def before_step(self) -> None:
        """Add the pull to the gradients."""
        if not self._strongest:
            return
        limit = 1 / step_size(self.optimizer)
        with torch.no_grad():
            for weight, centre, pull in self._pulled():
                soft = pull if self._strongest <= limit else pull.clamp(max=limit)
                weight.grad.addcmul_(weight - centre, soft)  # pyright: ignore[reportOptionalMemberAccess]

    def start_phase(self, epochs: int | None = None) -> None:
        """See ``Strategy.start_phase``; every step of the optimizer is followed by what it could not do itself."""
        super().start_phase(epochs)
        self.optimizer.register_step_post_hook(self._hold)

    def _hold(self, *_: Any) -> None:
        rate = step_size(self.optimizer)
        if self._strongest * rate <= 1:
            return
        with torch.no_grad():
            for weight, centre, pull in self._pulled():
                rest = (pull * rate - 1).clamp(min=0)
                weight.copy_(centre + (weight - centre) / (1 + rest))

    def _pulled(self) -> Iterator[tuple[nn.Parameter, Tensor, Tensor]]:
        """Weights in training, their centres and how strongly they are pulled."""
        everything = zip(self._weights, self._centres, self._pulls, strict=True)
        return (one for one in everything if one[0].grad is not None)


class ElasticWeightConsolidation(AnchoredStrategy):
    """Elastic weight consolidation with the diagonal empirical Fisher information.

    Source: Kirkpatrick et al., PNAS 2017, arXiv 1612.00796, equation 3: ``lambda / 2 * sum F (theta - theta*)^2`` for
    each earlier task. F is the mean over images of the squared gradient of one image's loss with its own label, taken
    after the task, with the statistics of evaluation, unaugmented, in float32. The square of a batch's mean gradient,
    which is easily taken for it, is smaller by up to the batch size and depends on it.

    The sum of the tasks' penalties is stored exactly in two numbers per weight, however many tasks there are: it is,
    but for a constant, one penalty with the sum of the F around the mean of the ``theta*`` weighted by F. With
    ``decay``, importance is ``decay * old + F`` around the newest weights (Schwarz et al. 2018, arXiv 1805.06370),
    which are the network's own: one number per weight.

    Avalanche's ``EWCPlugin`` (0.6.0) squares the gradient of a batch's mean loss, has no factor 1/2, stores two numbers
    per weight for every task, and its penalty gives the heads of earlier tasks a gradient of zero instead of none, so
    that weight decay shrinks them.

    The default of ``ewc_lambda`` was chosen on validation images of split_digits (MLP, 5 tasks, 5 epochs, 8 seeds: best
    at 1000) and of split_cifar100 (LeNet-5, 10 tasks, 3 epochs, 1 seed: best at 100), between the two.

    Attributes:
        decay: Of the importance of earlier tasks, where there is one penalty around the newest weights.
        fisher_images: How many images F is estimated from.
    """

    decay = 1.0
    fisher_images = 1024

    def fit_task(self, validation: Sequence[CLExperience]) -> None:
        """Train the newest task, then measure what it is sensitive to."""
        super().fit_task(validation)
        anchor, fisher = self.network.anchor, self.fisher()
        if anchor.centre is None:
            anchor.importance = anchor.importance * self.decay + fisher
            return
        weights = self.network.flat_weights()
        anchor.importance = anchor.importance + fisher
        share = torch.where(anchor.importance > 0, fisher / anchor.importance, 1.0)
        anchor.centre = anchor.centre + share * (weights - anchor.centre)

    def fisher(self) -> Tensor:
        """Mean squared gradient of a single image's loss, ``(weights,)``, over images of the newest task."""
        network, weights = self.network, self.network.weights()
        total = torch.zeros_like(network.anchor.importance)
        images = 0
        squares = vmap(grad(self._image_loss), in_dims=(None, 0, 0, None))
        self.meter.new_phase()
        chunks = self.devices.dealt(self._chunks())
        with evaluating(network), closing(self.counted(chunks, shared=False, saved=False)) as counted:
            for x, y, task in counted:
                gradients = squares(weights, x, y, task)  # pyright: ignore[reportArgumentType]
                total += torch.cat([gradients[name].square().sum(dim=0).flatten() for name in weights])
                images += len(y)
        count = int(self.devices.total(torch.tensor(images)))
        if self.meter.measured:
            # it has counted as if each device had had as many as this one
            self.meter.count(count - images * self.devices.count)
        return self.devices.total(total) / count

    def _image_loss(self, weights: Mapping[str, Tensor], x: Tensor, y: Tensor, task: int) -> Tensor:
        logits = functional_call(self.network, dict(weights), (x.unsqueeze(0), task))
        return F.cross_entropy(logits.float(), y.unsqueeze(0))

    def steps_for(self, images: int, task: int = 0) -> int:
        """See ``Strategy.steps_for``; with those of the Fisher information."""
        drawn = min(images, self.fisher_images)
        return super().steps_for(images, task) + math.ceil(drawn / self._chunk_rows())

    def _chunk_rows(self) -> int:
        """Images whose gradients are taken at once."""
        weights = max(len(self.network.anchor.importance), 1)
        return min(max(CHUNK // weights, 1), self.train_mb_size)

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Images, labels and the network's task, of images drawn from the experience."""
        dataset: Any = self.experience.dataset  # pyright: ignore
        generator = torch.Generator().manual_seed(self._task_seed(self.network.num_tasks) + 2)
        drawn = torch.randperm(len(dataset), generator=generator)[: self.fisher_images]
        known: dict[int, int] = self.model.tasks  # pyright: ignore
        batches = evaluation_batches(dataset.subset(drawn.tolist()), self._chunk_rows(), self.device)
        only = getattr(batches, "task_label", None)
        for x, y, *_, labels in batches:
            if only is not None:
                yield x, y, known[only]
                continue
            tasks = task_indices(labels, known)
            for task in tasks.unique().tolist():
                mine = tasks == task
                yield x[mine], y[mine], task


class SynapticIntelligence(AnchoredStrategy):
    """Synaptic intelligence: a weight's importance is the fall of the loss along its path, over its distance squared.

    Source: Zenke, Poole and Ganguli, ICML 2017, arXiv 1703.04200, equations 3-5: the sum over steps of minus the
    gradient times the step, divided by ``distance^2 + damping``, summed over tasks; the penalty is
    ``c * sum Omega (theta - theta*)^2``. The gradient is that of the task's loss alone, before pull, clipping and
    weight decay; the step is what the optimizer really did. Different from the paper, a weight along whose path the
    loss rose gets no importance from this task, where it would be pushed away from its old value.

    Kept between tasks is the importance alone: the old values are those the network has when a task starts.

    Avalanche's ``SynapticIntelligencePlugin`` (0.6.0) does nothing on a CPU: the weights that it remembers from before
    a step are views of the weights themselves, so that no step has a length. Elsewhere it multiplies the step with the
    gradient of loss and penalty together and after clipping, caps importance at 0.001, lets it be negative, has the
    factor 1/2 in its penalty, and lets weight decay shrink the heads of earlier tasks as ``EWCPlugin`` does.

    The defaults were chosen on validation images as for EWC, best on split_digits; on split_cifar100 a ``si_lambda`` of
    1 to 3 was better by 1 to 3 points.

    Attributes:
        damping: The paper's xi.
    """

    damping = 0.001

    def start_phase(self, epochs: int | None = None) -> None:
        """See ``Strategy.start_phase``; the optimizer reports its steps."""
        super().start_phase(epochs)
        self.optimizer.register_step_post_hook(self._stepped)

    def fit_task(self, validation: Sequence[CLExperience]) -> None:
        """Train the newest task, then give the weights their importance."""
        anchor = self.network.anchor
        # a buffer, so that early stopping takes it back together with the weights
        anchor.path = torch.zeros_like(anchor.importance)
        self._paths = self.network.split(anchor.path)
        super().fit_task(validation)
        distance = self.network.flat_weights() - self._start
        gained = anchor.path / (distance.square() + self.damping)
        anchor.importance = anchor.importance + gained.clamp(min=0)
        anchor.path = None

    def before_step(self) -> None:
        """Remember weights and the task's own gradients; add the pull."""
        self._before = [
            (weight, weight.detach().clone(), weight.grad.clone(), path)
            for weight, path in zip(self._weights, self._paths, strict=True)
            if weight.grad is not None
        ]
        super().before_step()

    def _stepped(self, *_: Any) -> None:
        for weight, before, gradient, path in self._before:
            path.addcmul_(weight.detach() - before, gradient, value=-1)
