"""With the run as the unit: against the base, and in pairs that differ in the mask alone.

Intervals over texts say how surely two models differ. Another seed makes other models, and theirs
differ otherwise: what a mask does is known as surely as runs of it agree.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import linregress, t, ttest_1samp

from studies.compare.entries import (
    MASK,
    Entry,
    but,
    causal_controls,
    common_tasks,
    entries,
    reference,
)
from studies.compare.heads import AHEAD, turned
from studies.compare.paired import (
    ASKED,
    BY_LENGTH,
    BY_SINK,
    FURTHER,
    by_length,
    by_task,
    changed,
)
from ubmoe.report.figures import PALETTE, blank, of_ratios, styled
from ubmoe.results.records import Records

GAP = "STS"
OTHERS = ", other settings "  # and a number, in the name of a further kind
RATIOS = ("perplexity", "by answer")  # columns begin so that are ratios
FEWEST = 3  # pairs of a kind that is told
FAST = ("learning_rate", "warmup_steps")  # of a stage; its steps are told by steps.py


@dataclass(frozen=True)
class Pair:
    """Two runs of one seed that differ in the mask alone, both ways first; or a run and the base.

    cells: {column: the first against the second}, columns as of `paired.changes`,
    `paired.by_length`, `paired.by_task` and `heads.turned`, of texts that the base was measured on,
    too; and GAP, of two runs: STS of the first minus that of the second, each under its own mask.
    """

    row: str
    cells: dict[str, float]


@dataclass(frozen=True)
class OverRuns:
    """A mean over runs, and its 95 % interval by Student's t, which takes them as independent."""

    value: float
    interval: tuple[float, float]
    runs: int

    @classmethod
    def of(cls, values: Sequence[float], gaps: Sequence[float] | None = None) -> "OverRuns | None":
        """The mean; with gaps: where the line over them crosses zero, if they lie on both sides.

        None of too few runs. The line takes the gaps as free of error.
        """
        if gaps is None:
            if len(values) < 3:
                return None
            with warnings.catch_warnings(action="ignore"):  # of values that are all the same
                low, high = ttest_1samp(values, 0).confidence_interval()
            return cls(float(np.mean(values)), (float(low), float(high)), len(values))
        if len(values) < 4 or not min(gaps) < 0 < max(gaps):
            return None
        line = linregress(gaps, values)
        half = float(t.ppf(0.975, len(values) - 2) * line.intercept_stderr)
        value = float(line.intercept)
        return cls(value, (value - half, value + half), len(values))

    @property
    def exp(self) -> "OverRuns":
        """Of a mean of logs, the ratio."""
        low, high = map(math.exp, self.interval)
        return OverRuns(math.exp(self.value), (low, high), self.runs)

    def __str__(self) -> str:
        return "{:.2f} ({:.2f} to {:.2f})".format(self.value, *self.interval)


def pairs(model: str, records: Records, seeds: Sequence[int]) -> dict[str, list[Pair]]:
    """The pairs that differ in their seed and in how fast they went alone, by the shortest row.

    Of runs that have learnt: where one of two has collapsed, there is no pair.
    """
    base, tuned = _measured(model, records, seeds)
    tasks = common_tasks(tuned)
    return _kinds(
        (_kind(both, MASK), _pair(both, control, base, tasks))
        for both, control in causal_controls(tuned)
    )


def changes(model: str, records: Records, seeds: Sequence[int]) -> dict[str, list[Pair]]:
    """Every run that has learnt, against the base: of the kinds of `pairs`, and of either mask."""
    base, tuned = _measured(model, records, seeds)
    return _kinds((_kind(each), _pair(each, base, base, [])) for each in tuned if base is not None)


def _measured(
    model: str, records: Records, seeds: Sequence[int]
) -> tuple[Entry | None, list[Entry]]:
    """The base, and every run that has learnt."""
    every = entries("encoders", model, records, seeds)
    return reference(every), [each for each in every if each.has_learnt]


def _kinds(found: Iterable[tuple[str, Pair]]) -> dict[str, list[Pair]]:
    """{name of the shortest row: those of one kind}, of which there are FEWEST."""
    kinds: dict[str, list[Pair]] = {}
    for kind, each in found:
        kinds.setdefault(kind, []).append(each)
    names: dict[str, list[Pair]] = {}
    for own in kinds.values():
        _, name = min((len(each.row), each.row) for each in own)
        same = sum(name == each.partition(OTHERS)[0] for each in names)
        if len(own) >= FEWEST:
            names[f"{name}{OTHERS}{same}" if same else name] = own
    return {name: names[name] for name in sorted(names, key=lambda each: (len(each), each))}


def _pair(one: Entry, other: Entry, base: Entry | None, tasks: Sequence[str]) -> Pair:
    """tasks: of STS, that all have; of none there is no GAP."""
    against = changed([one], [other]) | by_length([one], [other])
    against |= by_task(one, other)
    usable = against
    if base is not None and other is not base:
        usable = changed([one], [base]) | by_task(one, base)
    lengths = usable.get("perplexity")  # whose answers they are of
    cells = {
        column: cell.value
        for column, cell in against.items()
        if cell is not None and (lengths if BY_LENGTH in column else usable.get(column))
    }
    if base is not None:
        start = base.measured("dependence")
        mine, theirs = (turned(each.measured("dependence"), start) for each in (one, other))
        cells |= {name: mine[name] - theirs[name] for name in mine if name in theirs}
    gap = {GAP: one.mean(tasks) - other.mean(tasks)} if tasks else {}
    return Pair(one.row, cells | gap)


