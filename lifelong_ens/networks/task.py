"""The contract of networks that grow by a task at a time, and the two simplest of them."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifelong_ens.errors import UnfitNetworkError
from lifelong_ens.layers.exported import ExportedMembers, LogMeanProbability
from lifelong_ens.networks.layout import Layout
from lifelong_ens.networks.plain import reinitialise, without_classifier

# weights whose gathering costs as much as one more pass through a head: about 1 ns each, and 20 us, on a CPU thread
GATHERED_PER_HEAD = 20_000


class TaskNetwork(nn.Module):
    """A network that learns tasks one after the other; a subclass says what a new task adds and freezes.

    It grows in ``add_task`` alone, never while it evaluates. Whatever it learns is a parameter or a buffer,
    so that its ``state_dict`` is the whole truth; building it anew, repeating ``add_task`` and
    ``finish_task`` for the same tasks and loading that state gives the same network.

    Attributes:
        classes_per_task: How many classes each task has, in the order in which they came.
        frozen_past: Whether outputs for earlier tasks stay the same to the bit while later ones are learnt; a run does
            not ask again then.
        members_per_task: How many members a task holds; with more than one, a subclass gives ``member_logits``.
        layout: What of its ``body`` a task has for itself, where that and a head is all that a task has.
    """

    frozen_past = False
    members_per_task = 1
    layout: Layout | None = None

    def __init__(self) -> None:
        super().__init__()
        self.classes_per_task: list[int] = []
        self.heads = Heads()

    @property
    def num_tasks(self) -> int:
        """How many tasks there are, the one in training included."""
        return len(self.classes_per_task)

    def begin_task(self, num_classes: int) -> None:
        """Add a task and note its number of classes, on the device the network is on; what training calls."""
        device = next((parameter.device for parameter in self.parameters()), None)
        self.add_task(num_classes)
        self.classes_per_task.append(num_classes)
        # what is new was made on the CPU; a walk over the parts of a thousand tasks takes longer than all the rest
        if device is not None and device.type != "cpu":
            self.to(device)

    @abstractmethod
    def add_task(self, num_classes: int) -> None:
        """Add what a new task needs, freeze what it must not move; ``num_tasks`` is its index meanwhile."""

    @abstractmethod
    def forward(self, x: Tensor, task: int | Tensor) -> Tensor:
        """Logits of one task ``(batch, classes)``, or of each row's own task.

        Args:
            x: Images ``(batch, C, H, W)``.
            task: One task for all rows, or one per row, int64 ``(batch,)``. Then the logits are as wide as
                the widest of these tasks and -inf behind the classes of a narrower one.
        """

    def member_logits(self, x: Tensor, task: int | Tensor) -> Tensor:
        """Logits of each member that a task holds, ``(members, batch, classes)``."""
        return self(x, task).unsqueeze(0)

    def compiled_parts(self) -> Sequence[nn.Module]:
        """What is compiled while a task is trained, if that is asked for; the network itself by default.

        Parts that know nothing of tasks are compiled once for all of them.
        """
        return [self]

    def finish_task(self) -> None:
        """Called when the training of the newest task has ended."""

    def export_task(self, task: int, member: int | None = None) -> nn.Module:
        """One task as a plain network of its own, ``(batch, C, H, W)`` to logits ``(batch, classes)``.

        Its modules are torch's and those of the body that was given, with one task's numbers in them: it knows of no
        task or member, costs what a plain network costs, shares nothing with this one, and answers what this one does
        in evaluation, equal to 1e-6. A method gives ``plain_network``.

        Args:
            task: Its index.
            member: One of the members of a task that holds several; None for all, ``ExportedMembers`` and behind it
                ``LogMeanProbability``.

        Raises:
            IndexError: There is no such task or member.
            UnfitNetworkError: The method, or its body, has no plain form.
        """
        if not 0 <= task < self.num_tasks:
            raise IndexError(f"task {task} does not exist; this network has learnt {self.num_tasks}.")
        count = self.members_per_task
        if member is not None and not 0 <= member < count:
            raise IndexError(f"member {member} does not exist; a task has 0 to {count - 1}.")
        with torch.no_grad():
            if member is None and count > 1:
                members = [self.plain_network(task, one) for one in range(count)]
                plain: nn.Module = nn.Sequential(ExportedMembers(members), LogMeanProbability())
            else:
                plain = self.plain_network(task, member or 0)
        return plain.requires_grad_(True).eval()

    def plain_network(self, task: int, member: int) -> nn.Module:
        """A copy of what one member of a task computes as a plain network; what a method gives ``export_task``.

        Args:
            task: A task that there is.
            member: One of its members.
        """
        raise UnfitNetworkError(
            f"{type(self).__name__} does not say what one task is on its own; give it a plain_network(task, member)."
        )

    def notes(self) -> list[str]:
        """What the record of a run should say about the network beside its numbers; nothing by default."""
        return []

    def regrow(self, classes_per_task: Sequence[int]) -> Self:
        """Grow as for these tasks without training them; what a saved state is loaded into."""
        for num_classes in classes_per_task:
            self.begin_task(num_classes)
            self.finish_task()
        return self


def by_task(x: Tensor, task: Tensor, run: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Logits of rows of several tasks, one task after the other, ``(..., batch, classes)``, padded with -inf.

    Args:
        x: Images ``(batch, C, H, W)``.
        task: The task of each row, ``(batch,)``.
        run: Logits of rows that all belong to one task, ``(..., rows, classes)``.

    Raises:
        ValueError: There are no rows.
    """
    present = task.unique().tolist()
    if not present:
        raise ValueError("a batch has no rows.")
    parts = {one: run(x[task == one], one) for one in present}
    width = max(part.shape[-1] for part in parts.values())
    first = parts[present[0]]
    logits = first.new_full((*first.shape[:-2], len(x), width), -torch.inf)
    for one, part in parts.items():
        logits[..., task == one, : part.shape[-1]] = part
    return logits


