"""An ensemble: members that all see every input, and the mean of their probabilities."""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lifelong_ens.accounting.flops import forward_flops
from lifelong_ens.accounting.meter import TrainingMeter
from lifelong_ens.ensembles import KINDS
from lifelong_ens.ensembles.training import BuildNetwork
from lifelong_ens.errors import DamagedFileError, InputError, nearest
from lifelong_ens.layers.bits import pack_zeros, unpack_zeros
from lifelong_ens.layers.exported import ExportedMembers
from lifelong_ens.networks import BUILDERS
from lifelong_ens.store import read_metadata, read_tensors, write_tensors

FILE = "ensemble.safetensors"


@dataclass(frozen=True)
class Spent:
    """What the training of an ensemble took.

    Attributes:
        flops: FLOPs of what ran, forward and backward, of all trainings together.
        flops_effective: The same without the products of weights that a mask holds at zero.
        seconds: Time.
        saved_bytes: Most bytes that a step kept for its backward pass, weights left out.
        trainings: Networks that were trained.
    """

    flops: int = 0
    flops_effective: int = 0
    seconds: float = 0.0
    saved_bytes: int = 0
    trainings: int = 0

    @classmethod
    def of(cls, meter: TrainingMeter, trainings: int, effective: float = 1.0) -> Self:
        """What a meter has counted; ``effective`` is the share of its FLOPs that zeros leave."""
        flops = round(meter.flops)
        return cls(flops, round(effective * meter.flops), meter.seconds, meter.saved_bytes, trainings)


@dataclass(frozen=True)
class Cost:
    """What an ensemble costs to keep and to ask.

    Attributes:
        parameters: Learned numbers that are stored; zeros of a mask are not.
        bytes: Of all tensors as ``save`` writes them.
        flops_forward: FLOPs of one input through all members, as they run.
        flops_effective: The same without the products of weights that are zero.
    """

    parameters: int
    bytes: int
    flops_forward: int
    flops_effective: int


