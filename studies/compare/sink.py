"""What the first token's key has to do with DP-after, by length and by layer; and a picture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from studies.compare.entries import KINDS, base_first
from studies.compare.paired import by_sink, texts
from ubmoe.report.figures import PALETTE, blank, styled
from ubmoe.report.tables import CAUSAL
from ubmoe.results.records import Record, Records


def measured(model: str, records: Records, seeds: Sequence[int]) -> dict[str, list[Record]]:
    """The base, and every row of which the sink was measured, a record a seed."""
    found: dict[str, list[Record]] = {}
    for entry in KINDS["dependence"](model, records):
        row, _, share = entry.row.rpartition(", ")
        known = share == "after" and "first" in entry.record.section
        again = row == "base" and row in found  # measured in another folder, too
        if known and not again and (entry.seed is None or entry.seed in seeds):
            found.setdefault(row, []).append(entry.record)
    return {row: found[row] for row in sorted(found, key=base_first)}


def with_twins(rows: dict[str, list[Record]]) -> dict[str, list[Record]]:
    """Of what `measured` found, the base, and the rows of which a causal twin was measured, too.

    No more of them than there are colours: those with the most runs.
    """
    twins = [row for row in rows if row + CAUSAL in rows]
    twins.sort(key=lambda row: -len(rows[row]) - len(rows[row + CAUSAL]))
    twins = twins[: len(PALETTE)]
    wanted = {"base", *twins, *(row + CAUSAL for row in twins)}
    return {row: own for row, own in rows.items() if row in wanted}


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


def layers(rows: dict[str, list[Record]]) -> dict[str, Layers]:
    """Of what `measured` found, every row against the base; {} without one.

    Rows that were measured on other texts than the base are left out.
    """
    if "base" not in rows:
        return {}
    base, found = rows["base"][0], {}
    before = _layers([base])
    for row, records in rows.items():
        if row != "base" and all(texts(each) == texts(base) for each in records):
            own = _layers(records)
            after, first, without = own - before
            found[row] = Layers(after, first, without, by_sink(first, own[2], without))
    return found


def _layers(own: Sequence[Record]) -> np.ndarray:
    """(after, first, after without first) by layer, of the mean over seeds."""
    paths = (("after",), ("first",), ("without_first", "after"))
    every = [
        [[_at(layer, path) for layer in record.section["layers"]] for path in paths]
        for record in own
    ]
    return np.mean(every, axis=0)


@styled
def figure(model: str, rows: dict[str, list[Record]]) -> Figure:
    """DP-after by length, with the first token's key and without; that key's share by layer.

    And what tuning changes of the two in each layer. Dashed: tuned under the causal mask. Bars: the
    standard error over texts, of a mean over seeds.
    """
    found = blank(10.4, 7.2)
    panels = list(found.subplots(2, 2).flat)
    panels[1].sharey(panels[0])
    names = dict.fromkeys(row.removesuffix(CAUSAL) for row in rows if row != "base")
    colours = {"base": "black"} | dict(zip(names, PALETTE * len(names), strict=False))
    styles: dict[str, Any] = {}
    for row in rows:
        dashes = "--" if row.endswith(CAUSAL) else "-"
        styles[row] = {"color": colours[row.removesuffix(CAUSAL)], "ls": dashes}
    for row, own in rows.items():
        for axes, path in zip(panels[:2], (("after",), ("without_first", "after")), strict=True):
            _by_length(axes, [record.section for record in own], path, styles[row] | {"label": row})
        panels[2].plot(_layers(own)[1], lw=1.3, **styles[row])
    for row, moved in layers(rows).items():
        style = {"ls": "", "marker": "o", "ms": 4, "color": styles[row]["color"]}
        style["mfc"] = "white" if row.endswith(CAUSAL) else style["color"]
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
