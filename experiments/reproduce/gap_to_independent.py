"""What closes the gap between BatchEnsemble and a network per task, and what it costs."""

from __future__ import annotations

from experiments.reproduce.declaration import Quick, Reproduction, Row
from experiments.reproduce.shared import CIFAR100, SMALL_FIT

REPRODUCTION = Reproduction(
    name="gap_to_independent",
    summary="what each variation of BatchEnsemble buys of the gap to a network per task, and what it costs",
    stream="split_cifar100",
    stream_options={"num_tasks": 10},
    network="lenet5",
    network_options={},
    fit=SMALL_FIT,
    seeds=3,
    rows=(
        Row("vanilla", "finetune"),
        Row("independent", "independent"),
        Row("random signs", "batch_ensemble"),
        Row("ones", "batch_ensemble", {"init": "ones"}),
        Row("N(1, 0.5^2)", "batch_ensemble", {"init": "gaussian"}),
        Row("previous task's", "batch_ensemble", {"init": "previous"}),
        Row("ones, shared bias", "batch_ensemble", {"init": "ones", "bias": "shared"}),
        Row("ones, first task shared", "batch_ensemble", {"init": "ones", "first_task": "shared"}),
        Row("ones, fast weights at 0.001", "batch_ensemble", {"init": "ones", "fast_learning_rate": 0.001}),
        Row("ones, fast weights at 0.01", "batch_ensemble", {"init": "ones", "fast_learning_rate": 0.01}),
        Row("ones, fast weights at 0.03", "batch_ensemble", {"init": "ones", "fast_learning_rate": 0.03}),
        Row("N(1, 0.5^2), 2 members", "batch_ensemble", {"init": "gaussian", "members_per_task": 2}),
        Row("N(1, 0.5^2), 4 members", "batch_ensemble", {"init": "gaussian", "members_per_task": 4}),
    ),
    reference="random signs",
    quick=Quick(fit={"epochs": 2}),
    images=CIFAR100,
    notes=(
        "All rows but `vanilla` and `independent` are `batch_ensemble`, named by how fast weights start; "
        "`random signs` is the paper's start and our default.",
        "LeNet-5 has no norms; `split_cifar100_resnet18` holds what norms do per task.",
    ),
)
