from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from lifelong_ens.errors import InputError
from lifelong_ens.layers.bank import Bank, banks
from lifelong_ens.networks.batch_ensemble import BatchEnsembleNetwork
from lifelong_ens.networks.plain import Body, mlp, resnet20

POLICIES = ["statistics_only", "per_member", "shared_frozen"]
SIZES = [3, 5, 2]


def small_resnet() -> Body:
    """Two blocks, one with a convolution as its shortcut, a norm that needs its bias, and a hidden linear layer."""
    layers = resnet20(width=4).features
    features = nn.Sequential(
        *layers[:4], layers[6], *layers[-2:], nn.Linear(8, 6), nn.LayerNorm(6), nn.ReLU()
    )
    return Body(features, 6, None)


def images(rows: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def learn(network: BatchEnsembleNetwork, task: int, steps: int = 3) -> None:
    """As a strategy trains it: everything that can move, moves."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.1, momentum=0.9, weight_decay=0.1)
    for index in range(steps):
        optimizer.zero_grad()
        logits = network.member_logits(2 * images(seed=10 * task + index) + task, task)
        logits.square().mean().backward()
        optimizer.step()


def learnt(sizes: list[int] = SIZES, seed: int = 0, **options: Any) -> BatchEnsembleNetwork:
    torch.manual_seed(seed)
    network = BatchEnsembleNetwork(small_resnet(), **{"init": "gaussian", **options})
    for task, size in enumerate(sizes):
        network.begin_task(size)
        network.train()
        learn(network, task)
        network.finish_task()
    return network


OPTIONS: dict[str, dict[str, Any]] = {
    **{
        f"{norm} {members}": {"norm": norm, "members_per_task": members}
        for norm in POLICIES
        for members in (1, 3)
    },
    "shared bias": {"bias": "shared"},
    "first task shared": {"first_task": "shared"},
    "previous": {"init": "previous"},
    "random signs": {"init": "random_sign", "norm": "per_member"},
    "pairs": {"rank": 2, "additive": 1, "members_per_task": 2},
    "pretrained": {"train_on": "pretrained", "norm": "shared_frozen"},
    "fittest": {"init": "fittest"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_past_tasks_do_not_move_to_the_bit(options: dict[str, Any]) -> None:
    network = learnt(SIZES[:1], **options).eval()
    answers = [network.member_logits(images(), 0)]
    for task in (1, 2):
        network.begin_task(SIZES[task])
        network.train()
        learn(network, task)
        network.finish_task()
        network.eval()
        for past, answer in enumerate(answers):
            assert torch.equal(network.member_logits(images(), past), answer)
        answers.append(network.member_logits(images(), task))
    shapes = {len(answer) for answer in answers}
    assert shapes == {options.get("members_per_task", 1)}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_training_on_past_tasks_in_training_mode_moves_nothing_of_theirs(options: dict[str, Any]) -> None:
    network = learnt(SIZES[:2], **options)
    network.begin_task(4)  # no call of train: growing alone must be enough
    answers = [network.eval().member_logits(images(), task) for task in (0, 1)]
    network.train()
    tasks = torch.tensor([0, 1, 2, 2, 1, 2])
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        logits = network.member_logits(images() + 1, tasks)
        logits.masked_fill(logits == -torch.inf, 0).square().mean().backward()
        optimizer.step()
    network.eval()
    for task, answer in enumerate(answers):
        assert torch.equal(network.member_logits(images(), task), answer)


@pytest.mark.parametrize("norm", POLICIES)
def test_growing_freezes_shared_norms_without_a_call_of_train(norm: Any) -> None:
    network = learnt(SIZES[:1], norm=norm).train()
    network.begin_task(2)
    answer = copy.deepcopy(network).eval()(images(), 0)
    learn(network, 1)
    assert torch.equal(network.eval()(images(), 0), answer)


@pytest.mark.parametrize(
    ("norm", "bias"), [(norm, "per_member") for norm in POLICIES] + [("per_member", "shared")]
)
def test_what_trains_after_the_first_task(norm: Any, bias: Any) -> None:
    network = BatchEnsembleNetwork(small_resnet(), norm=norm, bias=bias)
    network.begin_task(3)
    assert all(parameter.requires_grad for parameter in network.parameters())
    network.finish_task()
    network.begin_task(2)
    owners = dict(network.named_modules())
    trained = {name.rpartition(".") for name, one in network.named_parameters() if one.requires_grad}
    components = {getattr(owners[owner], "component", "head") for owner, _, _ in trained}
    assert components == {
        "fast_weights",
        "head",
        *(["bias"] if bias == "per_member" else []),
        *(["norm_affine"] if norm == "per_member" else []),
    }
    for owner, _, _ in trained:
        assert isinstance(owners[owner], Bank) or owner == "heads.1"
    assert all(len(bank.active) == 1 for bank in owners.values() if isinstance(bank, Bank))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_task_learns_something_of_its_own(options: dict[str, Any]) -> None:
    network = learnt(**options).eval()
    features = [network.member_logits(images(), task)[..., :2] for task in range(3)]
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert (features[one] - features[other]).abs().max() > 1e-2


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_mixed_batch_equals_each_task(options: dict[str, Any]) -> None:
    network, x = learnt(**options).eval(), images()
    tasks = torch.tensor([2, 0, 1, 0, 2, 1])
    mixed, members = network(x, tasks), network.member_logits(x, tasks)
    assert mixed.shape == (6, 5)
    for row, task in enumerate(tasks.tolist()):
        size, one = SIZES[task], x[row : row + 1]
        torch.testing.assert_close(mixed[row, :size], network(one, task)[0], rtol=1e-4, atol=1e-5)
        expected = network.member_logits(one, task)[:, 0]
        torch.testing.assert_close(members[:, row, :size], expected, rtol=1e-4, atol=1e-5)
        assert (mixed[row, size:] == -torch.inf).all()
        assert (members[:, row, size:] == -torch.inf).all()


def test_the_answer_is_the_mean_probability_of_the_members() -> None:
    network = learnt(members_per_task=3).eval()
    for task in (1, torch.tensor([2, 0, 1, 0, 2, 1])):
        members = network.member_logits(images(), task)
        assert len(members) == 3
        assert (members[0] - members[1]).nan_to_num(0).abs().max() > 0.01
        torch.testing.assert_close(network(images(), task).exp(), members.softmax(-1).mean(0))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_export_gives_a_plain_network(options: dict[str, Any]) -> None:
    network = learnt(**options).eval()
    count = options.get("members_per_task", 1)
    plain_types = {type(module) for module in small_resnet().modules()} | {nn.Sequential, nn.Linear}
    for task in range(3):
        members = network.member_logits(images(), task)
        for member in range(count):
            plain = network.export_task(task, member)
            assert {type(module) for module in plain.modules()} <= plain_types
            torch.testing.assert_close(plain(images()), members[member], rtol=1e-5, atol=1e-6)


def test_export_stays_on_its_device() -> None:
    plain = learnt().to("meta").export_task(1)
    assert {tensor.device.type for tensor in plain.state_dict().values()} == {"meta"}


def test_export_keeps_the_precision() -> None:
    network = learnt().double().eval()
    x = images().double()
    torch.testing.assert_close(network.export_task(1)(x), network(x, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_saved_state_restores_the_outputs_to_the_bit(options: dict[str, Any]) -> None:
    network = learnt(**options).eval()
    torch.manual_seed(99)
    other = BatchEnsembleNetwork(small_resnet(), **{"init": "gaussian", **options}).regrow(SIZES).eval()
    assert not torch.equal(other(images(), 2), network(images(), 2))
    other.load_state_dict(network.state_dict())
    for task in range(3):
        assert torch.equal(other(images(), task), network(images(), task))
    for grown in (network, other):
        torch.manual_seed(5)
        grown.begin_task(4)
        grown.train()
        learn(grown, 3)
    assert torch.equal(other.eval()(images(), 3), network.eval()(images(), 3))


def test_the_state_of_an_unfinished_task_loads_and_goes_on_training() -> None:
    network = learnt(SIZES[:1])
    network.begin_task(5)
    network.train()
    learn(network, 1)
    other = BatchEnsembleNetwork(small_resnet()).regrow(SIZES[:2])
    other.load_state_dict(network.state_dict())
    for grown in (network, other):
        grown.train()
        learn(grown, 1)
    assert torch.equal(other.eval()(images(), 1), network.eval()(images(), 1))


def test_the_first_task_may_be_the_shared_network_itself() -> None:
    torch.manual_seed(0)
    body = small_resnet().eval()
    network = BatchEnsembleNetwork(body, first_task="shared").eval()
    network.begin_task(3)
    fast = [one for one in network.modules() if isinstance(one, Bank) and one.component == "fast_weights"]
    assert sum(tensor.numel() for bank in fast for tensor in bank.state_dict().values()) == 0
    torch.testing.assert_close(network(images(), 0), network.heads[0](body(images())))
    network.finish_task()
    network.begin_task(3)
    assert all(bank.num_members == 2 and len(bank.committed) == 0 for bank in fast)


def test_previous_starts_where_the_last_task_ended() -> None:
    network = learnt(SIZES[:2], init="previous", norm="per_member")
    network.begin_task(2)
    for bank in network.modules():
        if isinstance(bank, Bank):
            assert torch.equal(bank.row(2), bank.row(1))


def test_other_starts_take_norms_and_biases_of_the_first_task() -> None:
    network = learnt(SIZES[:2], init="random_sign", norm="per_member")
    network.begin_task(2)
    for bank in network.modules():
        if isinstance(bank, Bank) and bank.component == "fast_weights":
            assert set(bank.row(2).tolist()) <= {-1, 1}
        elif isinstance(bank, Bank):
            assert torch.equal(bank.row(2), bank.row(0))
            assert not torch.equal(bank.row(2), bank.row(1))


def test_members_of_a_task_differ_from_the_start() -> None:
    network = BatchEnsembleNetwork(small_resnet(), members_per_task=2)
    for _ in range(2):
        network.begin_task(2)
        network.finish_task()
    for bank in network.modules():
        if isinstance(bank, Bank) and bank.component == "fast_weights" and bank.committed.shape[1] > 5:
            assert not torch.equal(bank.row(2), bank.row(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members_per_task": 0}, "at least 1"),
        ({"members_per_task": 2, "first_task": "shared"}, "holds one member"),
    ],
)
def test_options_that_do_not_go(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BatchEnsembleNetwork(small_resnet(), **options)


def test_a_torchvision_classifier_becomes_a_body() -> None:
    with torch.device("meta"):
        body = torchvision.models.resnet18()
    network = BatchEnsembleNetwork(body)
    network.begin_task(7)
    assert network(torch.zeros(2, 3, 32, 32, device="meta"), 0).shape == (2, 7)


@pytest.mark.parametrize("members", [1, 3])
def test_one_compilation_serves_all_batch_sizes_of_a_task(members: int) -> None:
    network, counter = learnt(SIZES[:2], members_per_task=members).train(), CompileCounter()
    network.begin_task(2)
    torch._dynamo.reset()
    compiled = torch.compile(network.member_logits, backend=counter, fullgraph=True)
    for size in (20, 22, 34):
        x = images(size)
        torch._dynamo.mark_dynamic(x, 0)
        compiled(x, 2)
    torch._dynamo.reset()
    assert counter.frame_count == 1


@pytest.mark.parametrize("members", [1, 3])
def test_what_is_compiled_for_the_second_task_serves_all_later_ones(members: int) -> None:
    network, counter = learnt(SIZES[:1], members_per_task=members), CompileCounter()
    network.body.compile(backend=counter, fullgraph=True)
    torch._dynamo.reset()
    for task, num_classes in enumerate((3, 3, 5, 3), start=1):
        network.begin_task(num_classes)
        network.train().member_logits(images(20), task).square().mean().backward()
        network.finish_task()
        assert counter.frame_count == 1
    torch._dynamo.reset()


def test_previous_copies_member_by_member_so_that_a_tasks_members_stay_different():
    network = BatchEnsembleNetwork(
        mlp(input_shape=(1, 4, 4), hidden=(8,)), init="previous", members_per_task=3
    )
    network.regrow([2, 2])
    for bank in banks(network.body):
        table = bank.table()
        assert torch.equal(table[:3], table[3:])
        if bank.component == "fast_weights":
            assert len(table[:3].unique(dim=0)) == 3
