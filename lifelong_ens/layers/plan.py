"""How a rank-1 layer runs: which of several exact ways is the fastest for the rows at hand.

All of them compute ``(W * (s r^T)) x``. Scaling activations takes two passes over them and keeps the shared weight as
it is, whoever the rows belong to; merging makes a member's dense weight, which costs passes over the weight and then
nothing more. What is cheaper follows from sizes alone: a pure function decides, from what is known before the layer
runs, and never from values, so that the same rows always run the same way.
"""

from __future__ import annotations

import functools
import logging
import platform
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch

from lifelong_ens.errors import DamagedFileError
from lifelong_ens.store import cache_folder, read_json, write_json

log = logging.getLogger(__name__)

Mode = Literal["scale", "merge", "batched"]

MODES = {
    "scale": "scale the activations, rows of all members in one pass",
    "merge": "make the member's dense weight",
    "batched": "make all members' dense weights, one batched product",
}
# passes over a tensor that each way adds to the plain layer: a product of two tensors reads and writes it
_PASSES_MERGING = 1.5


@dataclass(frozen=True)
class Constants:
    """What the arithmetic of a plan needs to know of a device; ``lifelong-ens bench calibrate`` measures it.

    Attributes:
        launch_seconds: Of a module that does next to nothing, from Python to its end.
        bytes_per_second: That an elementwise product of activations reads and writes.
    """

    launch_seconds: float
    bytes_per_second: float


# about one core of a server with the tensors of a small network in its caches, and a data-centre GPU
DEFAULTS = {"cpu": Constants(2e-6, 3e10), "cuda": Constants(1e-5, 1.5e12)}


@dataclass(frozen=True)
class Call:
    """What is known of a rank-1 layer's call before it runs.

    Attributes:
        rows: Rows of the batch, those of all members.
        members: Blocks of rows that have a member each: 1 where all rows are one member's.
        input_size: Numbers of one row that ``r`` scales.
        output_size: Numbers of one row that ``s`` scales.
        weight_size: Numbers of the shared weight.
        batched: Whether several members' dense products have a batched form: those of linear layers.
        learning: Whether a backward pass follows.
        frozen: Whether the shared weight learns nothing in it. Then merging sums over activations instead of computing
            a gradient of the weight.
        itemsize: Bytes of a number.
    """

    rows: int
    members: int
    input_size: int
    output_size: int
    weight_size: int
    batched: bool = False
    learning: bool = False
    frozen: bool = False
    itemsize: int = 4

    @property
    def activations(self) -> int:
        """Bytes of what is scaled."""
        return self.rows * (self.input_size + self.output_size) * self.itemsize

    @property
    def weights(self) -> int:
        """Bytes of the members' dense weights."""
        return self.members * self.weight_size * self.itemsize


@dataclass(frozen=True)
class Plan:
    """A way to run, and what each possible way adds to the plain layer.

    Attributes:
        mode: The fastest.
        seconds: By mode.
        call: What it was made for.
        constants: The device.
    """

    mode: Mode
    seconds: dict[str, float]
    call: Call
    constants: Constants

    def explain(self) -> str:
        """The arithmetic, in a few lines."""
        call, constants = self.call, self.constants
        lines = [
            f"{call.rows} rows of {call.members} member(s); activations {call.activations:,} bytes, "
            f"dense weights {call.weights:,} bytes; {constants.launch_seconds * 1e6:.1f} us a launch, "
            f"{constants.bytes_per_second / 1e9:.1f} GB/s" + (", backward too" if call.learning else "")
        ]
        for mode in sorted(self.seconds, key=self.seconds.__getitem__):
            chosen = "*" if mode == self.mode else " "
            lines.append(f"{chosen} {mode:8} {self.seconds[mode] * 1e6:10.1f} us   {MODES[mode]}")
        return "\n".join(lines)


