"""What longer tuning does: rows that differ in their number of steps alone, under either mask."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from studies.compare.entries import MASK, Entry, but, common_tasks, entries, reference
from studies.compare.paired import changed
from ubmoe.report.figures import PALETTE, blank, of_ratios, styled
from ubmoe.results.records import Records

Told = dict[str, float]
STEPS = "max_steps"  # of a stage
# Panels by what is told in them; the ratio's is of logs.
RATIO = "perplexity"
PANELS = {
    "STS": "STS under its own mask",
    RATIO: "perplexity over the base's",
    "DP-after": "DP-after minus the base's (points)",
    "first": "first token's share\nminus the base's (points)",
}


@dataclass(frozen=True)
class Longer:
    """told: {steps: what its runs tell}. run: the row that it is the causal control of, if any."""

    told: dict[int, list[Told]]
    is_control: bool = False
    run: str | None = None


def along(model: str, records: Records, seeds: Sequence[int]) -> dict[str, Longer]:
    """Of rows of which two numbers of steps were run at least.

    A row goes by the shortest name of those that differ in their steps alone. At 0 steps stands
    the untrained model that reads alike. STS is the mean of the tasks that all have.
    """
    every = entries("encoders", model, records, seeds)
    base = reference(every)
    if base is None:
        return {}
    same: dict[str, list[Entry]] = {}
    for each in every:
        if each.has_learnt and _steps(each):
            key = but(each.settings, of_stages=(STEPS,))
            same.setdefault(key, []).append(each)
    long = [own for own in same.values() if len({_steps(each) for each in own}) > 1]
    untrained = {_mask(each): each for each in every if each.is_base}
    runs = {_settings(own[0]): own for own in long if not own[0].is_control}
    tasks = common_tasks([each for own in (*long, untrained.values()) for each in own])
    found = {}
    for own in long:
        told: dict[int, list[Told]] = {}
        if start := untrained.get(_mask(own[0])):
            told[0] = [_told(start, base, tasks)]
        for each in sorted(own, key=_steps):
            told.setdefault(_steps(each), []).append(_told(each, base, tasks))
        run = runs.get(_settings(own[0]))
        control_of = _name(run) if run and own[0].is_control else None
        found[_name(own)] = Longer(told, own[0].is_control, control_of)
    return found


def _name(own: Sequence[Entry]) -> str:
    return min((each.row for each in own), key=lambda row: (len(row), row))


def _settings(entry: Entry) -> str:
    """But for the mask and the steps."""
    return but(entry.settings, MASK, of_stages=(STEPS,))


def _mask(entry: Entry) -> str:
    return json.dumps([entry.is_control, entry.layers])


def _steps(entry: Entry) -> int:
    """0 where they are not said: of a stage that goes by epochs."""
    said = [stage.get(STEPS, -1) for stage in entry.settings["stages"]]
    return sum(said) if min(said) > 0 else 0


def _told(entry: Entry, base: Entry, tasks: Sequence[str]) -> Told:
    """What was measured of it, the base's of the base's texts alone."""
    cells = changed([entry], [base])
    told = {name: cell.value for name, cell in cells.items() if cell is not None and name in PANELS}
    return told | ({"STS": entry.mean(tasks)} if tasks else {})


@styled
def figure(model: str, rows: dict[str, Longer]) -> Figure:
    """By the number of steps: a point a run, and lines through the means; dashed: causally."""
    places = {
        each: place
        for place, each in enumerate(sorted({s for own in rows.values() for s in own.told}))
    }
    names = list(dict.fromkeys(own.run or row for row, own in rows.items()))
    found = blank(10.4, 6.4)
    panels = list(found.subplots(2, 2, sharex=True).flat)
    for axes, (what, label) in zip(panels, PANELS.items(), strict=True):
        for row, own in rows.items():
            color = PALETTE[names.index(own.run or row) % len(PALETTE)]
            style = {"color": color, "label": row, "ls": "--" if own.is_control else "-"}
            _line(axes, {places[steps]: told for steps, told in own.told.items()}, what, style)
        axes.set_ylabel(label)
        axes.set_xticks([*places.values()], [str(each) for each in places])
        if what == RATIO:
            axes.set_yscale("log")
            of_ratios(axes.yaxis)
    for axes in panels[2:]:
        axes.set_xlabel("steps (0: untrained, reading alike)")
    found.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    found.suptitle(model, fontsize=10)
    return found


def _line(axes: Any, own: dict[int, list[Told]], what: str, style: dict[str, str]) -> None:
    told = {place: [each[what] for each in runs if what in each] for place, runs in own.items()}
    told = {place: values for place, values in told.items() if values}
    hollow = {"mfc": "white"} if style["ls"] == "--" else {}
    for place, values in told.items():
        axes.plot(
            [place] * len(values), values, ls="", marker="o", ms=4, color=style["color"], **hollow
        )
    middle = [
        float(np.exp(np.mean(np.log(values))) if what == RATIO else np.mean(values))
        for values in told.values()
    ]
    axes.plot([*told], middle, lw=1.3, **style)
