from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lifelong_ens.errors import InputError, UnfitNetworkError
from lifelong_ens.layers.sparse import Masks, erk_counts, erk_densities, forget, maskable
from lifelong_ens.networks import mlp, resnet20, wrn28_10


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shapes_of(network: nn.Module) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in maskable(network).items()}


def one_layer(weight: list[list[float]], active: list[list[int]]) -> tuple[nn.Linear, Masks]:
    layer = nn.Linear(len(weight[0]), len(weight))
    layer.weight.data = torch.tensor(weight)
    return layer, Masks(layer, {"weight": torch.tensor(active, dtype=torch.bool)})


def test_erk_of_two_layers_by_hand():
    # raw 30 / 200 and 12 / 20: at 88 / 42 the second would keep 1.26 of itself: dense, the first keeps 68 of 200
    assert erk_densities([(20, 10), (10, 2)], 0.4) == [pytest.approx(0.34), 1.0]
    # none dense: scale 22 / (30 + 12)
    assert erk_densities([(20, 10), (10, 2)], 0.1) == pytest.approx([0.15 * 22 / 42, 0.6 * 22 / 42])
    assert erk_counts([(20, 10), (10, 2)], 0.1) == [16, 6]
    # 26.4 and so 26 weights: 18.857 and 7.543, rounded down 18 and 7, and the first lost more
    assert erk_counts([(20, 10), (10, 2)], 0.12) == [19, 7]


@pytest.mark.parametrize(
    ("sparsity", "dense", "second", "third"),
    [
        (
            0.8,
            ["0", "1.conv1", "1.shortcut", "5.shortcut", "9.shortcut"],
            (0.574, 0.428, 0.284),
            (0.213, 0.142),
        ),
        (0.9, ["0", "1.conv1", "1.shortcut", "5.shortcut"], (0.277, 0.206, 0.137), (0.102, 0.068)),
    ],
)
def test_erk_of_a_wide_resnet_is_the_published_one(sparsity, dense, second, third):
    with torch.device("meta"):
        shapes = shapes_of(wrn28_10(10))
    density = dict(zip(shapes, erk_densities(list(shapes.values()), 1 - sparsity), strict=True))
    full = [name for name, share in density.items() if share == 1]
    assert full == [f"features.{name}.weight" for name in dense] + ["fc.weight"]
    found = [
        density[f"features.{name}.weight"]
        for name in ("2.conv1", "5.conv1", "6.conv2", "9.conv1", "12.conv2")
    ]
    assert found == pytest.approx([*second, *third], abs=5e-4)
    total = sum(math.prod(shape) for shape in shapes.values())
    assert total == 36_461_232
    kept = sum(density[name] * math.prod(shape) for name, shape in shapes.items())
    assert kept == pytest.approx((1 - sparsity) * total, rel=1e-12)
    assert sum(erk_counts(list(shapes.values()), 1 - sparsity)) == round((1 - sparsity) * total)


def test_erk_of_resnet50_keeps_the_published_layers_dense():
    with torch.device("meta"):
        shapes = shapes_of(torchvision.models.resnet50())
    densities = erk_densities(list(shapes.values()), 0.2)
    full = {name.removesuffix(".weight") for name, share in zip(shapes, densities, strict=True) if share == 1}
    first = {"0.conv1", "0.conv3", "0.downsample.0", "1.conv1", "1.conv3", "2.conv1", "2.conv3"}
    assert full == {f"layer1.{name}" for name in first} | {"layer2.0.conv1"}


SHAPES = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 60), st.integers(1, 60)),
        st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(1, 5), st.integers(1, 5)),
    ),
    min_size=1,
    max_size=8,
)


@given(SHAPES, st.floats(0.01, 0.99))
def test_the_budget_of_any_network_is_exact(shapes, density):
    sizes = [math.prod(shape) for shape in shapes]
    densities = erk_densities(shapes, density)
    assert all(0 < share <= 1 for share in densities)
    assert sum(d * n for d, n in zip(densities, sizes, strict=True)) == pytest.approx(density * sum(sizes))
    try:
        counts = erk_counts(shapes, density)
    except InputError:
        assert min(d * n for d, n in zip(densities, sizes, strict=True)) < 1
        return
    assert sum(counts) == round(density * sum(sizes))
    for share, count, size in zip(densities, counts, sizes, strict=True):
        assert 0 < count <= size
        assert abs(count - share * size) < 1 + 1e-5


