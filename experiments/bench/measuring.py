"""Measuring contestants against each other: the same work, in turns, on one thread; medians and quartiles of ratios.

On a CPU the clock is the process's CPU time, which other work on the machine does not lengthen; on other devices it is
elapsed time, the device's queue emptied before and after.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from experiments.engines import torch_threads

Call = Callable[[], Any]
# the kind of verdict, ``absent`` or ``broken``, and the reason
Failure = tuple[str, str]
# answers that are said to be the same may differ by this share of the largest number among them
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Goal:
    """What is to be reached between two contestants, by the median ratio of what was measured.

    ``<=`` bounds ours / against, ``>=`` against / ours, so that 3 means three times as fast. ``~`` bounds ours /
    against from above too, but asks only that the lower quartile be below.

    Attributes:
        against: Name of the peer.
        sign: What the ratio is, see above.
        bound: For the ratio.
        ours: Name of our contestant; the race's first if not given.
        same_answer: Whether both answer the same, which is checked before they are timed.
        relative_to: The ratio is divided by this, such as by the ratio of FLOPs.
    """

    against: str
    sign: Literal["<=", ">=", "~"]
    bound: float
    ours: str | None = None
    same_answer: bool = False
    relative_to: float = 1.0

    def reached(self, low: float, median: float) -> bool:
        """Whether ratios with this lower quartile and median reach it."""
        if self.sign == "~":
            return low <= self.bound
        return median <= self.bound if self.sign == "<=" else median >= self.bound

    def __str__(self) -> str:
        bound = f"{self.bound:g}" if self.bound < 0.1 else f"{self.bound:.2f}"
        return f"{bound} within noise" if self.sign == "~" else f"{self.sign} {bound}"


@dataclass(frozen=True)
class Race:
    """Contestants that do the same work, and what is to be reached between them.

    Attributes:
        case: What they do it on.
        contestants: Name to builder; ours first. A builder imports what it needs and returns the call that is measured.
        goals: Between pairs of them.
        unit: Of what is measured.
        timed: Whether calls are timed; else each returns what is compared, such as bytes.
        calls: Calls in one sample; None for as many as fill its time.
    """

    case: str
    contestants: Mapping[str, Callable[[], Call]]
    goals: tuple[Goal, ...]
    unit: Literal["s", "B"] = "s"
    timed: bool = True
    calls: int | None = None


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        sample_seconds: A sample makes as many calls as take about so long.
        race_seconds: Of all rounds of a race together, within the number of rounds.
        fewest: Rounds at least.
        most: Rounds at most.
    """

    sample_seconds: float
    race_seconds: float
    fewest: int
    most: int


FULL = Effort(sample_seconds=0.05, race_seconds=12.0, fewest=5, most=25)
QUICK = Effort(sample_seconds=0.02, race_seconds=2.0, fewest=3, most=15)


@dataclass(frozen=True)
class Line:
    """The outcome of one goal: numbers are NaN where a contestant could not be measured."""

    case: str
    ours: str
    against: str
    goal: str
    ratio: float
    quartile_1: float
    quartile_3: float
    verdict: str
    ours_median: float
    against_median: float
    unit: str
    rounds: int


def run_race(race: Race, effort: Effort, device: torch.device) -> list[Line]:
    """Build, check and measure the contestants; one line for every goal.

    A peer that is not installed, that raises or that answers otherwise is left out of the rounds, and its lines say so.
    """
    with _full_precision(device):
        calls, answers, failed = _built(race)
    first = next(iter(race.contestants))
    for goal in race.goals:
        ours = goal.ours or first
        if goal.same_answer and ours in answers and goal.against in answers:
            difference = _difference(answers[ours], answers[goal.against])
            if difference:
                failed[goal.against] = "broken", difference
    fit = {name: call for name, call in calls.items() if name not in failed}
    answers.clear()
    samples = _timed(race, fit, effort, device) if race.timed else _returned(fit, effort, failed)
    return [_line(race, goal, goal.ours or first, samples, failed) for goal in race.goals]


