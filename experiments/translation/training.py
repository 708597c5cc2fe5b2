"""One network trained to translate, watched on validation text and tested at its best."""

from __future__ import annotations

import copy
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.translation.setting import Row, Setting
from experiments.translation.text import SPLITS, Corpus
from experiments.translation.tokens import END, PAD, START, Batch, Sentences, Vocabulary
from lifelong_ens.accounting.components import sizes
from lifelong_ens.accounting.flops import FlopMeter
from lifelong_ens.accounting.meter import TrainingMeter
from lifelong_ens.convert import SELF_ATTENTION, MemberNetwork, batch_ensemble
from lifelong_ens.layers.bank import banks
from lifelong_ens.networks.transformer import EncoderDecoder, encoder_decoder, greedy_decode
from lifelong_ens.training.fit import Fit
from lifelong_ens.training.loop import EarlyStopping, Optimisation, evaluating, run_epoch

log = logging.getLogger(__name__)

Network = EncoderDecoder | MemberNetwork
# rows of a batch when nothing is trained, all members' together; each holds numbers for a whole vocabulary a token
EVALUATION_ROWS = 256


@dataclass(frozen=True)
class Task:
    """Text as token ids, and what it was made of."""

    corpus: Corpus
    vocabulary: Vocabulary
    sentences: Mapping[str, Sentences]

    @classmethod
    def of(cls, corpus: Corpus, setting: Setting) -> Task:
        """Tokens learnt from the training text alone; of its pairs those that are not too long."""
        train = corpus.splits["train"]
        vocabulary = Vocabulary([*train.source, *train.target], setting.vocabulary_size)
        sentences = {split: Sentences.of(corpus.splits[split], vocabulary) for split in SPLITS}
        return cls(corpus, vocabulary, {**sentences, "train": sentences["train"].up_to(setting.max_tokens)})


def build(row: Row, setting: Setting, vocabulary_size: int, seed: int) -> Network:
    """The row's network; the shared weights of all rows start alike."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        plain = encoder_decoder(
            vocabulary_size, setting.width, setting.heads, setting.layers, dropout=setting.dropout, pad=PAD
        )
        if row.num_members == 1:
            return plain
        include = SELF_ATTENTION if row.members_in == "self_attention" else None
        return batch_ensemble(plain, row.num_members, include=include, init=row.init)


def token_loss(network: nn.Module, source: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each token after the tokens before it; every member sees all pairs, and losses are averaged."""
    logits = network(source, target[:, :-1])
    labels = target[:, 1:].expand(logits.shape[:-1])
    return F.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), ignore_index=PAD, label_smoothing=label_smoothing
    )


def perplexity(network: Network, sentences: Sentences, device: torch.device) -> tuple[float, float]:
    """Of a token after those before it: of the members' averaged probabilities, and the geometric mean of members.

    A plain network is its only member. Sentences end with a token that counts too.
    """
    averaged, alone, tokens = 0.0, 0.0, 0
    with evaluating(network):
        for rows in sentences.by_length(_evaluation_size(network)):
            source, target = (part.to(device) for part in sentences.batch(rows))
            logits = network(source, target[:, :-1])
            chances = logits.reshape(members_of(network), *logits.shape[-3:]).log_softmax(-1)
            labels = target[:, 1:]
            right = chances.gather(-1, labels.expand(len(chances), -1, -1).unsqueeze(-1)).squeeze(-1)
            right = right[:, labels != PAD].cpu().double()
            averaged -= float((right.logsumexp(0) - math.log(len(right))).sum())
            alone -= float(right.mean(0).sum())
            tokens += right.shape[1]
    return math.exp(averaged / tokens), math.exp(alone / tokens)


def members_of(network: Network) -> int:
    """How many members answer."""
    return network.num_members if isinstance(network, MemberNetwork) else 1


def translate(
    network: Network, sentences: Sentences, task: Task, max_tokens: int, device: torch.device
) -> list[str]:
    """Greedy translations of the source side, in its order."""
    texts: dict[int, str] = {}
    with evaluating(network):
        for rows in sentences.by_length(_evaluation_size(network)):
            source, _ = sentences.batch(rows)
            longest = min(source.shape[1] + 10, max_tokens)
            out = greedy_decode(network, source.to(device), start=START, end=END, max_length=longest)
            texts |= zip(rows, task.vocabulary.decode(out.tolist()), strict=True)
    return [texts[row] for row in range(len(sentences))]


