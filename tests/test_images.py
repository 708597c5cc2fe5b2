"""Files as cameras, phones and file managers leave them become the pixels that are seen."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from lifelong_ens.errors import InputError
from lifelong_ens.images import EXTENSIONS, find_images, read_image
from lifelong_ens.serving import ImageInput

# upright, 48 wide and 32 high, with a colour for each quarter
QUARTERS = np.array([[[200, 20, 20], [20, 180, 20]], [[20, 20, 220], [240, 240, 40]]], dtype=np.uint8)
UPRIGHT = QUARTERS.repeat(16, axis=0).repeat(24, axis=1)


def shows(path, expected: np.ndarray) -> bool:
    """Whether a file is read as ``expected``, (H, W, 3)."""
    return np.array_equal(read_image(str(path), None).transpose(1, 2, 0), expected)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.TIFF", "a.PNG", "a.ppm"])
def test_lossless_files_keep_every_byte(tmp_path, name):
    Image.fromarray(UPRIGHT).save(tmp_path / name)
    assert shows(tmp_path / name, UPRIGHT)


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.jfif", "a.webp"])
def test_lossy_files_keep_colours(tmp_path, name):
    Image.fromarray(UPRIGHT).save(tmp_path / name, quality=95)
    found = read_image(str(tmp_path / name), None).astype(int)
    assert found.shape == (3, 32, 48)
    # colours mix where two of them meet
    assert np.abs(found[:, 8::16, 12::24].transpose(1, 2, 0) - QUARTERS).max() <= 12


@pytest.mark.parametrize("mode", ["P", "RGBA", "CMYK"])
def test_modes_of_colour_become_rgb(tmp_path, mode):
    image = Image.fromarray(UPRIGHT)
    image = image.quantize(8) if mode == "P" else image.convert(mode)
    image.save(tmp_path / "a.tif")
    assert shows(tmp_path / "a.tif", UPRIGHT)


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_grey_becomes_three_equal_channels_and_colour_one(tmp_path, mode):
    grey = np.where(UPRIGHT[..., 1] > 100, 255, 0).astype(np.uint8)
    Image.fromarray(grey).convert(mode).save(tmp_path / "a.png")
    assert shows(tmp_path / "a.png", grey[..., None].repeat(3, axis=2))
    assert np.array_equal(read_image(str(tmp_path / "a.png"), None, channels=1)[0], grey)


@pytest.mark.parametrize(("name", "dtype"), [("a.png", "<u2"), ("a.tif", "<u2"), ("b.tif", "<i4")])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, name, dtype):
    deep = (np.arange(64) * 1040).reshape(8, 8)
    Image.fromarray(deep.astype(dtype)).save(tmp_path / name)
    assert np.array_equal(read_image(str(tmp_path / name), None)[2], deep // 256)


@pytest.mark.parametrize("turned", range(1, 9))
def test_photographs_stand_upright(tmp_path, turned):
    ways = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: np.rot90,
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, 3),
    }
    exif = Image.Exif()
    exif[0x0112] = turned
    Image.fromarray(np.ascontiguousarray(ways[turned](UPRIGHT))).save(tmp_path / "a.png", exif=exif)
    assert shows(tmp_path / "a.png", UPRIGHT)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "a.bmp"])
@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_damaged_files_are_named_in_one_line(tmp_path, name, kept):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(InputError, match=rf"{name} cannot be decoded \(.+\); replace or remove") as caught:
        read_image(str(tmp_path / name), 16)
    assert "\n" not in str(caught.value)


def test_fractions_have_no_known_white(tmp_path):
    Image.fromarray(np.random.default_rng(0).random((8, 8), dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match="save it with 8 or 16 bits"):
        read_image(str(tmp_path / "a.tif"), None)


def test_size_is_reached_from_any_shape_without_squeezing(tmp_path):
    for size in ((7, 90), (90, 7), (1, 1), (300, 200)):
        pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
        # the centre is kept: as high as wide
        side = min(size)
        top, left = (size[1] - side) // 2, (size[0] - side) // 2
        pixels[top : top + side, left : left + side] = 200
        Image.fromarray(pixels).save(tmp_path / "a.png")
        found = read_image(str(tmp_path / "a.png"), 16)
        assert found.shape == (3, 16, 16)
        assert found[:, 2:-2, 2:-2].min() >= 190


def test_serving_reads_files_as_streams_do(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    served = ImageInput((3, 24, 24), (0.0,) * 3, (1.0,) * 3, crop_margin=1.1)
    assert np.array_equal(served.read(str(tmp_path / "a.jpg")), read_image(str(tmp_path / "a.jpg"), 24, 1.1))


def test_images_are_found_at_any_depth_and_what_is_hidden_is_not(tmp_path):
    wanted = ["a/deep/2.png", "a/deep/er/1.JPG", "b.WebP"]
    others = [
        ".c.png",
        "a/._1.JPG",
        "__MACOSX/a/1.png",
        ".cache/1.png",
        "Thumbs.db",
        "desktop.ini",
        "a/notes.txt",
    ]
    for name in (*wanted, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    assert [entry.path for entry in find_images(tmp_path)] == [str(tmp_path / name) for name in wanted]
    assert all(extension == extension.lower() for extension in EXTENSIONS)
