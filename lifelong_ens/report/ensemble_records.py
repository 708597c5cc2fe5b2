"""The records of trained and measured ensembles: what one must hold, and reading a folder of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lifelong_ens.errors import DamagedFileError
from lifelong_ens.report.records import read_records
from lifelong_ens.store import read_json

SCHEMA = 1

_KEYS: dict[str, type | tuple[type, ...]] = {
    "data": Mapping,
    "method": Mapping,
    "network": Mapping,
    "fit": Mapping,
    "seed": int,
    "setting": str,
    "protocol": Mapping,
    "uncertainty": list,
    "diversity": Mapping,
    "reliability": Mapping,
    "cost": Mapping,
    "spent": Mapping,
    "num_members": int,
    "asked_members": int,
    "seconds_inference": (int, float),
    "versions": Mapping,
    "device": str,
}
COST = ("parameters", "bytes", "flops_forward", "flops_effective")
SPENT = ("flops", "flops_effective", "seconds", "saved_bytes", "trainings")


def check_ensemble_record(record: Any, source: str) -> None:
    """Check that ``record`` is one of an ensemble and complete; ``source`` names it in the message.

    Raises:
        DamagedFileError: It is of a newer schema, or something is missing or ill-formed.
    """
    if not isinstance(record, Mapping) or not isinstance(record.get("schema"), int):
        raise DamagedFileError(f"{source} is not a record of an ensemble (it states no schema); move it away")
    if record["schema"] > SCHEMA:
        raise DamagedFileError(
            f"{source} has schema {record['schema']}, this version reads up to {SCHEMA}; upgrade lifelong-ens"
        )
    for key, kind in _KEYS.items():
        if not isinstance(record.get(key), kind):
            raise _damaged(source, f"`{key}` is missing or ill-formed")
    for key, names in (("cost", COST), ("spent", SPENT)):
        for name in names:
            if not _is_number(record[key].get(name)):
                raise _damaged(source, f"`{key}.{name}` is {record[key].get(name)!r}")
    rows = record["uncertainty"]
    if not all(isinstance(row, Mapping) and isinstance(row.get("images"), str) for row in rows):
        raise _damaged(source, "a row of `uncertainty` does not say which images it is of")
    if not any(row["images"] == "test" and _is_number(row.get("nll")) for row in rows):
        raise _damaged(source, "`uncertainty` says nothing of the test images")


def load_ensemble_records(out: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of ``ensemble`` in a folder, see ``read_records``."""
    return read_records(out, check_ensemble_record, "ensemble")


def holds_ensembles(out: str | os.PathLike[str]) -> bool:
    """Whether the records in a folder are of ensembles, not of strategies on a stream."""
    for path in sorted((Path(out) / "records").glob("*.json")):
        try:
            record = read_json(path)
        except DamagedFileError:
            continue
        return isinstance(record, Mapping) and "method" in record
    return False


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _damaged(source: str, what: str) -> DamagedFileError:
    return DamagedFileError(f"{source}: {what}; delete the record and run again")
