"""Normalisation with numbers of its own for each member: affine rows and running statistics.

With running statistics shared between tasks, old tasks' logits move although every parameter is frozen.
Edward2's ``ensemble_batchnorm`` and ``EnsembleSyncBatchNorm`` also keep them per member.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifelong_ens.layers.bank import Bank, Members, Selection, along, by_member, per_row, scale_and_shift
from lifelong_ens.layers.rank1 import Rank1Layer

POLICIES = ("per_member", "statistics_only", "shared")


class _Affine(nn.Module):
    """The affine part of a norm, per member or shared by all, in torch's names where it is shared."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    private_weight: Bank | None
    private_bias: Bank | None

    def _add_affine(self, norm: nn.Module, num_members: int, private: bool) -> None:
        for name in ("weight", "bias"):
            shared = getattr(norm, name, None)
            self.register_parameter(name, None if private else shared)
            rows = (
                shared.detach().expand(num_members, *shared.shape) if private and shared is not None else None
            )
            setattr(self, f"private_{name}", None if rows is None else Bank(rows, "norm_affine"))

    def _rows(self, name: str, members: Members) -> Tensor | None:
        """The selected members' weight or bias, ``(K, *shape)``, or None where the norm has none."""
        bank, shared = getattr(self, f"private_{name}"), getattr(self, name)
        if bank is not None:
            return bank.rows(members)
        return None if shared is None else shared.unsqueeze(0)

    def _affine(self, y: Tensor, members: Members, channel_axes: slice) -> Tensor:
        """``y * weight + bias``, each row by its member's; ``channel_axes`` are the axes the rows cover."""
        for name, combine in (("weight", torch.mul), ("bias", torch.add)):
            rows = self._rows(name, members)
            if rows is not None:
                values = per_row(rows, len(y), self)
                shape = [1] * y.dim()
                shape[channel_axes] = values.shape[1:]
                shape[0] = len(values)
                y = combine(y, values.to(y.dtype).view(shape))
        return y

    def _export_affine(self, plain: nn.Module, member: int) -> None:
        for name in ("weight", "bias"):
            rows = self._rows(name, member)
            if rows is not None:
                setattr(plain, name, nn.Parameter(rows[0].detach().clone()))


class MemberLayerNorm(_Affine):
    """``nn.LayerNorm`` with one affine row per member; inputs ``(batch, ..., *normalized_shape)``."""

    def __init__(self, norm: nn.LayerNorm, num_members: int, selection: Selection) -> None:
        super().__init__()
        self.normalized_shape, self.eps = norm.normalized_shape, norm.eps
        self.selection = selection
        self._add_affine(norm, num_members, private=True)
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over the last axes, then scale and shift each row by its member's numbers."""
        y = F.layer_norm(x, self.normalized_shape, eps=self.eps)
        return self._affine(y, self.selection.members, slice(-len(self.normalized_shape), None))

    def export(self, member: int) -> nn.LayerNorm:
        """One member as a plain ``nn.LayerNorm``."""
        plain = nn.LayerNorm(
            list(self.normalized_shape),
            self.eps,
            self.private_weight is not None,
            self.private_bias is not None,
        )
        self._export_affine(plain, member)
        return plain.train(self.training)


class MemberGroupNorm(_Affine):
    """``nn.GroupNorm`` with one affine row per member; inputs ``(batch, C, ...)``."""

    def __init__(self, norm: nn.GroupNorm, num_members: int, selection: Selection) -> None:
        super().__init__()
        self.num_groups, self.num_channels, self.eps = norm.num_groups, norm.num_channels, norm.eps
        self.selection = selection
        self._add_affine(norm, num_members, private=True)
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each group of channels, then scale and shift each row by its member's numbers."""
        return self._affine(
            F.group_norm(x, self.num_groups, eps=self.eps), self.selection.members, slice(1, 2)
        )

    def export(self, member: int) -> nn.GroupNorm:
        """One member as a plain ``nn.GroupNorm``."""
        plain = nn.GroupNorm(self.num_groups, self.num_channels, self.eps, self.private_weight is not None)
        self._export_affine(plain, member)
        return plain.train(self.training)


