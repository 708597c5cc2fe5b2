"""What every strategy must do, as checks that raise ``ContractError``: call them from the tests of your own.

    from strategies import contract
    from streams import split_digits

    @pytest.mark.parametrize("check", contract.CHECKS)
    def test_contract(check):
        check(lambda fit, seed: mine(contract.conv_net(), fit=fit, seed=seed), split_digits(num_tasks=3))

A check builds as many strategies as it needs and trains them with momentum and weight decay; run all on ``BODIES``, one
of which has BatchNorm: that is how a past that was to stay moves. What is promised, ``frozen_past``, is the network's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Any

import torch
from avalanche.core import SupervisedPlugin
from torch import Tensor, nn

from lifelong_ens.accounting.components import sizes
from lifelong_ens.networks.plain import Body, mlp
from lifelong_ens.training.fit import Fit
from strategies.base import Strategy
from strategies.evaluation import accuracy

# makes a strategy on a fresh body, of which two are equal, from how it is trained and a seed
Build = Callable[[Fit, int], Strategy]

FIT = Fit(epochs=6, batch_size=32, learning_rate=0.05, momentum=0.9, weight_decay=5e-3)
# as many steps as it takes for anything to move that moves
SHORT = replace(FIT, epochs=2)
QUICK = Fit(epochs=1, batch_size=64)
# what an export may not be made of, save where the body is
OURS = ("lifelong_ens", "strategies")


class ContractError(AssertionError):
    """A strategy does not do what every strategy must; the message says what and, if it is known, how to mend it."""


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


def conv_net(num_classes: int | None = None) -> Body:
    """A conv net for digits with BatchNorm and a residual connection inside a nested module, the same every time."""
    torch.manual_seed(0)
    blocks = nn.Sequential(Block(1, 8), Block(8, 12), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return Body(blocks, 48, num_classes)


def small_mlp(num_classes: int | None = None) -> Body:
    """An MLP for digits, the same every time."""
    torch.manual_seed(0)
    return mlp(num_classes, input_shape=(1, 8, 8), hidden=(32, 24))


BODIES: dict[str, Callable[[], Body]] = {"mlp": small_mlp, "conv": conv_net}


def learns_every_task(build: Build, benchmark: Any) -> None:
    """After the last task, at least half of what chance leaves of its test images is answered right."""
    strategy = trained(build(FIT, 0), benchmark)
    learned = accuracy(strategy, [benchmark.test_stream[-1]])
    chance = 1 / strategy.network.classes_per_task[-1]
    _require(
        learned > chance + 0.5 * (1 - chance),
        f"the last task is answered right in {100 * learned:.0f} % of images; chance is {100 * chance:.0f} %",
    )


def past_does_not_move_where_promised(build: Build, benchmark: Any) -> None:
    """With ``frozen_past`` the first task's logits stay the same to the bit; without it they move."""
    strategy = build(SHORT, 0)
    if strategy.joint:  # has no past
        return
    trained(strategy, benchmark, range(1))
    before, state = logits(strategy, benchmark, 0), copy.deepcopy(strategy.network.state_dict())
    trained(strategy, benchmark, range(1, len(benchmark.train_stream)))
    unmoved = torch.equal(before, logits(strategy, benchmark, 0))
    promised = strategy.network.frozen_past
    _require(
        unmoved or not promised,
        "the first task's logits moved, though frozen_past is true: freeze what it uses with requires_grad_(False), "
        "and the running statistics of norms by evaluation mode",
    )
    _require(promised or not unmoved, "the first task's logits never move: set frozen_past = True")
    _require(not _same(state, strategy.network.state_dict()), "later tasks changed nothing in the state")


def state_dict_restores_everything(build: Build, benchmark: Any) -> None:
    """A network that is regrown and loads the state answers every task the same, to the bit."""
    strategy = trained(build(SHORT, 0), benchmark)
    other = build(SHORT, 5)
    other.network.regrow(strategy.network.classes_per_task)
    other.network.load_state_dict(strategy.network.state_dict())
    for task in range(len(benchmark.train_stream)):
        _require(
            torch.equal(logits(strategy, benchmark, task), logits(other, benchmark, task)),
            f"task {task} is answered otherwise after load_state_dict: all that is learnt is a parameter or a buffer",
        )


