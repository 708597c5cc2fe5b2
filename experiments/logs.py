"""TensorBoard and Weights & Biases hear of a run through Avalanche's loggers, beside its record.

They are told what has been computed anyway, the mean training loss after every epoch and a row of the accuracy matrix
after every task, under the names that Avalanche gives these. Its evaluator, which would compute them again in every
iteration, is not attached: it would slow training down. What a run computes is the same to the bit with and without.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from avalanche.logging import BaseLogger, TensorboardLogger

from experiments.pace import Pace
from experiments.run import Cell, Progress, digest
from lifelong_ens.errors import InputError, nearest


class TensorBoard(TensorboardLogger):
    """Avalanche's, in ``OUT/tensorboard/KEY``."""

    def __init__(self, cell: Cell, out: Path) -> None:
        super().__init__(out / "tensorboard" / cell.key)

    def close(self) -> None:
        """Write what is left to write."""
        self.writer.close()


class WandB(BaseLogger):
    """One run of Weights & Biases for each of ours, in ``OUT/wandb``; a run that goes on is the same run there.

    Avalanche 0.6's own calls ``wandb.util.generate_id`` and ``wandb.viz``, which wandb no longer has.

    Raises:
        InputError: wandb cannot begin a run; says why.
    """

    def __init__(self, cell: Cell, out: Path) -> None:
        super().__init__()
        import wandb
        import wandb.errors

        about = {"stream": cell.stream, "strategy": cell.strategy, "network": cell.network}
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "lifelong_ens"),
                group=cell.setting,
                name=cell.label(),
                id=digest([str(out.resolve()), cell.key]),
                resume="allow",
                dir=out,
                config={name: named.as_dict() for name, named in about.items()} | {"fit": dict(cell.fit)},
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.errors.Error as error:
            why = " ".join(str(error).split()).rstrip(".")
            raise InputError(f"--log_to wandb: {why}; log in, or set WANDB_MODE=offline.") from error
        self.run.define_metric("*", step_metric="step")

    def log_single_metric(self, name: str, value: Any, x_plot: int) -> None:
        """See ``BaseLogger``."""
        self.run.log({name: value, "step": x_plot})

    def close(self) -> None:
        """End the run."""
        self.run.finish()


LOGGERS: Mapping[str, Callable[[Cell, Path], TensorBoard | WandB]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
}


def check_loggers(names: Sequence[str]) -> tuple[str, ...]:
    """The names, if all of them are known and installed.

    Raises:
        InputError: One is not; says what to do.
    """
    for name in names:
        if name not in LOGGERS:
            raise InputError(f"--log_to {name}: there is no such logger; {nearest(name, LOGGERS)}")
        if importlib.util.find_spec(name) is None:
            raise InputError(f"--log_to {name} needs the package {name}: pip install 'lifelong-ens[log]'.")
    return tuple(dict.fromkeys(names))


class RunLog:
    """What loggers are told of one run; they are closed when the block is left.

    Args:
        names: Of the loggers.
        cell: That runs.
        out: The folder of the comparison.
        pace: Knows how many steps the run has made.
    """

    def __init__(self, names: Sequence[str], cell: Cell, out: Path, pace: Pace) -> None:
        self.loggers = [LOGGERS[name](cell, out) for name in names]
        self.pace = pace

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for logger in self.loggers:
            logger.close()

    def epoch(self, loss: float) -> None:
        """An epoch is over."""
        run = self.pace.run
        task = 0 if run is None else len(run.progress.tasks)
        self._log(f"Loss_Epoch/train_phase/train_stream/Task{task:03}", loss)

    def task(self, progress: Progress) -> None:
        """A task is finished; its row is the last of the accuracy matrix that is filled."""
        rows = [row for row in progress.accuracy if any(value is not None for value in row)]
        known = {task: value for task, value in enumerate(rows[-1]) if value is not None}
        for task, accuracy in known.items():
            self._log(f"Top1_Acc_Exp/eval_phase/test_stream/Task{task:03}/Exp{task:03}", accuracy)
        self._log("Top1_Acc_Stream/eval_phase/test_stream", sum(known.values()) / len(known))

    def _log(self, name: str, value: float) -> None:
        for logger in self.loggers:
            logger.log_single_metric(name, value, self.pace.done)
