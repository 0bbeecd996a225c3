"""What the generated tables have in common: cells over seeds, and notes below."""

from collections.abc import Iterable, Sequence

from studies.compare.entries import NO_TASKS, Entry
from ubmoe.report.tables import markdown, spread


def spread_of(every: Iterable[Entry], name: str) -> str:
    """Empty where there is nothing: a page shows what was measured."""
    values = [value for each in every if (value := each.cells.get(name)) is not None]
    return spread(values) if values else ""


def average_of(every: Iterable[Entry], tasks: Sequence[str]) -> str:
    """Of these tasks, which all rows have."""
    return spread([each.mean(tasks) for each in every])


def task_names(rows: dict[str, list[Entry]]) -> list[str]:
    """The columns that are tasks."""
    every = (name for row in rows.values() for each in row for name in each.cells)
    return [name for name in dict.fromkeys(every) if name not in NO_TASKS]


def noted(rows: list[list[str]], notes: list[str]) -> str:
    """A table, and below it a paragraph of notes; nothing where there are no rows."""
    if len(rows) == 1:
        return ""
    return "\n".join([markdown(rows), *([""] if notes else []), *notes])
