"""The first token's share and DP-after, by length and by layer; and a figure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from studies.compare.paired import by_sink, texts
from studies.compare.records import Records
from studies.compare.rows import RunRow, base_first, controls_of, dependences, reference
from ubmoe.report.figures import PALETTE, blank, styled
from ubmoe.results.records import Record

Rows = dict[str, list[RunRow]]


def measured(model: str, records: Records, seeds: Sequence[int]) -> Rows:
    """The base, and every row of which the sink was measured, a run a seed."""
    rows: Rows = {}
    for run in dependences(model, records):
        again = run.is_base and run.row in rows  # measured in another folder, too
        known = "first" in run.record.section and not again
        if known and (run.seed is None or run.seed in seeds):
            rows.setdefault(run.row, []).append(run)
    return {runs[0].row: runs for runs in sorted(rows.values(), key=base_first)}


def with_controls(rows: Rows) -> Rows:
    """The base, and the rows of `measured` whose causal control was measured, too.

    No more of them than there are colours: those with the most runs.
    """
    control_of = {run: control for control, run in controls_of(rows.values()).items()}
    most = sorted(control_of, key=lambda run: -len(rows[run]) - len(rows[control_of[run]]))[
        : len(PALETTE)
    ]
    wanted = {*most, *(control_of[run] for run in most)}
    return {row: runs for row, runs in rows.items() if runs[0].is_base or row in wanted}


@dataclass(frozen=True)
class Layers:
    """The change by tuning in each layer, in percentage points, averaged over seeds: (layers,).

    by_sink: what DP-after changes by because the first token's share does, as in paired.by_sink.
    """

    after: np.ndarray
    first: np.ndarray
    without: np.ndarray
    by_sink: np.ndarray

    @property
    def r_squared(self) -> float:
        """1 minus the squared error of `by_sink`, as it is, over the variance of `after`.

        nan where no layer changes otherwise than another.
        """
        rest = ((self.after - self.by_sink) ** 2).sum()
        whole = ((self.after - self.after.mean()) ** 2).sum()
        return float(1 - rest / whole) if whole else math.nan


def layers(rows: Rows) -> dict[str, Layers]:
    """Every row of `measured` against the base; {} without one.

    Rows that were measured on other texts than the base are left out.
    """
    base = reference([run for runs in rows.values() for run in runs])
    if base is None:
        return {}
    every = {
        row: change([run.record for run in runs], base.record)
        for row, runs in rows.items()
        if not runs[0].is_base
    }
    return {row: moved for row, moved in every.items() if moved is not None}


def change(records: Sequence[Record], base: Record) -> Layers | None:
    """A row's seeds against the base; None where they were measured on other texts."""
    if any(texts(record) != texts(base) for record in records):
        return None
    tuned = _layers(records)
    after, first, without = tuned - _layers([base])
    return Layers(after, first, without, by_sink(first, tuned[2], without))


def _layers(records: Sequence[Record]) -> np.ndarray:
    """(after, first, after without first) by layer, of the mean over seeds."""
    paths = (("after",), ("first",), ("without_first", "after"))
    every = [
        [[_at(layer, path) for layer in record.section["layers"]] for path in paths]
        for record in records
    ]
    return np.mean(every, axis=0)


@styled
def figure(model: str, rows: Rows) -> Figure:
    """DP-after by length, with the first token's key and without; that key's share by layer.

    And what tuning changes of the two in each layer. Dashed: tuned under the causal mask. Bars: the
    standard error over texts, of a mean over seeds.
    """
    drawn = blank(10.4, 7.2)
    panels = list(drawn.subplots(2, 2).flat)
    panels[1].sharey(panels[0])
    control_of = controls_of(rows.values())
    tuned = [row for row, runs in rows.items() if not runs[0].is_base]
    names = dict.fromkeys(control_of.get(row, row) for row in tuned)
    colours = dict(zip(names, PALETTE * len(names), strict=False))
    styles: dict[str, Any] = {}
    for row, runs in rows.items():
        dashes = "--" if runs[0].is_control else "-"
        styles[row] = {"color": colours.get(control_of.get(row, row), "black"), "ls": dashes}
    for row, runs in rows.items():
        records = [run.record for run in runs]
        for axes, path in zip(panels[:2], (("after",), ("without_first", "after")), strict=True):
            _by_length(
                axes, [record.section for record in records], path, styles[row] | {"label": row}
            )
        panels[2].plot(_layers(records)[1], lw=1.3, **styles[row])
    for row, moved in layers(rows).items():
        style = {"ls": "", "marker": "o", "ms": 4, "color": styles[row]["color"]}
        style["mfc"] = "white" if rows[row][0].is_control else style["color"]
        panels[3].plot(moved.first, moved.after, **style)
    for line in (panels[3].axhline, panels[3].axvline):
        line(0, color="grey", lw=0.6)
    length, share = "length of the text, tokens", "percent of attention"
    for axes, title, x in zip(panels, TITLES, (length, length, "layer", MOVED), strict=True):
        axes.set_title(title, fontsize=9)
        axes.set(xlabel=x, ylabel=share if axes is not panels[3] else "change of DP-after")
    drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    drawn.suptitle(model, fontsize=10)
    return drawn


TITLES = (
    "DP-after",
    "DP-after without the first token's key",
    "share of the first token",
    "what tuning changes, a point a layer (hollow: tuned causally)",
)
MOVED = "change of the first token's share"


def _by_length(
    axes: Any, sections: list[dict[str, Any]], path: tuple[str, ...], style: Any
) -> None:
    """The mean over seeds in every bucket, with the standard error over texts."""
    buckets = [bucket for bucket in zip(*(s["buckets"] for s in sections), strict=True)]
    buckets = [bucket for bucket in buckets if bucket[0]["texts"]]
    heights = [mean(_at(bucket, path) for bucket in several) for several in buckets]
    errors = [mean(_at(bucket["stderr"], path) or 0 for bucket in several) for several in buckets]
    axes.errorbar(range(len(buckets)), heights, errors, marker=".", elinewidth=0.6, lw=1.3, **style)
    ticks = ["{}-{}".format(*several[0]["range"]) for several in buckets]
    axes.set_xticks(range(len(ticks)), ticks, fontsize=8)


def _at(row: dict[str, Any], path: tuple[str, ...]) -> Any:
    for name in path:
        row = row[name]
    return row
