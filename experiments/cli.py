"""The command line, ``lifelong-ens COMMAND``; nothing heavy is imported before it is known what is asked for."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from experiments.commands import (
    bench,
    compare,
    completion,
    doctor,
    ensemble,
    export,
    listing,
    new,
    plan,
    predict,
    report,
    reproduce,
    tune,
    watch,
)
from experiments.stopping import Stopping
from lifelong_ens.errors import InputError, NonFiniteLossError

COMMANDS = {
    "compare": compare,
    "plan": plan,
    "tune": tune,
    "ensemble": ensemble,
    "reproduce": reproduce,
    "watch": watch,
    "report": report,
    "export": export,
    "predict": predict,
    "list": listing,
    "bench": bench,
    "new": new,
    "doctor": doctor,
    "completion": completion,
}
STOPPED = "stopped; the same command goes on after what is finished"
EXAMPLES = """
examples:
  lifelong-ens compare --stream split_digits --strategies finetune,batch_ensemble,pnn --seeds 3 --out results/d
  lifelong-ens report results/d
  lifelong-ens list batch_ensemble

exit codes:
  0 done   1 doctor found that something is missing, or another process of a run on several devices died
  2 input that cannot be used, said in one line
  130 stopped by Ctrl-C, 143 by SIGTERM; the same command goes on. A second Ctrl-C stops at once.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, or one of those in ``EXAMPLES``."""
    with Stopping() as stopping:
        try:
            parsed, rest = make_parser().parse_known_args(arguments)
            return _run(parsed, rest)
        except KeyboardInterrupt as stop:
            return _stopped(stopping, said=bool(stop.args))
        except Exception:
            # what a signal interrupts may turn it into an error of its own, an import above all
            if stopping.signal is None:
                raise
            return _stopped(stopping)


def _run(parsed: argparse.Namespace, rest: Sequence[str]) -> int:
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


def _stopped(stopping: Stopping, said: bool = False) -> int:
    if not said:
        print(STOPPED, file=sys.stderr)
    stopping.leave()
    return stopping.exit_code


def _fail(message: str, debug: bool) -> int:
    if debug:
        logging.getLogger(__name__).exception("the error was raised here:")
    print(f"lifelong-ens: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def make_parser() -> argparse.ArgumentParser:
    """Of all commands; what it leaves over are options of what is named, see ``experiments.options``."""
    parser = argparse.ArgumentParser(
        prog="lifelong-ens",
        description="Lifelong learning and efficient ensembles, with what they cost.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=module.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
