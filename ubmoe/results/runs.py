"""With the run as the unit: against the base, and in pairs that differ in the mask alone.

Intervals over texts say how surely two models differ. Another seed makes other models, and theirs
differ otherwise: what a mask does is known as surely as runs of it agree.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from scipy.stats import t

from ubmoe.report.figures import PALETTE, blank, styled
from ubmoe.results.entries import Entry, by_row, common_tasks
from ubmoe.results.paired import BY_LENGTH, BY_SINK, FURTHER, by_length, changed, twins
from ubmoe.results.records import Records

GAP = "STS"
RATIOS = ("perplexity", "by answer")  # columns begin so that are ratios
FEWEST = 3  # pairs of a kind that is told
FAR = ("learning_rate", "max_steps", "warmup_steps")  # of a stage: how far tuning goes


@dataclass(frozen=True)
class Pair:
    """Two runs of one seed that differ in the mask alone, both ways first; or a run and the base.

    cells: {column: the first against the second}, columns as of `paired.changes` and
    `paired.by_length`, and GAP: STS of the first minus that of the second, each under its own mask.
    """

    row: str
    cells: dict[str, float]


@dataclass(frozen=True)
class OverRuns:
    """A mean over runs, and its 95 % interval by Student's t."""

    value: float
    interval: tuple[float, float]
    runs: int

    @classmethod
    def of(cls, values: Sequence[float], gaps: Sequence[float] | None = None) -> "OverRuns | None":
        """The mean; with gaps: where the line over them crosses zero. None of too few runs."""
        design = np.ones((len(values), 1))
        if gaps is not None:
            design = np.column_stack([design, gaps])
        freedom = len(values) - design.shape[1]
        if freedom < 2 or np.linalg.matrix_rank(design) < design.shape[1]:
            return None
        inverse = np.linalg.inv(design.T @ design)
        found = inverse @ design.T @ np.array(values)
        error = math.sqrt(inverse[0, 0] * np.sum((values - design @ found) ** 2) / freedom)
        half = float(t.ppf(0.975, freedom)) * error
        value = float(found[0])
        return cls(value, (value - half, value + half), len(values))

    @property
    def exp(self) -> "OverRuns":
        """Of a mean of logs, the ratio."""
        low, high = map(math.exp, self.interval)
        return OverRuns(math.exp(self.value), (low, high), self.runs)

    def __str__(self) -> str:
        return "{:.2f} ({:.2f} to {:.2f})".format(self.value, *self.interval)


def pairs(model: str, records: Records, seeds: Sequence[int]) -> dict[str, list[Pair]]:
    """The pairs that differ in their seed and in how far they went alone, by the shortest row."""
    found = twins(model, records, seeds)
    every = [each for own in found.values() for each in (*own.both, *own.causal)]
    if not (common := common_tasks(every)):
        return {}
    return _kinds(
        (_but_for_how_far(both, {"attention": None}), _pair(row, both, causal, common))
        for row, own in found.items()
        for both, causal in zip(own.both, own.causal, strict=True)
    )


def changes(model: str, records: Records, seeds: Sequence[int]) -> dict[str, list[Pair]]:
    """Every run against the base, of the kinds of `pairs` and of either mask."""
    rows = by_row("encoders", model, records, seeds)
    base = rows.get("base", [])[:1]
    tuned = [(row, each) for row, own in rows.items() for each in own if each.has_learnt]
    common = common_tasks([each for _, each in tuned] + base)
    return _kinds(
        (_but_for_how_far(each), _pair(row, each, base[0], common))
        for row, each in tuned
        if base and common
    )


def _kinds(found: Iterable[tuple[str, Pair]]) -> dict[str, list[Pair]]:
    """{name of the shortest row: those of one kind}, of which there are FEWEST."""
    kinds: dict[str, list[Pair]] = {}
    for kind, each in found:
        kinds.setdefault(kind, []).append(each)
    names: dict[str, list[Pair]] = {}
    for own in kinds.values():
        _, name = min((len(each.row), each.row) for each in own)
        if len(own) >= FEWEST:
            names[f"{name}, other settings" if name in names else name] = own
    return {name: names[name] for name in sorted(names, key=lambda each: (len(each), each))}


