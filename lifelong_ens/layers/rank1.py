"""Rank-1 layers: a shared weight W, scaled for member i by the outer product of two vectors (BatchEnsemble).

Wen, Tran and Ba, "BatchEnsemble: an alternative approach to efficient ensemble and lifelong learning", ICLR
2020, equations 1-5: ``W_i = W * (s_i r_i^T)`` and so ``W_i x = (W (x * r_i)) * s_i``. Every bias is added
after the scaling by ``s``, as in the authors' code. A convolution scales input channels by ``r`` and output
channels by ``s``.

Beyond the paper a member may have more: ``W_i = W * (sum_j s_ij r_ij^T) + sum_j u_ij v_ij^T``, with ``u`` per output
unit and ``v`` over all that one unit reads, the kernel of a convolution included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifelong_ens.layers.bank import Bank, Selection, along, by_member, fast_weights, per_row
from lifelong_ens.layers.pairs import Pairs

BIASES = ("per_member", "shared")

M = TypeVar("M", bound=nn.Module)
R = TypeVar("R", bound="Rank1Layer")


class Rank1Layer(nn.Module):
    """What all rank-1 layers have: the banks ``r``, ``s`` and bias, and the selection of members.

    The shared weight keeps the name and shape it has in torch's layer, so pretrained state dicts load.

    Attributes:
        more: The second and later pairs that scale the weight, where ``rank`` is above 1.
        added: The pairs whose products are added to it, where ``additive`` is above 0.
    """

    r: Bank
    s: Bank
    more: Pairs | None
    added: Pairs | None
    bias: Any
    private_bias: Bank | None
    selection: Selection
    input_axis = 1

    def add_members(
        self,
        num_members: int,
        *,
        init: str = "random_sign",
        bias: str = "per_member",
        selection: Selection | None = None,
        implicit_first: bool = False,
        rank: int = 1,
        additive: int = 0,
    ) -> None:
        """Give the plain layer its banks; a per-member bias starts as copies of the layer's own.

        Whatever the rank, a member starts where one of rank 1 would: of the pairs beyond the first, and of those
        that are added, one side starts random and the other at zero.

        Args:
            num_members: How many members there are from the start.
            init: How fast weights start: ``random_sign``, ``gaussian`` or ``ones``.
            bias: ``per_member``, or ``shared`` to keep the layer's one bias for all.
            selection: The network's selection; a layer on its own gets its own.
            implicit_first: Member 0 is the shared layer itself and stores no fast weights.
            rank: How many pairs of vectors scale the weight.
            additive: How many pairs of vectors are added to the weight.
        """
        num_in, num_out = self.member_sizes()
        explicit = max(num_members - implicit_first, 0)
        options: Any = {"implicit_first": implicit_first}
        self.r = Bank(fast_weights(init, explicit, num_in), "fast_weights", start="init", **options)
        self.s = Bank(fast_weights(init, explicit, num_out), "fast_weights", start="init", **options)
        self.more = self.added = None
        if rank > 1:
            groups = getattr(self, "groups", 1)
            sizes = num_members, rank - 1, num_in, num_out
            self.more = Pairs(*sizes, start="signs", groups=groups, **options)
        if additive:
            fan_in = self.get_parameter("weight")[0].numel()
            self.added = Pairs(num_members, additive, fan_in, num_out, start="uniform", **options)
        self.private_bias = None
        if bias == "per_member" and self.bias is not None:
            self.private_bias = Bank(self.bias.detach().expand(num_members, -1), "bias")
            self.bias = None
        self.selection = selection or Selection()

    def member_sizes(self) -> tuple[int, int]:
        """Lengths of one member's ``r`` and ``s``."""
        raise TypeError(f"{type(self).__name__} does not say how long its fast weights are.")

    def merges(self, x: Tensor) -> bool:
        """Whether the member's dense weight is made for this input instead of scaling activations.

        Always where a member has more than one pair: then scaling would take a pass for each. Else in training one
        member, where no gradient flows back to ``x``: then the gradient of r needs none towards
        the input, which a first convolution would compute for nothing else. And where the weight, which folding
        touches once, is no larger than the input, which scaling touches. Never in evaluation: what is frozen
        answers the same to the bit, whichever tensors happen to need gradients.
        """
        if self.more is not None or self.added is not None:
            return True
        one_in_training = self.training and isinstance(self.selection.members, int)
        return one_in_training and not x.requires_grad and x.numel() >= self.get_parameter("weight").numel()

    def apply_merged(self, x: Tensor) -> Tensor:
        """Each row through the plain layer with its member's dense weight and bias."""
        ids = self.selected()
        return self.apply_member(x, ids[0]) if len(ids) == 1 else by_member(x, ids, self.apply_member, self)

    def selected(self) -> Sequence[int]:
        """The members of the blocks of rows."""
        members = self.selection.members
        if isinstance(members, Tensor):
            return members.tolist()
        return (members,) if isinstance(members, int) else members or range(self.r.num_members)

    def apply_member(self, x: Tensor, member: int) -> Tensor:
        """All rows through the plain layer with one member's dense weight and bias."""
        raise TypeError(f"{type(self).__name__} does not say how its plain layer is computed.")

    def scale_input(self, x: Tensor) -> Tensor:
        """``x * r``, each row by its member's vector."""
        rows = per_row(self.r.rows(self.selection.members), len(x), self)
        return x * along(rows, x, self.input_axis)

    def scale_output(self, y: Tensor) -> Tensor:
        """``y * s + b``, each row by its member's vectors."""
        members = self.selection.members
        scale = along(per_row(self.s.rows(members), len(y), self), y, self.input_axis)
        if self.private_bias is not None:
            shift = per_row(self.private_bias.rows(members), len(y), self)
        elif self.bias is not None:
            shift = self.bias.unsqueeze(0)
        else:
            return y * scale
        return torch.addcmul(along(shift, y, self.input_axis), y, scale)

    def member_weight(self, member: int) -> Tensor:
        """The dense weight of one member, ``W * (sum_j s_j r_j^T) + sum_j u_j v_j^T``, in the shape of ``W``."""
        weight, groups = self.get_parameter("weight"), getattr(self, "groups", 1)
        # row o of a grouped weight reads only the input channels of its own group
        r = self.r.row(member).view(groups, -1).repeat_interleave(len(weight) // groups, dim=0)
        factor = self.s.row(member).unsqueeze(1) * r
        if self.more is not None:
            factor = factor + self.more(member)
        scaled = weight * factor.view(*factor.shape, *[1] * (weight.dim() - 2))
        return scaled if self.added is None else scaled + self.added(member).view_as(weight)

    def _has_bias(self) -> bool:
        return self.bias is not None or self.private_bias is not None

    def member_bias(self, member: int) -> Tensor | None:
        """One member's bias, ``(out,)``, or None where the layer has none."""
        return self.bias if self.private_bias is None else self.private_bias.row(member)


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

    input_axis = -1

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
        return _finish(new, layer, num_members, options)

    def member_sizes(self) -> tuple[int, int]:
        """``(in_features, out_features)``."""
        return self.in_features, self.out_features

    def forward(self, input: Tensor) -> Tensor:
        """``(batch, ..., in_features)`` to ``(batch, ..., out_features)``."""
        if self.merges(input):
            return self.apply_merged(input)
        return self.scale_output(F.linear(self.scale_input(input), self.weight))

    def apply_member(self, x: Tensor, member: int) -> Tensor:
        """``(batch, ..., in_features)`` to ``(batch, ..., out_features)``, all of one member."""
        return F.linear(x, self.member_weight(member), self.member_bias(member))

    def export(self, member: int) -> nn.Linear:
        """One member as a plain ``nn.Linear``."""
        plain = nn.Linear(self.in_features, self.out_features, self._has_bias(), device="meta")
        return _fill(plain, self, member)


class _Rank1Conv(Rank1Layer):
    """Convolutions of any dimension: input channels scaled by ``r``, output channels by ``s``."""

    in_channels: int
    out_channels: int
    plain: type[nn.Conv1d | nn.Conv2d | nn.Conv3d]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        *,
        num_members: int,
        init: str = "random_sign",
        rank: int = 1,
        additive: int = 0,
        **conv_options: Any,
    ) -> None:
        self.plain.__init__(self, in_channels, out_channels, kernel_size, **conv_options)  # pyright: ignore
        self.add_members(num_members, init=init, rank=rank, additive=additive)

    @classmethod
    def of(cls, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, num_members: int, **options: Any) -> Self:
        """The same convolution with members, sharing its weight tensor; options as in ``add_members``."""
        new = cls.__new__(cls)
        cls.plain.__init__(new, **_conv_options(layer))  # pyright: ignore
        return _finish(new, layer, num_members, options)

    def member_sizes(self) -> tuple[int, int]:
        """``(in_channels, out_channels)``."""
        return self.in_channels, self.out_channels

    def forward(self, input: Tensor) -> Tensor:
        """``(batch, in_channels, ...)`` to ``(batch, out_channels, ...)``."""
        if self.merges(input):
            return self.apply_merged(input)
        x = self.scale_input(input)
        return self.scale_output(self._conv_forward(x, self.weight, None))  # pyright: ignore

    def apply_member(self, x: Tensor, member: int) -> Tensor:
        """``(batch, in_channels, ...)`` to ``(batch, out_channels, ...)``, all of one member."""
        return self._conv_forward(x, self.member_weight(member), self.member_bias(member))  # pyright: ignore

    def export(self, member: int) -> nn.Module:
        """One member as torch's plain convolution."""
        return _fill(self.plain(**_conv_options(self)), self, member)  # pyright: ignore


