"""Images in WebDataset shards: tar files, on a disk or in a store, whose members of one base name are a sample."""

from __future__ import annotations

import json
import logging
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import IO, Any

import torch
from fsspec.core import url_to_fs
from torch import Tensor
from tqdm import tqdm

from lifelong_ens.errors import DamagedFileError, InputError
from lifelong_ens.images import EXTENSIONS, is_hidden
from lifelong_ens.store import cache_folder, natural, read_labelled, write_tensors
from streams.cache import digest
from streams.files import unreadable
from streams.folders import ImageFile

VERSION = 1
_log = logging.getLogger(__name__)
# what the file systems of fsspec say of a file that changes when the file does
_CHANGING = [
    "size",
    "mtime",
    "created",
    "ETag",
    "etag",
    "LastModified",
    "last_modified",
    "updated",
    "md5Hash",
]
_IMAGES = {ending[1:] for ending in EXTENSIONS}
_BLOCK = 512


def address(pattern: str) -> str:
    """What the user wrote as an address that does not depend on the working folder.

    Raises:
        InputError: It needs a package that is not installed, or there is none for it.
    """
    try:
        _, path = url_to_fs(pattern)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"{pattern} cannot be read: {error}; pip install it, or correct the address"
        ) from None
    return pattern if pattern.endswith(path) else path


def list_shards(pattern: str, label: str, names: Sequence[str] | None, workers: int) -> list[ImageFile]:
    """All samples of the shards that a pattern names, class by class, names in order.

    So the same images are the same stream however they are spread over shards, or in class folders.

    Args:
        pattern: An ``address`` with ``*`` or braces.
        label: Ending of the member with a sample's class, or ``json.KEY``.
        names: Of the classes, where shards number them.
        workers: Threads that read shards which have no index yet.
    """
    if label == "json":
        raise InputError("label is json; expected json.KEY, where KEY has the class")
    shards = find_shards(pattern)
    with ThreadPoolExecutor(max(workers, 1), "index") as pool:
        # the first time they are read from end to end
        bar = partial(tqdm, total=len(shards), desc="index", unit="shard", delay=2, leave=False, disable=None)
        files = [file for found in bar(pool.map(partial(_index, label=label), shards)) for file in found]
    if not files:
        raise InputError(f"{pattern} has no samples; expected members such as 7{EXTENSIONS[0]} and 7.{label}")
    classes = {file.class_name for file in files}
    if names is not None:
        called = _called(pattern, classes, names)
        files = [replace(file, class_name=called[file.class_name]) for file in files]
    else:
        _require_all_numbers(pattern, classes)
    return sorted(files, key=lambda file: (file.class_name, file.path[len(file.shard) :].split("/")))


def read_names(path: Path) -> list[str]:
    """The lines of a text file, each the name of a class."""
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"class_names {path} cannot be read ({error}); expected a name in each line"
        ) from None
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"class_names {path} has {twice[0]!r} twice, but two classes need two names")
    return names


def _called(where: str, classes: set[str], names: Sequence[str]) -> dict[str, str]:
    """The name of each class that a number is given of."""
    called = {one: names[int(one)] for one in classes if one.isdecimal() and int(one) < len(names)}
    if unknown := natural(classes - set(called)):
        raise InputError(
            f"{where}: class {unknown[0]} has no line in class_names, whose lines are those of 0 to {len(names) - 1}; "
            "add it, or leave class_names out if shards have names"
        )
    return called


def _require_all_numbers(where: str, classes: set[str]) -> None:
    """Refuse a number that is left out: either shards are missing, or a class's number is not its id."""
    if not all(one.isdecimal() for one in classes):
        return
    numbers = {int(one) for one in classes}
    if gaps := set(range(max(numbers))) - numbers:
        raise InputError(
            f"{where}: classes are numbered up to {max(numbers)} but no image has class {min(gaps)}; add shards, or "
            "pass class_names, a text file with a name in each line, which says what the numbers mean"
        )


def find_shards(pattern: str) -> list[str]:
    """The addresses that a pattern names, each once, by name."""
    found: dict[str, None] = {}
    for one in _braces(pattern):
        system, path = url_to_fs(one)
        if not any(sign in path for sign in "*["):
            found[one] = None
            continue
        with _named(one):
            matches: Any = system.glob(path)
        found.update(dict.fromkeys(one.removesuffix(path) + match for match in matches))
    if not found:
        raise InputError(f"no shard matches {pattern}; expected tar files, such as DIR/train-*.tar")
    return natural(found)


