"""Low-rank matrices of each member's own: the sum of outer products of pairs of vectors."""

from __future__ import annotations

from torch import Tensor, nn

from lifelong_ens.layers.bank import Bank, Start, pair_vectors


class Pairs(nn.Module):
    """A matrix ``sum_j s_j r_j^T`` for every member; it starts at zero, as every ``s_j`` does.

    Zero on one side alone, as in low-rank adapters (LoRA): the member starts where it would without the pairs, and
    the gradient of ``s_j`` is not zero as that of both would be.

    Args:
        num_members: How many members there are from the start.
        num_pairs: How many pairs each has.
        num_in: Length of ``r_j``.
        num_out: Length of ``s_j``.
        start: How ``r_j`` starts, ``signs`` or ``uniform``.
        groups: Split both vectors into so many parts; part i of ``s_j`` meets part i of ``r_j`` alone.
        implicit_first: Member 0 has the matrix zero and stores nothing.
    """

    component = "fast_weights"

    def __init__(
        self,
        num_members: int,
        num_pairs: int,
        num_in: int,
        num_out: int,
        *,
        start: Start,
        groups: int = 1,
        implicit_first: bool = False,
    ) -> None:
        super().__init__()
        self.num_pairs, self.groups = num_pairs, groups
        explicit = max(num_members - implicit_first, 0)
        self.r = _bank(start, explicit, num_pairs, num_in, implicit_first)
        self.s = _bank("zeros", explicit, num_pairs, num_out, implicit_first)

    def forward(self, member: int) -> Tensor:
        """One member's matrix, ``(num_out, num_in / groups)``."""
        r, s = (bank.row(member).unflatten(1, (self.groups, -1)).transpose(0, 1) for bank in (self.r, self.s))
        return (s.transpose(1, 2) @ r).flatten(0, 1)


def _bank(start: Start, num_members: int, num_pairs: int, size: int, implicit_first: bool) -> Bank:
    rows = pair_vectors(start, num_members, num_pairs, size)
    return Bank(rows, Pairs.component, implicit_first=implicit_first, start=start)