class Rank1Conv1d(_Rank1Conv, nn.Conv1d):
    """``nn.Conv1d`` with rank-1 members; options are keywords beside ``num_members`` and ``init``."""

    plain = nn.Conv1d


class Rank1Conv2d(_Rank1Conv, nn.Conv2d):
    """``nn.Conv2d`` with rank-1 members; options are keywords beside ``num_members`` and ``init``."""

    plain = nn.Conv2d


class Rank1Conv3d(_Rank1Conv, nn.Conv3d):
    """``nn.Conv3d`` with rank-1 members; options are keywords beside ``num_members`` and ``init``."""

    plain = nn.Conv3d


def _conv_options(layer: Any) -> dict[str, Any]:
    """The constructor arguments of a convolution, for a copy whose tensors are put in afterwards."""
    has_bias = layer._has_bias() if isinstance(layer, Rank1Layer) else layer.bias is not None
    names = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    )
    return {name: getattr(layer, name) for name in names} | {"bias": has_bias, "device": "meta"}


def _finish(new: R, layer: nn.Module, num_members: int, options: dict[str, Any]) -> R:
    """Put the plain layer's tensors and mode into its converted copy and add the members."""
    weight = layer.get_parameter("weight")
    new.weight = weight  # pyright: ignore
    new.bias = layer.bias  # pyright: ignore
    new.add_members(num_members, **options)
    new.to(weight.device, weight.dtype)
    return new.train(layer.training)


def _fill(plain: M, layer: Rank1Layer, member: int) -> M:
    """Put one member's dense tensors into a plain layer made on the meta device."""
    weight, bias = layer.member_weight(member).detach().clone(), layer.member_bias(member)
    plain.weight = nn.Parameter(weight)  # pyright: ignore
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().clone())  # pyright: ignore
    return plain.train(layer.training)
