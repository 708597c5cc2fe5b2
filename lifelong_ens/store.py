"""Files that survive a crash and can be trusted: safetensors and strict JSON, replaced whole, no pickle.

A file is written beside its target under a temporary name (hidden, ending in ``.tmp``), flushed to the disk
and moved over the target in one step, so that a reader sees the old file or the new one and a killed writer
leaves at most a temporary file behind. Errors of the operating system (no space, no permission, no such file)
pass through untouched; a file that is there and cannot be used raises
:class:`~lifelong_ens.errors.DamagedFileError`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lifelong_ens.errors import DamagedFileError

if TYPE_CHECKING:
    from torch import Tensor

_METADATA = "lifelong_ens"  # one key alone: safetensors writes several in an order that changes


def write_bytes(path: str | os.PathLike[str], data: bytes) -> str:
    """Write ``data`` at ``path`` in one step, with the folders above it; returns the file's sha256 in hex."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)
    return hashlib.sha256(data).hexdigest()


def write_json(path: str | os.PathLike[str], value: object) -> str:
    """Write ``value`` as strict JSON, NaN as null; returns the file's sha256 in hex.

    Raises:
        ValueError: for an infinite number, which JSON has no word for.
        TypeError: for a value that JSON cannot hold.
    """
    text = json.dumps(_nan_to_none(value), indent=1, ensure_ascii=False, allow_nan=False)
    return write_bytes(path, (text + "\n").encode())


def read_json(path: str | os.PathLike[str], sha256: str | None = None) -> Any:
    """The value in a JSON file; with ``sha256`` (hex) the file must hash to it.

    Raises:
        DamagedFileError: if the file is not complete, strict JSON in UTF-8, or hashes to something else.
    """
    data = _checked_bytes(path, sha256)
    try:
        return json.loads(data.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"is not valid JSON ({error})") from error


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
) -> str:
    """Write named tensors and JSON-able ``metadata`` as one safetensors file; returns its sha256 in hex.

    The file carries a hash of its own content, checked by every :func:`read_tensors`. Tensors may be on any
    device, strided, or share memory; each is written whole. The file is built in memory first.
    """
    return write_bytes(path, tensors_file(tensors, metadata))


def tensors_file(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> bytes:
    """What :func:`write_tensors` writes."""
    from safetensors.torch import save

    about = json.loads(_canonical(_nan_to_none(metadata or {})))  # as a reader will see it
    label = _canonical({"content_sha256": _content_sha256(tensors, about), "metadata": about})
    return save(_separate(tensors), {_METADATA: label})


def read_tensors(
    path: str | os.PathLike[str], sha256: str | None = None, device: str = "cpu"
) -> dict[str, Tensor]:
    """The tensors in a file of :func:`write_tensors`, on ``device``.

    The content must match the hash that the file carries, and with ``sha256`` (hex) the file must hash to it.

    Raises:
        DamagedFileError: if the file is truncated, altered, not one of ours, or hashes to something else.
    """
    tensors, _ = read_labelled(path, sha256)
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def read_labelled(
    path: str | os.PathLike[str], sha256: str | None = None, max_bytes: int | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of one reading of a file, which belong together even where it is replaced meanwhile.

    Args:
        path: A file of :func:`write_tensors`.
        sha256: If given (hex), the file must hash to it.
        max_bytes: If given, a larger file is refused without reading it.

    Raises:
        DamagedFileError: if the file is truncated, altered, not one of ours, too large or hashes to something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = _checked_bytes(path, sha256, max_bytes)
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
        raise _damaged(path, f"is not a complete safetensors file ({error})") from error
    label = _label(path, header.get("__metadata__"))
    if label["content_sha256"] != _content_sha256(tensors, label["metadata"]):
        raise _damaged(path, "was altered after it was written (its content does not match its own hash)")
    return tensors, label["metadata"]


def map_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """As :func:`read_tensors`, but the tensors stay in the file and are read where they are used, on the CPU.

    All processes that map one file share its memory. Its hash is checked now; the file must not be written into later
    (:func:`write_tensors` never does: it puts a new file in its place).

    Raises:
        DamagedFileError: if the file is truncated, altered or not one of ours.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise _damaged(path, f"is not a complete safetensors file ({error})") from error
    label = _label(path, metadata)
    if label["content_sha256"] != _content_sha256(tensors, label["metadata"]):
        raise _damaged(path, "was altered after it was written (its content does not match its own hash)")
    return tensors


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata in a file of :func:`write_tensors`; of the tensors only the size of the file is checked.

    Raises:
        DamagedFileError: if the file is truncated or not one of ours.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), "pt") as file:
            metadata = file.metadata()
    except (SafetensorError, ValueError) as error:
        raise _damaged(path, f"is not a complete safetensors file ({error})") from error
    return _label(path, metadata)["metadata"]


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """A hash (hex) of what the tensors hold: names, dtypes, shapes and bytes, in the order of their names.

    Neither the device, the strides nor the order of the mapping change it.
    """
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu")
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode() + b"\n")
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where what can be made again is kept: ``$LIFELONG_ENS_CACHE``, else the user's cache folder."""
    if given := os.environ.get("LIFELONG_ENS_CACHE"):
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lifelong_ens"


def natural(names: Iterable[str]) -> list[str]:
    """Names sorted so that task 10 comes after task 9."""

    def key(name: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]

    return sorted(names, key=key)


def _content_sha256(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    return hashlib.sha256(f"{tensors_sha256(tensors)}\n{_canonical(metadata)}".encode()).hexdigest()


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def _label(path: str | os.PathLike[str], metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """What :func:`write_tensors` noted in the header: the content's hash and the caller's metadata."""
    if not metadata or _METADATA not in metadata:
        raise _damaged(path, "was not written by lifelong_ens")
    try:
        label = json.loads(metadata[_METADATA], parse_constant=_refuse_constant)
        return {"content_sha256": label["content_sha256"], "metadata": dict(label["metadata"])}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, "has a damaged header") from error


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous and with no memory in common, which safetensors refuses."""
    separate: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().to("cpu").contiguous()
        address = plain.untyped_storage().data_ptr()
        separate[name] = plain.clone() if address in taken else plain
        taken.add(address)
    return separate


def _checked_bytes(path: str | os.PathLike[str], sha256: str | None, max_bytes: int | None = None) -> bytes:
    """The file's bytes, read once, so that what was hashed is what is parsed."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if max_bytes is not None and size > max_bytes:
            raise _damaged(path, f"has {size} bytes, where at most {max_bytes} are expected")
        data = file.read()
    if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise _damaged(path, f"has the sha256 {found[:12]}..., expected {sha256[:12]}...")
    return data


def _damaged(path: str | os.PathLike[str], what: str) -> DamagedFileError:
    return DamagedFileError(f"{os.fspath(path)} {what}; delete it and run again, or restore it from a copy")


def _nan_to_none(value: Any) -> Any:
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, Mapping):
        return {key: _nan_to_none(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_nan_to_none(item) for item in value]
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _sync_folder(folder: Path) -> None:
    """Make the move itself durable, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass  # some network file systems cannot sync a folder; the file itself is safe
    finally:
        os.close(handle)
