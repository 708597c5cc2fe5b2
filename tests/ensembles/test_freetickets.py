from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import nn

from lifelong_ens import ensembles
from lifelong_ens.accounting.flops import FlopMeter
from lifelong_ens.accounting.meter import TrainingMeter
from lifelong_ens.accounting.sparse import erk_flops_share, training_cost
from lifelong_ens.ensembles.ensemble import Ensemble
from lifelong_ens.ensembles.separate import SeparateNetworks
from lifelong_ens.ensembles.sparse_training import MaskUpdates, SparseTraining
from lifelong_ens.errors import InputError, UnfitNetworkError
from lifelong_ens.layers.sparse import Masks, erk_counts, maskable
from lifelong_ens.networks import mlp, resnet20
from lifelong_ens.training.fit import Fit
from lifelong_ens.training.losses import member_loss

SHAPE = (1, 8, 8)
MLP = functools.partial(mlp, num_classes=10, input_shape=SHAPE, hidden=(40, 40))
RESNET = functools.partial(resnet20, num_classes=10, input_shape=SHAPE, width=4)
# momentum and weight decay on; 13 steps an epoch
FIT = Fit(epochs=5, batch_size=32, learning_rate=0.1, weight_decay=1e-3)
SHORT = Fit(epochs=2, batch_size=32, learning_rate=0.1, weight_decay=1e-3)


def sparse_training(digits, updates, fit=FIT, build=RESNET, sparsity=0.8):
    torch.manual_seed(0)
    network = build()
    masks = Masks.random(network, sparsity, torch.Generator().manual_seed(0))
    return SparseTraining(network, masks, updates, digits[0], fit, seed=0, meter=TrainingMeter())


def patterns(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach() != 0 for name, weight in maskable(network).items()}


def common(first: nn.Module, second: nn.Module) -> float:
    """The share of the first's non-zero weights that are non-zero in the second, layers that are dense left out."""
    pairs = [
        (a, b)
        for a, b in zip(patterns(first).values(), patterns(second).values(), strict=True)
        if not a.all()
    ]
    return sum(int((a & b).sum()) for a, b in pairs) / sum(int(a.sum()) for a, _ in pairs)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("momentum", ["zero", "kept"])
def test_masked_weights_are_zero_at_every_step(digits, optimizer, momentum):
    rate = 0.1 if optimizer == "sgd" else 0.01
    fit = Fit(epochs=2, batch_size=32, optimizer=optimizer, learning_rate=rate, weight_decay=0.1)
    run = sparse_training(digits, MaskUpdates(every=4, until=1.0, grown_momentum=momentum), fit)
    budget, before, grown_from_zero = len(run.masks), {}, []
    counts = {name: int(mask.sum()) for name, mask in run.masks.active.items()}

    def look() -> None:
        weights = maskable(run.training.network)
        assert len(run.masks) == budget
        for name, weight in weights.items():
            mask = run.masks.active[name]
            assert int(mask.sum()) == counts[name]
            assert (weight.detach()[~mask] == 0).all()
            assert not weight.detach()[~mask].signbit().any()
            state = run.training.optimisation.optimizer.state[weight]
            tensor = state["momentum_buffer" if optimizer == "sgd" else "exp_avg"]
            began = mask & ~before.get(name, mask)
            grown_from_zero.append(bool((weight.detach()[began] == 0).all()))
            if began.any():
                assert (tensor[began] == 0).all() == (momentum == "zero")
            before[name] = mask.clone()

    run.training.run(step=look)
    assert run.num_updates == 6
    assert all(grown_from_zero)


def test_first_growth_is_function_of_what_pruning_left(digits):
    run = sparse_training(digits, MaskUpdates())
    run.training.run(1)
    network, x = run.training.network.eval(), digits[2].batch(torch.arange(30))[0]
    pruned = {}
    for name, weight in maskable(network).items():
        mask = run.masks.active[name]
        kept = int(mask.sum()) - (0 if mask.all() else math.ceil(0.5 * int(mask.sum())))
        smallest = weight.detach()[mask].abs().sort(descending=True).values[kept - 1]
        pruned[name] = torch.where(weight.detach().abs() >= smallest, weight.detach(), 0.0)
    run.move(0.5)
    with torch.no_grad():
        after = network(x)
        for name, weight in maskable(network).items():
            weight.copy_(pruned[name])
        assert torch.equal(network(x), after)


@pytest.mark.parametrize(
    ("updates", "steps"),
    [
        (MaskUpdates(every=10, until=1.0), [10, 20, 30, 40, 50, 60]),
        (MaskUpdates(every=13, until=1.0), [13, 26, 39, 52]),  # not at the last step
        (MaskUpdates(every=10, until=0.5), [10, 20, 30]),
        (MaskUpdates(), [6, 19, 32, 45]),  # in the middle of each epoch, until three quarters
        (None, []),
    ],
)
def test_masks_move_when_they_are_told_to(digits, updates, steps):
    run = sparse_training(digits, updates, build=MLP)
    moved, done = [], []

    def look() -> None:
        done.append(run.num_updates)
        if len(done) > 1 and done[-1] > done[-2]:
            moved.append(len(done))

    run.training.run(step=look)
    assert moved == steps


