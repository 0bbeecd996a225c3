"""Rows compared text by text: with the base, and with rows of the other mask that embed as well.

Texts differ far more than models do, so that a difference of two means over the same texts is
known far better than either mean.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ubmoe.bootstrap import interval, means
from ubmoe.report.tables import CAUSAL, family
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


@dataclass(frozen=True)
class Match:
    """A row, and of the same modules tuned under the other mask the row that it is held against.

    other: of those whose STS is at least this row's, the one of the lowest perplexity; None where
    none embeds as well. ratio: this row's perplexity, times the other's.
    """

    row: str
    sts: float
    other: str | None = None
    other_sts: float | None = None
    ratio: Difference | None = None


def matches(model: str, records: Records, seeds: Sequence[int]) -> list[Match]:
    """Every row of which rows under the other mask were measured, too.

    STS is the mean of the tasks that all of them have, under each row's own mask.
    """
    rows = by_row("encoders", model, records, seeds)
    told = {row: own for row, own in rows.items() if not own[0].is_base and _answers(own)}
    if not told:
        return []
    common = frozenset.intersection(*(each.tasks for own in told.values() for each in own))
    sts = {
        row: float(np.mean([each.cells[task] for each in own for task in common]))
        for row, own in told.items()
    }
    return [
        _match(row, told, sts)
        for row in told
        if any(_other_mask(told[row][0]) == family(own[0].record.data) for own in told.values())
    ]


def _other_mask(entry: Entry) -> str:
    own = family(entry.record.data)
    return own.removesuffix(CAUSAL) if own.endswith(CAUSAL) else own + CAUSAL


def _match(row: str, told: dict[str, list[Entry]], sts: dict[str, float]) -> Match:
    answers = {
        other: _answers(own)
        for other, own in told.items()
        if other == row or family(own[0].record.data) == _other_mask(told[row][0])
    }
    own = answers.pop(row)
    ratios = {
        other: _perplexities([*own, _mean(theirs)])
        for other, theirs in answers.items()
        if sts[other] >= sts[row]
    }
    known = {other: ratio for other, ratio in ratios.items() if ratio is not None}
    if not known:
        return Match(row, sts[row])
    best = max(known, key=lambda other: known[other].value)
    return Match(row, sts[row], best, sts[best], known[best])


def _mean(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of several seeds; of other texts, none is like the first."""
    if any(each["tokens"] != answers[0]["tokens"] for each in answers):
        return {"tokens": None}
    return answers[0] | {"losses": np.mean([each["losses"] for each in answers], axis=0)}


def _changed(own: Sequence[Entry], base: Any) -> dict[str, Difference | None]:
    texts, theirs = _all(own, "dependence"), _all([base], "dependence")
    cells = {
        column: _shares([each["by_text"] for each in (*texts, *theirs)], name)
        if texts and theirs and all("by_text" in each for each in (*texts, *theirs))
        else None
        for column, name in SHARES.items()
    }
    mine, theirs = _answers(own), _answers([base])
    return cells | {"perplexity": _perplexities([*mine, *theirs]) if mine and theirs else None}


def _answers(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Losses and tokens of each chat, where every seed's are told; older records tell none."""
    found = [each.get("answers") for each in _all(entries, "evaluation")]
    return [each for each in found if each] if all(found) else []


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
