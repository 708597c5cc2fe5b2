from __future__ import annotations

import gc
import itertools
import math
import time

import numpy as np
import pytest
import torch

from experiments.bench.measuring import (
    Effort,
    Goal,
    Race,
    collected,
    one_thread,
    quartiles,
    run_race,
    seconds_per_call,
)

CPU = torch.device("cpu")
TWO_ROUNDS = Effort(sample_seconds=0.0, race_seconds=0.0, fewest=2, most=9)


def returning(*values: float):
    """A contestant that returns these numbers, one with every call."""
    numbers = itertools.cycle(values)
    return lambda: lambda: next(numbers)


def answering(value: torch.Tensor):
    return lambda: lambda: value


def raising(error: Exception):
    def build():
        raise error

    return build


def lines(race: Race, effort: Effort = TWO_ROUNDS):
    return run_race(race, effort, CPU)


@pytest.mark.parametrize(
    ("goal", "low", "median", "reached"),
    [
        (Goal("peer", "<=", 1.1), 1.0, 1.1, True),
        (Goal("peer", "<=", 1.1), 1.0, 1.11, False),
        (Goal("peer", ">=", 3.0), 2.5, 3.0, True),
        (Goal("peer", ">=", 3.0), 2.5, 2.99, False),
        (Goal("peer", "~", 1.0), 0.99, 1.02, True),
        (Goal("peer", "~", 1.0), 1.01, 1.02, False),
    ],
)
def test_a_goal_is_reached_by_its_median_or_within_noise(goal, low, median, reached):
    assert goal.reached(low, median) is reached


def test_goals_read_as_in_the_table():
    shown = [
        str(Goal("peer", sign, bound))
        for sign, bound in (("<=", 1.05), (">=", 3.0), ("~", 1.0), ("<=", 0.005))
    ]
    assert shown == ["<= 1.05", ">= 3.00", "1.00 within noise", "<= 0.005"]


@pytest.mark.parametrize(
    ("sign", "ratio", "verdict"), [("<=", 2.0, "missed"), (">=", 0.5, "missed"), ("~", 2.0, "missed")]
)
def test_at_least_counts_how_many_times_as_small_ours_is(sign, ratio, verdict):
    race = Race(
        "case", {"ours": returning(6), "peer": returning(3)}, (Goal("peer", sign, 1.0),), "B", timed=False
    )
    (line,) = lines(race)
    assert (line.ratio, line.verdict, line.rounds) == (ratio, verdict, 2)
    assert (line.ours_median, line.against_median) == (6, 3)


def test_ratios_are_of_pairs_measured_in_one_round():
    ours, peer = (1.0, 20.0, 3.0, 400.0, 5.0), (2.0, 10.0, 3.0, 100.0, 1.0)
    goals = (
        Goal("peer", "<=", 1.0),
        Goal("peer", "<=", 1.0, relative_to=4.0),
        Goal("ours", ">=", 1.0, ours="peer"),
    )
    race = Race("case", {"ours": returning(*ours), "peer": returning(*peer)}, goals, "B", timed=False)
    whole, relative, turned = lines(race, Effort(0.0, 0.0, 5, 5))
    expected = np.quantile(np.array(ours) / np.array(peer), [0.25, 0.5, 0.75])
    assert [whole.quartile_1, whole.ratio, whole.quartile_3] == pytest.approx(expected)
    assert relative.ratio == pytest.approx(expected[1] / 4)
    assert (whole.verdict, relative.verdict) == ("missed", "reached")
    assert (turned.ours, turned.against) == ("peer", "ours")
    assert turned.ratio == pytest.approx(expected[1])


@pytest.mark.parametrize("values", [[1.0], [3.0, 1.0], [5.0, 1.0, 2.0, 9.0], list(range(11))])
def test_quartiles_are_those_of_numpy(values):
    assert quartiles(values) == pytest.approx(tuple(np.quantile(values, [0.25, 0.5, 0.75])))
    assert all(map(math.isnan, quartiles([])))


def test_contestants_take_turns_in_another_order_each_round():
    seen = []
    contestants = {name: lambda name=name: lambda: seen.append(name) for name in "abc"}
    (line,) = lines(Race("case", contestants, (Goal("b", "<=", 1.0),), calls=1), Effort(0.0, 0.0, 3, 3))
    # each is called once to warm up and once to see how long it takes
    assert "".join(seen) == "abc" + "abc" + "abc" + "bca" + "cab"
    assert line.rounds == 3


