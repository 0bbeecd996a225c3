"""What tuning changes, text by text: differences to the base over the same chats.

Texts differ far more than models do, so that a difference of two means over the same texts is
known far better than either mean.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ubmoe.bootstrap import interval, means
from ubmoe.results.entries import Entry, by_row
from ubmoe.results.records import Record, Records

# The columns of a table of encoders, by their names in `by_text`.
SHARES = {
    "DP-after": "after",
    "first": "first",
    "after without first": "without_first.after",
}


@dataclass(frozen=True)
class Difference:
    """A mean over seeds, and its 95 % interval, by the bootstrap over texts."""

    value: float
    interval: tuple[float, float]

    @classmethod
    def of(cls, value: float, drawn: np.ndarray) -> "Difference":
        low, high = interval(drawn)
        return cls(value, (low, high))


def changes(
    model: str, records: Records, seeds: Sequence[int]
) -> dict[str, dict[str, Difference | None]]:
    """{row: {column: difference to the base}}, of every row but the bases that has any.

    SHARES in percentage points; `perplexity` times the base's. None where it was not measured, or
    of other texts.
    """
    rows = by_row("encoders", model, records, seeds)
    base = next((own[0] for row, own in rows.items() if row == "base"), None)
    found = {row: _changed(own, base) for row, own in rows.items() if base and not own[0].is_base}
    return {row: cells for row, cells in found.items() if any(cells.values())}


def _changed(own: Sequence[Entry], base: Any) -> dict[str, Difference | None]:
    texts, theirs = _all(own, "dependence"), _all([base], "dependence")
    cells = {
        column: _shares([each["by_text"] for each in (*texts, *theirs)], name)
        if texts and theirs and all("by_text" in each for each in (*texts, *theirs))
        else None
        for column, name in SHARES.items()
    }
    chats, theirs = _all(own, "evaluation"), _all([base], "evaluation")
    known = chats and theirs and all("answers" in each for each in (*chats, *theirs))
    every = [each["answers"] for each in (*chats, *theirs)] if known else []
    return cells | {"perplexity": _perplexities(every) if every else None}


def _all(entries: Sequence[Entry], kind: str) -> list[dict[str, Any]]:
    """A section of what was measured beside each, where it was of all."""
    found = [record for each in entries for record in each.beside if record.kind == kind]
    sections = [_section(record) for record in found]
    return sections if len(sections) == len(entries) else []


def _section(record: Record) -> dict[str, Any]:
    return record.data["generation"] if record.kind == "evaluation" else record.section


def _shares(texts: Sequence[dict[str, Any]], name: str) -> Difference | None:
    """Of the mean of all but the last to the last."""
    if any(each["tokens"] != texts[0]["tokens"] for each in texts):
        return None
    *own, base = (np.array(each[name]) for each in texts)
    moved = np.mean(own, axis=0) - base
    return Difference.of(float(moved.mean()), means(moved))


def _perplexities(answers: Sequence[dict[str, Any]]) -> Difference | None:
    """Of the geometric mean of all but the last, times the last."""
    if any(each["tokens"] != answers[0]["tokens"] for each in answers):
        return None
    *own, base = (np.array(each["losses"]) for each in answers)
    lost, tokens = np.mean(own, axis=0) - base, np.array(answers[0]["tokens"])
    return Difference.of(math.exp(lost.sum() / tokens.sum()), np.exp(means(lost, tokens)))