def goes_on_after_a_task_as_if_never_interrupted(build: Build, benchmark: Any) -> None:
    """A strategy that goes on from the state after the first task ends with the same state, to the bit."""
    whole = build(SHORT, 0)
    if whole.joint:  # has one task
        return
    trained(whole, benchmark)
    first = trained(build(SHORT, 0), benchmark, range(1))
    second = build(SHORT, 0)
    second.network.regrow(first.network.classes_per_task)
    second.network.load_state_dict(first.network.state_dict())
    second.model.tasks.update(first.model.tasks)  # pyright: ignore
    trained(second, benchmark, range(1, len(benchmark.train_stream)))
    _require(
        _same(whole.network.state_dict(), second.network.state_dict()),
        "a run that goes on after its first task ends otherwise: what lives between tasks belongs into the network's "
        "state, and random numbers come from the seed and the task's number",
    )


def same_seed_same_result_another_seed_another(build: Build, benchmark: Any) -> None:
    """Two runs of a seed end with the same state, to the bit; one of another seed does not."""
    states = []
    for seed in (3, 3, 4):
        strategy = trained(build(SHORT, seed), benchmark, range(2))
        states.append(torch.cat([one.flatten() for one in strategy.network.state_dict().values()]).double())
    _require(torch.equal(states[0], states[1]), "two runs of one seed differ")
    _require(not torch.equal(states[0], states[2]), "runs of two seeds are the same")


def plugins_of_steps_change_nothing(build: Build, benchmark: Any) -> None:
    """Through Avalanche's callbacks of every step training is the same as in tight epochs, to the bit."""
    # gradients are clipped and images augmented, as methods may do both by themselves
    fit = Fit(epochs=2, batch_size=32, momentum=0.9, weight_decay=5e-3, clip_norm=1.0, augment="flip")
    tight, called = build(fit, 0), build(fit, 0)
    called.plugins.append(_LooksAtSteps())
    states = [trained(one, benchmark, range(2)).network.state_dict() for one in (tight, called)]
    _require(_same(*states), "with a plugin that looks at steps training ends otherwise")


def caller_s_generator_is_left_alone(build: Build, benchmark: Any) -> None:
    """What torch draws after training is what it would have drawn before."""
    strategy = build(SHORT, 0)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    trained(strategy, benchmark, range(1))
    _require(torch.equal(torch.rand(3), expected), "training moves torch's global generator")


def evaluating_unseen_tasks_changes_nothing(build: Build, benchmark: Any) -> None:
    """Avalanche's ``eval`` over the whole stream after the first task leaves state and number of tasks as they are."""
    strategy = build(SHORT, 0)
    if strategy.joint:  # sees all tasks
        return
    trained(strategy, benchmark, range(1))
    before = copy.deepcopy(strategy.network.state_dict())
    results = strategy.eval(benchmark.test_stream)
    _require(results == {}, "evaluation without metrics returned some")
    _require(_same(before, strategy.network.state_dict()), "evaluation changes the state")
    _require(strategy.network.num_tasks == 1, "evaluation adds tasks")


def a_task_is_exported_as_a_plain_network(build: Build, benchmark: Any) -> None:
    """``export_task`` answers as the network does, is made of torch's layers and the body's, and shares nothing.

    Layers of your own may be in it; of ours only what is in ``BODIES``.
    """
    strategy = trained(build(QUICK, 0), benchmark)
    network = strategy.network.eval()
    own = {type(module) for body in BODIES.values() for module in body().modules()}
    for task in range(len(benchmark.train_stream)):
        x = images(benchmark, task)
        with torch.no_grad():
            expected, members = network(x, task), network.member_logits(x, task)
            exported = network.export_task(task)
            _require(not exported.training, "export_task gives a network in training mode")
            _answers_as(exported(x), expected, f"export_task({task})")
            for member in range(network.members_per_task):
                alone = network.export_task(task, member)
                _answers_as(alone(x), members[member], f"export_task({task}, {member})")
                for module in alone.modules():
                    _check_plain(module, own)
            for tensor in (*exported.parameters(), *exported.buffers()):
                tensor += 1
            _require(torch.equal(network(x, task), expected), "what export_task gives shares numbers")
    network.double()
    x = images(benchmark, 0).double()
    with torch.no_grad():
        same = torch.allclose(network.export_task(0)(x), network(x, 0), rtol=1e-12, atol=1e-12)
    _require(same, "in float64 export_task answers otherwise")
    try:
        network.export_task(network.num_tasks)
    except IndexError as error:
        _require(f"task {network.num_tasks} does not exist" in str(error), f"IndexError says {error}")
    else:
        raise ContractError("export_task gives a task that does not exist")


