"""Rank-1 layers: a shared weight W, scaled for member i by the outer product of two vectors (BatchEnsemble).

Wen, Tran and Ba, "BatchEnsemble: an alternative approach to efficient ensemble and lifelong learning", ICLR
2020, equations 1-5: ``W_i = W * (s_i r_i^T)`` and so ``W_i x = (W (x * r_i)) * s_i``. Every bias is added
after the scaling by ``s``, as in the authors' code. A convolution scales input channels by ``r`` and output
channels by ``s``.

Beyond the paper a member may have more: ``W_i = W * (sum_j s_ij r_ij^T) + sum_j u_ij v_ij^T``, with ``u`` per output
unit and ``v`` over all that one unit reads, the kernel of a convolution included.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from lifelong_ens.layers.bank import (
    Bank,
    Members,
    Selection,
    along,
    by_member,
    fast_weights,
    per_row,
    scale_and_shift,
)
from lifelong_ens.layers.pairs import Pairs
from lifelong_ens.layers.plan import Call, Mode, Plan, constants_of, plan
from lifelong_ens.layers.products import Product, merged, outer, scaled

BIASES = ("per_member", "shared")

M = TypeVar("M", bound=nn.Module)
R = TypeVar("R", bound="Rank1Layer")


class ScalingNorm(Protocol):
    """A norm that can do the scaling by ``s`` of the layer before it."""

    def takes_scale(self) -> bool:
        """Whether it does at present."""
        ...


class Rank1Layer(nn.Module):
    """What all rank-1 layers have: the banks ``r``, ``s`` and bias, and the selection of members.

    The shared weight keeps the name and shape it has in torch's layer, so pretrained state dicts load.

    Attributes:
        more: The second and later pairs that scale the weight, where ``rank`` is above 1.
        added: The pairs whose products are added to it, where ``additive`` is above 0.
        norm: The one module that reads this layer's output, where that is a norm which can scale it by ``s``.
        deferred: Whether the last call left the scaling by ``s``, and the bias, to ``norm``.
    """

    r: Bank
    s: Bank
    more: Pairs | None
    added: Pairs | None
    bias: Any
    private_bias: Bank | None
    selection: Selection
    norm: tuple[ScalingNorm, ...] = ()
    deferred = False
    channel_axis = 1
    batched = False

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

    def forward(self, input: Tensor) -> Tensor:
        """Each row through its member's dense layer, in the way that ``mode`` names; shapes as of the plain layer."""
        self.deferred = False
        mode = self.mode(input)
        if mode == "merge":
            return self._merge(input)
        if mode == "batched":
            return self._multiply_batched(input)
        return self._scale_each_pair(input) if mode == "pairs" else self._scale(input)

    def mode(self, x: Tensor) -> Mode | Literal["pairs"]:
        """How this input is computed; ``pairs``: as ``scale``, once for every pair.

        It follows from shapes, from how rows are selected, and from whether this is training; never from values. In
        evaluation not from what needs gradients either: what is frozen answers the same to the bit. Inside a compiled
        graph always ``scale``: its passes are fused with others there, and one graph serves all batch sizes.
        """
        if self.added is not None:
            return "merge"
        if self.more is not None:
            return "pairs" if isinstance(self.selection.members, Tensor) else "merge"
        if torch.compiler.is_compiling() or isinstance(self.selection.members, Tensor):
            return "scale"
        return self.plan(x).mode

    def plan(self, x: Tensor) -> Plan:
        """The arithmetic behind ``mode`` for rows of one member, or in blocks."""
        learning = self.training and torch.is_grad_enabled()
        weight = self.get_parameter("weight")
        frozen = learning and not weight.requires_grad and x.requires_grad
        sizes = self._row_sizes(x)
        call = Call(
            len(x), self._num_blocks(), *sizes, weight.numel(), self.batched, learning, frozen, x.itemsize
        )
        return plan(call, constants_of(x.device.type))

    def product(self, x: Tensor) -> tuple[Product, Tensor]:
        """How the layer multiplies, and the input as that takes it: with padding that is no zeros put on."""
        raise TypeError(f"{type(self).__name__} does not say how it multiplies.")

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The plain layer with this weight and bias."""
        raise TypeError(f"{type(self).__name__} does not say how its plain layer is computed.")

    def _row_sizes(self, x: Tensor) -> tuple[int, int]:
        """How many numbers of a row ``r`` and ``s`` scale."""
        raise TypeError(f"{type(self).__name__} does not say how large its rows are.")

    def _num_blocks(self) -> int:
        """How many members are selected."""
        members = self.selection.members
        if members is None:
            return self.r.num_members
        return 1 if isinstance(members, int) else len(members)

    def selected(self) -> Sequence[int]:
        """The members of the blocks of rows."""
        members = self.selection.members
        if isinstance(members, Tensor):
            return members.tolist()
        return (members,) if isinstance(members, int) else members or range(self.r.num_members)

    def _merge(self, x: Tensor) -> Tensor:
        ids = self.selected()
        return self._merge_one(x, ids[0]) if len(ids) == 1 else by_member(x, ids, self._merge_one, self)

    def _merge_one(self, x: Tensor, member: int) -> Tensor:
        bias = self.member_bias(member)
        learning = self.training and torch.is_grad_enabled()
        if not learning or torch.compiler.is_compiling() or self.more is not None or self.added is not None:
            return self.multiply(x, self.member_weight(member), bias)
        product, x = self._autocast(x)
        return merged(x, self.get_parameter("weight"), self.r.row(member), self.s.row(member), bias, product)

    def _scale(self, x: Tensor) -> Tensor:
        members, weight = self.selection.members, self.get_parameter("weight")
        r = along(per_row(self.r.rows(members), x.shape[0], self), x, self.channel_axis)
        s = per_row(self.s.rows(members), x.shape[0], self)
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            product, x = self._autocast(x)
            bias = self.bias_rows(members)
            if bias is not None:
                bias = along(per_row(bias, x.shape[0], self), x, self.channel_axis)
            return scaled(x, weight, r.to(x.dtype), along(s, x, self.channel_axis), bias, product)
        y = self.multiply(x * r, weight, None)
        if self._defers():
            self.deferred = True
            return y
        return self._add_bias(y, along(s, y, self.channel_axis))

    def _scale_each_pair(self, x: Tensor) -> Tensor:
        """``sum_j W (x * r_j) * s_j``, all pairs in one pass of the plain layer."""
        more: Any = self.more
        members = self.selection.members
        r, s = (
            per_row(
                torch.cat([first.rows(members).unsqueeze(1), others.rows(members)], 1), len(x), self
            ).unbind(1)
            for first, others in ((self.r, more.r), (self.s, more.s))
        )
        copies = torch.cat([x * along(rows, x, self.channel_axis) for rows in r])
        parts = self.multiply(copies, self.get_parameter("weight"), None).chunk(len(r))
        return self._add_bias(
            torch.stack(
                [y * along(rows, y, self.channel_axis) for y, rows in zip(parts, s, strict=True)]
            ).sum(0)
        )

    def _multiply_batched(self, x: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} has no batched product of several members.")

    def _add_bias(self, y: Tensor, scale: Tensor | None = None) -> Tensor:
        """``y * scale + b``, each row by its member's bias."""
        rows = self.bias_rows(self.selection.members)
        if rows is None:
            return y if scale is None else y * scale
        shift = along(per_row(rows, y.shape[0], self), y, self.channel_axis)
        return y + shift if scale is None else scale_and_shift(y, scale, shift)

    def bias_rows(self, members: Members) -> Tensor | None:
        """The selected members' biases, ``(K, out)``, one row where they share it; None where there is none."""
        if self.private_bias is not None:
            return self.private_bias.rows(members)
        return None if self.bias is None else self.bias.unsqueeze(0)

    def _defers(self) -> bool:
        """Whether the norm after this layer scales its output by ``s`` as well: one pass instead of two.

        Not for a single member: torch's own kernel for its norm gives the bits of the plain network at ``s = 1``.
        """
        several = not isinstance(self.selection.members, int)
        return (
            several and bool(self.norm) and not torch.compiler.is_compiling() and self.norm[0].takes_scale()
        )

    def _autocast(self, x: Tensor) -> tuple[Product, Tensor]:
        """The product and its input, in the dtype in which autocast would have it multiplied."""
        kind = x.device.type
        enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        if enabled and x.dtype == torch.float32:
            x = x.to(torch.get_autocast_dtype(kind))
        return self.product(x)

    def member_weight(self, member: int) -> Tensor:
        """The dense weight of one member, ``W * (sum_j s_j r_j^T) + sum_j u_j v_j^T``, in the shape of ``W``."""
        weight, groups = self.get_parameter("weight"), getattr(self, "groups", 1)
        factor = outer(self.r.row(member), self.s.row(member), groups)
        if self.more is not None:
            factor = factor + self.more(member)
        dense = weight * factor.view(*factor.shape, *[1] * (weight.dim() - 2))
        return dense if self.added is None else dense + self.added(member).view_as(weight)

    def _has_bias(self) -> bool:
        return self.bias is not None or self.private_bias is not None

    def member_bias(self, member: int) -> Tensor | None:
        """One member's bias, ``(out,)``, or None where the layer has none."""
        return self.bias if self.private_bias is None else self.private_bias.row(member)