def test_short_calls_are_repeated_within_a_sample_and_rounds_fill_the_time():
    calls = {"ours": 0, "peer": 0}

    def build(name: str):
        def call():
            calls[name] += 1
            until = time.process_time() + 0.001
            while time.process_time() < until:
                pass

        return lambda: call

    race = Race("case", {name: build(name) for name in calls}, (Goal("peer", "<=", 1.0),))
    (line,) = lines(race, Effort(sample_seconds=0.005, race_seconds=0.05, fewest=1, most=4))
    assert 1 <= line.rounds <= 4
    assert min(calls.values()) > 2 + line.rounds
    (line,) = lines(Race(race.case, race.contestants, race.goals, calls=1), Effort(0.005, 1e9, 1, 4))
    assert line.rounds == 4


def test_a_peer_that_is_not_installed_is_absent_and_the_others_are_measured():
    contestants = {
        "ours": returning(1),
        "gone": raising(ModuleNotFoundError("no", name="gone")),
        "peer": returning(2),
    }
    goals = (Goal("gone", "<=", 1.0), Goal("peer", "<=", 1.0))
    absent, measured = lines(Race("case", contestants, goals, "B", timed=False))
    assert absent.verdict == "absent (gone is not installed)"
    assert math.isnan(absent.ratio)
    assert math.isnan(absent.against_median)
    assert absent.ours_median == 1
    assert (measured.verdict, measured.ratio) == ("reached", 0.5)


def test_a_peer_that_raises_is_broken_by_the_first_line_of_its_error():
    def failing():
        raise RuntimeError("\n sizes differ:\nmore about it\n")

    for peer in (raising(RuntimeError("\n sizes differ:\nmore about it\n")), lambda: failing):
        (line,) = lines(Race("case", {"ours": returning(1), "peer": peer}, (Goal("peer", "<=", 1.0),)))
        assert line.verdict == "broken (RuntimeError: sizes differ:)"
        assert math.isnan(line.ratio)
    goals = (Goal("peer", "<=", 1.0),)
    (line,) = lines(Race("case", {"ours": returning(1), "peer": lambda: failing}, goals, "B", timed=False))
    assert line.verdict == "broken (RuntimeError: sizes differ:)"
    assert line.ours_median == 1
    (line,) = lines(
        Race("case", {"ours": returning(1), "peer": raising(ValueError())}, (Goal("peer", "<=", 1.0),))
    )
    assert line.verdict == "broken (ValueError)"


def test_ours_that_fails_is_said_and_never_reached():
    for error in (RuntimeError("oh"), ModuleNotFoundError("no", name="oh")):
        contestants = {"ours": raising(error), "peer": returning(1)}
        (line,) = lines(Race("case", contestants, (Goal("peer", "<=", 1.0),), "B", timed=False))
        assert line.verdict.startswith("broken (ours: ")
        assert "oh" in line.verdict


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (torch.tensor([1.0, 200.0, -torch.inf]), ""),
        (torch.tensor([1.0, 200.01, -torch.inf]), ""),
        (torch.tensor([1.0, 200.5, -torch.inf]), "broken (answers differ by up to 0.5)"),
        (torch.tensor([1.0, torch.nan, -torch.inf]), "broken (answers differ by up to nan)"),
        (torch.zeros(0, 3), "broken (answers (0, 3) instead of (3,))"),
    ],
)
def test_other_answers_are_broken_where_they_should_be_the_same(answer, verdict):
    ours = answering(torch.tensor([1.0, 200.0, -torch.inf]))
    goals = (Goal("peer", "<=", 1e9, same_answer=True), Goal("peer", "<=", 1e9))
    checked, _ = lines(Race("case", {"ours": ours, "peer": answering(answer)}, goals))
    assert checked.verdict == (verdict or "reached")
    (unchecked,) = lines(Race("case", {"ours": ours, "peer": answering(answer)}, goals[1:]))
    assert unchecked.verdict == "reached"


def test_the_clock_counts_computing_and_not_waiting():
    assert seconds_per_call(lambda: time.sleep(0.05), 1, CPU) < 0.05


def test_threads_and_garbage_collection_are_as_before():
    threads = torch.get_num_threads()
    with one_thread(), collected():
        assert torch.get_num_threads() == 1
        assert not gc.isenabled()
    assert torch.get_num_threads() == threads
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
