"""The published constants a second time, in the order of the published code, severity by severity."""

from __future__ import annotations

import pytest

from lifelong_ens.corruptions import tables

# make_cifar_c.py, make_tinyimagenet_c.py and make_imagenet_c.py of hendrycks/robustness
FIRST_AND_LAST = {
    "CIFAR": {
        "gaussian_noise": [0.04, 0.10],
        "shot_noise": [500, 50],
        "impulse_noise": [0.01, 0.07],
        "brightness": [0.05, 0.3],
        "contrast": [0.75, 0.15],
        "pixelate": [0.95, 0.65],
        "jpeg_compression": [80, 40],
    },
    "TINY_IMAGENET": {
        "gaussian_noise": [0.04, 0.18],
        "shot_noise": [250, 15],
        "impulse_noise": [0.01, 0.14],
        "brightness": [0.1, 0.5],
        "contrast": [0.4, 0.05],
        "pixelate": [0.9, 0.5],
        "jpeg_compression": [65, 25],
    },
    "IMAGENET": {
        "gaussian_noise": [0.08, 0.38],
        "shot_noise": [60, 3],
        "impulse_noise": [0.03, 0.27],
        "brightness": [0.1, 0.5],
        "contrast": [0.4, 0.05],
        "pixelate": [0.6, 0.25],
        "jpeg_compression": [25, 7],
    },
}
# sums over the severities of every constant of an entry, added up by hand from the published lists
SUMS = {
    "CIFAR": {
        "defocus_blur": (3.7, 1.8),
        "glass_blur": (1.35, 5, 7),
        "motion_blur": (35, 9),
        "snow": (0.9, 1.3, 7.25, 2.9, 54, 29, 4.4),
        "frost": (4.5, 1.75, 1.0),
        "fog": (3.95, 12.25),
        "elastic_transform": (0.33, 0.33, 0.29),
    },
    "TINY_IMAGENET": {
        "defocus_blur": (8.5, 0.91),
        "glass_blur": (2.8, 7, 7),
        "motion_blur": (52, 10),
        "snow": (0.9, 1.3, 7.25, 2.9, 54, 29, 3.55),
        "frost": (4.15, 2.2, 1.5),
        "fog": (5.6, 12.25),
        "elastic_transform": (0.41, 0.44, 0.25),
    },
    "IMAGENET": {
        "defocus_blur": (31, 2.1),
        "glass_blur": (5.2, 12, 10),
        "motion_blur": (75, 43),
        "snow": (1.95, 1.5, 16, 3.6, 58, 36, 3.4),
        "frost": (3.75, 3.15, 5),
        "fog": (11.5, 8.6),
    },
}


@pytest.mark.parametrize("name", SUMS)
def test_constants_are_the_published_ones(name: str) -> None:
    table = getattr(tables, name)
    for corruption, ends in FIRST_AND_LAST[name].items():
        assert [table[corruption][0][0], table[corruption][4][0]] == ends
    for corruption, sums in SUMS[name].items():
        found = [sum(column) for column in zip(*table[corruption], strict=True)]
        assert found == pytest.approx(list(sums)), corruption


def test_zooms_are_what_arange_gives() -> None:
    assert [len(factors) for factors in tables.CIFAR["zoom_blur"]] == [7, 12, 16, 21, 26]
    assert [len(factors) for factors in tables.IMAGENET["zoom_blur"]] == [12, 16, 11, 13, 11]
    assert tables.CIFAR["zoom_blur"] == tables.TINY_IMAGENET["zoom_blur"]
    assert [round(factors[-1], 2) for factors in tables.CIFAR["zoom_blur"]] == [1.06, 1.11, 1.15, 1.2, 1.25]


def test_lengths_of_the_elastic_transform_at_the_published_size() -> None:
    lengths = [[224 * part for part in entry] for entry in tables.IMAGENET["elastic_transform"]]
    published = [
        [488, 170.8, 24.4],
        [488, 19.52, 48.8],
        [12.2, 2.44, 4.88],
        [17.08, 2.44, 4.88],
        [29.28, 2.44, 4.88],
    ]
    assert lengths == [pytest.approx(entry) for entry in published]
