"""After each task only what may have changed is asked again."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from torch import nn

from experiments import examination
from experiments.cli import main
from experiments.examination import Examination
from lifelong_ens import Fit, MultiHead
from lifelong_ens.errors import InputError
from lifelong_ens.networks import mlp
from strategies import Strategy, batch_ensemble_lifelong, finetune
from streams import split_digits

FIT = Fit(epochs=1, batch_size=32)
NUM_TASKS = 5


@pytest.fixture(scope="module")
def benchmark():
    return split_digits(num_tasks=NUM_TASKS, seed=0)


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """How many tasks are asked, one number for every examination."""
    counts: list[int] = []
    original = examination.predict_each

    def counting(strategy, experiences):
        counts.append(len(experiences))
        return original(strategy, experiences)

    monkeypatch.setattr(examination, "predict_each", counting)
    return counts


def examine(strategy: Strategy, benchmark, **options) -> None:
    exam = Examination(benchmark.test_stream, **options)
    for task, experience in enumerate(benchmark.train_stream):
        strategy.train(experience)
        exam.examine(strategy, range(task + 1), last=task == NUM_TASKS - 1)


BODY = functools.partial(mlp, input_shape=(1, 8, 8), hidden=(16,))


def test_a_frozen_past_is_asked_again_when_first_relied_on_and_at_the_end(benchmark, asked):
    examine(batch_ensemble_lifelong(BODY(), fit=FIT), benchmark)
    assert asked == [1, 2, 1, 1, NUM_TASKS]


def test_all_tasks_are_asked_where_they_may_change_or_where_that_is_asked_for(benchmark, asked):
    examine(finetune(BODY(), fit=FIT), benchmark)
    assert asked == [1, 2, 3, 4, 5]
    asked.clear()
    examine(batch_ensemble_lifelong(BODY(), fit=FIT), benchmark, evaluate="all")
    assert asked == [1, 2, 3, 4, 5]


def test_new_tasks_compete_for_the_images_of_earlier_ones(benchmark):
    strategy, exam = batch_ensemble_lifelong(BODY(), fit=FIT), Examination(benchmark.test_stream, "entropy")
    shares = []
    for task in range(3):
        strategy.train(benchmark.train_stream[task])
        row = exam.examine(strategy, range(task + 1), last=False)
        shares.append(row.uncertainty[0]["task_identification_accuracy"])
    assert shares[0] == 1
    assert shares[1] < 1
    # once lost an image can't be found again
    assert shares[2] <= shares[1]


class Promises(MultiHead):
    """Freezes its weights after the first task, but not its running statistics."""

    frozen_past = True

    def add_task(self, num_classes: int) -> None:
        self.requires_grad_(self.num_tasks == 0)
        super().add_task(num_classes)


def test_a_promise_that_is_not_kept_is_found_out(benchmark):
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
    torch.manual_seed(0)
    with pytest.raises(
        InputError, match="Promises says frozen_past, but what it answers on task 1 has changed"
    ):
        examine(Strategy(network=Promises(body), fit=FIT), benchmark)


def test_records_say_what_was_asked_and_agree(tmp_path):
    arguments = ["compare", "--strategies", "finetune,batch_ensemble", "--epochs", "1", "--device", "cpu"]
    records = {}
    for evaluate in ("new", "all"):
        out = tmp_path / evaluate
        assert main([*arguments, "--evaluate", evaluate, "--out", str(out)]) == 0
        for path in (out / "records").glob("*.json"):
            record = json.loads(path.read_text())
            records[record["strategy"]["name"], evaluate] = (path.name, record)
    for name, modes in {"finetune": ("all", "all"), "batch_ensemble": ("new", "all")}.items():
        (file, new), (same_file, every) = records[name, "new"], records[name, "all"]
        assert file == same_file
        assert (new["evaluate"], every["evaluate"]) == modes
        for key in ("accuracy", "uncertainty", "state_sha256"):
            assert new[key] == every[key]
    assert main([*arguments, "--evaluate", "some", "--out", str(tmp_path)]) == 2
