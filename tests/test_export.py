"""What is exported, and networks with members themselves, through ``torch.export`` and ONNX, for any batch size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from lifelong_ens.convert import MemberNetwork, batch_ensemble
from lifelong_ens.networks.batch_ensemble import BatchEnsembleNetwork
from lifelong_ens.networks.plain import BasicBlock, Body
from lifelong_ens.networks.task import TaskNetwork
from strategies.packing import PackedNetwork
from strategies.progressive import ProgressiveNetwork


def body(num_classes: int | None = None) -> Body:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), BasicBlock(4, 6, 2), nn.AdaptiveAvgPool2d(1)]
    return Body(nn.Sequential(*layers, nn.Flatten()), 6, num_classes)


class ByRow(nn.Module):
    """A member for each row."""

    def __init__(self, network: MemberNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.network(x, ids=ids)


class OfTask(nn.Module):
    """One task of a network."""

    def __init__(self, network: TaskNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x, 1)


def export(module: nn.Module, *inputs: Tensor, strict: bool = False) -> ExportedProgram:
    shapes = tuple({0: Dim("batch")} for _ in inputs)
    return torch.export.export(module.eval(), inputs, dynamic_shapes=shapes, strict=strict)


def images(rows: int) -> Tensor:
    return torch.randn(rows, 3, 12, 12, generator=torch.Generator().manual_seed(rows))


def check(program: ExportedProgram, module: nn.Module, path: Path, *inputs: Tensor) -> None:
    """The program, and ONNX made of it, answer other batches as the module does."""
    runtime = pytest.importorskip("onnxruntime")
    with torch.no_grad():
        expected = module(*inputs)
        torch.testing.assert_close(program.module()(*inputs), expected, rtol=1e-6, atol=1e-6)
    onnx: Any = torch.onnx.export(program, dynamo=True, verbose=False)
    onnx.save(path / "network.onnx")
    session = runtime.InferenceSession(path / "network.onnx")
    named = {one.name: tensor.numpy() for one, tensor in zip(session.get_inputs(), inputs, strict=True)}
    found = torch.from_numpy(session.run(None, named)[0])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def ensemble(randomise: Any) -> MemberNetwork:
    network = batch_ensemble(randomise(body(5)), 3, init="gaussian").eval()
    return randomise(network, seed=1)


@pytest.mark.parametrize("whole", [False, True])
def test_exported_members(whole, randomise, tmp_path):
    network = ensemble(randomise)
    plain = network.export_ensemble() if whole else network.export_member(1)
    check(export(plain, images(3)), plain, tmp_path, images(7))
    with torch.no_grad():
        torch.testing.assert_close(plain(images(7)), network(images(7)) if whole else network(images(7))[1])


@pytest.mark.parametrize(
    "build",
    [
        lambda: BatchEnsembleNetwork(body(), members_per_task=2),
        lambda: ProgressiveNetwork(body(), laterals="adapter"),
        lambda: PackedNetwork(body()),
    ],
    ids=["batch_ensemble", "pnn", "packnet"],
)
def test_exported_tasks(build, tmp_path):
    network = build().regrow([2, 3]).eval()
    plain = network.export_task(1)
    check(export(plain, images(3)), plain, tmp_path, images(7))
    with torch.no_grad():
        torch.testing.assert_close(plain(images(7)), network(images(7), 1))


def test_a_network_with_members_itself(randomise, tmp_path):
    network = ensemble(randomise)
    check(export(network, images(3), strict=True), network, tmp_path, images(7))


def test_a_member_for_each_row(randomise, tmp_path):
    network = ByRow(ensemble(randomise))
    ids = torch.tensor([2, 0, 1, 1, 0, 2, 2])
    check(export(network, images(3), ids[:3], strict=True), network, tmp_path, images(7), ids)


def test_a_task_of_a_network_of_tasks(tmp_path):
    network = OfTask(BatchEnsembleNetwork(body()).regrow([2, 3]).eval())
    check(export(network, images(3), strict=True), network, tmp_path, images(7))
