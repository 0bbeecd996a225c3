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

from studies.compare.heads import TOWARDS_LATER, head_changes
from studies.compare.paired import (
    BY_LENGTH,
    BY_SINK,
    FURTHER,
    IN_POINTS,
    by_length,
    by_task,
    differences,
)
from studies.compare.records import Records
from studies.compare.rows import (
    MASK,
    RunRow,
    causal_controls,
    common_tasks,
    reference,
    run_rows,
    settings_key,
)
from studies.compare.steps import ratio_ticks
from ubmoe.report.figures import PALETTE, blank, styled

GAP = "STS"
OTHERS = ", other settings "  # and a number, in the name of a further kind
RATIOS = ("perplexity", "per answer")  # columns begin so that are ratios
MIN_PAIRS = 3  # of a kind that is shown
SPEED = ("learning_rate", "warmup_steps")  # of a stage; steps.py compares its steps


@dataclass(frozen=True)
class Pair:
    """Two runs of one seed that differ in the mask alone, bidirectional first; or one and the base.

    cells: {column: the first against the second}, columns as of `paired.changes`,
    `paired.by_length`, `paired.by_task` and `heads.head_changes`, of texts that the base was
    measured on, too; and GAP, of two runs: STS of the first minus that of the second, each under
    its own mask.
    """

    row: str
    cells: dict[str, float]


@dataclass(frozen=True)
class MeanWithCI:
    """A mean over runs, and its 95 % interval by Student's t, which takes them as independent."""

    value: float
    interval: tuple[float, float]
    runs: int

    @classmethod
    def estimate(
        cls, values: Sequence[float], gaps: Sequence[float] | None = None
    ) -> "MeanWithCI | None":
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
    def exp(self) -> "MeanWithCI":
        """The ratio whose logarithm this mean is."""
        low, high = map(math.exp, self.interval)
        return MeanWithCI(math.exp(self.value), (low, high), self.runs)

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
    return _kinds((_kind(run), _pair(run, base, base, [])) for run in tuned if base is not None)


def _measured(
    model: str, records: Records, seeds: Sequence[int]
) -> tuple[RunRow | None, list[RunRow]]:
    """The base, and every run that has learnt."""
    every = run_rows("encoders", model, records, seeds)
    return reference(every), [run for run in every if run.has_learnt]


def _kinds(pairs_with_kind: Iterable[tuple[str, Pair]]) -> dict[str, list[Pair]]:
    """{name of the shortest row: those of one kind}, of which there are MIN_PAIRS."""
    kinds: dict[str, list[Pair]] = {}
    for kind, pair in pairs_with_kind:
        kinds.setdefault(kind, []).append(pair)
    names: dict[str, list[Pair]] = {}
    for pairs in kinds.values():
        _, name = min((len(pair.row), pair.row) for pair in pairs)
        same = sum(name == known.partition(OTHERS)[0] for known in names)
        if len(pairs) >= MIN_PAIRS:
            names[f"{name}{OTHERS}{same}" if same else name] = pairs
    return {name: names[name] for name in sorted(names, key=lambda known: (len(known), known))}


def _pair(one: RunRow, other: RunRow, base: RunRow | None, tasks: Sequence[str]) -> Pair:
    """tasks: of STS, that all have; of none there is no GAP."""
    against = differences([one], [other]) | by_length([one], [other])
    against |= by_task(one, other)
    usable = against
    if base is not None and other is not base:
        usable = differences([one], [base]) | by_task(one, base)
    lengths = usable.get("perplexity")  # whose answers they are of
    cells = {
        column: cell.value
        for column, cell in against.items()
        if cell is not None and (lengths if BY_LENGTH in column else usable.get(column))
    }
    if base is not None:
        start = base.measured("dependence")
        mine, theirs = (head_changes(run.measured("dependence"), start) for run in (one, other))
        cells |= {name: mine[name] - theirs[name] for name in mine if name in theirs}
    gap = {GAP: one.mean(tasks) - other.mean(tasks)} if tasks else {}
    return Pair(one.row, cells | gap)


def _kind(run: RunRow, *left_out: str) -> str:
    """How a run was tuned, but for how fast, and for other keys."""
    return settings_key(run.settings, *left_out, of_stages=SPEED)


def is_ratio(column: str) -> bool:
    return column.startswith(RATIOS) and not column.endswith(IN_POINTS)


