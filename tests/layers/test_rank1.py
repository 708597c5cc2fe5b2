from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from lifelong_ens.layers.convolution import Rank1Conv1d, Rank1Conv2d, Rank1Conv3d
from lifelong_ens.layers.linear import Rank1Linear
from lifelong_ens.layers.rank1 import Rank1Layer, explain

Randomise = Callable[..., nn.Module]

CONVS: dict[str, tuple[type[Rank1Layer], dict[str, Any], tuple[int, ...]]] = {
    "1d": (Rank1Conv1d, {"kernel_size": 3}, (9,)),
    "1d circular": (Rank1Conv1d, {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}, (9,)),
    "2d": (Rank1Conv2d, {"kernel_size": 3}, (7, 6)),
    "2d no bias": (Rank1Conv2d, {"kernel_size": (3, 2), "bias": False}, (7, 6)),
    "2d groups": (Rank1Conv2d, {"kernel_size": 3, "groups": 2, "padding": 1}, (5, 6)),
    "2d depthwise": (Rank1Conv2d, {"kernel_size": 3, "groups": 4, "out_channels": 8}, (5, 6)),
    "2d stride and dilation": (Rank1Conv2d, {"kernel_size": 3, "stride": (2, 1), "dilation": (1, 2)}, (9, 9)),
    "2d same": (Rank1Conv2d, {"kernel_size": 3, "padding": "same", "padding_mode": "reflect"}, (6, 6)),
    "2d replicate": (Rank1Conv2d, {"kernel_size": 3, "padding": 2, "padding_mode": "replicate"}, (5, 5)),
    "3d": (Rank1Conv3d, {"kernel_size": 2, "groups": 2}, (4, 3, 3)),
}
CASES = ["linear 2d", "linear 3d", "linear no bias", *CONVS]
# rank and additive
PAIRS = {"rank 1": (1, 0), "rank 3": (3, 0), "additive 2": (1, 2), "rank 2 and additive 1": (2, 1)}
NUM_MEMBERS = 3


def build(case: str, num_members: int = NUM_MEMBERS, pairs: str = "rank 1") -> tuple[Any, tuple[int, ...]]:
    """A layer, and the shape of one of its rows."""
    members: dict[str, Any] = {"num_members": num_members, "init": "gaussian"}
    members |= dict(zip(("rank", "additive"), PAIRS[pairs], strict=True))
    if case.startswith("linear"):
        return Rank1Linear(5, 4, "no bias" not in case, **members), (2, 5) if "3d" in case else (5,)
    kind, options, size = CONVS[case]
    options = {"in_channels": 4, "out_channels": 6, **options}
    return kind(**options, **members), (4, *size)


def filled(
    case: str, randomise: Randomise, num_members: int = NUM_MEMBERS, pairs: str = "rank 1"
) -> tuple[Any, tuple[int, ...]]:
    layer, shape = build(case, num_members, pairs)
    return randomise(layer).double(), shape


def leaves(layer: Any) -> dict[str, Tensor]:
    """The layer's own numbers: W, r, s; where there are any, b, further pairs R, S and added ones v, u."""
    found = {"W": layer.weight, "r": layer.r.active, "s": layer.s.active}
    if layer.private_bias is not None:
        found["b"] = layer.private_bias.active
    for pairs, names in ((layer.more, "RS"), (layer.added, "vu")):
        if pairs is not None:
            found |= {names[0]: pairs.r.active, names[1]: pairs.s.active}
    return found


def tensors(layer: Any) -> dict[str, Tensor]:
    """Copies of ``leaves``, to be trained beside them."""
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in leaves(layer).items()}


def dense_weight(parts: dict[str, Tensor], member: int, groups: int) -> Tensor:
    """``W * (sum_j s_j r_j^T) + sum_j u_j v_j^T`` entry by entry."""
    W, r, s = parts["W"], parts["r"][member][None], parts["s"][member][None]
    if "R" in parts:
        r, s = torch.cat([r, parts["R"][member]]), torch.cat([s, parts["S"][member]])
    outs, ins_per_group = W.shape[:2]
    channels = []
    for out in range(outs):
        group = out // (outs // groups)
        inputs = [
            sum(r[j, group * ins_per_group + i] * s[j, out] for j in range(len(r))) * W[out, i]
            for i in range(ins_per_group)
        ]
        unit = torch.stack(inputs)
        if "u" in parts:
            u, v = parts["u"][member], parts["v"][member]
            unit = unit + sum(u[j, out] * v[j].view_as(unit) for j in range(len(u)))
        channels.append(unit)
    return torch.stack(channels)


