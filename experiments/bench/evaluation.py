"""Evaluating all tasks so far after every task of a long stream."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from avalanche.benchmarks import tensors_benchmark
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive
from torch import nn

from experiments.bench.measuring import Call, Goal, Race
from experiments.compare import compare
from lifelong_ens.networks.plain import mlp
from lifelong_ens.networks.task import MultiHead
from lifelong_ens.training.data import ImageData
from lifelong_ens.training.fit import Fit
from strategies.base import Strategy
from strategies.batch_ensemble import batch_ensemble_lifelong
from strategies.model import TaskModel
from streams.benchmark import StreamBenchmark, make_benchmark

OURS, AVALANCHE = "compare, batch_ensemble", "Avalanche's Naive, accuracy of every task"
SHAPE = (1, 8, 8)
TRAINING_IMAGES, NUM_CLASSES, BATCH_SIZE = 16, 2, 256


def evaluation(device: torch.device, *, num_tasks: int = 100, images: int = 50) -> Iterator[Race]:
    """Seconds in which all tasks so far are evaluated, after each of 100 tasks, against Avalanche's evaluation.

    The stream is made of random 8x8 images of two classes a task, the networks are MLPs. What is counted is elapsed
    time, training left out; ours includes calibration, which Avalanche's does not.

    Args:
        device: The CPU.
        num_tasks: How many.
        images: Test images of a task.
    """
    train = [_random_images(TRAINING_IMAGES) for _ in range(num_tasks)]
    test = [_random_images(images) for _ in range(num_tasks)]

    def ours() -> Call:
        _seconds_of_ours(make_benchmark(train[:2], test[:2]))  # what is imported or made once
        return lambda: _seconds_of_ours(make_benchmark(train, test))

    def avalanche() -> Call:
        _seconds_of_avalanche(train[:2], test[:2])
        return lambda: _seconds_of_avalanche(train, test)

    yield Race(
        f"MLP, {num_tasks} tasks of {images} images",
        {OURS: ours, AVALANCHE: avalanche},
        (Goal(AVALANCHE, ">=", 5.0),),
        timed=False,
    )


def _random_images(count: int) -> ImageData:
    pixels = torch.randint(256, (count, *SHAPE), dtype=torch.uint8)
    scale = torch.full((SHAPE[0],), 128.0), torch.full((SHAPE[0],), 74.0)
    return ImageData(pixels, torch.arange(count), torch.arange(count) % NUM_CLASSES, *scale)


def _body() -> nn.Module:
    return mlp(input_shape=SHAPE, hidden=(64, 64))


def _seconds_of_ours(benchmark: StreamBenchmark) -> float:
    """As a run's record states them."""

    def build(seed: int) -> Strategy:
        return batch_ensemble_lifelong(_body(), fit=Fit(epochs=1), seed=seed)

    report = compare(benchmark, {"batch_ensemble": build}, progress=False, device="cpu")
    return float(report.runs["seconds_evaluation"].iloc[0])


def _seconds_of_avalanche(train: list[ImageData], test: list[ImageData]) -> float:
    """Of ``eval`` over the tasks so far, which are in memory as tensors, with no logger."""
    model = TaskModel(MultiHead(_body()))
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), 0.05, momentum=0.9),
        criterion=nn.CrossEntropyLoss(),
        eval_mb_size=BATCH_SIZE,
        evaluator=EvaluationPlugin(accuracy_metrics(experience=True, stream=True), loggers=[]),
    )
    parts: Any = [[data.batch(torch.arange(len(data))) for data in part] for part in (train, test)]
    labels = list(range(len(train)))
    benchmark: Any = tensors_benchmark(*parts, task_labels=labels, complete_test_set_only=False)
    seconds = 0.0
    for task, experience in enumerate(benchmark.train_stream):
        strategy.train(experience)
        start = time.perf_counter()
        strategy.eval(benchmark.test_stream[: task + 1])
        seconds += time.perf_counter() - start
    return seconds
