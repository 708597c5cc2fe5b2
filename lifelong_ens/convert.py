"""Any network, the same network with members: rank-1 layers in place of plain ones, trained weights kept.

Names are collected first and modules replaced afterwards, so that a failing conversion changes nothing.
"""

from __future__ import annotations

import copy
import fnmatch
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lifelong_ens.errors import InputError, UnfitNetworkError
from lifelong_ens.layers.attention import Rank1MultiheadAttention
from lifelong_ens.layers.bank import Selection, banks
from lifelong_ens.layers.convolution import Rank1Conv1d, Rank1Conv2d, Rank1Conv3d
from lifelong_ens.layers.exported import ExportedMembers
from lifelong_ens.layers.hyper import HyperLayer
from lifelong_ens.layers.linear import Rank1Linear
from lifelong_ens.layers.masked import MaskedLayer
from lifelong_ens.layers.norm import MemberBatchNorm, MemberGroupNorm, MemberLayerNorm
from lifelong_ens.layers.rank1 import Rank1Layer
from lifelong_ens.replication import Replication, by_member_first, replicate, sole_readers

log = logging.getLogger(__name__)

Match = str | type[nn.Module] | Callable[[str, nn.Module], bool]
Norms = Literal["per_member", "statistics_only", "shared"]
Biases = Literal["per_member", "shared"]

RANK1: dict[type[nn.Module], type[Rank1Layer]] = {
    nn.Linear: Rank1Linear,
    nn.Conv1d: Rank1Conv1d,
    nn.Conv2d: Rank1Conv2d,
    nn.Conv3d: Rank1Conv3d,
}
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
AFFINE_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: MemberLayerNorm,
    nn.GroupNorm: MemberGroupNorm,
}
# `include` for members on self-attention alone, as in BatchEnsemble's translation models; attention from one sequence
# to another, `multihead_attn` in torch's decoder, stays shared
SELF_ATTENTION: tuple[str, ...] = ("*self_attn", "*self_attention")
# why a module stays shared when that was asked for, by include, exclude or norm
CHOSEN = "as asked"
MEMBER_LAYERS = (
    Rank1Layer,
    Rank1MultiheadAttention,
    HyperLayer,
    MaskedLayer,
    MemberBatchNorm,
    MemberLayerNorm,
    MemberGroupNorm,
)
# each has an export(member) of its own
EXPORTS = (*MEMBER_LAYERS, MaskedLayer)


@dataclass(frozen=True)
class Conversion:
    """What happens to one module: ``target`` names its new class, or is None where it stays as it is."""

    name: str
    source: str
    target: str | None
    reason: str


def plan_conversion(
    model: nn.Module,
    *,
    include: Sequence[Match] | None = None,
    exclude: Sequence[Match] = (),
    norm: Norms = "per_member",
) -> list[Conversion]:
    """What ``batch_ensemble`` would do, without doing it: one line for every module with tensors of its own.

    Args:
        model: Any network.
        include: Convert only these: names or glob patterns, module types, or predicates of (name, module).
        exclude: Leave these as they are; wins over ``include``.
        norm: As in ``batch_ensemble``.
    """
    return [_decide(name, module, include, exclude, norm) for name, module in _units(model)]


