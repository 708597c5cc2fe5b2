"""Which of the papers' orderings of ensembles hold on digits, MNIST and CIFAR-100."""

from __future__ import annotations

from experiments.ensembles.orderings import Claim, Orderings
from experiments.ensembles.reproduction import EnsembleReproduction, EnsembleRow

ROWS = (
    EnsembleRow("single"),
    EnsembleRow("single_equal_cost"),
    EnsembleRow("mc_dropout"),
    EnsembleRow("deep"),
    EnsembleRow("batch_ensemble"),
    EnsembleRow("hyper_deep", {"num_candidates": 6}),
    EnsembleRow("hyper_batch"),
    EnsembleRow("dst"),
    EnsembleRow("edst"),
    EnsembleRow("structured"),
)


def _part(
    data: str, network: str, options: dict[str, object], fit: dict[str, object]
) -> EnsembleReproduction:
    return EnsembleReproduction(
        name="ensemble_orderings",
        summary="",
        data=data,
        data_options=options,
        network=network,
        network_options={},
        fit=fit,
        num_members=4,
        seeds=3,
        rows=ROWS,
        quick={
            "data": {"limit": 20},
            "fit": {"epochs": 2},
            "rows": {"hyper_deep": {"num_candidates": 2}, "structured": {"mask_epochs": 1}},
        },
        images="",
    )


REPRODUCTION = Orderings(
    name="ensemble_orderings",
    summary="which orderings of ensembles that papers claim hold on digits, MNIST and CIFAR-100",
    parts=(
        _part("digits", "mlp", {}, {"epochs": 30}),
        _part("mnist", "mlp", {"limit": 500}, {"epochs": 20}),
        _part("cifar100", "lenet5", {"limit": 100}, {"epochs": 20, "learning_rate": 0.02, "augment": "flip"}),
    ),
    claims=(
        Claim("hyper_deep", "deep", "hyper_deep at least as good as deep", "Wenzel et al., NeurIPS 2020"),
        Claim(
            "hyper_batch",
            "batch_ensemble",
            "hyper_batch at least as good as batch_ensemble",
            "Wenzel et al., 2020",
        ),
        Claim("edst", "single", "edst at least as good as one dense network", "Liu et al., ICLR 2022"),
        Claim(
            "deep",
            None,
            "deep best or second of all",
            "Lakshminarayanan et al., NeurIPS 2017, and all the above",
        ),
        Claim("batch_ensemble", "single", "batch_ensemble better than one network", "Wen et al., ICLR 2020"),
        Claim(
            "batch_ensemble",
            "single_equal_cost",
            "batch_ensemble better than one network trained for as long",
            "doubted in arXiv 2601.16936",
        ),
        Claim("structured", "single", "structured at least as good as one network", "Pomponi et al., 2021"),
    ),
    images="name a folder with MNIST/raw/ and with CIFAR-100's class folders train/ and test/, or its own files, by "
    "--root DIR",
)
