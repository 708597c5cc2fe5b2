"""Streams of tasks: each builder returns an Avalanche benchmark. Importing this loads no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streams.arrays import from_arrays
    from streams.cifar import split_cifar10, split_cifar100
    from streams.digits import split_digits
    from streams.folder import domain_folder, image_folder
    from streams.imagenet import split_imagenet, split_tiny_imagenet
    from streams.mnist import permuted_mnist, rotated_mnist, split_fashion_mnist, split_mnist
    from streams.table import image_table
    from streams.webdataset import image_shards

BUILDERS: dict[str, str] = {
    "split_digits": "streams.digits:split_digits",
    "split_mnist": "streams.mnist:split_mnist",
    "permuted_mnist": "streams.mnist:permuted_mnist",
    "rotated_mnist": "streams.mnist:rotated_mnist",
    "split_fashion_mnist": "streams.mnist:split_fashion_mnist",
    "split_cifar10": "streams.cifar:split_cifar10",
    "split_cifar100": "streams.cifar:split_cifar100",
    "split_tiny_imagenet": "streams.imagenet:split_tiny_imagenet",
    "split_imagenet": "streams.imagenet:split_imagenet",
    "image_folder": "streams.folder:image_folder",
    "domain_folder": "streams.folder:domain_folder",
    "image_table": "streams.table:image_table",
    "image_shards": "streams.webdataset:image_shards",
    "from_arrays": "streams.arrays:from_arrays",
}

__all__ = [
    "BUILDERS",
    "domain_folder",
    "from_arrays",
    "image_folder",
    "image_shards",
    "image_table",
    "permuted_mnist",
    "rotated_mnist",
    "split_cifar10",
    "split_cifar100",
    "split_digits",
    "split_fashion_mnist",
    "split_imagenet",
    "split_mnist",
    "split_tiny_imagenet",
]


def __getattr__(name: str) -> Any:
    """Import a builder when it is first asked for."""
    if name not in BUILDERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, function = BUILDERS[name].split(":")
    return getattr(import_module(module), function)


def __dir__() -> list[str]:
    return sorted(__all__)
