"""Efficient ensembles: each method is one function that trains its members and returns an ``Ensemble``.

Importing this loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lifelong_ens.ensembles.ensemble import Ensemble
    from lifelong_ens.ensembles.separate import fit_deep, fit_single, fit_single_equal_cost

# the name on the command line -> where its function is
METHODS: dict[str, str] = {
    "single": "lifelong_ens.ensembles.separate:fit_single",
    "single_equal_cost": "lifelong_ens.ensembles.separate:fit_single_equal_cost",
    "deep": "lifelong_ens.ensembles.separate:fit_deep",
}
# what a saved ensemble is -> the class that loads it
KINDS: dict[str, str] = {"separate": "lifelong_ens.ensembles.separate:SeparateNetworks"}

_WHERE = {target.rpartition(":")[2]: target for target in METHODS.values()}
_WHERE["Ensemble"] = "lifelong_ens.ensembles.ensemble:Ensemble"

__all__ = ["KINDS", "METHODS", "Ensemble", "fit_deep", "fit_single", "fit_single_equal_cost"]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is first asked for."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _WHERE[name].partition(":")
    return getattr(import_module(module), attribute)
