"""Gradients that must not raise the loss of remembered images: A-GEM and GEM."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from avalanche.core import SupervisedPlugin
from scipy.optimize import nnls
from torch import Tensor, nn

from lifelong_ens.errors import InputError
from lifelong_ens.training.fit import Fit
from lifelong_ens.training.losses import member_loss
from strategies.base import Strategy
from strategies.memory import RehearsalNetwork, RehearsalStrategy


def agem(
    body: nn.Module,
    *,
    memory: int = 500,
    reference_rows: int = 128,
    fit: Fit | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    plugins: Sequence[SupervisedPlugin] = (),
) -> Strategy:
    """Averaged GEM: no step may raise, to first order, the loss of a random batch of remembered images.

    Args:
        body: The network; a classifier's last linear layer is taken off.
        memory: Images kept, of all tasks together, at least 0.
        reference_rows: Remembered images drawn at every step, at least 1.
        fit: How each task is trained.
        seed: Of all randomness.
        device: Where it is trained.
        plugins: Avalanche plugins.
    """
    if reference_rows < 1:
        raise InputError(f"reference_rows is at least 1, not {reference_rows}.")
    network = RehearsalNetwork(body)
    strategy = AveragedGem(network=network, memory=memory, fit=fit, seed=seed, device=device, plugins=plugins)
    strategy.reference_rows = reference_rows
    return strategy


def gem(
    body: nn.Module,
    *,
    memory: int = 500,
    margin: float = 0.5,
    fit: Fit | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    plugins: Sequence[SupervisedPlugin] = (),
) -> Strategy:
    """Gradient episodic memory: no step may raise, to first order, the loss of any earlier task's remembered images.

    Args:
        body: The network; a classifier's last linear layer is taken off.
        memory: Images kept, of all tasks together, at least 0; every step passes all of them through the network.
        margin: Least weight of each earlier task's gradient in a step that is corrected, at least 0.
        fit: How each task is trained.
        seed: Of all randomness.
        device: Where it is trained.
        plugins: Avalanche plugins.
    """
    if not margin >= 0:
        raise InputError(f"margin is at least 0, not {margin}.")
    network = RehearsalNetwork(body)
    strategy = Gem(network=network, memory=memory, fit=fit, seed=seed, device=device, plugins=plugins)
    strategy.margin = margin
    return strategy


class GradientMemory(RehearsalStrategy):
    """What GEM and A-GEM share: a gradient over all trainable parameters, heads included, that may be replaced.

    A parameter without a gradient, such as an earlier task's head, counts as zero; a corrected gradient is written to
    all of them. Remembered rows pass through the network in training mode after the new ones, so that batch norms
    normalise them with their own statistics and remember those of both.
    """

    def before_step(self) -> None:
        """Replace the gradient where remembered images object."""
        if not len(self.past):
            return
        parameters = self.optimisation.parameters
        present = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        gradient = _flat(present)
        corrected = self.corrected(gradient)
        if corrected is gradient:
            return
        parts = corrected.split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter).clone()

    def corrected(self, gradient: Tensor) -> Tensor:
        """The gradient ``(parameters,)`` to step along: itself where nothing objects."""
        raise NotImplementedError

    def reference(self, rows: Tensor) -> Tensor:
        """The gradient of the mean loss of remembered images, ``(parameters,)``."""
        x, y, tasks = self.recall(rows)
        weight = 1.0
        if self.sharing is not None:
            mine = self.sharing.take(len(y))
            x, y, tasks, weight = x[mine], y[mine], tasks[mine], self.sharing.weight
        with self.optimisation.precision(self.device):
            loss = member_loss(self.network(x, tasks), y) * weight
        gradients = torch.autograd.grad(loss, self.optimisation.parameters, materialize_grads=True)
        return self.devices.total(_flat(gradients))


class AveragedGem(GradientMemory):
    """A-GEM: the gradient loses its part against the gradient of a random batch of the memory.

    Source: Chaudhry et al., ICLR 2019, arXiv 1812.00420, equation 11.

    Avalanche's ``AGEMPlugin`` (0.6.0) keeps so many images per task without a bound on all, draws with Python's
    generator, fails where there are more tasks than rows to draw, and leaves out of the step what the correction moves
    in heads that the mini-batch gave no gradient.

    Attributes:
        reference_rows: Images drawn at every step.
    """

    reference_rows = 128

    def recalled_rows(self) -> int:
        """See ``RehearsalStrategy.recalled_rows``."""
        return min(self.reference_rows, len(self.past))

    def corrected(self, gradient: Tensor) -> Tensor:
        """The gradient without its part against the reference's."""
        reference = self.reference(self.draw(self.reference_rows))
        product = gradient.dot(reference)
        if not bool(product < 0):
            return gradient
        return gradient - product / reference.dot(reference) * reference


class Gem(GradientMemory):
    """GEM: the nearest gradient that has no part against the gradient of any earlier task's memory.

    Source: Lopez-Paz and Ranzato, NeurIPS 2017, arXiv 1706.08840, equations 8-12. The margin is, as in the authors'
    code, the least value of every variable of the dual programme, so that the constraints hold; the paper adds it to
    the solution instead, which may break them. The memory is shared by the tasks so far, where the paper divides it by
    the number of tasks to come.

    Avalanche's ``GEMPlugin`` (0.6.0) adds 1e-3 to the diagonal of the programme, however small the gradients are, which
    breaks the constraints of small ones; it keeps the first images that a loader gives, normalised, in float32 and on
    the plugin, and leaves out of the step what the correction moves in heads that the mini-batch gave no gradient.

    Attributes:
        margin: The paper's gamma.
    """

    margin = 0.5

    def recalled_rows(self) -> int:
        """See ``RehearsalStrategy.recalled_rows``."""
        return len(self.past)

    def corrected(self, gradient: Tensor) -> Tensor:
        """The gradient projected onto what all earlier tasks allow."""
        tasks = self.network.memory.tasks.cpu()[self.past]
        references = [self.reference(self.past[tasks == task]) for task in tasks.unique().tolist()]
        return project(gradient, torch.stack(references), self.margin)


def project(gradient: Tensor, references: Tensor, margin: float = 0.0) -> Tensor:
    """The gradient ``g`` itself if ``G g >= 0``, else ``g + G^T v`` of least norm with all of ``v >= margin``.

    With margin 0 that is the nearest ``z`` to ``g`` with ``G z >= 0``; with any margin, ``G z >= 0`` holds. In
    ``u = v - margin`` it is a non-negative least squares problem in as many unknowns as there are tasks.

    Args:
        gradient: ``g``, ``(parameters,)``.
        references: ``G``, ``(tasks, parameters)``.
        margin: The paper's gamma.
    """
    g, G = gradient.double(), references.double()
    products = G.mv(g)
    if bool((products >= 0).all()):
        return gradient
    # products with vectors, as the ledger does not count what a step does beside passes through the network
    gram = torch.stack([G.mv(row) for row in G])
    values, vectors = torch.linalg.eigh(gram)
    largest = values[-1]
    kept = values > 1e-12 * largest
    roots = (values[kept] / largest).sqrt()
    basis = vectors[:, kept].T
    # |G^T (u + margin) + g|^2 = |A u - b|^2 + constant, both sides divided by the largest eigenvalue
    A = roots[:, None] * basis
    b = -(basis.mv(gram.sum(dim=1) * margin + products) / largest) / roots
    u = torch.from_numpy(nnls(A.cpu().numpy(), b.cpu().numpy())[0]).to(g)
    return (g + G.T.mv(u + margin)).to(gradient)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])
