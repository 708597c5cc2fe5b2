"""Hyper-batch ensembles: the objective, who moves whom, and what they hold."""

from __future__ import annotations

import copy
import functools
import logging

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from lifelong_ens.accounting.components import sizes
from lifelong_ens.accounting.flops import FlopMeter
from lifelong_ens.accounting.meter import TrainingMeter
from lifelong_ens.convert import batch_ensemble
from lifelong_ens.ensembles import fit_hyper_batch, fit_self_tuning
from lifelong_ens.ensembles.ensemble import Ensemble
from lifelong_ens.ensembles.hyper_batch import Tuner, _groups
from lifelong_ens.ensembles.hyper_ensemble import HyperBatchEnsemble
from lifelong_ens.ensembles.training import Training
from lifelong_ens.errors import InputError, UnfitNetworkError
from lifelong_ens.layers.hyper import HyperDropout, HyperLayer
from lifelong_ens.layers.log_uniform import LogUniform
from lifelong_ens.layers.rank1 import Rank1Layer
from lifelong_ens.metrics.uncertainty import nll
from lifelong_ens.networks import mlp, resnet20
from lifelong_ens.training.data import channels_last
from lifelong_ens.training.fit import Fit

SHAPE = (1, 8, 8)
RANGES = {"l2": (0.1, 100.0), "label_smoothing": (1e-5, 0.2), "dropout": (1e-3, 0.9)}
MLP = functools.partial(mlp, num_classes=10, input_shape=SHAPE, hidden=(32, 32))
RESNET = functools.partial(resnet20, num_classes=10, input_shape=SHAPE, width=4)
FIT = Fit(epochs=2, batch_size=32, learning_rate=0.05, weight_decay=1e-3)


def with_dropout() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 10)
    )


def make(network: nn.Module, num_members: int = 3, num_images: int = 50, **options) -> HyperBatchEnsemble:
    torch.manual_seed(0)
    return HyperBatchEnsemble(
        network, num_members, "hyper_batch", ranges=RANGES, num_images=num_images, **options
    )


def enliven(ensemble: HyperBatchEnsemble, randomise) -> HyperBatchEnsemble:
    """Embeddings that matter, bounds that differ between members, and no lucky numbers."""
    bounds = copy.deepcopy(ensemble.bounds.state_dict())
    randomise(ensemble.body)
    with torch.no_grad():
        for layer in ensemble.body.modules():
            if isinstance(layer, HyperLayer):
                layer.embedding.weight.mul_(0.3)
        ensemble.bounds.load_state_dict(bounds)
        width = ensemble.bounds.log_max - ensemble.bounds.log_min
        ensemble.bounds.log_low += width * 0.4 * torch.rand_like(ensemble.bounds.log_low)
        ensemble.bounds.log_high -= width * 0.4 * torch.rand_like(ensemble.bounds.log_low)
    return ensemble


@pytest.mark.parametrize("norm", ["per_member", "shared"])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "resnet20"])
def test_every_member_of_a_nested_network_is_an_explicit_plain_network(name, norm, randomise):
    builders = {
        "resnet18": lambda: torchvision.models.resnet18(num_classes=5),
        "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=5, width_mult=0.25),
        "resnet20": lambda: resnet20(5, width=4),
    }
    ensemble = enliven(make(builders[name](), norm=norm), randomise).eval()
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        logits = ensemble(x)
        for member in range(3):
            plain = ensemble.export_member(member).eval()
            original = builders[name]()
            assert [type(one) for one in plain.modules()] == [type(one) for one in original.modules()]
            assert plain.state_dict().keys() == original.state_dict().keys()
            for one in plain.modules():
                if isinstance(one, nn.Dropout):
                    assert one.p == pytest.approx(ensemble.hyper_parameters()["dropout_classifier.0"][member])
            expected = plain(x)
            torch.testing.assert_close(logits[member], expected, rtol=1e-4, atol=1e-4 * float(expected.std()))
    assert float((logits[0] - logits[1]).abs().max()) > 1e-2


