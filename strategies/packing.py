"""PackNet: tasks packed into one network by pruning (Mallya and Lazebnik, CVPR 2018, arXiv 1711.05769)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from avalanche.benchmarks import CLExperience
from avalanche.core import SupervisedPlugin
from torch import Tensor, nn

from lifelong_ens.errors import InputError
from lifelong_ens.layers.bank import Selection
from lifelong_ens.layers.bits import pack, unpack
from lifelong_ens.layers.masked import MaskedLayer, largest
from lifelong_ens.networks.batch_ensemble import NormPolicy
from lifelong_ens.networks.member_body import MemberBody, mask_layers, member_norms
from lifelong_ens.networks.plain import without_classifier
from lifelong_ens.training.fit import Fit
from strategies.base import Strategy

log = logging.getLogger(__name__)

Bias = Literal["shared", "per_member"]
Free = Literal["fresh", "zero"]


def packnet(
    body: nn.Module,
    *,
    prune: float = 0.75,
    retrain: float = 1 / 3,
    free_weights: Free = "fresh",
    norm: NormPolicy = "statistics_only",
    bias: Bias = "shared",
    fit: Fit | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    plugins: Sequence[SupervisedPlugin] = (),
) -> Strategy:
    """Every task trains the weights still free, keeps the largest, retrains them, and leaves the rest to later tasks.

    Args:
        body: The network; a classifier's last linear layer is taken off.
        prune: Share of the weights it trained that a task gives back, layer by layer; at least 0 and below 1.
        retrain: Share of the epochs that train the kept weights after pruning; the paper's is 1/3 (10 after 20).
        free_weights: Where later tasks start the weights that earlier ones gave back: fresh random values, or zero.
        norm: What norms keep per task: statistics_only, per_member (affine too) or shared_frozen (nothing: the paper).
        bias: The first task's, shared (the paper), or one per_member.
        fit: How each task is trained; its epochs are shared by training and retraining.
        seed: Of all randomness.
        device: Where it is trained.
        plugins: Avalanche plugins.
    """
    if not 0 <= retrain < 1:
        raise InputError(f"retrain is at least 0 and below 1, not {retrain}.")
    network = PackedNetwork(body, prune=prune, free_weights=free_weights, norm=norm, bias=bias)
    strategy = PackingStrategy(network=network, fit=fit, seed=seed, device=device, plugins=plugins)
    strategy.retrain = retrain
    return strategy


class PackingStrategy(Strategy):
    """Training in two phases: all free weights, then those that pruning kept."""

    network: PackedNetwork
    retrain = 1 / 3

    def fit_task(self, validation: Sequence[CLExperience]) -> None:
        """Train, prune, retrain; each phase has an optimizer, a schedule and early stopping of its own."""
        second = min(round(self.fit.epochs * self.retrain), self.fit.epochs - 1)
        first = self.fit.epochs - second
        self.start_phase(first)
        self.run_epochs(first, validation)
        self.network.prune_task()
        if second:
            self.start_phase(second)
            self.run_epochs(second, validation)


class PackedNetwork(MemberBody):
    """Task t uses the weights that tasks 0 to t own, and a head.

    Source: Mallya and Lazebnik 2018, section 3: one-shot magnitude pruning of each task's own weights in every layer;
    later tasks use all weights of earlier ones as they are. The released code starts a later task's weights at the
    zeros that pruning left; by default here they are drawn anew, without which networks that have no norms learn later
    tasks badly (split_digits, LeNet-5, 5 epochs, 4 seeds: 92 % with, 77 % without). The paper freezes biases and
    batch norms after the first task (``norm="shared_frozen"``); by default here the running statistics are each
    task's own, as in the other methods that are compared.

    Where nothing is free in a layer any more, a task learns with what there is: its head, and norms or biases where
    these are its own. FLOPs are those of dense execution.

    Args:
        body: A network with ``num_features``, or a classifier whose last linear layer is taken off.
        prune: Share of the weights it trained that a task gives back.
        free_weights: Where later tasks start free weights: ``fresh`` as torch's layers draw theirs, or ``zero``.
        norm: What norms keep per task.
        bias: ``shared``, or one ``per_member``.
    """

    mixed_rows = False

    def __init__(
        self,
        body: nn.Module,
        *,
        prune: float = 0.75,
        free_weights: Free = "fresh",
        norm: NormPolicy = "statistics_only",
        bias: Bias = "shared",
    ) -> None:
        if not 0 <= prune < 1:
            raise InputError(f"prune is at least 0 and below 1, not {prune}.")
        members, selection, _ = member_norms(without_classifier(body), norm)
        packed = mask_layers(members, lambda layer: PackedLayer(layer, selection, bias))
        super().__init__(packed, selection)
        self.prune, self.free_weights = prune, free_weights
        self._warned = False

    def add_task(self, num_classes: int) -> None:
        """Give the task all weights that are still free, its norms and a head."""
        self._commit()
        super().add_task(num_classes)
        for layer in self.layers():
            layer.start(self.num_tasks, fresh=self.num_tasks > 0 and self.free_weights == "fresh")
        full = sum(layer.active is None for layer in self.layers())
        if full and not self._warned:
            self._warned = True
            log.warning(
                "packnet: no weight is free in %d layers; task %d trains what else is its own, such as its head",
                full,
                self.num_tasks,
            )

    def prune_task(self) -> None:
        """Choose the weights that the newest task keeps; from here on it uses and trains only these of its own."""
        for layer in self.layers():
            layer.prune(self.prune)

    def finish_task(self) -> None:
        """Freeze the newest task's weights; a task that was not pruned before is pruned here."""
        self._commit()
        super().finish_task()

    def _commit(self) -> None:
        self.prune_task()
        for layer in self.layers():
            layer.commit()

    def layers(self) -> Iterator[PackedLayer]:
        """The layers that tasks are packed into."""
        return (module for module in self.body.modules() if isinstance(module, PackedLayer))


