from __future__ import annotations

import pytest
import torch

from lifelong_ens.corruptions import noise

GREY = torch.full((8, 3, 32, 32), 100.0)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_gaussian_noise_has_its_standard_deviation() -> None:
    added = noise.gaussian_noise(GREY, seeded(), 0.1) - GREY
    assert added.mean().item() == pytest.approx(0, abs=0.6)
    assert added.std().item() == pytest.approx(25.5, rel=0.02)


def test_shot_noise_counts_photons() -> None:
    shot = noise.shot_noise(GREY, seeded(), 50) / 255 * 50
    torch.testing.assert_close(shot, shot.round())  # whole photons
    mean = 100 / 255 * 50
    assert shot.mean().item() == pytest.approx(mean, rel=0.01)
    assert shot.var().item() == pytest.approx(mean, rel=0.05)  # of a Poisson process
    assert (noise.shot_noise(torch.zeros(1, 3, 8, 8), seeded(), 50) == 0).all()


def test_impulse_noise_hits_its_share_of_the_values() -> None:
    hit = noise.impulse_noise(GREY, seeded(), 0.07)
    assert hit.unique().tolist() == [0, 100, 255]
    assert (hit == 0).float().mean().item() == pytest.approx(0.035, rel=0.1)
    assert (hit == 255).float().mean().item() == pytest.approx(0.035, rel=0.1)
    channels = (hit != GREY).sum(dim=1)
    assert (channels == 1).sum() > 10 * (channels == 3).sum()  # channels are hit one by one
