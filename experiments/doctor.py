"""Whether everything that is needed is here, found out without importing anything that may be broken."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

from experiments.catalogue import KINDS, describe
from lifelong_ens.store import cache_folder

PACKAGE = "lifelong-ens"
TESTED_AVALANCHE = "0.6.0"
# what needs an extra; that of developers is no user's business
EXTRAS = {
    "tune": "lifelong-ens tune",
    "ray": "--engine ray",
    "bench": "the peers of lifelong-ens bench",
    "translation": "lifelong-ens reproduce translation",
}
_MNIST = (("MNIST/raw",),)
_CLASSES = (("train", "test"),)
_CLASSES_VAL = (("train", "val"),)
# folders that a stream reads, in the order in which it looks for them
EXPECTED: dict[str, tuple[tuple[str, ...], ...]] = {
    "split_mnist": _MNIST,
    "permuted_mnist": _MNIST,
    "rotated_mnist": _MNIST,
    "split_fashion_mnist": (("FashionMNIST/raw",),),
    "split_cifar10": (*_CLASSES, ("cifar-10-batches-py",)),
    "split_cifar100": (*_CLASSES, ("cifar-100-python",)),
    "split_tiny_imagenet": (("tiny-imagenet-200/train", "tiny-imagenet-200/val"), *_CLASSES_VAL),
    "split_imagenet": _CLASSES_VAL,
    "image_folder": (*_CLASSES, *_CLASSES_VAL),
    "domain_folder": (*_CLASSES, *_CLASSES_VAL),
}
# torch in a process of its own: a broken one may not only raise but take the process down
PROBE = """
import json, torch
cuda = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"threads": torch.get_num_threads(), "mps": torch.backends.mps.is_available(),
    "cuda": [[one.name, one.total_memory] for one in cuda], "built_for": torch.version.cuda}))
import torchvision
torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
print("{}")
"""
PROBE_SECONDS = 60


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        status: How it is.
        text: What was looked at and, where it is not as it should be, what to do.
        needed: Whether something does not work without it.
    """

    status: Literal["ok", "missing", "wrong"]
    text: str
    needed: bool = True

    def line(self) -> str:
        """For people."""
        return f"{self.status:8} {self.text}"


def checks(root: Path, asked: bool) -> Iterator[Check]:
    """Every check, one after the other; none raises.

    Args:
        root: Folder that images are looked for in.
        asked: Whether somebody named it, and so needs something to be there.
    """
    yield from _packages()
    yield from _torch()
    yield Check("ok", f"memory: {_memory()}")
    yield from _folders()
    yield from _streams(root, asked)


