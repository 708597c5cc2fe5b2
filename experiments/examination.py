"""What a run's strategy answers after every task: a row of the accuracy matrix and what stands beside it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from avalanche.benchmarks import CLExperience
from avalanche.training.templates import SupervisedTemplate

from lifelong_ens.errors import InputError
from lifelong_ens.metrics.diversity import disagreement
from lifelong_ens.metrics.uncertainty import (
    calibration,
    ensemble_log_probs,
    pooled,
    predictive_entropy,
    reliability_lists,
)
from strategies.base import Strategy
from strategies.evaluation import Answers, Claims, claims_of, predict_each, shares_found
from strategies.model import TaskModel

Evaluate = Literal["new", "all"]
Rule = Literal["none", "entropy", "max_probability"]


@dataclass
class Examined:
    """What is known of one task's test images.

    Attributes:
        answers: What the strategy answered.
        accuracy: Share of right answers in [0, 1].
        measures: Calibration, entropy and disagreement.
        claims: What every task so far says of every image; None where tasks are not inferred.
    """

    answers: Answers
    accuracy: float
    measures: dict[str, Any]
    claims: Claims | None = None


@dataclass
class Row:
    """What an examination found: by task the accuracy and what stands beside it, and calibration over all tasks.

    ``reliability`` is filled after the last task only.
    """

    accuracy: dict[int, float] = field(default_factory=dict)
    uncertainty: list[dict[str, Any]] = field(default_factory=list)
    over_stream: dict[str, float] = field(default_factory=dict)
    reliability: dict[str, list[float]] = field(default_factory=dict)


class Examination:
    """Examines a strategy after every task.

    Where a network promises a frozen past, earlier tasks are not asked again: what they answered is what they answer,
    so that a whole run asks every task twice and not as often as there are tasks. The promise is looked into when it
    is first relied on, and after the last task.

    Args:
        tests: The test experience of every task.
        rule: How tasks are inferred; ``none`` if they are not. Of earlier tasks' images new tasks are asked then, and
            the old ones are not asked again.
        evaluate: ``new``, as above, or ``all`` for asking every task every time.
        classes: By task the stream's own ids of its classes; None where no two tasks share one.
    """

    def __init__(
        self,
        tests: Sequence[CLExperience],
        rule: Rule = "none",
        evaluate: Evaluate = "new",
        classes: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.tests = list(tests)
        self.rule: Rule = rule
        self.evaluate: Evaluate = evaluate
        self.classes = classes
        self._known: dict[int, Examined] = {}

    def mode(self, strategy: SupervisedTemplate) -> Evaluate:
        """What is done with this strategy."""
        frozen = isinstance(strategy, Strategy) and strategy.network.frozen_past
        return self.evaluate if frozen else "all"

    def examine(self, strategy: SupervisedTemplate, learnt: Collection[int], last: bool) -> Row:
        """Ask a strategy about the tasks it has learnt.

        Args:
            strategy: That has just learnt a task.
            learnt: Labels of the tasks.
            last: Whether no task comes after this.

        Raises:
            InputError: The network promises a frozen past and does not keep the promise.
        """
        indices = [i for i, test in enumerate(self.tests) if set(test.task_labels) <= set(learnt)]  # pyright: ignore
        before = self._known if self.mode(strategy) == "new" else {}
        looks_again = last or len(before) == 1
        asked = [index for index in indices if looks_again or index not in before]
        found = dict(zip(asked, predict_each(strategy, [self.tests[index] for index in asked]), strict=True))
        for index in before.keys() & found.keys():
            self._check_unmoved(strategy, index, found.pop(index))
        self._known = dict(before)
        for index, answers in found.items():
            if answers is not None:
                self._known[index] = _examined(answers)
        row = Row()
        for index in sorted(self._known):
            examined = self._known[index]
            row.accuracy[index] = examined.accuracy
            inferred = self._infer(strategy, index, examined)
            row.uncertainty.append(
                {
                    "task_identification_accuracy": inferred and inferred[0],
                    "class_incremental_accuracy": inferred and inferred[1],
                    "eval_task": index,
                    **examined.measures,
                }
            )
        if self._known:
            together = pooled([self._known[index].answers for index in sorted(self._known)])
            row.over_stream = calibration(*together)
            if last:
                row.reliability = reliability_lists(*together)
        return row

    def _infer(
        self, strategy: SupervisedTemplate, index: int, examined: Examined
    ) -> tuple[float, float] | None:
        """Shares of images whose task, and whose class, are found; new tasks compete for all images."""
        if self.rule == "none" or not isinstance(strategy.model, TaskModel):
            return None
        test, before = self.tests[index], examined.claims
        asked = range(0 if before is None else len(before.label), strategy.model.network.num_tasks)
        new = claims_of(strategy, test, self.rule, asked)
        if before is not None:
            new = Claims(*(torch.cat(both) for both in zip(before, new, strict=True)))
        examined.claims = new
        return shares_found(strategy, test, new, examined.answers, self.classes)

    def _check_unmoved(self, strategy: SupervisedTemplate, index: int, answers: Answers | None) -> None:
        before = self._known[index].answers[0]
        if answers is None or not torch.allclose(answers[0], before, rtol=1e-3, atol=1e-3, equal_nan=True):
            kind = type(strategy.model.network).__name__ if isinstance(strategy.model, TaskModel) else "it"
            raise InputError(
                f"{kind} says frozen_past, but what it answers on task {index + 1} has changed: freeze what moves "
                "(running statistics too), or set frozen_past = False."
            )


def _examined(answers: Answers) -> Examined:
    log_probs, labels = answers
    right = ensemble_log_probs(log_probs).argmax(dim=-1) == labels
    return Examined(
        answers,
        float(right.double().mean()),
        {
            **calibration(log_probs, labels),
            "entropy": float(predictive_entropy(log_probs).mean()),
            "disagreement": float(disagreement(log_probs)) if len(log_probs) > 1 else None,
        },
    )
