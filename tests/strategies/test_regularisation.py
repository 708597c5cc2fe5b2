"""EWC and SI: importances, pulls, and what Avalanche's plugins compute where they are right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from avalanche.training.plugins import EWCPlugin, SynapticIntelligencePlugin
from avalanche.training.utils import ParamData
from torch import Tensor, nn

from lifelong_ens.errors import InputError
from lifelong_ens.networks.plain import Body, mlp
from lifelong_ens.training.fit import Fit
from strategies import ewc, finetune, synaptic_intelligence
from streams import split_digits

FIT = Fit(epochs=2, batch_size=32, momentum=0.9, weight_decay=5e-3)


@pytest.fixture(scope="module")
def benchmark():
    return split_digits(num_tasks=3, seed=0)


def conv_body() -> Body:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5)]
    return Body(nn.Sequential(*layers), 144, None)


def small_mlp() -> Body:
    torch.manual_seed(0)
    return mlp(input_shape=(1, 8, 8), hidden=(16,))


def trained(strategy, benchmark, tasks: int):
    for task in range(tasks):
        strategy.train(benchmark.train_stream[task])
    return strategy


def image_gradients(network, x: Tensor, y: Tensor, task: int) -> Tensor:
    """One image after the other, in evaluation mode, ``(images, weights)``."""
    network.eval()
    weights = list(network.weights().values())
    rows = []
    for image, label in zip(x, y, strict=True):
        loss = F.cross_entropy(network(image.unsqueeze(0), task), label.unsqueeze(0))
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]))
    return torch.stack(rows)


@pytest.mark.parametrize("batch_size", [7, 64])
def test_fisher_is_the_mean_of_squared_gradients_of_single_images(benchmark, batch_size):
    strategy = ewc(conv_body(), fit=Fit(epochs=1, batch_size=batch_size), fisher_images=10_000)
    strategy.train(benchmark.train_stream[0])
    x, y, _ = benchmark.train_stream[0].dataset.batch(torch.arange(len(benchmark.train_stream[0].dataset)))
    gradients = image_gradients(strategy.network, x, y, 0)
    found = strategy.network.anchor.importance
    torch.testing.assert_close(found, gradients.square().mean(dim=0), rtol=1e-4, atol=1e-8)
    # the frequent mistake is far from it
    assert float(gradients.mean(dim=0).square().sum()) < 0.5 * float(found.sum())


def test_fisher_of_a_linear_body_in_closed_form(benchmark):
    torch.manual_seed(0)
    body = Body(nn.Sequential(nn.Flatten(), nn.Linear(64, 5, bias=False)), 5, None)
    strategy = trained(ewc(body, fit=FIT, fisher_images=10_000), benchmark, 1)
    x, y, _ = benchmark.train_stream[0].dataset.batch(torch.arange(len(benchmark.train_stream[0].dataset)))
    head = strategy.network.heads[0]
    with torch.no_grad():
        wrong = torch.softmax(strategy.network(x, 0), dim=1) - F.one_hot(y, head.out_features)
        # dL/dW = (V^T (p - e_y)) x^T
        expected = torch.einsum("nf,np->fp", (wrong @ head.weight).square(), x.flatten(1).square()) / len(x)
    torch.testing.assert_close(strategy.network.anchor.importance.view(5, 64), expected, rtol=1e-4, atol=1e-8)


def test_fisher_images_limits_them_and_the_estimate_follows_from_the_seed(benchmark):
    def importance(seed: int) -> Tensor:
        strategy = trained(ewc(conv_body(), fit=FIT, seed=seed, fisher_images=20), benchmark, 1)
        return strategy.network.anchor.importance

    assert torch.equal(importance(1), importance(1))
    assert not torch.equal(importance(1), importance(2))


def test_fisher_pass_is_counted(benchmark):
    def flops(build, **options) -> float:
        return trained(
            build(conv_body(), fit=Fit(epochs=1, batch_size=64), **options), benchmark, 1
        ).meter.flops

    conv, head = 2 * 6 * 6 * 9 * 4, 2 * 144 * len(benchmark.classes[0])
    for images in (20, 40):
        extra = flops(ewc, fisher_images=images) - flops(finetune)
        # forward, gradient of the only conv's weights, gradient towards the head's input
        assert extra == pytest.approx(images * (2 * conv + 2 * head))


def test_constant_memory_is_the_sum_of_the_tasks_penalties_and_avalanche_s_gradient(benchmark, monkeypatch):
    strategy = ewc(small_mlp(), fit=FIT, ewc_lambda=3.0)
    recorded = []
    original = type(strategy).fisher

    def record(self):
        recorded.append((original(self), self.network.flat_weights()))
        return recorded[-1][0]

    monkeypatch.setattr(type(strategy), "fisher", record)
    trained(strategy, benchmark, 3)
    network, anchor = strategy.network, strategy.network.anchor
    with torch.no_grad():
        for weight in network.weights().values():
            weight.add_(0.1 * torch.randn_like(weight))
    now = network.flat_weights()
    expected = sum(3.0 * fisher * (now - old) for fisher, old in recorded)
    torch.testing.assert_close(
        3.0 * anchor.importance * (now - anchor.centre), expected, rtol=1e-3, atol=1e-7
    )
    # Avalanche's penalty has no factor 1/2
    plugin = EWCPlugin(ewc_lambda=1.5)
    for task, pair in enumerate(recorded):
        for store, flat in zip((plugin.importances, plugin.saved_params), pair, strict=True):
            for name, part in zip(network.weights(), network.split(flat), strict=True):
                store[task][f"network.{name}"] = ParamData(name, init_tensor=part)
    strategy.loss = torch.zeros(())
    plugin.before_backward(strategy)
    gradients = torch.autograd.grad(strategy.loss, list(network.weights().values()))
    torch.testing.assert_close(torch.cat([g.flatten() for g in gradients]), expected, rtol=1e-4, atol=1e-7)


def test_online_importance_decays_and_stores_one_number_per_weight(benchmark, monkeypatch):
    strategy = ewc(small_mlp(), fit=FIT, fisher_decay=0.5)
    recorded = []
    original = type(strategy).fisher
    monkeypatch.setattr(
        type(strategy), "fisher", lambda self: recorded.append(original(self)) or recorded[-1]
    )
    trained(strategy, benchmark, 3)
    expected = 0.25 * recorded[0] + 0.5 * recorded[1] + recorded[2]
    torch.testing.assert_close(strategy.network.anchor.importance, expected)
    assert [name for name in strategy.network.state_dict() if "anchor" in name] == ["anchor.importance"]


@pytest.mark.parametrize(("build", "option"), [(ewc, "ewc_lambda"), (synaptic_intelligence, "si_lambda")])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_huge_strength_holds_what_matters_and_does_not_diverge(benchmark, build, option, optimizer):
    fit = Fit(
        epochs=4, batch_size=32, optimizer=optimizer, learning_rate=0.05 if optimizer == "sgd" else 1e-3
    )

    def movement(strength: float) -> float:
        strategy = trained(build(small_mlp(), fit=fit, **{option: strength}), benchmark, 1)
        important = strategy.network.anchor.importance > 1e-6
        before = strategy.network.flat_weights()
        strategy.train(benchmark.train_stream[1])
        return float((strategy.network.flat_weights() - before)[important].norm())

    assert movement(1e12) < 0.15 * movement(0.0)


def test_the_pull_is_clipped_with_the_gradient(benchmark):
    strategy = trained(ewc(small_mlp(), fit=Fit(epochs=1, clip_norm=0.01), ewc_lambda=100.0), benchmark, 1)
    with torch.no_grad():
        strategy.network.anchor.centre += 10
    strategy.train(benchmark.train_stream[1])
    weights = strategy.optimisation.parameters
    assert torch.cat([p.grad.flatten() for p in weights if p.grad is not None]).norm() <= 0.01 * (1 + 1e-5)


def test_si_importance_of_the_first_task_is_avalanche_s_once_it_copies_weights(benchmark, monkeypatch):
    damping = 0.02

    def extract_weights(model, target, excluded) -> None:
        for name, weight in SynapticIntelligencePlugin.allowed_parameters(model, excluded):
            target[name].data = weight.detach().flatten().clone()

    # without the copy its old weights are views of the new ones on the CPU, and no step has a length
    monkeypatch.setattr(SynapticIntelligencePlugin, "extract_weights", staticmethod(extract_weights))
    ours = trained(synaptic_intelligence(small_mlp(), fit=FIT, damping=damping), benchmark, 1)
    plugin = SynapticIntelligencePlugin(si_lambda=0.0, eps=damping)
    theirs = trained(finetune(small_mlp(), fit=FIT, plugins=[plugin]), benchmark, 1)
    for name, found in zip(
        ours.network.weights(), ours.network.split(ours.network.anchor.importance), strict=True
    ):
        assert torch.equal(ours.network.get_parameter(name), theirs.network.get_parameter(name))
        expected = -plugin.syn_data["cum_trajectory"][f"network.{name}"].data
        torch.testing.assert_close(found.flatten(), expected.clamp(min=0), rtol=1e-4, atol=1e-7)
    assert float(ours.network.anchor.importance.max()) > 0


def test_si_multiplies_the_real_step_with_the_gradient_of_the_task_alone(benchmark):
    # one step per task: the whole task is one mini-batch; clipping and pull make step and gradient differ
    fit = Fit(epochs=1, batch_size=1000, learning_rate=0.5, momentum=0.0, weight_decay=0.1, clip_norm=0.1)
    strategy = trained(synaptic_intelligence(small_mlp(), fit=fit, si_lambda=1e3, damping=0.01), benchmark, 1)
    network, first = strategy.network, strategy.network.anchor.importance
    before = network.flat_weights()
    strategy.train(benchmark.train_stream[1])
    step = network.flat_weights() - before
    other = synaptic_intelligence(small_mlp(), fit=fit)
    other.network.regrow(network.classes_per_task)
    other.network.load_state_dict(network.state_dict())
    with torch.no_grad():
        for weight, old in zip(other.network.weights().values(), other.network.split(before), strict=True):
            weight.copy_(old)
        # the head before its one step is known from the seed: an untrained strategy draws the same
    fresh = trained(synaptic_intelligence(small_mlp(), fit=fit), benchmark, 1)
    torch.manual_seed(fresh._task_seed(1))
    fresh.network.begin_task(network.classes_per_task[1])
    other.network.heads[1].load_state_dict(fresh.network.heads[1].state_dict())
    x, y, _ = benchmark.train_stream[1].dataset.batch(torch.arange(len(benchmark.train_stream[1].dataset)))
    loss = F.cross_entropy(other.network(x, 1), y)
    gradient = torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, list(other.network.weights().values()))]
    )
    expected = first + (-gradient * step / (step.square() + 0.01)).clamp(min=0)
    torch.testing.assert_close(network.anchor.importance, expected, rtol=1e-3, atol=1e-7)


def test_si_forgets_what_early_stopping_took_back():
    benchmark = split_digits(num_tasks=2, seed=0, validation=0.2)
    common = {"batch_size": 32, "schedule": "constant"}
    stopped = synaptic_intelligence(small_mlp(), fit=Fit(epochs=20, patience=2, **common))
    stopped.train(benchmark.train_stream[0], eval_streams=[benchmark.valid_stream[0]])
    epochs = stopped.clock.train_exp_epochs - 2
    assert 0 < epochs < 18
    exact = synaptic_intelligence(small_mlp(), fit=Fit(epochs=epochs, **common))
    exact.train(benchmark.train_stream[0])
    for name, tensor in exact.network.state_dict().items():
        assert torch.equal(tensor, stopped.network.state_dict()[name])


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (ewc, {"ewc_lambda": -1.0}),
        (ewc, {"fisher_decay": 0.0}),
        (ewc, {"fisher_decay": 1.5}),
        (ewc, {"fisher_images": 0}),
        (synaptic_intelligence, {"si_lambda": float("nan")}),
        (synaptic_intelligence, {"damping": 0.0}),
    ],
)
def test_wrong_options_are_refused(build, options):
    with pytest.raises(InputError, match=next(iter(options))):
        build(small_mlp(), **options)


def test_a_frozen_body_has_nothing_to_hold():
    with pytest.raises(InputError, match="use finetune"):
        ewc(small_mlp().requires_grad_(False))
