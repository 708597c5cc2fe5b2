"""Images to show of every task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from lifelong_ens.report.samples import PER_TASK, has_samples, write_samples


def keep_samples(tests: list[Any], out: Path, setting: str, seed: int) -> None:
    """Keep a few test images of every task, of classes as different as there are; once for every setting.

    Args:
        tests: A data set for each task, ``batch(index)`` of which gives images ``(n, C, H, W)`` and labels, or
            whose items begin with these.
        out: The folder.
        setting: Of the comparison.
        seed: That the tasks were made with.
    """
    if has_samples(out, setting):
        return
    shown = [_first_of_classes(test) for test in tests]
    if all(one.ndim == 4 and one.shape == shown[0].shape for one in shown):
        write_samples(out, setting, seed, np.stack(shown))


def _first_of_classes(test: Any) -> np.ndarray:
    """``(images, C, H, W)``, sorted by class, classes spread evenly."""
    labels = torch.as_tensor(test.labels if hasattr(test, "labels") else list(test.targets))
    order = labels.argsort(stable=True)
    chosen = order[torch.linspace(0, len(order) - 1, PER_TASK).round().long()]
    if hasattr(test, "batch"):
        images = test.batch(chosen)[0]
    else:
        images = torch.stack([torch.as_tensor(test[i][0]) for i in chosen.tolist()])
    return images.float().numpy()
