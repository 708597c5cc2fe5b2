from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lifelong_ens.errors import UnfitNetworkError
from lifelong_ens.networks import task as task_module
from lifelong_ens.networks.plain import mlp, resnet20
from lifelong_ens.networks.task import Columns, Heads, Independent, MultiHead, TaskNetwork

KINDS: dict[str, Callable[[], TaskNetwork]] = {
    "multi_head": lambda: MultiHead(resnet20(width=2)),
    "independent": lambda: Independent(resnet20(width=2)),
}
SIZES = [3, 5, 2]


def grown(kind: str, seed: int = 0) -> TaskNetwork:
    torch.manual_seed(seed)
    return KINDS[kind]().regrow(SIZES).eval()


def images(rows: int = 6) -> Tensor:
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(rows))


def step(network: TaskNetwork, task: int, steps: int = 2) -> None:
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        network(images() + task, task).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_each_task_has_as_many_logits_as_classes(kind: str) -> None:
    network = grown(kind)
    assert network.classes_per_task == SIZES
    assert network.num_tasks == 3
    for task, size in enumerate(SIZES):
        assert network(images(), task).shape == (6, size)
        assert torch.equal(network.member_logits(images(), task)[0], network(images(), task))


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_equals_each_task_padded_with_minus_infinity(kind: str) -> None:
    network, x = grown(kind), images()
    tasks = torch.tensor([2, 0, 1, 0, 2, 1])
    mixed = network(x, tasks)
    assert mixed.shape == (6, 5)
    for row, task in enumerate(tasks.tolist()):
        expected = network(x[row : row + 1], task)[0]
        torch.testing.assert_close(mixed[row, : SIZES[task]], expected, rtol=1e-4, atol=1e-5)
        assert (mixed[row, SIZES[task] :] == -torch.inf).all()
    narrow = network(x, torch.tensor([0, 2, 0, 2, 2, 0]))
    assert narrow.shape == (6, 3)
    assert torch.equal(network(x, torch.full((6,), 1)), network(x, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_state_restores_the_outputs_to_the_bit(kind: str) -> None:
    network = KINDS[kind]()
    for size in SIZES:
        network.begin_task(size)
        network.train()
        step(network, network.num_tasks - 1)
        network.finish_task()
    other = grown(kind, seed=9)
    other.load_state_dict(network.state_dict())
    for task in range(3):
        assert torch.equal(other(images(), task), network.eval()(images(), task))


def test_heads_keep_leading_axes() -> None:
    heads = Heads()
    for size in SIZES:
        heads.add(4, size)
    features, tasks = torch.randn(2, 3, 4), torch.tensor([1, 0, 2])
    mixed = heads(features, tasks)
    assert mixed.shape == (2, 3, 5)
    torch.testing.assert_close(mixed[:, 1, :3], heads[0](features[:, 1]))
    torch.testing.assert_close(mixed[:, 0], heads[1](features[:, 0]))


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
@pytest.mark.parametrize("classes", [[3, 5, 2, 2], [4, 4, 4, 4]])
def test_one_product_for_rows_of_many_heads_equals_one_for_each(leading, classes, monkeypatch) -> None:
    heads = Heads().double()
    for size in classes:
        heads.add(6, size)
    heads.double()
    tasks = torch.tensor([3, 0, 0, 1, 3, 3, 0])
    results = []
    for gathered in (0, 10**9):
        monkeypatch.setattr(task_module, "GATHERED_PER_HEAD", gathered)
        torch.manual_seed(0)
        features = torch.randn(*leading, 7, 6, dtype=torch.float64, requires_grad=True)
        heads.zero_grad()
        logits = heads(features, tasks)
        weights = torch.randn(*logits.shape, dtype=torch.float64)
        (logits.masked_fill(logits.isinf(), 0.0) * weights).sum().backward()
        results.append([logits.detach(), features.grad, *(p.grad for p in heads.parameters())])
    for one, other in zip(*results, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert results[0][0].shape == (*leading, 7, max(classes[i] for i in (0, 1, 3)))


def test_one_body_for_all_tasks_goes_on_training() -> None:
    network = MultiHead(mlp(input_shape=(3, 8, 8), hidden=(8,)))
    network.begin_task(2)
    network.begin_task(2)
    before, old_head = copy.deepcopy(network.body.state_dict()), network.heads[0].weight.clone()
    step(network, 1)
    assert all((tensor != before[name]).any() for name, tensor in network.body.state_dict().items())
    assert torch.equal(network.heads[0].weight, old_head)


@pytest.mark.parametrize("calls_train", [True, False])
def test_independent_networks_leave_earlier_ones_alone(calls_train: bool) -> None:
    network = Independent(resnet20(width=2))
    network.begin_task(3)
    step(network, 0)
    network.finish_task()
    network.begin_task(4)
    if calls_train:
        network.train()
    before = copy.deepcopy([network.columns[0].state_dict(), network.heads[0].state_dict()])
    answers = network.columns[0].eval()(images()).clone()
    if calls_train:
        network.train()
    assert [parameter.requires_grad for parameter in network.columns[0].parameters()].count(True) == 0
    assert all(parameter.requires_grad for parameter in network.columns[1].parameters())
    step(network, 1)
    network(images(), 0)  # in training mode: still no statistic of the first column may move
    for now, then in zip(
        [network.columns[0].state_dict(), network.heads[0].state_dict()], before, strict=True
    ):
        assert all(torch.equal(tensor, then[name]) for name, tensor in now.items())
    assert torch.equal(network.columns[0](images()), answers)


def test_the_first_column_starts_from_the_template_and_later_ones_afresh() -> None:
    template = resnet20(width=2)
    network = Independent(template)
    network.begin_task(2)
    network.begin_task(2)
    first, second = (column.state_dict() for column in network.columns)
    for name, tensor in template.state_dict().items():
        assert torch.equal(first[name], tensor)
        if tensor.dim() > 1:
            assert not torch.equal(second[name], tensor)
    assert not any("template" in name for name in network.state_dict())
    step(network, 1)
    assert all(torch.equal(first[name], tensor) for name, tensor in template.state_dict().items())


def test_only_the_newest_column_is_ever_in_training_mode() -> None:
    columns = Columns()
    for _ in range(3):
        columns.add(nn.Sequential(nn.BatchNorm1d(2)))
        assert [column.training for column in columns] == [False] * (len(columns) - 1) + [True]
    columns.train()
    assert [column[0].training for column in columns] == [False, False, True]
    columns.eval()
    assert not any(column[0].training for column in columns)


def test_an_empty_batch_of_mixed_tasks_is_an_error() -> None:
    with pytest.raises(ValueError, match="no rows"):
        grown("independent")(images(0), torch.empty(0, dtype=torch.int64))


def test_a_method_without_a_plain_form_says_so() -> None:
    class OwnMethod(Independent):
        plain_network = TaskNetwork.plain_network

    network = OwnMethod(resnet20(width=2)).regrow([2])
    with pytest.raises(UnfitNetworkError, match=r"give it a plain_network\(task, member\)"):
        network.export_task(0)
    with pytest.raises(IndexError, match="task 1 does not exist; this network has learnt 1"):
        network.export_task(1)
    with pytest.raises(IndexError, match="member 1 does not exist"):
        network.export_task(0, 1)
