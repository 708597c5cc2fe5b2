"""Avalanche benchmarks over images in memory, read in whole batches."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from avalanche.benchmarks import CLScenario, EagerCLStream, benchmark_from_datasets, with_classes_timeline
from avalanche.benchmarks.scenarios.task_aware import with_task_labels
from avalanche.benchmarks.utils import ConstantSequence, TaskAwareSupervisedClassificationDataset, TaskLabels
from avalanche.benchmarks.utils.data_attribute import DataAttribute
from avalanche.benchmarks.utils.flat_data import FlatData, LazyIndices, LazyRange
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from lifelong_ens.errors import InputError
from lifelong_ens.training.data import ImageData

_CLASS_LISTS = ("classes_in_this_experience", "previous_classes", "classes_seen_so_far", "future_classes")


class SampleBatch(Sequence[tuple[Any, ...]]):
    """The samples of one batch, held as columns: images ``(batch, C, H, W)``, labels ``(batch,)``, more."""

    def __init__(self, columns: Sequence[Tensor]):
        self.columns = list(columns)

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return SampleBatch([column[index] for column in self.columns])
        return tuple(c[index] if c.dim() > 1 else c[index].item() for c in self.columns)


def collate(samples: Sequence[Any]) -> list[Tensor]:
    """The columns of a batch; nothing is stacked when it was gathered whole."""
    return samples.columns if isinstance(samples, SampleBatch) else default_collate(list(samples))


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """One ``ImageData`` as a torch dataset of (normalised image ``(C, H, W)``, label)."""

    collate_fn = staticmethod(collate)

    def __init__(self, images: ImageData):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.images.batch(torch.tensor([index]))
        return images[0], int(labels[0])

    def __getitems__(self, indices: Sequence[int]) -> SampleBatch:
        """All samples at ``indices``, gathered at once."""
        return SampleBatch(self.images.batch(torch.as_tensor(indices)))


@dataclass(frozen=True, eq=False)
class _Resolved:
    """Where a dataset's samples lie: sample ``i`` is ``parts[part[i]]`` at ``position[i]``."""

    flat: Any
    parts: list[ImageData]
    part: Tensor
    position: Tensor
    task_labels: Tensor


