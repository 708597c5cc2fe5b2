"""What is measured of an ensemble, the same for all methods."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.ensembles.data import Images
from lifelong_ens.corruptions import CORRUPTIONS, SEVERITIES, corrupted_sets
from lifelong_ens.corruptions.cifar_c import read_cifar_c
from lifelong_ens.ensembles.ensemble import Ensemble
from lifelong_ens.errors import InputError
from lifelong_ens.metrics import diversity, out_of_distribution, uncertainty
from lifelong_ens.metrics.temperature import fit_temperature
from lifelong_ens.training.data import ImageData
from lifelong_ens.training.loop import evaluating

BATCH = 256
COST_ROWS = 4


@dataclass(frozen=True)
class Protocol:
    """What is measured beside accuracy and calibration on the test images.

    Attributes:
        corruptions: Names of the corruptions, all five severities of each.
        corrupted_images: How many test images are corrupted; None for all.
        cifar_c: A folder with the official CIFAR-10-C or CIFAR-100-C files, in place of our corruptions.
        calibrate: Fit a temperature on the validation images first.
    """

    corruptions: tuple[str, ...] = ()
    corrupted_images: int | None = None
    cifar_c: Path | None = None
    calibrate: bool = False


@dataclass(frozen=True)
class Predictions:
    """What an ensemble says of some images.

    Attributes:
        members: Log-probabilities of each member, ``(members, n, classes)``.
        mean: Those of the ensemble, ``(1, n, classes)``.
        labels: ``(n,)``.
        seconds: How long it took.
    """

    members: Tensor
    mean: Tensor
    labels: Tensor
    seconds: float


def check_protocol(protocol: Protocol, images: Images) -> None:
    """See before anything is trained whether the official files are there and are of these images.

    Raises:
        InputError: They are not.
    """
    if protocol.cifar_c is None:
        return
    pixels, labels = read_cifar_c(protocol.cifar_c, CORRUPTIONS[0], SEVERITIES[0])
    if tuple(pixels.shape[1:]) != images.test.image_shape or int(labels.max()) + 1 != len(images.class_names):
        raise InputError(
            f"{protocol.cifar_c} has {int(labels.max()) + 1} classes of 3x32x32 images, {images.name} has "
            f"{len(images.class_names)} of {'x'.join(map(str, images.test.image_shape))}: take --corruptions instead."
        )


def predict(ensemble: Ensemble, data: ImageData) -> Predictions:
    """Ask for all images, in batches; the answers are on the CPU."""
    device = ensemble.weights.device
    members, means, seconds = [], [], 0.0
    with evaluating(ensemble):
        for images, _ in data.batches(BATCH, device):
            start = time.perf_counter()
            logits = ensemble(images)
            mean = ensemble.mix(logits)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds += time.perf_counter() - start
            members.append(logits.float().log_softmax(dim=-1).cpu())
            means.append(mean.cpu())
    return Predictions(torch.cat(members, dim=1), torch.cat(means).unsqueeze(0), data.labels, seconds)


def evaluate(ensemble: Ensemble, images: Images, protocol: Protocol) -> dict[str, Any]:
    """Everything that a record says of a trained ensemble.

    Args:
        ensemble: In evaluation mode; with ``protocol.calibrate`` its temperature is set.
        images: What it is asked.
        protocol: What is measured.

    Returns:
        ``uncertainty``: a row for each set of images; ``diversity``; ``reliability``; ``cost``; ``seconds_inference``.
    """
    if protocol.calibrate:
        held_out = predict(ensemble, images.validation)
        ensemble.temperature.fill_(fit_temperature(held_out.mean[0], held_out.labels))
    found = predict(ensemble, images.test)
    x, _ = images.test.batch(torch.arange(COST_ROWS), ensemble.weights.device)
    return {
        "uncertainty": [
            {"images": "test", "severity": None, **_answers(found)},
            *_corrupted_rows(ensemble, images, protocol),
            *(
                {"images": name, "severity": None, **_told_apart(found, predict(ensemble, data))}
                for name, data in images.foreign.items()
            ),
        ],
        "diversity": _diversity(found),
        "reliability": uncertainty.reliability_lists(found.mean, found.labels),
        "cost": vars(ensemble.cost(x)),
        "temperature": float(ensemble.temperature),
        "num_members": ensemble.num_members,
        "seconds_inference": found.seconds,
    }


def _answers(found: Predictions) -> dict[str, float]:
    """How good and how sure the answers are."""
    mean, labels = found.mean, found.labels
    metrics = {
        "accuracy": uncertainty.accuracy,
        "nll": uncertainty.nll,
        "brier": uncertainty.brier,
        "ece": uncertainty.expected_calibration_error,
        "adaptive_ece": uncertainty.adaptive_calibration_error,
        "classwise_ece": uncertainty.classwise_calibration_error,
        "aurc": uncertainty.area_under_risk_coverage,
    }
    values = {name: float(metric(mean, labels)) for name, metric in metrics.items()}
    members = [uncertainty.accuracy(one.unsqueeze(0), labels) for one in found.members]
    return values | {
        "member_accuracy": float(torch.stack(members).mean()),
        "member_nll": float(
            torch.stack([uncertainty.nll(one[None], labels) for one in found.members]).mean()
        ),
        "entropy": float(uncertainty.predictive_entropy(mean).mean()),
    }


def _told_apart(inside: Predictions, outside: Predictions) -> dict[str, float]:
    """How well the ensemble's doubt tells images of another kind from test images."""
    scores = [out_of_distribution.ood_scores(one.mean) for one in (inside, outside)]
    return {
        "auroc": float(out_of_distribution.auroc(*scores)),
        "aupr": float(out_of_distribution.aupr(*scores)),
        "fpr95": float(out_of_distribution.fpr_at_95_tpr(*scores)),
        "entropy": float(uncertainty.predictive_entropy(outside.mean).mean()),
    }


