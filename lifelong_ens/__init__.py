"""Lifelong learning and efficient ensembles: a member is one set of private parameters on a shared body.

Importing this package loads no torch; what is asked for is imported then.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lifelong_ens.convert import SELF_ATTENTION, batch_ensemble, plan_conversion
    from lifelong_ens.errors import InputError
    from lifelong_ens.layers.rank1 import explain
    from lifelong_ens.networks.batch_ensemble import BatchEnsembleNetwork
    from lifelong_ens.networks.task import MultiHead, TaskNetwork
    from lifelong_ens.report import Report
    from lifelong_ens.training.fit import Fit

_WHERE = {
    "SELF_ATTENTION": "lifelong_ens.convert",
    "BatchEnsembleNetwork": "lifelong_ens.networks.batch_ensemble",
    "Fit": "lifelong_ens.training.fit",
    "InputError": "lifelong_ens.errors",
    "MultiHead": "lifelong_ens.networks.task",
    "Report": "lifelong_ens.report",
    "TaskNetwork": "lifelong_ens.networks.task",
    "batch_ensemble": "lifelong_ens.convert",
    "explain": "lifelong_ens.layers.rank1",
    "plan_conversion": "lifelong_ens.convert",
}

__all__ = [
    "SELF_ATTENTION",
    "BatchEnsembleNetwork",
    "Fit",
    "InputError",
    "MultiHead",
    "Report",
    "TaskNetwork",
    "batch_ensemble",
    "explain",
    "plan_conversion",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is first asked for."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