@functools.lru_cache(maxsize=4096)
def plan(call: Call, constants: Constants) -> Plan:
    """The fastest way to run a call.

    The seconds are those that a way adds to the plain layer. A pass reads one tensor of a size and writes another.
    Scaling: one pass over the inputs and one over the outputs, and twice that backward, where each is scaled again
    and summed to the gradient of its vector. Merging: the outer product and the product with the weight, one and a
    half passes; backward twice that, or with a frozen weight one reading of the activations for the gradients of r
    and s and the dense weight once more.
    """
    passes = {"scale": 1.0, "merge": 0.0, "batched": 0.0}
    merges = {"scale": 0.0, "merge": _PASSES_MERGING, "batched": _PASSES_MERGING}
    launches = {"scale": 2, "merge": 2, "batched": 3}
    if call.learning:
        launches = {mode: 3 * count for mode, count in launches.items()}
        passes["scale"] *= 3
        merges = {mode: (2 if call.frozen else 3) * count for mode, count in merges.items()}
        if call.frozen:
            passes["merge"] += 0.75
    possible = ["scale", *(["merge"] if call.members == 1 else ["batched"] if call.batched else [])]
    seconds = {
        mode: launches[mode] * constants.launch_seconds
        + 2 * (passes[mode] * call.activations + merges[mode] * call.weights) / constants.bytes_per_second
        for mode in possible
    }
    best: Mode = min(get_args(Mode), key=lambda mode: seconds.get(mode, float("inf")))
    return Plan(best, seconds, call, constants)


# launches that the pass of one more member takes for each of its rank-1 layers: the layer, a norm, an activation
_LAUNCHES_A_LAYER = 12


@functools.lru_cache(maxsize=4096)
def in_turn(calls: tuple[Call, ...], rows: int, members: int, learning: bool, constants: Constants) -> bool:
    """Whether several members see rows one after the other faster than stacked in one pass.

    Args:
        calls: Those of all rank-1 layers of the network for one row of one member.
        rows: Rows that every member sees.
        members: How many.
        learning: Whether a backward pass follows.
        constants: The device.
    """

    def total(stacked: int) -> float:
        return sum(
            min(
                plan(
                    replace(one, rows=rows * stacked, members=stacked, learning=learning, frozen=False),
                    constants,
                ).seconds.values()
            )
            for one in calls
        )

    # one pass of every member launches everything anew
    launches = (
        (members - 1) * len(calls) * _LAUNCHES_A_LAYER * (3 if learning else 1) * constants.launch_seconds
    )
    return members > 1 and members * total(1) + launches < total(members)


@functools.lru_cache
def constants_of(device: str) -> Constants:
    """The constants of a kind of device: those measured on this machine if there are any, else the defaults.

    Args:
        device: ``cpu``, ``cuda`` or any other of torch's.
    """
    path, default = constants_file(device), DEFAULTS.get(device, DEFAULTS["cuda"])
    try:
        values = read_json(path)
        return Constants(float(values["launch_seconds"]), float(values["bytes_per_second"]))
    except OSError:
        return default
    except (DamagedFileError, KeyError, TypeError, ValueError) as error:
        log.warning("%s is not used (%s); lifelong-ens bench calibrate writes it anew", path, error)
        return default


def save_constants(device: str, constants: Constants) -> Path:
    """Keep measured constants for this machine's device; every later process uses them."""
    path = constants_file(device)
    write_json(path, asdict(constants) | {"device": device, "name": device_name(device)})
    constants_of.cache_clear()
    return path


def constants_file(device: str) -> Path:
    """Where the measured constants of a device are kept: in ``$LIFELONG_ENS_CACHE``, else the user's cache folder."""
    slug = re.sub(r"[^A-Za-z0-9]+", "-", device_name(device)).strip("-").lower()
    return cache_folder() / "devices" / f"{slug}.json"


@functools.lru_cache
def device_name(device: str) -> str:
    """What the device calls itself."""
    if device == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{device} {platform.machine()} {platform.processor() or platform.node()}".strip()
