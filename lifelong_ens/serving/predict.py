"""``predict``: image files to a CSV of answers. Nothing heavy is imported before the options are known to fit."""

from __future__ import annotations

import argparse
import csv
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lifelong_ens.errors import InputError

if TYPE_CHECKING:
    from lifelong_ens.serving.model import ServedModel

HELP = "what an exported model answers for image files"
RULES = ("entropy", "max_probability")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``predict``."""
    parser.description = (
        "Print image, task, label, probability and entropy (nats) for each image, as CSV; where a task holds "
        "several members, also the share of their pairs that disagree."
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="a folder that lifelong-ens export wrote")
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files, and folders of them")
    parser.add_argument(
        "--task", metavar="NAME", help="the task of all images (default: the only one there is)"
    )
    parser.add_argument(
        "--tasks",
        type=Path,
        metavar="CSV",
        help="a file with the columns image and task; without IMAGE, all of its images are answered",
    )
    parser.add_argument(
        "--infer_task", choices=RULES, help="guess each image's task: all answer, the surest is believed"
    )
    parser.add_argument("--batch_size", type=int, default=64, help="images per pass (default: 64)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps (default: cpu)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write here instead")


def run(parsed: argparse.Namespace) -> None:
    """Answer and print, or write the file.

    Raises:
        InputError: Something given cannot be used; the line says what.
    """
    if sum(given is not None for given in (parsed.task, parsed.tasks, parsed.infer_task)) > 1:
        raise InputError("give one of --task, --tasks and --infer_task.")
    if parsed.batch_size < 1:
        raise InputError(f"--batch_size is {parsed.batch_size}; expected 1 or more.")
    listed = None if parsed.tasks is None else _read_tasks(parsed.tasks)
    paths = list(_find(parsed.images)) if parsed.images or listed is None else list(listed)
    from lifelong_ens.serving.model import ServedModel

    model = ServedModel(parsed.model, device=_device(parsed.device))
    tasks = _tasks(model, paths, listed, parsed)
    several = ["disagreement"] if model.store.description.members_per_task > 1 else []
    header = ["image", "task", "label", "probability", "entropy", *several]
    rows = _answers(model, paths, tasks, parsed.infer_task, parsed.batch_size)
    if parsed.out is None:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
        return
    from lifelong_ens.store import write_bytes

    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_bytes(parsed.out, text.getvalue().encode())


def _answers(
    model: ServedModel, paths: Sequence[str], tasks: Sequence[str] | None, rule: Any, batch_size: int
) -> Iterator[list[str]]:
    """A row for each image."""
    import numpy as np
    import torch

    from lifelong_ens.metrics.diversity import disagreement
    from lifelong_ens.metrics.uncertainty import ensemble_log_probs, predictive_entropy

    for start in range(0, len(paths), batch_size):
        some = paths[start : start + batch_size]
        pixels = np.stack([model.images.read(path) for path in some])
        x = model.images.normalised(torch.from_numpy(pixels).to(model.device))
        with torch.no_grad():
            names = model.infer_task(x, rule) if tasks is None else list(tasks[start : start + batch_size])
            log_probs = model.member_logits(x, names).float().log_softmax(dim=-1).cpu()
        best, classes = ensemble_log_probs(log_probs).max(dim=1)
        entropy = predictive_entropy(log_probs)
        for i, (path, name) in enumerate(zip(some, names, strict=True)):
            row = [path, name, model.labels(name)[int(classes[i])], f"{float(best[i].exp()):.6f}"]
            row.append(f"{float(entropy[i]):.6f}")
            if len(log_probs) > 1:
                row.append(f"{float(disagreement(log_probs[:, i : i + 1])):.6f}")
            yield row


def _tasks(
    model: ServedModel, paths: Sequence[str], listed: dict[str, str] | None, parsed: argparse.Namespace
) -> list[str] | None:
    """The task of each image; None where it is to be guessed. Every task is read, so that none is missing later."""
    if parsed.infer_task is not None:
        return None
    if listed is not None:
        known = {os.path.abspath(path): task for path, task in listed.items()}
        missing = [path for path in paths if os.path.abspath(path) not in known]
        if missing:
            raise InputError(f"{parsed.tasks} names no task for {missing[0]}; add a line for it.")
        tasks = [known[os.path.abspath(path)] for path in paths]
    else:
        if parsed.task is None and len(model.tasks) != 1:
            raise InputError(
                f"{parsed.model} has {len(model.tasks)} tasks: say which by --task or --tasks, or --infer_task entropy."
            )
        tasks = [parsed.task or model.tasks[0]] * len(paths)
    for name in dict.fromkeys(tasks):
        model.labels(name)
    return tasks


def _find(given: Sequence[str]) -> Iterator[str]:
    """The image files that are named, and those in folders and below them, in the order of their names."""
    from lifelong_ens.images import EXTENSIONS, find_images

    if not given:
        raise InputError("name image files, or folders of them.")
    for one in given:
        path = Path(one)
        if not path.is_dir():
            if not path.exists():
                raise InputError(f"there is no image {one}.")
            yield one
            continue
        inside = [file.path for file in find_images(path)]
        if not inside:
            raise InputError(f"{one} holds no images ({', '.join(EXTENSIONS)}).")
        yield from inside


def _read_tasks(path: Path) -> dict[str, str]:
    """Image to task, as a CSV file says."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, strict=True))
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path} to read tasks from.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is no CSV file ({error}).") from error
    if not rows or not {"image", "task"} <= rows[0].keys():
        raise InputError(f"{path} needs a first line image,task and a line for each image.")
    return {str(row["image"]): str(row["task"]) for row in rows}


def _device(name: str) -> Any:
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} is not there; use --device cpu.") from error
    return name
