"""Rows compared text by text: with the base, with their causal twins, and at equal STS.

Texts differ far more than models do, so that a difference of two means over the same texts is
known far better than either mean.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from studies.compare.entries import (
    SINK,
    Entry,
    by_row,
    causal_controls,
    common_tasks,
    entries,
    reference,
)
from ubmoe.bootstrap import interval, means
from ubmoe.results.records import Record, Records

BY_SINK = "DP-after by the sink"
ASKED = ", in points"  # of a task's column
Answered = dict[str, tuple[str, list[float]]]  # by task: how it was asked, a value a question


@dataclass(frozen=True)
class Difference:
    """A mean over seeds, its 95 % interval, by the bootstrap over texts, and each seed's own.

    bounds: draws the interval, which takes nearly all of the time; only when it is asked for.
    """

    value: float
    bounds: Callable[[], Sequence[float]] = field(compare=False, repr=False)
    seeds: tuple[float, ...] = ()

    @cached_property
    def interval(self) -> tuple[float, float]:
        low, high = self.bounds()
        return low, high

    def __str__(self) -> str:
        text = "{:.2f} ({:.2f} to {:.2f}".format(self.value, *self.interval)
        if len(self.seeds) > 1:
            text += f"; seeds {min(self.seeds):.2f} to {max(self.seeds):.2f}"
        return text + ")"


def changes(
    model: str, records: Records, seeds: Sequence[int]
) -> dict[str, dict[str, Difference | None]]:
    """{row: {column: difference to the base}}, of every row but the bases that has any.

    SINK in percentage points, and BY_SINK: what DP-after changes by because `first` does;
    `perplexity` times the base's, and `by answer` the same where every answer counts once. None
    where it was not measured, or of other texts.
    """
    rows = by_row("encoders", model, records, seeds)
    start = reference([each for own in rows.values() for each in own])
    base = [start] if start is not None else []
    found = {row: changed(own, base) for row, own in rows.items() if not own[0].is_base}
    return {row: cells for row, cells in found.items() if any(cells.values())}


@dataclass(frozen=True)
class Twins:
    """A row tuned both ways and the same tuned causally, each of the seeds that both have.

    cells: {column: difference of the first to the second}, columns as of `changes`.
    """

    both: list[Entry]
    causal: list[Entry]
    cells: dict[str, Difference | None]


def twins(model: str, records: Records, seeds: Sequence[int]) -> dict[str, Twins]:
    """{row: its seeds and their causal twins}: tuned under that mask, and all else equal."""
    every = [each for each in entries("encoders", model, records, seeds) if each.has_learnt]
    found: dict[str, Twins] = {}
    pairs: dict[str, list[tuple[Entry, Entry]]] = {}
    for pair in causal_controls(every):
        pairs.setdefault(pair[0].row, []).append(pair)
    for row, own in pairs.items():
        own.sort(key=lambda pair: pair[0].seed or 0)
        both, causal = map(list, zip(*own, strict=True))
        found[row] = Twins(both, causal, changed(both, causal))
    return {row: each for row, each in found.items() if any(each.cells.values())}


def questions(
    kind: str, model: str, records: Records, seeds: Sequence[int]
) -> tuple[str, dict[str, dict[str, Difference | None]]]:
    """A row, and {each other row: {task: difference to it}}, in points, over the same questions.

    kind: of entries: `again`, against the base, or `bitune`, against its second causal set. Of the
    seeds that answered a task, the mean; None where nobody did.
    """
    rows = by_row(kind, model, records, seeds)
    every = [each for own in rows.values() for each in own]
    start = reference(every) if kind == "again" else next(filter(_is_only_causal, every), None)
    if start is None:
        return "", {}
    answered = {row: [_answered(each.record) for each in own] for row, own in rows.items()}
    theirs = answered.pop(start.row)
    tasks = list(dict.fromkeys(name for each in theirs for name in each))
    found = {
        row: {name: _gain(own, theirs, name) for name in tasks} for row, own in answered.items()
    }
    return start.row, {row: cells for row, cells in found.items() if any(cells.values())}


def _is_only_causal(entry: Entry) -> bool:
    return entry.record.section["variant"] == "only_causal"


def by_task(one: Entry, other: Entry) -> dict[str, Difference | None]:
    """{task and ASKED: difference in points over the same questions}, of two encoders or bases."""
    measured = [each.measured("evaluation") for each in (one, other)]
    mine, theirs = ({} if each is None else _answered(each) for each in measured)
    shared = [task for task in mine if task in theirs]
    return {f"{task}{ASKED}": _gain([mine], [theirs], task) for task in shared}


def _answered(record: Record) -> Answered:
    """Its value for each question, of tasks whose values are shares; older records have none."""
    section = _section(record)
    every = [section.get(name) for name in ("limit", "apply_chat_template")]
    return {
        task: (repr([*every, *(section.get(name, {}).get(task) for name in HOW)]), values)
        for task, values in section.get("questions", {}).items()
        if task in section.get("stderr", {})
    }


HOW = ("metrics", "shots", "versions")  # what a section says of each task


def _gain(own: Sequence[Answered], theirs: Sequence[Answered], task: str) -> Difference | None:
    """None where the task was not answered, or by one of them otherwise: other questions, shots."""
    if not any(task in each for each in own):
        return None
    told = [each[task] for each in (*own, *theirs) if task in each]
    if len({(how, len(values)) for how, values in told}) > 1:
        return None
    mine, other = (
        100 * np.array([each[task][1] for each in some if task in each]) for some in (own, theirs)
    )
    return _mean(mine - other.mean(0))


@dataclass(frozen=True)
class Match:
    """A row, and of the same modules tuned under the other mask the row that it is held against.

    other: of those whose STS is at least this row's, the nearest; None where none embeds as well.
    STS: the mean of the tasks that the row and all of those have, under each one's own mask. ratio:
    this row's perplexity, times the other's.
    """

    row: str
    sts: float
    other: str | None = None
    other_sts: float | None = None
    ratio: Difference | None = None


def matches(model: str, records: Records, seeds: Sequence[int]) -> list[Match]:
    """Every row of which rows under the other mask were measured, on the same chats."""
    rows = by_row("encoders", model, records, seeds)
    told = {row: own for row, own in rows.items() if own[0].has_learnt and _told(own, "evaluation")}
    found = [_match(row, told) for row in told]
    return [each for each in found if each is not None]


def _match(row: str, told: dict[str, list[Entry]]) -> Match | None:
    """None where there is no other, or no task that all of them have."""
    first = told[row][0]
    others = {
        other: own
        for other, own in told.items()
        if own[0].is_control is not first.is_control
        and (own[0].modules, own[0].layers) == (first.modules, first.layers)
    }
    common = common_tasks([each for own in (told[row], *others.values()) for each in own])
    if not others or not common:
        return None
    sts = {
        name: float(np.mean([each.mean(common) for each in own]))
        for name, own in {row: told[row], **others}.items()
    }
    above = [other for other in others if sts[other] >= sts[row]]
    if not above:
        return Match(row, sts[row])
    nearest = min(above, key=sts.__getitem__)  # not by its perplexity, which is to be compared
    mine, other = (_told(each, "evaluation") for each in (told[row], others[nearest]))
    ratio = _perplexities(mine, other)
    return Match(row, sts[row], nearest, sts[nearest], ratio)


def changed(own: Sequence[Entry], theirs: Sequence[Entry]) -> dict[str, Difference | None]:
    """{column: difference of a row's seeds to another's}, columns as of `changes`."""
    mine, other = (_told(each, "dependence") for each in (own, theirs))
    cells = {column: _mean(_moved(mine, other, name)) for column, name in SINK.items()}
    cells[BY_SINK] = _by_sink(mine, other)
    mine, other = (_told(each, "evaluation") for each in (own, theirs))
    cells["perplexity"] = _perplexities(mine, other)
    cells["by answer"] = _perplexities(mine, other, by_answer=True)
    for name in sorted({name for each in own for name in _further(each)}):
        telling = ([each for each in some if name in _further(each)] for some in (own, theirs))
        mine, other = (_told(each, "evaluation", name) for each in telling)
        cells[f"{FURTHER}{name}"] = _perplexities(mine, other)
    return cells


def by_length(own: Sequence[Entry], theirs: Sequence[Entry]) -> dict[str, Difference | None]:
    """{column: perplexity over theirs of the answers of these lengths}; None where not measured."""
    mine, other = (_told(each, "evaluation") for each in (own, theirs))
    tokens = np.array(mine[0]["tokens"]) if mine else np.array([])
    found = {}
    for low, high in zip((0, *LENGTHS), (*LENGTHS, math.inf), strict=True):
        chosen = (tokens > low) & (tokens <= high)
        if chosen.any():
            said = f"{low + 1} to {high} tokens" if high < math.inf else f"over {low} tokens"
            column = f"perplexity, {chosen.sum()}{BY_LENGTH}{said}"
            found[column] = _perplexities(mine, other, chosen=chosen)
    return found


LENGTHS = (3, 20)  # tokens, end token included: a word or a number; a sentence; and what is longer
BY_LENGTH = " answers of "  # in the name of such a column
FURTHER = (
    "perplexity of "  # and the name of one of evaluation.perplexity; of the seeds that tell it
)


def _further(entry: Entry) -> dict[str, Any]:
    evaluated = entry.measured("evaluation")
    return {} if evaluated is None else _section(evaluated).get("further", {})


# What a record tells of each text, and the data set that they are of.
TOLD = {
    "dependence": ("by_text", "dependence.dataset"),
    "evaluation": ("answers", "ubmoe.dataset"),
}


def _told(entries: Sequence[Entry], kind: str, further: str = "") -> list[dict[str, Any]]:
    """What every seed's record tells of each text, and `of` which texts; [] where one does not.

    further: of which of evaluation.perplexity, in place of the held-out chats.
    """
    name, _ = TOLD[kind]
    records = [record for each in entries for record in each.beside if record.kind == kind]
    found: list[Any] = [_section(record, further).get(name) for record in records]
    if len(records) != len(entries) or not all(found):
        return []
    return [
        each | {"of": texts(record, further), "seed": entry.seed}
        for each, record, entry in zip(found, records, entries, strict=True)
    ]


def texts(record: Record, further: str = "") -> tuple[Any, Any, Any]:
    """Of which texts it is, and in which precision, as far as it says.

    The digest of their file, their lengths, and whether the forward ran under bfloat16 autocast.
    """
    name, dataset = TOLD[record.kind]
    digest = record.data.get("inputs", {}).get("evaluation.perplexity" if further else dataset)
    tokens = _section(record, further).get(name, {}).get("tokens")
    return digest, tokens, record.config.get(record.kind, {}).get("bf16")


def _section(record: Record, further: str = "") -> dict[str, Any]:
    section = record.data["generation"] if record.kind == "evaluation" else record.section
    return section.get("further", {}).get(further, {}) if further else section


def _moved(own: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]], name: str) -> Any:
    """(seeds, texts) of what differs, seed by seed where both have the same, or from the mean.

    None where one has none, or they are of other texts.
    """
    if not own or not theirs or any(each["of"] != own[0]["of"] for each in (*own, *theirs)):
        return None
    mine, other = (np.array([each[name] for each in some]) for some in (own, theirs))
    same = [each["seed"] for each in own] == [each["seed"] for each in theirs]
    return mine - (other if same else other.mean(0))


def _mean(each: np.ndarray | None) -> Difference | None:
    """each: (seeds, texts)."""
    if each is None:
        return None
    moved = each.mean(0)
    seeds = tuple(each.mean(1).tolist())
    return Difference(float(moved.mean()), lambda: interval(means(moved)), seeds)


def _by_sink(own: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> Difference | None:
    """What a text's DP-after changes by for the change of `first` alone, in percentage points.

    A row's DP-after is (1 - first) times its DP-after without that key. So is, but for how the two
    go together over rows and heads, that of a text; the rest of the change is the other factor's,
    and of how they go together.
    """
    first, without = SINK["first"], SINK["after without first"]
    moved, change = _moved(own, theirs, first), _moved(own, theirs, without)
    if moved is None or change is None:
        return None
    return _mean(by_sink(moved, np.array([each[without] for each in own]), change))


def by_sink(first: np.ndarray, without: np.ndarray, change: np.ndarray) -> np.ndarray:
    """What the change of `first` moves: at the middle of `without`, before and after its change."""
    return -first * (without - change / 2) / 100


def _perplexities(
    own: Sequence[dict[str, Any]],
    theirs: Sequence[dict[str, Any]],
    by_answer: bool = False,
    chosen: np.ndarray | None = None,
) -> Difference | None:
    """Of the geometric mean over seeds, times theirs.

    by_answer: every answer counts once, whatever its length; else every token does. chosen: which
    answers alone.
    """
    each = _moved(own, theirs, "losses")
    if each is None:
        return None
    tokens = np.array(own[0]["tokens"])
    if chosen is not None:
        each, tokens = each[:, chosen], tokens[chosen]
    if by_answer:
        each, tokens = each / tokens, np.ones_like(tokens)
    lost, seeds = each.mean(0), np.exp(each.sum(1) / tokens.sum())
    ratio = math.exp(lost.sum() / tokens.sum())
    return Difference(ratio, lambda: interval(np.exp(means(lost, tokens))), tuple(seeds.tolist()))
