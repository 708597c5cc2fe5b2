"""BatchEnsemble over tasks: shared weights from the first task, rank-1 fast weights for every task."""

from __future__ import annotations

import copy
import math
from typing import Literal

import torch
from torch import Tensor, nn

from lifelong_ens.convert import convert, export
from lifelong_ens.errors import InputError
from lifelong_ens.layers.bank import Members
from lifelong_ens.networks.member_body import MemberBody
from lifelong_ens.networks.plain import without_classifier

Init = Literal["random_sign", "gaussian", "ones", "previous"]
NormPolicy = Literal["statistics_only", "per_member", "shared_frozen"]


class BatchEnsembleNetwork(MemberBody):
    """Task t uses ``W * (s_t r_t^T)`` in every layer and a head of its own.

    Source: Wen et al., ICLR 2020, section 3.1, equations 6-7: the first task trains W, r_1, s_1; later ones
    only r_t, s_t. The paper does not say what happens to biases and norms; by default each task has its own
    biases and running statistics and the affine parts of norms stay as the first task left them.

    Args:
        body: A network with ``num_features``, or a classifier whose last linear layer is taken off.
        init: How the fast weights of a task start: ``random_sign`` (the paper), ``gaussian`` N(1, 0.5^2),
            ``ones`` (the shared network), or ``previous`` (copies of the last task's, biases and norms too).
        norm: ``statistics_only`` per task, ``per_member`` (affine too), or ``shared_frozen`` (all as the
            first task left it).
        bias: A bias ``per_member`` or the first task's, ``shared``.
        members_per_task: How many members a task holds: more than one is a small ensemble.
        first_task: ``member`` gives the first task fast weights like every other; ``shared`` lets it be the
            shared network itself (r = s = 1, not stored), which can represent the same functions.
    """

    def __init__(
        self,
        body: nn.Module,
        *,
        init: Init = "random_sign",
        norm: NormPolicy = "statistics_only",
        bias: Literal["per_member", "shared"] = "per_member",
        members_per_task: int = 1,
        first_task: Literal["member", "shared"] = "member",
    ) -> None:
        if members_per_task < 1:
            raise InputError(f"members_per_task is at least 1, not {members_per_task}.")
        if first_task == "shared" and members_per_task > 1:
            raise InputError("first_task=shared holds one member; leave members_per_task at 1.")
        members, selection = convert(
            without_classifier(body),
            members_per_task,
            # the first task has none to copy; members that started alike would stay alike
            init=("ones" if members_per_task == 1 else "random_sign") if init == "previous" else init,
            norm="shared" if norm == "shared_frozen" else norm,
            bias=bias,
            implicit_first=first_task == "shared",
        )
        super().__init__(members, selection, init)
        self.members_per_task = members_per_task

    def forward(self, x: Tensor, task: int | Tensor) -> Tensor:
        """See ``TaskNetwork.forward``; with several members, the logarithm of their mean probability."""
        if self.members_per_task == 1:
            return super().forward(x, task)
        logits = self.member_logits(x, task)
        return torch.logsumexp(torch.log_softmax(logits, dim=-1), dim=0) - math.log(len(logits))

    def member_logits(self, x: Tensor, task: int | Tensor) -> Tensor:
        """Logits of the task's members, ``(members, batch, classes)``; every row is shown to all of them."""
        count = self.members_per_task
        with self.selection.of(self._members(task)):
            features = self.body(x if count == 1 else x.repeat(count, *[1] * (x.dim() - 1)))
        return self.heads(features.unflatten(0, (count, len(x))), task)

    def export_task(self, task: int, member: int = 0) -> nn.Module:
        """One task as a plain network with its head on top, equal to 1e-6; ``member`` is within the task."""
        body = export(self.body, task * self.members_per_task + member)
        return nn.Sequential(body, copy.deepcopy(self.heads[task])).requires_grad_(True).eval()

    def _members(self, task: int | Tensor) -> Members:
        """The selection for a task: a single id where that will do, as it needs no gathering."""
        count = self.members_per_task
        if isinstance(task, int):
            return task if count == 1 else tuple(range(task * count, task * count + count))
        blocks = [task * count + member for member in range(count)]
        return torch.cat(blocks)
