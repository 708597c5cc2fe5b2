"""Weights that were trained elsewhere, from a safetensors or a torch file, into a body."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lifelong_ens.errors import InputError


def load_weights(body: nn.Module, path: str | os.PathLike[str]) -> str:
    """Fill a body, whose classifier has been taken off, from a file of its ``state_dict``; returns its sha256 in hex.

    Names may start with ``module.``, and the file may have the classifier that the body has not: one linear layer
    that reads its ``num_features``. A torch file is read with ``weights_only``, so that it cannot run code.

    Args:
        body: A network with ``num_features``.
        path: A safetensors file (``.safetensors``), or what ``torch.save(state_dict)`` wrote, such as a torchvision
            weights file.

    Raises:
        InputError: There is no such file, it holds no state dict, or its tensors are not those of the body; the line
            names them.
    """
    found = {name.removeprefix("module."): tensor for name, tensor in _read(Path(path)).items()}
    expected = body.state_dict()
    unexpected = [name for name in found if name not in expected]
    if _is_classifier(unexpected, found, body.num_features):  # pyright: ignore
        unexpected = []
    missing = [name for name in expected if name not in found and not name.endswith("num_batches_tracked")]
    shared = [name for name in expected if name in found]
    misshapen = [
        f"{name} {tuple(found[name].shape)}, not {tuple(expected[name].shape)}"
        for name in shared
        if found[name].shape != expected[name].shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    if any(problems.values()):
        texts = [f"{word} {_some(names)}" for word, names in problems.items() if names]
        raise InputError(f"{path} does not fit this network: {'; '.join(texts)}.")
    body.load_state_dict({name: found[name] for name in shared}, strict=False)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _read(path: Path) -> Mapping[str, Tensor]:
    """The named tensors of a file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise InputError(f"there is no file {path} to take weights from.")
    try:
        state: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise InputError(
            f"{path} is no file of weights that can be read without running code from it "
            f"({str(error).strip().partition(chr(10))[0]}); save the state_dict alone, best as .safetensors."
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(one, Tensor) for one in state.values()):
        raise InputError(f"{path} holds something else than a state_dict; save model.state_dict() alone.")
    return state


def _is_classifier(names: Iterable[str], tensors: Mapping[str, Tensor], num_features: int) -> bool:
    """Whether these are the tensors of one linear layer on the body's features."""
    names = set(names)
    weights = [name for name in names if name == "weight" or name.endswith(".weight")]
    if len(weights) != 1:
        return False
    weight = tensors[weights[0]]
    own = {weights[0], weights[0].removesuffix("weight") + "bias"}
    return names <= own and weight.dim() == 2 and weight.shape[1] == num_features


def _some(names: list[str]) -> str:
    """The first few, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
