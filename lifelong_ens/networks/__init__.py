"""Networks: plain ones, and those that grow by a task at a time."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lifelong_ens.networks.imagenet import resnet50
    from lifelong_ens.networks.plain import lenet5, mlp, resnet18, resnet20, resnet32, vgg11_half, wrn28_10

# the name on the command line -> where its builder is
BUILDERS: dict[str, str] = {
    "mlp": "lifelong_ens.networks.plain:mlp",
    "lenet5": "lifelong_ens.networks.plain:lenet5",
    "resnet18": "lifelong_ens.networks.plain:resnet18",
    "resnet20": "lifelong_ens.networks.plain:resnet20",
    "resnet32": "lifelong_ens.networks.plain:resnet32",
    "resnet50": "lifelong_ens.networks.imagenet:resnet50",
    "vgg11_half": "lifelong_ens.networks.plain:vgg11_half",
    "wrn28_10": "lifelong_ens.networks.plain:wrn28_10",
}

__all__ = [
    "BUILDERS",
    "lenet5",
    "mlp",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet50",
    "vgg11_half",
    "wrn28_10",
]


def __getattr__(name: str) -> Any:
    """Import a builder when it is first asked for."""
    if name not in BUILDERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, function = BUILDERS[name].partition(":")
    return getattr(import_module(module), function)