def test_rate_decays_to_its_least():
    cosine = MaskUpdates(rate=0.5, decay="cosine")
    assert [cosine.rate_at(p) for p in (0, 0.5, 1)] == pytest.approx([0.5, 0.2525, 0.005])
    assert MaskUpdates(rate=0.4, decay="constant").rate_at(0.9) == 0.4


@pytest.fixture(scope="module")
def fitted(digits):
    """A sparse ensemble of three residual networks, made once for each method."""

    @functools.cache
    def make(method: str) -> Ensemble:
        return getattr(ensembles, f"fit_{method}")(RESNET, digits[0], num_members=3, fit=SHORT, seed=3)

    return make


@pytest.mark.parametrize("method", ["dst", "edst", "static_sparse", "prune_finetune"])
def test_members_have_the_budget_and_masks_of_their_own(fitted, method):
    networks = fitted(method).networks
    shapes = [weight.shape for weight in maskable(networks[0]).values()]
    total = sum(math.prod(shape) for shape in shapes)
    for network in networks:
        nonzero = [int(mask.sum()) for mask in patterns(network).values()]
        if method == "prune_finetune":
            assert sum(nonzero) == round(0.2 * total)
        else:
            # a connection that began lately may still be zero
            assert all(found <= count for found, count in zip(nonzero, erk_counts(shapes, 0.2), strict=True))
            assert sum(nonzero) >= 0.95 * round(0.2 * total)
    for one in range(3):
        for other in range(one):
            # two thirds of the connections of one are not in the other by chance
            assert common(networks[one], networks[other]) < (0.7 if method == "edst" else 0.6)


def test_static_masks_never_move(fitted):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = RESNET()
    masks = Masks.random(network, 0.8, torch.Generator().manual_seed(3))
    for name, mask in patterns(fitted("static_sparse").networks[0]).items():
        assert torch.equal(mask, masks.active[name])


def test_moving_masks_moved(fitted):
    assert common(fitted("static_sparse").networks[0], fitted("dst").networks[0]) < 0.9


def test_pruning_keeps_the_largest_of_the_dense_network(fitted):
    dense = fitted("deep").networks
    for network, trained in zip(fitted("prune_finetune").networks, dense, strict=True):
        masks = Masks.by_magnitude(trained, 0.8)
        assert all(torch.equal(mask, masks.active[name]) for name, mask in patterns(network).items())


@pytest.mark.parametrize("growth", ["gradient", "random"])
@pytest.mark.parametrize("build", [MLP, RESNET])
def test_effective_training_flops_are_those_of_the_convention(digits, build, growth):
    updates = MaskUpdates(growth=growth, every=5, until=1.0)
    run = sparse_training(digits, updates, build=build)
    run.training.run()
    x, labels = digits[0].batch(torch.arange(8))
    share = erk_flops_share(run.training.network, x, 0.2)
    # ours makes an optimizer's step of each step before growth, RigL's does not: every - 1
    expected = training_cost(share, 1, 1, update_every=5 - 1 if growth == "gradient" else None)
    # the images' gradient, of the three products of the first layer, is never computed
    assert run.flops_effective / run.training.meter.flops == pytest.approx(expected, rel=0.12)
    # exactly: one weight gradient each, dense in 12 of 65 steps, and outputs and input gradients by density
    first = next(iter(maskable(build())))
    sizes = []
    hooks = [
        module.register_forward_hook(lambda m, i, o: sizes.append(2 * o.numel() * m.weight[0].numel() / 8))
        for name, module in run.training.network.named_modules()
        if f"{name}.weight" in run.masks.active
    ]
    with FlopMeter(run.training.network) as meter:
        member_loss(run.training.network(x), labels).backward()
    for hook in hooks:
        hook.remove()
    dense_steps = run.num_updates / 65 if growth == "gradient" else 0
    saved = 0.0
    for name, size in zip(run.masks.active, sizes, strict=True):
        zeros = 1 - float(run.masks.active[name].double().mean())
        saved += size * zeros * ((1 if name == first else 2) + 1 - dense_steps)
    assert run.num_updates == 12
    assert run.flops_effective == pytest.approx((meter.total / 8 - saved) * 5 * 400, rel=1e-6)


def test_kept_momentum_needs_dense_gradients_at_every_step(digits):
    run = sparse_training(digits, MaskUpdates(growth="random", grown_momentum="kept"), build=MLP)
    run.training.run(1)
    share = erk_flops_share(run.training.network, digits[0].batch(torch.arange(2))[0], 0.2)
    assert run.flops_effective > (2 * share + 1) / 3 * 0.99 * run.training.meter.flops


