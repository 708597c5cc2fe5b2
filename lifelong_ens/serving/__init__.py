"""Trained tasks as a folder, and the model that answers from it. Importing this loads no torch.

Needs torch, safetensors and numpy; to read image files, Pillow.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lifelong_ens.serving.description import Description, ImageInput
    from lifelong_ens.serving.export import export_network
    from lifelong_ens.serving.model import ServedModel
    from lifelong_ens.serving.store import Task, TaskStore

_WHERE = {
    "Description": "lifelong_ens.serving.description",
    "ImageInput": "lifelong_ens.serving.description",
    "ServedModel": "lifelong_ens.serving.model",
    "Task": "lifelong_ens.serving.store",
    "TaskStore": "lifelong_ens.serving.store",
    "export_network": "lifelong_ens.serving.export",
}

__all__ = ["Description", "ImageInput", "ServedModel", "Task", "TaskStore", "export_network"]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is first asked for."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