class MemberBatchNorm(_Affine):
    """Batch normalisation with running statistics, and if asked affine rows, of each member's own.

    In training a member in training is normalised by the statistics of its own rows, which move its running
    statistics; a committed member always by its running statistics, which never move. Inputs ``(batch, C,
    ...)``.

    Attributes:
        before: The rank-1 layer whose output this norm alone reads, if there is one. In evaluation, where it would
            scale activations, it leaves that to this norm, which scales them anyway.

    Args:
        norm: The plain norm whose numbers every member starts from.
        num_members: How many members.
        selection: The network's selection.
        private_affine: Affine rows per member, or one shared affine.
    """

    before: tuple[Rank1Layer, ...] = ()

    def __init__(
        self,
        norm: nn.modules.batchnorm._BatchNorm,
        num_members: int,
        selection: Selection,
        private_affine: bool,
    ) -> None:
        super().__init__()
        if norm.momentum is None:
            raise ValueError(
                "MemberBatchNorm: a cumulative average (momentum=None) has no form with members; "
                "set a momentum."
            )
        self.plain_type = type(norm)
        self.num_features, self.eps, self.momentum = norm.num_features, norm.eps, norm.momentum
        self.selection = selection
        self._add_affine(norm, num_members, private_affine)
        self.running_mean = self.running_var = None
        if norm.running_mean is not None and norm.running_var is not None:
            self.running_mean = Bank(
                norm.running_mean.expand(num_members, -1), "norm_statistics", learned=False
            )
            self.running_var = Bank(
                norm.running_var.expand(num_members, -1), "norm_statistics", learned=False
            )
        elif self.private_weight is None:
            raise ValueError(
                "MemberBatchNorm: without running statistics and affine rows of its own no member can be told "
                "from another; exclude this norm, or give it track_running_stats=True."
            )
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each row with its member's statistics, scale and shift it with its member's affine."""
        members = self.selection.members
        if self.before and self.before[0].deferred:
            return self._by_running(x, members, self.before[0])
        if isinstance(members, int):
            return self._one(x, members)
        if members is None:
            members = tuple(range(self._num_members()))
        if not self._uses_batch(members):
            return self._by_running(x, members)
        ids = members if isinstance(members, tuple) else members.tolist()
        return by_member(x, ids, self._one, self)

    def takes_scale(self) -> bool:
        """Whether it scales the output of the layer before it by ``s`` too: only by constants."""
        return not self.training and self.running_mean is not None

    def _num_members(self) -> int:
        bank = self.private_weight if self.running_mean is None else self.running_mean
        return 0 if bank is None else bank.num_members

    def _uses_batch(self, members: tuple[int, ...] | Tensor) -> bool:
        """Whether any selected member is normalised by its batch's own statistics."""
        if self.running_mean is None:
            return True
        if not self.training or self.running_mean.active is None:
            return False
        if isinstance(members, tuple):
            return any(map(self.running_mean.is_learning, members))
        return bool((members >= self.running_mean.num_committed).any())

    def _one(self, x: Tensor, member: int) -> Tensor:
        """All rows belong to one member: torch's own kernel."""
        weight_bank, bias_bank = self.private_weight, self.private_bias
        weight = self.weight if weight_bank is None else weight_bank.row(member)
        bias = self.bias if bias_bank is None else bias_bank.row(member)
        mean, var = self.running_mean, self.running_var
        if mean is None or var is None:
            return F.batch_norm(x, None, None, weight, bias, True, self.momentum, self.eps)
        learning = self.training and mean.is_learning(member)
        return F.batch_norm(
            x, mean.row(member), var.row(member), weight, bias, learning, self.momentum, self.eps
        )

    def _by_running(self, x: Tensor, members: Members, layer: Rank1Layer | None = None) -> Tensor:
        """Rows of several members by their running statistics: one scale and one shift per row.

        With ``layer``, ``x`` is its output without its ``s`` and bias, which the scale and the shift take in.
        """
        mean, var = (bank.rows(members) for bank in (self.running_mean, self.running_var) if bank is not None)
        weight, bias = self._rows("weight", members), self._rows("bias", members)
        scale = torch.rsqrt(var + self.eps)
        scale = scale if weight is None else scale * weight
        if layer is not None:
            own = layer.bias_rows(members)
            mean = mean if own is None else mean - own
        shift = -mean * scale if bias is None else bias - mean * scale
        scale = scale if layer is None else scale * layer.s.rows(members)
        scale, shift = (along(per_row(rows, len(x), self), x, 1) for rows in (scale, shift))
        return scale_and_shift(x, scale, shift)

    def export(self, member: int) -> nn.Module:
        """One member as torch's plain norm."""
        affine = self._rows("weight", member) is not None
        plain: Any = self.plain_type(
            self.num_features,
            self.eps,
            self.momentum,
            affine,
            track_running_stats=self.running_mean is not None,
        )
        self._export_affine(plain, member)
        if self.running_mean is not None and self.running_var is not None:
            plain.running_mean = self.running_mean.row(member).clone()
            plain.running_var = self.running_var.row(member).clone()
            plain.num_batches_tracked = plain.num_batches_tracked.to(plain.running_mean.device)
        return plain.train(self.training)
