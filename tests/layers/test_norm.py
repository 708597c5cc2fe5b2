from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lifelong_ens.layers.bank import Selection, banks
from lifelong_ens.layers.norm import MemberBatchNorm, MemberGroupNorm, MemberLayerNorm

Randomise = Callable[..., nn.Module]
NUM_MEMBERS, CHANNELS = 3, 4
BATCH_NORMS: dict[str, tuple[type[Any], tuple[int, ...]]] = {
    "1d": (nn.BatchNorm1d, ()),
    "1d with length": (nn.BatchNorm1d, (5,)),
    "2d": (nn.BatchNorm2d, (3, 2)),
    "3d": (nn.BatchNorm3d, (2, 2, 2)),
}
IDS = torch.tensor([2, 0, 1, 2, 0, 2, 1, 0, 1])
BLOCKS = torch.arange(NUM_MEMBERS).repeat_interleave(3)


def members_of(kind: str, private_affine: bool, randomise: Randomise, **options: Any) -> Any:
    plain_type, size = BATCH_NORMS[kind]
    norm = MemberBatchNorm(plain_type(CHANNELS, **options), NUM_MEMBERS, Selection(), private_affine)
    return randomise(norm).double(), torch.randn(len(IDS), CHANNELS, *size, dtype=torch.float64)


def separate(norm: Any) -> list[Any]:
    """Each member's plain norm, by hand: no use of the layer's own export."""
    plains = []
    for member in range(NUM_MEMBERS):
        plain = norm.plain_type(CHANNELS, norm.eps, norm.momentum).double().train(norm.training)
        for name in ("weight", "bias"):
            bank = getattr(norm, f"private_{name}")
            source = getattr(norm, name) if bank is None else bank.table()[member]
            getattr(plain, name).data.copy_(source.data)
        plain.running_mean.copy_(norm.running_mean.table()[member])
        plain.running_var.copy_(norm.running_var.table()[member])
        plains.append(plain)
    return plains


def apart(plains: list[Any], x: Tensor, ids: Tensor) -> Tensor:
    """What the separate norms answer, each on all rows of its member at once."""
    out = torch.empty_like(x)
    for member in ids.unique().tolist():
        out = out.index_copy(0, (ids == member).nonzero()[:, 0], plains[member](x[ids == member]))
    return out


@pytest.mark.parametrize("selected", ["blocks", "ids"])
@pytest.mark.parametrize("private_affine", [True, False])
@pytest.mark.parametrize("kind", BATCH_NORMS)
def test_training_equals_a_norm_for_every_member(
    kind: str, private_affine: bool, selected: str, randomise: Randomise
) -> None:
    norm, x = members_of(kind, private_affine, randomise, momentum=0.3)
    plains = separate(norm)
    ids = BLOCKS if selected == "blocks" else IDS
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    direction = torch.randn_like(x)
    for _ in range(3):
        with norm.selection.of(None if selected == "blocks" else ids):
            out = norm(inputs[0])
        expected = apart(plains, inputs[1], ids)
        torch.testing.assert_close(out, expected)
        (out * direction).sum().backward()
        (expected * direction).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for name in ("weight", "bias"):
        per_member = torch.stack([getattr(plain, name).grad for plain in plains])
        bank = getattr(norm, f"private_{name}")
        if private_affine:
            torch.testing.assert_close(bank.active.grad, per_member)
        else:
            torch.testing.assert_close(getattr(norm, name).grad, per_member.sum(0))
    for name in ("running_mean", "running_var"):
        expected = torch.stack([getattr(plain, name) for plain in plains])
        torch.testing.assert_close(getattr(norm, name).table(), expected)
        assert not torch.equal(expected[0], expected[1])


