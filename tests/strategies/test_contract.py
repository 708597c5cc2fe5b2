"""One suite for all strategies: what each must do, on networks with BatchNorm, momentum and weight decay."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from avalanche.core import SupervisedPlugin
from torch import Tensor, nn

import strategies
from experiments.examination import Examination
from lifelong_ens.accounting.components import Size, sizes
from lifelong_ens.errors import InputError
from lifelong_ens.networks.plain import Body, mlp
from lifelong_ens.training.fit import Fit
from strategies import (
    agem,
    batch_ensemble_lifelong,
    bn_tuned,
    den,
    ewc,
    finetune,
    gem,
    independent,
    joint,
    lwf,
    packnet,
    pnn,
    rcl,
    replay,
    structured_ensemble,
    supsup,
    synaptic_intelligence,
)
from strategies.base import Strategy
from strategies.evaluation import accuracy
from streams import split_digits

FIT = Fit(epochs=6, batch_size=32, learning_rate=0.05, momentum=0.9, weight_decay=5e-3)
TASKS = 3


@dataclass(frozen=True)
class Spec:
    """What is promised of one strategy."""

    build: Callable[..., Strategy]
    frozen_past: bool
    parameters: Callable[[int, int, list[int]], int]
    """Closed form from body size, fast weights of one task, and the heads' classes."""
    options: dict[str, Any] | None = None
    bodies: tuple[str, ...] = ("mlp", "conv")
    """What it runs on; on the others it says why not."""
    freezes: bool | None = None
    """Whether the optimizer leaves something out, where that does not follow from ``frozen_past``."""
    mask_bytes: Callable[[str, int], int] | None = None
    """Closed form of its masks' bytes from the body's name and the number of tasks, where it has masks."""
    buffer_bytes: Callable[[dict[str, int], int], int] = lambda c, tasks: 0
    """Closed form of what it keeps of the past, from the body's size and the number of tasks."""


def conv_net(num_classes: int | None = None) -> Body:
    """A conv net with BatchNorm and a residual connection inside a nested module."""
    torch.manual_seed(0)
    return Body(
        nn.Sequential(Block(1, 8), Block(8, 12), nn.AdaptiveAvgPool2d(2), nn.Flatten()), 48, num_classes
    )


class Block(nn.Module):
    """Conv, BatchNorm, ReLU, conv around a shortcut."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Same height and width."""
        return torch.relu(self.conv2(torch.relu(self.bn1(self.conv1(x)))) + self.shortcut(x))


def small_mlp(num_classes: int | None = None) -> Body:
    """An MLP for digits."""
    torch.manual_seed(0)
    return mlp(num_classes, input_shape=(1, 8, 8), hidden=(32, 24))


class LooksAtSteps(SupervisedPlugin):
    """Makes training go through Avalanche's callbacks."""

    def after_training_iteration(self, strategy, *args, **kwargs) -> None:
        self.seen = True


BODIES = {"mlp": small_mlp, "conv": conv_net}
# learned numbers: bodies, one task's fast weights, one added pair, one task's biases, affine norms; features
COUNTS = {
    "mlp": {
        "added": (64 + 32) + (32 + 24),
        "body": 64 * 32 + 32 + 32 * 24 + 24,
        "fast": 64 + 32 + 32 + 24,
        "bias": 56,
        "affine": 0,
        "features": 24,
    },
    "conv": {
        "added": (9 + 8) + (72 + 8) + (1 + 8) + (72 + 12) + (108 + 12) + (8 + 12),
        "body": (72 + 16 + 584 + 16) + (864 + 24 + 1308 + 108),
        "fast": (9 + 16 + 9) + (20 + 24 + 20),
        "bias": 16 + 24,
        "affine": 16 + 24,
        "features": 48,
    },
}


def heads(c: dict[str, int], classes: list[int]) -> int:
    return sum((c["features"] + 1) * k for k in classes)


