"""What tests of several parts need: networks without lucky numbers, and real images."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lifelong_ens.layers import rank1
from lifelong_ens.layers.plan import Call, Constants, Plan, plan

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def randomise() -> Callable[..., nn.Module]:
    """Give every tensor of a network, norms and statistics included, numbers that no error can hide behind."""

    def fill(module: nn.Module, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                if not tensor.is_floating_point():
                    continue
                if tensor.dim() > 1 and not name.endswith(("active", "committed")):
                    tensor.normal_(std=tensor[0].numel() ** -0.5)
                elif "var" in name:
                    tensor.uniform_(0.5, 1.5)
                elif "running_mean" in name or "bias" in name:
                    tensor.normal_(std=0.3)
                else:
                    tensor.normal_(1.0, 0.3)
        return module

    return fill


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Returns a function that lets every plan of a rank-1 layer come out as a mode, where the layer has it."""

    def force(mode: str) -> None:
        def plan_for(call: Call, constants: Constants) -> Plan:
            found = plan(call, constants)
            return replace(found, mode=mode) if mode in found.seconds else found  # type: ignore[arg-type]

        monkeypatch.setattr(rank1, "plan", plan_for)

    return force


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory):
    """Returns a function from a set's name to the folder with its first ten classes."""
    data = Path(os.environ.get("LIFELONG_ENS_DATA", REPOSITORY.parent / "shared" / "data"))
    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if not (data / "unpack").is_file():
            pytest.skip(f"no image sets in {data}; set LIFELONG_ENS_DATA")
        if name not in folders:
            folder = tmp_path_factory.mktemp(name)
            command = [sys.executable, str(data / "unpack"), name, str(folder), "--classes", "10"]
            subprocess.run(command, check=True)
            folders[name] = folder
        return folders[name]

    return get