def dense_row(layer: Any, parts: dict[str, Tensor], x: Tensor, member: int) -> Tensor:
    """One row ``(1, ...)`` through the member's own dense layer, torch's plain one."""
    weight = dense_weight(parts, member, getattr(layer, "groups", 1))
    bias = parts["b"][member] if "b" in parts else None
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    names = ("stride", "padding", "dilation", "groups", "padding_mode")
    options = {name: getattr(layer, name) for name in names}
    has_bias = bias is not None
    sizes = (layer.in_channels, layer.out_channels, layer.kernel_size)
    plain = layer.plain(*sizes, bias=has_bias, dtype=torch.float64, **options)
    tensors = {"weight": weight} | ({"bias": bias} if has_bias else {})
    return torch.func.functional_call(plain, tensors, (x,))


def owners(members: int | Tensor | None, rows: int, num_members: int = NUM_MEMBERS) -> list[int]:
    """Whose each row is, as the documentation of ``Selection`` says."""
    if isinstance(members, int):
        return [members] * rows
    chosen = list(range(num_members)) if members is None else members.tolist()
    return [chosen[row // (rows // len(chosen))] for row in range(rows)]


def assert_as_dense(
    layer: Any, x: Tensor, members: int | Tensor | None, atol: float | None = None
) -> list[Any]:
    """The layer answers as the dense form of each row's member does, and so do gradients of all that learns.

    Returns:
        The gradients, of ``x`` first where it learns, then of ``leaves``.
    """
    tolerance: Any = {} if atol is None else {"atol": atol, "rtol": 1e-7}
    parts = tensors(layer)
    with layer.selection.of(members):
        out = layer(x)
    whose = owners(members, len(x), layer.r.num_members)
    expected = torch.cat([dense_row(layer, parts, x[i : i + 1], m) for i, m in enumerate(whose)])
    torch.testing.assert_close(out, expected, **tolerance)
    own = {name: leaf for name, leaf in leaves(layer).items() if leaf.requires_grad}
    inputs = {"x": x} if x.requires_grad else {}
    if not out.requires_grad:
        return []
    direction = torch.randn_like(out)
    grads = torch.autograd.grad((out * direction).sum(), [*(inputs | own).values()], allow_unused=True)
    dense_leaves = [*inputs.values(), *(parts[name] for name in own)]
    dense = torch.autograd.grad((expected * direction).sum(), dense_leaves, allow_unused=True)
    for name, grad, dense_grad in zip(inputs | own, grads, dense, strict=True):
        assert (grad is None) == (dense_grad is None), name
        if grad is not None and dense_grad is not None:
            message = f"gradient of {name}"
            torch.testing.assert_close(
                grad, dense_grad, **tolerance, msg=lambda text, m=message: f"{m}: {text}"
            )
    return [*grads]


SELECTIONS: dict[str, int | Tensor | None] = {
    "all in blocks": None,
    "some in blocks": torch.tensor([2, 0]),
    "one": 1,
    "one as a tensor": torch.tensor([2]),
    "one id a row": torch.tensor([2, 0, 0, 1, 2, 1]),
}


@pytest.mark.parametrize("members", SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pairs", PAIRS)
def test_equals_the_dense_form_and_so_do_its_gradients(
    case: str, members: int | Tensor | None, pairs: str, randomise: Randomise
) -> None:
    layer, shape = filled(case, randomise, pairs=pairs)
    assert_as_dense(layer, torch.randn(6, *shape, dtype=torch.float64, requires_grad=True), members)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pairs", PAIRS)
def test_export_is_the_plain_layer_with_the_members_dense_weight(
    case: str, pairs: str, randomise: Randomise
) -> None:
    layer, shape = filled(case, randomise, pairs=pairs)
    x = torch.randn(2, *shape, dtype=torch.float64)
    for member in range(NUM_MEMBERS):
        plain = layer.export(member)
        assert type(plain) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        with layer.selection.of(member):
            torch.testing.assert_close(plain(x), layer(x))
        expected = dense_weight(tensors(layer), member, getattr(layer, "groups", 1))
        torch.testing.assert_close(layer.member_weight(member), expected)


@pytest.mark.parametrize("case", CASES)
def test_permuting_rows_permutes_outputs_and_swapping_blocks_swaps_members(
    case: str, randomise: Randomise
) -> None:
    layer, shape = filled(case, randomise)
    block = torch.randn(4, *shape, dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    a, b, c = layer(block.repeat(3, *[1] * len(shape))).chunk(3)
    permuted = layer(block[order].repeat(3, *[1] * len(shape)))
    torch.testing.assert_close(permuted, torch.cat([a[order], b[order], c[order]]))
    with layer.selection.of(torch.tensor([1, 0])):
        swapped = layer(block.repeat(2, *[1] * len(shape)))
    torch.testing.assert_close(swapped, torch.cat([b, a]))
    assert (a - b).abs().max() > 0.01


@pytest.mark.parametrize(
    "plain",
    [
        nn.Linear(31, 17),
        nn.Linear(31, 17, bias=False),
        nn.Conv1d(3, 8, 3),
        nn.Conv2d(4, 8, 3, groups=2, padding=1, padding_mode="reflect"),
        nn.Conv3d(3, 8, 2, bias=False),
    ],
    ids=lambda plain: type(plain).__name__,
)
def test_one_member_of_ones_is_the_plain_layer_to_the_bit(plain: nn.Module, randomise: Randomise) -> None:
    randomise(plain)
    kinds = {nn.Linear: Rank1Linear, nn.Conv1d: Rank1Conv1d, nn.Conv2d: Rank1Conv2d, nn.Conv3d: Rank1Conv3d}
    layer = kinds[type(plain)].of(plain, 1, init="ones")  # type: ignore[arg-type]
    channels = plain.weight.shape[1] * getattr(plain, "groups", 1)
    x = torch.randn(17, channels, *[7] * (plain.weight.dim() - 2))
    assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize("pairs", ["rank 1", "rank 3"])
@pytest.mark.parametrize("case", ["linear 2d", "2d"])
def test_rows_that_do_not_split_are_refused(case: str, pairs: str) -> None:
    layer, shape = build(case, 2, pairs)
    name = type(layer).__name__
    message = f"{name}: 5 rows do not split into 2 members; pass ids, or stack one block of rows per member."
    with pytest.raises(ValueError, match=message):
        layer(torch.zeros(5, *shape))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_linear_layers_of_any_shape_ids_and_dtype(data: st.DataObject) -> None:
    num_members, size_in, size_out = (data.draw(st.integers(1, 4)) for _ in range(3))
    middle = data.draw(st.lists(st.integers(1, 3), max_size=2))
    rows = data.draw(st.integers(1, 9))
    by_id = data.draw(st.booleans())
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    rank, additive = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 2))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    layer = Rank1Linear(
        size_in, size_out, num_members=num_members, init="gaussian", rank=rank, additive=additive
    ).to(dtype)
    with torch.no_grad():
        layer.private_bias.active.normal_()
        for pairs in (layer.more, layer.added):
            if pairs is not None:
                pairs.s.active.normal_()
    x = torch.randn(rows, *middle, size_in).to(dtype)
    ids = data.draw(st.lists(st.integers(0, num_members - 1), min_size=rows, max_size=rows))
    if not by_id and rows % num_members:
        with pytest.raises(ValueError, match=f"{rows} rows do not split into {num_members} members"):
            layer(x)
        return
    members = torch.tensor(ids) if by_id else None
    with layer.selection.of(members):
        out = layer(x)
    assert out.dtype == dtype
    parts = {name: tensor.double() for name, tensor in tensors(layer).items()}
    for row, member in enumerate(owners(members, rows, num_members)):
        expected = F.linear(x[row].double(), dense_weight(parts, member, 1), parts["b"][member])
        tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.1}[dtype]
        torch.testing.assert_close(out[row].double(), expected, rtol=tolerance, atol=tolerance)


MODES = st.sampled_from(["scale", "merge", "batched"])
LEARNS = st.sampled_from(["all", "not the shared weight", "vectors alone", "nothing"])


# the fixture is told the mode anew for every example
@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_convolutions_of_any_shape_run_in_every_way_as_their_dense_form(
    data: st.DataObject, forced: Callable[[str], None]
) -> None:
    groups, num_members = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    sizes = [data.draw(st.integers(1, 3)) * groups for _ in range(2)]
    dims = data.draw(st.integers(1, 2))
    options: dict[str, Any] = {name: data.draw(st.integers(1, 2)) for name in ("stride", "dilation")}
    options |= {"kernel_size": data.draw(st.integers(1, 3)), "padding": data.draw(st.integers(0, 2))}
    options |= {"groups": groups, "bias": data.draw(st.booleans()), "num_members": num_members}
    options["padding_mode"] = data.draw(st.sampled_from(["zeros", "replicate"]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    layer = {1: Rank1Conv1d, 2: Rank1Conv2d}[dims](*sizes, init="gaussian", **options).double()
    learns = data.draw(LEARNS)
    layer.weight.requires_grad_(learns == "all")
    layer.train(learns != "nothing")
    rows = data.draw(st.integers(1, 3)) * num_members
    x = torch.randn(rows, sizes[0], *[7] * dims, dtype=torch.float64)
    x.requires_grad_(learns in ("all", "not the shared weight"))
    ids = data.draw(st.lists(st.integers(0, num_members - 1), min_size=rows, max_size=rows))
    members = data.draw(st.sampled_from([None, ids[0], torch.tensor(ids)]))
    forced(data.draw(MODES))
    assert_as_dense(layer, x, members)


def nested(num_members: int, **pairs: int) -> nn.Module:
    """Rank-1 layers inside blocks, all with one selection."""
    members: dict[str, Any] = {"num_members": num_members, "init": "gaussian", **pairs}
    layers = [
        Rank1Conv2d(3, 8, 3, padding=1, **members),
        Rank1Conv2d(8, 8, 3, padding=1, groups=4, **members),
        Rank1Linear(8, 5, **members),
    ]
    for layer in layers:
        layer.selection = layers[0].selection
    body = nn.Sequential(layers[0], nn.ReLU(), nn.Sequential(layers[1], nn.ReLU()))
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), layers[2])


@pytest.mark.parametrize("pairs", [{}, {"rank": 2, "additive": 1}])
def test_autocast_keeps_bfloat16_in_and_out_of_every_layer(pairs: dict[str, int]) -> None:
    network = nested(2, **pairs)
    seen: list[tuple[torch.dtype, torch.dtype]] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((inputs[0].dtype, output.dtype))

    for module in network.modules():
        if isinstance(module, Rank1Layer):
            module.register_forward_hook(note)
    with torch.autocast("cpu", torch.bfloat16):
        network(torch.randn(4, 3, 5, 5))
    bf16 = torch.bfloat16
    assert seen == [(torch.float32, bf16), (bf16, bf16), (bf16, bf16)]


@pytest.mark.parametrize("pairs", [{}, {"rank": 2, "additive": 1}])
@pytest.mark.parametrize("grad", [True, False])
def test_one_compilation_serves_all_batch_sizes(grad: bool, pairs: dict[str, int]) -> None:
    network, counter = nested(2, **pairs), CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(network, backend=counter, fullgraph=True)
    with torch.set_grad_enabled(grad):
        for size in (40, 44, 68, 128):  # below 16 rows of a member torch picks another grouped convolution
            x = torch.randn(size, 3, 5, 5)
            torch._dynamo.mark_dynamic(x, 0)
            torch.testing.assert_close(compiled(x), network(x))
    torch._dynamo.reset()
    assert counter.frame_count == 1


@pytest.mark.parametrize("mode", ["scale", "merge", "batched"])
@pytest.mark.parametrize("members", SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("learns", ["all", "not the shared weight", "not the input", "vectors alone"])
def test_every_way_to_run_equals_the_dense_form_and_so_do_its_gradients(
    mode: str,
    case: str,
    members: int | Tensor | None,
    learns: str,
    randomise: Randomise,
    forced: Callable[[str], None],
) -> None:
    forced(mode)
    layer, shape = filled(case, randomise)
    layer.weight.requires_grad_(learns in ("all", "not the input"))
    x = torch.randn(6, *shape, dtype=torch.float64, requires_grad=learns in ("all", "not the shared weight"))
    assert_as_dense(layer, x, members)


def test_gradients_at_vectors_of_zero_are_right_where_the_shared_weight_is_frozen(
    randomise: Randomise, forced: Callable[[str], None]
) -> None:
    forced("merge")
    layer, shape = filled("2d", randomise)
    layer.weight.requires_grad_(False)
    with torch.no_grad():
        layer.r.active[1, 2] = layer.s.active[1, 3] = 0.0
    x = torch.randn(6, *shape, dtype=torch.float64, requires_grad=True)
    named = [name for name, leaf in leaves(layer).items() if leaf.requires_grad]
    grads = dict(zip(["x", *named], assert_as_dense(layer, x, 1, atol=1e-9), strict=True))
    assert grads["r"][1, 2] != 0
    assert grads["s"][1, 3] != 0


def test_an_activation_in_place_right_after_the_layer_is_no_error(
    randomise: Randomise, forced: Callable[[str], None]
) -> None:
    forced("merge")
    layer, shape = filled("2d no bias", randomise)
    layer.weight.requires_grad_(False)
    x = torch.randn(6, *shape, dtype=torch.float64, requires_grad=True)
    found = []
    for activation in (F.relu, F.relu_):
        with layer.selection.of(1):
            out = activation(layer(x))
        found.append(torch.autograd.grad(out.square().sum(), [x, layer.r.active, layer.s.active]))
    for plain, in_place in zip(*found, strict=True):
        torch.testing.assert_close(plain, in_place)


@pytest.mark.parametrize("mode", ["scale", "merge"])
@pytest.mark.parametrize("frozen", [True, False])
def test_bfloat16_gradients_are_near_those_of_float32(
    mode: str, frozen: bool, randomise: Randomise, forced: Callable[[str], None]
) -> None:
    forced(mode)
    layer, shape = filled("2d", randomise)
    layer = layer.float()
    layer.weight.requires_grad_(not frozen)
    x = torch.randn(16, *shape, requires_grad=True)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), layer.selection.of(1):
            out = layer(x)
        assert out.dtype == (torch.bfloat16 if enabled else torch.float32)
        found.append(torch.autograd.grad(out.float().square().mean(), [x, layer.r.active, layer.s.active]))
    for exact, rough in zip(*found, strict=True):
        assert rough.dtype == torch.float32
        assert (exact - rough).norm() < 0.03 * exact.norm()


def saved_bytes(run: Callable[[], Tensor], parameters: set[int]) -> int:
    """Bytes kept for the backward pass of ``run``, each storage once, parameters left out."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = run()
        total = sum(storages.values())  # while all of them are alive
    del out
    return total


@pytest.mark.parametrize("mode", ["scale", "merge"])
def test_what_is_multiplied_with_r_is_computed_again_and_not_kept(
    mode: str, randomise: Randomise, forced: Callable[[str], None]
) -> None:
    forced(mode)
    layer = Rank1Conv2d(16, 16, 3, padding=1, bias=False, num_members=1)
    x = torch.randn(32, 16, 8, 8, requires_grad=True)
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    with layer.selection.of(0):
        kept = saved_bytes(lambda: layer(x), own)
    size = x.numel() * x.itemsize
    vectors, dense = 2 * 16 * 4, 16 * 16 * 9 * 4
    assert kept == pytest.approx({"scale": 2 * size, "merge": size + dense}[mode], abs=2 * vectors)


@pytest.mark.parametrize("case", CASES)
def test_evaluation_answers_the_same_to_the_bit_whatever_needs_gradients(
    case: str, randomise: Randomise
) -> None:
    layer, shape = filled(case, randomise)
    layer.eval()
    x = torch.randn(40, *shape, dtype=torch.float64)
    with layer.selection.of(0):
        expected = layer(x)
        layer.requires_grad_(False)
        assert torch.equal(layer(x), expected)
        with torch.no_grad():
            assert torch.equal(layer(x.requires_grad_()), expected)


@pytest.mark.parametrize("case", CASES)
def test_whatever_the_rank_a_member_starts_where_one_of_rank_1_does_and_can_leave(case: str) -> None:
    torch.manual_seed(0)
    plain, shape = build(case)
    torch.manual_seed(0)
    layer, _ = build(case, pairs="rank 2 and additive 1")
    for member in range(NUM_MEMBERS):
        assert torch.equal(layer.member_weight(member), plain.member_weight(member))
    layer(torch.randn(NUM_MEMBERS, *shape)).square().sum().backward()
    for pairs in (layer.more, layer.added):
        assert (pairs.s.active.grad.abs().amax(dim=-1) > 0).all()


def test_frozen_members_answer_the_same_to_the_bit_whatever_is_asked_beside_them(
    randomise: Randomise,
) -> None:
    layer, shape = filled("2d", randomise, pairs="rank 2 and additive 1")
    x = torch.randn(3, *shape, dtype=torch.float64)
    answers = []
    for trained in (True, False):
        layer.train(trained)
        for needs_grad in (True, False):
            with layer.selection.of(1):
                answers.append(layer(x.requires_grad_(needs_grad)).detach())
    assert all(torch.equal(answer, answers[0]) for answer in answers)


def test_the_explanation_has_every_layer_once_and_why_it_runs_as_it_does() -> None:
    network = nested(2).eval()
    text = explain(network, lambda: network(torch.randn(4, 3, 5, 5)))
    names = [line.split(":")[0] for line in text.splitlines() if not line.startswith(" ")]
    assert names == ["0.0", "0.2.0", "3"]
    assert "4 rows of 2 member(s)" in text
    with network[3].selection.of(torch.tensor([0, 1, 1, 0])):
        text = explain(network, lambda: network(torch.randn(4, 3, 5, 5)))
    assert text.count("the only way for these rows") == 3
