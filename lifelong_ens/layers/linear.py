"""Linear layers with rank-1 members."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifelong_ens.layers.bank import per_row
from lifelong_ens.layers.products import Dense, Product
from lifelong_ens.layers.rank1 import Rank1Layer, with_tensors_of, without_members


class Rank1Linear(Rank1Layer, nn.Linear):
    """``nn.Linear`` with rank-1 members; rows ``(batch, ..., in_features)``, members by the first axis.

    Args:
        in_features: As in ``nn.Linear``.
        out_features: As in ``nn.Linear``.
        bias: Whether there is a bias, one per member.
        num_members: How many members.
        init: How fast weights start: ``random_sign``, ``gaussian`` or ``ones``.
        rank: As in ``add_members``.
        additive: As in ``add_members``.
        device: Where the tensors live.
    """

    channel_axis = -1
    batched = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        num_members: int,
        init: str = "random_sign",
        rank: int = 1,
        additive: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device=device)
        self.add_members(num_members, init=init, rank=rank, additive=additive)

    @classmethod
    def of(cls, layer: nn.Linear, num_members: int, **options: Any) -> Rank1Linear:
        """The same layer with members, sharing its weight tensor; options as in ``add_members``."""
        new = cls.__new__(cls)
        nn.Linear.__init__(new, layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        return with_tensors_of(new, layer, num_members, options)

    def member_sizes(self) -> tuple[int, int]:
        """``(in_features, out_features)``."""
        return self.in_features, self.out_features

    def product(self, x: Tensor) -> tuple[Product, Tensor]:
        """See ``Rank1Layer.product``."""
        return Dense(), x

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See ``Rank1Layer.multiply``."""
        return F.linear(x, weight, bias)

    def _row_sizes(self, x: Tensor) -> tuple[int, int]:
        positions = x.shape[1:-1].numel()
        return positions * self.in_features, positions * self.out_features

    def _scale(self, x: Tensor) -> Tensor:
        blocks = 1 if isinstance(self.selection.members, Tensor) else self._num_blocks()
        if blocks == 1 or len(x) == 0 or len(x) % blocks or torch.compiler.is_compiling():
            return super()._scale(x)
        # with an axis for the blocks no vector is copied for every row, which would be as large as the input
        return super()._scale(x.unflatten(0, (blocks, -1))).flatten(0, 1)

    def _multiply_batched(self, x: Tensor) -> Tensor:
        """Blocks of rows through the dense layers of their members, one product for all."""
        members = self.selection.members
        r, s = self.r.rows(members), self.s.rows(members)
        per_row(r, len(x), self)  # raises where rows would be left over
        dense = (self.weight * (s.unsqueeze(2) * r.unsqueeze(1))).to(x.dtype)
        blocks = x.unflatten(0, (len(r), -1))
        y = torch.bmm(blocks.flatten(1, -2), dense.transpose(1, 2))
        return self._add_bias(y.view(*x.shape[:-1], self.out_features))

    def export(self, member: int) -> nn.Linear:
        """One member as a plain ``nn.Linear``."""
        plain = nn.Linear(self.in_features, self.out_features, self._has_bias(), device="meta")
        return without_members(plain, self, member)