def pnn_laterals(body: str, classes: list[int]) -> int:
    """Column k adds k weights for every one of its layers after the first, and of its head; none for biases."""
    layers = {"mlp": 32 * 24, "conv": 576 + 8 + 864 + 1296 + 96}[body]
    return sum(k * (layers + COUNTS[body]["features"] * c) for k, c in enumerate(classes))


def packed_bytes(body: str) -> int:
    """Bytes of one bit for every weight, each layer rounded up to whole bytes."""
    layers = {"mlp": (64 * 32, 32 * 24), "conv": (72, 576, 8, 864, 1296, 96)}[body]
    return sum(math.ceil(weights / 8) for weights in layers)


def unit_bytes(body: str) -> int:
    """Bytes of one bit for every unit, each layer rounded up to whole bytes."""
    return sum(math.ceil(units / 8) for units in {"mlp": (32, 24), "conv": (8, 8, 8, 12, 12, 12)}[body])


def remembered_bytes(memory: int) -> Callable[[dict[str, int], int], int]:
    """Grey 8x8 images as bytes, their label and task, and each task's mean and standard deviation."""
    return lambda c, tasks: memory * (64 + 4 + 4) + tasks * 8


SPECS: dict[str, Spec] = {
    "finetune": Spec(finetune, False, lambda b, c, k: c["body"] + heads(c, k)),
    "joint": Spec(joint, False, lambda b, c, k: c["body"] + heads(c, k)),
    "independent": Spec(independent, True, lambda b, c, k: len(k) * c["body"] + heads(c, k)),
    "batch_ensemble": Spec(
        batch_ensemble_lifelong,
        True,
        lambda b, c, k: c["body"] + len(k) * c["fast"] + (len(k) - 1) * c["bias"] + heads(c, k),
    ),
    "pnn": Spec(pnn, True, lambda b, c, k: len(k) * c["body"] + pnn_laterals(b, k) + heads(c, k)),
    "bn_tuned": Spec(
        bn_tuned,
        True,
        lambda b, c, k: c["body"] + (len(k) - 1) * c["affine"] + heads(c, k),
        bodies=("conv",),
    ),
    "packnet": Spec(
        packnet,
        True,
        lambda b, c, k: c["body"] + heads(c, k),
        mask_bytes=lambda b, tasks: packed_bytes(b) * tasks.bit_length(),
    ),
    "supsup": Spec(
        supsup,
        True,
        lambda b, c, k: c["body"] + heads(c, k),
        mask_bytes=lambda b, tasks: packed_bytes(b) * tasks,
    ),
    "structured_ensemble": Spec(
        structured_ensemble,
        True,
        lambda b, c, k: c["body"] + (len(k) - 1) * c["affine"] + heads(c, k),
        {"mask_epochs": 2},
        mask_bytes=lambda b, tasks: unit_bytes(b) * tasks,
    ),
    "rcl": Spec(rcl, True, lambda b, c, k: -1, {"trials": 2, "max_units": 4}),
    "ewc": Spec(
        ewc,
        False,
        lambda b, c, k: c["body"] + heads(c, k),
        {"fisher_images": 100},
        buffer_bytes=lambda c, tasks: 2 * 4 * c["body"],
    ),
    "synaptic_intelligence": Spec(
        synaptic_intelligence,
        False,
        lambda b, c, k: c["body"] + heads(c, k),
        buffer_bytes=lambda c, tasks: 4 * c["body"],
    ),
    "lwf": Spec(lwf, False, lambda b, c, k: c["body"] + heads(c, k)),
    "replay": Spec(
        replay, False, lambda b, c, k: c["body"] + heads(c, k), buffer_bytes=remembered_bytes(500)
    ),
    "agem": Spec(
        agem,
        False,
        lambda b, c, k: c["body"] + heads(c, k),
        {"memory": 50, "reference_rows": 20},
        buffer_bytes=remembered_bytes(50),
    ),
    "gem": Spec(
        gem,
        False,
        lambda b, c, k: c["body"] + heads(c, k),
        {"memory": 50},
        buffer_bytes=remembered_bytes(50),
    ),
    "den": Spec(den, False, lambda b, c, k: -1, freezes=True),
}
VARIANTS: dict[str, Spec] = {
    "ewc-online": Spec(
        ewc,
        False,
        lambda b, c, k: c["body"] + heads(c, k),
        {"fisher_images": 100, "fisher_decay": 0.9},
        buffer_bytes=lambda c, tasks: 4 * c["body"],
    ),
    "batch_ensemble-per_member": Spec(
        batch_ensemble_lifelong,
        True,
        lambda b, c, k: (
            c["body"] + len(k) * c["fast"] + (len(k) - 1) * (c["bias"] + c["affine"]) + heads(c, k)
        ),
        {"norm": "per_member", "init": "gaussian"},
    ),
    "batch_ensemble-shared": Spec(
        batch_ensemble_lifelong,
        True,
        lambda b, c, k: c["body"] + (len(k) - 1) * c["fast"] + heads(c, k),
        {"norm": "shared_frozen", "bias": "shared", "init": "previous", "first_task": "shared"},
    ),
    "batch_ensemble-three_members": Spec(
        batch_ensemble_lifelong,
        True,
        lambda b, c, k: c["body"] + 3 * len(k) * c["fast"] + (3 * len(k) - 1) * c["bias"] + heads(c, k),
        {"members_per_task": 3},
    ),
    "batch_ensemble-pretrained": Spec(
        batch_ensemble_lifelong,
        True,
        lambda b, c, k: (
            c["body"] + len(k) * c["fast"] + (len(k) - 1) * (c["bias"] + c["affine"]) + heads(c, k)
        ),
        {"train_on": "pretrained", "norm": "per_member", "init": "ones"},
    ),
    "batch_ensemble-rank_2": Spec(
        batch_ensemble_lifelong,
        True,
        lambda b, c, k: c["body"] + 2 * len(k) * c["fast"] + (len(k) - 1) * c["bias"] + heads(c, k),
        {"rank": 2, "init": "ones"},
    ),
    "batch_ensemble-additive_2": Spec(
        batch_ensemble_lifelong,
        True,
        lambda b, c, k: c["body"] + (len(k) - 1) * (c["fast"] + 2 * c["added"] + c["bias"]) + heads(c, k),
        {"additive": 2, "init": "ones", "first_task": "shared"},
    ),
    "batch_ensemble-fittest": Spec(
        batch_ensemble_lifelong,
        True,
        lambda b, c, k: c["body"] + len(k) * c["fast"] + (len(k) - 1) * c["bias"] + heads(c, k),
        {"init": "fittest", "first_epochs": 8},
    ),
    "structured_ensemble-soft_global": Spec(
        structured_ensemble,
        True,
        lambda b, c, k: c["body"] + (len(k) - 1) * c["affine"] + heads(c, k),
        {"mask_epochs": 1, "pruning": "soft", "scope": "global", "quantile": 0.6},
    ),
    "structured_ensemble-three_members": Spec(
        structured_ensemble,
        True,
        lambda b, c, k: c["body"] + (3 * len(k) - 1) * c["affine"] + heads(c, k),
        {"mask_epochs": 2, "members_per_task": 3},
        mask_bytes=lambda b, tasks: unit_bytes(b) * tasks * 3,
    ),
    "structured_ensemble-grow": Spec(
        structured_ensemble,
        True,
        lambda b, c, k: -1,
        {"mask_epochs": 1, "grow": 0.6},
    ),
    "bn_tuned-previous": Spec(
        bn_tuned,
        True,
        lambda b, c, k: c["body"] + (len(k) - 1) * c["affine"] + heads(c, k),
        {"start": "previous"},
        bodies=("conv",),
    ),
    "packnet-paper": Spec(
        packnet,
        True,
        lambda b, c, k: c["body"] + heads(c, k),
        {"norm": "shared_frozen", "prune": 0.5, "free_weights": "zero"},
        mask_bytes=lambda b, tasks: packed_bytes(b) * tasks.bit_length(),
    ),
    "packnet-per_member": Spec(
        packnet,
        True,
        lambda b, c, k: c["body"] + (len(k) - 1) * (c["bias"] + c["affine"]) + heads(c, k),
        {"norm": "per_member", "bias": "per_member"},
        mask_bytes=lambda b, tasks: packed_bytes(b) * tasks.bit_length(),
    ),
    "supsup-per_member": Spec(
        supsup,
        True,
        lambda b, c, k: c["body"] + (len(k) - 1) * (c["bias"] + c["affine"]) + heads(c, k),
        {"norm": "per_member", "bias": "per_member", "score_learning_rate": 0.1, "density": 0.3},
        mask_bytes=lambda b, tasks: packed_bytes(b) * tasks,
    ),
    "rcl-released_code": Spec(rcl, True, lambda b, c, k: -1, {"preset": "released_code", "trials": 2}),
    "den-released_code": Spec(
        den, False, lambda b, c, k: -1, {"preset": "released_code", "units": 2, "max_split": 3}, freezes=True
    ),
    "pnn-adapter": Spec(pnn, True, lambda b, c, k: -1, {"laterals": "adapter", "adapter_width": 4}),
}
ALL = {**SPECS, **VARIANTS}


