"""What several reproductions declare alike."""

from __future__ import annotations

from experiments.reproduce.declaration import Row

CIFAR100 = "name the folder that holds them with --root DIR"
TINY_IMAGENET = (
    "name a folder with train/<class>/ and val/<class>/ with --root DIR, such as tiny-imagenet-200/, unpacked from "
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
)

# LeNet-5 learns 5,000 images in 782 steps of Adam
SMALL_FIT = {
    "epochs": 10,
    "optimizer": "adam",
    "learning_rate": 0.003,
    "weight_decay": 0.0,
    "augment": "flip",
}
# ResNet-18 with BatchNorm, a few thousand images a task
LARGE_FIT = {"epochs": 30, "learning_rate": 0.05, "augment": "crop_flip"}

ALL_STRATEGIES = (
    Row("vanilla", "finetune"),
    Row("joint", "joint"),
    Row("independent", "independent"),
    Row("batch_ensemble", "batch_ensemble"),
    Row("batch_ensemble, own norms", "batch_ensemble", {"norm": "per_member"}),
    Row("batch_ensemble, frozen norms", "batch_ensemble", {"norm": "shared_frozen"}),
    Row("bn_tuned", "bn_tuned"),
    Row("packnet", "packnet"),
    Row("supsup", "supsup"),
    Row("structured_ensemble", "structured_ensemble"),
    Row("den", "den"),
    Row("rcl", "rcl", {"trials": 5}),
    Row("pnn", "pnn"),
    Row("ewc", "ewc"),
    Row("synaptic_intelligence", "synaptic_intelligence"),
    Row("lwf", "lwf"),
    Row("replay", "replay"),
    Row("agem", "agem"),
    Row("gem", "gem"),
)
