from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lifelong_ens.layers.bank import Bank, Selection, along, banks, fast_weights, per_row

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 0.1, weight_decay=0.1),
}


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def grown(first: Tensor, second: Tensor, **options: bool) -> Bank:
    bank = Bank(first, "fast_weights", **options)
    bank.commit()
    bank.append(second)
    return bank


def train(bank: Bank, kind: str, steps: int = 5) -> None:
    optimizer = OPTIMIZERS[kind](list(bank.parameters()))
    for _ in range(steps):
        optimizer.zero_grad()
        # all rows take part in the loss, the committed ones too
        bank.table().square().sum().backward()
        optimizer.step()


def test_selection_goes_back_to_what_it_was() -> None:
    selection = Selection()
    with selection.of(1):
        with selection.of(torch.tensor([2])):
            assert selection.members.tolist() == [2]
        assert selection.members == 1
    with pytest.raises(KeyError), selection.of(3):
        raise KeyError
    assert selection.members is None


def test_rows_by_id_by_ids_and_all() -> None:
    first, second = numbers(1, 3), numbers(2, 3)
    bank = grown(first, second)
    everything = torch.cat([first, second])
    assert torch.equal(bank.rows(None), everything)
    assert torch.equal(bank.rows(torch.tensor([2, 0, 2])), everything[[2, 0, 2]])
    for known in ((0, 1, 2), (1, 2), (2,), (0, 1), (2, 0), (1, 1)):
        assert torch.equal(bank.rows(known), everything[list(known)])
    for known in ((-1,), (-2, -1), (-3, -2, -1), (-1, 0), (-3,)):
        assert torch.equal(bank.rows(known), everything[list(known)])
    for member in range(3):
        assert torch.equal(bank.rows(member), everything[member : member + 1])
        assert torch.equal(bank.row(member - 3), everything[member])
        assert bank.is_learning(member) == bank.is_learning(member - 3) == (member > 0)
    assert (bank.num_members, bank.num_committed) == (3, 1)


@pytest.mark.parametrize("member", [-4, 3])
def test_a_member_that_is_not_there(member: int) -> None:
    with pytest.raises(IndexError, match="the bank holds 3"):
        grown(numbers(2, 3), numbers(1, 3)).row(member)
    with pytest.raises(IndexError, match="the bank holds 3"):
        grown(numbers(2, 3), numbers(1, 3)).rows((member, member + 1))


@pytest.mark.parametrize("member", [0, 2])
def test_a_row_is_a_view_of_the_bank(member: int) -> None:
    bank = grown(numbers(2, 3), numbers(1, 3))
    with torch.no_grad():
        bank.row(member).fill_(7)
    assert bank.table()[member].tolist() == [7, 7, 7]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_moves_only_the_active_rows(kind: str) -> None:
    first, second = numbers(3, 4), numbers(2, 4)
    bank = grown(first, second)
    train(bank, kind)
    assert torch.equal(bank.committed, first)
    assert (bank.table()[3:] != second).all()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_committed_row_stays_where_its_training_left_it(kind: str) -> None:
    bank = Bank(numbers(2, 4), "fast_weights")
    train(bank, kind)
    learnt = bank.table().detach().clone()
    bank.commit()
    assert torch.equal(bank.table(), learnt)
    bank.append(numbers(1, 4))
    train(bank, kind)
    assert torch.equal(bank.table()[:2], learnt)


@pytest.mark.parametrize("implicit_first", [True, False])
def test_many_commits_copy_their_own_rows_and_leave_all_others_to_the_bit(implicit_first: bool) -> None:
    bank = Bank(torch.empty(0, 3), "fast_weights", implicit_first=implicit_first)
    expected, tables, copied = torch.ones(int(implicit_first), 3), [], 0
    for member in range(100):
        rows = numbers(1 + member % 3, 3) + member
        bank.append(rows)
        address = bank.committed.data_ptr()
        bank.commit()
        copied += bank.committed.data_ptr() != address
        expected = torch.cat([expected, rows])
        tables.append((bank.table(), expected))
    # seen from any moment, also through what was handed out before
    assert all(torch.equal(table, then) for table, then in tables)
    assert copied <= 9
    assert torch.equal(bank.state_dict()["committed"], expected[int(implicit_first) :])


@pytest.mark.parametrize("change", ["double", "deepcopy", "load", "pickle"])
def test_room_for_members_is_never_shared(change: str) -> None:
    bank = Bank(numbers(1, 3), "bias")
    for _ in range(4):
        bank.commit()
        bank.append(numbers(1, 3) + 1)
    bank.commit()  # five rows in a room for eight
    if change == "load":
        other = Bank(numbers(1, 3), "bias")
        other.load_state_dict(bank.state_dict())
    elif change == "pickle":
        other = pickle.loads(pickle.dumps(bank))
    else:
        other = copy.deepcopy(bank)
    if change == "double":
        other.double()
    before = bank.table().clone()
    for one, value in ((other, 7.0), (bank, 9.0)):
        one.append(torch.full((1, 3), value))
        one.commit()
    assert torch.equal(other.table(), torch.cat([before, torch.full((1, 3), 7.0)]).to(other.table()))
    assert torch.equal(bank.table(), torch.cat([before, torch.full((1, 3), 9.0)]))


