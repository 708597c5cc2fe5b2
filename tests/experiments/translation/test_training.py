from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from experiments.translation.setting import Row, Setting
from experiments.translation.text import Corpus, Pairs
from experiments.translation.tokens import END, PAD, START
from experiments.translation.training import (
    Task,
    _groups,
    build,
    perplexity,
    scores,
    token_loss,
    train,
    training_flops,
    translate,
)
from lifelong_ens.accounting.flops import FlopMeter
from lifelong_ens.convert import MemberNetwork
from lifelong_ens.layers.bank import banks
from lifelong_ens.training.fit import Fit

CPU = torch.device("cpu")
SETTING = Setting(vocabulary_size=300, width=16, heads=2, layers=1, dropout=0.2, evaluate_every=4)
SINGLE, ENSEMBLE = Row("single"), Row("ensemble", 3)
ADAM: dict[str, Any] = {"optimizer": "adam", "learning_rate": 0.01, "weight_decay": 0.0, "clip_norm": 1.0}


def numbers(first: int, last: int, step: int = 1) -> Pairs:
    from num2words import num2words

    both = [[num2words(n, lang=language) for n in range(first, last, step)] for language in ("en", "de")]
    return Pairs(tuple(both[0]), tuple(both[1]))


@pytest.fixture(scope="module")
def task() -> Task:
    splits = {"train": numbers(0, 60), "valid": numbers(60, 80), "test": numbers(80, 100)}
    return Task.of(Corpus(splits, "small numbers", dict.fromkeys(splits, 0)), SETTING)


def randomised(network: Any) -> Any:
    torch.manual_seed(4)
    with torch.no_grad():
        for bank in banks(network):
            bank.active.add_(torch.randn_like(bank.active) * 0.3)
    return network


def test_tokens_are_learnt_from_training_text_alone(task: Task) -> None:
    splits = {**task.corpus.splits, "valid": numbers(600, 700), "test": numbers(700, 800)}
    other = Task.of(Corpus(splits, "", dict.fromkeys(splits, 0)), SETTING)
    assert other.vocabulary.sha256 == task.vocabulary.sha256


def test_rows_start_from_the_same_shared_weights(task: Task) -> None:
    single: Any = build(SINGLE, SETTING, len(task.vocabulary), seed=3)
    ensemble: Any = build(ENSEMBLE, SETTING, len(task.vocabulary), seed=3)
    assert isinstance(ensemble, MemberNetwork)
    shared = dict(ensemble.body.named_parameters())
    same = {
        name
        for name, tensor in single.named_parameters()
        if name in shared and torch.equal(tensor, shared[name])
    }
    assert "decoder.layers.0.multihead_attn.in_proj_weight" in same
    assert "embedding.weight" in same
    attention = single.encoder.layers[0].self_attn.in_proj_weight
    assert torch.equal(ensemble.body.encoder.layers[0].self_attn.k_proj.weight, attention.chunk(3)[1])
    every: Any = build(Row("all", 2, "all"), SETTING, len(task.vocabulary), seed=3)
    assert sum(1 for _ in banks(every)) > sum(1 for _ in banks(ensemble))
    other: Any = build(SINGLE, SETTING, len(task.vocabulary), seed=4)
    assert not torch.equal(other.embedding.weight, single.embedding.weight)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_loss_is_the_mean_of_the_members_losses(smoothing: float, task: Task) -> None:
    ensemble: Any = randomised(build(ENSEMBLE, SETTING, len(task.vocabulary), 0)).eval()
    source, target = task.sentences["train"].batch([0, 25, 37])
    alone = []
    for member in range(3):
        logits = ensemble.export_member(member)(source, target[:, :-1])
        labels = target[:, 1:]
        kept = labels != PAD
        chances = logits[kept].log_softmax(-1)
        right = chances.gather(1, labels[kept].unsqueeze(1)).squeeze(1)
        alone.append(-((1 - smoothing) * right + smoothing * chances.mean(1)).mean())
    loss = token_loss(ensemble, source, target, smoothing)
    torch.testing.assert_close(loss, torch.stack(alone).mean())


def test_perplexity_is_that_of_averaged_probabilities(task: Task) -> None:
    ensemble: Any = randomised(build(ENSEMBLE, SETTING, len(task.vocabulary), 0)).train()
    text = task.sentences["test"]
    together, alone, members = [], [], [ensemble.export_member(member).eval() for member in range(3)]
    with torch.no_grad():
        for source, target in zip(text.source, text.target, strict=True):
            known = torch.tensor([[START, *target]])
            chances = torch.stack(
                [one(torch.tensor([source]), known[:, :-1])[0].softmax(-1) for one in members]
            )
            right = chances.gather(2, torch.tensor(target).expand(3, -1).unsqueeze(2)).squeeze(2)
            together += right.mean(0).log().tolist()
            alone += right.log().mean(0).tolist()
    expected = [math.exp(-sum(part) / len(part)) for part in (together, alone)]
    assert perplexity(ensemble, text, CPU) == pytest.approx(expected, rel=1e-4)
    assert expected[0] < expected[1]
    assert ensemble.training
    plain: Any = members[0]
    one, same = perplexity(plain, text, CPU)
    assert one == pytest.approx(same)


