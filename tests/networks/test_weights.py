"""Weights from files, into bodies."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from lifelong_ens.errors import InputError
from lifelong_ens.networks.plain import lenet5, resnet20, without_classifier
from lifelong_ens.networks.weights import load_weights

SHAPE = (3, 16, 16)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("classes", [None, 7])
def test_a_file_with_or_without_classifier_fills_a_body(
    suffix: str, prefix: str, classes: int | None, tmp_path: Path
) -> None:
    trained, path = resnet20(classes, width=4), tmp_path / f"weights{suffix}"
    state = {f"{prefix}{name}": tensor for name, tensor in trained.state_dict().items()}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    body = resnet20(width=4)
    assert load_weights(body, path) == hashlib.sha256(path.read_bytes()).hexdigest()
    expected = without_classifier(trained).state_dict()
    assert body.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in body.state_dict().items())


def test_a_torchvision_classifier_of_other_classes(tmp_path: Path) -> None:
    torch.save(torchvision.models.squeezenet1_1().state_dict(), tmp_path / "squeezenet.pth")
    trained, body = (torchvision.models.shufflenet_v2_x0_5(num_classes=classes) for classes in (9, 4))
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    load_weights(without_classifier(body), tmp_path / "weights.pth")
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(body.eval()(x), without_classifier(trained).eval()(x))
    with pytest.raises(InputError, match="does not fit this network: missing conv1"):
        load_weights(body, tmp_path / "squeezenet.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("features.0.bias"), r"missing features\.0\.bias\.$"),
        (lambda s: s.update(extra=torch.zeros(2)), r"unexpected extra\.$"),
        (lambda s: s.update({"other.weight": torch.zeros(3, 83)}), r"unexpected other\.weight\.$"),
        (
            lambda s: s.update({"features.3.weight": torch.zeros(16, 6, 3, 3)}),
            r"misshapen features\.3\.weight \(16, 6, 3, 3\), not \(16, 6, 5, 5\)\.$",
        ),
        (lambda s: [s.pop(name) for name in list(s)[:5]], "missing .* and 2 more"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(change, message: str, tmp_path: Path) -> None:
    state = lenet5(input_shape=SHAPE).state_dict()
    change(state)
    save_file(dict(state), tmp_path / "w.safetensors")
    body = lenet5(input_shape=SHAPE)
    before = {name: tensor.clone() for name, tensor in body.state_dict().items()}
    with pytest.raises(InputError, match=message):
        load_weights(body, tmp_path / "w.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in body.state_dict().items())


class Evil:
    def __reduce__(self):
        return print, ("ran",)


def test_files_that_are_no_state_dicts_run_no_code_and_say_so(tmp_path: Path, capsys) -> None:
    body = lenet5(input_shape=SHAPE)
    with pytest.raises(InputError, match="no file"):
        load_weights(body, tmp_path / "nothing.pth")
    for value, message in (
        (Evil(), "running code"),
        ([1, 2], "something else"),
        (nn.Linear(1, 1), "running code"),
    ):
        torch.save(value, tmp_path / "w.pth")
        with pytest.raises(InputError, match=message):
            load_weights(body, tmp_path / "w.pth")
    for suffix in (".pth", ".safetensors"):
        (tmp_path / f"broken{suffix}").write_bytes(b"no weights")
        with pytest.raises(InputError, match="no file of weights"):
            load_weights(body, tmp_path / f"broken{suffix}")
    assert capsys.readouterr().out == ""