@contextlib.contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Convolutions in float32 inside: by TF32, the default on CUDA, equal answers differ by more than we allow."""
    if device.type != "cuda":
        yield
        return
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _built(race: Race) -> tuple[dict[str, Call], dict[str, Any], dict[str, Failure]]:
    """The calls, what the first of each returned where they are timed, and why others failed."""
    calls: dict[str, Call] = {}
    answers: dict[str, Any] = {}
    failed: dict[str, Failure] = {}
    for name, build in race.contestants.items():
        try:
            calls[name] = build()
            if race.timed:
                answers[name] = calls[name]()
        except Exception as error:  # whatever a peer does with this work, the others are measured
            failed[name] = _failure(error)
    return calls, answers, failed


def _failure(error: Exception) -> Failure:
    """Not installed, or broken, with the first line of the error."""
    if isinstance(error, ModuleNotFoundError):
        return "absent", f"{error.name} is not installed"
    kind, lines = type(error).__name__, str(error).strip().splitlines()
    return "broken", f"{kind}: {lines[0].strip()}" if lines else kind


def _difference(ours: Tensor, against: Tensor) -> str:
    """How a peer's answer differs from ours, in words; empty where it does not."""
    if ours.shape != against.shape:
        return f"answers {tuple(against.shape)} instead of {tuple(ours.shape)}"
    ours, against = ours.detach().double(), against.detach().double()
    scale = max(1.0, float(ours[ours.isfinite()].abs().max()))
    if torch.allclose(ours, against, rtol=0.0, atol=TOLERANCE * scale):
        return ""
    # equal infinities have no difference
    differences = (ours - against).abs().masked_fill(ours == against, 0.0)
    return f"answers differ by up to {float(differences.max()):.2g}"


def _timed(
    race: Race, calls: Mapping[str, Call], effort: Effort, device: torch.device
) -> dict[str, list[float]]:
    """Seconds per call, one number a round; the contestants take turns, in another order each round."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    with collected():
        # the first call has warmed up; this one says how long calls take
        expected = {name: seconds_per_call(call, 1, device) for name, call in calls.items()}
        counts = {
            name: race.calls or max(1, round(effort.sample_seconds / max(seconds, 1e-7)))
            for name, seconds in expected.items()
        }
        a_round = sum(counts[name] * seconds for name, seconds in expected.items())
        rounds = min(max(int(effort.race_seconds / max(a_round, 1e-7)), effort.fewest), effort.most)
        for turn in range(rounds):
            gc.collect()
            for name in _rotated(list(calls), turn):
                samples[name].append(seconds_per_call(calls[name], counts[name], device))
    return samples


def _returned(
    calls: Mapping[str, Call], effort: Effort, failed: dict[str, Failure]
) -> dict[str, list[float]]:
    """What the calls return, one number a round; those that raise are put down in ``failed``."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(effort.fewest):
        for name in _rotated([name for name in calls if name not in failed], turn):
            try:
                samples[name].append(float(calls[name]()))
            except Exception as error:  # as when it is built
                failed[name] = _failure(error)
    return samples


def _rotated(names: list[str], turn: int) -> list[str]:
    start = turn % max(len(names), 1)
    return names[start:] + names[:start]


def seconds_per_call(call: Call, count: int, device: torch.device) -> float:
    """The mean over ``count`` calls, by the clock of the device."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    synchronise(device)
    start = clock()
    for _ in range(count):
        call()
    synchronise(device)
    return (clock() - start) / count


def synchronise(device: torch.device) -> None:
    """Wait for what the device still has to do."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


@contextlib.contextmanager
def collected() -> Iterator[None]:
    """No garbage collection inside but where it is asked for, which is then quick."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def one_thread() -> contextlib.AbstractContextManager[None]:
    """Torch computes in one thread inside."""
    return torch_threads(1)


def _line(
    race: Race, goal: Goal, ours: str, samples: Mapping[str, list[float]], failed: Mapping[str, Failure]
) -> Line:
    low = ratio = high = float("nan")
    if ours in failed:
        verdict = f"broken (ours: {failed[ours][1]})"
    elif goal.against in failed:
        verdict = "{} ({})".format(*failed[goal.against])
    else:
        pairs = zip(samples[ours], samples[goal.against], strict=True)
        ratios = [
            (a / b if goal.sign != ">=" else b / a) / goal.relative_to for a, b in pairs if a > 0 and b > 0
        ]
        low, ratio, high = quartiles(ratios)
        verdict = "reached" if goal.reached(low, ratio) else "missed"
    return Line(
        race.case,
        ours,
        goal.against,
        str(goal),
        ratio,
        low,
        high,
        verdict,
        _median(samples, ours),
        _median(samples, goal.against),
        race.unit,
        max(map(len, samples.values()), default=0),
    )


def _median(samples: Mapping[str, list[float]], name: str) -> float:
    return statistics.median(samples[name]) if samples.get(name) else float("nan")


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile, interpolated; NaN of nothing."""
    if not values:
        return float("nan"), float("nan"), float("nan")
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high
