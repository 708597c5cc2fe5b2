"""Images decoded from their files on the way, against torchvision's data set in torch's loader."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from experiments.bench.measuring import Call, Goal, Race
from lifelong_ens.errors import InputError

OURS, LOADER = "split_imagenet, storage=files", "torchvision's ImageFolder in a DataLoader"
# of a photograph in ImageNet, about
PHOTO = (500, 375)
MARGIN = 256 / 224
# what a process of its own does: trained on without a network, task after task
_READ = """
import sys
import torch
from streams import split_imagenet
torch.set_num_threads(1)
root, size, workers, batch_size = sys.argv[1], *map(int, sys.argv[2:])
for one in split_imagenet(root=root, num_tasks=10, image_size=size, storage="files", workers=workers).train_stream:
    for _ in one.dataset.batches(torch.randperm(len(one.dataset)), batch_size):
        pass
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def streaming(
    device: torch.device,
    *,
    root: str | None = None,
    images: int = 256,
    workers: int = 2,
    batch_size: int = 64,
    image_size: int = 224,
    classes: Sequence[int] = (20, 100),
    images_per_class: int = 50,
) -> Iterator[Race]:
    """A stream decoded from files: time of an epoch against a DataLoader (1.2), peak memory with more classes (1.1).

    Both decode in as many workers, which start before they are timed; what is counted is elapsed time, since processes
    have clocks of their own. Memory is that of a process that reads all tasks and does nothing else (on Linux alone).

    Args:
        device: The CPU.
        root: Folder in ImageNet's layout with as many classes; photographs are made up where this is not given.
        images: In an epoch that is timed.
        workers: Threads of ours, processes of the DataLoader.
        batch_size: Images.
        image_size: Height and width after resizing and cropping.
        classes: Few and many, for the memory.
        images_per_class: Training images, for the memory.
    """
    with tempfile.TemporaryDirectory() as scratch:
        few, many = (_folder(Path(scratch) / f"{count}", count, images_per_class, root) for count in classes)
        count = min(images, classes[-1] * images_per_class)
        yield Race(
            f"{count} images to {image_size}x{image_size}, workers {workers}, batch {batch_size}",
            {
                OURS: lambda: _stream(many, count, workers, batch_size, image_size),
                LOADER: lambda: _loader(many, count, workers, batch_size, image_size),
            },
            (Goal(LOADER, "<=", 1.2),),
            timed=False,
        )
        names = {folder: f"{number} classes" for number, folder in zip(classes, (few, many), strict=True)}
        yield Race(
            f"peak memory, {images_per_class} images a class, batch {batch_size}",
            {names[folder]: _peak(folder, workers, batch_size, image_size) for folder in (many, few)},
            (Goal(names[few], "<=", 1.1),),
            unit="B",
            timed=False,
        )


def _folder(folder: Path, classes: int, images: int, root: str | None) -> Path:
    """ImageNet's layout with so many classes, made of links to a few photographs or to those of ``root``."""
    sources = _photographs(folder.parent / "photographs") if root is None else None
    found = [] if root is None else sorted(one for one in (Path(root) / "train").iterdir() if one.is_dir())
    if root is not None and len(found) < classes:
        raise InputError(f"{root}/train has {len(found)} class folders; {classes} are needed.")
    for number in range(classes):
        name = f"n{number:08}"
        files = sources or sorted(one for one in found[number].rglob("*") if one.is_file())
        for part, count in (("train", images), ("val", 1)):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                (folder / part / name / f"{name}_{i}.JPEG").symlink_to(
                    files[(i + number) % len(files)].resolve()
                )
    return folder


def _photographs(folder: Path, count: int = 8) -> list[Path]:
    """JPEG files of about 100 kB with coarse and fine structure."""
    paths = [folder / f"{number}.JPEG" for number in range(count)]
    if not folder.exists():
        folder.mkdir()
        random = np.random.default_rng(0)
        for path in paths:
            coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            pixels = np.asarray(coarse.resize(PHOTO, Image.Resampling.BICUBIC), dtype=np.int16)
            noise = random.integers(-12, 13, pixels.shape, dtype=np.int16)
            Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return paths


def _stream(root: Path, count: int, workers: int, batch_size: int, image_size: int) -> Call:
    from streams.imagenet import split_imagenet

    benchmark = split_imagenet(
        root=root, num_tasks=1, image_size=image_size, storage="files", workers=workers
    )
    dataset: Any = benchmark.train_stream[0].dataset
    return lambda: _seconds(dataset.batches(torch.randperm(len(dataset))[:count], batch_size))


def _loader(root: Path, count: int, workers: int, batch_size: int, image_size: int) -> Call:
    from torch.utils.data import DataLoader, RandomSampler
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    steps = [
        transforms.Resize(round(image_size * MARGIN)),
        transforms.CenterCrop(image_size),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    dataset = ImageFolder(str(root / "train"), transforms.Compose(steps))
    loader = DataLoader(
        dataset,
        batch_size,
        sampler=RandomSampler(dataset, num_samples=count),
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    _seconds(loader)
    return lambda: _seconds(loader)


def _seconds(batches: Iterable[Any]) -> float:
    start = time.perf_counter()
    for _ in batches:
        pass
    return time.perf_counter() - start


def _peak(root: Path, workers: int, batch_size: int, image_size: int) -> Any:
    """Builds the call that returns the bytes that a process of its own had in memory at most."""
    arguments = [str(root), str(image_size), str(workers), str(batch_size)]

    def peak() -> int:
        done = subprocess.run(
            [sys.executable, "-c", _READ, *arguments], capture_output=True, text=True, check=True
        )
        return 1024 * int(done.stdout)

    return lambda: peak
