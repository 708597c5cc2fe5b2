"""What tests of engines need."""

from __future__ import annotations

import pytest

from experiments.engines import torch_threads


@pytest.fixture(autouse=True)
def one_thread():
    """As workers have: other sums of floats are others in the last bits."""
    with torch_threads(1):
        yield
