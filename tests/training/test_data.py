from __future__ import annotations

import torch
from torch import Tensor

from lifelong_ens.training.data import ImageData, channels_last


def data(**options) -> ImageData:
    store = torch.randint(0, 256, (10, 3, 4, 2), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return ImageData(
        images=store,
        rows=torch.tensor([7, 0, 3, 9, 3]),
        labels=torch.tensor([1, 0, 2, 1, 2]),
        mean=torch.tensor([10.0, 20.0, 30.0]),
        std=torch.tensor([2.0, 4.0, 8.0]),
        **options,
    )


def normalised(store: Tensor, row: int) -> Tensor:
    return torch.stack([(store[row, c].float() - 10 * (c + 1)) / 2 ** (c + 1) for c in range(3)])


def test_a_batch_is_gathered_and_normalised() -> None:
    selection = data()
    before = selection.images.clone()
    x, y = selection.batch(torch.tensor([3, 0, 3, 2]))
    assert x.dtype == torch.float32
    assert y.tolist() == [1, 1, 1, 2]
    for image, row in zip(x, [9, 7, 9, 3], strict=True):
        torch.testing.assert_close(image, normalised(selection.images, row))
    assert torch.equal(selection.images, before)


def test_the_transform_sees_the_normalised_batch() -> None:
    seen: list[Tensor] = []

    def flip(x: Tensor) -> Tensor:
        seen.append(x)
        return x.flip(-1)

    x, _ = data(transform=flip).batch(torch.tensor([1, 4]))
    torch.testing.assert_close(seen[0], data().batch(torch.tensor([1, 4]))[0])
    assert torch.equal(x, seen[0].flip(-1))


def test_all_samples_come_once_in_their_order() -> None:
    selection = data()
    batches = list(selection.batches(2))
    assert [len(y) for _, y in batches] == [2, 2, 1]
    everything, labels = selection.batch(torch.arange(5))
    assert torch.equal(torch.cat([x for x, _ in batches]), everything)
    assert torch.equal(torch.cat([y for _, y in batches]), labels)


def test_a_subset_shares_the_store() -> None:
    selection = data()
    part = selection.subset(torch.tensor([4, 1]))
    assert part.images is selection.images
    assert (part.rows.tolist(), part.labels.tolist()) == ([3, 0], [2, 0])
    assert torch.equal(part.batch(torch.tensor([0]))[0], selection.batch(torch.tensor([2]))[0])
    assert (len(part), len(selection)) == (2, 5)


def test_shape_and_classes() -> None:
    assert data().image_shape == (3, 4, 2)
    assert data().num_classes == 3


def test_channels_last_is_for_images_alone() -> None:
    images = torch.randn(2, 3, 4, 5)
    last = channels_last(images)
    assert torch.equal(last, images)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert not last.is_contiguous()
    for other in (torch.randn(2, 7), torch.randn(2, 3, 4), torch.randn(2, 3, 4, 5, device="meta")):
        assert channels_last(other) is other