@pytest.fixture(scope="module")
def benchmark():
    return split_digits(num_tasks=TASKS, seed=0)


@pytest.fixture(params=ALL)
def spec(request) -> Spec:
    return ALL[request.param]


@pytest.fixture(params=BODIES)
def body(request) -> str:
    return request.param


def make(spec: Spec, body: str, fit: Fit = FIT, seed: int = 0) -> Strategy:
    if body not in spec.bodies:
        with pytest.raises(InputError, match="use a network"):
            spec.build(BODIES[body](), **(spec.options or {}))
        pytest.skip(f"not on {body}, and it says so")
    return spec.build(BODIES[body](), fit=fit, seed=seed, **(spec.options or {}))


def train(strategy: Strategy, benchmark, tasks: range) -> None:
    if strategy.joint:
        strategy.train(benchmark.train_stream)
    else:
        for task in tasks:
            strategy.train(benchmark.train_stream[task])


def logits(strategy: Strategy, benchmark, task: int) -> Tensor:
    """Logits of a task's test images, in evaluation mode."""
    x, _, _ = benchmark.test_stream[task].dataset.batch(torch.arange(60))
    network = strategy.network.eval()
    with torch.no_grad():
        return network(x, task)


def test_every_exported_builder_has_a_spec():
    assert set(SPECS) == set(strategies.BUILDERS)


