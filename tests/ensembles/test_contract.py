"""What every method of making an ensemble keeps to; one row of SPECS for each."""

from __future__ import annotations

import functools
import inspect
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from lifelong_ens import ensembles
from lifelong_ens.accounting.flops import FlopMeter
from lifelong_ens.ensembles.ensemble import FILE, Ensemble
from lifelong_ens.errors import DamagedFileError, InputError
from lifelong_ens.networks import mlp, resnet20
from lifelong_ens.training.fit import Fit
from lifelong_ens.training.losses import member_loss

SHAPE = (1, 8, 8)
MLP = functools.partial(mlp, num_classes=10, input_shape=SHAPE, hidden=(32, 32))
RESNET = functools.partial(resnet20, num_classes=10, input_shape=SHAPE, width=4)
# momentum and weight decay on, BatchNorm in the ResNet
FIT = Fit(epochs=5, batch_size=32, learning_rate=0.1, weight_decay=1e-3)


@pytest.fixture(params=["mlp", "resnet"])
def build_network(request):
    """A builder of one untrained classifier."""
    return {"mlp": MLP, "resnet": RESNET}[request.param]


@dataclass(frozen=True)
class Spec:
    """What a method promises.

    Attributes:
        name: On the command line.
        options: Of the method.
        variant: Tells rows of one method apart.
        members: How many, if it is asked for three; None where only an upper bound is known.
        accuracy: That the small training reaches on both networks.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    variant: str = ""
    members: int | None = 3
    accuracy: float = 0.6

    @property
    def label(self) -> str:
        """For the test's name."""
        return f"{self.name}-{self.variant}" if self.variant else self.name

    def fit(self, build_network: Callable[[], nn.Module], data: Any, **more: Any) -> Ensemble:
        function = getattr(ensembles, f"fit_{self.name}")
        if "num_members" in inspect.signature(function).parameters:
            more = {"num_members": 3, **more}
        train, validation, _ = data
        return function(build_network, train, validation, **{"fit": FIT, "seed": 1, **self.options, **more})


SPECS = (
    Spec("single", members=1),
    Spec("single_equal_cost", members=1),
    # whole channels of a network of width 4 are dropped
    Spec("mc_dropout", accuracy=0.3),
    Spec("deep"),
    Spec("batch_ensemble"),
    Spec("batch_ensemble", {"preset": "paper"}, "paper"),
    Spec("batch_ensemble", {"preset": "fast"}, "fast"),
    Spec("structured", {"mask_epochs": 2}),
    Spec("hyper_deep", {"num_candidates": 3}, members=None),
    Spec("fixed_init_hyper", {"num_candidates": 4}, members=None),
    Spec("hyper_batch", {"tuning_learning_rate": 0.03, "l2": (0.01, 1.0)}),
    Spec("self_tuning", {"tuning_learning_rate": 0.03, "l2": (0.01, 1.0)}, members=1),
    Spec("dst"),
    Spec("edst"),
    Spec("static_sparse"),
    Spec("prune_finetune"),
)
METHODS = pytest.mark.parametrize("spec", SPECS, ids=[spec.label for spec in SPECS])


@pytest.fixture(scope="module")
def fitted(digits):
    """Each method's ensemble of a network, made once."""

    @functools.cache
    def make(label: str, build_network: Any) -> Ensemble:
        spec = next(one for one in SPECS if one.label == label)
        return spec.fit(build_network, digits)

    return make


def test_every_method_has_a_spec():
    assert {spec.name for spec in SPECS} == set(ensembles.METHODS)


@METHODS
def test_learns_and_mixes_probabilities(spec, build_network, fitted, digits):
    ensemble, test = fitted(spec.label, build_network), digits[2]
    assert ensemble.method == spec.name
    assert spec.members in (None, ensemble.num_members)
    assert not ensemble.training
    x, _ = test.batch(torch.arange(7))
    with torch.no_grad():
        logits = ensemble(x)
        assert logits.shape == (ensemble.num_members, 7, 10)
        expected = (ensemble.weights[:, None, None] * logits.softmax(dim=-1)).sum(dim=0)
        torch.testing.assert_close(ensemble.probs(x), expected)
        assert torch.equal(ensemble.probs(x), ensemble.probs(x))
    assert float(ensemble.weights.sum()) == pytest.approx(1)
    x, labels = test.batch(torch.arange(len(test)))
    with torch.no_grad():
        assert float((ensemble.probs(x).argmax(dim=1) == labels).float().mean()) >= spec.accuracy


@METHODS
def test_same_seed_same_ensemble_and_another_seed_another(spec, fitted, digits):
    ensemble, again, other = fitted(spec.label, MLP), spec.fit(MLP, digits), spec.fit(MLP, digits, seed=2)
    x, _ = digits[2].batch(torch.arange(20))
    with torch.no_grad():
        assert torch.equal(ensemble.probs(x), again.probs(x))
        assert not torch.equal(ensemble.probs(x), other.probs(x))


@METHODS
def test_leaves_torch_s_generator_alone(spec, digits):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    spec.fit(MLP, digits)
    assert torch.equal(torch.rand(3), expected)


@METHODS
def test_members_differ(spec, build_network, fitted, digits):
    ensemble = fitted(spec.label, build_network)
    if ensemble.num_members == 1:
        pytest.skip("one member")
    x, _ = digits[2].batch(torch.arange(100))
    with torch.no_grad():
        probs = ensemble(x).softmax(dim=-1)
    for first in range(ensemble.num_members):
        for second in range(first):
            assert float((probs[first] - probs[second]).abs().max()) > 1e-3


