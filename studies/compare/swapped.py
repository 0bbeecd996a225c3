"""Which layers' tuning costs the language model, for every swapped row; and a figure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import rankdata

from studies.compare.records import Records
from studies.compare.rows import RunRow, by_row, measured_of, reference
from studies.compare.sink import change
from ubmoe.report.figures import SWAPPED, blank, styled, swap_bars
from ubmoe.results.records import Record


@dataclass(frozen=True)
class Swapped:
    """The first seed of a row that was swapped.

    section: of its record. after: (layers,) percentage points that tuning adds to each layer's
    DP-after; None where that was not measured. What a swap changes counts every answer once.
    """

    section: dict[str, Any]
    after: np.ndarray | None

    @property
    def whole(self) -> float:
        """Nats a token of the encoder over the model."""
        return float(self.section["whole"]["by_answer"]["change"])

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A layer each, with what changes where it is put `in` and `back`."""
        rows = self.section["layers"]
        return [{word: row[word]["by_answer"] for word in SWAPPED} for row in rows]

    def changes(self, word: str) -> np.ndarray:
        """(layers,) nats a token. word: `in` or `back`."""
        return np.array([row[word]["change"] for row in self.rows])

    def rank_with_after(self, word: str) -> float | None:
        """Rank correlation over layers of the rise of DP-after with what a swap costs or saves.

        Partial, at equal depth: where both grow with the layer's number, their ranks correlate
        whatever one has to do with the other. None where depth leaves nothing of either.
        """
        if self.after is None or len(self.after) < 4:
            return None
        cost = SIGNS[word] * self.changes(word)
        ranks = [rankdata(values) for values in (cost, self.after, np.arange(len(cost)))]
        if not np.ptp(ranks[0]) or not np.ptp(ranks[1]):
            return None
        both, deep, change_with_depth = np.corrcoef(ranks)[[0, 0, 1], [1, 2, 2]]
        left = (1 - deep**2) * (1 - change_with_depth**2)
        return float((both - deep * change_with_depth) / math.sqrt(left)) if left > 1e-9 else None


SIGNS = {"in": 1, "back": -1}  # what it costs to put a layer in is saved by putting it back


def swapped(model: str, records: Records, seeds: Sequence[int]) -> dict[str, Swapped]:
    """{row: its swaps}, by the rows' names."""
    rows = by_row("encoders", model, records, seeds)
    base = reference([run for runs in rows.values() for run in runs])
    first = {}
    for row, runs in sorted(rows.items()):
        for run in runs:
            record = measured_of(run.record, "swap", records)
            if record is not None and row not in first:
                first[row] = Swapped(record.section, _rise_of_after(run, base))
    return first


def _rise_of_after(run: RunRow, base: RunRow | None) -> np.ndarray | None:
    """By layer, what tuning adds to DP-after."""
    mine, theirs = (_with_sink(side) for side in (run, base))
    moved = change([mine], theirs) if mine and theirs else None
    return None if moved is None else moved.after


def _with_sink(run: RunRow | None) -> Record | None:
    return run.measured("dependence") if run and "first" in run.measures else None


@styled
def figure(model: str, rows: dict[str, Swapped]) -> Figure:
    """By layer, what a swap changes; beside it, whether the costly layers are those of DP-after."""
    drawn = blank(10.4, 0.9 + 2.6 * len(rows))
    grid = drawn.subplots(len(rows), 2, squeeze=False, sharex="col", width_ratios=(2.4, 1))
    for (bars, points), (row, swaps) in zip(grid, rows.items(), strict=True):
        swap_bars(bars, swaps.rows)
        bars.set_ylabel(f"{row}\nchange of the loss, nats a token", fontsize=9)
        if swaps.after is not None:
            for word, sign in SIGNS.items():
                style = {"marker": "o", "ls": "", "ms": 4, "color": SWAPPED[word][1]}
                points.plot(swaps.after, sign * swaps.changes(word), **style)
            ranks = [swaps.rank_with_after(word) for word in SIGNS]
            said = " and ".join("none" if rank is None else f"{rank:.2f}" for rank in ranks)
            points.set_title(f"ranks at equal depth of cost, saving:\n{said}", fontsize=8)
        for line in (points.axhline, points.axvline):
            line(0, color="grey", lw=0.6)
    bars.set_xlabel("layer that is swapped")
    points.set_xlabel("change of the layer's DP-after, points")
    grid[0, 0].legend()
    drawn.suptitle(model, fontsize=10)
    return drawn