@pytest.mark.parametrize("members", [1, (2, 0), torch.tensor([2, 0])], ids=["one", "tuple", "tensor"])
def test_training_some_members_leaves_the_others_statistics(
    members: int | tuple[int, ...] | Tensor, randomise: Randomise
) -> None:
    norm, x = members_of("2d", True, randomise)
    plains, x = separate(norm), x[:6]
    ids = {int: torch.full((6,), 1)}.get(type(members), torch.tensor([2, 2, 2, 0, 0, 0]))
    with norm.selection.of(members):
        torch.testing.assert_close(norm(x), apart(plains, x, ids))
    for name in ("running_mean", "running_var"):
        expected = torch.stack([getattr(plain, name) for plain in plains])
        torch.testing.assert_close(getattr(norm, name).table(), expected)


@pytest.mark.parametrize("ids", [BLOCKS, IDS], ids=["blocks", "ids"])
@pytest.mark.parametrize("private_affine", [True, False])
@pytest.mark.parametrize("kind", BATCH_NORMS)
def test_evaluation_uses_each_members_running_statistics(
    kind: str, private_affine: bool, ids: Tensor, randomise: Randomise
) -> None:
    norm, x = members_of(kind, private_affine, randomise)
    norm.eval()
    plains, before = separate(norm), {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    with norm.selection.of(None if ids is BLOCKS else ids):
        torch.testing.assert_close(norm(x), apart(plains, x, ids))
    for member in range(NUM_MEMBERS):
        with norm.selection.of(member):
            torch.testing.assert_close(norm(x), plains[member](x))
    assert all(torch.equal(tensor, before[name]) for name, tensor in norm.state_dict().items())


@pytest.mark.parametrize("members", [None, torch.tensor([2, 0, 1, 2, 0, 2, 1, 0, 1])], ids=["blocks", "ids"])
def test_committed_members_never_move_and_use_their_running_statistics(
    members: Tensor | None, randomise: Randomise
) -> None:
    norm, x = members_of("2d", True, randomise)
    for bank in banks(norm):
        bank.commit()
        bank.append(bank.table()[:1] + 0.5)
    committed = {name: tensor.clone() for name, tensor in norm.state_dict().items() if "committed" in name}
    newest = norm.running_mean.active.clone()
    x = torch.cat([x, x[:3]])
    ids = (
        torch.arange(4).repeat_interleave(3)
        if members is None
        else torch.cat([members, torch.tensor([3] * 3)])
    )
    with norm.selection.of(members if members is None else ids):
        out = norm(x)
    norm.eval()
    for member in range(3):
        with norm.selection.of(member):
            torch.testing.assert_close(out[ids == member], norm(x[ids == member]))
    assert all(torch.equal(norm.state_dict()[name], tensor) for name, tensor in committed.items())
    assert (norm.running_mean.active != newest).all()


def test_all_committed_members_train_as_they_evaluate(randomise: Randomise) -> None:
    norm, x = members_of("2d", True, randomise)
    for bank in banks(norm):
        bank.commit()
    before = norm.running_mean.table().clone()
    torch.testing.assert_close(norm.train()(x), norm.eval()(x))
    assert torch.equal(norm.running_mean.table(), before)


def test_without_running_statistics_each_member_uses_its_own_rows(randomise: Randomise) -> None:
    plain = nn.BatchNorm2d(CHANNELS, track_running_stats=False)
    norm = randomise(MemberBatchNorm(plain, NUM_MEMBERS, Selection(), True)).eval()
    x = torch.randn(9, CHANNELS, 3, 3)
    out = norm(x)
    for member in range(NUM_MEMBERS):
        rows = member == BLOCKS
        torch.testing.assert_close(out[rows], norm.export(member)(x[rows]))


def test_a_norm_that_could_not_tell_members_apart_is_refused() -> None:
    plain = nn.BatchNorm2d(CHANNELS, track_running_stats=False)
    with pytest.raises(ValueError, match="track_running_stats=True"):
        MemberBatchNorm(plain, NUM_MEMBERS, Selection(), False)


def test_a_cumulative_average_is_refused() -> None:
    with pytest.raises(ValueError, match="momentum=None"):
        MemberBatchNorm(nn.BatchNorm1d(2, momentum=None), 2, Selection(), True)


@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize("training", [True, False])
def test_rows_that_do_not_split_are_refused(rows: int, training: bool) -> None:
    norm = MemberBatchNorm(nn.BatchNorm1d(CHANNELS), 3, Selection(), True).train(training)
    with pytest.raises(
        ValueError, match=f"MemberBatchNorm: {rows} rows do not split into 3 members; pass ids"
    ):
        norm(torch.randn(rows, CHANNELS))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("private_affine", [True, False])
@pytest.mark.parametrize("kind", BATCH_NORMS)
def test_batch_norm_export(kind: str, private_affine: bool, affine: bool, randomise: Randomise) -> None:
    norm, x = members_of(kind, private_affine, randomise, affine=affine)
    norm.eval()
    for member in range(NUM_MEMBERS):
        plain = norm.export(member)
        assert type(plain) is BATCH_NORMS[kind][0]
        with norm.selection.of(member):
            assert torch.equal(plain(x), norm(x))
        before = norm.running_mean.table().clone()
        plain.train()(x)
        assert torch.equal(norm.running_mean.table(), before)


LAYER_NORMS = {
    "last axis": (nn.LayerNorm(5), (2, 5)),
    "two axes": (nn.LayerNorm((2, 5)), (3, 2, 5)),
    "whole row": (nn.LayerNorm((2, 5)), (2, 5)),
    "no bias": (nn.LayerNorm(5, bias=False), (2, 5)),
    "flat": (nn.LayerNorm(5), (5,)),
}


@pytest.mark.parametrize("ids", [None, IDS], ids=["blocks", "ids"])
@pytest.mark.parametrize("kind", LAYER_NORMS)
def test_layer_norm_equals_a_norm_for_every_member(
    kind: str, ids: Tensor | None, randomise: Randomise
) -> None:
    plain, shape = LAYER_NORMS[kind]
    norm = randomise(MemberLayerNorm(plain, NUM_MEMBERS, Selection())).double()
    check_affine(norm, torch.randn(9, *shape, dtype=torch.float64), ids)


@pytest.mark.parametrize("ids", [None, IDS], ids=["blocks", "ids"])
@pytest.mark.parametrize("size", [(), (3,), (3, 2)])
def test_group_norm_equals_a_norm_for_every_member(
    size: tuple[int, ...], ids: Tensor | None, randomise: Randomise
) -> None:
    norm = randomise(MemberGroupNorm(nn.GroupNorm(2, CHANNELS, eps=0.1), NUM_MEMBERS, Selection())).double()
    check_affine(norm, torch.randn(9, CHANNELS, *size, dtype=torch.float64), ids)


def check_affine(norm: Any, x: Tensor, ids: Tensor | None) -> None:
    with norm.selection.of(ids):
        out = norm(x)
    for member in range(NUM_MEMBERS):
        rows = (BLOCKS if ids is None else ids) == member
        plain = norm.export(member)
        assert type(plain) in (nn.LayerNorm, nn.GroupNorm)
        assert torch.equal(plain.weight, norm.private_weight.table()[member])
        if norm.private_bias is None:
            assert plain.bias is None
        else:
            assert torch.equal(plain.bias, norm.private_bias.table()[member])
        torch.testing.assert_close(out[rows], plain(x[rows]))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ids", [None, IDS], ids=["blocks", "ids"])
def test_bfloat16_stays_bfloat16(training: bool, ids: Tensor | None, randomise: Randomise) -> None:
    norm, x = members_of("2d", True, randomise)
    norm.float().train(training)
    with norm.selection.of(ids), torch.autocast("cpu", torch.bfloat16):
        out = norm(x.bfloat16())
    assert out.dtype == torch.bfloat16
    norm.double().train(training)
    with norm.selection.of(ids):
        torch.testing.assert_close(out.double(), norm(x), rtol=0.05, atol=0.05)