def test_members_answer_at_their_mean_and_rows_at_their_own_hyper_parameters(randomise):
    ensemble = enliven(make(resnet20(5, width=4)), randomise).eval()
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        means = ensemble.bounds.mean()
        assert torch.equal(ensemble(x), ensemble.logits_at(x, means))
        values = ensemble.bounds.sample(4)
        together = ensemble.logits_at(x, values)
        for row in range(4):
            alone = ensemble.logits_at(x[row : row + 1], values[:, row])
            torch.testing.assert_close(together[:, row], alone[:, 0], rtol=1e-4, atol=1e-5)
    assert list(ensemble.hyper_parameters()) == list(ensemble.space.ranges)
    torch.testing.assert_close(torch.tensor([*ensemble.hyper_parameters().values()]).T, means)


@pytest.mark.parametrize("norm", ["per_member", "shared"])
def test_without_response_it_is_batch_ensemble(norm):
    network = resnet20(5, width=4)
    ensemble = make(network, norm=norm)
    with torch.no_grad():
        for layer in ensemble.body.modules():
            if isinstance(layer, HyperLayer):
                layer.embedding.weight.zero_()
    torch.manual_seed(0)
    plain = batch_ensemble(network, 3, init="gaussian", norm=norm)
    for layer in plain.body.modules():
        if isinstance(layer, Rank1Layer):
            layer.norm = ()  # scaling by s where the hyper layer does, not in the norm behind it
    x = torch.randn(4, 3, 16, 16)
    for mode in (True, False):
        assert torch.equal(ensemble.train(mode)(x), plain.train(mode)(channels_last(x)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_members", [1, 3])
def test_training_loss_is_equation_8_row_by_row(tied, num_members, randomise):
    """Every row in a forward pass of its own, every weight made, label smoothing by torch."""
    ensemble = enliven(make(MLP(), num_members, tied=tied, norm="shared"), randomise).double()
    x, labels = torch.randn(4, *SHAPE, dtype=torch.double), torch.randint(0, 10, (4,))
    torch.manual_seed(7)
    loss = ensemble.training_loss(x, labels)
    torch.manual_seed(7)
    values = ensemble.bounds.sample(4).detach()
    names, total = [*ensemble.space.ranges], 0.0
    for k in range(num_members):
        for i in range(4):
            value = dict(zip(names, values[k, i].tolist(), strict=True))
            at = values[:, i]
            logits = ensemble.logits_at(x[i : i + 1], at)[k]
            smoothing = value["label_smoothing"]
            total += float(F.cross_entropy(logits, labels[i : i + 1], label_smoothing=smoothing).detach())
            for layer_name, (kernel, bias) in ensemble.space.layers.items():
                layer = ensemble.body.get_submodule(layer_name)
                e, e_bias = layer.embed(ensemble.bounds.scaled(values[k, i]))
                shared = layer.base.weight + e[:, None] * layer.response.weight
                weight = shared if tied else layer.member_weight(k, e)
                own = layer.member_bias(k, e_bias)
                norms = value[kernel] * weight.square().sum() + value[bias] * own.square().sum()
                total += float(norms.detach()) / 50
    # log-probabilities are in float32
    assert float(loss.detach()) == pytest.approx(total / (num_members * 4), rel=1e-6)


def test_tuning_loss_is_equation_9(randomise):
    ensemble = enliven(make(MLP()), randomise).eval()
    x, labels = torch.randn(6, *SHAPE), torch.randint(0, 10, (6,))
    torch.manual_seed(7)
    loss = ensemble.tuning_loss(x, labels, entropy_weight=0.5)
    torch.manual_seed(7)
    probs = ensemble.logits_at(x, ensemble.bounds.sample(6)).softmax(dim=-1)
    likelihood = -probs.mean(dim=0)[torch.arange(6), labels].log().mean()
    expected = likelihood - 0.5 * ensemble.bounds.entropy().mean()
    torch.testing.assert_close(loss, expected)


def test_gradients_of_the_bounds_match_finite_differences(randomise):
    ensemble = enliven(make(with_dropout()), randomise).double().eval()
    x, labels = torch.randn(5, *SHAPE, dtype=torch.double), torch.randint(0, 10, (5,))
    # log-probabilities in float64, as the finite differences need them

    def loss() -> torch.Tensor:
        torch.manual_seed(3)
        log_probs = ensemble.logits_at(x, ensemble.bounds.sample(5)).log_softmax(dim=-1)
        mixed = log_probs.logsumexp(dim=0).gather(1, labels[:, None]).mean()
        return -mixed - 0.1 * ensemble.bounds.entropy().mean()

    bounds = [*ensemble.bounds.parameters()]
    gradients = torch.autograd.grad(loss(), bounds)
    torch.manual_seed(3)
    as_it_runs = torch.autograd.grad(ensemble.tuning_loss(x, labels, 0.1), bounds)
    step = 1e-6
    for bound, gradient, ours in zip(bounds, gradients, as_it_runs, strict=True):
        torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-6)
        for index in range(bound.numel()):
            with torch.no_grad():
                difference = 0.0
                for sign in (1, -1):
                    bound.view(-1)[index] += sign * step
                    difference += sign * float(loss()) / (2 * step)
                    bound.view(-1)[index] -= sign * step
            assert gradient.flatten()[index].item() == pytest.approx(difference, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("build_network", [MLP, RESNET, with_dropout])
def test_training_moves_no_bound_and_tuning_nothing_else(build_network, digits):
    ensemble = make(build_network())
    with torch.no_grad():
        ensemble.bounds.log_low += 1
        ensemble.bounds.log_high -= 1
    tuner = Tuner(ensemble, digits[1], FIT, every=3, learning_rate=0.01, entropy_weight=1e-3, seed=0)
    optimizer = torch.optim.SGD(_groups(ensemble), lr=0.1, momentum=0.9)

    def state() -> dict[str, torch.Tensor]:
        return copy.deepcopy(ensemble.state_dict())

    images, labels = digits[0].batch(torch.arange(32))
    before = state()
    for _ in range(3):
        optimizer.zero_grad()
        ensemble.training_loss(images, labels).backward()
        assert all(parameter.grad is None for parameter in ensemble.bounds.parameters())
        optimizer.step()
    trained = state()
    for name, tensor in trained.items():
        learned = name.startswith("body.") and name.endswith(("active", "weight"))
        if name.startswith("bounds."):
            assert torch.equal(tensor, before[name]), name
        elif learned:
            assert not torch.equal(tensor, before[name]), name
    for parameter in ensemble.parameters():
        parameter.grad = None
    tuner.tune(*digits[1].batch(torch.arange(32)))
    assert all(parameter.grad is None for parameter in ensemble.parameters())
    assert ensemble.training
    for name, tensor in state().items():
        moved = name in ("bounds.log_low", "bounds.log_high")
        assert torch.equal(tensor, trained[name]) is not moved, name


def test_three_training_steps_for_one_of_tuning_and_both_are_counted(digits):
    train, validation, _ = digits
    ensemble = fit_hyper_batch(MLP, train, validation, num_members=2, fit=FIT, seed=1)
    steps = FIT.epochs * 13
    twin = make(MLP(), 2)
    images, labels = train.batch(torch.arange(32))
    with FlopMeter(twin) as training:
        twin.training_loss(images, labels).backward()
    with FlopMeter(twin.eval()) as tuning:
        torch.autograd.grad(twin.tuning_loss(images, labels, 1e-3), [*twin.bounds.parameters()])
    # the 8 steps of tuning see all validation batches, the last of which has 8 of 200 images
    rows = sum([32] * 6 + [8] + [32])
    assert steps // 3 == 8
    expected = training.total / 32 * FIT.epochs * 400 + tuning.total / 32 * rows
    assert ensemble.spent.flops == pytest.approx(expected, rel=1e-6)
    # gradients towards weights are not computed in tuning
    assert tuning.total < training.total


def test_flops_of_a_forward_pass_by_component():
    ensemble = make(MLP(), 3)
    with FlopMeter(ensemble) as meter, torch.no_grad():
        ensemble(torch.randn(5, *SHAPE))
    rows, ins, outs = 3 * 5, 64 + 32 + 32, 32 + 32 + 10
    slow = 64 * 32 + 32 * 32 + 32 * 10
    assert meter.by_component == {
        "shared": 2 * rows * slow,
        "response": 2 * rows * slow,
        "fast_weights": 2 * rows * (ins + outs),
        # one embedding a member of five hyper-parameters, for weights and biases; and a product for every output
        "embedding": 2 * 3 * 5 * 2 * outs + rows * outs,
    }
    assert meter.backward == 0


def test_tuning_lowers_a_coefficient_that_harms(digits):
    """Logistic regression under L2 terms that start far too strong."""
    train, validation, _ = digits

    def linear() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    options = {"l2": (1.0, 1e3), "label_smoothing": None, "tuning_learning_rate": 0.1}
    fit = Fit(epochs=20, batch_size=32, learning_rate=0.02, weight_decay=0.0)
    ensemble = fit_self_tuning(linear, train, validation, fit=fit, seed=0, **options)
    (tuned,) = ensemble.hyper_parameters()["l2_output"]
    start = LogUniform(1, torch.tensor([1.0]), torch.tensor([1e3])).mean().item()
    assert start == pytest.approx(144.6, abs=0.1)
    assert tuned < 30
    x, labels = validation.batch(torch.arange(len(validation)))
    with torch.no_grad():
        before = nll(ensemble.logits_at(x, torch.full((1, 2), start)).log_softmax(-1), labels)
        after = nll(ensemble(x).log_softmax(-1), labels)
    assert after < before


def test_adam_on_both_bounds_at_the_given_rate(digits):
    ensemble = make(MLP())
    with torch.no_grad():
        ensemble.bounds.log_low += 1
        ensemble.bounds.log_high -= 1
    before = copy.deepcopy([*ensemble.bounds.parameters()])
    tuner = Tuner(ensemble, digits[1], FIT, every=1, learning_rate=0.01, entropy_weight=10.0, seed=0)
    tuner.after_step()
    for old, new in zip(before, ensemble.bounds.parameters(), strict=True):
        torch.testing.assert_close((new - old).abs(), torch.full_like(old, 0.01), rtol=1e-3, atol=0)


def test_self_tuning_is_the_case_of_one_member(digits):
    train, validation, test = digits
    x, _ = test.batch(torch.arange(9))
    one = fit_self_tuning(MLP, train, validation, fit=FIT, seed=2)
    same = fit_hyper_batch(MLP, train, validation, num_members=1, fit=FIT, seed=2, init="ones")
    with torch.no_grad():
        assert torch.equal(one(x), same(x))
    assert (one.method, same.method) == ("self_tuning", "hyper_batch")


def test_dropout_rates_are_tuned_and_reach_the_loss(digits):
    train, validation, _ = digits
    ensemble = fit_hyper_batch(with_dropout, train, validation, num_members=2, fit=FIT, seed=0)
    assert "dropout_4" in ensemble.hyper_parameters()
    assert sum(isinstance(module, HyperDropout) for module in ensemble.modules()) == 1
    kept = fit_hyper_batch(
        with_dropout, train, validation, num_members=2, fit=FIT, seed=0, dropout=None, label_smoothing=None
    )
    assert list(kept.hyper_parameters()) == ["l2_input", "l2_output", "l2_output_bias"]
    # in training, two passes with the same hyper-parameters differ by dropout alone
    x, _ = train.batch(torch.arange(64))
    ensemble.train()
    values = ensemble.bounds.mean().detach()
    assert not torch.equal(ensemble.logits_at(x, values), ensemble.logits_at(x, values))


@pytest.mark.parametrize("options", [{}, {"tied": False, "norm": "shared"}, {"amp": True}, {"patience": 1}])
def test_variants_train_save_and_load(options, digits, tmp_path):
    train, validation, test = digits
    fit = Fit(epochs=2, batch_size=32, **{k: v for k, v in options.items() if k in ("amp", "patience")})
    more = {k: v for k, v in options.items() if k in ("tied", "norm")}
    ensemble = fit_hyper_batch(RESNET, train, validation, num_members=2, fit=fit, seed=0, **more)
    ensemble.save(tmp_path)
    loaded = Ensemble.load(tmp_path)
    x, _ = test.batch(torch.arange(7))
    with torch.no_grad():
        assert torch.equal(loaded(x), ensemble(x))
        assert torch.equal(loaded.bounds.log_low, ensemble.bounds.log_low)
    assert loaded.hyper_parameters() == ensemble.hyper_parameters()


def test_a_strong_penalty_shrinks_the_weights_it_is_for(digits):
    """The L2 term acts on the layer that its coefficient belongs to."""
    train = digits[0]
    ensemble = make(MLP(), 2, num_images=400, init="ones")
    with torch.no_grad():
        coordinate = ensemble.space.index("l2_1")
        for name, index in ((name, ensemble.space.index(name)) for name in ensemble.space.ranges):
            if name.startswith("l2"):
                value = 100.0 if index == coordinate else 0.1
                ensemble.bounds.log_low[:, index] = ensemble.bounds.log_high[:, index] = torch.tensor(
                    value
                ).log()
    before = {
        name: ensemble.body.get_submodule(name).base.weight.norm().item() for name in ensemble.space.layers
    }
    training = Training(
        ensemble,
        train,
        FIT,
        seed=0,
        meter=TrainingMeter(),
        loss=lambda x, y: ensemble.l2(ensemble.bounds.sample(len(x)).detach()),
        groups=_groups(ensemble),
    )
    training.run()
    for name, (kernel, _) in ensemble.space.layers.items():
        ratio = ensemble.body.get_submodule(name).base.weight.norm().item() / before[name]
        assert (ratio < 0.7) is (kernel == "l2_1"), name


def wide_resnet(num_classes: int) -> nn.Module:
    """WRN-28-10 as far as its tensors go: which layers there are, in their order."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, bias=False)]
    before = 16
    for width in (160, 320, 640):
        for block in range(4):
            layers += [nn.BatchNorm2d(before), nn.Conv2d(before, width, 3, bias=False)]
            layers += [nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, bias=False)]
            layers += [nn.Conv2d(before, width, 1, bias=False)] if block == 0 else []
            before = width
    return nn.Sequential(*layers, nn.BatchNorm2d(640), nn.Linear(640, num_classes))


@pytest.mark.parametrize(
    ("classes", "network", "heads"), [(10, 73_018_820, 60_696), (100, 73_135_100, 61_776)]
)
def test_as_many_parameters_as_the_published_wide_resnet(classes, network, heads):
    """73.1 and 73.2 million with six L2 coefficients and four members (Wenzel et al., Table 2 and the public code)."""
    with torch.device("meta"):
        model = wide_resnet(classes)
        ensemble = HyperBatchEnsemble(
            model, 4, "hyper_batch", ranges={"l2": (0.1, 100.0)}, num_images=47_500, norm="shared"
        )
    assert list(ensemble.space.ranges) == ["l2_input", "l2_1", "l2_2", "l2_3", "l2_output", "l2_output_bias"]
    stored = {name: size.parameters for name, size in sizes(ensemble).items()}
    assert stored.pop("embedding") == heads
    assert stored.pop("bounds") == 2 * 6 * 4
    assert sum(stored.values()) == network


def test_attention_stays_shared_and_a_network_without_layers_is_refused(caplog):
    with caplog.at_level(logging.WARNING):
        make(nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 3)))
    with pytest.raises((UnfitNetworkError, InputError)):
        make(nn.Sequential(nn.BatchNorm1d(3)))


def test_bad_input_is_refused(digits):
    train, validation, _ = digits
    for fit in (fit_hyper_batch, fit_self_tuning):
        with pytest.raises(InputError, match="needs validation images"):
            fit(MLP, train)
        with pytest.raises(InputError, match="9 for 10 classes"):
            fit(MLP, train, validation.subset(torch.arange(9)))
    with pytest.raises(InputError, match="at least one member"):
        fit_hyper_batch(MLP, train, validation, num_members=0)
    with pytest.raises(InputError, match="l2"):
        fit_hyper_batch(MLP, train, validation, l2=(1.0, 0.1))


def test_conversion_leaves_the_network_as_it_was():
    network = resnet20(5, width=4)
    before = copy.deepcopy(network.state_dict())
    ensemble = make(network)
    with torch.no_grad():
        for parameter in ensemble.parameters():
            parameter.add_(1)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])
