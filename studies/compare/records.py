"""All records of a folder, and the benchmarks beside them."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ubmoe.config import Config
from ubmoe.results.packed import LINES, read
from ubmoe.results.records import (
    BENCHMARK,
    Record,
    as_it_ran,
    checked,
    folders,
    loose,
    read_result,
)


class Records:
    """The records of a folder, in the order of their names."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.by_name = {
            record.name: record for record in sorted(records, key=lambda record: record.name)
        }

    @classmethod
    def of_names(cls, results: Mapping[str, dict[str, Any]]) -> "Records":
        return cls(Record.named(name, data) for name, data in results.items())

    def of(self, kind: str, model: str | None = None, label: str | None = None) -> list[Record]:
        """Those of one result, and of a model or a run where it is named."""
        return [
            record
            for record in self.by_name.values()
            if record.kind == kind
            and (model is None or record.model == model)
            and (label is None or record.label == label)
        ]

    def beside(self, record: Record, kind: str) -> Record | None:
        """Another program's record of the same run."""
        return self.by_name.get(Record(record.label, kind, record.seed, {}).name)


def recorded(config: Config) -> Records:
    """Every record of `results.directory`, a file of its own or packed."""
    return Records(
        checked(place, Record.named(place.stem, as_it_ran(result)))
        for folder in reversed(folders(config.results.directory))
        for place, result in _stored(folder)
    )


def _stored(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(its place, result) of each; of packed ones as if each were a file; then those that are."""
    for name, result in read(folder).items():
        yield folder / LINES / f"{name}.json", result
    for path in loose(folder):
        yield path, read_result(path)


def read_benchmarks(config: Config) -> dict[str, list[dict[str, Any]]]:
    """The benchmarks of `results.directory` by their names, one for each device."""
    benchmarks: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(Path(config.results.directory).glob(f"{BENCHMARK}*.json")):
        name = path.name.removeprefix(BENCHMARK).partition(".")[0]
        benchmarks.setdefault(name, []).append(read_result(path, "rows"))
    return benchmarks