@pytest.mark.parametrize("row", [SINGLE, ENSEMBLE, Row("all", 2, "all")], ids=lambda row: row.label)
def test_flops_are_those_of_the_steps_themselves(row: Row, task: Task) -> None:
    network: Any = build(row, SETTING, len(task.vocabulary), 0).train()
    total, shapes = 0, {}
    for rows in ([0, 1, 2], [25, 37]):
        source, target = task.sentences["train"].batch(rows)
        shapes[source.shape[1], target.shape[1]] = len(rows)
        network.zero_grad()
        with FlopMeter(network) as meter:
            token_loss(network, source, target).backward()
        total += meter.total
    assert len(shapes) == 2
    assert training_flops(network, shapes) == total


def test_fast_weights_are_spared_weight_decay(task: Task) -> None:
    network: Any = build(ENSEMBLE, SETTING, len(task.vocabulary), 0)
    rest, fast = _groups(network)
    assert fast["weight_decay"] == 0
    # two attentions with four projections, r and s of each
    assert sum(parameter.numel() for parameter in fast["params"]) == 2 * 4 * 3 * 2 * 16
    assert len({id(p) for p in [*rest["params"], *fast["params"]]}) == len(list(network.parameters()))
    assert len(_groups(build(SINGLE, SETTING, len(task.vocabulary), 0))) == 1


def test_training_ends_at_the_best_step(task: Task) -> None:
    network: Any = build(ENSEMBLE, SETTING, len(task.vocabulary), 0)
    fit = Fit(epochs=6, batch_size=20, schedule="constant", **{**ADAM, "learning_rate": 0.05})
    torch.manual_seed(0)
    measured = train(network, task, SETTING, fit, 0, CPU, "test")
    curve = measured["curve"]
    assert [point["step"] for point in curve] == [4, 8, 12, 16, 18]
    best = min(point["perplexity"] for point in curve)
    assert perplexity(network, task.sentences["valid"], CPU)[0] == pytest.approx(best, rel=1e-5)
    assert curve[0]["loss"] > curve[-1]["loss"]
    again: Any = build(ENSEMBLE, SETTING, len(task.vocabulary), 0)
    torch.manual_seed(0)
    assert train(again, task, SETTING, fit, 0, CPU, "test")["curve"] == curve


def test_translations_come_in_the_order_of_the_text(task: Task) -> None:
    network: Any = randomised(build(ENSEMBLE, SETTING, len(task.vocabulary), 0))
    texts = translate(network, task.sentences["test"], task, 5, CPU)
    for row in (0, 7, 19):
        source, target = [task.sentences["test"].source[row]], [[END]]
        alone = translate(network, type(task.sentences["test"])(source, target), task, 5, CPU)
        assert alone == [texts[row]]


@pytest.mark.slow
@pytest.mark.parametrize("row", [SINGLE, Row("ensemble", 4)], ids=["single", "ensemble"])
def test_numbers_are_learnt(row: Row) -> None:
    """Of the numbers below 1000 a fifth is kept for validation and test."""
    setting = Setting(vocabulary_size=300, width=32, heads=4, layers=1, dropout=0.0, evaluate_every=100)
    every = numbers(0, 1000)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).tolist()
    kept = {"train": order[200:], "valid": order[:100], "test": order[100:200]}
    splits = {
        split: Pairs(tuple(every.source[n] for n in chosen), tuple(every.target[n] for n in chosen))
        for split, chosen in kept.items()
    }
    task = Task.of(Corpus(splits, "", dict.fromkeys(splits, 0)), setting)
    network = build(row, setting, len(task.vocabulary), 0)
    fit = Fit(epochs=10, batch_size=32, warmup_epochs=2, **ADAM)
    torch.manual_seed(0)
    train(network, task, setting, fit, 0, CPU, "test")
    measured = scores(network, task, setting, CPU)
    assert measured["exact"] > 0.9
    assert measured["test_perplexity"] < 1.2
    assert measured["bleu"] == 0  # a reference of one word has no four in a row
    assert len(measured["examples"]) == 10


def test_label_smoothing_leaves_out_padding(task: Task) -> None:
    network: Any = build(SINGLE, SETTING, len(task.vocabulary), 0).eval()
    source, target = task.sentences["train"].batch([3])
    longer = [F.pad(part, [0, 4], value=PAD) for part in (source, target)]
    torch.testing.assert_close(token_loss(network, *longer, 0.2), token_loss(network, source, target, 0.2))