class Ensemble(nn.Module):
    """Members that all see every input.

    Attributes:
        method: What made it, as on the command line.
        num_members: How many members there are.
        weights: The members' shares of the mean probability, ``(members,)``; they sum to one.
        temperature: What the logarithm of the mean probability is divided by, a scalar; 1 as trained.
        spent: What its training took.
        built_from: Name and options of the network's builder where it is one of ours.

    Args:
        num_members: How many members.
        method: What makes it.
        weights: The members' shares; equal if not given.
    """

    kind: ClassVar[str]
    weights: Tensor
    temperature: Tensor

    def __init__(self, num_members: int, method: str, weights: Tensor | None = None) -> None:
        super().__init__()
        if num_members < 1:
            raise InputError(f"an ensemble has at least one member, not {num_members}.")
        self.num_members, self.method, self.spent = num_members, method, Spent()
        self.built_from: dict[str, Any] | None = None
        shares = torch.full((num_members,), 1 / num_members) if weights is None else weights
        self.register_buffer("weights", shares)
        self.register_buffer("temperature", torch.ones(()))

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Logits of every member for every input: ``(batch, ...)`` to ``(members, batch, classes)``."""

    def mix(self, logits: Tensor) -> Tensor:
        """Log-probabilities of the ensemble, ``(batch, classes)``, from members' logits ``(members, batch, classes)``.

        The mean is of probabilities. A temperature other than 1 acts on its logarithm: first pool, then calibrate
        (Rahaman and Thiery, 2021).
        """
        log_probs = logits.float().log_softmax(dim=-1)
        mean = torch.logsumexp(log_probs + self.weights.log()[:, None, None], dim=0)
        return mean if float(self.temperature) == 1.0 else (mean / self.temperature).log_softmax(dim=-1)

    def log_probs(self, x: Tensor) -> Tensor:
        """Logarithms of ``probs``."""
        return self.mix(self(x))

    def probs(self, x: Tensor) -> Tensor:
        """The ensemble's prediction, the mean of its members' probabilities: ``(batch, classes)``."""
        return self.log_probs(x).exp()

    def cost(self, x: Tensor) -> Cost:
        """What it stores, and what one input costs; measured on the inputs ``x``, ``(batch, ...)``."""
        flops = sum(forward_flops(self, lambda: self(x)).by_component.values()) / len(x)
        stored = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())
        zeros = self._zero_flops(x) / len(x)
        return Cost(self._num_parameters(), stored, round(flops), round(flops - zeros))

    @abstractmethod
    def export_member(self, member: int) -> nn.Module:
        """One member as a plain network that shares nothing with the ensemble; equal to 1e-6 in evaluation."""

    def export_ensemble(self) -> ExportedMembers:
        """All members as plain networks in a list that is a module: called, it answers as the ensemble does."""
        return ExportedMembers(self.export_member(member) for member in range(self.num_members))

    def _check_member(self, member: int) -> None:
        if not 0 <= member < self.num_members:
            raise IndexError(
                f"member {member} does not exist; this ensemble has 0 to {self.num_members - 1}."
            )

    def _num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def _zero_flops(self, x: Tensor) -> float:
        """FLOPs of products of weights that are zero."""
        return 0.0

    @abstractmethod
    def plan(self) -> dict[str, Any]:
        """All that ``rebuild`` needs beside the builder of the network, as JSON can hold it."""

    @classmethod
    @abstractmethod
    def rebuild(cls, plan: Mapping[str, Any], build_network: BuildNetwork) -> Ensemble:
        """An ensemble of the right shapes, whose tensors are still to be loaded."""

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is saved, by name; a tensor with many zeros as bits and values."""
        packed: dict[str, Tensor] = {}
        for name, tensor in self.state_dict().items():
            if tensor.is_floating_point() and _saves(tensor):
                packed[f"{name}.bits"], packed[f"{name}.values"] = pack_zeros(tensor)
            else:
                packed[name] = tensor
        return packed

    def save(self, folder: str | Path) -> Path:
        """Write ``ensemble.safetensors`` into a folder, in one step; returns its path.

        Its header holds how to build the networks again. Nothing is pickled.
        """
        about = {
            "kind": self.kind,
            "method": self.method,
            "network": self.built_from,
            "plan": self.plan(),
            "spent": asdict(self.spent),
        }
        path = Path(folder) / FILE
        write_tensors(path, self.tensors(), about)
        return path

    @staticmethod
    def load(
        folder: str | Path, build_network: BuildNetwork | None = None, device: torch.device | str = "cpu"
    ) -> Ensemble:
        """The ensemble that ``save`` wrote, in evaluation mode.

        Args:
            folder: Where it was saved.
            build_network: Makes the network that it was trained from; may be left out for networks of ours, which the
                file names. No code that a file names is ever run.
            device: Where it goes.

        Raises:
            DamagedFileError: The file is truncated, altered, foreign, or of another network.
            InputError: The network is not one of ours, and no ``build_network`` was given.
        """
        path = Path(folder) / FILE
        if not path.exists():
            raise InputError(f"no ensemble in {folder}: there is no {FILE}.")
        about, tensors = read_metadata(path), read_tensors(path)
        if about.get("kind") not in KINDS:
            raise DamagedFileError(f"{path} is not a saved ensemble of this version.")
        module, _, name = KINDS[about["kind"]].partition(":")
        build = build_network or _builder(path, about.get("network"))
        try:
            ensemble: Ensemble = getattr(import_module(module), name).rebuild(about["plan"], build)
            ensemble.method, ensemble.spent = about["method"], Spent(**about["spent"])
            ensemble.built_from = about.get("network")
            ensemble.load_tensors(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
            raise DamagedFileError(
                f"{path} does not fit its network: {' '.join(str(error).split())[:300]}"
            ) from error
        return ensemble.eval().to(device)

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what ``tensors`` gave, in place; every tensor must be there."""
        state = {}
        for name, own in self.state_dict().items():
            if f"{name}.bits" in tensors:
                state[name] = unpack_zeros(tensors[f"{name}.bits"], tensors[f"{name}.values"], own.shape)
            elif name in tensors:
                state[name] = tensors[name]
        self.load_state_dict(state)


def finished(
    ensemble: Ensemble,
    build_network: BuildNetwork,
    meter: TrainingMeter,
    trainings: int,
    effective: float = 1.0,
) -> Ensemble:
    """The ensemble in evaluation mode, with what its training took and how its network is built."""
    ensemble.spent = Spent.of(meter, trainings, effective)
    ensemble.built_from = network_name(build_network)
    return ensemble.eval().to(next(ensemble.parameters()).device)


def network_name(build_network: BuildNetwork) -> dict[str, Any] | None:
    """Name and options of a builder that is one of ours or a ``functools.partial`` of one; else None."""
    partial = (
        build_network if isinstance(build_network, functools.partial) else functools.partial(build_network)
    )
    target = f"{partial.func.__module__}:{getattr(partial.func, '__qualname__', '')}"
    for name, known in BUILDERS.items():
        if known == target and not partial.args:
            return {"name": name, "options": dict(partial.keywords)}
    return None


def _builder(path: Path, network: Any) -> BuildNetwork:
    if not isinstance(network, Mapping):
        raise InputError(f"{path} holds networks that are not ours; give build_network=.")
    name = str(network.get("name"))
    if name not in BUILDERS:
        raise DamagedFileError(
            f"{path} names the network {name!r}, which this version does not have; {nearest(name, BUILDERS)}"
        )
    module, _, function = BUILDERS[name].partition(":")
    return functools.partial(getattr(import_module(module), function), **network["options"])


def _saves(tensor: Tensor) -> bool:
    """Whether bits and values are smaller than the tensor as it is."""
    kept = int(torch.count_nonzero(tensor))
    return (
        math.ceil(tensor.numel() / 8) + kept * tensor.element_size() < tensor.numel() * tensor.element_size()
    )