def test_learns_every_task(spec, body, benchmark):
    strategy = make(spec, body)
    train(strategy, benchmark, range(TASKS))
    learned = accuracy(strategy, [benchmark.test_stream[TASKS - 1]])
    chance = 1 / strategy.network.classes_per_task[-1]
    assert learned > chance + 0.5 * (1 - chance)


def test_past_tasks_do_not_move_to_the_bit_where_promised(spec, body, benchmark):
    strategy = make(spec, body)
    if strategy.joint:
        pytest.skip("joint training has no past")
    train(strategy, benchmark, range(1))
    before = logits(strategy, benchmark, 0)
    state = copy.deepcopy(strategy.network.state_dict())
    train(strategy, benchmark, range(1, TASKS))
    unmoved = torch.equal(before, logits(strategy, benchmark, 0))
    assert unmoved == spec.frozen_past == strategy.network.frozen_past
    assert not all(
        name in state and torch.equal(tensor, state[name])
        for name, tensor in strategy.network.state_dict().items()
    )


def test_state_dict_restores_everything(spec, body, benchmark):
    strategy = make(spec, body)
    train(strategy, benchmark, range(TASKS))
    other = make(spec, body, seed=5)
    other.network.regrow(strategy.network.classes_per_task)
    other.network.load_state_dict(strategy.network.state_dict())
    for task in range(TASKS):
        assert torch.equal(logits(strategy, benchmark, task), logits(other, benchmark, task))


