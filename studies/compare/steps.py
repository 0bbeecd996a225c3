"""The effect of longer tuning: rows that differ in their number of steps alone."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from studies.compare.paired import differences
from studies.compare.records import Records
from studies.compare.rows import MASK, RunRow, common_tasks, reference, run_rows, settings_key
from ubmoe.report.figures import PALETTE, blank, styled

Metrics = dict[str, float]
STEPS = "max_steps"  # of a stage
# Panels by metric; the ratio's axis is logarithmic.
RATIO = "perplexity"
PANELS = {
    "STS": "STS under its own mask",
    RATIO: "perplexity over the base's",
    "DP-after": "DP-after minus the base's (points)",
    "first": "first token's share\nminus the base's (points)",
}


@dataclass(frozen=True)
class BySteps:
    """metrics: {steps: those of its runs}. run: the row whose causal control it is, if any."""

    metrics: dict[int, list[Metrics]]
    is_control: bool = False
    run: str | None = None


def by_steps(model: str, records: Records, seeds: Sequence[int]) -> dict[str, BySteps]:
    """The rows that were run with at least two numbers of steps.

    A row goes by the shortest name of those that differ in their steps alone. At 0 steps stands
    the untrained model that reads alike. STS is the mean of the tasks that all have.
    """
    every = run_rows("encoders", model, records, seeds)
    base = reference(every)
    if base is None:
        return {}
    same: dict[str, list[RunRow]] = {}
    for tuned in every:
        if tuned.has_learnt and _steps(tuned):
            key = settings_key(tuned.settings, of_stages=(STEPS,))
            same.setdefault(key, []).append(tuned)
    long = [group for group in same.values() if len({_steps(run) for run in group}) > 1]
    untrained = {_mask(run): run for run in every if run.is_base}
    runs = {_settings(group[0]): group for group in long if not group[0].is_control}
    tasks = common_tasks([run for group in (*long, untrained.values()) for run in group])
    rows = {}
    for group in long:
        metrics: dict[int, list[Metrics]] = {}
        if start := untrained.get(_mask(group[0])):
            metrics[0] = [_metrics(start, base, tasks)]
        for tuned in sorted(group, key=_steps):
            metrics.setdefault(_steps(tuned), []).append(_metrics(tuned, base, tasks))
        run = runs.get(_settings(group[0]))
        control_of = _name(run) if run and group[0].is_control else None
        rows[_name(group)] = BySteps(metrics, group[0].is_control, control_of)
    return rows


def _name(runs: Sequence[RunRow]) -> str:
    return min((run.row for run in runs), key=lambda row: (len(row), row))


def _settings(run: RunRow) -> str:
    """But for the mask and the steps."""
    return settings_key(run.settings, MASK, of_stages=(STEPS,))


def _mask(run: RunRow) -> str:
    return json.dumps([run.is_control, run.layers])


def _steps(run: RunRow) -> int:
    """0 where they are not said: of a stage that goes by epochs."""
    said = [stage.get(STEPS, -1) for stage in run.settings["stages"]]
    return sum(said) if min(said) > 0 else 0


def _metrics(run: RunRow, base: RunRow, tasks: Sequence[str]) -> Metrics:
    """What was measured of the run, on the texts that the base was measured on."""
    cells = differences([run], [base])
    metrics = {
        name: cell.value for name, cell in cells.items() if cell is not None and name in PANELS
    }
    return metrics | ({"STS": run.mean(tasks)} if tasks else {})


@styled
def figure(model: str, rows: dict[str, BySteps]) -> Figure:
    """By the number of steps: a point a run, and lines through the means; dashed: causally."""
    places = {
        steps: place
        for place, steps in enumerate(sorted({s for row in rows.values() for s in row.metrics}))
    }
    names = list(dict.fromkeys(by_steps.run or row for row, by_steps in rows.items()))
    drawn = blank(10.4, 6.4)
    panels = list(drawn.subplots(2, 2, sharex=True).flat)
    for axes, (what, label) in zip(panels, PANELS.items(), strict=True):
        for row, by_steps in rows.items():
            color = PALETTE[names.index(by_steps.run or row) % len(PALETTE)]
            style = {"color": color, "label": row, "ls": "--" if by_steps.is_control else "-"}
            _line(
                axes,
                {places[steps]: metrics for steps, metrics in by_steps.metrics.items()},
                what,
                style,
            )
        axes.set_ylabel(label)
        axes.set_xticks([*places.values()], [str(steps) for steps in places])
        if what == RATIO:
            axes.set_yscale("log")
            ratio_ticks(axes.yaxis)
    for axes in panels[2:]:
        axes.set_xlabel("steps (0: untrained, reading alike)")
    drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    drawn.suptitle(model, fontsize=10)
    return drawn


def _line(axes: Any, metrics: dict[int, list[Metrics]], what: str, style: dict[str, str]) -> None:
    values_at = {
        place: [run[what] for run in runs if what in run] for place, runs in metrics.items()
    }
    values_at = {place: values for place, values in values_at.items() if values}
    hollow = {"mfc": "white"} if style["ls"] == "--" else {}
    for place, values in values_at.items():
        axes.plot(
            [place] * len(values), values, ls="", marker="o", ms=4, color=style["color"], **hollow
        )
    middle = [
        float(np.exp(np.mean(np.log(values))) if what == RATIO else np.mean(values))
        for values in values_at.values()
    ]
    axes.plot([*values_at], middle, lw=1.3, **style)


def ratio_ticks(axis: Any) -> None:
    """Ticks of a logarithmic axis at 1, 3, 10 and so on, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())
