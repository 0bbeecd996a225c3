"""Shared parts of the generated tables: cells over seeds, and notes below."""

from collections.abc import Iterable, Sequence

from studies.compare.labels import markdown, spread
from studies.compare.rows import Cells, RunRow


def score_of(every: Iterable[RunRow], task: str) -> str:
    return _spread(task, (run.scores for run in every))


def measure_of(every: Iterable[RunRow], name: str) -> str:
    return _spread(name, (run.measures for run in every))


def _spread(name: str, every: Iterable[Cells]) -> str:
    """Empty where there is nothing: a page shows what was measured."""
    values = [value for cells in every if (value := cells.get(name)) is not None]
    return spread(values) if values else ""


def average_of(every: Iterable[RunRow], tasks: Sequence[str]) -> str:
    """The average of these tasks, which all rows have."""
    return spread([run.mean(tasks) for run in every])


def task_names(rows: dict[str, list[RunRow]]) -> list[str]:
    """Those that any has."""
    every = (name for row in rows.values() for run in row for name in run.scores)
    return list(dict.fromkeys(every))


def noted(rows: list[list[str]], notes: list[str]) -> str:
    """A table, and below it a paragraph of notes; nothing where there are no rows."""
    if len(rows) == 1:
        return ""
    return "\n".join([markdown(rows), *([""] if notes else []), *notes])
