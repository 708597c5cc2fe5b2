"""The training loop: the same work, counted in steps and rows, through ours, a bare one and Avalanche's.

Five tasks of real 28x28 grey images are trained with a multilayer perceptron and LeNet-5 (two convolutions).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from avalanche.benchmarks import nc_benchmark, tensors_benchmark
from avalanche.core import SupervisedPlugin
from avalanche.training.supervised import Naive
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torchvision.datasets import MNIST
from torchvision.transforms import Compose, Normalize, ToTensor

from experiments.bench.measuring import Call, Goal, Race
from lifelong_ens.errors import InputError
from lifelong_ens.networks.plain import Body, lenet5, mlp
from lifelong_ens.training.data import ImageData
from lifelong_ens.training.fit import Fit
from strategies.base import Strategy
from strategies.baselines import finetune
from streams.benchmark import make_benchmark

NUM_TASKS, NUM_CLASSES, IMAGE_SIZE = 5, 10, 28
LEARNING_RATE, MOMENTUM = 0.01, 0.9
# so that a measurement takes more than a tenth of a second
EPOCHS = {"mlp": 16, "lenet5": 8}
OURS, HOOKS, BARE = "finetune", "finetune, with a plugin that sees iterations", "a bare PyTorch loop"
TENSORS, STOCK = "Avalanche's Naive over tensors", "Avalanche's Naive on its stock stream"
# ours, against whom, and the bound for each network
GOALS: tuple[tuple[str, str, Literal["<=", ">="], dict[str, float]], ...] = (
    (OURS, BARE, "<=", {"mlp": 1.05, "lenet5": 1.05}),
    (HOOKS, BARE, "<=", {"mlp": 1.10, "lenet5": 1.10}),
    (OURS, STOCK, ">=", {"mlp": 8.0, "lenet5": 1.7}),
    (OURS, TENSORS, ">=", {"mlp": 2.3, "lenet5": 1.1}),
)

Train = Callable[[int], object]
BuildVariant = Callable[["Case", list[ImageData], "Work"], Train]


@dataclass(frozen=True)
class Case:
    """What all variants train alike."""

    network: str
    batch_size: int
    epochs: int

    def body(self, num_classes: int | None) -> Body:
        """A fresh network; without its classifier where ``num_classes`` is None."""
        if self.network == "mlp":
            return mlp(num_classes, input_shape=(1, IMAGE_SIZE, IMAGE_SIZE), hidden=(256,))
        return lenet5(num_classes, input_shape=(1, IMAGE_SIZE, IMAGE_SIZE))

    def work(self, images: int) -> tuple[int, int]:
        """Optimizer steps and rows of one task."""
        return self.epochs * -(-images // self.batch_size), self.epochs * images


def loop(
    device: torch.device,
    *,
    images: int = 1024,
    epochs: int | None = None,
    batch_sizes: tuple[int, ...] = (64, 256),
    root: str | None = None,
) -> Iterator[Race]:
    """Training five tasks one after the other, against a bare PyTorch loop and Avalanche's Naive on two streams.

    Args:
        device: The CPU.
        images: Images per task.
        epochs: Per task; if not given 16 for the MLP and 8 for LeNet-5.
        batch_sizes: Images per step.
        root: Folder with torchvision's MNIST/raw/ in it; scikit-learn's digits enlarged to 28x28 if not given.
    """
    if epochs is not None and epochs < 1:
        raise InputError(f"epochs is at least 1, not {epochs}.")
    tasks, source = _tasks(images, root)
    for network, usual in EPOCHS.items():
        for size in batch_sizes:
            case = Case(network, size, epochs or usual)
            yield Race(
                f"{network}, batch {size}, {images} {source} a task",
                {
                    name: functools.partial(_contestant, build, case, tasks)
                    for name, build in VARIANTS.items()
                },
                tuple(
                    Goal(against, sign, bounds[network], ours=ours) for ours, against, sign, bounds in GOALS
                ),
            )


def _tasks(images: int, root: str | None) -> tuple[list[ImageData], str]:
    """The same number of images of all ten digits for every task, and where they come from."""
    from streams.digits import split_digits
    from streams.mnist import split_mnist

    if root is None:
        source, benchmark = "digits", split_digits(num_tasks=1, image_size=IMAGE_SIZE)
    else:
        source, benchmark = "images of MNIST", split_mnist(root=root, num_tasks=1)
    pool: ImageData = benchmark.train_stream[0].dataset.image_data  # pyright: ignore
    if not 1 <= images <= len(pool):
        raise InputError(f"images is between 1 and {len(pool)}, not {images}; MNIST, with --root, has more.")
    return [pool.subset(torch.randperm(len(pool))[:images]) for _ in range(NUM_TASKS)], source


def _contestant(build: BuildVariant, case: Case, tasks: list[ImageData]) -> Call:
    """Each call trains the next task, after the last the first again."""
    work, expected = Work(), case.work(len(tasks[0]))
    train, turns = build(case, tasks, work), itertools.cycle(range(len(tasks)))

    def call() -> None:
        with work.counted():
            train(next(turns))
        work.check(expected)

    return call


class Work:
    """Counts the steps of all optimizers and the rows that enter a watched network, the same way for all."""

    def __init__(self) -> None:
        self.steps = self.rows = 0

    def watch(self, body: Body) -> Body:
        """Count this network's rows; returns it."""
        body.features.register_forward_pre_hook(self._add_rows)
        return body

    def _add_rows(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.rows += len(inputs[0])

    def _add_step(self, *_: Any) -> None:
        self.steps += 1

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count from zero inside."""
        self.steps = self.rows = 0
        handle = register_optimizer_step_post_hook(self._add_step)
        try:
            yield
        finally:
            handle.remove()

    def check(self, expected: tuple[int, int]) -> None:
        """Refuse to compare different work."""
        if (self.steps, self.rows) != expected:
            raise RuntimeError(f"{self.steps} steps on {self.rows} rows instead of {expected}")


def _bare(case: Case, tasks: list[ImageData], work: Work) -> Train:
    network = work.watch(case.body(NUM_CLASSES)).train()

    def train(task: int) -> None:
        data = tasks[task]
        pixels, labels = data.images.index_select(0, data.rows), data.labels
        mean, std = data.mean.view(-1, 1, 1), data.std.view(-1, 1, 1)
        optimizer = torch.optim.SGD(network.parameters(), LEARNING_RATE, MOMENTUM)
        for _ in range(case.epochs):
            for index in torch.randperm(len(labels)).split(case.batch_size):
                # several times as fast as pixels[index]
                x = pixels.index_select(0, index).float().sub_(mean).div_(std)
                optimizer.zero_grad()
                F.cross_entropy(network(x), labels[index]).backward()
                optimizer.step()

    return train


def _ours(case: Case, tasks: list[ImageData], work: Work, plugins: Sequence[SupervisedPlugin] = ()) -> Train:
    fit = Fit(
        epochs=case.epochs,
        batch_size=case.batch_size,
        learning_rate=LEARNING_RATE,
        momentum=MOMENTUM,
        weight_decay=0.0,
        schedule="constant",
    )
    strategy: Strategy = finetune(work.watch(case.body(None)), fit=fit, plugins=plugins)
    return _training(strategy, make_benchmark(tasks, tasks))


def _ours_with_hooks(case: Case, tasks: list[ImageData], work: Work) -> Train:
    return _ours(case, tasks, work, [LossCounter()])


class LossCounter(SupervisedPlugin):
    """A plugin that looks at every iteration."""

    def __init__(self) -> None:
        super().__init__()
        self.images = self.iterations = 0
        self.loss = torch.zeros(1)

    def before_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Count the images."""
        self.images += len(strategy.mb_x)

    def after_training_iteration(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Count the iteration and add its loss."""
        self.iterations += 1
        self.loss += strategy.loss.detach()


def _over_tensors(case: Case, tasks: list[ImageData], work: Work) -> Train:
    tensors = [data.batch(torch.arange(len(data))) for data in tasks]
    labels = list(range(len(tasks)))
    benchmark = tensors_benchmark(tensors, tensors, task_labels=labels, complete_test_set_only=False)
    return _training(_naive(case, work), benchmark)


def _stock(case: Case, tasks: list[ImageData], work: Work) -> Train:
    scale = (tasks[0].mean / 255).tolist(), (tasks[0].std / 255).tolist()
    transform = Compose([ToTensor(), Normalize(*scale)])
    datasets: Any = [PilImages(data) for data in tasks]
    # what Avalanche's own PermutedMNIST passes
    benchmark = nc_benchmark(
        datasets,
        datasets,
        n_experiences=len(tasks),
        task_labels=True,
        shuffle=False,
        class_ids_from_zero_in_each_exp=True,
        one_dataset_per_exp=True,
        train_transform=transform,
        eval_transform=transform,
    )
    return _training(_naive(case, work), benchmark)


class PilImages(MNIST):
    """Images that come out as torchvision's own data set gives them."""

    def __init__(self, data: ImageData) -> None:
        self.data, self.targets = data.images.index_select(0, data.rows)[:, 0], data.labels
        self.transform = self.target_transform = None


def _naive(case: Case, work: Work) -> Naive:
    network = work.watch(case.body(NUM_CLASSES))
    optimizer = torch.optim.SGD(network.parameters(), LEARNING_RATE, MOMENTUM)
    return Naive(
        model=network,
        optimizer=optimizer,
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=case.batch_size,
        train_epochs=case.epochs,
    )


def _training(strategy: Any, benchmark: Any) -> Train:
    experiences = list(benchmark.train_stream)
    return lambda task: strategy.train(experiences[task])


VARIANTS: dict[str, BuildVariant] = {
    OURS: _ours,
    HOOKS: _ours_with_hooks,
    BARE: _bare,
    TENSORS: _over_tensors,
    STOCK: _stock,
}
