"""The comparison of efficient ensembles: data, cells, evaluation, records. Importing this loads no torch."""

from __future__ import annotations

# the name of a data set on the command line -> the stream whose images it is
STREAMS = {
    "digits": "split_digits",
    "mnist": "split_mnist",
    "fashion_mnist": "split_fashion_mnist",
    "cifar10": "split_cifar10",
    "cifar100": "split_cifar100",
    "tiny_imagenet": "split_tiny_imagenet",
    "image_folder": "image_folder",
}
