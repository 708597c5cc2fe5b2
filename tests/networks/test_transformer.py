from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lifelong_ens import SELF_ATTENTION, batch_ensemble
from lifelong_ens.convert import MemberNetwork
from lifelong_ens.errors import InputError
from lifelong_ens.layers.bank import Bank
from lifelong_ens.networks.transformer import EncoderDecoder, encoder_decoder, greedy_decode, sinusoids

PAD, START, END, VOCABULARY = 0, 1, 2, 11


@pytest.fixture
def network(randomise: Callable[..., Any]) -> EncoderDecoder:
    return randomise(encoder_decoder(VOCABULARY, width=8, heads=2, layers=2, dropout=0.3)).eval()


def with_members(network: nn.Module, num_members: int = 3) -> MemberNetwork:
    torch.manual_seed(1)
    ensemble = batch_ensemble(network, num_members, include=SELF_ATTENTION)
    with torch.no_grad():
        for bank in (module for module in ensemble.modules() if isinstance(module, Bank)):
            bank.active.add_(torch.randn_like(bank.active) * 0.5)
    return ensemble


def tokens(*rows: list[int]) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[PAD] * (longest - len(row))] for row in rows])


def test_a_position_does_not_see_later_tokens(network: EncoderDecoder) -> None:
    source, target = tokens([3, 4, 5, 2]), tokens([1, 6, 7, 8, 9])
    changed = target.clone()
    changed[0, 3] = 5
    out, other = network(source, target), network(source, changed)
    torch.testing.assert_close(out[:, :3], other[:, :3])
    assert (out[:, 3:] - other[:, 3:]).abs().amax(dim=-1).min() > 0.01


@pytest.mark.parametrize("training", [True, False])
def test_padding_changes_nothing(training: bool, network: EncoderDecoder) -> None:
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    for model in (network, with_members(network)):
        model.train(training)
        with torch.set_grad_enabled(training):
            alone = model(tokens([3, 4, 2]), tokens([1, 6]))
            beside = model(tokens([3, 4, 2], [3, 4, 5, 6, 2]), tokens([1, 6], [1, 6, 7, 8]))
        torch.testing.assert_close(beside[..., :1, :2, :], alone)


def test_positions_matter_and_are_the_papers(network: EncoderDecoder) -> None:
    one, other = network(tokens([3, 4, 2]), tokens([1])), network(tokens([4, 3, 2]), tokens([1]))
    assert (one - other).abs().max() > 0.01
    table = sinusoids(50, 6)
    assert table[7, 2] == pytest.approx(math.sin(7 / 10_000 ** (2 / 6)), abs=1e-5)
    assert table[49, 5] == pytest.approx(math.cos(49 / 10_000 ** (4 / 6)), abs=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_number_of_parameters(tied: bool) -> None:
    network = encoder_decoder(VOCABULARY, width=8, heads=2, layers=3, feedforward=20, tied=tied)
    attention = 4 * (8 * 8 + 8)
    feedforward = 8 * 20 + 20 + 20 * 8 + 8
    encoder, decoder = attention + feedforward + 2 * 16, 2 * attention + feedforward + 3 * 16
    expected = 3 * (encoder + decoder) + 2 * 16 + (1 if tied else 2) * VOCABULARY * 8
    assert sum(parameter.numel() for parameter in network.parameters()) == expected
    # self-attention of 3 + 3 layers, four projections each: r and s, and three biases beside the one there was
    more = sum(p.numel() for p in with_members(network, 4).parameters()) - expected
    assert more == 6 * 4 * (4 * 2 * 8 + 3 * 8)


def test_layers_start_differently_and_the_output_is_tied() -> None:
    network = encoder_decoder(VOCABULARY, width=8, heads=2)
    first, second = (layer.get_parameter("linear1.weight") for layer in network.encoder.layers)
    assert not torch.equal(first, second)
    assert network.output.weight is network.embedding.weight
    assert not network.embedding.weight[PAD].any()
    ensemble: Any = with_members(network).body
    assert ensemble.output.weight is ensemble.embedding.weight


@pytest.mark.parametrize("include", [None, SELF_ATTENTION], ids=["all", "self-attention"])
def test_members_are_the_networks_they_are_exported_as(include: Any, network: EncoderDecoder) -> None:
    ensemble = batch_ensemble(network, 3, include=include, init="gaussian")
    source, target = tokens([3, 4, 2], [5, 6, 7, 2]), tokens([1, 6, 7], [1, 8])
    out = ensemble(source, target)
    assert out.shape == (3, 2, 3, VOCABULARY)
    for member in range(3):
        expected = ensemble.export_member(member)(source, target)
        torch.testing.assert_close(out[member], expected, rtol=1e-4, atol=1e-4)
    assert (out[0] - out[1]).abs().max() > 0.1


def by_hand(networks: list[Any], source: list[int], max_length: int) -> list[int]:
    """One sentence, one network after the other, no batch and no cache."""
    target = [START]
    while len(target) <= max_length and END not in target:
        chances = [one(torch.tensor([source]), torch.tensor([target]))[0, -1].softmax(0) for one in networks]
        target.append(int(torch.stack(chances).mean(0).argmax()))
    return target[1:]


def test_greedy_decoding_is_that_of_each_sentence_alone(network: EncoderDecoder) -> None:
    sentences = [[3, 4, 2], [5, 6, 7, 8, 2], [9, 2], [10, 10, 2]]
    ensemble = with_members(network)
    members = [ensemble.export_member(member) for member in range(3)]
    with torch.no_grad():
        network.output.weight[END] *= 2
        for model, networks in ((network, [network]), (ensemble, members)):
            out = greedy_decode(model, tokens(*sentences), start=START, end=END, max_length=6)
            expected = [by_hand(networks, sentence, 6) for sentence in sentences]
            assert [row[: len(one)].tolist() for row, one in zip(out, expected, strict=True)] == expected
            assert all(not row[len(one) :].any() for row, one in zip(out, expected, strict=True))


def test_probabilities_are_averaged_not_logits(network: EncoderDecoder) -> None:
    ensemble = with_members(network, 2)
    source = tokens([3, 4, 5, 2])
    chances = ensemble(source, tokens([START])).softmax(-1)[:, 0, -1]
    first = greedy_decode(ensemble, source, start=START, end=END, max_length=1)
    assert int(first) == int(chances.mean(0).argmax())


@pytest.mark.parametrize(
    "options",
    [{"width": 9}, {"width": 6, "heads": 4}, {"heads": 0}, {"layers": 0}, {"pad": 11}, {"dropout": 1.0}],
)
def test_what_cannot_be_built_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected"):
        encoder_decoder(VOCABULARY, **options)
