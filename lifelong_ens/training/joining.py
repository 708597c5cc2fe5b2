"""How the processes of one run are started and find each other, by Lightning Fabric."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lifelong_ens.errors import InputError
from lifelong_ens.training.devices import ALONE, Devices
from lifelong_ens.training.lifeline import Lifeline

# how long a process may keep the others waiting, as the first does that reads a large stream; one that dies is noticed
# at once
PATIENCE = timedelta(hours=2)
STOP = signal.SIGINT, signal.SIGTERM


@dataclass(frozen=True)
class Started:
    """What has started the processes of this run: its name, how many in all, and how many on this machine."""

    by: str
    count: int
    here: int


def started() -> Started | None:
    """Several processes that torchrun or SLURM's srun has started; None where this is one by itself."""
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" in environment:
        found = Started("torchrun", int(environment["WORLD_SIZE"]), int(environment["LOCAL_WORLD_SIZE"]))
    elif "SLURM_STEP_NUM_TASKS" in environment:
        count, nodes = int(environment["SLURM_STEP_NUM_TASKS"]), int(environment.get("SLURM_NNODES", 1))
        found = Started("srun", count, int(environment.get("SLURM_NTASKS_PER_NODE", count // nodes)))
    else:
        return None
    return found if found.count > 1 else None


@contextmanager
def joined(count: int | None, device: torch.device) -> Iterator[Devices]:
    """The devices of a run inside; all its processes come here, and where there are none yet they are started.

    The first process is the one that goes on: in the others errors and all but severe log messages are quiet, and
    signals to stop are left to it, which tells them when it has come to its end in order.

    Args:
        count: How many processes, each with a device of its own; None for as many as torchrun or srun has started,
            else one.
        device: Of what kind; without an index.

    Raises:
        InputError: There are not so many devices here, or Lightning Fabric is missing.
        LostDeviceError: One of the processes does not answer.
    """
    outside = started()
    there = outside.count if outside else 1
    wanted = there if count is None else count
    if wanted < 1:
        raise InputError(f"--devices is at least 1, not {wanted}.")
    if outside is not None and wanted != outside.count:
        raise InputError(
            f"--devices {wanted}: {outside.by} has started {outside.count} processes; leave --devices out."
        )
    if wanted == 1:
        yield replace(ALONE, device=device)
        return
    heard: list[int] = []
    # a process that goes while they come together would leave the others waiting
    with _stop_goes_to(lambda number, _: heard.append(number)):
        devices = _join(wanted, outside, device)
        lifeline = Lifeline(devices)
    with nullcontext() if devices.first else _silent():
        try:
            if devices.first and heard:
                signal.raise_signal(heard[0])
            yield devices
        except BaseException as error:
            lifeline.fail(error)
            raise
    lifeline.leave()


@contextmanager
def _silent() -> Iterator[None]:
    """Neither logging nor stopped by signals inside."""
    logging.disable(logging.WARNING)
    try:
        with _stop_goes_to(signal.SIG_IGN):
            yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def _stop_goes_to(handler: Callable[[int, Any], object] | signal.Handlers) -> Iterator[None]:
    """Ctrl-C and SIGTERM have this handler inside; handlers belong to the main thread."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in STOP} if main else {}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


def is_first() -> bool:
    """Whether this is the process that speaks for all."""
    return not dist.is_initialized() or dist.get_rank() == 0


def _join(count: int, outside: Started | None, device: torch.device) -> Devices:
    here = outside.here if outside else count
    _check(here, device)
    if not dist.is_initialized():
        fabric = _fabric(count, here, outside, device)
        try:
            fabric.launch()
        except (RuntimeError, ValueError) as error:
            raise InputError(f"the processes of {count} devices did not come together: {error}") from error
        atexit.register(_part)
    index = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    own = torch.device("cuda", index) if device.type == "cuda" else device
    return Devices(dist.get_rank(), dist.get_world_size(), own)


def _check(here: int, device: torch.device) -> None:
    if device.type not in {"cpu", "cuda"} or device.index is not None:
        raise InputError(f"{here} devices are cuda or cpu, not {device}: use --device cuda or --device cpu.")
    there = torch.cuda.device_count()
    if device.type == "cuda" and there < here:
        kept = f"use --devices {there}, or --device cpu for processes without one"
        raise InputError(
            f"--devices {here}: this machine has {there} CUDA device{'s'[: there != 1]}; {kept}."
        )


def _fabric(count: int, here: int, outside: Started | None, device: torch.device) -> Any:
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.plugins.environments.lightning import LightningEnvironment
        from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
        from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
        from lightning_fabric.strategies.ddp import DDPStrategy
    except ImportError as error:
        raise InputError("several devices need: pip install 'lifelong-ens[devices]'") from error
    for name in ("lightning_fabric", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    environments = {"torchrun": TorchElasticEnvironment, "srun": SLURMEnvironment}
    environment = environments.get(outside.by if outside else "", LightningEnvironment)
    try:
        strategy = DDPStrategy(
            cluster_environment=environment(),
            # decisions and answers are exchanged between CPUs
            process_group_backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "cpu:gloo",
            timeout=PATIENCE,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Fabric(accelerator=device.type, devices=here, num_nodes=count // here, strategy=strategy)
    except (RuntimeError, ValueError, TypeError) as error:
        raise InputError(f"--devices {count}: {error}") from error


def _part() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
