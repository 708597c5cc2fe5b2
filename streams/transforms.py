"""What makes a task of the same images: a fixed permutation of pixels, or a rotation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample


@dataclass(frozen=True, eq=False)
class Permute:
    """Moves pixels, the same way in every channel.

    Attributes:
        index: Where pixel ``i`` comes from in the flattened image, int64 ``(H * W,)``.
    """

    index: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        """Permute a batch ``(batch, C, H, W)``."""
        flat = images.flatten(2).index_select(2, self.index.to(images.device))
        return flat.view(images.shape)


@dataclass(frozen=True)
class Rotate:
    """Rotates counter-clockwise about the centre, with bilinear interpolation.

    Attributes:
        degrees: The angle.
        background: Value of each channel where the image leaves the frame.
    """

    degrees: float
    background: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """Rotate a batch ``(batch, C, H, W)``."""
        angle = math.radians(self.degrees)
        height, width = images.shape[-2:]
        # the grid's units are half the image's sides, so a rotation needs their ratio
        matrix = torch.tensor(
            [
                [math.cos(angle), -math.sin(angle) * height / width, 0.0],
                [math.sin(angle) * width / height, math.cos(angle), 0.0],
            ],
            device=images.device,
            dtype=images.dtype,
        )
        grid = affine_grid(matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False)
        background = torch.tensor(self.background, device=images.device, dtype=images.dtype).view(-1, 1, 1)
        # what grid_sample reads outside the frame is zero
        return grid_sample(images - background, grid, align_corners=False).add_(background)
