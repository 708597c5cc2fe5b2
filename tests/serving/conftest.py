"""Trained networks as folders of tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lifelong_ens.networks.batch_ensemble import BatchEnsembleNetwork
from lifelong_ens.networks.plain import mlp, resnet20
from lifelong_ens.networks.task import TaskNetwork
from lifelong_ens.serving import ImageInput, export_network

IMAGES = ImageInput((3, 8, 8), (120.0, 125.0, 130.0), (60.0, 61.0, 62.0))
BODIES = {
    "resnet20": (resnet20, {"width": 4, "input_shape": [3, 8, 8]}),
    "mlp": (mlp, {"input_shape": [3, 8, 8], "hidden": [12, 8]}),
}


@pytest.fixture
def network(randomise) -> Callable[..., TaskNetwork]:
    """Makes a network whose tasks have numbers that no error can hide behind."""

    def make(classes=(3, 2, 4), kind: Any = BatchEnsembleNetwork, name="resnet20", **options) -> TaskNetwork:
        build, build_options = BODIES[name]
        lists = {key: tuple(one) if isinstance(one, list) else one for key, one in build_options.items()}
        return randomise(kind(build(**lists), **options).regrow(classes)).eval()

    return make


@pytest.fixture
def exported(network, tmp_path) -> Callable[..., tuple[TaskNetwork, Path]]:
    """Exports a network into a folder; its tasks are called 1, 2 and so on."""

    def make(folder: str = "model", name: str = "resnet20", **options) -> tuple[TaskNetwork, Path]:
        trained = network(name=name, **options)
        body = {"name": name, "options": BODIES[name][1]}
        export_network(trained, tmp_path / folder, body=body, images=IMAGES)
        return trained, tmp_path / folder

    return make