def explain(network: nn.Module, run: Callable[[], object]) -> str:
    """How every rank-1 layer of a network runs while ``run`` calls it, with the arithmetic where there is a choice.

    Args:
        network: Any network with rank-1 layers.
        run: Calls it, such as ``lambda: network(x)``.
    """
    names = {module: name for name, module in network.named_modules() if isinstance(module, Rank1Layer)}
    found: dict[Rank1Layer, str] = {}

    def note(layer: Rank1Layer, inputs: tuple[Tensor, ...]) -> None:
        mode = layer.mode(inputs[0])
        planned = (
            layer.added is None and layer.more is None and not isinstance(layer.selection.members, Tensor)
        )
        why = layer.plan(inputs[0]).explain() if planned else "the only way for these rows"
        found.setdefault(layer, f"{names[layer]}: {mode}\n{textwrap.indent(why, '  ')}")

    handles = [layer.register_forward_pre_hook(note) for layer in names]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return "\n".join(found.values())


def with_tensors_of(new: R, layer: nn.Module, num_members: int, options: dict[str, Any]) -> R:
    """Put the plain layer's tensors and mode into its converted copy and add the members."""
    weight = layer.get_parameter("weight")
    new.weight = weight  # pyright: ignore
    new.bias = layer.bias  # pyright: ignore
    new.add_members(num_members, **options)
    new.to(weight.device, weight.dtype)
    return new.train(layer.training)


def without_members(plain: M, layer: Rank1Layer, member: int) -> M:
    """Put one member's dense tensors into a plain layer made on the meta device."""
    weight, bias = layer.member_weight(member).detach().clone(), layer.member_bias(member)
    plain.weight = nn.Parameter(weight)  # pyright: ignore
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().clone())  # pyright: ignore
    return plain.train(layer.training)
