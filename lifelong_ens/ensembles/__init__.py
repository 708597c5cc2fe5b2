"""Efficient ensembles: each method is one function that trains its members and returns an ``Ensemble``.

Importing this loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lifelong_ens.ensembles.dropout import fit_mc_dropout
    from lifelong_ens.ensembles.ensemble import Ensemble
    from lifelong_ens.ensembles.freetickets import fit_dst, fit_edst, fit_prune_finetune, fit_static_sparse
    from lifelong_ens.ensembles.hyper_batch import fit_hyper_batch, fit_self_tuning
    from lifelong_ens.ensembles.hyper_deep import fit_fixed_init_hyper, fit_hyper_deep
    from lifelong_ens.ensembles.separate import fit_deep, fit_single, fit_single_equal_cost
    from lifelong_ens.ensembles.shared import fit_batch_ensemble
    from lifelong_ens.ensembles.structured import fit_structured

# the name on the command line -> where its function is
METHODS: dict[str, str] = {
    "single": "lifelong_ens.ensembles.separate:fit_single",
    "single_equal_cost": "lifelong_ens.ensembles.separate:fit_single_equal_cost",
    "mc_dropout": "lifelong_ens.ensembles.dropout:fit_mc_dropout",
    "deep": "lifelong_ens.ensembles.separate:fit_deep",
    "batch_ensemble": "lifelong_ens.ensembles.shared:fit_batch_ensemble",
    "hyper_deep": "lifelong_ens.ensembles.hyper_deep:fit_hyper_deep",
    "fixed_init_hyper": "lifelong_ens.ensembles.hyper_deep:fit_fixed_init_hyper",
    "hyper_batch": "lifelong_ens.ensembles.hyper_batch:fit_hyper_batch",
    "self_tuning": "lifelong_ens.ensembles.hyper_batch:fit_self_tuning",
    "dst": "lifelong_ens.ensembles.freetickets:fit_dst",
    "edst": "lifelong_ens.ensembles.freetickets:fit_edst",
    "static_sparse": "lifelong_ens.ensembles.freetickets:fit_static_sparse",
    "prune_finetune": "lifelong_ens.ensembles.freetickets:fit_prune_finetune",
    "structured": "lifelong_ens.ensembles.structured:fit_structured",
}
# what a saved ensemble is -> the class that loads it
KINDS: dict[str, str] = {
    "dropout": "lifelong_ens.ensembles.dropout:DropoutNetwork",
    "hyper_batch": "lifelong_ens.ensembles.hyper_ensemble:HyperBatchEnsemble",
    "separate": "lifelong_ens.ensembles.separate:SeparateNetworks",
    "shared": "lifelong_ens.ensembles.shared:SharedNetwork",
}

_WHERE = {target.rpartition(":")[2]: target for target in METHODS.values()}
_WHERE["Ensemble"] = "lifelong_ens.ensembles.ensemble:Ensemble"

__all__ = [
    "KINDS",
    "METHODS",
    "Ensemble",
    "fit_batch_ensemble",
    "fit_deep",
    "fit_dst",
    "fit_edst",
    "fit_fixed_init_hyper",
    "fit_hyper_batch",
    "fit_hyper_deep",
    "fit_mc_dropout",
    "fit_prune_finetune",
    "fit_self_tuning",
    "fit_single",
    "fit_single_equal_cost",
    "fit_static_sparse",
    "fit_structured",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is first asked for."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _WHERE[name].partition(":")
    return getattr(import_module(module), attribute)