def train(
    network: Network, task: Task, setting: Setting, fit: Fit, seed: int, device: torch.device, label: str
) -> dict[str, Any]:
    """Train, leaving the network with the weights that did best on validation text; returns what was measured.

    Raises:
        NonFiniteLossError: A loss was NaN or infinite.
    """
    sentences = task.sentences["train"]
    steps_per_epoch = math.ceil(len(sentences) / fit.batch_size)
    steps = steps_per_epoch * fit.epochs
    optimisation = Optimisation(_groups(network), fit, steps_per_epoch)
    shapes: Counter[tuple[int, int]] = Counter()

    def compute_loss(batch: Batch) -> Tensor:
        source, target = (part.to(device, non_blocking=True) for part in batch)
        with optimisation.precision(device):
            return token_loss(network, source, target, setting.label_smoothing)

    batches = _counted(sentences.epochs(fit.batch_size, torch.Generator().manual_seed(seed)), shapes)
    meter, curve, best = TrainingMeter(), [], EarlyStopping(network, steps)
    network.train()
    for start in range(0, steps, setting.evaluate_every):
        stop = min(start + setting.evaluate_every, steps)
        with meter.timing():
            loss = run_epoch(islice(batches, stop - start), compute_loss, optimisation)
        together, alone = perplexity(network, task.sentences["valid"], device)
        curve.append({"step": stop, "loss": loss, "perplexity": together, "perplexity_member": alone})
        log.info(
            "%s: step %d of %d, loss %.3f, validation perplexity %.3f", label, stop, steps, loss, together
        )
        best.should_stop(-together)
    best.restore()
    return {
        "curve": curve,
        "seconds_training": meter.seconds,
        "flops_training": training_flops(network, shapes),
    }


def training_flops(network: nn.Module, shapes: Mapping[tuple[int, int], int]) -> int:
    """FLOPs of the training steps on so many pairs of each shape ``(S, T)``, counted on tensors without numbers."""
    twin = copy.deepcopy(network).to("meta").train()
    total = 0
    for lengths, rows in shapes.items():
        source, target = (torch.zeros(1, length, dtype=torch.long, device="meta") for length in lengths)
        twin.zero_grad()
        with FlopMeter(twin) as meter:
            token_loss(twin, source, target).backward()
        total += rows * meter.total
    return total


def scores(
    network: Network, task: Task, setting: Setting, device: torch.device, shown: int = 10
) -> dict[str, Any]:
    """Perplexity, BLEU and exact matches on the test text, with the first translations to look at."""
    from sacrebleu.metrics.bleu import BLEU

    sentences, pairs = task.sentences["test"], task.corpus.splits["test"]
    together, alone = perplexity(network, sentences, device)
    meter = TrainingMeter()
    with meter.timing():
        texts = translate(network, sentences, task, setting.max_tokens, device)
    bleu = BLEU()
    score = bleu.corpus_score(texts, [list(pairs.target)])
    first = zip(pairs.source[:shown], pairs.target[:shown], texts[:shown], strict=True)
    return {
        "test_perplexity": together,
        "test_perplexity_member": alone,
        "bleu": score.score,
        "bleu_signature": str(bleu.get_signature()),
        "exact": sum(map(str.__eq__, texts, pairs.target)) / len(pairs),
        "seconds_translating": meter.seconds,
        "examples": [
            {"source": source, "reference": reference, "translation": text}
            for source, reference, text in first
        ],
    }


def stored(network: nn.Module) -> dict[str, int]:
    """Parameters of each component."""
    return {component: size.parameters for component, size in sizes(network).items()}


def _counted(batches: Iterator[Batch], shapes: Counter[tuple[int, int]]) -> Iterator[Batch]:
    for source, target in batches:
        shapes[source.shape[1], target.shape[1]] += len(source)
        yield source, target


def _evaluation_size(network: Network) -> int:
    return max(EVALUATION_ROWS // members_of(network), 1)


def _groups(network: nn.Module) -> list[dict[str, Any]]:
    """Fast weights are spared weight decay."""
    fast = [
        cast("nn.Parameter", bank.active)
        for bank in banks(network)
        if bank.component == "fast_weights" and bank.active is not None
    ]
    theirs = set(map(id, fast))
    rest = [parameter for parameter in network.parameters() if id(parameter) not in theirs]
    return [{"params": rest}, *([{"params": fast, "weight_decay": 0.0}] if fast else [])]
