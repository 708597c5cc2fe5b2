"""A body shared by all tasks whose private numbers are members of banks: one member per task."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Self

import torch
from torch import Tensor, nn

from lifelong_ens.convert import (
    append_members,
    commit_members,
    export,
    has_members,
    plan_conversion,
    replace_modules,
)
from lifelong_ens.errors import UnfitNetworkError
from lifelong_ens.layers.bank import Bank, Members, Selection, banks
from lifelong_ens.layers.exported import log_mean_probability
from lifelong_ens.layers.masked import MaskedLayer
from lifelong_ens.layers.structured import UNIT_LAYERS
from lifelong_ens.networks.layout import NORM_TYPES, Layout
from lifelong_ens.networks.task import TaskNetwork, by_task
from lifelong_ens.replication import Replication, replicate

log = logging.getLogger(__name__)


def member_norms(body: nn.Module, norm: str) -> tuple[nn.Module, Selection, bool]:
    """A copy of ``body`` whose norms have one member, its selection, and whether any norm has.

    Args:
        body: Any network.
        norm: ``statistics_only`` per task, ``per_member`` (affine too), or ``shared_frozen`` (nothing).
    """
    include: Sequence[type[nn.Module]] = NORM_TYPES
    if norm != "shared_frozen":
        plan = plan_conversion(body, include=include, norm=norm)  # pyright: ignore
        if any(entry.target for entry in plan):
            return *Layout("norms", norm).with_members(body, 1), True  # pyright: ignore
    return copy.deepcopy(body), Selection(), False


def mask_layers(body: nn.Module, make: Callable[[nn.Module], MaskedLayer]) -> nn.Module:
    """Put a masked layer in the place of every linear and convolution layer of ``body``, which is changed.

    Raises:
        UnfitNetworkError: There is no such layer, or two share a weight, so that two masks would fight over it.
    """
    targets = [one for one in body.modules() if type(one) in UNIT_LAYERS and "weight" in one._parameters]
    if not targets:
        raise UnfitNetworkError(
            f"{type(body).__name__} has no linear or convolution layer whose weights could be masked."
        )
    uses = Counter(id(one._parameters["weight"]) for one in targets)
    if max(uses.values()) > 1:
        raise UnfitNetworkError(
            f"{type(body).__name__}: layers that share one weight can't have masks of their own."
        )
    for name, module in body.named_modules():
        own = (p for p in module._parameters.values() if p is not None and p.dim() > 1)
        if module not in targets and not isinstance(module, Bank) and any(True for _ in own):
            log.warning(
                "%s (%s) has no form with a mask and is the same for all tasks", name, type(module).__name__
            )
    masked = replace_modules(body, {one: make(one) for one in targets})
    masked.num_features = body.num_features  # pyright: ignore
    return masked


class MemberBody(TaskNetwork):
    """The first task trains all, later ones only what is private to them: members of banks, and a head.

    With ``pretrained`` the first task is like the later ones.

    A base for methods: a subclass puts layers with banks, or with other numbers per task, into ``body``.

    Attributes:
        mixed_rows: Whether the layers take rows of several tasks in one pass. Layers whose dense weight differs
            between tasks do not: then the rows of each task run in a pass of their own.

    Args:
        body: A network with ``num_features`` whose layers read ``selection``.
        selection: Whose member is the task of the call in progress.
        init: Where private numbers of a new task start, as in ``append_members``.
        pretrained: Whether what is shared is trained already and never moves.
    """

    frozen_past = True
    mixed_rows = True

    def __init__(
        self, body: nn.Module, selection: Selection, init: str = "ones", pretrained: bool = False
    ) -> None:
        super().__init__()
        self.body, self.selection, self.init, self.pretrained = body, selection, init, pretrained

    def add_task(self, num_classes: int) -> None:
        """Give the task its members and head, and freeze all that is shared unless this task is to train it."""
        if self.num_tasks:
            commit_members(self.body)
            # the heads before the last are frozen already, and there may be thousands of them
            for part in (self.body, self.heads[-1]):
                part.requires_grad_(False)
            append_members(self.body, self.members_per_task, self.init)
        elif self.pretrained:
            self.requires_grad_(False)
            for bank in banks(self.body):
                bank.requires_grad_(True)
        self.heads.add(self.body.num_features, num_classes)  # pyright: ignore
        self.train(self.training)

    def finish_task(self) -> None:
        """Commit the task's members: from here on nothing moves them."""
        commit_members(self.body)

    def train(self, mode: bool = True) -> Self:
        """Training mode; norms that all tasks share learn their statistics in the first task at most."""
        super().train(mode)
        # not num_tasks, which still leaves out the task that is being added
        if self.pretrained or len(self.heads) > 1:
            for module in self.body.modules():
                if isinstance(module, nn.modules.batchnorm._NormBase):
                    module.eval()
        return self

    def forward(self, x: Tensor, task: int | Tensor) -> Tensor:
        """See ``TaskNetwork.forward``; with several members, the logarithm of their mean probability."""
        if self.members_per_task > 1:
            return log_mean_probability(self.member_logits(x, task))
        if not isinstance(task, int) and not self.mixed_rows:
            return by_task(x, task, self.forward)
        with self.selection.of(self.members_of(task)):
            return self.heads(self.body(x), task)

    def member_logits(self, x: Tensor, task: int | Tensor) -> Tensor:
        """Logits of the task's members, ``(members, batch, classes)``; every row is shown to all of them."""
        if self.members_per_task == 1:
            return self(x, task).unsqueeze(0)
        return self.heads(self.member_features(x, task), task)

    def member_features(self, x: Tensor, task: int | Tensor) -> Tensor:
        """What the head reads of each of the task's members, ``(members, batch, features)``."""
        members = self.members_of(task)
        if isinstance(members, tuple):
            return self.replication(x, members)
        count = self.members_per_task
        with self.selection.of(members):
            return self.body(replicate(x, count)).unflatten(0, (count, len(x)))

    @cached_property
    def replication(self) -> Replication:
        """How a task's members see the same rows."""
        return Replication(self.body, self.selection, has_members)

    def members_of(self, task: int | Tensor) -> Members:
        """What to select for a task, or for each row's task: a single id where that will do, as it needs no gathering.

        The task in training is selected from the end, so that code that was compiled for one is right for the next.
        """
        count = self.members_per_task
        if isinstance(task, Tensor):
            return task if count == 1 else torch.cat([task * count + member for member in range(count)])
        if self.training and task == self.num_tasks - 1:
            task = -1
        return task if count == 1 else tuple(range(task * count, task * count + count))

    def compiled_parts(self) -> Sequence[nn.Module]:
        """The body, whose code is the same for every task after the first."""
        return [self.body]

    def plain_network(self, task: int, member: int) -> nn.Module:
        """See ``TaskNetwork.plain_network``: the member's numbers folded into the body, and the task's head."""
        body = export(self.body, task * self.members_per_task + member)
        return nn.Sequential(body, copy.deepcopy(self.heads[task]))