@METHODS
def test_members_are_exported_as_plain_networks(spec, build_network, fitted, digits):
    ensemble = fitted(spec.label, build_network)
    if spec.name == "mc_dropout":
        with pytest.raises(InputError, match="draws of dropout masks"):
            ensemble.export_ensemble()
        return
    x, _ = digits[2].batch(torch.arange(50))
    own = {type(module) for module in build_network().modules()}
    with torch.no_grad():
        expected = ensemble(x)
        exported = ensemble.export_ensemble()
        assert float((exported(x) - expected).abs().max() / expected.abs().max()) < 1e-6
        assert len(exported) == ensemble.num_members
        for member in exported:
            for module in member.modules():
                assert type(module) in own or type(module).__module__.startswith("torch."), type(module)
                assert not module._forward_hooks
                assert not module._forward_pre_hooks
        for tensor in (*exported.parameters(), *exported.buffers()):
            tensor += 1
        assert torch.equal(ensemble(x), expected)
    with pytest.raises(IndexError, match="does not exist"):
        ensemble.export_member(ensemble.num_members)


@METHODS
def test_a_saved_ensemble_answers_the_same_to_the_bit_in_another_process(
    spec, build_network, fitted, digits, tmp_path
):
    ensemble = fitted(spec.label, build_network)
    ensemble.save(tmp_path)
    x, _ = digits[2].batch(torch.arange(20))
    torch.save({"x": x}, tmp_path / "x.pt")
    code = (
        "import sys, torch; torch.set_num_threads(1); from lifelong_ens.ensembles import Ensemble\n"
        "folder = sys.argv[1]; ensemble = Ensemble.load(folder)\n"
        "with torch.no_grad(): torch.save(ensemble.probs(torch.load(folder + '/x.pt')['x']), folder + '/probs.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        expected = ensemble.probs(x)
    torch.set_num_threads(threads)
    assert torch.equal(torch.load(tmp_path / "probs.pt"), expected)
    loaded = Ensemble.load(tmp_path)
    assert (loaded.method, loaded.spent) == (ensemble.method, ensemble.spent)
    assert loaded.cost(x) == ensemble.cost(x)


@METHODS
def test_a_damaged_file_is_refused(spec, fitted, tmp_path):
    path = fitted(spec.label, MLP).save(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(DamagedFileError, match=FILE):
        Ensemble.load(tmp_path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DamagedFileError, match="altered"):
        Ensemble.load(tmp_path)
    path.write_bytes(whole)
    with pytest.raises(DamagedFileError, match="does not fit"):
        Ensemble.load(tmp_path, lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))


@METHODS
def test_cost_is_what_a_file_and_a_meter_say(spec, build_network, fitted, digits, tmp_path):
    ensemble = fitted(spec.label, build_network)
    x, _ = digits[2].batch(torch.arange(4))
    cost = ensemble.cost(x)
    overhead = ensemble.save(tmp_path).stat().st_size - cost.bytes
    assert 0 < overhead < 100_000  # names, shapes and the plan
    with FlopMeter(ensemble) as meter, torch.no_grad():
        ensemble(x)
    assert cost.flops_forward == pytest.approx(sum(meter.by_component.values()) / 4, abs=1)
    assert cost.flops_effective <= cost.flops_forward
    assert 0 < cost.parameters * 4 <= cost.bytes
    spent = ensemble.spent
    assert spent.flops >= spent.flops_effective > 0
    assert spent.seconds > 0
    assert spent.trainings >= 1
    assert spent.saved_bytes > 0


def test_single_is_the_first_of_deep_and_deep_its_training_three_times(fitted, digits, build_network):
    single, deep = fitted("single", build_network), fitted("deep", build_network)
    x, labels = digits[2].batch(torch.arange(20))
    with torch.no_grad():
        assert torch.equal(single(x)[0], deep(x)[0])
    assert deep.spent.flops == pytest.approx(3 * single.spent.flops)
    assert fitted("single_equal_cost", build_network).spent.flops == pytest.approx(3 * single.spent.flops)
    assert deep.cost(x).parameters == 3 * single.cost(x).parameters
    # the FLOPs of one step, counted apart
    network = build_network()
    with FlopMeter(network) as meter:
        member_loss(network(x), labels).backward()
    steps_rows = FIT.epochs * len(digits[0])
    assert single.spent.flops == pytest.approx(meter.total / 20 * steps_rows, rel=1e-6)


def test_a_network_of_one_s_own_needs_its_builder_to_load(digits, tmp_path):
    def own() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

    ensemble = ensembles.fit_deep(own, *digits[:2], num_members=2, fit=FIT)
    ensemble.save(tmp_path)
    with pytest.raises(InputError, match="build_network"):
        Ensemble.load(tmp_path)
    x, _ = digits[2].batch(torch.arange(5))
    with torch.no_grad():
        assert torch.equal(Ensemble.load(tmp_path, own).probs(x), ensemble.probs(x))


def test_no_ensemble_in_a_folder(tmp_path):
    with pytest.raises(InputError, match="no ensemble in"):
        Ensemble.load(tmp_path)
    with pytest.raises(InputError, match="at least one member"):
        ensembles.fit_deep(MLP, None, num_members=0)  # pyright: ignore