def test_goes_on_after_a_task_as_if_never_interrupted(spec, body, benchmark):
    whole = make(spec, body)
    if whole.joint:
        pytest.skip("joint training has one task")
    train(whole, benchmark, range(TASKS))
    first = make(spec, body)
    train(first, benchmark, range(1))
    second = make(spec, body)
    second.network.regrow(first.network.classes_per_task)
    second.network.load_state_dict(first.network.state_dict())
    second.model.tasks.update(first.model.tasks)
    train(second, benchmark, range(1, TASKS))
    expected, found = whole.network.state_dict(), second.network.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_same_seed_same_result_another_seed_another(spec, benchmark):
    states = []
    for seed in (3, 3, 4):
        strategy = make(spec, "conv", seed=seed)
        train(strategy, benchmark, range(2))
        states.append(torch.cat([p.flatten() for p in strategy.network.state_dict().values()]).double())
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_tight_epochs_and_callbacks_train_the_same_to_the_bit(spec, benchmark):
    # a body with BatchNorm; gradients are clipped and images augmented, as methods may do both by themselves
    fit = Fit(epochs=2, batch_size=32, momentum=0.9, weight_decay=5e-3, clip_norm=1.0, augment="flip")
    states = []
    for plugins in ([], [LooksAtSteps()]):
        strategy = spec.build(conv_net(), fit=fit, plugins=plugins, **(spec.options or {}))
        train(strategy, benchmark, range(2))
        states.append(strategy.network.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (ewc, {"ewc_lambda": 0.0}),
        (synaptic_intelligence, {"si_lambda": 0.0}),
        (lwf, {"lwf_lambda": 0.0}),
        (replay, {"memory": 0}),
        (agem, {"memory": 0}),
        (gem, {"memory": 0}),
    ],
)
def test_without_its_strength_it_is_finetune_to_the_bit(build, options, benchmark):
    fit = Fit(epochs=2, batch_size=32, momentum=0.9, weight_decay=5e-3, clip_norm=1.0)
    plain, without = (
        builder(conv_net(), fit=fit, **more) for builder, more in ((finetune, {}), (build, options))
    )
    for strategy in (plain, without):
        train(strategy, benchmark, range(TASKS))
    found = without.network.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in plain.network.state_dict().items())


def test_caller_s_generator_is_left_alone(spec, benchmark):
    strategy = make(spec, spec.bodies[0])
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    train(strategy, benchmark, range(1))
    assert torch.equal(torch.rand(3), expected)


def test_evaluating_unseen_tasks_changes_nothing(spec, body, benchmark):
    strategy = make(spec, body)
    if strategy.joint:
        pytest.skip("joint training sees all tasks")
    train(strategy, benchmark, range(1))
    before = copy.deepcopy(strategy.network.state_dict())
    results = strategy.eval(benchmark.test_stream)
    assert results == {}
    after = strategy.network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert strategy.network.num_tasks == 1


