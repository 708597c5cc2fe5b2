"""``predict``: files in, CSV out, with nothing installed but torch, safetensors, numpy and Pillow."""

from __future__ import annotations

import csv
import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from lifelong_ens.serving import ImageInput, ServedModel
from lifelong_ens.serving.__main__ import main

# what is left of the environment: the standard library, the four packages, and what torch itself asks for
CLEAN = """
import sys
ALLOWED = {"torch", "torchgen", "functorch", "safetensors", "numpy", "PIL", "lifelong_ens", "packaging",
           "typing_extensions", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec", "filelock"}
class Blocked:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in ALLOWED and top not in sys.stdlib_module_names and top != "__main__":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
for name in ("avalanche", "pandas", "sklearn", "scipy", "matplotlib", "tqdm", "jsonargparse", "torchvision"):
    try:
        __import__(name)
        raise SystemExit(f"{name} is there")
    except ModuleNotFoundError:
        pass
from lifelong_ens.serving.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def photos(tmp_path):
    """Two files of the model's size, and what is in them."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    (tmp_path / "photos/deep").mkdir(parents=True)
    names = ["a.png", "b.png", "deep/c.png"]
    for name, image in zip(names, pixels, strict=True):
        Image.fromarray(image).save(tmp_path / "photos" / name)
    return tmp_path / "photos", torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


