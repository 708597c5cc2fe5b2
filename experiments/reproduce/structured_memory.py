"""How memory grows with the number of tasks, the sub-linear claim of Structured Ensembles, as a curve."""

from __future__ import annotations

from experiments.reproduce.declaration import Quick, Reproduction, Row
from experiments.reproduce.shared import CIFAR100

REPRODUCTION = Reproduction(
    name="structured_memory",
    summary="bytes after each of twenty tasks: structured_ensemble, batch_ensemble, supsup, pnn, independent",
    source="",
    stream="split_cifar100",
    stream_options={"num_tasks": 20, "limit": 20},
    network="vgg11_half",
    network_options={},
    fit={"epochs": 1},
    seeds=1,
    rows=(
        Row("vanilla", "finetune"),
        Row("structured_ensemble", "structured_ensemble", {"mask_epochs": 1}),
        Row("batch_ensemble", "batch_ensemble"),
        Row("supsup", "supsup"),
        Row("pnn, adapters of 4", "pnn", {"laterals": "adapter", "adapter_width": 4}),
        Row("independent", "independent"),
    ),
    after_tasks=(1, 2, 5, 10, 20),
    quick=Quick(stream={"limit": 5}),
    images=CIFAR100,
    notes=(
        "Memory depends on the network and the number of tasks and classes, not on how long is trained: every class "
        "has few images here and a task one epoch, so accuracies mean nothing and are left out.",
        "Pomponi, Scardapane and Uncini (Neural Networks 144, 2021) claim that memory grows less than linearly with "
        "the tasks. `structured_ensemble` stores the whole network from the first task on, and for each task a head "
        "and bits that say which units are its own.",
        "Room is what runs out instead: each task takes half of the units still free, so layers of 32 to 256 units "
        "have none left after about ten tasks, and later tasks learn a head on what is there.",
    ),
)