@settings(deadline=None)
@given(
    st.integers(2, 12),
    st.integers(2, 12),
    st.floats(0.3, 0.9),
    st.floats(0, 1),
    st.sampled_from(["gradient", "random"]),
    st.integers(0, 99),
)
def test_every_update_keeps_the_number_of_each_layer(width, hidden, sparsity, rate, growth, seed):
    network = nn.Sequential(
        nn.Conv2d(1, width, 3), nn.Flatten(), nn.Linear(width, hidden), nn.Linear(hidden, 3)
    )
    masks = Masks.random(network, sparsity, generator(seed))
    before = {name: int(mask.sum()) for name, mask in masks.active.items()}
    for weight in maskable(network).values():
        # few different values: many ties
        weight.grad = torch.randint(-1, 2, weight.shape, generator=generator(seed)).float()
        weight.data = torch.randint(-1, 2, weight.shape, generator=generator(seed + 1)).float()
    masks.apply()
    old = {name: mask.clone() for name, mask in masks.active.items()}
    grown = masks.update(rate, growth, generator(seed))
    assert len(masks) == sum(before.values())
    for name, weight in maskable(network).items():
        assert int(masks.active[name].sum()) == before[name]
        assert (weight[~masks.active[name]] == 0).all()
        if weight in grown:
            moved = math.ceil(rate * before[name] - 1e-9)
            assert int(grown[weight].sum()) == moved
            assert int((old[name] & masks.active[name] & ~grown[weight]).sum()) == before[name] - moved
        else:
            assert torch.equal(old[name], masks.active[name])


def test_prune_and_grow_by_gradient_by_hand():
    layer, masks = one_layer([[0.5, -0.1, 9.0], [0.3, 9.0, -0.2]], [[1, 1, 0], [1, 0, 1]])
    assert layer.weight.tolist() == [
        [0.5, pytest.approx(-0.1), 0.0],
        [pytest.approx(0.3), 0.0, pytest.approx(-0.2)],
    ]
    layer.weight.grad = torch.tensor([[7.0, 2.0, -3.0], [6.0, 1.0, 0.5]])
    # half of 4 end: -0.1 and -0.2; of the places without connection the gradients are 2, -3, 1 and 0.5
    grown = masks.update(0.5, "gradient", generator())
    assert masks.active["weight"].int().tolist() == [[1, 1, 1], [1, 0, 0]]
    assert grown[layer.weight].int().tolist() == [[0, 1, 1], [0, 0, 0]]
    # the one at the second place ended and began again: from zero
    assert layer.weight.tolist() == [[0.5, 0.0, 0.0], [pytest.approx(0.3), 0.0, 0.0]]


def test_ties_end_with_the_last_and_begin_with_the_first():
    layer, masks = one_layer([[1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]], [[1, 1, 1, 1, 0, 0, 0]])
    layer.weight.grad = torch.ones(1, 7)
    masks.update(0.5, "gradient", generator())
    assert masks.active["weight"].int().tolist() == [[1, 1, 1, 1, 0, 0, 0]]
    assert layer.weight.tolist() == [[1, 1, 0, 0, 0, 0, 0]]
    layer.weight.grad = torch.tensor([[1.0, 1, 1, 1, 1, 2, 2]])
    masks.update(0.75, "gradient", generator())
    # both that are still zero end before a weight of 1, and the later of the two ones
    assert masks.active["weight"].int().tolist() == [[1, 1, 0, 0, 0, 1, 1]]


def test_random_growth_is_a_uniform_sample_without_replacement():
    times = torch.zeros(12)
    draws = generator(3)
    for _ in range(1000):
        _, masks = one_layer([[4.0, 3, 2, 1, *[0.0] * 8]], [[1] * 4 + [0] * 8])
        masks.update(0.5, "random", draws)
        assert int(masks.active["weight"].sum()) == 4
        assert masks.active["weight"][0, :2].all()
        times += masks.active["weight"][0]
    # two of ten places, the two that ended included: 200 times each, sqrt(1000 * 0.2 * 0.8) = 13
    assert (times[2:] - 200).abs().max() < 4 * 13


@pytest.mark.parametrize(
    ("build", "num_full"),
    [(functools.partial(resnet20, width=8), 3), (functools.partial(mlp, hidden=(64, 64)), 0)],
)
def test_exploration_replaces_four_fifths(build, num_full):
    network = build(10, input_shape=(1, 8, 8))
    masks = Masks.random(network, 0.9, generator())
    old = {name: mask.clone() for name, mask in masks.active.items()}
    size = {name: (weight.data != 0).sum() for name, weight in maskable(network).items()}
    grown = masks.update(0.8, "random", generator())
    full = [name for name, mask in old.items() if mask.all()]
    assert len(full) == num_full
    for name, weight in maskable(network).items():
        if name in full:
            assert masks.active[name].all()
            assert (weight.data != 0).sum() == size[name]
            continue
        count = int(old[name].sum())
        moved = math.ceil(0.8 * count - 1e-9)
        assert int(grown[weight].sum()) == moved
        # immediate regrowth: of what ended so much as its share of all free places
        replaced = int((old[name] & ~masks.active[name]).sum())
        free = old[name].numel() - count + moved
        expected = moved * (1 - moved / free)
        assert replaced == pytest.approx(expected, abs=5 * math.sqrt(expected))
    replaced = sum(int((old[name] & ~masks.active[name]).sum()) for name in old if name not in full)
    assert 0.65 < replaced / sum(int(old[name].sum()) for name in old if name not in full) <= 0.8