def _pair(row: str, one: Entry, other: Entry, tasks: Sequence[str]) -> Pair:
    every = changed([one], [other]) | by_length([one], [other])
    cells = {column: cell.value for column, cell in every.items() if cell is not None}
    return Pair(row, cells | {GAP: one.mean(tasks) - other.mean(tasks)})


def _but_for_how_far(entry: Entry, others: Mapping[str, Any] = MappingProxyType({})) -> str:
    """How a run was tuned, without how far that went; others: keys that do not matter, either."""
    settings: dict[str, Any] = entry.record.config["bi"]
    stages = [
        {name: value for name, value in stage.items() if name not in FAR}
        for stage in settings.get("stages", [])
    ]
    return json.dumps(settings | dict(others) | {"stages": stages}, sort_keys=True)


def masks(own: Sequence[Pair], column: str, at_equal_sts: bool = False) -> OverRuns | None:
    """What the pairs differ in, over those of which it was measured; perplexities as a ratio.

    at_equal_sts: where the line over the pairs' gaps in STS crosses zero.
    """
    if at_equal_sts and column == GAP:
        return None
    told = [each for each in own if column in each.cells]
    is_ratio = column.startswith(RATIOS)
    values = [math.log(each.cells[column]) if is_ratio else each.cells[column] for each in told]
    found = OverRuns.of(values, [each.cells[GAP] for each in told] if at_equal_sts else None)
    return found.exp if found is not None and is_ratio else found


@styled
def figure(model: str, kinds: dict[str, list[Pair]]) -> Figure:
    """What the pairs differ in: a point a pair, and their means over all kinds, with intervals."""
    every = [each for own in kinds.values() for each in own]
    told = list(dict.fromkeys(column for each in every for column in each.cells))
    ratios = [each for each in told if each.startswith(RATIOS)]
    ratios.sort(key=lambda each: each.startswith(FURTHER))
    points = [each for each in POINTS if each in told]
    found = blank(10.4, 1.4 + 0.42 * max(len(ratios), len(points)))
    panels = found.subplots(1, 2, width_ratios=(1.3, 1))
    for axes, columns in zip(panels, (ratios, points), strict=True):
        for place, column in enumerate(columns):
            _row(axes, place, column, kinds, every)
        axes.set_yticks(range(len(columns)), [_called(each) for each in columns])
        axes.set_ylim(len(columns) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
    panels[0].set_xscale("log")
    panels[0].xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    panels[0].xaxis.set_major_formatter("{x:g}")
    panels[0].xaxis.set_minor_locator(NullLocator())
    panels[0].axvline(1, color="grey", lw=0.6)
    panels[1].axvline(0, color="grey", lw=0.6)
    panels[0].set_xlabel("tuned both ways over causally\n(left: tuning causally loses more)")
    panels[1].set_xlabel("both ways minus causally (points)")
    panels[1].legend(*panels[0].get_legend_handles_labels(), loc="best")
    found.suptitle(
        f"{model}: {len(every)} pairs of runs that differ in the mask alone", fontsize=10
    )
    return found


POINTS = (GAP, "DP-after", BY_SINK, "after without first")
CALLED = {
    "perplexity": "perplexity, by the token",
    "by answer": "perplexity, each answer once",
    BY_SINK: "DP-after by the sink's fall",
    "after without first": "DP-after without the first key",
}


def _called(column: str) -> str:
    if BY_LENGTH in column:
        return column.partition(", ")[2]
    return column if column.startswith(FURTHER) else CALLED.get(column, column)


def _row(
    axes: Any, place: int, column: str, kinds: dict[str, list[Pair]], every: list[Pair]
) -> None:
    for number, (kind, own) in enumerate(kinds.items()):
        values = [each.cells[column] for each in own if column in each.cells]
        style = {"marker": "os^D"[number % 4], "color": PALETTE[number % len(PALETTE)]}
        label = kind if place == 0 else None
        height = place + 0.22 * (number - (len(kinds) - 1) / 2)
        axes.plot(values, [height] * len(values), ls="", ms=4, alpha=0.7, label=label, **style)
    if (mean := masks(every, column)) is not None:
        axes.plot(mean.interval, [place, place], color="black", lw=1.4)
        axes.plot(mean.value, place, marker="|", ms=9, mew=1.8, color="black")