def _diversity(found: Predictions) -> dict[str, float | bool]:
    members, labels = found.members, found.labels
    return {
        "disagreement": float(diversity.disagreement(members)),
        "normalised_disagreement": float(diversity.normalised_disagreement(members, labels)),
        "kl": float(diversity.kl_diversity(members)),
        "cosine": float(diversity.cosine_diversity(members)),
        "error_correlation": float(diversity.error_correlation(members, labels)),
        "collapsed": diversity.collapsed(members),
    }


def _corrupted_rows(ensemble: Ensemble, images: Images, protocol: Protocol) -> Iterator[dict[str, Any]]:
    for name, severity, data in corrupted(images.test, protocol):
        found = predict(ensemble, data)
        yield {"images": name, "severity": severity, **_answers(found)}


def corrupted(test: ImageData, protocol: Protocol) -> Iterator[tuple[str, int, ImageData]]:
    """Name, severity and corrupted test images of every cell; the same for every ensemble."""
    if protocol.cifar_c is not None:
        for name in CORRUPTIONS:
            for severity in SEVERITIES:
                yield name, severity, _of(test, *read_cifar_c(protocol.cifar_c, name, severity))
    elif protocol.corruptions:
        part = test.subset(evenly(len(test), protocol.corrupted_images))
        pixels = part.images.index_select(0, part.rows)
        for name, severity, bad in corrupted_sets(pixels, names=protocol.corruptions):
            yield name, severity, _of(test, bad, part.labels)


def evenly(count: int, wanted: int | None) -> Tensor:
    """So many positions out of ``count``, spread evenly."""
    return torch.arange(0, count, max(count // (wanted or count), 1))[:wanted]


def _of(test: ImageData, pixels: Tensor, labels: Tensor) -> ImageData:
    return replace(test, images=pixels, rows=torch.arange(len(pixels)), labels=labels)
