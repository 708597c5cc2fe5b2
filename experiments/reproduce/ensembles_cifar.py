"""CIFAR-100 on ResNet-20: all ways of making an ensemble, what they gain and what they cost."""

from __future__ import annotations

from experiments.ensembles.reproduction import EnsembleReproduction, EnsembleRow, Published
from experiments.reproduce.shared import CIFAR100

WRN = "WRN-28-10"
RESNET = "ResNet-32x4"
TUNED = "WRN-28-10, tuned"

REPRODUCTION = EnsembleReproduction(
    name="ensembles_cifar",
    summary="all ensembles on CIFAR-100 with ResNet-20, published ones of larger networks beside",
    data="cifar100",
    data_options={},
    network="resnet20",
    network_options={},
    fit={"epochs": 60, "batch_size": 128, "learning_rate": 0.1, "augment": "crop_flip"},
    num_members=4,
    seeds=1,
    rows=(
        EnsembleRow(
            "single",
            published={RESNET: Published(78.32, ece=0.0928), WRN: Published(79.8, 0.875, 0.0857)},
        ),
        EnsembleRow("single_equal_cost"),
        EnsembleRow(
            "mc_dropout",
            published={RESNET: Published(78.89, ece=0.0899), WRN: Published(80.7, 0.785, 0.0487)},
        ),
        EnsembleRow(
            "deep",
            published={
                RESNET: Published(81.02, ece=0.0682),
                WRN: Published(82.7, 0.666, 0.021),
                TUNED: Published(82.6, 0.661, 0.022),
            },
        ),
        EnsembleRow("batch_ensemble", {"preset": "paper"}, published={RESNET: Published(80.32, ece=0.0889)}),
        EnsembleRow(
            "batch_ensemble",
            {"preset": "uncertainty_baselines"},
            published={WRN: Published(81.9, 0.690, 0.0265), TUNED: Published(81.9, 0.690, 0.026)},
        ),
        EnsembleRow("batch_ensemble", {"preset": "fast"}),
        EnsembleRow(
            "hyper_deep",
            {"num_candidates": 5},
            published={WRN: Published(83.0, 0.654, 0.022), TUNED: Published(82.8, 0.652, 0.019)},
        ),
        EnsembleRow(
            "hyper_batch",
            published={WRN: Published(81.9, 0.678, 0.020), TUNED: Published(82.0, 0.678, 0.022)},
        ),
        EnsembleRow("dst"),
        EnsembleRow("edst"),
        EnsembleRow("static_sparse"),
        EnsembleRow("prune_finetune", {"finetune_share": 0.5}),
        EnsembleRow("structured"),
    ),
    quick={
        "data": {"limit": 5},
        "fit": {"epochs": 1},
        "rows": {"hyper_deep": {"num_candidates": 2}, "structured": {"mask_epochs": 1}},
    },
    images=CIFAR100,
    notes=(
        "Published: ResNet-32x4 from Wen et al., ICLR 2020 (250 epochs, BatchEnsemble and MC dropout 375; ECE from "
        "their appendix, number of bins unknown); WRN-28-10 from Uncertainty Baselines (200 to 250 epochs, MC dropout "
        "of 30 draws); tuned from Wenzel et al., NeurIPS 2020, Table 2. Ours is a network of 0.28 M weights, not 7.4 M "
        "or 36.5 M, and trains for fewer epochs on fewer images, so only the order of methods can be compared.",
        "Hyper-deep ensembles search 5 configurations, the published ones 100; those of Uncertainty Baselines are not "
        "stratified over seeds.",
        "Sparse members have 80 % zeros, structured ones lose half of the channels inside blocks. No figures of "
        "FreeTickets and Structured Ensembles for these networks are at hand.",
        "The published tables train on all 50,000 images; here a tenth of them is held out for validation.",
    ),
)