class StreamDataset(TaskAwareSupervisedClassificationDataset):
    """Samples (image, label, task label) that are gathered in whole batches.

    It stays one, and stays fast, after Avalanche's ``train``, ``eval``, ``subset`` and ``concat``: the tree
    of concatenations and subsets is resolved once, as arrays.
    """

    _resolved: _Resolved | None = None

    @classmethod
    def from_images(cls, images: ImageData, task: int) -> StreamDataset:
        """All of ``images`` as samples of one task."""
        targets = DataAttribute(cast(Any, images.labels.tolist()), "targets")
        # known here in one pass; Avalanche would visit every sample from Python
        targets._uniques = set(images.labels.unique().tolist())
        labels = TaskLabels(ConstantSequence(task, len(images)))
        return cls([ImageDataset(images)], data_attributes=[targets, labels], collate_fn=collate)  # pyright: ignore[reportArgumentType]

    def __hash__(self) -> int:
        return id(self)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.subset(range(*index.indices(len(self))))
        return tuple(super().__getitem__(int(index)))

    def __getitems__(self, indices: Sequence[int]) -> SampleBatch:
        """All samples at ``indices``, gathered at once, with every column that a single sample has."""
        index = torch.as_tensor(indices)
        images, labels, task_labels = self.batch(index)
        columns = [images, labels]
        for name, attribute in self._data_attributes.items():
            if name == "targets_task_labels":
                columns.append(task_labels)
            elif attribute.use_in_getitem:
                columns.append(default_collate([attribute[i] for i in index.tolist()]))
        return SampleBatch(columns)

    @property
    def image_data(self) -> ImageData | None:
        """The samples in their order as one selection; ``None`` where they need more than one store."""
        resolved = self._resolve()
        return resolved.parts[0] if resolved is not None and len(resolved.parts) == 1 else None

    def batch(self, index: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Normalised images ``(k, C, H, W)``, labels ``(k,)`` and task labels ``(k,)`` at ``index``."""
        resolved = self._resolve()
        if resolved is None:
            images, labels, task_labels = self._one_by_one(index)
            return images.to(device), labels.to(device), task_labels.to(device)
        task_labels = resolved.task_labels[index].to(device, non_blocking=True)
        if len(resolved.parts) == 1:
            return *resolved.parts[0].batch(index, device), task_labels
        return *_gather(resolved, index, device), task_labels

    def batches(
        self, order: Tensor, batch_size: int, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """What ``batch`` gives for the samples in this order, ``(n,)``, at most ``batch_size`` at a time."""
        resolved = self._resolve()
        if resolved is None or len(resolved.parts) > 1:
            for index in order.split(batch_size):
                yield self.batch(index, device)
            return
        task_labels = resolved.task_labels[order].to(device, non_blocking=True).split(batch_size)
        images = resolved.parts[0].subset(order).batches(batch_size, device)
        for (x, y), batch_task_labels in zip(images, task_labels, strict=True):
            yield x, y, batch_task_labels

    def _one_by_one(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        samples = [self[i] for i in index.tolist()]
        images = torch.stack([torch.as_tensor(sample[0]) for sample in samples])
        labels, task_labels = (torch.tensor([int(s[k]) for s in samples]) for k in (1, -1))
        return images, labels, task_labels

    def _resolve(self) -> _Resolved | None:
        """Find every sample's store; ``None`` where samples are foreign or transformed one by one."""
        # a copy of a dataset (train, eval, new attributes) has another flat tree, so it resolves anew
        if self._resolved is None or self._resolved.flat is not self._flat_data:
            self._resolved = _resolve(self)
        return self._resolved if self._resolved.parts else None


def _resolve(dataset: StreamDataset) -> _Resolved:
    leaves, leaf, position = _locate(dataset._flat_data)
    task_labels = _values(dataset._data_attributes["targets_task_labels"].data)
    group = dataset._flat_data._transform_groups.current_group
    if not all(isinstance(x, ImageDataset) for x in leaves) or _has_transforms(dataset._flat_data, group):
        leaves = []
    sources = [x.images for x in leaves]
    stores = {_store_key(images): images for images in sources}
    rows, labels = torch.empty_like(position), torch.empty_like(position)
    part = torch.zeros_like(position)
    for number, images in enumerate(sources):
        mine = (leaf == number).nonzero().squeeze(1)
        rows[mine], labels[mine] = images.rows[position[mine]], images.labels[position[mine]]
        part[mine] = list(stores).index(_store_key(images))
    parts = []
    for number, images in enumerate(stores.values()):
        mine = (part == number).nonzero().squeeze(1)
        position[mine] = torch.arange(len(mine))
        parts.append(_select(images, rows[mine], labels[mine]))
    return _Resolved(dataset._flat_data, parts, part, position, task_labels)


def _store_key(images: ImageData) -> Hashable:
    """Equal for samples that one gather can read."""
    scale = tuple(images.mean.tolist()), tuple(images.std.tolist())
    return id(images.images), scale, id(images.transform)


def _select(images: ImageData, rows: Tensor, labels: Tensor) -> ImageData:
    return ImageData(images.images, rows, labels, images.mean, images.std, images.transform)


def _gather(resolved: _Resolved, index: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Images and labels of samples that lie in several stores of one image shape."""
    part, position = resolved.part[index], resolved.position[index]
    shape = resolved.parts[0].image_shape
    images = torch.empty(len(index), *shape, device=device)
    labels = torch.empty(len(index), dtype=torch.int64, device=device)
    for number in part.unique().tolist():
        mine = (part == number).nonzero().squeeze(1)
        where = mine.to(device)
        images[where], labels[where] = resolved.parts[number].batch(position[mine], device)
    return images, labels


def _has_transforms(flat: Any, group: str) -> bool:
    """Whether the user gave Avalanche a transform, which acts on one sample at a time."""
    for node in _nodes(flat):
        for groups in (node._transform_groups, node._frozen_transform_groups):
            if groups is not None and groups.transform_groups[group] is not None:
                return True
    return False


def _nodes(flat: Any) -> Iterator[Any]:
    if hasattr(flat, "_transform_groups"):
        yield flat
    for child in flat._datasets if isinstance(flat, FlatData) else ():
        yield from _nodes(child)


def _locate(flat: Any) -> tuple[list[Any], Tensor, Tensor]:
    """Resolve a tree of concatenations and subsets.

    Returns:
        The leaves, and for every sample its leaf's number ``(n,)`` and its position there ``(n,)``.
    """
    leaves: list[Any] = []
    numbers: dict[int, int] = {}
    leaf = np.zeros(len(flat), dtype=np.int64)
    position = np.zeros(len(flat), dtype=np.int64)
    pending = [(flat, np.arange(len(flat)), np.arange(len(flat)))]
    while pending:
        node, samples, at = pending.pop()
        if not isinstance(node, FlatData):
            if id(node) not in numbers:
                numbers[id(node)] = len(leaves)
                leaves.append(node)
            leaf[samples], position[samples] = numbers[id(node)], at
            continue
        if node._indices is not None:
            at = _as_array(node._indices)[at]
        ends = np.asarray(node._cumulative_sizes, dtype=np.int64)
        child = np.searchsorted(ends, at, side="right")
        for number in np.unique(child).tolist():
            mine = child == number
            start = int(ends[number - 1]) if number else 0
            pending.append((node._datasets[number], samples[mine], at[mine] - start))
    return leaves, torch.from_numpy(leaf), torch.from_numpy(position)


def _as_array(indices: Any) -> np.ndarray:
    if isinstance(indices, LazyRange):
        return np.arange(len(indices), dtype=np.int64) + (indices._start + indices._offset)
    if isinstance(indices, LazyIndices):
        indices._to_eager()
        return cast(np.ndarray, indices._eager_list)
    return np.asarray(indices, dtype=np.int64)


def _values(sequence: Any) -> Tensor:
    """The values of a sequence of integers, ``(n,)``, without visiting every sample where it is constant."""
    leaves, leaf, position = _locate(sequence)
    values = torch.zeros(len(sequence), dtype=torch.int64)
    for number, content in enumerate(leaves):
        mine = leaf == number
        if isinstance(content, ConstantSequence):
            values[mine] = int(cast(Any, content._constant_value))
        else:
            values[mine] = torch.tensor([int(v) for v in content], dtype=torch.int64)[position[mine]]
    return values


class StreamBenchmark(CLScenario):
    """An Avalanche benchmark that knows where its tasks come from.

    Attributes:
        name: The builder's name.
        image_shape: ``(C, H, W)`` of one image.
        classes: Per task the original class ids; label ``i`` of a task is its ``i``-th class.
        class_names: Per task the names of its classes, in the same order.
        task_names: Per task the user's name for it; ``None`` where tasks have no names.
        valid_stream: The held-out part of the training samples; ``None`` without validation.
        crop_margin: How files were brought to size, as in ``read_image``; ``None`` where arrays were resized.
    """

    train_stream: EagerCLStream
    test_stream: EagerCLStream
    valid_stream: EagerCLStream | None = None
    task_names: list[str] | None = None
    crop_margin: float | None = None

    def __init__(
        self,
        streams: Iterable[EagerCLStream],
        *,
        name: str,
        image_shape: tuple[int, int, int],
        classes: list[list[int]],
        class_names: list[list[str]],
    ):
        super().__init__(list(streams))
        self.name = name
        self.image_shape = image_shape
        self.classes = classes
        self.class_names = class_names


def make_benchmark(
    train: Sequence[ImageData],
    test: Sequence[ImageData],
    valid: Sequence[ImageData] | None = None,
    *,
    classes: Sequence[Sequence[int]] | None = None,
    class_names: Sequence[str] | None = None,
    name: str = "custom",
) -> StreamBenchmark:
    """One task per item of ``train``, with its own labels from zero.

    Args:
        train: Training images of each task.
        test: Test images of each task.
        valid: Validation images of each task; they make a third stream.
        classes: Original class ids of each task, in the order of its labels; tasks with an id in common share that
            class. Without them every task has classes of its own.
        class_names: The name of every original class id.
        name: What reports call this stream.
    """
    if classes is None:
        counts = [images.num_classes for images in train]
        classes = [range(sum(counts[:task]), sum(counts[: task + 1])) for task in range(len(counts))]
    ids = [[int(c) for c in task] for task in classes]
    names = [[class_names[c] if class_names is not None else str(c) for c in task] for task in ids]
    parts = {"train": train, "test": test} | ({"valid": valid} if valid is not None else {})
    datasets = {
        stream: [StreamDataset.from_images(images, task) for task, images in enumerate(tasks)]
        for stream, tasks in parts.items()
    }
    return StreamBenchmark(
        _task_aware(datasets), name=name, image_shape=train[0].image_shape, classes=ids, class_names=names
    )


def without_test(benchmark: CLScenario, num_tasks: int) -> CLScenario:
    """The first tasks of a benchmark, with their validation images where the test images were.

    It is a new benchmark: neither it nor its experiences lead to a test dataset, so what is chosen by it cannot have
    been chosen by test data.

    Raises:
        InputError: The benchmark has no stream ``valid``, or fewer tasks.
    """
    if "valid" not in benchmark.streams:
        raise InputError("the benchmark has no stream called `valid`, so there are no validation images.")
    if not 1 <= num_tasks <= len(benchmark.streams["train"]):
        raise InputError(f"{num_tasks} tasks were asked for; there are {len(benchmark.streams['train'])}.")
    kept = {
        name: [experience.dataset for experience in list(benchmark.streams[name])[:num_tasks]]  # pyright: ignore
        for name in ("train", "valid")
    }
    streams = _task_aware({**kept, "test": kept["valid"]})
    if not isinstance(benchmark, StreamBenchmark):
        return CLScenario(list(streams))
    return StreamBenchmark(
        streams,
        name=benchmark.name,
        image_shape=benchmark.image_shape,
        classes=benchmark.classes[:num_tasks],
        class_names=benchmark.class_names[:num_tasks],
    )


def _task_aware(datasets: Mapping[str, Sequence[Any]]) -> list[EagerCLStream]:
    """Streams of experiences that know their task and its classes, from a dataset for each task."""
    plain = cast(CLScenario, with_classes_timeline(benchmark_from_datasets(**cast(Any, datasets))))
    plain = cast(CLScenario, with_task_labels(plain))
    for stream in plain.streams.values():
        for experience in stream:
            _sort_class_lists(experience)
    return list(plain.streams.values())


def _sort_class_lists(experience: Any) -> None:
    # Avalanche gives sets here, and its own MultiHeadClassifier fails on them
    for name in _CLASS_LISTS:
        setattr(experience, name, sorted(getattr(experience, name)))
