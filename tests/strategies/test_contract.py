"""One suite for all strategies: what each must do, on networks with BatchNorm, momentum and weight decay."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from avalanche.core import SupervisedPlugin

import strategies
from experiments.examination import Examination
from lifelong_ens.accounting.components import Size, sizes
from lifelong_ens.errors import InputError
from lifelong_ens.training.fit import Fit
from strategies import (
    agem,
    batch_ensemble_lifelong,
    bn_tuned,
    contract,
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
from strategies.contract import BODIES, trained
from streams import split_digits

TASKS = 3


def name_of(check: Callable[..., object]) -> str:
    """The name of a check, for pytest."""
    return check.__name__


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


def make(spec: Spec, body: str, fit: Fit = contract.FIT, seed: int = 0) -> Strategy:
    if body not in spec.bodies:
        with pytest.raises(InputError, match="use a network"):
            spec.build(BODIES[body](), **(spec.options or {}))
        pytest.skip(f"not on {body}, and it says so")
    return spec.build(BODIES[body](), fit=fit, seed=seed, **(spec.options or {}))


def test_every_exported_builder_has_a_spec():
    assert set(SPECS) == set(strategies.BUILDERS)


# these hold on any network: they are asked on one
ON_ONE = {
    contract.same_seed_same_result_another_seed_another: "conv",
    contract.plugins_of_steps_change_nothing: "conv",
    contract.caller_s_generator_is_left_alone: None,
}


@pytest.mark.parametrize("check", [one for one in contract.CHECKS if one not in ON_ONE], ids=name_of)
def test_keeps_the_contract(check, spec, body, benchmark):
    check(partial(make, spec, body), benchmark)


@pytest.mark.parametrize("check", ON_ONE, ids=name_of)
def test_keeps_the_contract_on_one_network(check, spec, benchmark):
    check(partial(make, spec, ON_ONE[check] or spec.bodies[0]), benchmark)


def test_promises_what_its_spec_says(spec):
    assert make(spec, spec.bodies[0]).network.frozen_past == spec.frozen_past


def test_mixed_rows_stay_in_bfloat16_too(spec, body, benchmark):
    contract.autocast_keeps_bfloat16_between_all_layers(partial(make, spec, body), benchmark, mixed=True)


def test_hands_plugins_to_avalanche(spec):
    plugin = SupervisedPlugin()
    strategy = spec.build(BODIES[spec.bodies[0]](), plugins=[plugin], **(spec.options or {}))
    assert any(one is plugin for one in strategy.plugins)


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
        builder(contract.conv_net(), fit=fit, **more) for builder, more in ((finetune, {}), (build, options))
    )
    for strategy in (plain, without):
        trained(strategy, benchmark)
    found = without.network.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in plain.network.state_dict().items())


def test_asking_the_new_task_alone_gives_the_same_rows_as_asking_all(spec, body, benchmark):
    strategy = make(spec, body, fit=contract.QUICK)
    new, every = (Examination(benchmark.test_stream, "entropy", evaluate) for evaluate in ("new", "all"))
    if not spec.frozen_past:
        assert new.mode(strategy) == "all"
        return
    for task in range(TASKS):
        trained(strategy, benchmark, [task])
        rows = [one.examine(strategy, range(task + 1), last=False) for one in (new, every)]
        # floats of both, to the bit
        assert rows[0] == rows[1]
        assert list(rows[0].accuracy) == list(range(task + 1))
    resumed = Examination(benchmark.test_stream, "entropy")
    after_the_last = resumed.examine(strategy, range(TASKS), last=True)
    assert after_the_last.reliability
    assert replace(after_the_last, reliability={}) == rows[1]


def test_cost_equals_closed_form(spec, body, benchmark):
    strategy = make(spec, body, fit=contract.QUICK)
    trained(strategy, benchmark)
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
    strategy = make(spec, body, fit=contract.QUICK)
    trained(strategy, benchmark)
    optimised = sum(p.numel() for group in strategy.optimizer.param_groups for p in group["params"])
    total = sum(size.parameters for size in sizes(strategy.network).values())
    assert (optimised < total) == (spec.frozen_past if spec.freezes is None else spec.freezes)
