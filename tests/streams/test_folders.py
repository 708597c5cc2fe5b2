from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lifelong_ens.errors import InputError
from streams import domain_folder, image_folder, split_cifar100, split_imagenet, split_tiny_imagenet


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


def greys(benchmark, stream="train"):
    """Of every task the grey of each image with the name of its class."""
    tasks = []
    for names, experience in zip(benchmark.class_names, benchmark.streams[stream], strict=True):
        data = experience.dataset.image_data
        shown = data.images[data.rows][:, 0, 4, 4].tolist()
        tasks.append({(grey, names[label]) for grey, label in zip(shown, data.labels.tolist(), strict=True)})
    return tasks


def save_grey(path: Path, grey: int, size=(8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, grey).save(path)


def test_nested_folders_of_many_kinds_without_what_is_hidden(tmp_path):
    root = tmp_path / "photos"
    names = ["1.PNG", "2024/2.bmp", "2024/May/3.TIF", "4.png"]
    for first, label in ((0, "cat"), (100, "dog")):
        for number, name in enumerate(names, start=1):
            save_grey(root / label / name, first + number, size=(8 + number, 20 - number))
        for name in (".5.png", "__MACOSX/6.png", ".thumbnails/7.png", "Thumbs.db", "notes.txt"):
            (root / label / name).parent.mkdir(exist_ok=True)
            (root / label / name).write_bytes(b"no image")
    (root / "__MACOSX" / "cat").mkdir(parents=True)
    (root / ".hidden").mkdir()
    benchmark = image_folder(root=root, num_tasks=1, image_size=8, test_fraction=0.25)
    assert [len(part) for part in (*greys(benchmark), *greys(benchmark, "test"))] == [6, 2]
    wanted = {(first + n, label) for first, label in ((0, "cat"), (100, "dog")) for n in range(1, 5)}
    assert greys(benchmark)[0] | greys(benchmark, "test")[0] == wanted


def test_class_ids_follow_numbers(tmp_path):
    for label in (0, 1, 2, 10):
        for n in range(2):
            save_grey(tmp_path / "data" / str(label) / f"{n}.png", 20 * label)
    benchmark = image_folder(root=tmp_path / "data", num_tasks=1, class_order=[0, 1, 2, 3])
    assert benchmark.class_names == [["0", "1", "2", "10"]]
    assert greys(benchmark) == [{(0, "0"), (20, "1"), (40, "2"), (200, "10")}]


@pytest.fixture
def domains(tmp_path):
    """Three domains of two classes with four images each; an image's grey is 64 * domain + 10 * class + number."""
    for d, domain in enumerate(("day 2", "day 10", "night")):
        for c, label in enumerate(("cat", "dog")):
            for n in range(4):
                save_grey(tmp_path / "domains" / domain / label / f"sub{n}" / "a.png", 64 * d + 10 * c + n)
    return tmp_path / "domains"


def test_domains_are_tasks_of_the_same_classes(domains):
    benchmark = domain_folder(root=domains, image_size=8, test_fraction=0.5, validation=0.4)
    assert benchmark.task_names == ["day 2", "day 10", "night"]
    assert benchmark.classes == [[0, 1]] * 3
    assert benchmark.class_names == [["cat", "dog"]] * 3
    parts = [greys(benchmark, name) for name in ("train", "valid", "test")]
    assert [[len(task) for task in part] for part in parts] == [[2] * 3, [2] * 3, [4] * 3]
    for d in range(3):
        wanted = {(64 * d + 10 * c + n, label) for c, label in enumerate(("cat", "dog")) for n in range(4)}
        assert set.union(*(part[d] for part in parts)) == wanted


def test_domains_with_test_images_of_their_own(domains, tmp_path):
    root = tmp_path / "both"
    shutil.copytree(domains, root / "train")
    shutil.move(domains, root / "val")
    save_grey(root / "val/night/dog/b.png", 255)
    benchmark = domain_folder(root=root, image_size=8, num_tasks=2, limit=3)
    assert greys(benchmark) == greys(benchmark, "test")
    assert greys(benchmark)[1] == {
        (64 + 10 * c + n, label) for c, label in enumerate(("cat", "dog")) for n in range(3)
    }
    benchmark = domain_folder(root=root, image_size=8)
    assert greys(benchmark, "test")[2] - greys(benchmark)[2] == {(255, "dog")}
    shutil.rmtree(root / "val/night/dog")
    with pytest.raises(InputError, match="domain night has no test image of class dog, which"):
        domain_folder(root=root)


def test_bad_domains_are_one_line(domains, class_folders):
    shutil.move(domains / "night/dog", domains / "night/dogs")
    with pytest.raises(
        InputError, match=r"day 2 has no train image of class dogs, which night has; .*image_table"
    ):
        domain_folder(root=domains)
    with pytest.raises(InputError, match=r"images/train/ant holds no class folders"):
        domain_folder(root=class_folders)
    shutil.move(domains / "night/dogs", domains / "night/dog")
    with pytest.raises(InputError, match="num_tasks is 4 but there are 3 tasks"):
        domain_folder(root=domains, num_tasks=4)


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