def test_appending_needs_the_earlier_members_committed() -> None:
    with pytest.raises(RuntimeError, match="commit"):
        Bank(numbers(2, 4), "fast_weights").append(numbers(1, 4))


def test_the_bank_keeps_a_copy_of_what_it_is_given() -> None:
    first, second = numbers(1, 4), numbers(1, 4) + 1
    bank = grown(first, second)
    before = bank.table().detach().clone()
    first.zero_()
    second.zero_()
    assert torch.equal(bank.table(), before)


def test_an_implicit_first_member_is_ones_and_not_stored() -> None:
    bank = Bank(torch.empty(0, 4), "fast_weights", implicit_first=True)
    assert bank.num_members == 1
    assert torch.equal(bank.rows(0), torch.ones(1, 4))
    assert sum(tensor.numel() for tensor in bank.state_dict().values()) == 0
    bank.append(numbers(2, 4))
    assert bank.num_members == 3
    assert torch.equal(bank.table(), torch.cat([torch.ones(1, 4), numbers(2, 4)]))
    assert torch.equal(bank.row(2), numbers(2, 4)[1])
    bank.commit()
    assert torch.equal(bank.row(2), numbers(2, 4)[1])


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("implicit_first", [True, False])
def test_a_state_with_other_members_loads(learned: bool, implicit_first: bool) -> None:
    bank = grown(numbers(3, 4), numbers(2, 4), learned=learned, implicit_first=implicit_first)
    other = Bank(numbers(1, 4) - 9, "fast_weights", learned=learned, implicit_first=implicit_first)
    other.load_state_dict(bank.state_dict())
    assert torch.equal(other.table(), bank.table())
    assert other.num_committed == bank.num_committed
    assert len(list(other.parameters())) == (1 if learned else 0)
    bank.commit()
    other.load_state_dict(bank.state_dict())
    assert torch.equal(other.table(), bank.table())
    assert other.active is None


def test_a_state_whose_rows_have_another_length_is_refused() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        Bank(numbers(1, 4), "bias").load_state_dict(Bank(numbers(1, 5), "bias").state_dict())


def test_statistics_are_buffers_and_are_committed_like_parameters() -> None:
    bank = grown(numbers(1, 4), numbers(1, 4), learned=False)
    assert not list(bank.parameters())
    bank.row(1).mul_(2)
    bank.commit()
    assert torch.equal(bank.committed, numbers(1, 4) * torch.tensor([[1.0], [2.0]]))


def test_a_shared_bank_is_found_once() -> None:
    bank = Bank(numbers(1, 2), "bias")
    assert list(banks(nn.ModuleList([bank, nn.Sequential(bank)]))) == [bank]


@given(members=st.integers(0, 5), rows=st.integers(0, 12))
def test_rows_are_laid_out_in_blocks_or_refused(members: int, rows: int) -> None:
    values = torch.arange(members).float().unsqueeze(1)
    if members in (1, rows):
        assert torch.equal(per_row(values, rows, nn.ReLU()), values)
    elif members == 0 or rows % members:
        with pytest.raises(
            ValueError, match=f"ReLU: {rows} rows do not split into {members} members; pass ids"
        ):
            per_row(values, rows, nn.ReLU())
    else:
        expected = [member for member in range(members) for _ in range(rows // members)]
        assert per_row(values, rows, nn.ReLU()).squeeze(1).tolist() == expected


def test_broadcasting_keeps_the_dtype_of_the_activations() -> None:
    x = torch.zeros(2, 3, 4, 5, dtype=torch.bfloat16)
    rows = along(torch.ones(2, 3), x, 1)
    assert (rows.shape, rows.dtype) == ((2, 3, 1, 1), torch.bfloat16)
    assert along(torch.ones(1, 5), x, -1).shape == (1, 1, 1, 5)


def test_starts_of_fast_weights() -> None:
    torch.manual_seed(0)
    signs = fast_weights("random_sign", 10, 1000)
    assert set(signs.unique().tolist()) == {-1, 1}
    assert abs(float(signs.mean())) < 0.05
    gaussian = fast_weights("gaussian", 10, 1000)
    assert float(gaussian.mean()) == pytest.approx(1, abs=0.02)
    assert float(gaussian.std()) == pytest.approx(0.5, abs=0.02)
    assert fast_weights("ones", 2, 3).tolist() == [[1.0] * 3] * 2
    with pytest.raises(ValueError, match="'zeros'; choose from random_sign, gaussian, ones"):
        fast_weights("zeros", 1, 1)
