"""Banks of private rows, one per member, and the selection that says which rows of a batch are whose."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

Members = int | tuple[int, ...] | Tensor | None
Start = Literal["first", "init", "zeros", "signs", "uniform"]


class Selection:
    """Which members the rows of the call in progress belong to; one object for all layers of a network.

    One rule covers ensembles, tasks and mixed batches. With ``K`` members selected, the rows of a batch are
    ``K`` contiguous blocks of equal length and block ``k`` belongs to member ``members[k]``: an ensemble
    selects all its members and stacks the batch once for each, a task selects its own member, a mixed batch
    selects one member a row.
    """

    def __init__(self) -> None:
        self.members: Members = None

    @contextmanager
    def of(self, members: Members) -> Iterator[None]:
        """Select ``members`` inside a with-block: one id, ids ``(K,)``, or None for all in their order.

        Ids known beforehand are a tuple, ids that belong to a batch a tensor: the values of a tensor on a device
        would have to be waited for. Those known beforehand may count from the end, -1 is the last member.
        """
        before, self.members = self.members, members
        try:
            yield
        finally:
            self.members = before


class Bank(nn.Module):
    """One row of private numbers per member: committed rows, frozen to the bit, before the rows in training.

    The rows in training are a leaf of their own. As rows of one large parameter, momentum and weight decay
    would move the committed ones too; as one parameter per member and layer, a hundred tasks would mean
    thousands of tensors. ``commit`` moves them over when a task ends.

    Attributes:
        committed: Rows that nothing changes any more, ``(committed, *shape)``.
        active: Rows in training, ``(k, *shape)``, or None when every member is committed.

    Args:
        rows: The first members' rows, ``(members, *shape)``; may have zero members.
        component: The line of the cost ledger that these numbers belong to.
        learned: Whether the rows are trained by gradient (counted as parameters) or are statistics.
        implicit_first: Give member 0 a row that is neither stored nor trained and makes it the shared network
            itself: ones, or zeros where ``start`` is one of those for ``Pairs``.
        start: How the rows of a later member start, see ``new_rows``.
    """

    committed: Tensor
    active: Tensor | None
    first: Tensor | None

    def __init__(
        self,
        rows: Tensor,
        component: str,
        learned: bool = True,
        implicit_first: bool = False,
        start: Start = "first",
    ) -> None:
        super().__init__()
        self.component = component
        self.learned = learned
        self.start: Start = start
        first = (
            rows.new_full((1, *rows.shape[1:]), float(start in ("first", "init"))) if implicit_first else None
        )
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("committed", rows[:0].detach().clone())
        # what `committed` is the beginning of: room for later members, so that a commit copies its own rows alone
        self._reserved = self.committed
        self._set_active(rows.detach().clone() if len(rows) else None)

    def extra_repr(self) -> str:
        """The part of ``repr`` between the brackets."""
        return f"{self.num_members} x {tuple(self.committed.shape[1:])}, {self.component}"

    @property
    def num_committed(self) -> int:
        """How many members are frozen; they come first."""
        return len(self.committed) + (self.first is not None)

    @property
    def num_members(self) -> int:
        """How many members there are, committed and in training."""
        return self.num_committed + (0 if self.active is None else len(self.active))

    @property
    def spare_bytes(self) -> int:
        """What the room for later members takes; it is never more than the members that are there."""
        return self._reserved.nbytes - self.committed.nbytes

    def append(self, rows: Tensor) -> None:
        """Add members in training with these rows, ``(k, *shape)``; those before them must be committed."""
        if self.active is not None:
            raise RuntimeError("Bank.append: commit the members in training before new ones are added.")
        self._set_active(rows.detach().to(self.committed).clone())

    def new_rows(self, num_members: int, init: str) -> Tensor:
        """How members that are to be added start, ``(num_members, *shape)``.

        ``previous`` copies as many last members. Else it is ``start`` that says: ``init`` draws ``fast_weights``,
        ``first`` copies the first member, beside whom the shared weights were trained, and the others are those of
        ``pair_vectors``.
        """
        shape = self.committed.shape[1:]
        if init == "previous":
            return self.table()[-num_members:]
        if self.start == "init":
            return fast_weights(init, num_members, *shape)
        if self.start == "first":
            return self.row(0).expand(num_members, *shape)
        return pair_vectors(self.start, num_members, *shape)

    def commit(self) -> None:
        """Freeze the rows in training. Their values do not change, and nothing trains them again.

        The time it takes does not grow with the members before them, save that the room for members doubles at times.
        """
        if self.active is None:
            return
        before, after = len(self.committed), len(self.committed) + len(self.active)
        # a network that was moved, cast or loaded has new tensors, behind which there is no room of ours
        has_room = len(self._reserved) >= after and self._reserved.data_ptr() == self.committed.data_ptr()
        if not has_room:
            # none to spare for the first members: a bank may never have others
            room = after if before == 0 else max(after, 2 * before)
            self._reserved = self.committed.new_empty(room, *self.committed.shape[1:])
            self._reserved[:before] = self.committed
        self._reserved[before:after] = self.active.detach()
        self.committed = self._reserved[:after]
        self._set_active(None)

    def is_learning(self, member: int) -> bool:
        """Whether a member's row is in training."""
        if member < 0:
            return self.active is not None and -member <= len(self.active)
        return member >= self.num_committed

    def rows(self, members: Members) -> Tensor:
        """The rows of the selected members, ``(K, *shape)``; ``K`` is 1 for a single id."""
        if isinstance(members, int):
            return self.row(members).unsqueeze(0)
        if isinstance(members, tuple):
            return self._several(members)
        return self.table() if members is None else self.table().index_select(0, members)

    def row(self, member: int) -> Tensor:
        """One member's row, ``shape``, as a view: writing to it writes to the bank; -1 is the last member's.

        A row in training that is counted from the end is found without a look at how many there are before it: what is
        compiled for one task holds for the next.
        """
        # each attribute once: a network asks for hundreds of rows in a pass, and a module's attributes are slow
        active = self.active
        if member < 0 and active is not None and -member <= active.shape[0]:
            return active[member]
        first, committed = self.first, self.committed
        stored = committed.shape[0]
        frozen = stored if first is None else stored + 1
        total = frozen if active is None else frozen + active.shape[0]
        index = member + total if member < 0 else member
        if not 0 <= index < total:
            raise IndexError(f"member {member} does not exist: the bank holds {total}.")
        if active is not None and index >= frozen:
            return active[index - frozen]
        if first is None:
            return committed[index]
        return committed[index - 1] if index else first[0]

    def table(self) -> Tensor:
        """All rows, ``(members, *shape)``."""
        parts = [part for part in (self.first, self.committed, self.active) if part is not None and len(part)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _several(self, members: tuple[int, ...]) -> Tensor:
        """The rows of members known beforehand; those side by side as a view."""
        if min(members) < 0:
            if self.active is not None and members == tuple(range(-len(self.active), 0)):
                return self.active
            members = tuple(member + self.num_members * (member < 0) for member in members)
        for member in members:
            self._check(member)
        first, stop, committed = members[0], members[0] + len(members), self.num_committed
        if members != tuple(range(first, stop)):
            return self.table().index_select(0, torch.tensor(members, device=self.committed.device))
        if first >= committed and self.active is not None:
            return self.active[first - committed : stop - committed]
        return self.table()[first:stop]

    def _check(self, member: int) -> None:
        if not 0 <= member < self.num_members:
            raise IndexError(f"member {member} does not exist: the bank holds {self.num_members}.")

    def _set_active(self, rows: Tensor | None) -> None:
        if self.learned:
            self.register_parameter("active", None if rows is None else nn.Parameter(rows))
        else:
            self.register_buffer("active", rows)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        # how many members there are is part of the state, so the bank takes the shape of what it is given
        if f"{prefix}committed" in state_dict:
            shape = state_dict[f"{prefix}committed"].shape
            if shape[1:] == self.committed.shape[1:]:
                self.committed = self._reserved = self.committed.new_zeros(shape)
                active = state_dict.get(f"{prefix}active")
                self._set_active(None if active is None else self.committed.new_zeros(active.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def banks(module: nn.Module) -> Iterator[Bank]:
    """Every bank inside ``module``, each once."""
    return (child for child in module.modules() if isinstance(child, Bank))


def per_row(rows: Tensor, num_rows: int, owner: nn.Module) -> Tensor:
    """Members' rows ``(K, *shape)`` laid out for a batch: ``(num_rows, *shape)``, or one row where K is 1.

    Raises:
        ValueError: ``num_rows`` is not a multiple of ``K``; left-over rows would have no member.
    """
    members = len(rows)
    if members == 1:
        return rows
    # told apart in a way that holds for any batch size, so that compiled code is made once
    if num_rows % members if members else num_rows:
        raise ValueError(
            f"{type(owner).__name__}: {num_rows} rows do not split into {members} members; "
            "pass ids, or stack one block of rows per member."
        )
    copies = num_rows // members if members else 1
    if copies == 1:
        return rows
    # repeat_interleave, in words that ONNX has for any batch size
    return rows.unsqueeze(1).expand(-1, copies, *rows.shape[1:]).flatten(0, 1)


def by_member(
    x: Tensor, ids: Sequence[int], run: Callable[[Tensor, int], Tensor], owner: nn.Module
) -> Tensor:
    """Rows of several members, those of each in a pass of their own, put back in their places.

    Args:
        x: ``(rows, ...)``: one block of rows for every id, as ``Selection`` says.
        ids: Whose the blocks are.
        run: What gives the rows of one member, ``(n, ...)``.
        owner: Named where the rows do not split.
    """
    if len(ids) != len(x):
        per_row(x.new_empty(len(ids), 0), len(x), owner)  # raises where rows would be left over
        return torch.cat([run(block, i) for block, i in zip(x.chunk(len(ids)), ids, strict=True)])
    row_ids = torch.tensor(ids, device=x.device)
    places = {member: (row_ids == member).nonzero().squeeze(1) for member in sorted(set(ids))}
    parts = [run(x.index_select(0, index), member) for member, index in places.items()]
    return torch.cat(parts)[torch.cat([*places.values()]).argsort()]


def along(values: Tensor, x: Tensor, channel_axis: int) -> Tensor:
    """Shape ``(rows, C)`` so that it broadcasts along ``channel_axis`` of ``x``, in the dtype of ``x``.

    Without the cast a product with float32 rows would silently leave bf16 autocast.
    """
    shape = [1] * x.dim()
    shape[0], shape[channel_axis] = values.shape
    return values.to(x.dtype).view(shape)


def scale_and_shift(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``x * scale + shift``, the faster way for the memory format of ``x``.

    With one operation where channels lie side by side; with two, each vectorised, where positions do: there a product
    with numbers that are the same along the innermost axis takes five times as long fused with the sum (torch 2.15).
    """
    if x.dim() > 2 and x.is_contiguous() and not torch.compiler.is_compiling():
        return (x * scale).add_(shift)
    return torch.addcmul(shift, x, scale)


INITS = ("random_sign", "gaussian", "ones")


def fast_weights(init: str, num_members: int, size: int) -> Tensor:
    """Initial fast weights ``(num_members, size)`` from torch's global generator.

    ``random_sign`` draws -1 and +1 with equal chance (BatchEnsemble, Appendix B; the chance is not stated
    there), ``gaussian`` draws N(1, 0.5^2) (the authors' public code since 2020), ``ones`` starts at the
    shared network.
    """
    if init == "random_sign":
        return torch.randint(0, 2, (num_members, size)).mul_(2).sub_(1).float()
    if init == "gaussian":
        return torch.randn(num_members, size).mul_(0.5).add_(1)
    if init == "ones":
        return torch.ones(num_members, size)
    raise ValueError(f"fast weights cannot start as {init!r}; choose from {', '.join(INITS)}.")


def pair_vectors(start: Start, num_members: int, num_pairs: int, size: int) -> Tensor:
    """Initial vectors of one side of ``Pairs``, ``(num_members, num_pairs, size)``, from torch's global generator.

    ``zeros``, ``signs`` (-1 and +1 with equal chance), or ``uniform`` in ``+-1 / sqrt(size)``, as torch's layers draw
    the weights of a unit.
    """
    shape = num_members, num_pairs, size
    if start == "zeros":
        return torch.zeros(shape)
    if start == "signs":
        return torch.randint(0, 2, shape).mul_(2).sub_(1).float()
    return torch.rand(shape).mul_(2).sub_(1).div_(math.sqrt(size))
