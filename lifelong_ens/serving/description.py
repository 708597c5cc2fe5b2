"""What a served model is: the network, what of it tasks have for themselves, and the images it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any, get_args, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn

from lifelong_ens.errors import DamagedFileError, InputError, nearest
from lifelong_ens.images import crop_to_shape, read_image, resize
from lifelong_ens.networks import BUILDERS
from lifelong_ens.networks.layout import Layout
from lifelong_ens.networks.plain import without_classifier

FORMAT = 1

BuildNetwork = Callable[[], nn.Module]


@dataclass(frozen=True)
class ImageInput:
    """How an image becomes what the network was trained on.

    Attributes:
        shape: ``(C, H, W)``.
        mean: Of each channel, on the scale 0..255.
        std: Likewise.
        crop_margin: As in ``read_image`` where training read files; None where it resized arrays.
    """

    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_margin: float | None = None

    def read(self, path: str) -> np.ndarray:
        """An image file as uint8 ``(C, H, W)``, upright, in the colours and size of training.

        Raises:
            InputError: It cannot be decoded, or the model reads images that no file holds.
        """
        channels, *size = self.shape
        if channels not in (1, 3):
            raise InputError(
                f"this model reads images of {channels} channels; give them as tensors, from Python."
            )
        if self.crop_margin is not None and size[0] == size[1]:
            return read_image(path, size[0], self.crop_margin, channels=channels)
        shape = (size[0], size[1])
        image = crop_to_shape(read_image(path, None, channels=channels), shape)
        return resize(image[None], shape)[0]

    def normalised(self, images: Tensor) -> Tensor:
        """Bytes ``(batch, C, H, W)`` as training normalised them, float32."""
        mean, std = (torch.tensor(one, device=images.device).view(-1, 1, 1) for one in (self.mean, self.std))
        return images.float().sub_(mean).div_(std)


@dataclass(frozen=True)
class Description:
    """What ``model.json`` says.

    Attributes:
        network: ``name`` and ``options`` of a builder; its classifier is taken off.
        base: sha256 (hex) of the tensors that all tasks share.
        layout: What tasks have for themselves; None where every task is a network of its own.
        members_per_task: How many members a task holds.
        images: What image files become; None where that is not known.
    """

    network: Mapping[str, Any]
    base: str
    layout: Layout | None
    members_per_task: int = 1
    images: ImageInput | None = None

    @property
    def image_shape(self) -> tuple[int, ...] | None:
        """``(C, H, W)`` of what the network reads, if that is known."""
        given = self.network["options"].get("input_shape")
        if self.images is not None:
            return self.images.shape
        return None if given is None else tuple(given)

    def to_json(self) -> dict[str, Any]:
        """For ``from_json``."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, value: Any, source: str) -> Description:
        """What ``to_json`` gave; ``source`` names it in errors.

        Raises:
            DamagedFileError: It is of a newer format, or something else.
        """
        if not isinstance(value, Mapping) or not isinstance(value.get("format"), int):
            raise DamagedFileError(f"{source} does not describe a model; export it again.")
        if value["format"] > FORMAT:
            raise DamagedFileError(
                f"{source} has format {value['format']}, this version reads up to {FORMAT}; upgrade lifelong-ens."
            )
        try:
            return cls(
                network={"name": str(value["network"]["name"]), "options": dict(value["network"]["options"])},
                base=str(value["base"]),
                layout=None if value["layout"] is None else _layout(value["layout"]),
                members_per_task=_count(value["members_per_task"]),
                images=None if value["images"] is None else _images(value["images"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedFileError(
                f"{source} does not describe a model of this version ({error!r}); export it again."
            ) from error

    def build(self, build_network: BuildNetwork | None = None) -> nn.Module:
        """The body, untrained; torch's random generator is left as it was.

        Args:
            build_network: Makes it where the builder is not one of ours: no code that a file names is run.

        Raises:
            InputError: The builder is not one of ours, and no ``build_network`` was given.
        """
        with torch.random.fork_rng(devices=[]):
            body = (build_network or self._build_ours)()
        return without_classifier(body).requires_grad_(False).eval()

    def _build_ours(self) -> nn.Module:
        name, options = self.network["name"], self.network["options"]
        if name not in BUILDERS:
            raise InputError(
                f"{name!r} is no network of ours; give build_network= from Python, or {nearest(name, BUILDERS)}"
            )
        module, _, function = BUILDERS[name].partition(":")
        # JSON has no tuples
        options = {key: tuple(one) if isinstance(one, list) else one for key, one in options.items()}
        try:
            return getattr(import_module(module), function)(**options)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DamagedFileError(
                f"cannot build {name} as the model says: {error}; export it again."
            ) from error


def _layout(value: Mapping[str, Any]) -> Layout:
    layout = Layout(**value)
    for name, kind in get_type_hints(Layout).items():
        choices = get_args(kind)
        given = getattr(layout, name)
        if given not in choices if choices else not isinstance(given, int) or given < 0:
            raise ValueError(f"{name} is {given!r}")
    return layout


def _images(value: Mapping[str, Any]) -> ImageInput:
    shape, mean, std = (tuple(value[name]) for name in ("shape", "mean", "std"))
    if len(shape) != 3 or not len(mean) == len(std) == shape[0] or min(map(_count, shape)) < 1:
        raise ValueError(f"images of {shape} with {len(mean)} means")
    margin = value["crop_margin"]
    return ImageInput(
        shape, tuple(map(float, mean)), tuple(map(float, std)), None if margin is None else float(margin)
    )


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{value!r} is no number of things")
    return value