def convert(
    model: nn.Module,
    num_members: int,
    *,
    include: Sequence[Match] | None = None,
    exclude: Sequence[Match] = (),
    init: str = "random_sign",
    norm: Norms = "per_member",
    bias: Biases = "per_member",
    selection: Selection | None = None,
    **layer_options: Any,
) -> tuple[nn.Module, Selection]:
    """A copy of ``model`` with members, and the selection its layers read; arguments: ``batch_ensemble``.

    The selection may be given. Other options, ``implicit_first``, ``rank`` and ``additive``, are those of
    ``Rank1Layer.add_members``.

    Raises:
        UnfitNetworkError: Nothing matched, or a matched module has no form with members; the line says which and
            why.
    """
    plan = plan_conversion(model, include=include, exclude=exclude, norm=norm)
    if not any(entry.target for entry in plan):
        kinds = ", ".join(sorted({entry.source for entry in plan})) or "none"
        raise UnfitNetworkError(
            f"nothing in {type(model).__name__} matched, so it would have no members: "
            f"its modules with weights are {kinds}; check include and exclude."
        )
    for entry in plan:
        if entry.target is None and entry.reason != CHOSEN:
            log.warning("%s (%s) stays shared by all members: %s", entry.name, entry.source, entry.reason)
    model, selection = copy.deepcopy(model), selection or Selection()
    options = {"init": init, "bias": bias, "selection": selection, **layer_options}
    replacements: dict[nn.Module, nn.Module] = {}
    for entry in plan:
        if entry.target:
            old = model.get_submodule(entry.name)
            try:
                replacements[old] = _with_members(old, num_members, norm, options)
            except ValueError as error:
                raise UnfitNetworkError(f"{entry.name}: {error}") from error
    body = replace_modules(model, replacements)
    for layer, reader in sole_readers(body, has_members):
        if isinstance(layer, Rank1Layer) and isinstance(reader, MemberBatchNorm):
            layer.norm, reader.before = (reader,), (layer,)
    return body, selection


def batch_ensemble(
    model: nn.Module,
    num_members: int,
    *,
    include: Sequence[Match] | None = None,
    exclude: Sequence[Match] = (),
    init: Literal["random_sign", "gaussian", "ones"] = "random_sign",
    norm: Norms = "per_member",
    bias: Biases = "per_member",
) -> MemberNetwork:
    """An ensemble that shares the weights of ``model``; trained weights kept, original untouched.

    Source: Wen et al., ICLR 2020, section 3.1. With ``init="ones"`` every member starts as ``model`` itself.

    Args:
        model: Any network with the batch on the first axis of its inputs and outputs.
        num_members: How many members.
        include: Convert only these: names or glob patterns (``"layer4.*"``), module types, or predicates of
            (name, module). None means every layer and norm that has a form with members; ``SELF_ATTENTION``
            is the choice of the paper for Transformers.
        exclude: Leave these as they are; wins over ``include``.
        init: How fast weights start: random signs (the paper), N(1, 0.5^2) (the authors' later code), or
            ones.
        norm: Affine and running statistics ``per_member``, ``statistics_only`` per member, or all ``shared``
            (one norm over the stacked batch, as in the authors' code).
        bias: One bias ``per_member``, or ``shared``.

    Raises:
        InputError: ``num_members`` < 1, nothing matched, or a matched module has no form with members.
    """
    if num_members < 1:
        raise InputError(f"an ensemble has at least one member, not {num_members}.")
    body, selection = convert(
        model, num_members, include=include, exclude=exclude, init=init, norm=norm, bias=bias
    )
    return MemberNetwork(body, selection, num_members)


