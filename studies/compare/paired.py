"""Rows compared text by text: with the base, with their causal controls, and at equal STS.

Texts differ far more than models do, so that a difference of two means over the same texts is
known far better than either mean.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from studies.compare.records import Records
from studies.compare.rows import (
    SINK,
    RunRow,
    by_row,
    causal_controls,
    common_tasks,
    reference,
    run_rows,
)
from ubmoe.bootstrap import interval, means
from ubmoe.results.records import Record

BY_SINK = "DP-after by the sink"
IN_POINTS = ", in points"  # of a task's column
Answers = dict[str, tuple[str, list[float]]]  # by task: how it was asked, a value a question


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
    `perplexity` times the base's, and `per answer` the same where every answer counts once. None
    where it was not measured, or of other texts.
    """
    rows = by_row("encoders", model, records, seeds)
    start = reference([run for runs in rows.values() for run in runs])
    base = [start] if start is not None else []
    changed = {row: differences(runs, base) for row, runs in rows.items() if not runs[0].is_base}
    return {row: cells for row, cells in changed.items() if any(cells.values())}


@dataclass(frozen=True)
class AgainstControl:
    """A row tuned bidirectionally and its causal control, of the seeds that both have.

    cells: {column: difference of the first to the second}, columns as of `changes`.
    """

    both: list[RunRow]
    causal: list[RunRow]
    cells: dict[str, Difference | None]


def against_controls(
    model: str, records: Records, seeds: Sequence[int]
) -> dict[str, AgainstControl]:
    """{row: its seeds and their causal controls}, which differ in the mask alone."""
    every = [run for run in run_rows("encoders", model, records, seeds) if run.has_learnt]
    compared: dict[str, AgainstControl] = {}
    pairs: dict[str, list[tuple[RunRow, RunRow]]] = {}
    for pair in causal_controls(every):
        pairs.setdefault(pair[0].row, []).append(pair)
    for row, of_row in pairs.items():
        of_row.sort(key=lambda pair: pair[0].seed or 0)
        both, causal = map(list, zip(*of_row, strict=True))
        compared[row] = AgainstControl(both, causal, differences(both, causal))
    return {row: pair for row, pair in compared.items() if any(pair.cells.values())}


def questions(
    kind: str, model: str, records: Records, seeds: Sequence[int]
) -> tuple[str, dict[str, dict[str, Difference | None]]]:
    """A row, and {each other row: {task: difference to it}}, in points, over the same questions.

    kind: of rows: `causal_lm`, against the base, or `bitune`, against its second causal set. Of
    the seeds that answered a task, the mean; None where nobody did.
    """
    rows = by_row(kind, model, records, seeds)
    every = [run for runs in rows.values() for run in runs]
    start = reference(every) if kind == "causal_lm" else next(filter(_is_only_causal, every), None)
    if start is None:
        return "", {}
    answered = {row: [_answers(run.record) for run in runs] for row, runs in rows.items()}
    theirs = answered.pop(start.row)
    tasks = list(dict.fromkeys(name for answers in theirs for name in answers))
    gains = {
        row: {name: _gain(ours, theirs, name) for name in tasks} for row, ours in answered.items()
    }
    return start.row, {row: cells for row, cells in gains.items() if any(cells.values())}


def _is_only_causal(run: RunRow) -> bool:
    return run.record.section["variant"] == "only_causal"


def by_task(one: RunRow, other: RunRow) -> dict[str, Difference | None]:
    """{task and IN_POINTS: difference over the same questions}, of two encoders or bases."""
    measured = [run.measured("evaluation") for run in (one, other)]
    mine, theirs = ({} if run is None else _answers(run) for run in measured)
    shared = [task for task in mine if task in theirs]
    return {f"{task}{IN_POINTS}": _gain([mine], [theirs], task) for task in shared}


def _answers(record: Record) -> Answers:
    """Its value for each question, of tasks whose values are shares; older records have none."""
    section = _section(record)
    every = [section.get(name) for name in ("limit", "apply_chat_template")]
    return {
        task: (repr([*every, *(section.get(name, {}).get(task) for name in TASK_SETTINGS)]), values)
        for task, values in section.get("questions", {}).items()
        if task in section.get("stderr", {})
    }