def _packages() -> Iterator[Check]:
    """Python, what the installed metadata asks for, and the extras."""
    yield Check("ok", f"python {platform.python_version()}, {sys.executable}")
    try:
        required = [Requirement(one) for one in requires(PACKAGE) or []]
        own = version(PACKAGE)
    except PackageNotFoundError:
        yield Check(
            "missing", f"{PACKAGE} is not installed, only found on the path: pip install --editable ."
        )
        return
    always = [one for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
    bad = [check for check in map(_installed, always) if check is not None]
    if not bad:
        yield Check("ok", f"{PACKAGE} {own} with {len(always)} packages of the versions that it asks for")
    yield from bad
    found = _version("avalanche-lib")
    if found not in (None, TESTED_AVALANCHE):
        yield Check("ok", f"avalanche-lib {found} is allowed, but tests are run with {TESTED_AVALANCHE}")
    for extra, purpose in EXTRAS.items():
        wanted = [one for one in required if one not in always and one.marker is not None]
        wanted = [one for one in wanted if one.marker.evaluate({"extra": extra})]  # pyright: ignore
        lacking = [one.name for one in wanted if _installed(one) is not None]
        if lacking:
            how = f"pip install '{PACKAGE}[{extra}]'"
            yield Check("missing", f"{', '.join(lacking)}: only {purpose} needs this; {how}", needed=False)
        elif wanted:
            yield Check("ok", f"extra {extra}: {purpose}")


def _installed(wanted: Requirement) -> Check | None:
    """What is wrong with a required package, or None."""
    found = _version(wanted.name)
    if found is None:
        return Check("missing", f"{wanted.name}: pip install '{wanted.name}{wanted.specifier}'")
    if not wanted.specifier.contains(found, prereleases=True):
        how = f"pip install '{wanted.name}{wanted.specifier}'"
        return Check("wrong", f"{wanted.name} {found}, expected {wanted.specifier}: {how}")
    return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _torch() -> Iterator[Check]:
    """Whether torch and torchvision can be imported and fit together, and what they compute on."""
    names = f"torch {_version('torch')} and torchvision {_version('torchvision')}"
    command = [sys.executable, "-c", PROBE]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        yield Check("wrong", f"{names}: importing them takes more than {PROBE_SECONDS} s")
        return
    said: list[Any] = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"the process ended with {result.returncode}"
        together = "install both by one command, so that pip chooses those that fit together"
        how = f"{together}: pip install --force-reinstall torch torchvision"
        what = "torchvision does not load beside torch" if said else "torch cannot be imported"
        yield Check("wrong", f"{names}: {what} ({reason}); {how}")
    else:
        yield Check("ok", f"{names} fit together")
    if said:
        yield _device(said[0])


def _device(said: dict[str, Any]) -> Check:
    threads = f"cpu, {said['threads']} of {os.cpu_count()} threads"
    if given := os.environ.get("OMP_NUM_THREADS"):
        threads += f" (OMP_NUM_THREADS={given})"
    more = [f"cuda: {name}, {memory / 2**30:.0f} GiB" for name, memory in said["cuda"]]
    more += ["mps"] if said["mps"] else []
    if not more and said["built_for"]:
        more = [f"no cuda device seen, though torch is built for CUDA {said['built_for']}"]
    return Check("ok", "; ".join([f"device: {threads}", *more]))


def _memory() -> str:
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return "size unknown"
    return f"{total / 2**30:.1f} GiB"


def _folders() -> Iterator[Check]:
    """Where files are written."""
    cache = cache_folder()
    held = sum(path.stat().st_size for path in cache.glob("*.safetensors"))
    change = "set LIFELONG_ENS_CACHE to a folder of yours"
    yield _writable(cache, f"cache of decoded images, {held / 1e9:.2f} GB", change)
    yield _writable(Path.home() / ".avalanche", "settings of avalanche", "set HOME to a folder of yours")
    yield _writable(Path("results").resolve(), "results", "give --out, or go to a folder of yours")


def _writable(folder: Path, what: str, otherwise: str) -> Check:
    """Whether a folder can be written to, or made; nothing is tried."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Check("wrong", f"{what}: {folder} cannot be written to: {otherwise}")
    free = shutil.disk_usage(there).free
    return Check("ok", f"{what}: {folder}, {free / 1e9:.0f} GB free")


def _streams(root: Path, asked: bool) -> Iterator[Check]:
    """Which streams find their images in a folder, and what the others expect; split_digits needs none."""
    found = {stream: there for stream in EXPECTED if (there := _images(stream, root))}
    for what in dict.fromkeys(found.values()):
        names = ", ".join(stream for stream, there in found.items() if there == what)
        yield Check("ok", f"images: {what} in {root}: {names}")
    if asked and not found:
        yield Check("missing", f"images: no stream finds any in {root}; see what each expects")
    for stream in EXPECTED:
        if stream not in found:
            options = describe(KINDS["stream"][stream]).options
            layout = next(one.help for one in options if one.name == "root")
            yield Check("missing", f"images of {stream} in {root}: {layout}", needed=False)


def _images(stream: str, root: Path) -> str:
    """What of the layouts that a stream reads is there; empty if nothing is."""
    for folders in EXPECTED[stream]:
        held = {folder: _entries(root / folder) for folder in folders}
        if all(held.values()):
            return " and ".join(f"{folder}/ ({count} entries)" for folder, count in held.items())
    return ""


def _entries(folder: Path) -> int:
    """How much is in a folder; 0 where it cannot be read."""
    try:
        return sum(1 for _ in folder.iterdir())
    except OSError:
        return 0
