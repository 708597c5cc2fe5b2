"""Every strategy that can be exported: what a new process serves equals what the trained network answers."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

import strategies
from lifelong_ens.errors import UnfitNetworkError
from lifelong_ens.networks.plain import lenet5, mlp, resnet20
from lifelong_ens.serving import export_network
from lifelong_ens.store import read_tensors, write_tensors
from lifelong_ens.training.fit import Fit
from lifelong_ens.training.loop import evaluating
from streams import split_digits

FIT = Fit(epochs=1, batch_size=32, learning_rate=0.05, momentum=0.9, weight_decay=5e-4)
NETWORKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "mlp": (mlp, {"input_shape": [1, 16, 16], "hidden": [24, 16]}),
    "lenet5": (lenet5, {"input_shape": [1, 16, 16]}),
    "resnet20": (resnet20, {"input_shape": [1, 16, 16], "width": 4}),
}
BUILDERS = {
    name: getattr(strategies, target.partition(":")[2]) for name, target in strategies.BUILDERS.items()
}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {name: (build, {}) for name, build in BUILDERS.items()}
CASES["rcl"] = (BUILDERS["rcl"], {"trials": 1})
CASES["structured_ensemble"] = (BUILDERS["structured_ensemble"], {"mask_epochs": 1})
be = BUILDERS["batch_ensemble"]
CASES |= {
    "batch_ensemble, two members": (be, {"members_per_task": 2}),
    "batch_ensemble, accurate": (be, {"preset": "accurate", "additive": 1, "norm": "per_member"}),
    "batch_ensemble, first shared": (be, {"first_task": "shared", "bias": "shared", "norm": "shared_frozen"}),
    "structured_ensemble, two members": (
        BUILDERS["structured_ensemble"],
        {"mask_epochs": 1, "members_per_task": 2, "grow": 0.25},
    ),
}

SERVE = """
import sys, pathlib, torch
from lifelong_ens.serving import ServedModel
from lifelong_ens.store import read_tensors, write_tensors
folder = pathlib.Path(sys.argv[1])
given = read_tensors(folder / "given.safetensors")
answers = {}
with torch.no_grad():
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            model = ServedModel(path)
            for task in range(len(model.tasks)):
                answers[f"{path.name}/{task}"] = model(given["x"], task)
            answers[f"{path.name}/mixed"] = model(given["x"], given["ids"])
write_tensors(folder / "answers.safetensors", answers)
assert "avalanche" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_served_by_a_new_process_equals_the_trained_network(name, tmp_path):
    build_body, options = NETWORKS[name]
    arguments = {key: tuple(one) if isinstance(one, list) else one for key, one in options.items()}
    benchmark = split_digits(num_tasks=3, image_size=16, limit=12)
    x = torch.cat([experience.dataset.batch(torch.arange(3))[0] for experience in benchmark.test_stream])
    ids = torch.tensor([2, 0, 1, 1, 0, 2, 2, 1, 0])
    expected, refused = {}, set()
    for case, (build, own) in CASES.items():
        torch.manual_seed(0)
        try:
            strategy = build(build_body(**arguments), fit=FIT, **own)
            strategy.train(benchmark.train_stream) if strategy.joint else [
                strategy.train(experience) for experience in benchmark.train_stream
            ]
            export_network(strategy.network, tmp_path / case, body={"name": name, "options": options})
        except UnfitNetworkError:
            refused.add(case)
            continue
        with evaluating(strategy.network):
            expected |= {f"{case}/{task}": strategy.network(x, task) for task in range(3)}
            expected[f"{case}/mixed"] = strategy.network(x, ids)
    # a column of pnn reads all earlier ones, and without norms there is nothing for bn_tuned to tune
    assert refused == ({"pnn"} if name == "resnet20" else {"pnn", "bn_tuned"})
    write_tensors(tmp_path / "given.safetensors", {"x": x, "ids": ids})
    subprocess.run([sys.executable, "-c", SERVE, str(tmp_path)], check=True)
    answers = read_tensors(tmp_path / "answers.safetensors")
    assert answers.keys() == expected.keys()
    for case, logits in expected.items():
        torch.testing.assert_close(
            answers[case], logits, rtol=1e-5, atol=1e-6, msg=lambda m, c=case: f"{c}: {m}"
        )
