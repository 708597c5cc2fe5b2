"""``lifelong-ens tune``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments.commands.shared import add_dry_run, add_engine, add_experiment, print_table, refuse_devices
from experiments.search import DEFAULT_SEARCH

HELP = "choose options of strategies on validation images"
EXAMPLES = """
examples:
  lifelong-ens tune --strategies finetune,batch_ensemble --validation 0.2 --out results/tune
  lifelong-ens tune --validation 0.2 --search learning_rate=log:1e-3:1 --search optimizer=sgd,adam
  lifelong-ens tune --strategies packnet --validation 0.2 --search packnet.prune=0.5:0.9
  lifelong-ens compare --config results/tune/tuned.yaml --seeds 5 --out results/tuned"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    parser.description = (
        "Choose options of each strategy on the validation images of a stream's first tasks, with as many "
        "trials for each. It never sees test images. Writes tuned.yaml for `compare --config`, trials.csv, and "
        "study.journal, by which the same command goes on where it stopped."
    )
    parser.epilog = _epilog()
    add_experiment(parser)
    parser.add_argument("--trials", help="trials of each strategy, earlier ones included (default: 20)")
    parser.add_argument("--num_tasks_used", help="how many of the first tasks are used (default: 3)")
    parser.add_argument(
        "--search",
        action="append",
        metavar="OPTION=SPACE",
        help="search this option in log:LOW:HIGH, LOW:HIGH or A,B,C; may be repeated (default: see below)",
    )
    parser.add_argument("--out", type=Path, help="folder for what is written (default: results/STREAM-tune)")
    add_engine(parser)
    add_dry_run(parser)


def run(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    """Run the trials that are missing and print what was found; in a dry run, print the plan."""
    refuse_devices("tune", rest)
    from experiments.tune import plan_tuning

    plan = plan_tuning(vars(parsed), rest)
    if parsed.dry_run:
        from experiments.dry_run import dry_run_tuning

        print(dry_run_tuning(plan))
        return
    tuned = plan.run()
    print_table(tuned.headline())
    print(f"\nall trials: {plan.out / 'trials.csv'}")
    print(f"next: lifelong-ens compare --config {plan.out / 'tuned.yaml'} --seeds 5 --out OUT")


def _epilog() -> str:
    lines = [
        "searched without --search, each for itself and only where it is not given (--learning_rate 0.1):"
    ]
    lines += [f"  {name}={space}" for name, space in DEFAULT_SEARCH.items()]
    lines += [
        "",
        "Options of the stream, network, strategies and training are given as in lifelong-ens compare.",
    ]
    lines += ["Validation images are held out of the training images: --validation 0.1."]
    return "\n".join([*lines, EXAMPLES])
