"""``lifelong-ens plan``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments.commands.shared import print_table
from experiments.machines import EFFICIENCY, MACHINES
from lifelong_ens.errors import InputError

HELP = "what strategies cost at 100, 1,000 or 100,000 tasks, without data"
EXAMPLES = """
examples:
  lifelong-ens plan --stream split_imagenet --network resnet50 --strategies independent,pnn,batch_ensemble
  lifelong-ens plan --stream split_cifar100 --network resnet18 --width 20 --epochs 50 --machine rtx4090 --amp
  lifelong-ens plan --stream image_folder --classes_per_task 5 --image_size 64 --images_per_task 400 --measure

Options of the network, of strategies and of training are given by name; see lifelong-ens list NAME."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    parser.description = (
        "Parameters, bytes, memory, FLOPs and hours at numbers of tasks, and the first number at which memory, time or "
        "disk no longer suffice. Nothing is trained and no image is read: a few tasks are gone through without values, "
        "and what grows with the tasks' number alone is followed from there, exactly."
    )
    parser.epilog = EXAMPLES
    parser.add_argument(
        "--stream", default="split_digits", help="whose tasks, without its data (default: split_digits)"
    )
    parser.add_argument(
        "--classes_per_task", metavar="N", help="classes of every task (default: the stream's)"
    )
    parser.add_argument(
        "--image_size", metavar="N", help="height and width of images (default: the stream's)"
    )
    parser.add_argument(
        "--images_per_task", metavar="N", help="training images of every task (default: the stream's)"
    )
    parser.add_argument(
        "--strategies",
        "--strategy",
        default="finetune,independent,pnn,batch_ensemble",
        help="names or module:function, joined by commas (default: finetune,independent,pnn,batch_ensemble)",
    )
    parser.add_argument(
        "--network",
        help="name of the network, or module:function (default: mlp for digits and MNIST kinds, else lenet5)",
    )
    parser.add_argument(
        "--tasks",
        default="100,1000,100000",
        metavar="N,N",
        help="numbers of tasks (default: 100,1000,100000)",
    )
    parser.add_argument("--machine", help=f"what trains: {', '.join(MACHINES)} (default: a100)")
    parser.add_argument(
        "--efficiency",
        metavar="SHARE",
        help=f"share of its peak that training reaches (default: {EFFICIENCY})",
    )
    parser.add_argument(
        "--measure", action="store_true", help="this machine instead, by seconds of each strategy's own steps"
    )
    parser.add_argument("--max_days", default="365", metavar="N", help="of training, on one (default: 365)")
    parser.add_argument(
        "--disk_gb", default="1000", metavar="N", help="for the last checkpoint (default: 1000)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="exact numbers too, as .csv or .json")


def run(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    """Print the costs and the breaks.

    Args:
        parsed: What ``add_arguments`` describes.
        rest: The other arguments, options by name.

    Raises:
        InputError: Something given cannot be used.
    """
    if parsed.out is not None and parsed.out.suffix not in (".csv", ".json"):
        raise InputError(f"--out {parsed.out}: expected a file that ends in .csv or .json.")
    if parsed.out is not None and not parsed.out.parent.is_dir():
        raise InputError(f"--out {parsed.out}: there is no folder {parsed.out.parent}.")
    from experiments.outlook import outlook

    plan = outlook(vars(parsed), rest)
    print("\n".join([*plan.about, ""]))
    print_table(plan.cost_texts())
    print()
    print_table(plan.break_texts())
    print("\n".join(["", *plan.notes]))
    if parsed.out is not None:
        plan.write(parsed.out)
        print(f"written to {parsed.out}")
