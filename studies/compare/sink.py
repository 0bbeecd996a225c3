"""What the first token's key has to do with DP-after, by length and by layer; and a picture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from studies.compare.entries import Entry, base_first, controls_of, dependences, reference
from studies.compare.paired import by_sink, texts
from ubmoe.report.figures import PALETTE, blank, styled
from ubmoe.results.records import Record, Records

Rows = dict[str, list[Entry]]


def measured(model: str, records: Records, seeds: Sequence[int]) -> Rows:
    """The base, and every row of which the sink was measured, a run a seed."""
    found: Rows = {}
    for entry in dependences(model, records):
        again = entry.is_base and entry.row in found  # measured in another folder, too
        known = "first" in entry.record.section and not again
        if known and (entry.seed is None or entry.seed in seeds):
            found.setdefault(entry.row, []).append(entry)
    return {own[0].row: own for own in sorted(found.values(), key=base_first)}


def with_twins(rows: Rows) -> Rows:
    """Of what `measured` found, the base, and the rows of which a causal twin was measured, too.

    No more of them than there are colours: those with the most runs.
    """
    twins = {run: control for control, run in controls_of(rows.values()).items()}
    most = sorted(twins, key=lambda run: -len(rows[run]) - len(rows[twins[run]]))[: len(PALETTE)]
    wanted = {*most, *(twins[run] for run in most)}
    return {row: own for row, own in rows.items() if own[0].is_base or row in wanted}


@dataclass(frozen=True)
class Layers:
    """What tuning changes in each layer, in percentage points, of the mean over seeds: (layers,).

    by_sink: what DP-after changes by because the first token's share does, as in paired.by_sink.
    """

    after: np.ndarray
    first: np.ndarray
    without: np.ndarray
    by_sink: np.ndarray

    @property
    def explained(self) -> float:
        """1 minus the squared error of `by_sink`, as it is, over the variance of `after`.

        nan where no layer changes otherwise than another.
        """
        rest = ((self.after - self.by_sink) ** 2).sum()
        whole = ((self.after - self.after.mean()) ** 2).sum()
        return float(1 - rest / whole) if whole else math.nan


def layers(rows: Rows) -> dict[str, Layers]:
    """Of what `measured` found, every row against the base; {} without one.

    Rows that were measured on other texts than the base are left out.
    """
    base = reference([each for own in rows.values() for each in own])
    if base is None:
        return {}
    every = {
        row: change([each.record for each in own], base.record)
        for row, own in rows.items()
        if not own[0].is_base
    }
    return {row: moved for row, moved in every.items() if moved is not None}


def change(records: Sequence[Record], base: Record) -> Layers | None:
    """Of a row against the base; None where they were measured on other texts."""
    if any(texts(each) != texts(base) for each in records):
        return None
    own = _layers(records)
    after, first, without = own - _layers([base])
    return Layers(after, first, without, by_sink(first, own[2], without))


def _layers(own: Sequence[Record]) -> np.ndarray:
    """(after, first, after without first) by layer, of the mean over seeds."""
    paths = (("after",), ("first",), ("without_first", "after"))
    every = [
        [[_at(layer, path) for layer in record.section["layers"]] for path in paths]
        for record in own
    ]
    return np.mean(every, axis=0)


@styled
def figure(model: str, rows: Rows) -> Figure:
    """DP-after by length, with the first token's key and without; that key's share by layer.

    And what tuning changes of the two in each layer. Dashed: tuned under the causal mask. Bars: the
    standard error over texts, of a mean over seeds.
    """
    found = blank(10.4, 7.2)
    panels = list(found.subplots(2, 2).flat)
    panels[1].sharey(panels[0])
    control_of = controls_of(rows.values())
    tuned = [row for row, own in rows.items() if not own[0].is_base]
    names = dict.fromkeys(control_of.get(row, row) for row in tuned)
    colours = dict(zip(names, PALETTE * len(names), strict=False))
    styles: dict[str, Any] = {}
    for row, entries in rows.items():
        dashes = "--" if entries[0].is_control else "-"
        styles[row] = {"color": colours.get(control_of.get(row, row), "black"), "ls": dashes}
    for row, entries in rows.items():
        own = [each.record for each in entries]
        for axes, path in zip(panels[:2], (("after",), ("without_first", "after")), strict=True):
            _by_length(axes, [record.section for record in own], path, styles[row] | {"label": row})
        panels[2].plot(_layers(own)[1], lw=1.3, **styles[row])
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
    found.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    found.suptitle(model, fontsize=10)
    return found


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
    buckets = [each for each in zip(*(s["buckets"] for s in sections), strict=True)]
    buckets = [each for each in buckets if each[0]["texts"]]
    heights = [mean(_at(each, path) for each in several) for several in buckets]
    errors = [mean(_at(each["stderr"], path) or 0 for each in several) for several in buckets]
    axes.errorbar(range(len(buckets)), heights, errors, marker=".", elinewidth=0.6, lw=1.3, **style)
    ticks = ["{}-{}".format(*several[0]["range"]) for several in buckets]
    axes.set_xticks(range(len(ticks)), ticks, fontsize=8)


def _at(row: dict[str, Any], path: tuple[str, ...]) -> Any:
    for name in path:
        row = row[name]
    return row
