"""Runs of a folder that have no record: not started, still running, stopped on their way, or failed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lifelong_ens.report.status import FOLDER, read_about, status_of


@dataclass(frozen=True)
class Unfinished:
    """A run without a record.

    Attributes:
        label: The strategy or method with its options and seed, or the name of the run's files.
        setting: What it would have been compared with; empty where that is not known.
        state: ``failed``, ``running``, ``partial`` or ``missing``.
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
    about = read_about(folder / FOLDER / f"{key}.json")
    options = ", ".join(f"{name}={value}" for name, value in (about.get("options") or {}).items())
    named = f"{about['name']}({options})" if options else about.get("name", key)
    label = f"{named}, seed {about['seed']}" if "seed" in about else key
    state, reason = _state(folder, key, about)
    return Unfinished(label, about.get("setting", ""), state, reason)


def _state(folder: Path, key: str, about: dict) -> tuple[str, str]:
    """How it stands with a run, in a word and in words."""
    status, done = status_of(about), reached(folder, key)
    if status.state == "failed":
        return "failed", status.reason
    kept = f"{done} are kept" if done else "no task is finished"
    if status.state == "running":
        return "running", f"was in {status.where() or 'its beginning'} when this was written; {kept}"
    if status.state == "stopped" and status.where():
        return "partial" if done else "missing", f"stopped in {status.where()}; {kept}"
    return ("partial", f"stopped after {done}") if done else ("missing", "did not finish a task")


def reached(folder: Path, key: str) -> str:
    """How far the newest checkpoint of a run is, ``2 of 5 tasks``; empty if there is none."""
    for path in sorted((folder / "checkpoints" / key).glob("task_*.json"), reverse=True):
        progress = read_about(path).get("progress", {})
        if progress:
            return f"{len(progress.get('tasks', []))} of {progress.get('num_tasks', '?')} tasks"
    return ""
