"""What ``lifelong-ens doctor`` finds, and what it says to do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from experiments import doctor
from experiments.catalogue import KINDS, describe
from experiments.cli import main
from streams import torchvision_files


def lines(capsys, *arguments: object) -> tuple[int, list[str]]:
    code = main(["doctor", *map(str, arguments)])
    return code, capsys.readouterr().out.splitlines()


def test_a_sound_installation_is_said_to_be_so(capsys):
    code, found = lines(capsys)
    assert code == 0
    assert any(line.startswith("ok       torch ") and "fit together" in line for line in found)
    assert found[-1] == "all that is needed is there"


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Returns a function that makes a package one that cannot be imported, for child processes."""

    def put(name: str, source: str) -> None:
        (tmp_path / "broken" / name).mkdir(parents=True)
        (tmp_path / "broken" / name / "__init__.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"), prepend=os.pathsep)

    return put


def test_torch_that_cannot_be_imported_is_a_line(capsys, broken):
    broken("torch", "raise ImportError('libcudart.so.13: cannot open shared object file')")
    code, found = lines(capsys)
    (line,) = [line for line in found if line.startswith("wrong")]
    assert code == 1
    assert "torch cannot be imported (ImportError: libcudart.so.13" in line
    assert "pip install --force-reinstall torch torchvision" in line
    assert any("images of split_mnist" in line for line in found)
    assert found[-1] == "1 to mend"


def test_torch_that_takes_the_process_down_is_a_line(capsys, broken):
    broken("torch", "import os\nos.abort()")
    code, found = lines(capsys)
    assert code == 1
    assert any("the process ended with -6" in line for line in found if line.startswith("wrong"))


def test_torchvision_that_does_not_fit_is_told_from_torch(capsys, broken):
    broken("torchvision", "raise RuntimeError('operator torchvision::nms does not exist')")
    code, found = lines(capsys)
    assert code == 1
    (line,) = [line for line in found if line.startswith("wrong")]
    assert "torchvision does not load beside torch (RuntimeError: operator torchvision::nms" in line
    assert any(line.startswith("ok       device: cpu") for line in found)


def test_packages_that_are_missing_or_of_another_version_are_named(monkeypatch):
    installed = {"lifelong-ens": "0.1.0", "avalanche-lib": "0.5.0", "numpy": "2.0", "optuna": None}
    asked = ["avalanche-lib>=0.6,<0.7", "numpy>=1.26", "pandas>=2.2", "optuna>=4.2; extra == 'tune'"]
    monkeypatch.setattr(doctor, "requires", lambda _: asked)

    def version(name: str) -> str:
        if installed.get(name) is None:
            raise doctor.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(doctor, "version", version)
    found = {check.text.split(":")[0].split()[0]: check for check in doctor._packages()}
    assert (found["pandas"].status, found["pandas"].needed) == ("missing", True)
    assert "pip install 'pandas>=2.2'" in found["pandas"].text
    assert (found["optuna"].status, found["optuna"].needed) == ("missing", False)
    assert "pip install 'lifelong-ens[tune]'" in found["optuna"].text
    wrong = doctor._installed(Requirement(asked[0]))
    assert wrong is not None
    assert wrong.status == "wrong"
    assert "avalanche-lib 0.5.0, expected <0.7,>=0.6" in wrong.text


def test_images_are_found_where_streams_look(tmp_path):
    (tmp_path / "MNIST/raw").mkdir(parents=True)
    (tmp_path / "MNIST/raw/train-images-idx3-ubyte").touch()
    found = {check.text: check for check in doctor._streams(tmp_path, asked=True)}
    assert any("split_mnist, permuted_mnist, rotated_mnist" in text for text in found)
    assert not any(check.needed for check in found.values() if check.status != "ok")
    nothing = list(doctor._streams(tmp_path / "nowhere", asked=True))
    assert [check.text for check in nothing if check.needed] == [
        f"images: no stream finds any in {tmp_path / 'nowhere'}; see what each expects"
    ]
    assert not any(check.needed for check in doctor._streams(tmp_path / "nowhere", asked=False))


def test_what_is_looked_for_is_what_streams_read():
    files = {
        "split_mnist": torchvision_files.MNIST,
        "split_fashion_mnist": torchvision_files.FASHION_MNIST,
        "split_cifar10": torchvision_files.CIFAR10,
        "split_cifar100": torchvision_files.CIFAR100,
    }
    for stream, one in files.items():
        assert (one.folder,) in doctor.EXPECTED[stream]
    with_root = {
        name
        for name, target in KINDS["stream"].items()
        if any(option.name == "root" for option in describe(target).options)
    }
    # where the images of image_table are stands in its table
    assert set(doctor.EXPECTED) == with_root - {"image_table"}


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").touch()
    check = doctor._writable(tmp_path / "file" / "cache", "cache", "set LIFELONG_ENS_CACHE")
    assert check.status == "wrong"
    assert "set LIFELONG_ENS_CACHE" in check.text
    assert doctor._writable(Path(tmp_path) / "new" / "one", "cache", "").status == "ok"