def mean_with_ci(
    pairs: Sequence[Pair], column: str, at_equal_sts: bool = False
) -> MeanWithCI | None:
    """The mean over the pairs that have the column; of perplexities the geometric mean, a ratio.

    at_equal_sts: where the line over the pairs' gaps in STS crosses zero.
    """
    if at_equal_sts and column == GAP:
        return None
    needed = {column, GAP} if at_equal_sts else {column}
    rows = [pair.cells for pair in pairs if needed <= pair.cells.keys()]
    values = [math.log(row[column]) if is_ratio(column) else row[column] for row in rows]
    estimate = MeanWithCI.estimate(values, [row[GAP] for row in rows] if at_equal_sts else None)
    return estimate.exp if estimate is not None and is_ratio(column) else estimate


@styled
def figure(model: str, kinds: dict[str, list[Pair]]) -> Figure:
    """A point for each pair's difference, and the mean of each kind of pair with its interval.

    Ratios stand to the left; to the right scores, and below them shares of attention, each with an
    axis of its own.
    """
    every = [pair for pairs in kinds.values() for pair in pairs]
    every_column = list(dict.fromkeys(column for pair in every for column in pair.cells))
    ratios = [column for column in every_column if is_ratio(column)]
    ratios.sort(key=lambda column: column.startswith(FURTHER))
    scores = [column for column in every_column if column == GAP or column.endswith(IN_POINTS)]
    scores.sort(key=lambda column: column != GAP)
    shares = [column for column in OF_ATTENTION if column in every_column]
    left, right = [(ratios, *RATIO_AXIS)], [(scores, *SCORE_AXIS), (shares, *SHARE_AXIS)]
    sides = [[panel for panel in half if panel[0]] for half in (left, right)]
    halves = [half for half in sides if half]
    rows = max(sum(len(columns) for columns, *_ in half) for half in halves)
    drawn = blank(5.2 * len(halves), 1.7 + (0.3 + 0.06 * len(kinds)) * rows)
    grid = drawn.add_gridspec(1, len(halves))
    for place, half in enumerate(halves):
        heights = [len(columns) for columns, *_ in half]
        parts = grid[place].subgridspec(len(half), 1, height_ratios=heights)
        for line, (columns, label, neutral) in enumerate(half):
            _panel(drawn.add_subplot(parts[line]), columns, label, neutral, kinds)
    handles = drawn.axes[0].get_legend_handles_labels()
    drawn.legend(*handles, loc="outside lower center", ncols=len(kinds))
    drawn.suptitle(
        f"{model}: {len(every)} pairs of runs that differ in the mask alone", fontsize=10
    )
    return drawn


def _panel(
    axes: Any, columns: Sequence[str], label: str, neutral: int, kinds: dict[str, list[Pair]]
) -> None:
    for place, column in enumerate(columns):
        _row(axes, place, column, kinds)
    axes.set_yticks(range(len(columns)), [_label(column) for column in columns])
    axes.set_ylim(len(columns) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.axvline(neutral, color="grey", lw=0.6)
    axes.set_xlabel(label)
    if is_ratio(columns[0]):
        axes.set_xscale("log")
        ratio_ticks(axes.xaxis)


RATIO_AXIS = ("tuned bidirectionally over causally\n(left: tuning causally loses more)", 1)
SCORE_AXIS = ("bidirectional minus causal (points)", 0)
SHARE_AXIS = ("bidirectional minus causal\n(percentage points of attention)", 0)
OF_ATTENTION = ("DP-after", BY_SINK, "after without first", TOWARDS_LATER)
LABELS = {
    "perplexity": "perplexity, per token",
    "per answer": "perplexity, each answer once",
    BY_SINK: "DP-after by the sink's fall",
    "after without first": "DP-after without the first key",
    TOWARDS_LATER: "a head's rise of it (falls as 0)",
}


def _label(column: str) -> str:
    if is_ratio(column) and BY_LENGTH in column:
        return column.partition(", ")[2]
    return LABELS.get(column, column.removesuffix(IN_POINTS))


def _row(axes: Any, place: int, column: str, kinds: dict[str, list[Pair]]) -> None:
    for number, (kind, pairs) in enumerate(kinds.items()):
        values = [pair.cells[column] for pair in pairs if column in pair.cells]
        color = PALETTE[number % len(PALETTE)]
        label = kind if place == 0 else None
        height = place + min(0.2, 0.8 / len(kinds)) * (number - (len(kinds) - 1) / 2)
        shape = {"marker": "os^D"[number % 4], "color": color, "label": label}
        axes.plot(values, [height] * len(values), ls="", ms=3.5, alpha=0.55, **shape)
        if (mean := mean_with_ci(pairs, column)) is not None:
            axes.plot(mean.interval, [height, height], scalex=False, color=color, lw=1.4)
            axes.plot(mean.value, height, marker="|", ms=8, mew=2, color=color)