def test_an_edst_ensemble_takes_the_published_share_of_epochs(digits):
    steps = []

    def progress(label: str, total: int):
        assert (label, total) == ("edst", 13 * (3 + 3 * 2))
        return lambda: steps.append(1)

    ensemble = ensembles.fit_edst(RESNET, digits[0], num_members=3, fit=FIT, progress=progress)
    assert len(steps) == 13 * 9
    single = ensembles.fit_single(RESNET, digits[0], fit=FIT).spent.flops
    assert ensemble.spent.flops == pytest.approx(9 / 5 * single)
    assert ensemble.spent.trainings == 1
    x, _ = digits[0].batch(torch.arange(2))
    # three updates in 39 steps, one in 26 and two large ones need dense gradients
    low = training_cost(erk_flops_share(RESNET(), x, 0.2), 9, 5)
    assert low < ensemble.spent.flops_effective / single < 1.1 * low


def test_a_member_is_the_best_epoch_of_its_refinement(digits):
    fit = Fit(epochs=10, batch_size=32, learning_rate=0.1)
    # masks that move till the end of a refinement spoil its last epochs
    updates = MaskUpdates(until=1.0, rate=0.9, decay="constant")
    scores = []
    for validation in (digits[1], None):
        ensemble = ensembles.fit_edst(MLP, digits[0], validation, num_members=2, fit=fit, updates=updates)
        x, labels = digits[1].batch(torch.arange(len(digits[1])))
        with torch.no_grad():
            scores.append((ensemble(x).argmax(dim=-1) == labels).float().mean(dim=1))
    assert (scores[0] >= scores[1]).all()
    assert scores[0].sum() > scores[1].sum()


def test_a_saved_sparse_member_is_bits_and_values(digits, tmp_path):
    build = functools.partial(MLP, hidden=(200, 200))
    fit = Fit(epochs=1, batch_size=32)
    ensemble = ensembles.fit_static_sparse(build, digits[0], num_members=2, fit=fit, sparsity=0.8)
    x, _ = digits[2].batch(torch.arange(20))
    weights = maskable(ensemble)
    total = sum(weight.numel() for weight in weights.values())
    biases = sum(p.numel() for name, p in ensemble.named_parameters() if name not in weights)
    cost = ensemble.cost(x)
    assert cost.parameters == round(0.2 * total / 2) * 2 + biases
    # the last layer, which ERK leaves dense, has no bits
    rest = 4 * (biases + len(ensemble.weights) + 1) - 2 * 2000 / 8
    assert cost.bytes - rest == pytest.approx(total * (0.2 * 4 + 1 / 8), rel=1e-3)
    ensemble.save(tmp_path)
    loaded = Ensemble.load(tmp_path)
    for name, tensor in ensemble.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert cost.flops_effective < 0.25 * cost.flops_forward


def test_a_connection_that_just_began_is_stored_and_counted_as_zero(digits, tmp_path):
    run = sparse_training(digits, MaskUpdates(growth="random"), build=MLP)
    run.training.run(1)
    x, _ = digits[2].batch(torch.arange(5))
    budget = len(run.masks)
    run.move(0.5)
    ensemble = SeparateNetworks([run.training.network], "dst").eval()
    weights = maskable(ensemble).values()
    nonzero = sum(int(torch.count_nonzero(weight)) for weight in weights)
    assert len(run.masks) == budget
    assert 0.45 * budget < nonzero < 0.55 * budget
    biases = sum(p.numel() for p in ensemble.parameters()) - sum(weight.numel() for weight in weights)
    assert ensemble.cost(x).parameters == nonzero + biases
    ensemble.save(tmp_path)
    with torch.no_grad():
        assert torch.equal(Ensemble.load(tmp_path, MLP).probs(x), ensemble.probs(x))


@pytest.mark.parametrize("method", ["dst", "edst", "static_sparse", "prune_finetune"])
def test_what_cannot_be_made_sparse_is_one_line(digits, method):
    fit_method = getattr(ensembles, f"fit_{method}")
    for sparsity in (0, 1, -0.2):
        with pytest.raises(InputError, match="sparsity is between 0 and 1"):
            fit_method(MLP, digits[0], sparsity=sparsity)
    with pytest.raises(InputError, match="at least one member, not 0"):
        fit_method(MLP, digits[0], num_members=0)
    with pytest.raises(UnfitNetworkError, match="nothing to make sparse"):
        fit_method(lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64)), digits[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"phases": (0.6, 0.0)}, "phases are two shares"),
        ({"phases": (0.6,)}, "phases are two shares"),
        ({"exploration_rate": 1.0}, "exploration_rate is between 0 and 1"),
        ({"init": "large"}, "init is scaled or plain, not large"),
    ],
)
def test_wrong_options_of_edst(digits, options, message):
    with pytest.raises(InputError, match=message):
        ensembles.fit_edst(MLP, digits[0], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every 1 step"),
        ({"rate": 1.0}, "rate is between"),
        ({"until": 0.0}, "until is above 0"),
        ({"growth": "set"}, "growth is gradient or random, not set"),
        ({"decay": "linear"}, "decay is constant or cosine"),
        ({"grown_momentum": "half"}, "grown_momentum is zero or kept"),
    ],
)
def test_wrong_options_of_updates(options, message):
    with pytest.raises(InputError, match=message):
        MaskUpdates(**options)


def test_wrong_share_of_fine_tuning(digits):
    with pytest.raises(InputError, match="finetune_share is above 0"):
        ensembles.fit_prune_finetune(MLP, digits[0], finetune_share=0.0)
