from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Record = dict[str, Any]


@pytest.fixture
def record() -> Callable[..., Record]:
    return make_record


def make_record(
    strategy: str = "finetune",
    seed: int = 0,
    accuracy: list[list[float | None]] | None = None,
    scale: int = 1,
    stream: str = "split_digits",
    setting: str = "a1b2c3d4",
    options: dict[str, Any] | None = None,
    fit: dict[str, Any] | None = None,
) -> Record:
    """A record whose costs are round numbers times ``scale``; tasks that the accuracy lacks have no row."""
    matrix = accuracy or [[0.9, None, None], [0.7, 0.8, None], [0.6, 0.75, 0.85]]
    trained = [i for i, row in enumerate(matrix) if row[i] is not None or any(v is not None for v in row)]
    costs = [
        {
            "trained_task": t,
            "component": name,
            "parameters": n * scale,
            "bytes": 4 * n * scale,
            "flops_forward": f,
        }
        for t in trained
        for name, n, f in (("shared", 1000, 50), ("head", 10 * (t + 1), 5), ("optimizer", 777, 0))
    ]
    tasks = [
        {
            "trained_task": t,
            "num_classes": 2,
            "flops_forward": 55 * scale,
            "flops_forward_rank1": 5,
            "flops_training": 1000 * (t + 1) * scale,
            "flops_training_rank1": 10 * (t + 1),
            "saved_bytes": 64 if t else 128,
            "disk_bytes": 5000 * scale + t,
            "seconds_training": 1.5 * (t + 1) * scale,
            "seconds_evaluation": 0.5 * (t + 1) * scale,
        }
        for t in trained
    ]
    return {
        "schema": 1,
        "stream": {
            "name": stream,
            "options": {"num_tasks": len(matrix)},
            "num_tasks": len(matrix),
            "classes": [[2 * t, 2 * t + 1] for t in range(len(matrix))],
        },
        "strategy": {"name": strategy, "options": options or {}},
        "network": {"name": "mlp", "options": {"width": 100}},
        "fit": fit or {"epochs": 1},
        "seed": seed,
        "setting": setting,
        "accuracy": matrix,
        "costs": costs,
        "tasks": tasks,
        "state_sha256": "0" * 64,
        "versions": {"torch": "2.9.0", "python": "3.11.7"},
        "commit": None,
        "device": "cpu",
        "started": "2025-01-01T00:00:00+00:00",
        "finished": "2025-01-01T00:01:00+00:00",
    }