class MemberNetwork(nn.Module):
    """A network with members, made by ``batch_ensemble``.

    How several members see the same rows, in one pass or one after the other, is up to ``replication``; the answer is
    the same.
    """

    def __init__(self, body: nn.Module, selection: Selection, num_members: int) -> None:
        super().__init__()
        self.body = body
        self.selection = selection
        self.num_members = num_members
        self.training = body.training
        self.replication = Replication(body, selection, has_members)

    def forward(
        self,
        x: Tensor,
        *more: Any,
        members: Sequence[int] | None = None,
        ids: Tensor | None = None,
        unbatched: Sequence[str] = (),
        **named: Any,
    ) -> Any:
        """Show every row to the given members, or each row to one.

        Args:
            x: Inputs ``(batch, ...)``.
            more: Further inputs of the network; what is no tensor is passed on as it is.
            members: Which members see all rows; None for all.
            ids: Instead, one member per row, int64 ``(batch,)``.
            unbatched: Names of inputs in ``named`` that hold for all rows, such as a causal mask ``(L, L)``.
            named: Inputs given by name; as those in ``more`` they have the batch on their first axis.

        Returns:
            Outputs ``(members, batch, ...)``; with ``ids``, ``(batch, ...)``. Of a network that returns a tuple, as
            ``nn.MultiheadAttention``, a tuple of such.

        Raises:
            ValueError: An input does not have the batch on its first axis.
        """
        if ids is not None:
            if ids.shape != x.shape[:1]:
                raise ValueError(f"ids name one member per row: expected {len(x)} of them, not {len(ids)}.")
            if not torch.compiler.is_compiling():  # there an id that does not exist fails where it is used
                self._check(ids.tolist())
            with self.selection.of(ids):
                return self.body(x, *more, **named)
        chosen = range(self.num_members) if members is None else members
        self._check(chosen)
        if len(chosen) == 1:
            with self.selection.of(chosen[0]):
                return by_member_first(self.body(x, *more, **named), 1, len(x))
        if not more and not named:
            return self.replication(x, tuple(chosen))
        with self.selection.of(tuple(chosen)):
            positional = [_stacked(one, len(chosen), len(x)) for one in (x, *more)]
            by_name = {
                name: one if name in unbatched else _stacked(one, len(chosen), len(x))
                for name, one in named.items()
            }
            return by_member_first(self.body(*positional, **by_name), len(chosen), len(x))

    def split(self, x: Tensor) -> Tensor:
        """Show each row to one member: ``(batch, ...)`` to ``(batch, classes)``, in blocks of nearly equal length."""
        if len(x) % self.num_members == 0:
            return self.replication.split(x, tuple(range(self.num_members)))
        rows = torch.arange(len(x), device=x.device)
        return self(x, ids=rows * self.num_members // len(x))

    def export_member(self, member: int) -> nn.Module:
        """One member as the plain network it was converted from, with no trace of members; equal to 1e-6."""
        self._check([member])
        return export(self.body, member)

    def export_ensemble(self) -> ExportedMembers:
        """All members as plain networks in a list that is a module: called, it answers as this one does."""
        return ExportedMembers(self.export_member(member) for member in range(self.num_members))

    def _check(self, members: Sequence[int]) -> None:
        wrong = [member for member in members if not 0 <= member < self.num_members]
        if wrong or not len(members):
            raise IndexError(f"members {wrong} do not exist; this network has 0 to {self.num_members - 1}.")


def _stacked(value: Any, times: int, batch: int) -> Any:
    """A block of rows for every member; a mask ``(batch * heads, L, S)`` has several rows for each of the batch."""
    if not isinstance(value, Tensor):
        return value
    if not value.dim() or len(value) % max(batch, 1):
        raise ValueError(
            f"an input of shape {tuple(value.shape)} does not have the batch of {batch} on its first axis; "
            "if it holds for all rows, give it by name and name it in unbatched."
        )
    return replicate(value, times)


def export(body: nn.Module, member: int) -> nn.Module:
    """A converted body as a plain network with one member's weights folded in."""
    with torch.no_grad():
        body = copy.deepcopy(body)
        units = [module for _, module in _units(body) if isinstance(module, EXPORTS)]
        layers: dict[nn.Module, nn.Module] = {module: cast("Any", module).export(member) for module in units}
        plain = replace_modules(body, layers)
    for module in plain.modules():
        for path, before in module.__dict__.pop("switched_off", {}).items():
            setattr(module, path, before)
    return plain


def append_members(body: nn.Module, num_members: int, init: str) -> None:
    """Add members in training to a converted body whose earlier members are committed.

    Args:
        body: A network from ``convert``.
        num_members: How many to add.
        init: How fast weights start, as in ``batch_ensemble``, or ``previous``; see ``Bank.new_rows``.
    """
    for bank in banks(body):
        bank.append(bank.new_rows(num_members, init))


def commit_members(body: nn.Module) -> None:
    """Freeze all members in training."""
    for bank in banks(body):
        bank.commit()


def has_members(module: nn.Module) -> bool:
    """Whether a layer tells members apart."""
    return isinstance(module, MEMBER_LAYERS)


def _units(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with tensors of their own, each once; an attention or a member layer is one with all inside."""
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        if isinstance(module, (nn.MultiheadAttention, *EXPORTS)):
            inside.update(map(id, module.modules()))
            yield name, module
        elif module._parameters or module._buffers:
            yield name, module


def _decide(
    name: str, module: nn.Module, include: Sequence[Match] | None, exclude: Sequence[Match], norm: Norms
) -> Conversion:
    kind = type(module)
    source = kind.__name__
    if _matches(name, module, exclude) or (include is not None and not _matches(name, module, include)):
        return Conversion(name, source, None, CHOSEN)
    if isinstance(module, MEMBER_LAYERS):
        return Conversion(name, source, None, "has members already")
    if kind in RANK1 and "weight" not in module._parameters:
        return Conversion(name, source, None, "its weight is computed by a hook")
    if kind in RANK1:
        return Conversion(name, source, RANK1[kind].__name__, "rank-1 members")
    if kind is nn.MultiheadAttention:
        return Conversion(name, source, "Rank1MultiheadAttention", "rank-1 members on q, k, v and output")
    if kind in BATCH_NORMS and norm != "shared":
        return Conversion(name, source, "MemberBatchNorm", f"norm={norm}")
    if kind in AFFINE_NORMS and norm == "per_member" and module._parameters.get("weight") is not None:
        return Conversion(name, source, AFFINE_NORMS[kind].__name__, f"norm={norm}")
    if kind in (*BATCH_NORMS, *AFFINE_NORMS):
        return Conversion(name, source, None, CHOSEN)
    if isinstance(module, tuple(RANK1)):
        return Conversion(
            name, source, None, f"a subclass of {kind.__mro__[1].__name__} with a forward of its own"
        )
    return Conversion(name, source, None, f"{source} has no form with members")


def _matches(name: str, module: nn.Module, patterns: Sequence[Match]) -> bool:
    for pattern in patterns:
        if isinstance(pattern, str):
            # "layer1" means everything inside it too
            if fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}."):
                return True
        elif isinstance(pattern, type):
            if isinstance(module, pattern):
                return True
        elif pattern(name, module):
            return True
    return False


def _with_members(module: nn.Module, num_members: int, norm: Norms, options: dict[str, Any]) -> nn.Module:
    selection: Selection = options["selection"]
    if isinstance(module, nn.MultiheadAttention):
        return Rank1MultiheadAttention(module, num_members, **options)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return MemberBatchNorm(module, num_members, selection, private_affine=norm == "per_member")
    if isinstance(module, nn.LayerNorm):
        return MemberLayerNorm(module, num_members, selection)
    if isinstance(module, nn.GroupNorm):
        return MemberGroupNorm(module, num_members, selection)
    layer_type: Any = RANK1[type(module)]
    return layer_type.of(module, num_members, **options)


def replace_modules(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> nn.Module:
    """Put the replacements in ``model`` at every place where the old modules stand; returns what stands for it."""
    if model in replacements:
        return replacements[model]
    for module in list(model.modules()):
        if isinstance(module, nn.TransformerEncoder) and any(one in replacements for one in module.modules()):
            # its inference path for padded batches reads its layers' weights too
            _switch_off(module, "use_nested_tensor")
        # not named_children, which leaves out the second name of a module that stands in two places
        for name, child in list(module._modules.items()):
            if child is not None and child in replacements:
                setattr(module, name, replacements[child])
                if isinstance(module, nn.TransformerEncoderLayer):
                    # its fused inference path reads the weights of its children without calling them
                    _switch_off(module, "activation_relu_or_gelu")
    return model


def _switch_off(module: nn.Module, path: str) -> None:
    """Switch off an inference path of torch's, and remember what it was for an export."""
    module.__dict__.setdefault("switched_off", {}).setdefault(path, getattr(module, path))
    setattr(module, path, 0)
