"""Every column of the tables: its order, its unit and what it means."""

from __future__ import annotations

from typing import NamedTuple

COSTS = ("parameters", "bytes", "flops_forward", "flops_training", "seconds_training", "seconds_evaluation")
"""The costs of a run; each has a column ``ratio_<cost>``."""

METRICS = ("average_accuracy", "forgetting", "backward_transfer", "forward_transfer", "learning_accuracy")
"""The metrics of a run."""


CALIBRATION = ("nll", "ece", "brier")
"""How sure a run's answers are, over the test images of all tasks."""


class Column(NamedTuple):
    """One column of a table."""

    name: str
    unit: str
    meaning: str


_STREAM = Column("stream", "", "name of the stream of tasks")
_STRATEGY = Column("strategy", "", "name of the strategy; with its options where it ran with several")
_SEED = Column("seed", "", "seed of the run")
_SETTING = Column(
    "setting", "", "hash of the options of stream, network and shared training; runs compare within one"
)
_GUESSED_TASK = "share of images whose task is guessed right, where the run had --task_inference"
_GUESSED_CLASS = "share of images whose class is right with the task guessed; tasks may share classes"
_TRAINED = Column("trained_task", "", "the task trained last, counted from 0")
_KEYS = (_STREAM, _STRATEGY, _SEED)
_NLL = Column("nll", "nats", "mean negative log-likelihood of the members' mean probability")
_ECE = Column("ece", "[0, 1]", "expected calibration error of the members' mean probability, 15 equal bins")
_BRIER = Column("brier", "[0, 2]", "mean squared distance of the members' mean probability from the label")


def _over(column: Column, task: str) -> Column:
    return column._replace(meaning=f"{column.meaning}; over the test images of all tasks seen after {task}")


def _ratio(cost: str) -> Column:
    meaning = (
        f"{cost} divided by that of the vanilla network (`finetune`) of the same stream, setting and seed"
    )
    return Column(f"ratio_{cost}", "x vanilla", meaning)


RUNS = (
    *_KEYS,
    Column("average_accuracy", "[0, 1]", "mean accuracy over all tasks after the last one"),
    Column(
        "forgetting", "[-1, 1]", "mean over past tasks of best earlier accuracy - final; 0 is no forgetting"
    ),
    Column(
        "backward_transfer", "[-1, 1]", "mean over past tasks of final accuracy - accuracy when just learned"
    ),
    Column(
        "forward_transfer",
        "[-1, 1]",
        "mean accuracy on the next task before it is trained - untrained network's",
    ),
    Column("learning_accuracy", "[0, 1]", "mean accuracy on each task when just learned"),
    Column("parameters", "numbers", "stored after the last task, all components but `optimizer`"),
    Column(
        "bytes",
        "bytes",
        "memory of what is stored after the last task at its true dtypes, without `optimizer`",
    ),
    Column(
        "flops_forward", "FLOPs", "of one image through the path of the task trained last; 1 MAC = 2 FLOPs"
    ),
    Column(
        "flops_training",
        "FLOPs",
        "of all training, on all devices; weight gradients of frozen weights are not counted",
    ),
    Column("seconds_training", "seconds", "of all training"),
    Column("seconds_evaluation", "seconds", "of all evaluation"),
    *map(_ratio, COSTS),
    Column("disk_bytes", "bytes", "written to disk for the model after the last task"),
    _ratio("disk_bytes"),
    Column("saved_bytes", "bytes", "saved for the backward pass on one device, peak over all tasks"),
    *(_over(column, "the last one") for column in (_NLL, _ECE, _BRIER)),
    Column(
        "task_identification_accuracy", "[0, 1]", f"{_GUESSED_TASK}, mean over all tasks after the last one"
    ),
    Column(
        "class_incremental_accuracy", "[0, 1]", f"{_GUESSED_CLASS}, mean over all tasks after the last one"
    ),
    _SETTING,
    Column(
        "tuning_trials", "", "trials that the strategy's options were chosen by on validation images, or 0"
    ),
    Column("tuning", "", "how they were chosen, in words; empty where they were given"),
    Column("num_tasks", "tasks", "in the stream"),
    Column("network", "", "name of the network"),
    Column("device", "", "that the run was on"),
    Column("commit", "", "of the code that ran"),
)

ACCURACY = (
    *_KEYS,
    _TRAINED,
    Column("eval_task", "", "the task evaluated, counted from 0"),
    Column("accuracy", "[0, 1]", "on the test images of `eval_task`; only what was measured has a row"),
    _SETTING,
    _NLL,
    _ECE,
    _BRIER,
    Column("entropy", "nats", "mean entropy of the members' mean probability"),
    Column("task_identification_accuracy", "[0, 1]", _GUESSED_TASK),
    Column("class_incremental_accuracy", "[0, 1]", _GUESSED_CLASS),
    Column(
        "disagreement", "[0, 1]", "share of images on which two members of the task differ, mean over pairs"
    ),
)

COMPONENTS = (
    *_KEYS,
    _TRAINED,
    Column(
        "component",
        "",
        "shared, fast_weights, norm_affine, norm_statistics, head, column, lateral, mask, ...",
    ),
    Column("parameters", "numbers", "stored in the component after `trained_task`"),
    Column("bytes", "bytes", "of the component at its true dtype, masks as packed bits"),
    Column("flops_forward", "FLOPs", "of one image through the component on the path of `trained_task`"),
    _SETTING,
)

TASKS = (
    *_KEYS,
    _TRAINED,
    Column("num_classes", "classes", "of `trained_task`"),
    Column("average_accuracy", "[0, 1]", "mean accuracy over the tasks seen so far"),
    *(_over(column, "`trained_task`") for column in (_NLL, _ECE, _BRIER)),
    Column("flops_forward", "FLOPs", "of one image through the path of `trained_task`"),
    Column("flops_forward_rank1", "FLOPs", "the part of `flops_forward` spent on rank-1 products"),
    Column("flops_training", "FLOPs", "of training so far, on all devices"),
    Column("flops_training_rank1", "FLOPs", "the part of `flops_training` spent on rank-1 products"),
    Column(
        "saved_bytes",
        "bytes",
        "saved for the backward pass on one device, peak while training `trained_task`",
    ),
    Column("disk_bytes", "bytes", "written to disk for the model after `trained_task`"),
    Column("seconds_training", "seconds", "of training so far, on all devices"),
    Column("seconds_evaluation", "seconds", "of evaluation so far"),
    _SETTING,
)


RELIABILITY = (
    *_KEYS,
    Column("bin", "", "of 15 bins of equal width over the confidence, counted from 0"),
    Column("count", "images", "in the bin, of the test images of all tasks after the last one"),
    Column("confidence", "[0, 1]", "their mean confidence: the largest of the members' mean probabilities"),
    Column("accuracy", "[0, 1]", "the share of them that is answered right"),
    _SETTING,
)

UNCERTAINTY = tuple(one for one in ACCURACY if one.name != "accuracy")
"""Those of ``ACCURACY`` that say how sure the answers are."""


def version_column(name: str) -> Column:
    """The column of ``runs`` that holds the version of one package, as ``version_torch``."""
    return Column(name, "", f"version of {name.removeprefix('version_')} that the run used")


def names(columns: tuple[Column, ...]) -> list[str]:
    """The names of ``columns``, in order."""
    return [column.name for column in columns]