def answers(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def run(capsys, *arguments: object) -> list[dict[str, str]]:
    assert main(["predict", *map(str, arguments)]) == 0
    return answers(capsys.readouterr().out)


def refused(capsys, *arguments: object) -> str:
    assert main(["predict", *map(str, arguments)]) == 2
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert line.startswith("lifelong-ens: error: ")
    return line


@torch.no_grad()
def test_a_clean_environment_prints_what_the_network_answers(exported, photos):
    trained, model = exported()
    folder, pixels = photos
    command = [sys.executable, "-c", CLEAN, "predict", str(model), str(folder), "--task", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    rows = answers(done.stdout)
    assert list(rows[0]) == ["image", "task", "label", "probability", "entropy"]
    assert [row["image"] for row in rows] == [str(folder / name) for name in ("a.png", "b.png", "deep/c.png")]
    mean, std = torch.tensor([120.0, 125.0, 130.0]), torch.tensor([60.0, 61.0, 62.0])
    x = (pixels.float() - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    probabilities = trained(x, 0).softmax(-1)
    for row, expected in zip(rows, probabilities, strict=True):
        assert row["task"] == "1"
        assert int(row["label"]) == int(expected.argmax())
        assert float(row["probability"]) == pytest.approx(float(expected.max()), abs=1e-6)
        entropy = -float((expected * expected.log()).sum())
        assert float(row["entropy"]) == pytest.approx(entropy, abs=1e-5)


@torch.no_grad()
def test_images_of_several_tasks_and_members(exported, photos, tmp_path, capsys):
    trained, model = exported(members_per_task=3)
    folder, pixels = photos
    listed = tmp_path / "tasks.csv"
    listed.write_text(
        f"image,task\n{folder / 'b.png'},3\n{folder / 'deep/../a.png'},2\n{folder / 'deep/c.png'},1\n"
    )
    rows = run(capsys, model, "--tasks", listed, "--batch_size", 2)
    assert [row["task"] for row in rows] == ["3", "2", "1"]
    assert run(capsys, model, folder, "--tasks", listed) == sorted(
        ({**row, "image": row["image"].replace("deep/../", "")} for row in rows), key=lambda row: row["image"]
    )
    x = ServedModel(model).images.normalised(pixels)[[1, 0, 2]]
    for row, image, task in zip(rows, x, (2, 1, 0), strict=True):
        members = trained.member_logits(image[None], task).softmax(-1)[:, 0]
        assert float(row["probability"]) == pytest.approx(float(members.mean(0).max()), abs=1e-5)
        votes = members.argmax(-1).tolist()
        different = sum(one != other for i, one in enumerate(votes) for other in votes[i + 1 :]) / 3
        assert float(row["disagreement"]) == pytest.approx(different, abs=1e-6)
    out = tmp_path / "answers.csv"
    assert main(["predict", str(model), "--tasks", str(listed), "--out", str(out)]) == 0
    assert capsys.readouterr().out == ""
    assert answers(out.read_text()) == rows


@pytest.mark.parametrize("rule", ["entropy", "max_probability"])
def test_tasks_are_guessed(rule, exported, photos, capsys):
    _, model = exported()
    served = ServedModel(model)
    expected = served.infer_task(served.images.normalised(photos[1]), rule)
    assert [row["task"] for row in run(capsys, model, photos[0], "--infer_task", rule)] == expected


def test_files_become_what_training_read(tmp_path):
    grey = ImageInput((1, 4, 4), (0.0,), (1.0,))
    colour = ImageInput((3, 4, 4), (0.0,) * 3, (1.0,) * 3)
    values = np.arange(16, dtype=np.uint8).reshape(4, 4) * 16
    Image.fromarray(values).save(tmp_path / "grey.png")
    assert np.array_equal(grey.read(str(tmp_path / "grey.png")), values[None])
    assert np.array_equal(colour.read(str(tmp_path / "grey.png")), np.stack([values] * 3))
    Image.fromarray(np.stack([values] * 3, -1)).save(tmp_path / "colour.png")
    assert np.array_equal(grey.read(str(tmp_path / "colour.png")), values[None])
    # a phone's photograph: stored lying on its side, with a note to turn it
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(values).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(grey.read(str(tmp_path / "turned.png"))[0], np.rot90(values, -1))
    # wide images lose their sides, whichever way training resized
    wide = np.zeros((8, 24), dtype=np.uint8)
    wide[:, 8:16] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (grey.read(str(tmp_path / "wide.png")) == 200).all()
    cropped = ImageInput((1, 4, 4), (0.0,), (1.0,), crop_margin=1.0).read(str(tmp_path / "wide.png"))
    assert (cropped[0, :, 1:3] == 200).all()


def test_what_cannot_be_answered_is_one_line(exported, photos, tmp_path, capsys):
    _, model = exported()
    folder, image = photos[0], photos[0] / "a.png"
    assert "has 3 tasks: say which by --task" in refused(capsys, model, image)
    assert "has no task '11'; did you mean 1?" in refused(capsys, model, image, "--task", "11")
    assert "give one of --task, --tasks and --infer_task" in refused(
        capsys, model, image, "--task", "1", "--infer_task", "entropy"
    )
    assert "name image files" in refused(capsys, model, "--task", "1")
    assert "there is no image" in refused(capsys, model, folder / "none.png", "--task", "1")
    (tmp_path / "empty").mkdir()
    assert "holds no images" in refused(capsys, model, tmp_path / "empty", "--task", "1")
    (folder / "text.png").write_text("no image")
    assert "text.png cannot be decoded" in refused(capsys, model, folder / "text.png", "--task", "1")
    assert "is not a model" in refused(capsys, folder, image, "--task", "1")
    assert "--batch_size is 0" in refused(capsys, model, image, "--task", "1", "--batch_size", "0")
    assert "--device nowhere is not there" in refused(
        capsys, model, image, "--task", "1", "--device", "nowhere"
    )
    listed = tmp_path / "tasks.csv"
    assert "there is no file" in refused(capsys, model, "--tasks", listed)
    listed.write_text("a,b\n1,2\n")
    assert "needs a first line image,task" in refused(capsys, model, "--tasks", listed)
    listed.write_bytes(b"\xff\xfe\x00\x01")
    assert "is no CSV file" in refused(capsys, model, "--tasks", listed)
    listed.write_text(f"image,task\n{image},1\n")
    assert "names no task for" in refused(capsys, model, folder / "b.png", "--tasks", listed)
    listed.write_text(f"image,task\n{image},nine\n")
    assert "has no task 'nine'" in refused(capsys, model, "--tasks", listed)


def test_a_model_of_one_task_needs_no_name(exported, photos, capsys):
    _, model = exported(classes=[2])
    assert {row["task"] for row in run(capsys, model, photos[0])} == {"1"}


def test_a_model_that_does_not_say_what_images_it_reads(network, tmp_path, photos, capsys):
    from lifelong_ens.serving import export_network

    body = {"name": "resnet20", "options": {"width": 4, "input_shape": [3, 8, 8]}}
    export_network(network(), tmp_path / "model", body=body)
    assert "does not say what images it reads" in refused(
        capsys, tmp_path / "model", photos[0], "--task", "1"
    )
