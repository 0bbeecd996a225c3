"""What the generated tables have in common: cells over seeds, and notes below."""

from collections.abc import Iterable, Sequence

from studies.compare.entries import Cells, Entry
from ubmoe.report.tables import markdown, spread


def score_of(every: Iterable[Entry], task: str) -> str:
    return _spread(task, (each.scores for each in every))


def measure_of(every: Iterable[Entry], name: str) -> str:
    return _spread(name, (each.measures for each in every))


def _spread(name: str, every: Iterable[Cells]) -> str:
    """Empty where there is nothing: a page shows what was measured."""
    values = [value for cells in every if (value := cells.get(name)) is not None]
    return spread(values) if values else ""


def average_of(every: Iterable[Entry], tasks: Sequence[str]) -> str:
    """Of these tasks, which all rows have."""
    return spread([each.mean(tasks) for each in every])


def task_names(rows: dict[str, list[Entry]]) -> list[str]:
    """Those that any has."""
    every = (name for row in rows.values() for each in row for name in each.scores)
    return list(dict.fromkeys(every))


def noted(rows: list[list[str]], notes: list[str]) -> str:
    """A table, and below it a paragraph of notes; nothing where there are no rows."""
    if len(rows) == 1:
        return ""
    return "\n".join([markdown(rows), *([""] if notes else []), *notes])
