"""``lifelong-ens ensemble``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments import catalogue
from experiments.commands.shared import (
    add_config,
    add_device,
    add_dry_run,
    add_engine,
    add_force,
    add_seeds,
    refuse_devices,
    show,
)

HELP = "train, measure and cost efficient ensembles"
EXAMPLES = """
examples:
  lifelong-ens ensemble --methods deep,mc_dropout,batch_ensemble --seeds 3 --out results/e
  lifelong-ens ensemble --data cifar100 --root data --network resnet20 --epochs 30 --corruptions all --dry_run
  lifelong-ens ensemble --data mnist --root data --ood notmnist=DIR --calibrate"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    parser.description = (
        "Train ensembles on the same images and measure each in the same way. `single`, one network, and "
        "`single_equal_cost`, one that is trained for as long as all members together, always run too."
    )
    parser.epilog = _epilog()
    add_config(parser)
    parser.add_argument(
        "--data",
        help="digits, mnist, fashion_mnist, cifar10, cifar100, tiny_imagenet or image_folder (default: digits)",
    )
    parser.add_argument("--methods", help="names joined by commas (default: deep,batch_ensemble)")
    parser.add_argument(
        "--network", help="name, or module:function (default: mlp for digits and MNIST kinds, else resnet20)"
    )
    parser.add_argument("--members", help="how many members each ensemble has (default: 4)")
    add_seeds(parser)
    parser.add_argument(
        "--ood", metavar="NAME[=DIR]", help="foreign images that are to be told apart, joined by commas"
    )
    parser.add_argument(
        "--held_out", metavar="N", help="leave the last N classes out: foreign images of their own"
    )
    parser.add_argument("--corruptions", help="all, none, or names joined by commas (default: none)")
    parser.add_argument("--corrupted_images", metavar="N", help="corrupt N test images (default: all)")
    parser.add_argument(
        "--cifar_c", metavar="DIR", help="the official CIFAR-10-C or CIFAR-100-C files instead"
    )
    parser.add_argument(
        "--calibrate", action="store_true", default=None, help="fit a temperature on the validation images"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for records, models, tables and plots (default: results/ensembles_DATA)",
    )
    add_device(parser)
    add_force(parser)
    add_engine(parser)
    add_dry_run(parser)


def run(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    """Run what has no record yet and print the headline; in a dry run, print the plan."""
    refuse_devices("ensemble", rest)
    from experiments.ensembles.plan import plan_ensembles

    plan = plan_ensembles(vars(parsed), rest)
    if parsed.dry_run:
        from experiments.ensembles.dry_run import dry_run

        print(dry_run(plan))
        return
    show(plan.run(), plan.out)


def _epilog() -> str:
    lines = ["methods:"]
    lines += [
        f"  {name:20} {catalogue.describe(target).summary}"
        for name, target in catalogue.KINDS["method"].items()
    ]
    lines += [
        "",
        "Options of the data (--root DIR, --validation 0.1, --limit 50), the network, the methods and of",
    ]
    lines += ["training are given by name; see lifelong-ens list NAME. One for a single method is written"]
    lines += ["--batch_ensemble.preset fast, and so are its own options of training: --deep.epochs 20."]
    return "\n".join([*lines, EXAMPLES])
