"""What is planned without data is what the records of small runs say, and the published sizes."""

from __future__ import annotations

import functools
import json
from dataclasses import astuple, replace

import pandas as pd
import pytest
import torch
from torch import nn

import strategies
import streams
from experiments import catalogue
from experiments.cli import main
from experiments.compare import strategy_builder
from experiments.outlook import STREAMS
from experiments.paper import Cost, Growth, OnPaper, TaskShape, growth, measured_speed, plain_parameters
from experiments.run import Cell, Named, Run
from lifelong_ens import Fit
from lifelong_ens.errors import InputError
from lifelong_ens.networks import mlp, resnet50
from lifelong_ens.networks.plain import without_classifier
from streams import split_digits

FIT = Fit(epochs=2, batch_size=8)
DIGITS = TaskShape(1, (1, 8, 8), 10)
KNOWN = (
    "finetune",
    "independent",
    "pnn",
    "batch_ensemble",
    "bn_tuned",
    "supsup",
    "ewc",
    "synaptic_intelligence",
    "lwf",
)
SMALL = functools.partial(mlp, hidden=(16, 8))


def nested(*, input_shape: tuple[int, int, int]) -> nn.Module:
    block = nn.Sequential(nn.Conv2d(input_shape[0], 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    top = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
    return without_classifier(nn.Sequential(block, top))


def builder(name: str, network=SMALL, fit: Fit = FIT, **options):
    return strategy_builder(
        catalogue.load(catalogue.target_of("strategy", name)), network, {}, fit, **options
    )


CASES = [
    *(
        (name, nested if name in ("bn_tuned", "pnn", "ewc", "batch_ensemble") else SMALL, {})
        for name in KNOWN
    ),
    ("batch_ensemble", SMALL, {"preset": "accurate"}),
    ("batch_ensemble", nested, {"members_per_task": 2, "norm": "per_member"}),
    ("pnn", SMALL, {"laterals": "adapter"}),
]


@pytest.mark.parametrize(("name", "network", "options"), CASES)
def test_a_plan_is_what_the_record_says(tmp_path, name, network, options):
    benchmark = split_digits(num_tasks=10, limit=10)
    build = builder(name, network, **options)
    cell = Cell(Named("split_digits"), Named(name), Named("small"), {}, seed=0)
    make = functools.partial(build, benchmark=benchmark, device=torch.device("cpu"))
    record = Run(cell, benchmark, lambda seed: make(seed=seed), tmp_path).execute()
    grown = growth(build, DIGITS)
    for end in record["tasks"]:
        stored = [row for row in record["costs"] if row["trained_task"] == end["trained_task"]]
        planned = grown.at(end["trained_task"] + 1)
        assert planned.parameters == sum(row["parameters"] for row in stored)
        assert planned.bytes == sum(row["bytes"] for row in stored)
        assert planned.flops_forward == end["flops_forward"]
        assert planned.flops_training == pytest.approx(end["flops_training"], rel=1e-9)
        # beside its tensors a checkpoint has their names
        assert 0 < end["disk_bytes"] - planned.disk_bytes < 100_000
        assert planned.memory_bytes > planned.disk_bytes


def test_memory_is_what_tensors_take():
    with OnPaper() as paper:
        x = torch.empty(100, device="meta")
        y = x + 1
        view = y[:10]
        del y
        assert paper.live == 800
        del x, view
        assert (paper.live, paper.peak) == (0, 800)


def test_memory_of_training_a_plain_network():
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in SMALL(input_shape=(1, 8, 8)).parameters())
    task = replace(DIGITS, images=400)
    costs = [
        growth(builder("finetune", fit=replace(FIT, batch_size=size)), task).at(3) for size in (100, 200)
    ]
    # weights, gradients and momentum
    assert all(cost.memory_bytes > 3 * 4 * weights for cost in costs)
    # of a hundred images more: themselves, and what hidden layers keep of them
    assert costs[1].memory_bytes - costs[0].memory_bytes >= 100 * (64 + 16 + 8) * 4


def test_published_size_of_batch_ensemble_on_split_imagenet():
    """30 M against 25 M, 20 %: Wen et al. 2020; with norms shared and no fast weights in the heads."""
    task = TaskShape(10, (3, 224, 224), 12_812)
    cost = growth(builder("batch_ensemble", resnet50, Fit()), task).at(100)
    plain = plain_parameters(builder("finetune", resnet50, Fit()), task, [1, 100])[100]
    assert plain == 23_454_912 + 53_120 + 2_049_000
    assert cost.parameters == plain + 100 * 49_091 == 30_466_132
    assert cost.parameters / plain == pytest.approx(1.192, abs=5e-4)
    # torchvision: 4.09 G multiply-accumulates with a classifier of 1,000 classes
    assert cost.flops_forward == pytest.approx(2 * 4.09e9, rel=2e-3)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("den", "cannot be known"),
        ("rcl", "cannot be known"),
        ("structured_ensemble", "depends on values"),
        ("packnet", "depends on values"),
        ("replay", "depends on values"),
        ("joint", "finetune"),
        ("experiments.avalanche_strategies:ewc", "only its run"),
    ],
)
def test_what_cannot_be_known_says_so(name, why):
    with pytest.raises(InputError, match=why):
        growth(builder(name), DIGITS)


