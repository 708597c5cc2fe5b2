"""BatchEnsemble over tasks: shared weights from the first task, rank-1 fast weights for every task."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lifelong_ens.errors import InputError
from lifelong_ens.layers.bank import banks
from lifelong_ens.networks.layout import Layout
from lifelong_ens.networks.member_body import MemberBody
from lifelong_ens.networks.plain import without_classifier

Init = Literal["random_sign", "gaussian", "ones", "previous", "fittest"]
TrainOn = Literal["first", "pretrained"]
NormPolicy = Literal["statistics_only", "per_member", "shared_frozen"]


class BatchEnsembleNetwork(MemberBody):
    """Task t uses ``W * (s_t r_t^T)`` in every layer and a head of its own.

    Source: Wen et al., ICLR 2020, section 3.1, equations 6-7: the first task trains W, r_1, s_1; later ones
    only r_t, s_t. The paper does not say what happens to biases and norms; by default each task has its own
    biases and running statistics and the affine parts of norms stay as the first task left them.

    Args:
        body: A network with ``num_features``, or a classifier whose last linear layer is taken off.
        init: How the fast weights of a task start: ``random_sign`` (the paper), ``gaussian`` N(1, 0.5^2),
            ``ones`` (the shared network), ``previous`` (copies of the last task's, biases and norms too), or
            ``fittest``: the same, until ``start_from`` says which task to copy.
        norm: ``statistics_only`` per task, ``per_member`` (affine too), or ``shared_frozen`` (all as the
            first task left it).
        bias: A bias ``per_member`` or the first task's, ``shared``.
        members_per_task: How many members a task holds: more than one is a small ensemble.
        first_task: ``member`` gives the first task fast weights like every other; ``shared`` lets it be the
            shared network itself (r = s = 1, not stored), which can represent the same functions.
        train_on: The shared weights are learnt on the ``first`` task, or are ``pretrained``: those of ``body``,
            frozen from the start.
        rank: Pairs of fast weights that scale each weight: ``W * (sum_j s_j r_j^T)``. The paper's is 1.
        additive: Pairs that are added to each weight: ``+ sum_j u_j v_j^T``, v over the inputs of one unit.
        origin: Where trained weights are from, for the record.
    """

    started_from: Tensor | None

    def __init__(
        self,
        body: nn.Module,
        *,
        init: Init = "random_sign",
        norm: NormPolicy = "statistics_only",
        bias: Literal["per_member", "shared"] = "per_member",
        members_per_task: int = 1,
        first_task: Literal["member", "shared"] = "member",
        train_on: TrainOn = "first",
        rank: int = 1,
        additive: int = 0,
        origin: str | None = None,
    ) -> None:
        for name, value, least in (
            ("members_per_task", members_per_task, 1),
            ("rank", rank, 1),
            ("additive", additive, 0),
        ):
            if value < least:
                raise InputError(f"{name} is at least {least}, not {value}.")
        if first_task == "shared" and train_on == "pretrained":
            raise InputError(
                "first_task=shared makes the first task train the shared network, which train_on=pretrained "
                "keeps as it is; leave first_task at member."
            )
        if first_task == "shared" and members_per_task > 1:
            raise InputError("first_task=shared holds one member; leave members_per_task at 1.")
        copies = init in ("previous", "fittest")
        layout = Layout("all", norm, bias, rank, additive)
        members, selection = layout.with_members(
            without_classifier(body),
            members_per_task,
            # the first task has none to copy; members that started alike would stay alike
            init=("ones" if members_per_task == 1 else "random_sign") if copies else init,
            implicit_first=first_task == "shared",
        )
        super().__init__(members, selection, "previous" if copies else init, train_on == "pretrained")
        self.layout, self.members_per_task = layout, members_per_task
        self.origin = origin
        # which task each task started from, -1 where none; what a saved state says goes on being true
        self.register_buffer("started_from", torch.empty(0, dtype=torch.long) if init == "fittest" else None)

    def add_task(self, num_classes: int) -> None:
        """See ``MemberBody.add_task``."""
        super().add_task(num_classes)
        if self.started_from is not None:
            self.started_from = torch.cat(
                [self.started_from, self.started_from.new_tensor([self.num_tasks - 1])]
            )

    def start_from(self, task: int) -> None:
        """Start all private numbers of the newest task, but its head, as copies of an earlier task's."""
        count = self.members_per_task
        members = tuple(range(task * count, task * count + count))
        with torch.no_grad():
            for bank in banks(self.body):
                if bank.active is not None:
                    bank.active.copy_(bank.rows(members))
        if self.started_from is not None:
            self.started_from[-1] = task

    def notes(self) -> list[str]:
        """Where the shared weights are from, and which task each started from where that was chosen."""
        found = [] if self.origin is None else [self.origin]
        if self.started_from is not None:
            chosen = enumerate(self.started_from.tolist())
            found += [
                f"task {task + 1} started from task {source + 1}" for task, source in chosen if source >= 0
            ]
        return found
