"""The command line: ``lifelong-ens compare | tune | ensemble | reproduce | report | export | predict | list | bench``.

Nothing heavy is imported before it is known what is asked for.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import catalogue, reproduce
from experiments.bench import command as bench
from experiments.search import DEFAULT_SEARCH
from lifelong_ens.errors import InputError, NonFiniteLossError, nearest
from lifelong_ens.serving import predict

EXAMPLES = """
examples:
  lifelong-ens compare --stream split_digits --strategies finetune,batch_ensemble,pnn --seeds 3 --out results/d
  lifelong-ens compare --stream split_cifar100 --root data --num_tasks 10 --network lenet5 --epochs 20
  lifelong-ens compare --config experiment.yaml --strategies my_module:my_strategy
  lifelong-ens list batch_ensemble
  lifelong-ens reproduce be_cost_table --root data --quick
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, 2 for input that cannot be used, 130 when interrupted."""
    parsed, rest = _parser().parse_known_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("matplotlib", "PIL", "avalanche"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        return parsed.run(parsed, rest) or 0
    except (InputError, NonFiniteLossError) as error:
        return _fail(str(error), parsed.debug)
    except BrokenPipeError:  # whoever read our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return _fail(f"{error.strerror or error}{where}; what was finished before is kept", parsed.debug)
    except KeyboardInterrupt:
        print("lifelong-ens: stopped; the same command goes on after what is finished", file=sys.stderr)
        return 130


def _fail(message: str, debug: bool) -> int:
    if debug:
        logging.getLogger(__name__).exception("the error was raised here:")
    print(f"lifelong-ens: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lifelong-ens",
        description="Lifelong learning and efficient ensembles, with what they cost.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    common: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}

    compare = commands.add_parser(
        "compare", help="run strategies over a stream and report", epilog=_compare_epilog(), **common
    )
    _add_experiment(compare)
    compare.add_argument(
        "--out", type=Path, help="folder for records, tables and plots (default: results/STREAM)"
    )
    compare.add_argument(
        "--task_inference",
        metavar="RULE",
        help="also guess each test image's task: none, entropy or max_probability (default: none)",
    )
    compare.add_argument(
        "--evaluate",
        metavar="WHAT",
        help="asked after a task where earlier answers cannot change: new, the task alone, or all (default: new)",
    )
    compare.add_argument(
        "--force", action="store_true", default=None, help="repeat runs whose records are there"
    )
    _add_debug(compare)
    compare.set_defaults(run=_compare)

    tune = commands.add_parser(
        "tune",
        help="choose options of strategies on validation images",
        description="Choose options of each strategy on the validation images of a stream's first tasks, with as many "
        "trials for each. It never sees test images. Writes tuned.yaml for `compare --config`, trials.csv, and "
        "study.journal, by which the same command goes on where it stopped.",
        epilog=_tune_epilog(),
        **common,
    )
    _add_experiment(tune)
    tune.add_argument("--trials", help="trials of each strategy, earlier ones included (default: 20)")
    tune.add_argument("--num_tasks_used", help="how many of the first tasks are used (default: 3)")
    tune.add_argument(
        "--search",
        action="append",
        metavar="OPTION=SPACE",
        help="search this option in log:LOW:HIGH, LOW:HIGH or A,B,C; may be repeated (default: see below)",
    )
    tune.add_argument("--out", type=Path, help="folder for what is written (default: results/STREAM-tune)")
    _add_debug(tune)
    tune.set_defaults(run=_tune)
    _add_ensemble(
        commands.add_parser("ensemble", help="train, measure and cost efficient ensembles", **common)
    )
    table = commands.add_parser("reproduce", help="a declared table: published numbers beside ours", **common)
    table.add_argument("name", nargs="?", help="which; all are named if it is not given")
    table.add_argument(
        "--quick",
        action="store_true",
        help="fewer epochs, images or trials, and one seed; the table says which",
    )
    table.add_argument("--seeds", help="how many seeds, or a list such as 0,3,7 (default: as declared)")
    table.add_argument(
        "--out",
        type=Path,
        help="folder for records and tables (default: results/NAME, or results/NAME-quick)",
    )
    table.add_argument("--device", help="auto, cpu, cuda or mps (default: auto)")
    table.add_argument("--force", action="store_true", help="repeat runs whose records are there")
    table.epilog = _reproduce_epilog()
    _add_debug(table)
    table.set_defaults(run=_reproduce)

    report = commands.add_parser(
        "report",
        help="make tables, plots and the page report.html of folders of records again",
        description="Make the tables and plots of a folder again, and report.html: one file that shows all of it and "
        "opens from disk, without a network. Of several folders only the page is made, which compares them.",
        **common,
    )
    report.add_argument("outs", type=Path, nargs="+", metavar="OUT", help="folders of compare or ensemble")
    report.add_argument(
        "--page",
        type=Path,
        metavar="FILE",
        help="where the page goes (default: OUT/report.html; here for several OUT)",
    )
    report.add_argument(
        "--baseline", default="finetune", help="what summary.md tests against (default: finetune)"
    )
    _add_debug(report)
    report.set_defaults(run=_report)

    _add_serving(commands, common)
    names = commands.add_parser(
        "list", help="streams, strategies, methods and networks; with a name, its options", **common
    )
    names.add_argument(
        "name", nargs="?", help="streams, strategies, methods, networks, reproductions, training, or one name"
    )
    _add_debug(names)
    names.set_defaults(run=_list)

    measured = commands.add_parser("bench", help=bench.HELP, **common)
    bench.add_arguments(measured)
    _add_debug(measured)
    measured.set_defaults(run=bench.run)
    return parser


def _add_experiment(parser: argparse.ArgumentParser) -> None:
    """What ``compare`` and ``tune`` have in common."""
    parser.add_argument(
        "--config", type=Path, metavar="YAML", help="a file with any of these options by name"
    )
    parser.add_argument("--stream", help="name of the stream, or module:function (default: split_digits)")
    parser.add_argument(
        "--strategies", help="names or module:function, joined by commas (default: finetune,batch_ensemble)"
    )
    parser.add_argument(
        "--network",
        help="name of the network, or module:function (default: mlp for digits and MNIST kinds, else lenet5)",
    )
    parser.add_argument("--seeds", help="how many seeds, or a list such as 0,3,7 (default: 1)")
    parser.add_argument("--device", help="auto, cpu, cuda or mps (default: auto)")


def _add_ensemble(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train ensembles on the same images and measure each in the same way. `single`, one network, and "
        "`single_equal_cost`, one that is trained for as long as all members together, always run too."
    )
    parser.epilog = _ensemble_epilog()
    parser.add_argument(
        "--config", type=Path, metavar="YAML", help="a file with any of these options by name"
    )
    parser.add_argument(
        "--data",
        help="digits, mnist, fashion_mnist, cifar10, cifar100, tiny_imagenet or image_folder (default: digits)",
    )
    parser.add_argument("--methods", help="names joined by commas (default: deep,batch_ensemble)")
    parser.add_argument(
        "--network", help="name, or module:function (default: mlp for digits and MNIST kinds, else resnet20)"
    )
    parser.add_argument("--members", help="how many members each ensemble has (default: 4)")
    parser.add_argument("--seeds", help="how many seeds, or a list such as 0,3,7 (default: 1)")
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
    parser.add_argument("--device", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument(
        "--force", action="store_true", default=None, help="repeat runs whose records are there"
    )
    _add_debug(parser)
    parser.set_defaults(run=_ensemble)


def _add_serving(commands: Any, common: dict[str, Any]) -> None:
    export = commands.add_parser(
        "export",
        help="tasks of a finished run as a folder that answers without Avalanche",
        description="Write what all tasks share once, and a small file for every task. Into a folder that holds tasks "
        "of the same shared part, tasks are added; those of the same names are replaced.",
        **common,
    )
    export.add_argument("record", type=Path, metavar="RECORD", help="OUT/records/NAME.json of a finished run")
    export.add_argument("--out", type=Path, required=True, metavar="MODEL", help="the folder")
    export.add_argument(
        "--tasks", help="names or numbers (from 1) of tasks, joined by commas (default: all tasks)"
    )
    _add_debug(export)
    export.set_defaults(run=_export)
    answer = commands.add_parser("predict", help=predict.HELP, **common)
    predict.add_arguments(answer)
    _add_debug(answer)
    answer.set_defaults(run=_predict)


def _add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _compare_epilog() -> str:
    lines = ["options of training:", *catalogue.option_lines(catalogue.FIT)]
    lines += ["", "Options of the stream, network and strategies are given the same way, --num_tasks 10; see"]
    lines += [
        "lifelong-ens list NAME. One for a single strategy is written --batch_ensemble.init gaussian, and"
    ]
    lines += ["so are options of training that it has for itself: --batch_ensemble.learning_rate 0.1."]
    return "\n".join([*lines, EXAMPLES])


def _tune_epilog() -> str:
    lines = [
        "searched without --search, each for itself and only where it is not given (--learning_rate 0.1):"
    ]
    lines += [f"  {name}={space}" for name, space in DEFAULT_SEARCH.items()]
    lines += [
        "",
        "Options of the stream, network, strategies and training are given as in lifelong-ens compare.",
    ]
    lines += ["Validation images are held out of the training images: --validation 0.1.", "", "examples:"]
    lines += ["  lifelong-ens tune --strategies finetune,batch_ensemble --validation 0.2 --out results/tune"]
    lines += [
        "  lifelong-ens tune --validation 0.2 --search learning_rate=log:1e-3:1 --search optimizer=sgd,adam"
    ]
    lines += ["  lifelong-ens tune --strategies packnet --validation 0.2 --search packnet.prune=0.5:0.9"]
    lines += ["  lifelong-ens compare --config results/tune/tuned.yaml --seeds 5 --out results/tuned"]
    return "\n".join(lines)


def _ensemble_epilog() -> str:
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
    lines += [
        "--batch_ensemble.preset fast, and so are its own options of training: --deep.epochs 20.",
        "",
        "examples:",
    ]
    lines += ["  lifelong-ens ensemble --methods deep,mc_dropout,batch_ensemble --seeds 3 --out results/e"]
    lines += [
        "  lifelong-ens ensemble --data cifar100 --root data --network resnet20 --epochs 30 --corruptions all"
    ]
    lines += ["  lifelong-ens ensemble --data mnist --root data --ood notmnist=DIR --calibrate"]
    return "\n".join(lines)


def _reproduce_epilog() -> str:
    lines = ["reproductions:", *_reproduction_lines(), ""]
    lines += [
        "Its options (lifelong-ens list NAME) and those of training are given by name: --root DIR --epochs 3."
    ]
    return "\n".join(lines)


def _reproduction_lines() -> list[str]:
    return [f"  {name:24} {reproduce.find(name).summary}" for name in reproduce.NAMES]


def _list(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    _refuse(rest)
    plurals = {"streams": "stream", "strategies": "strategy", "methods": "method", "networks": "network"}
    name = parsed.name
    if name == "reproductions":
        print("\n".join(_reproduction_lines()))
        return
    if name == "training":
        print("\n".join(catalogue.option_lines(catalogue.FIT)))
        return
    # a strategy and a way of making ensembles may have one name
    described = [(kind, builders[name]) for kind, builders in catalogue.KINDS.items() if name in builders]
    for kind, target in described:
        print(
            "\n".join(
                [f"{name} ({kind}): {catalogue.describe(target).summary}", *catalogue.option_lines(target)]
            )
        )
    if name in reproduce.NAMES:
        declared = reproduce.find(name)
        lines = [f"{name} (reproduction): {declared.summary}", *catalogue.option_lines(declared.options)]
        print("\n".join(lines))
    if described or name in reproduce.NAMES:
        return
    if name is not None and name not in plurals:
        known = [
            *plurals,
            *reproduce.NAMES,
            "reproductions",
            "training",
            *(one for builders in catalogue.KINDS.values() for one in builders),
        ]
        raise InputError(f"nothing is called {name!r}; {nearest(name, known)}")
    for plural, kind in plurals.items():
        if name in (None, plural):
            print(f"{plural}:")
            for one, target in catalogue.KINDS[kind].items():
                print(f"  {one:22} {catalogue.describe(target).summary}")


def _reproduce(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    if parsed.name is None:
        _refuse(rest)
        print("\n".join(_reproduction_lines()))
        return
    table, out = reproduce.find(parsed.name).run(vars(parsed), rest)
    print(f"{table.markdown()}\nrecords and tables: {out}")


def _report(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    _refuse(rest)
    from lifelong_ens.report import Report
    from lifelong_ens.report.ensemble_records import holds_ensembles
    from lifelong_ens.report.page import write_page

    page = write_page(parsed.outs, parsed.page)
    out = parsed.outs[0]
    if len(parsed.outs) > 1 or not any((out / "records").glob("*.json")):
        print(f"page: {page}")
        return
    if holds_ensembles(out):
        from lifelong_ens.report.ensembles import EnsembleReport

        ensembles = EnsembleReport.load(out)
        ensembles.write(out)
        _show(ensembles, out, page)
        return
    report = Report.load(out)
    known = report.runs["strategy"].unique()
    if parsed.baseline != "finetune" and parsed.baseline not in known:
        raise InputError(f"--baseline {parsed.baseline} did not run; {nearest(parsed.baseline, known)}")
    report.write(out, parsed.baseline)
    _show(report, out, page)


def _export(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    _refuse(rest)
    from experiments.export import export_record

    store = export_record(parsed.record, parsed.out, parsed.tasks)
    print(store.summary())
    print(f"next: lifelong-ens predict {parsed.out} IMAGES --task '{store.names()[0]}'")


def _predict(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    _refuse(rest)
    predict.run(parsed)


def _compare(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    from experiments.plan import plan_comparison

    plan = plan_comparison(vars(parsed), rest)
    _show(plan.run(), plan.out)


def _ensemble(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    from experiments.ensembles.plan import plan_ensembles

    plan = plan_ensembles(vars(parsed), rest)
    _show(plan.run(), plan.out)


def _tune(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    from tabulate import tabulate

    from experiments.tune import plan_tuning

    plan = plan_tuning(vars(parsed), rest)
    tuned = plan.run()
    print(
        tabulate(tuned.headline(), headers="keys", tablefmt="simple", showindex=False, disable_numparse=True)
    )
    print(f"\nall trials: {plan.out / 'trials.csv'}")
    print(f"next: lifelong-ens compare --config {plan.out / 'tuned.yaml'} --seeds 5 --out OUT")


def _show(report: Any, out: Path, page: Path | None = None) -> None:
    from tabulate import tabulate

    print(tabulate(report.headline(), headers="keys", tablefmt="simple", disable_numparse=True))
    print(f"\nrecords, tables and plots: {out}\npage: {page or out / 'report.html'}")


def _refuse(rest: Sequence[str]) -> None:
    if rest:
        raise InputError(f"did not expect {' '.join(rest)!r}; see --help.")


if __name__ == "__main__":
    sys.exit(main())