def _kind(entry: Entry, *left_out: str) -> str:
    """How a run was tuned, but for how fast, and for other keys."""
    return but(entry.settings, *left_out, of_stages=FAST)


def is_ratio(column: str) -> bool:
    return column.startswith(RATIOS) and not column.endswith(ASKED)


def over_runs(own: Sequence[Pair], column: str, at_equal_sts: bool = False) -> OverRuns | None:
    """The mean of a column over those that tell it; of perplexities the geometric one, a ratio.

    at_equal_sts: where the line over the pairs' gaps in STS crosses zero.
    """
    if at_equal_sts and column == GAP:
        return None
    needed = {column, GAP} if at_equal_sts else {column}
    told = [each.cells for each in own if needed <= each.cells.keys()]
    values = [math.log(each[column]) if is_ratio(column) else each[column] for each in told]
    found = OverRuns.of(values, [each[GAP] for each in told] if at_equal_sts else None)
    return found.exp if found is not None and is_ratio(column) else found


@styled
def figure(model: str, kinds: dict[str, list[Pair]]) -> Figure:
    """What the pairs differ in: a point a pair, and the mean of each kind with its interval.

    Ratios stand to the left; to the right scores, and below them shares of attention, each with an
    axis of its own.
    """
    every = [each for own in kinds.values() for each in own]
    told = list(dict.fromkeys(column for each in every for column in each.cells))
    ratios = [each for each in told if is_ratio(each)]
    ratios.sort(key=lambda each: each.startswith(FURTHER))
    scores = [each for each in told if each == GAP or each.endswith(ASKED)]
    scores.sort(key=lambda each: each != GAP)
    shares = [each for each in OF_ATTENTION if each in told]
    left, right = [(ratios, *RATIO_AXIS)], [(scores, *SCORE_AXIS), (shares, *SHARE_AXIS)]
    sides = [[each for each in half if each[0]] for half in (left, right)]
    halves = [half for half in sides if half]
    rows = max(sum(len(columns) for columns, *_ in half) for half in halves)
    found = blank(5.2 * len(halves), 1.7 + (0.3 + 0.06 * len(kinds)) * rows)
    grid = found.add_gridspec(1, len(halves))
    for place, half in enumerate(halves):
        heights = [len(columns) for columns, *_ in half]
        parts = grid[place].subgridspec(len(half), 1, height_ratios=heights)
        for line, (columns, label, neutral) in enumerate(half):
            _panel(found.add_subplot(parts[line]), columns, label, neutral, kinds)
    handles = found.axes[0].get_legend_handles_labels()
    found.legend(*handles, loc="outside lower center", ncols=len(kinds))
    found.suptitle(
        f"{model}: {len(every)} pairs of runs that differ in the mask alone", fontsize=10
    )
    return found


def _panel(
    axes: Any, columns: Sequence[str], label: str, neutral: int, kinds: dict[str, list[Pair]]
) -> None:
    for place, column in enumerate(columns):
        _row(axes, place, column, kinds)
    axes.set_yticks(range(len(columns)), [_called(each) for each in columns])
    axes.set_ylim(len(columns) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.axvline(neutral, color="grey", lw=0.6)
    axes.set_xlabel(label)
    if is_ratio(columns[0]):
        axes.set_xscale("log")
        of_ratios(axes.xaxis)


RATIO_AXIS = ("tuned both ways over causally\n(left: tuning causally loses more)", 1)
SCORE_AXIS = ("both ways minus causally (points)", 0)
SHARE_AXIS = ("both ways minus causally\n(percentage points of attention)", 0)
OF_ATTENTION = ("DP-after", BY_SINK, "after without first", AHEAD)
CALLED = {
    "perplexity": "perplexity, by the token",
    "by answer": "perplexity, each answer once",
    BY_SINK: "DP-after by the sink's fall",
    "after without first": "DP-after without the first key",
    AHEAD: "a head's rise of it (falls as 0)",
}


def _called(column: str) -> str:
    if is_ratio(column) and BY_LENGTH in column:
        return column.partition(", ")[2]
    return CALLED.get(column, column.removesuffix(ASKED))


def _row(axes: Any, place: int, column: str, kinds: dict[str, list[Pair]]) -> None:
    for number, (kind, own) in enumerate(kinds.items()):
        values = [each.cells[column] for each in own if column in each.cells]
        color = PALETTE[number % len(PALETTE)]
        label = kind if place == 0 else None
        height = place + min(0.2, 0.8 / len(kinds)) * (number - (len(kinds) - 1) / 2)
        shape = {"marker": "os^D"[number % 4], "color": color, "label": label}
        axes.plot(values, [height] * len(values), ls="", ms=3.5, alpha=0.55, **shape)
        if (mean := over_runs(own, column)) is not None:
            axes.plot(mean.interval, [height, height], scalex=False, color=color, lw=1.4)
            axes.plot(mean.value, height, marker="|", ms=8, mew=2, color=color)
