"""Real digits for tests of ensembles."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits

from lifelong_ens.training.data import ImageData


@pytest.fixture(scope="session")
def digits() -> tuple[ImageData, ImageData, ImageData]:
    """Scikit-learn's digits in train, validation and test: 400, 200 and 300 images."""
    bunch = load_digits()
    images = torch.from_numpy(bunch.images * 15.9).to(torch.uint8)[:, None]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    labels = torch.from_numpy(bunch.target).long()
    mean, std = torch.tensor([77.0]), torch.tensor([95.0])
    train, validation, test = order[:400], order[400:600], order[600:900]
    return tuple(ImageData(images, rows, labels[rows], mean, std) for rows in (train, validation, test))