def test_a_task_is_exported_as_a_plain_network(spec, body, benchmark):
    strategy = make(spec, body, fit=Fit(epochs=1, batch_size=64))
    train(strategy, benchmark, range(TASKS))
    network = strategy.network.eval()
    own = {type(module) for module in BODIES[body]().modules()}
    for task in range(TASKS):
        x, _, _ = benchmark.test_stream[task].dataset.batch(torch.arange(60))
        with torch.no_grad():
            expected, members = network(x, task), network.member_logits(x, task)
            exported = network.export_task(task)
            assert not exported.training
            assert relative(exported(x), expected) < 1e-6
            for member in range(network.members_per_task):
                alone = network.export_task(task, member)
                assert relative(alone(x), members[member]) < 1e-6
                for module in alone.modules():
                    assert type(module) in own or type(module).__module__.startswith("torch."), type(module)
                    assert not module._forward_hooks
                    assert not module._forward_pre_hooks
            for tensor in (*exported.parameters(), *exported.buffers()):
                tensor += 1
            assert torch.equal(network(x, task), expected)
    network.double()
    with torch.no_grad():
        torch.testing.assert_close(
            network.export_task(0)(x.double()), network(x.double(), 0), rtol=1e-12, atol=1e-12
        )
    with pytest.raises(IndexError, match=f"task {TASKS} does not exist"):
        network.export_task(TASKS)


@pytest.mark.parametrize("mixed", [False, True], ids=["one task", "mixed rows"])
def test_autocast_keeps_bfloat16_between_all_layers(spec, body, mixed):
    network = make(spec, body).network.regrow([3, 4]).eval()
    seen: list[str] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        came = [one.dtype for one in inputs if isinstance(one, Tensor) and one.is_floating_point()]
        if torch.bfloat16 in came and isinstance(output, Tensor):
            seen.append(type(module).__name__)
            assert output.dtype == torch.bfloat16, type(module)

    for module in network.modules():
        module.register_forward_hook(note)
    x = torch.randn(6, 1, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = network(x, torch.tensor([0, 1, 1, 0, 1, 0]) if mixed else 1)
    assert (
        logits.dtype == torch.bfloat16 or network.members_per_task > 1
    )  # logarithms of means are taken in float32
    assert len(seen) > 2


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    return float((found - expected).abs().max() / expected.abs().max())


def test_asking_the_new_task_alone_gives_the_same_rows_as_asking_all(spec, body, benchmark):
    strategy = make(spec, body, fit=Fit(epochs=1, batch_size=64))
    new, every = (Examination(benchmark.test_stream, "entropy", evaluate) for evaluate in ("new", "all"))
    if not spec.frozen_past:
        assert new.mode(strategy) == "all"
        return
    for task in range(TASKS):
        train(strategy, benchmark, range(task, task + 1))
        rows = [one.examine(strategy, range(task + 1), last=False) for one in (new, every)]
        # floats of both, to the bit
        assert rows[0] == rows[1]
        assert list(rows[0].accuracy) == list(range(task + 1))
    resumed = Examination(benchmark.test_stream, "entropy")
    assert resumed.examine(strategy, range(TASKS), last=True) == rows[1]


def test_cost_equals_closed_form(spec, body, benchmark):
    strategy = make(spec, body, fit=Fit(epochs=1, batch_size=64))
    train(strategy, benchmark, range(TASKS))
    classes = strategy.network.classes_per_task
    expected = spec.parameters(body, COUNTS[body], classes)
    if expected < 0:
        pytest.skip("its closed form is tested with its network")
    found = sizes(strategy.network)
    assert sum(size.parameters for size in found.values()) == expected
    if spec.mask_bytes is not None:
        assert found["mask"].bytes == spec.mask_bytes(body, TASKS)
    assert found.get("buffer", Size()).bytes == spec.buffer_bytes(COUNTS[body], TASKS)


def test_frozen_parameters_are_not_in_the_optimizer(spec, body, benchmark):
    strategy = make(spec, body, fit=Fit(epochs=1, batch_size=64))
    train(strategy, benchmark, range(TASKS))
    optimised = sum(p.numel() for group in strategy.optimizer.param_groups for p in group["params"])
    total = sum(size.parameters for size in sizes(strategy.network).values())
    assert (optimised < total) == (spec.frozen_past if spec.freezes is None else spec.freezes)
