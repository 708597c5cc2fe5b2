from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lifelong_ens.errors import InputError
from lifelong_ens.images import read_image
from streams import image_folder, split_cifar100, split_imagenet, split_tiny_imagenet


def sizes(benchmark):
    return [[len(e.dataset) for e in stream] for stream in benchmark.streams.values()]


def test_train_and_test_folders(class_folders):
    benchmark = image_folder(root=class_folders, num_tasks=2, image_size=8, class_order=[4, 3, 2, 1, 0])
    assert sizes(benchmark) == [[18, 12], [6, 4]]
    assert benchmark.class_names == [["elk", "dog", "cat"], ["bee", "ant"]]
    images = benchmark.test_stream[1].dataset.image_data
    with Image.open(class_folders / "test/bee/1.png") as file:
        expected = torch.from_numpy(np.array(file)).permute(2, 0, 1)
    assert torch.equal(images.images[images.rows[(images.labels == 0).nonzero()[1]]].squeeze(0), expected)


def test_val_stands_for_test_and_one_folder_is_divided(class_folders):
    (class_folders / "test").rename(class_folders / "val")
    assert sizes(image_folder(root=class_folders, num_tasks=1)) == [[30], [10]]
    whole = image_folder(root=class_folders / "train", num_tasks=5, test_fraction=0.34)
    assert sizes(whole) == [[4] * 5, [2] * 5]
    limited = image_folder(root=class_folders / "train", num_tasks=5, test_fraction=0.34, limit=1)
    assert sizes(limited) == [[1] * 5, [1] * 5]


def test_cifar_reads_class_folders_and_keeps_their_size(class_folders):
    benchmark = split_cifar100(root=class_folders, num_tasks=5, limit=3)
    assert benchmark.image_shape == (3, 8, 8)
    assert sizes(benchmark) == [[3] * 5, [2] * 5]


def test_imagenet_crops_the_centre(class_folders, write_image):
    (class_folders / "test").rename(class_folders / "val")
    write_image(class_folders / "val/ant/wide.png", 1, size=(20, 10))
    benchmark = split_imagenet(root=class_folders, num_tasks=1, image_size=14)
    assert benchmark.image_shape == (3, 14, 14)
    assert sizes(benchmark) == [[30], [11]]


def test_original_tiny_imagenet_layout(class_folders, tmp_path):
    root = tmp_path / "download" / "tiny-imagenet-200"
    (root / "val" / "images").mkdir(parents=True)
    lines = []
    for name in ("ant", "bee"):
        shutil.copytree(class_folders / "train" / name, root / "train" / name / "images")
        (root / "train" / name / f"{name}_boxes.txt").write_text("0.png\t0\t0\t9\t9\n")
        for file in (class_folders / "test" / name).iterdir():
            shutil.copy(file, root / "val" / "images" / f"{name}_{file.name}")
            lines.append(f"{name}_{file.name}\t{name}\t0\t0\t9\t9\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    for folder in (root, root.parent):
        benchmark = split_tiny_imagenet(root=folder, num_tasks=2)
        assert sizes(benchmark) == [[6, 6], [2, 2]]
        assert benchmark.image_shape == (3, 64, 64)
    (root / "val" / "images" / "ant_1.png").unlink()
    with pytest.raises(InputError, match=r"ant_1\.png cannot be read"):
        split_tiny_imagenet(root=root, num_tasks=2)


def test_kinds_of_images_all_become_upright_rgb(tmp_path, write_image):
    for mode, name in (("L", "a.png"), ("CMYK", "a.jpg"), ("P", "b.png"), ("RGBA", "c.png"), ("1", "d.png")):
        write_image(tmp_path / name, 0, mode=mode)
        assert read_image(str(tmp_path / name), None).shape == (3, 8, 8)
    deep = (np.arange(64, dtype=np.uint16) * 1024).reshape(8, 8)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.array_equal(read_image(str(tmp_path / "deep.png"), None)[0], deep >> 8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 2)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(str(tmp_path / "turned.jpg"), None).shape == (3, 4, 2)


def _empty_class(root: Path) -> None:
    (root / "train" / "fox").mkdir()


def _corrupt(root: Path) -> None:
    file = root / "train" / "bee" / "3.png"
    file.write_bytes(file.read_bytes()[:60])


def _not_an_image(root: Path) -> None:
    (root / "train" / "bee" / "3.png").write_bytes(b"hello")


def _only_in_test(root: Path) -> None:
    shutil.copytree(root / "test" / "ant", root / "test" / "fox")


def _only_in_train(root: Path) -> None:
    shutil.rmtree(root / "test" / "cat")


def _no_test(root: Path) -> None:
    shutil.rmtree(root / "test")


def _dangling_link(root: Path) -> None:
    (root / "train" / "bee" / "9.png").symlink_to(root / "absent.png")


def _nothing(root: Path) -> None:
    shutil.rmtree(root)
    root.mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_empty_class, "train/fox holds no images"),
        (_corrupt, "train/bee/3.png cannot be decoded"),
        (_not_an_image, "train/bee/3.png cannot be decoded"),
        (_only_in_test, "class fox in the test images but not in the training images"),
        (_only_in_train, "class cat without any test image"),
        (_no_test, "has train/ but no test/ or val/"),
        (_dangling_link, "train/bee/9.png cannot be read (No such file"),
        (_nothing, "is empty; expected train/<class>"),
        (shutil.rmtree, "is not a readable folder"),
    ],
)
def test_bad_folders_are_one_line(class_folders, damage, message, cache_folder):
    damage(class_folders)
    with pytest.raises(InputError) as caught:
        image_folder(root=class_folders)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(cache_folder.glob("*"))


def test_other_bad_arguments(class_folders, write_image):
    with pytest.raises(InputError, match="6 but there are 5 classes"):
        image_folder(root=class_folders, num_tasks=6)
    with pytest.raises(InputError, match="test_fraction is 1"):
        image_folder(root=class_folders, test_fraction=1.0)
    with pytest.raises(InputError, match="no class folders"):
        split_imagenet(root=class_folders)
    write_image(class_folders / "train/elk/odd.png", 0, size=(9, 8))
    with pytest.raises(InputError, match=r"odd\.png is 9x8 but .* is 8x8; pass image_size"):
        split_cifar100(root=class_folders, num_tasks=5)


@pytest.mark.data
def test_real_cifar_100(unpacked):
    benchmark = split_cifar100(root=unpacked("cifar100"), num_tasks=3, validation=0.1)
    assert sizes(benchmark) == [[1800, 1350, 1350], [400, 300, 300], [200, 150, 150]]
    assert benchmark.image_shape == (3, 32, 32)
    assert "apple" in {name for names in benchmark.class_names for name in names}


@pytest.mark.data
def test_real_tiny_imagenet(unpacked):
    benchmark = split_tiny_imagenet(root=unpacked("tiny-imagenet"), num_tasks=5)
    assert sizes(benchmark) == [[1000] * 5, [100] * 5]
    assert benchmark.image_shape == (3, 64, 64)