class PackedLayer(MaskedLayer):
    """A layer each of whose weights is owned by one task or free.

    The task in training moves a leaf of its own, ``active``, as large as the weight: where frozen weights stood in
    the same parameter, momentum and weight decay would move them. The optimizer sees zero gradients at the rest.

    Attributes:
        active: The weights in training, in the shape of the weight; None between tasks and where none is free.
        trained: Where these stand in for the others, booleans in the shape of the weight; no part of the state.
    """

    active: nn.Parameter | None
    trained: Tensor | None

    def __init__(self, layer: nn.Module, selection: Selection, bias: str) -> None:
        super().__init__(layer, selection, bias)
        self.owners = Owners(self.weight.shape)
        self.register_parameter("active", None)
        self.register_buffer("trained", None, persistent=False)
        self.task = -1
        self.pruned = True

    def start(self, task: int, fresh: bool) -> None:
        """Let a task train every free weight, from new random values or from those that are there."""
        self.task, self.pruned = task, False
        self.weight.requires_grad_(False)
        # owners keep room for this task even where it will own nothing: their shape follows from the task alone
        self.owners.reserve(task)
        free = self.owners.free()
        if not bool(free.any()):
            self.pruned, self.active = True, None
            return
        values = self.weight.detach().clone()
        if fresh:
            nn.init.kaiming_uniform_(values, a=math.sqrt(5))
        self.active, self.trained = nn.Parameter(torch.where(free, values, 0.0)), free
        # a weight that pruning leaves out is zero from here on
        self.weight.masked_fill_(free, 0.0)

    def prune(self, fraction: float) -> None:
        """Keep the largest of the weights in training and give ``fraction`` of them back; does nothing twice."""
        if self.pruned or self.active is None:
            return
        free = self.owners.free()
        count = int(free.sum())
        size = torch.where(free, self.active.detach().abs(), -1.0)
        self.owners.give(largest(size, count - math.floor(fraction * count)), self.task)
        self.trained = self.owners.of(self.task)
        self.pruned = True

    def commit(self) -> None:
        """Put what the task in training keeps among the frozen weights."""
        if self.active is not None:
            with torch.no_grad():
                own = self.owners.of(self.task)
                self.weight.copy_(torch.where(own, self.active, self.weight))
            self.active = self.trained = None

    def task_weight(self, task: int) -> Tensor:
        """The weights that tasks 0 to ``task`` own, zero elsewhere; in training, those in training too."""
        # -1 is asked for first: compiled code knows no number of a task then
        if self.active is not None and self.trained is not None and (task < 0 or task == self.task):
            return torch.where(self.trained, self.active, self.weight)
        return torch.where(self.owners.up_to(self.task if task < 0 else task), self.weight, 0.0)


class Owners(nn.Module):
    """Which task owns each weight, as the bits of ``task + 1``; 0 is free.

    With T tasks that is ``ceil(log2(T + 1))`` bits per weight (the paper's overhead), where a mask for each task would
    be T. The state holds the packed bits, component ``mask``; a working copy of two bytes per weight is
    decoded from them when it is needed and never stored.

    Attributes:
        planes: Bit p of every owner, uint8 ``(bits, ceil(n / 8))``.
    """

    component = "mask"
    planes: Tensor

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("planes", torch.zeros(0, math.ceil(shape.numel() / 8), dtype=torch.uint8))
        self._decoded: Tensor | None = None

    def reserve(self, task: int) -> None:
        """Have as many bits as owner ``task`` needs."""
        missing = (task + 1).bit_length() - len(self.planes)
        if missing > 0:
            self.planes = torch.cat([self.planes, self.planes.new_zeros(missing, self.planes.shape[1])])

    def give(self, mask: Tensor, task: int) -> None:
        """Make ``task`` the owner of free weights."""
        codes = self._codes().masked_fill(mask, task + 1).flatten()
        self.planes = torch.stack([pack((codes >> bit) & 1) for bit in range(len(self.planes))])
        self._decoded = None

    def free(self) -> Tensor:
        """Where no task owns the weight."""
        return self._codes() == 0

    def of(self, task: int) -> Tensor:
        """Where ``task`` owns the weight."""
        return self._codes() == task + 1

    def up_to(self, task: int) -> Tensor:
        """Where ``task`` or an earlier one owns the weight."""
        codes = self._codes()
        return (codes > 0) & (codes <= task + 1)

    def _codes(self) -> Tensor:
        if self._decoded is None or self._decoded.device != self.planes.device:
            bits = unpack(self.planes, self.shape.numel()).short()
            places = torch.arange(len(bits), device=bits.device, dtype=torch.int16).unsqueeze(1)
            self._decoded = (bits << places).sum(dim=0, dtype=torch.int16).view(self.shape)
        return self._decoded

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        # how many bits an owner has is part of the state
        planes = state_dict.get(f"{prefix}planes")
        if planes is not None and planes.shape[1:] == self.planes.shape[1:]:
            self.planes = self.planes.new_zeros(planes.shape)
        self._decoded = None
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