class Heads(nn.ModuleList):
    """One linear classifier per task."""

    component = "head"

    def add(self, num_features: int, num_classes: int) -> None:
        """Append a classifier; it stays in evaluation mode, in which a linear layer does the same."""
        self.append(nn.Linear(num_features, num_classes).eval())

    def train(self, mode: bool = True) -> Self:
        """The mode of the list alone: its classifiers are not walked over, for there may be thousands."""
        self.training = mode
        return self

    def forward(self, features: Tensor, task: int | Tensor) -> Tensor:
        """Features ``(..., batch, num_features)`` to logits ``(..., batch, classes)``, padded if mixed."""
        if isinstance(task, int):
            return self[task](features)
        present, position = task.unique(return_inverse=True)
        every: list[Any] = list(self)  # to index a list of modules itself takes several times as long
        heads = [every[one] for one in present.tolist()]
        if len(heads) == 1:
            return heads[0](features)
        width = max(head.out_features for head in heads)
        if len(task) * width * features.shape[-1] <= GATHERED_PER_HEAD * len(heads):
            return _gathered(heads, features, position, width)
        return _one_by_one(heads, features, position, width)


def _gathered(heads: Sequence[nn.Linear], features: Tensor, position: Tensor, width: int) -> Tensor:
    """Every row by its own head in one product, with the rows of its weight gathered: see ``Heads.forward``."""
    sizes = torch.tensor([head.out_features for head in heads], device=features.device)
    classes = torch.arange(width, device=features.device)
    rows = (sizes.cumsum(0) - sizes)[position].unsqueeze(1) + classes
    beyond = classes >= sizes[position].unsqueeze(1)
    rows = rows.masked_fill(beyond, 0)
    # as embeddings: the fastest way to gather rows whose gradients are summed in the same order every time
    weight = F.embedding(rows, torch.cat([head.weight for head in heads]))
    bias = torch.cat([head.bias for head in heads])[rows]
    return each_by_its_own(features, weight, bias).masked_fill(beyond, -torch.inf)


