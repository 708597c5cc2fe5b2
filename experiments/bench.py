"""Speed of the training loop against its peers: the same work, interleaved, on one thread, in its CPU time.

Five tasks of real 28x28 grey images are trained with a multilayer perceptron and LeNet-5 (two
convolutions) through

* ``bare``: a plain PyTorch loop over tensors, whole batches gathered from bytes;
* ``ours``: ``finetune`` on one of our streams, no plugin that looks at iterations;
* ``hooks``: the same with a plugin that does;
* ``tensors``: Avalanche's ``Naive`` with its default evaluator over a ``TensorDataset``;
* ``stock``: the same over Avalanche's usual stream of PIL images with torchvision transforms.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from avalanche.benchmarks import nc_benchmark, tensors_benchmark
from avalanche.core import SupervisedPlugin
from avalanche.training.supervised import Naive
from tabulate import tabulate
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torchvision.datasets import MNIST
from torchvision.transforms import Compose, Normalize, ToTensor
from tqdm import tqdm

from lifelong_ens.errors import InputError
from lifelong_ens.networks.plain import Body, lenet5, mlp
from lifelong_ens.training.data import ImageData
from lifelong_ens.training.fit import Fit
from strategies.base import Strategy
from strategies.baselines import finetune
from streams.benchmark import make_benchmark

NUM_TASKS, NUM_CLASSES, IMAGE_SIZE = 5, 10, 28
BATCH_SIZES = (64, 256)
LEARNING_RATE, MOMENTUM = 0.01, 0.9
# so that a measurement takes more than a tenth of a second
EPOCHS = {"mlp": 16, "lenet5": 8}
# numerator, denominator, bound per network; ours is to stay below a bare loop and above the others
AT_MOST = {("ours", "bare"): {"mlp": 1.05, "lenet5": 1.05}, ("hooks", "bare"): {"mlp": 1.10, "lenet5": 1.10}}
AT_LEAST = {("stock", "ours"): {"mlp": 8.0, "lenet5": 1.7}, ("tensors", "ours"): {"mlp": 2.3, "lenet5": 1.1}}

Train = Callable[[int], object]


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


def bench_loop(
    repeats: int = 5,
    images: int = 1024,
    *,
    epochs: int | None = None,
    root: str | Path | None = None,
    out: str | Path | None = None,
) -> str:
    """Measure all variants and return the tables: milliseconds per iteration, and ratios beside their goals.

    Args:
        repeats: Fresh runs of every variant over all tasks.
        images: Images per task.
        epochs: Per task; None for enough of them that every measurement is long.
        root: Folder with torchvision's MNIST/raw/ in it; None for scikit-learn's digits enlarged to 28x28.
        out: Folder for ``bench_loop.csv`` (every measurement) and ``bench_loop_ratios.csv``.
    """
    if repeats < 1 or (epochs is not None and epochs < 1):
        raise InputError(f"repeats and epochs are at least 1, not {repeats} and {epochs}.")
    cases = [Case(network, size, epochs or EPOCHS[network]) for network in EPOCHS for size in BATCH_SIZES]
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tasks, source = _tasks(images, root)
        measured = _measure_all(cases, tasks, repeats)
    goals = ratios(measured)
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        measured.to_csv(Path(out) / "bench_loop.csv", index=False)
        goals.to_csv(Path(out) / "bench_loop_ratios.csv", index=False)
    return _tables(measured, goals, f"{NUM_TASKS} tasks of {images} images, {source}")


def _tasks(images: int, root: str | Path | None) -> tuple[list[ImageData], str]:
    """The same number of images of all ten digits for every task, and where they come from."""
    from streams.digits import split_digits
    from streams.mnist import split_mnist

    if root is None:
        source, benchmark = "scikit-learn's digits at 28x28", split_digits(num_tasks=1, image_size=IMAGE_SIZE)
    else:
        source, benchmark = "MNIST", split_mnist(root=root, num_tasks=1)
    pool: ImageData = benchmark.train_stream[0].dataset.image_data  # pyright: ignore
    if not 1 <= images <= len(pool):
        raise InputError(f"images is between 1 and {len(pool)}, not {images}; MNIST, with --root, has more.")
    return [pool.subset(torch.randperm(len(pool))[:images]) for _ in range(NUM_TASKS)], source


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _measure_all(cases: Sequence[Case], tasks: list[ImageData], repeats: int) -> pd.DataFrame:
    """One row for every case, repeat, task and variant."""
    rows: list[dict[str, Any]] = []
    total = len(cases) * repeats * len(tasks) * len(VARIANTS)
    # Avalanche's default logger writes to stdout
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        tqdm(total=total, desc="bench loop", unit="task", disable=None) as bar,
    ):
        for case in cases:
            _warm_up(case, tasks)
            for repeat in range(repeats):
                for row in _measure_repeat(case, tasks, repeat):
                    rows.append(row)
                    bar.update()
    return pd.DataFrame(rows)


def _warm_up(case: Case, tasks: list[ImageData]) -> None:
    """Two steps of every variant, so that lazy imports and the first use of a kernel are not measured."""
    short = [tasks[0].subset(torch.arange(min(len(tasks[0]), 2 * case.batch_size)))]
    for build in VARIANTS.values():
        build(Case(case.network, case.batch_size, 1), short, Work())(0)


def _measure_repeat(case: Case, tasks: list[ImageData], repeat: int) -> Iterator[dict[str, Any]]:
    """Every variant afresh; they take turns at every task, each time in another order."""
    work = Work()
    trainers = {name: build(case, tasks, work) for name, build in VARIANTS.items()}
    names = list(trainers)
    for task, data in enumerate(tasks):
        first = (repeat * len(tasks) + task) % len(names)
        for name in names[first:] + names[:first]:
            with work.counted():
                start, start_cpu = time.perf_counter(), time.process_time()
                trainers[name](task)
                seconds, seconds_cpu = time.perf_counter() - start, time.process_time() - start_cpu
            work.check(name, case.work(len(data)))
            yield {
                "network": case.network,
                "batch_size": case.batch_size,
                "repeat": repeat,
                "task": task,
                "variant": name,
                "iterations": work.steps,
                "seconds": seconds,
                "seconds_cpu": seconds_cpu,
                "ms_per_iteration": 1000 * seconds_cpu / work.steps,
            }


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

    def check(self, variant: str, expected: tuple[int, int]) -> None:
        """Refuse to compare different work."""
        if (self.steps, self.rows) != expected:
            raise RuntimeError(f"{variant} did {self.steps} steps on {self.rows} rows; expected {expected}")


def _bare(case: Case, tasks: list[ImageData], work: Work) -> Train:
    network = work.watch(case.body(NUM_CLASSES)).train()

    def train(task: int) -> None:
        data = tasks[task]
        pixels, labels = data.images[data.rows], data.labels
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
        self.data, self.targets = data.images[data.rows, 0], data.labels
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


VARIANTS: dict[str, Callable[[Case, list[ImageData], Work], Train]] = {
    "bare": _bare,
    "ours": _ours,
    "hooks": _ours_with_hooks,
    "tensors": _over_tensors,
    "stock": _stock,
}


def ratios(measured: pd.DataFrame) -> pd.DataFrame:
    """Ratios beside their goals: median and quartiles over pairs that were measured soon after each other.

    The column ``bare_loop`` has the ratio that a loop without any overhead of ours would reach on this machine.
    """
    pairs = measured.pivot(
        index=["network", "batch_size", "repeat", "task"], columns="variant", values="ms_per_iteration"
    )
    rows = []
    for sign, goals in (("<=", AT_MOST), (">=", AT_LEAST)):
        for (numerator, denominator), bounds in goals.items():
            groups = pairs.groupby(["network", "batch_size"], sort=False)
            for (network, batch_size), group in groups:  # pyright: ignore
                values = group[numerator] / group[denominator]
                low, median, high = values.quantile([0.25, 0.5, 0.75])
                bound = bounds[network]
                reached = median <= bound if sign == "<=" else median >= bound
                rows.append(
                    {
                        "ratio": f"{numerator} / {denominator}",
                        "network": network,
                        "batch_size": batch_size,
                        "median": median,
                        "quartile_1": low,
                        "quartile_3": high,
                        "goal": f"{sign} {bound:.2f}",
                        "verdict": "reached" if reached else "missed",
                        "bare_loop": (group[numerator] / group["bare"]).median() if sign == ">=" else None,
                    }
                )
    return pd.DataFrame(rows)


def _tables(measured: pd.DataFrame, goals: pd.DataFrame, what: str) -> str:
    medians = measured.groupby(["network", "batch_size", "variant"], sort=False)["ms_per_iteration"].median()
    times = medians.unstack("variant").reset_index()
    shown = goals.astype(object).where(goals.notna(), "")
    return "\n".join(
        [
            f"milliseconds per iteration, median; {what}; torch {torch.__version__}, CPU time of one thread",
            "",
            tabulate(times, headers="keys", tablefmt="simple", floatfmt=".2f", showindex=False),  # pyright: ignore
            "",
            tabulate(shown, headers="keys", tablefmt="simple", floatfmt=".3f", showindex=False),  # pyright: ignore
            "",
            "bare_loop: what a loop with no overhead at all would reach in that row",
        ]
    )