def _check_plain(module: nn.Module, own: Collection[type[nn.Module]]) -> None:
    name = type(module).__name__
    ours = type(module).__module__.partition(".")[0] in OURS
    _require(type(module) in own or not ours, f"export_task keeps a {name}, which is no plain module")
    hooks = module._forward_hooks or module._forward_pre_hooks
    _require(not hooks, f"export_task keeps hooks of a {name}")


def autocast_keeps_bfloat16_between_all_layers(build: Build, benchmark: Any, mixed: bool = False) -> None:
    """Under autocast no layer takes bfloat16 and gives float32, of one task or with ``mixed`` of rows of two."""
    network = build(SHORT, 0).network.regrow([3, 4]).eval()
    seen: list[str] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        came = [one.dtype for one in inputs if isinstance(one, Tensor) and one.is_floating_point()]
        if torch.bfloat16 in came and isinstance(output, Tensor):
            seen.append(type(module).__name__)
            name = type(module).__name__
            _require(output.dtype == torch.bfloat16, f"{name} turns bfloat16 into {output.dtype}")

    for module in network.modules():
        module.register_forward_hook(note)
    x = images(benchmark, 0)[:6]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        answer = network(x, torch.tensor([0, 1, 1, 0, 1, 0]) if mixed else 1)
    # logarithms of means over members are taken in float32
    kept = answer.dtype == torch.bfloat16 or network.members_per_task > 1
    _require(kept and len(seen) > 2, f"logits are {answer.dtype}, and {len(seen)} layers saw bfloat16")


def rows_of_several_tasks_get_their_own_answers(build: Build, benchmark: Any) -> None:
    """In a batch of several tasks every row is answered as its task answers alone, with -inf behind fewer classes."""
    network = build(SHORT, 0).network.regrow([3, 4, 2]).eval()
    x, task = images(benchmark, 0)[:12], torch.tensor([0, 2, 1, 1, 0, 2, 2, 0, 1, 1, 0, 2])
    with torch.no_grad():
        mixed = network(x, task)
        for row, one in enumerate(task.tolist()):
            alone = network(x[row : row + 1], one)[0]
            _answers_as(mixed[row, : len(alone)], alone, f"a row of task {one} among others", 1e-5)
            beyond = bool((mixed[row, len(alone) :] == -torch.inf).all())
            _require(beyond, "logits behind a task's last class are not -inf in a batch of several tasks")


CHECKS: tuple[Callable[[Build, Any], None], ...] = (
    learns_every_task,
    past_does_not_move_where_promised,
    state_dict_restores_everything,
    goes_on_after_a_task_as_if_never_interrupted,
    same_seed_same_result_another_seed_another,
    plugins_of_steps_change_nothing,
    caller_s_generator_is_left_alone,
    evaluating_unseen_tasks_changes_nothing,
    a_task_is_exported_as_a_plain_network,
    autocast_keeps_bfloat16_between_all_layers,
    rows_of_several_tasks_get_their_own_answers,
)


def num_parameters(build: Build, benchmark: Any) -> tuple[int, list[int]]:
    """Learned numbers after the last task, as the ledger counts them, and every task's classes: for a closed form."""
    network = trained(build(QUICK, 0), benchmark).network
    return sum(size.parameters for size in sizes(network).values()), network.classes_per_task


def trained(strategy: Strategy, benchmark: Any, tasks: Iterable[int] | None = None) -> Strategy:
    """The strategy itself, trained on some tasks of the stream; None for all."""
    if strategy.joint:
        strategy.train(benchmark.train_stream)
    else:
        for task in range(len(benchmark.train_stream)) if tasks is None else tasks:
            strategy.train(benchmark.train_stream[task])
    return strategy


def images(benchmark: Any, task: int) -> Tensor:
    """60 test images of a task, ``(60, C, H, W)``."""
    return benchmark.test_stream[task].dataset.batch(torch.arange(60))[0]


def logits(strategy: Strategy, benchmark: Any, task: int) -> Tensor:
    """Logits of a task's test images, in evaluation mode, ``(60, classes)``."""
    network = strategy.network.eval()
    with torch.no_grad():
        return network(images(benchmark, task), task)


class _LooksAtSteps(SupervisedPlugin):
    """Makes training go through Avalanche's callbacks."""

    def after_training_iteration(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self.seen = True


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ContractError(otherwise)


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def _answers_as(found: Tensor, expected: Tensor, what: str, tolerance: float = 1e-6) -> None:
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    # not a quotient: what a task answers that has not been trained may be all zeros
    _require(
        difference <= tolerance * largest, f"{what} answers otherwise, by {difference:.1e} of {largest:.1e}"
    )
