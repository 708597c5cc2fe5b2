"""The tables in the documents, made anew from the committed results: ``python -m experiments.reproduce.readme``."""

from __future__ import annotations

from pathlib import Path

from experiments import reproduce
from experiments.bench.table import Table
from experiments.reproduce.declaration import Shown

RESULTS = Path("experiments/results")
DOCUMENTS = (Path("README.md"), RESULTS / "README.md")


def table_of(folder: Path) -> Shown:
    """The table of what a folder of results holds: the benchmark's, or records of a reproduction."""
    return Table.load(folder) if Table.exists(folder) else reproduce.find(folder.name).table_of(folder)


def folders(results: Path) -> list[Path]:
    """The folders of results that have a table; one that holds pictures alone has none."""
    return sorted(one for one in results.iterdir() if Table.exists(one) or (one / "records").is_dir())


def refreshed(text: str, results: Path) -> str:
    """``text`` with the table of each folder of ``results`` between ``<!-- table NAME -->`` and ``<!-- end -->``."""
    for folder in folders(results):
        block = table_of(folder).block()
        mark = f"<!-- table {folder.name} -->"
        before, found, after = text.partition(f"{mark}\n")
        if found:
            text = f"{before}{found}{block}\n{after[after.index('<!-- end -->') :]}"
    return text


def main() -> None:
    """Write the documents' tables and every committed ``table.md``."""
    for folder in folders(RESULTS):
        (folder / "table.md").write_text(table_of(folder).markdown())
    for document in DOCUMENTS:
        document.write_text(refreshed(document.read_text(), RESULTS))


if __name__ == "__main__":
    main()