def test_every_strategy_is_known_or_says_why():
    unknown = {"den", "rcl", "structured_ensemble", "packnet", "replay", "agem", "gem", "joint"}
    assert {*KNOWN, *unknown} == set(strategies.BUILDERS)


def parabolas(tasks: int) -> list[Cost]:
    return [
        Cost(7 + t, 3 * t * t, t, 5, 100.0 if t == 1 else 10.0 * t * t, t * t) for t in range(1, tasks + 1)
    ]


def test_growth_is_followed_beyond_what_was_seen():
    grown = Growth(parabolas(5))
    assert grown.settled
    for tasks in (1, 2, 4, 5, 6, 1000):
        training = 100.0 + sum(10.0 * t * t for t in range(2, tasks + 1))
        expected = Cost(7 + tasks, 3 * tasks**2, tasks, 5, training, tasks**2)
        assert astuple(grown.at(tasks)) == pytest.approx(astuple(expected), rel=1e-12)


def test_the_first_number_of_tasks_that_is_too_many():
    grown = Growth(parabolas(5))
    assert grown.first_beyond(99, lambda cost: cost.memory_bytes) == 10
    assert grown.first_beyond(100, lambda cost: cost.memory_bytes) == 11
    assert grown.first_beyond(0, lambda cost: cost.memory_bytes) == 1
    assert grown.first_beyond(5, lambda cost: cost.flops_forward) is None


def test_what_is_no_parabola_is_not_followed():
    costs = parabolas(5)
    with pytest.raises(InputError, match="its parameters do not grow"):
        Growth([*costs[:4], replace(costs[4], parameters=99)])
    assert not Growth([*costs[:4], replace(costs[4], memory_bytes=99)]).settled


def test_declared_streams_are_the_streams():
    assert set(STREAMS) == set(streams.BUILDERS) - {
        "image_folder",
        "domain_folder",
        "image_table",
        "image_shards",
        "from_arrays",
    }
    for name, (classes, (_, size, _), _) in STREAMS.items():
        options = {one.name: one.default for one in catalogue.describe(streams.BUILDERS[name]).options}
        tasks = 1 if name in ("permuted_mnist", "rotated_mnist") else int(options["num_tasks"])
        total = {"split_cifar100": 100, "split_tiny_imagenet": 200, "split_imagenet": 1000}.get(name, 10)
        assert classes * tasks == total, name
        assert options["image_size"] in ("None", str(size)), name
    classes, shape, images = STREAMS["split_digits"]
    train = list(split_digits().streams["train"])
    assert sum(len(one.dataset) for one in train) == round(10 * images)
    assert tuple(train[0].dataset[0][0].shape) == shape


def test_speed_is_measured_on_real_steps():
    assert measured_speed(builder("batch_ensemble"), DIGITS, torch.device("cpu")) > 1e5


def plan(*arguments: str) -> list[str]:
    return ["plan", "--stream", "split_digits", "--hidden", "[16, 8]", *arguments]


def test_command_prints_and_writes(tmp_path, capsys):
    arguments = plan("--strategies", "finetune,pnn,den", "--tasks", "1,1000", "--machine", "h100", "--amp")
    assert main([*arguments, "--finetune.epochs", "20", "--out", str(tmp_path / "p.csv")]) == 0
    out = capsys.readouterr().out
    assert "hours on h100" in out
    assert "0.2 of a peak of 989 TFLOP/s (amp)" in out
    assert "– den: " in out
    table = pd.read_csv(tmp_path / "p.csv").set_index(["strategy", "tasks"])
    assert list(table.index) == [(name, count) for name in ("finetune", "pnn") for count in (1, 1000)]
    one, other = table.loc[("finetune", 1)], table.loc[("pnn", 1)]
    assert one.parameters == other.parameters == 64 * 16 + 16 + 16 * 8 + 8 + 8 * 2 + 2
    assert one.flops_training == 2 * other.flops_training
    assert one.seconds == pytest.approx(one.flops_training / (0.2 * 989e12))
    assert 1 < other.memory_breaks_at < one.memory_breaks_at
    assert (
        main(
            [*plan("--strategy", "finetune", "--measure", "--tasks", "7"), "--out", str(tmp_path / "p.json")]
        )
        == 0
    )
    (row,) = json.loads((tmp_path / "p.json").read_text())
    assert (row["strategy"], row["tasks"]) == ("finetune", 7)
    assert "here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--machine", "h10"], "did you mean h100"),
        (["--measure", "--machine", "h100"], "leave out --machine"),
        (["--stream", "image_folder"], "--classes_per_task N, --image_size N, --images_per_task N"),
        (["--stream", "split_digit"], "did you mean split_digits"),
        (["--strategies", "den"], "den: a task adds units"),
        (["--tasks", "0"], "--tasks 0: expected a whole number of at least 1"),
        (["--efficiency", "much"], "--efficiency much: expected float"),
        (["--hiden", "[4]"], "did you mean hidden"),
        (["--out", "plan.txt"], ".csv or .json"),
        (["--out", "nowhere/plan.csv"], "there is no folder nowhere"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(capsys, arguments, message):
    assert main([*plan(), *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