def each_by_its_own(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Features ``(..., batch, features)`` times weights ``(batch, classes, features)``: ``(..., batch, classes)``."""
    by_row = features.movedim(-2, 0).flatten(1, -2) if features.dim() > 2 else features.unsqueeze(1)
    logits = torch.baddbmm(bias.unsqueeze(1), by_row, weight.transpose(1, 2))
    return logits.transpose(0, 1).reshape(*features.shape[:-1], weight.shape[1])


def _one_by_one(heads: Sequence[nn.Linear], features: Tensor, position: Tensor, width: int) -> Tensor:
    """The rows of each head in a product of their own: see ``Heads.forward``."""
    logits = [head(features[..., position == index, :]) for index, head in enumerate(heads)]
    padded = logits[0].new_full((*features.shape[:-1], width), -torch.inf)
    for index, part in enumerate(logits):
        padded[..., position == index, : part.shape[-1]] = part
    return padded


class MultiHead(TaskNetwork):
    """One body for all tasks and a head for each: plain fine-tuning, and joint training.

    Args:
        body: A network with ``num_features``, or a classifier whose last linear layer is taken off.
    """

    layout = Layout("none")

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = without_classifier(body)

    def add_task(self, num_classes: int) -> None:
        """Add a head; everything goes on training."""
        self.heads.add(self.body.num_features, num_classes)  # pyright: ignore

    def forward(self, x: Tensor, task: int | Tensor) -> Tensor:
        """See ``TaskNetwork.forward``."""
        return self.heads(self.body(x), task)

    def compiled_parts(self) -> Sequence[nn.Module]:
        """The body, which knows nothing of tasks."""
        return [self.body]

    def plain_network(self, task: int, member: int) -> nn.Module:
        """See ``TaskNetwork.plain_network``: the body and the task's head."""
        return copy.deepcopy(nn.Sequential(self.body, self.heads[task]))


class Columns(nn.ModuleList):
    """One whole network per task, all but the newest frozen."""

    component = "column"

    def add(self, template: nn.Module) -> nn.Module:
        """Append a copy of ``template``: with its weights as the first column, with fresh ones afterwards."""
        column = copy.deepcopy(template)
        if len(self):
            reinitialise(column)
        self.append(column.requires_grad_(True))
        self.train(self.training)
        return column

    def train(self, mode: bool = True) -> Self:
        """Only the newest column is ever in training mode: the statistics of the others must not move."""
        self.training = mode
        for index, column in enumerate(self):
            column.train(mode and index == len(self) - 1)
        return self


class Independent(TaskNetwork):
    """A network of its own for every task: nothing is shared, nothing forgotten.

    Args:
        body: The shape of every network; its weights start the first.
    """

    frozen_past = True

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        # a template, not a part: kept out of the state
        self.template = [without_classifier(body)]
        self.columns = Columns()

    def add_task(self, num_classes: int) -> None:
        """Add a network with fresh weights and a head; freeze the earlier ones."""
        self.requires_grad_(False)
        self.columns.add(self.template[0])
        self.heads.add(self.template[0].num_features, num_classes)  # pyright: ignore

    def forward(self, x: Tensor, task: int | Tensor) -> Tensor:
        """See ``TaskNetwork.forward``."""
        if isinstance(task, int):
            return self.heads(self.columns[task](x), task)
        return by_task(x, task, self.forward)

    def compiled_parts(self) -> Sequence[nn.Module]:
        """The column in training; the code of all columns is the same."""
        return [self.columns[-1]]

    def plain_network(self, task: int, member: int) -> nn.Module:
        """See ``TaskNetwork.plain_network``: the task's column and head."""
        return copy.deepcopy(nn.Sequential(self.columns[task], self.heads[task]))