def _braces(pattern: str) -> Iterator[str]:
    """``{000..123}`` and ``{one,other}`` written out, as a shell does."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [[part] if number % 2 == 0 else _choices(part) for number, part in enumerate(parts)]
    return map("".join, product(*choices))


def _choices(text: str) -> list[str]:
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", text):
        first, last = span.groups()
        return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return text.split(",")


@contextmanager
def _named(shard: str) -> Iterator[None]:
    """Errors of whatever package reads the shard as one line."""
    try:
        yield
    except InputError:
        raise
    except tarfile.TarError as error:
        raise InputError(f"{shard} is no whole tar file ({error}); restore it, uncompressed") from None
    except Exception as error:
        raise unreadable(shard, error) from None


def _index(shard: str, label: str) -> list[ImageFile]:
    """A shard's samples: from the cache folder, read from the shard where it changed or was not seen."""
    with _named(shard):
        system, path = url_to_fs(shard)
        known = system.info(path)
        version = digest([VERSION, *(str(known.get(name)) for name in _CHANGING)])[:24]
        file = cache_folder() / "shards" / f"{digest([shard, label])[:24]}.safetensors"
        spans, names = _read_known(file)
        if names.get("version") != version:
            with system.open(path, "rb") as opened:
                spans, names = _read_index(opened, shard, label)
            names["version"] = version
            try:
                write_tensors(file, spans, names)
            except OSError as error:
                _log.warning("the index of %s is not kept: %s cannot be written (%s)", shard, file, error)
    columns = names["members"], names["classes"], spans["size"].tolist(), spans["start"].tolist()
    return [
        ImageFile(f"{shard}/{name}", one, size, version, "", shard, at)
        for name, one, size, at in zip(*columns, strict=True)
    ]


def _read_known(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The index in the cache folder; nothing where there is none that can be used."""
    try:
        return read_labelled(file)
    except DamagedFileError as error:
        _log.warning("%s; it is made anew", error)
    except OSError:
        pass
    return {}, {}


def _read_index(file: IO[bytes], shard: str, label: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What is kept of a shard: where its images begin and their sizes; their names and classes."""
    wanted, key = ("json", label.removeprefix("json.")) if label.startswith("json.") else (label, "")
    images: dict[str, tarfile.TarInfo] = {}
    classes: dict[str, str] = {}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            # it would keep all there are
            tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
            sample, ending = _split(member.name)
            known = {wanted: classes}.get(ending, images if ending in _IMAGES else None)
            if known is None or not member.isreg() or any(map(is_hidden, sample.split("/"))):
                continue
            if sample in known:
                what = "class" if known is classes else "image"
                raise InputError(f"{shard}: sample {sample} has a second {what}, {member.name}; leave one")
            if known is classes:
                content = tar.extractfile(member)
                classes[sample] = _class(content.read() if content else b"", key, f"{shard}/{member.name}")
            else:
                images[sample] = member
        # tarfile takes whatever it does not understand for the end
        file.seek(tar.offset)
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise tarfile.ReadError(f"it breaks off after {tar.offset} bytes")
    for sample in images | classes:
        if sample not in images:
            raise InputError(
                f"{shard}: sample {sample} has no image ({', '.join(EXTENSIONS)}); add or remove it"
            )
        if sample not in classes:
            hint = f"{sample}.{wanted} is missing; add it, or say with label where classes are"
            raise InputError(f"{shard}: sample {sample} has no class: {hint}")
    spans = {
        "start": [one.offset_data for one in images.values()],
        "size": [one.size for one in images.values()],
    }
    names = {"members": [one.name for one in images.values()], "classes": [classes[one] for one in images]}
    return {name: torch.tensor(column, dtype=torch.int64) for name, column in spans.items()}, names


def _split(name: str) -> tuple[str, str]:
    """A member's sample and ending: what stands before and after the first dot of its base name."""
    folder, base = posixpath.split(posixpath.normpath(name))
    stem, _, ending = base.partition(".")
    return posixpath.join(folder, stem), ending.lower()


def _class(content: bytes, key: str, name: str) -> str:
    """The class that a sample's member says, a number or a name."""
    try:
        value = json.loads(content)[key] if key else content.decode()
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ValueError(f"{key} is {json.dumps(value)[:40]}")
        if text := str(value).strip():
            return text
        raise ValueError("it is empty")
    except (ValueError, TypeError, KeyError) as error:
        reason = f"no key {key}" if isinstance(error, KeyError | TypeError) else error
        raise InputError(f"{name} says no class ({reason}); expected a number or a name") from None
