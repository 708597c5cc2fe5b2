from __future__ import annotations

import colorsys

import pytest
import torch

from lifelong_ens.corruptions import weather

IMAGES = torch.randint(256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0)).float()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_brightness_changes_the_value_of_hsv_alone() -> None:
    images = IMAGES.clone()
    images[0, :, 0, 0] = 0  # black has no hue
    brighter = weather.brightness(images, seeded(), 0.2)
    for before, after in zip(images[0].flatten(1).T / 255, brighter[0].flatten(1).T / 255, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*before.tolist())
        expected = colorsys.hsv_to_rgb(hue, saturation, min(value + 0.2, 1))
        assert after.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("shape", [(8, 8), (32, 32), (20, 33)])
def test_clouds_fill_the_range_and_are_smoother_the_greater_the_decay(shape: tuple[int, int]) -> None:
    images = torch.zeros(30, 3, *shape)
    roughness = []
    for decay in (1.4, 2.0, 3.0):
        clouds = weather.plasma(images, seeded(), decay)
        assert clouds.shape[1] == clouds.shape[2] >= max(shape)
        assert clouds.amin(dim=(1, 2)).eq(0).all()
        assert clouds.amax(dim=(1, 2)).eq(1).all()
        roughness.append(clouds.diff(dim=1).abs().mean().item() / clouds.std().item())
    assert roughness[0] > roughness[1] > roughness[2]


def test_plasma_equals_the_rule_pixel_by_pixel() -> None:
    """Centres are means of their square's corners, sides of their diamond's, on a torus, each with its noise."""
    decay, side = 2.0, 8
    ours = weather.plasma(torch.zeros(1, 3, side, side), seeded(), decay)[0].double()
    generator, cloud = seeded(), torch.zeros(side, side, dtype=torch.float64)
    step, amplitude = side, 1e4
    while step >= 2:
        half, count = step // 2, side // step
        noise = [
            ((torch.rand(1, count, count, generator=generator) * 2 - 1) * amplitude)[0].double()
            for _ in range(3)
        ]
        cells = [(i, j) for i in range(count) for j in range(count)]

        def mean(y: int, x: int, dy: int, dx: int) -> float:
            around = (
                ((dy, dx), (-dy, dx), (dy, -dx), (-dy, -dx)) if dy and dx else ((dy + dx, 0), (-dy - dx, 0))
            )
            around = around if dy and dx else (*around, (0, dy + dx), (0, -dy - dx))
            return sum(float(cloud[(y + a) % side, (x + b) % side]) for a, b in around) / 4

        for i, j in cells:
            y, x = i * step + half, j * step + half
            cloud[y, x] = mean(y, x, half, half) + noise[0][i, j]
        for i, j in cells:
            y, x = i * step, j * step + half
            cloud[y, x] = mean(y, x, half, 0) + noise[1][i, j]
        for i, j in cells:
            y, x = i * step + half, j * step
            cloud[y, x] = mean(y, x, half, 0) + noise[2][i, j]
        step, amplitude = half, amplitude / decay**2
    expected = (cloud - cloud.min()) / (cloud.max() - cloud.min())
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_fog_keeps_the_largest_value_as_bound() -> None:
    dark = IMAGES / 2
    foggy = weather.fog(dark, seeded(), 1.5, 1.75)
    assert (foggy.amax(dim=(1, 2, 3)) <= dark.amax(dim=(1, 2, 3)) + 1e-3).all()
    assert (weather.fog(torch.zeros(1, 3, 8, 8), seeded(), 1.5, 1.75) == 0).all()


def test_flakes_are_bright_and_come_twice_turned_by_half() -> None:
    black = torch.zeros(3, 3, 32, 32)
    snow = weather.snow(black, seeded(), 0.1, 0.2, 1, 0.5, 10, 4, 1.0)
    torch.testing.assert_close(snow, snow.flip(2, 3))
    assert (snow >= 0).all()
    assert (snow > 0).float().mean() < 0.5
    # without flakes: the image whitened by its luminance
    plain = weather.snow(IMAGES, seeded(), 0.0, 0.0, 1, 0.5, 10, 4, 0.8)
    grey = 0.299 * IMAGES[:, 0] + 0.587 * IMAGES[:, 1] + 0.114 * IMAGES[:, 2]
    expected = 0.8 * IMAGES + 0.2 * torch.maximum(IMAGES, (1.5 * grey + 127.5)[:, None])
    torch.testing.assert_close(plain, expected)


def test_frost_has_the_brightness_contrast_and_grain_of_the_photographs() -> None:
    for scale, side in ((0.2, 32), (0.3, 64)):
        frost = weather.frost_texture(torch.zeros(200, 3, side, side), seeded(), scale)
        assert frost.min() >= 0
        assert frost.max() <= 255
        colour = (frost / 255).mean(dim=(0, 2, 3))
        torch.testing.assert_close(colour, torch.tensor([0.572, 0.656, 0.702]), rtol=0, atol=0.03)
        brightness = (frost / 255).mean(dim=1)
        assert brightness.std(dim=(1, 2)).mean().item() == pytest.approx(0.087, abs=0.015)
        centred = brightness - brightness.mean(dim=(1, 2), keepdim=True)
        variance = centred.square().mean(dim=(1, 2))
        near, far = ((centred[..., k:] * centred[..., :-k]).mean(dim=(1, 2)) / variance for k in (1, 4))
        assert 0.35 < near.mean() < 0.65  # measured on the photographs: 0.36 and 0.58
        assert 0.1 < far.mean() < 0.4  # 0.20 and 0.37


def test_frost_is_the_weighted_sum() -> None:
    texture = weather.frost_texture(IMAGES, seeded(), 0.2)
    torch.testing.assert_close(
        weather.frost(IMAGES, seeded(), 0.75, 0.45, 0.2), 0.75 * IMAGES + 0.45 * texture
    )