@pytest.mark.parametrize("growth", ["gradient", "random"])
def test_growth_leaves_the_function_as_pruning_left_it(growth):
    torch.manual_seed(0)
    network = resnet20(10, input_shape=(1, 8, 8), width=4).eval()
    masks = Masks.random(network, 0.8, generator())
    x = torch.randn(5, 1, 8, 8)
    network(x).square().sum().backward()
    kept = {}
    for name, weight in maskable(network).items():
        count = int(masks.active[name].sum())
        order = (
            weight.detach()
            .abs()
            .flatten()
            .masked_fill(~masks.active[name].flatten(), -1)
            .argsort(descending=True)
        )
        keep = torch.zeros(weight.numel(), dtype=torch.bool)
        keep[order[: count if masks.active[name].all() else count - math.ceil(0.3 * count)]] = True
        kept[name] = keep.view(weight.shape)
    grown = masks.update(0.3, growth, generator())
    with torch.no_grad():
        after = network(x)
        for name, weight in maskable(network).items():
            weight.masked_fill_(~kept[name], 0)
        assert torch.equal(network(x), after)
    assert all((weight[began] == 0).all() and began.any() for weight, began in grown.items())


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW"])
def test_state_of_grown_weights_is_forgotten(optimizer):
    layer = nn.Linear(6, 5)
    masks = Masks.random(layer, 0.5, generator())
    made = getattr(torch.optim, optimizer)(
        layer.parameters(), lr=0.1, **({"momentum": 0.9} if optimizer == "SGD" else {})
    )
    layer(torch.randn(4, 6)).square().sum().backward()
    made.step()
    masks.apply()
    grown = masks.update(0.5, "random", generator())
    before = {name: state.clone() for name, state in made.state[layer.weight].items()}
    forget(made, grown)
    began = grown[layer.weight]
    tensors = [name for name, state in before.items() if state.shape == layer.weight.shape]
    assert len(tensors) == (1 if optimizer == "SGD" else 2)
    for name in tensors:
        now = made.state[layer.weight][name]
        assert (now[began] == 0).all()
        assert torch.equal(now[~began], before[name][~began])
        assert (before[name][began] != 0).any()


def test_scaled_layers_vary_as_much_as_dense_ones():
    torch.manual_seed(0)
    dense = nn.Linear(500, 400, bias=False)
    x = torch.randn(200, 500)
    for init, expected in (("scaled", 1.0), ("plain", 0.2**0.5)):
        sparse = copy.deepcopy(dense)
        Masks.random(sparse, 0.8, generator(), init)
        with torch.no_grad():
            assert float(sparse(x).std() / dense(x).std()) == pytest.approx(expected, rel=0.02)


def test_by_magnitude_keeps_the_largest_of_all_layers():
    network = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False))
    network[0].weight.data = torch.tensor([[0.1, -5, 0.2], [4, 0.3, -0.4]])
    network[1].weight.data = torch.tensor([[-3, 0.15], [2, 0.05]])
    masks = Masks.by_magnitude(network, 0.6)
    assert len(masks) == 4
    assert network[0].weight.tolist() == [[0, -5, 0], [4, 0, 0]]
    assert network[1].weight.tolist() == [[-3, 0], [2, 0]]


def test_masks_are_for_linear_and_convolution_weights_alone():
    network = resnet20(10, width=4)
    network.fc.weight.requires_grad_(False)
    layers = {name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    assert set(maskable(network)) == {f"{name}.weight" for name in layers}
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    assert list(maskable(tied)) == ["0.weight"]
    with pytest.raises(UnfitNetworkError, match="nothing to make sparse"):
        maskable(nn.BatchNorm2d(3))


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_a_sparsity_that_is_none(sparsity):
    for make in (Masks.by_magnitude, functools.partial(Masks.random, generator=generator())):
        with pytest.raises(InputError, match="sparsity is between 0 and 1"):
            make(nn.Linear(3, 3), sparsity)


def test_a_layer_without_weights_is_an_error():
    # 90 weights: shares 0.59, 0.59 and 88.8
    with pytest.raises(InputError, match=r"sparsity 0\.999 leaves layer 2 of 3 no weight"):
        erk_counts([(2, 2), (2, 2), (300, 300)], 0.001)


def test_growth_by_gradient_needs_a_gradient():
    with pytest.raises(RuntimeError, match="weight has no gradient"):
        Masks.random(nn.Linear(4, 4), 0.5, generator()).update(0.5, "gradient", generator())
