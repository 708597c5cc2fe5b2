"""Runs of a folder that have no record: not started, stopped on their way, or failed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lifelong_ens.errors import DamagedFileError
from lifelong_ens.store import read_json

FOLDER = "unfinished"
SCHEMA = 1


@dataclass(frozen=True)
class Unfinished:
    """A run without a record.

    Attributes:
        label: The strategy or method with its options and seed, or the name of the run's files.
        setting: What it would have been compared with; empty where that is not known.
        state: ``failed``, ``partial`` or ``missing``.
        reason: In words.
    """

    label: str
    setting: str
    state: str
    reason: str


def find_unfinished(out: str | os.PathLike[str]) -> list[Unfinished]:
    """What was announced in a folder, or left a checkpoint there, and has no record."""
    folder = Path(out)
    keys = {path.stem for path in (folder / FOLDER).glob("*.json")}
    keys |= {path.parent.name for path in (folder / "checkpoints").glob("*/task_*.json")}
    finished = {path.stem for path in (folder / "records").glob("*.json")}
    return [_unfinished(folder, key) for key in sorted(keys - finished)]


def _unfinished(folder: Path, key: str) -> Unfinished:
    about = _read(folder / FOLDER / f"{key}.json")
    options = ", ".join(f"{name}={value}" for name, value in (about.get("options") or {}).items())
    named = f"{about['name']}({options})" if options else about.get("name", key)
    label = f"{named}, seed {about['seed']}" if "seed" in about else key
    reached = _reached(folder / "checkpoints" / key)
    if about.get("problem"):
        return Unfinished(label, about.get("setting", ""), "failed", str(about["problem"]))
    if reached:
        return Unfinished(label, about.get("setting", ""), "partial", f"stopped after {reached}")
    return Unfinished(label, about.get("setting", ""), "missing", "did not finish a task")


def _reached(checkpoints: Path) -> str:
    """How far the newest checkpoint is; empty if there is none."""
    for path in sorted(checkpoints.glob("task_*.json"), reverse=True):
        progress = _read(path).get("progress", {})
        if progress:
            return f"{len(progress.get('tasks', []))} of {progress.get('num_tasks', '?')} tasks"
    return ""


def _read(path: Path) -> dict[str, Any]:
    """What stands in a file; nothing where there is none or it cannot be read."""
    try:
        found = read_json(path)
    except (DamagedFileError, FileNotFoundError):
        return {}
    return found if isinstance(found, dict) else {}
