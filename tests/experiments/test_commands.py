"""The commands on a page are the runs: parsed again they name the same records."""

from __future__ import annotations

import json
import shlex

import pytest

from experiments.cli import make_parser
from experiments.ensembles.plan import plan_ensembles
from experiments.plan import plan_comparison
from experiments.run import Cell, Named
from lifelong_ens.report.page.command import compare_commands, ensemble_commands


def parsed(command: str):
    words = shlex.split(command.replace("\\\n", " "))
    assert words[0] == "lifelong-ens"
    options, rest = make_parser().parse_known_args(words[1:])
    return vars(options), rest


def as_record(cell: Cell) -> dict:
    record = {
        "stream": cell.stream.as_dict(),
        "strategy": cell.strategy.as_dict(),
        "network": cell.network.as_dict(),
        "fit": dict(cell.fit),
        "seed": cell.seed,
        "task_inference": cell.task_inference,
    }
    return json.loads(json.dumps(record))


@pytest.mark.parametrize(
    "arguments",
    [
        "--strategies finetune,pnn --seeds 3",
        "--strategies batch_ensemble --seeds 4, --task_inference entropy --init ones --rank 2",
        "--stream split_digits --num_tasks 2 --strategies ewc,batch_ensemble --epochs 3 --clip_norm 1.5 "
        "--batch_ensemble.learning_rate 0.01 --batch_ensemble.init gaussian --network mlp --hidden [20,10] --amp true",
        "--stream permuted_mnist --root 'my data' --strategies finetune --seeds 0,2",
    ],
)
def test_compare(arguments):
    plan = plan_comparison(*parsed(f"lifelong-ens compare {arguments}"))
    (command,) = compare_commands([as_record(cell) for cell, _ in plan.cells], "some where")
    again = plan_comparison(*parsed(command))
    assert [cell.key for cell, _ in again.cells] == [cell.key for cell, _ in plan.cells]
    assert str(again.out) == "some where"


def test_two_sets_of_options_or_seeds_are_two_commands():
    keys, records = set(), []
    for arguments in (
        "--strategies finetune,pnn --seeds 2",
        "--strategies pnn --pnn.learning_rate 0.2 --seeds 2",
    ):
        plan = plan_comparison(*parsed(f"lifelong-ens compare {arguments}"))
        keys |= {cell.key for cell, _ in plan.cells}
        records += [as_record(cell) for cell, _ in plan.cells]
    commands = compare_commands(records, "o")
    assert len(commands) == 2
    assert {cell.key for one in commands for cell, _ in plan_comparison(*parsed(one)).cells} == keys


def test_ensembles():
    arguments = (
        "--methods deep,batch_ensemble --members 3 --held_out 2 --corruptions fog,snow --corrupted_images 50 "
        "--calibrate --seeds 2 --epochs 2 --batch_ensemble.preset fast --deep.epochs 1 --limit 60 --ood notmnist=/tmp/x"
    )
    plan = plan_ensembles(*parsed(f"lifelong-ens ensemble {arguments}"))
    records = [
        {
            "data": {**cell.data.as_dict(), "held_out": cell.held_out},
            "method": cell.method.as_dict(),
            "network": cell.network.as_dict(),
            "fit": {**vars(cell.fit)},
            "asked_members": cell.num_members,
            "seed": cell.seed,
            "protocol": {
                "corruptions": ["fog", "snow"],
                "corrupted_images": 50,
                "calibrate": True,
                "foreign": ["held_out", "notmnist"],
            },
        }
        for cell, _ in plan.cells
    ]
    (command,) = ensemble_commands(records, "o")
    again = plan_ensembles(*parsed(command))
    assert [cell.key for cell, _ in again.cells] == [cell.key for cell, _ in plan.cells]
    assert again.protocol == plan.protocol
    assert set(again.foreign) == {"notmnist"}


def test_what_was_started_from_python_has_no_command():
    cell = Cell(Named("mine"), Named("pnn"), Named("given"), {}, 0)
    assert compare_commands([as_record(cell)], "o") == []
