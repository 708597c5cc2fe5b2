"""Lifelong-learning strategies: every builder returns an Avalanche strategy. Importing this loads no torch.

A module here never has the name of the function in it: the two would hide each other in this package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from strategies.base import Strategy
    from strategies.baselines import finetune, independent, joint
    from strategies.batch_ensemble import batch_ensemble_lifelong
    from strategies.distillation import lwf
    from strategies.expandable import den
    from strategies.gradient_memory import agem, gem
    from strategies.model import TaskModel
    from strategies.norm_tuning import bn_tuned
    from strategies.packing import packnet
    from strategies.progressive import pnn
    from strategies.regularisation import ewc, synaptic_intelligence
    from strategies.rehearsal import replay
    from strategies.reinforced import rcl
    from strategies.structured import structured_ensemble
    from strategies.supermasks import supsup

# the name on the command line -> where its builder is
BUILDERS: dict[str, str] = {
    "finetune": "strategies.baselines:finetune",
    "independent": "strategies.baselines:independent",
    "joint": "strategies.baselines:joint",
    "batch_ensemble": "strategies.batch_ensemble:batch_ensemble_lifelong",
    "pnn": "strategies.progressive:pnn",
    "structured_ensemble": "strategies.structured:structured_ensemble",
    "bn_tuned": "strategies.norm_tuning:bn_tuned",
    "packnet": "strategies.packing:packnet",
    "supsup": "strategies.supermasks:supsup",
    "den": "strategies.expandable:den",
    "rcl": "strategies.reinforced:rcl",
    "ewc": "strategies.regularisation:ewc",
    "synaptic_intelligence": "strategies.regularisation:synaptic_intelligence",
    "lwf": "strategies.distillation:lwf",
    "replay": "strategies.rehearsal:replay",
    "agem": "strategies.gradient_memory:agem",
    "gem": "strategies.gradient_memory:gem",
}

__all__ = [
    "BUILDERS",
    "Strategy",
    "TaskModel",
    "agem",
    "batch_ensemble_lifelong",
    "bn_tuned",
    "den",
    "ewc",
    "finetune",
    "gem",
    "independent",
    "joint",
    "lwf",
    "packnet",
    "pnn",
    "rcl",
    "replay",
    "structured_ensemble",
    "supsup",
    "synaptic_intelligence",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is first asked for."""
    for target in ("strategies.base:Strategy", "strategies.model:TaskModel", *BUILDERS.values()):
        module, _, function = target.partition(":")
        if function == name:
            return getattr(import_module(module), function)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