TASK_SETTINGS = ("metrics", "shots", "versions")  # what a section says of each task


def _gain(ours: Sequence[Answers], theirs: Sequence[Answers], task: str) -> Difference | None:
    """None where the task was not answered, or by one of them otherwise: other questions, shots."""
    if not any(task in answers for answers in ours):
        return None
    answered = [answers[task] for answers in (*ours, *theirs) if task in answers]
    if len({(how, len(values)) for how, values in answered}) > 1:
        return None
    mine, other = (
        100 * np.array([answers[task][1] for answers in some if task in answers])
        for some in (ours, theirs)
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
    measured = {
        row: runs
        for row, runs in rows.items()
        if runs[0].has_learnt and _by_text(runs, "evaluation")
    }
    matched = [_match(row, measured) for row in measured]
    return [match for match in matched if match is not None]


def _match(row: str, measured: dict[str, list[RunRow]]) -> Match | None:
    """None where there is no other, or no task that all of them have."""
    first = measured[row][0]
    others = {
        other: runs
        for other, runs in measured.items()
        if runs[0].is_control is not first.is_control
        and (runs[0].modules, runs[0].layers) == (first.modules, first.layers)
    }
    common = common_tasks([run for runs in (measured[row], *others.values()) for run in runs])
    if not others or not common:
        return None
    sts = {
        name: float(np.mean([run.mean(common) for run in runs]))
        for name, runs in {row: measured[row], **others}.items()
    }
    above = [other for other in others if sts[other] >= sts[row]]
    if not above:
        return Match(row, sts[row])
    nearest = min(above, key=sts.__getitem__)  # not by its perplexity, which is to be compared
    mine, other = (_by_text(side, "evaluation") for side in (measured[row], others[nearest]))
    ratio = _perplexities(mine, other)
    return Match(row, sts[row], nearest, sts[nearest], ratio)


def differences(ours: Sequence[RunRow], theirs: Sequence[RunRow]) -> dict[str, Difference | None]:
    """{column: difference of a row's seeds to another's}, columns as of `changes`."""
    mine, other = (_by_text(side, "dependence") for side in (ours, theirs))
    cells = {column: _mean(_moved(mine, other, name)) for column, name in SINK.items()}
    cells[BY_SINK] = _by_sink(mine, other)
    mine, other = (_by_text(side, "evaluation") for side in (ours, theirs))
    cells["perplexity"] = _perplexities(mine, other)
    cells["per answer"] = _perplexities(mine, other, per_answer=True)
    for name in sorted({name for run in ours for name in _further(run)}):
        having_it = ([run for run in some if name in _further(run)] for some in (ours, theirs))
        mine, other = (_by_text(side, "evaluation", name) for side in having_it)
        cells[f"{FURTHER}{name}"] = _perplexities(mine, other)
    return cells


def by_length(ours: Sequence[RunRow], theirs: Sequence[RunRow]) -> dict[str, Difference | None]:
    """{column: perplexity over theirs of the answers of these lengths}; None where not measured."""
    mine, other = (_by_text(side, "evaluation") for side in (ours, theirs))
    tokens = np.array(mine[0]["tokens"]) if mine else np.array([])
    ratios = {}
    for low, high in zip((0, *LENGTHS), (*LENGTHS, math.inf), strict=True):
        chosen = (tokens > low) & (tokens <= high)
        if chosen.any():
            said = f"{low + 1} to {high} tokens" if high < math.inf else f"over {low} tokens"
            column = f"perplexity, {chosen.sum()}{BY_LENGTH}{said}"
            ratios[column] = _perplexities(mine, other, chosen=chosen)
    return ratios


LENGTHS = (3, 20)  # tokens, end token included: a word or a number; a sentence; and what is longer
BY_LENGTH = " answers of "  # in the name of such a column
FURTHER = (
    "perplexity of "  # and the name of one of evaluation.perplexity; of the seeds that have it
)


def _further(run: RunRow) -> dict[str, Any]:
    evaluated = run.measured("evaluation")
    return {} if evaluated is None else _section(evaluated).get("further", {})


# Where a record has numbers by text, and the data set that holds the texts.
BY_TEXT = {
    "dependence": ("by_text", "dependence.dataset"),
    "evaluation": ("answers", "ubmoe.dataset"),
}


def _by_text(runs: Sequence[RunRow], kind: str, further: str = "") -> list[dict[str, Any]]:
    """Every seed's numbers by text, and `of` which texts; [] where a record has none.

    further: of which of evaluation.perplexity, in place of the held-out chats.
    """
    name, _ = BY_TEXT[kind]
    records = [record for run in runs for record in run.beside if record.kind == kind]
    by_text: list[Any] = [_section(record, further).get(name) for record in records]
    if len(records) != len(runs) or not all(by_text):
        return []
    return [
        values | {"of": texts(record, further), "seed": run.seed}
        for values, record, run in zip(by_text, records, runs, strict=True)
    ]


def texts(record: Record, further: str = "") -> tuple[Any, Any, Any]:
    """The texts that were measured, and the precision, as far as the record says.

    The digest of their file, their lengths, and whether the forward ran under bfloat16 autocast.
    """
    name, dataset = BY_TEXT[record.kind]
    digest = record.data.get("inputs", {}).get("evaluation.perplexity" if further else dataset)
    tokens = _section(record, further).get(name, {}).get("tokens")
    return digest, tokens, record.config.get(record.kind, {}).get("bf16")


def _section(record: Record, further: str = "") -> dict[str, Any]:
    section = record.data["generation"] if record.kind == "evaluation" else record.section
    return section.get("further", {}).get(further, {}) if further else section


def _moved(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]], name: str) -> Any:
    """(seeds, texts) of what differs, seed by seed where both have the same, or from the mean.

    None where one has none, or they are of other texts.
    """
    if not ours or not theirs or any(row["of"] != ours[0]["of"] for row in (*ours, *theirs)):
        return None
    mine, other = (np.array([row[name] for row in some]) for some in (ours, theirs))
    same = [run["seed"] for run in ours] == [run["seed"] for run in theirs]
    return mine - (other if same else other.mean(0))


