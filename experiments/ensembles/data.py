"""Images to train, choose and test on, and other images that a network should not be sure about."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments import catalogue
from experiments.compare import taken
from experiments.ensembles import STREAMS
from lifelong_ens.errors import InputError
from lifelong_ens.training.data import ImageData

log = logging.getLogger(__name__)

# a test set of foreign images need not be larger to tell two ensembles apart
MAX_FOREIGN = 10_000


@dataclass(frozen=True)
class Images:
    """One classification problem.

    Attributes:
        name: Of the data set.
        train: Training images.
        validation: Held out of the training images.
        test: Test images.
        class_names: Of the labels.
        foreign: Other test images, without labels that mean anything here, by name.
    """

    name: str
    train: ImageData
    validation: ImageData
    test: ImageData
    class_names: tuple[str, ...]
    foreign: dict[str, ImageData]


def reader(name: str) -> Callable[..., Any]:
    """The builder of the stream that has a data set's images, with its options.

    Raises:
        InputError: There is no such data set.
    """
    if name not in STREAMS:
        raise InputError(f"unknown data {name!r}; choose from {', '.join(STREAMS)}.")
    return catalogue.load(catalogue.target_of("stream", STREAMS[name]))


def read_images(name: str, options: dict[str, Any], held_out: int = 0) -> Images:
    """Training, validation and test images.

    Args:
        name: Of the data set.
        options: Of its stream: ``root``, ``validation``, ``limit``, ``image_size``.
        held_out: So many last classes are left out of everything and are foreign images, ``held_out``.

    Raises:
        InputError: There are no images, or too few of them.
    """
    build = reader(name)
    if not 0 < options.get("validation", 0.1) < 1:
        raise InputError("validation images are needed: give a fraction such as --validation 0.1.")
    benchmark = build(**taken(build, {"num_tasks": 1, "seed": 0, "validation": 0.1, **options}))
    classes = torch.tensor(benchmark.classes[0])
    parts = {}
    for part in ("train", "valid", "test"):
        data = benchmark.streams[part][0].dataset.image_data
        # a stream of one task shuffles its classes; here they have their own ids
        parts[part] = replace(data, labels=classes[data.labels])
    names = tuple(
        name for _, name in sorted(zip(benchmark.classes[0], benchmark.class_names[0], strict=True))
    )
    foreign: dict[str, ImageData] = {}
    if held_out:
        if not 0 < held_out <= len(names) - 2:
            raise InputError(
                f"held_out is {held_out}; expected 1 to {len(names) - 2} of {len(names)} classes."
            )
        kept = len(names) - held_out
        foreign["held_out"] = _where(parts["test"], parts["test"].labels >= kept)
        parts = {part: _where(data, data.labels < kept) for part, data in parts.items()}
        names = names[:kept]
    images = Images(name, parts["train"], parts["valid"], parts["test"], names, foreign)
    _check(images)
    return images


def _where(data: ImageData, mask: Tensor) -> ImageData:
    return data.subset(mask.nonzero().squeeze(1))


def _check(images: Images) -> None:
    counts = torch.bincount(images.train.labels, minlength=len(images.class_names))
    if bool((missing := counts == 0).any()):
        names = [images.class_names[index] for index in missing.nonzero().flatten().tolist()]
        raise InputError(f"no training images of {', '.join(names[:5])}: every class needs some.")


def read_foreign(name: str, root: Path | None, like: Images) -> ImageData:
    """Test images of another data set, in the size, channels and scale of ``like``.

    Args:
        name: A data set, or what the images in ``root`` are to be called.
        root: Where its images are: as the data set has them, or class folders, which may be in ``test/`` or ``val/``,
            or MNIST's format (``t10k-images-idx3-ubyte``), in which notMNIST comes.
        like: What the networks were trained on.

    Raises:
        InputError: There are no images.
    """
    if name in STREAMS:
        where = {} if root is None else {"root": str(root)}
        pixels = _test_pixels(reader(name), where)
    elif root is None:
        known = ", ".join(STREAMS)
        raise InputError(f"--ood {name}: say where its images are, --ood {name}=DIR, or name one of {known}.")
    else:
        pixels = _folder_pixels(root, like.test.image_shape[1])
    if pixels.shape[1:] != like.test.image_shape:
        log.info(
            "%s: images of %s are made %s", name, _shape(pixels.shape[1:]), _shape(like.test.image_shape)
        )
        pixels = fitted(pixels, like.test.image_shape)
    labels = torch.zeros(len(pixels), dtype=torch.long)
    return ImageData(pixels, torch.arange(len(pixels)), labels, like.test.mean, like.test.std)


def _folder_pixels(root: Path, size: int) -> Tensor:
    """All test images below a folder, uint8 ``(n, C, H, W)``."""
    from torchvision.datasets.mnist import read_image_file

    idx = sorted(root.rglob("t10k-images-idx3-ubyte"))
    if idx:
        try:
            return read_image_file(str(idx[0]))[:, None][:MAX_FOREIGN]
        except (ValueError, AssertionError, TypeError, RuntimeError) as error:
            raise InputError(f"{idx[0]} is not a whole file of images: {error}") from error
    parts = [root / part for part in ("test", "val") if (root / part).is_dir()]
    # nearly all of a folder without parts is for testing; one image of each class cannot be
    folder = {"root": str(parts[0] if parts else root), "test_fraction": 0.99, "image_size": size}
    return _test_pixels(reader("image_folder"), folder)


def _test_pixels(build: Callable[..., Any], options: dict[str, Any]) -> Tensor:
    benchmark = build(**taken(build, {"num_tasks": 1, "seed": 0, **options}))
    data: ImageData = benchmark.streams["test"][0].dataset.image_data
    return data.images.index_select(0, data.rows[:: -(-len(data) // MAX_FOREIGN)])


def fitted(pixels: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """uint8 images ``(n, C, H, W)`` in another shape ``(C, H, W)``: smoothly resized, grey as the mean of channels."""
    channels, height, width = shape
    values = pixels.float()
    if values.shape[1] != channels:
        values = values.mean(dim=1, keepdim=True).expand(-1, channels, -1, -1)
    if tuple(values.shape[2:]) != (height, width):
        values = F.interpolate(values, size=(height, width), mode="bilinear", antialias=True)
    return values.round().clamp(0, 255).to(torch.uint8)


def _shape(shape: Any) -> str:
    return "x".join(map(str, shape))
