"""Speed and memory against named peers, a function for every row of the table; importing this loads no torch."""

from __future__ import annotations

from typing import Any

# the name on the command line -> the function that gives its races
ROWS: dict[str, str] = {
    "step_later_task": "experiments.bench.later_task:step_later_task",
    "saved_bytes": "experiments.bench.saved_bytes:saved_bytes_of_ensemble",
    "saved_bytes_frozen": "experiments.bench.saved_bytes:saved_bytes_of_later_task",
    "ensemble_inference": "experiments.bench.ensembles:ensemble_inference",
    "ensemble_training": "experiments.bench.ensembles:ensemble_training",
    "layers": "experiments.bench.layers:layers",
    "mixed_tasks": "experiments.bench.mixed_tasks:mixed_tasks",
    "add_task": "experiments.bench.adding:add_task",
    "exported": "experiments.bench.exported:exported",
    "structured": "experiments.bench.smaller:structured",
    "sparse": "experiments.bench.smaller:sparse",
    "loop": "experiments.bench.loop:loop",
    "evaluation": "experiments.bench.evaluation:evaluation",
    "streaming": "experiments.bench.streaming:streaming",
    "grid": "experiments.bench.grid:grid",
}
# rows of what runs on a CPU alone, or is nothing but Python
CPU_ONLY = frozenset({"sparse", "loop", "evaluation", "streaming", "grid"})
# what --quick changes beside the number of rounds
QUICK: dict[str, dict[str, Any]] = {
    "ensemble_inference": {"batch_sizes": (1, 32)},
    "add_task": {"tasks": (10, 100)},
    "loop": {"batch_sizes": (64,)},
    "evaluation": {"num_tasks": 20},
    "streaming": {"images_per_class": 10},
    "grid": {"epochs": 8},
}
