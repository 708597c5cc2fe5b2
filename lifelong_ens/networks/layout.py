"""What of a body a task has for itself: enough to build the body again, without its tensors."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from lifelong_ens.convert import AFFINE_NORMS, BATCH_NORMS, convert
from lifelong_ens.layers.bank import Selection

# what has statistics or affine numbers that a task can have of its own
NORM_TYPES = (*BATCH_NORMS, *AFFINE_NORMS)


@dataclass(frozen=True)
class Layout:
    """Which layers of a body have members, and what each member has.

    Attributes:
        layers: ``all`` that have a form with members, ``norms`` alone, or ``none``: then tasks differ in their heads.
        norm: ``statistics_only`` per member, ``per_member`` (affine too), or ``shared_frozen``.
        bias: A bias ``per_member``, or ``shared``.
        rank: Pairs of fast weights that scale each weight.
        additive: Pairs that are added to each weight.
    """

    layers: Literal["all", "norms", "none"]
    norm: Literal["statistics_only", "per_member", "shared_frozen"] = "statistics_only"
    bias: Literal["per_member", "shared"] = "per_member"
    rank: int = 1
    additive: int = 0

    def with_members(self, body: nn.Module, num_members: int, **options: Any) -> tuple[nn.Module, Selection]:
        """A copy of ``body`` with members, and the selection its layers read; options are those of ``convert``."""
        if self.layers == "none":
            return copy.deepcopy(body), Selection()
        return convert(
            body,
            num_members,
            include=None if self.layers == "all" else NORM_TYPES,
            norm="shared" if self.norm == "shared_frozen" else self.norm,
            bias=self.bias,
            rank=self.rank,
            additive=self.additive,
            **options,
        )