def _mean(values: np.ndarray | None) -> Difference | None:
    """each: (seeds, texts)."""
    if values is None:
        return None
    moved = values.mean(0)
    seeds = tuple(values.mean(1).tolist())
    return Difference(float(moved.mean()), lambda: interval(means(moved)), seeds)


def _by_sink(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> Difference | None:
    """The change of a text's DP-after due to the change of `first` alone, in percentage points.

    A row's DP-after is (1 - first) times its DP-after without that key. So is
    a text's, but for the two factors' covariance over rows and heads; the rest of the change is due
    to the other factor and that covariance.
    """
    first, without = SINK["first"], SINK["after without first"]
    moved, change = _moved(ours, theirs, first), _moved(ours, theirs, without)
    if moved is None or change is None:
        return None
    return _mean(by_sink(moved, np.array([row[without] for row in ours]), change))


def by_sink(first: np.ndarray, without: np.ndarray, change: np.ndarray) -> np.ndarray:
    """The change due to `first` alone, with `without` halfway through its own change."""
    return -first * (without - change / 2) / 100


def _perplexities(
    ours: Sequence[dict[str, Any]],
    theirs: Sequence[dict[str, Any]],
    per_answer: bool = False,
    chosen: np.ndarray | None = None,
) -> Difference | None:
    """The ratio to theirs, a geometric mean over seeds.

    per_answer: every answer counts once, whatever its length; else every token does. chosen: which
    answers alone.
    """
    lost_by_text = _moved(ours, theirs, "losses")
    if lost_by_text is None:
        return None
    tokens = np.array(ours[0]["tokens"])
    if chosen is not None:
        lost_by_text, tokens = lost_by_text[:, chosen], tokens[chosen]
    if per_answer:
        lost_by_text, tokens = lost_by_text / tokens, np.ones_like(tokens)
    lost, seeds = lost_by_text.mean(0), np.exp(lost_by_text.sum(1) / tokens.sum())
    ratio = math.exp(lost.sum() / tokens.sum())
    return Difference(ratio, lambda: interval(np.exp(means(lost, tokens))), tuple(seeds.tolist()))
