"""``lifelong-ens compare``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments import catalogue
from experiments.commands.shared import add_dry_run, add_engine, add_experiment, add_force, show

HELP = "run strategies over a stream and report"
EXAMPLES = """
examples:
  lifelong-ens compare --stream split_digits --strategies finetune,batch_ensemble,pnn --seeds 3 --out results/d
  lifelong-ens compare --stream split_cifar100 --root data --num_tasks 10 --network lenet5 --epochs 20
  lifelong-ens compare --strategies finetune,ewc,pnn --seeds 5 --jobs auto
  lifelong-ens compare --config experiment.yaml --strategies my_module:my_strategy --dry_run"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    parser.epilog = _epilog()
    add_experiment(parser)
    parser.add_argument(
        "--out", type=Path, help="folder for records, tables and plots (default: results/STREAM)"
    )
    parser.add_argument(
        "--task_inference",
        metavar="RULE",
        help="also guess each test image's task: none, entropy or max_probability (default: none)",
    )
    parser.add_argument(
        "--evaluate",
        metavar="WHAT",
        help="asked after a task where earlier answers cannot change: new, the task alone, or all (default: new)",
    )
    parser.add_argument(
        "--devices",
        metavar="N",
        help="processes, each with a device of its own, that share every step (default: 1, or as torchrun started)",
    )
    parser.add_argument(
        "--log_to",
        action="append",
        metavar="LOGGER",
        help="also log to tensorboard (OUT/tensorboard) or wandb; may be repeated, or joined by commas",
    )
    add_force(parser)
    add_engine(parser)
    add_dry_run(parser)


def run(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    """Run what has no record yet and print the headline; in a dry run, print the plan."""
    from experiments.plan import plan_comparison
    from lifelong_ens.training.joining import is_first

    plan = plan_comparison(vars(parsed), rest)
    if parsed.dry_run:
        from experiments.dry_run import dry_run

        print(dry_run(plan))
        return
    report = plan.run()
    if is_first():
        show(report, plan.out)


def _epilog() -> str:
    lines = ["options of training:", *catalogue.option_lines(catalogue.FIT)]
    lines += ["", "Options of the stream, network and strategies are given the same way, --num_tasks 10; see"]
    lines += [
        "lifelong-ens list NAME. One for a single strategy is written --batch_ensemble.init gaussian, and"
    ]
    lines += ["so are options of training that it has for itself: --batch_ensemble.learning_rate 0.1."]
    return "\n".join([*lines, EXAMPLES])
