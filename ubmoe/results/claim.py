"""What lost generation goes along with: a picture, and rank correlations.

From the records alone. The first panel has lost generation against STS, hollow under the causal
mask. The others test the paper's central claim: the more a tuned model attends to later tokens
(DP-after), the more of its generation is lost. Beside it, where they were measured, what goes to
the first token, and DP-after without that key.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np
from scipy.stats import bootstrap, spearmanr

from ubmoe.report.figures import PALETTE, blank, styled
from ubmoe.report.tables import CAUSAL, family
from ubmoe.results.entries import Entry, entries
from ubmoe.results.records import Records

RESAMPLES = 2000
FEWEST = 6  # rows of an interval: of fewer, most draws are of two or three
MARKS = "osD^vP"


@dataclass(frozen=True)
class Tuned:
    """An encoder of one seed: how its dependence and its generation differ from the base's.

    family: what was tuned, and under which mask, however its row is called. after, first,
    without_first: percentage points; lost: log of the perplexity over the base's. sts: the mean of
    the tasks that all rows have, under the row's own mask.
    """

    row: str
    family: str
    after: float
    lost: float
    first: float | None = None
    without_first: float | None = None
    sts: float | None = None

    @property
    def is_control(self) -> bool:
        """Tuned under the causal mask, which the paper did not."""
        return self.family.endswith(CAUSAL)


# The columns of a table of encoders, by what is looked at as a cause.
CAUSES = {"after": "DP-after", "first": "first", "without_first": "after without first"}
PANELS = {"sts": "STS under its own mask"} | {
    cause: f"{column}, minus the base's (percentage points)" for cause, column in CAUSES.items()
}


def tuned(model: str, records: Records, seeds: Sequence[int]) -> list[Tuned]:
    """Every encoder whose dependence and generation were measured."""
    every = entries("encoders", model, records, seeds)
    found: list[tuple[Entry, Any]] = [
        (each, each.cells) for each in every if {"DP-after", "perplexity"} <= each.cells.keys()
    ]
    base: Any = next((cells for each, cells in found if each.row == "base"), None)
    own = [each.tasks for each, _ in found if not each.is_base]
    common = sorted(frozenset.intersection(*own)) if own else []
    return [
        Tuned(
            *(each.row, family(each.record.data)),
            lost=math.log(cells["perplexity"] / base["perplexity"]),
            **_moved(cells, base),
            sts=mean(cells[task] for task in common) if common else None,
        )
        for each, cells in found
        if base is not None and not each.is_base
    ]


def _moved(own: Any, base: Any) -> dict[str, Any]:
    """How far each cause is from the base's; None where one of the two was not measured."""
    there = own.keys() & base.keys()
    return {
        name: own[column] - base[column] if column in there else None
        for name, column in CAUSES.items()
    }


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of a cause and `lost`, and its 95 % interval.

    The interval is None where there are too few rows.
    """

    value: float
    interval: tuple[float, float] | None
    rows: int

    def __str__(self) -> str:
        text = "too few for an interval"
        if self.interval is not None:
            text = "95 % interval {:.2f} to {:.2f}".format(*self.interval)
        return f"rank correlation {self.value:.2f} over {self.rows} rows ({text})"


def correlation(found: Sequence[Tuned], cause: str = "after", seed: int = 0) -> Correlation:
    """Of a cause and lost generation.

    The bootstrap draws rows, each with all of its seeds, which are no new evidence.
    """
    rows = sorted({each.row for each in found})
    own = [[each for each in found if each.row == row] for row in rows]

    def drawn(chosen: np.ndarray) -> float:
        return _spearman([each for place in chosen for each in own[place]], cause)

    if len(rows) < FEWEST:
        return Correlation(_spearman(found, cause), None, len(rows))
    several = bootstrap(
        *((np.arange(len(rows)),), drawn),
        n_resamples=RESAMPLES,
        vectorized=False,
        method="percentile",
        rng=seed,
    ).bootstrap_distribution
    low, high = np.nanpercentile(several, [2.5, 97.5])  # nan: one row drawn throughout
    return Correlation(_spearman(found, cause), (float(low), float(high)), len(rows))


def _spearman(found: Sequence[Tuned], cause: str) -> float:
    moved, lost = ([getattr(each, name) for each in found] for name in (cause, "lost"))
    if np.ptp(moved) == 0 or np.ptp(lost) == 0:
        return math.nan
    return float(spearmanr(moved, lost).statistic)


@styled
def figure(model: str, encoded: list[Tuned]) -> Any:
    """Lost generation against STS, and each cause that was measured of every encoder."""
    causes = [c for c in PANELS if all(getattr(each, c) is not None for each in encoded)]
    found = blank(1.8 + 4.4 * len(causes), 4.4)
    panels = found.subplots(1, len(causes), sharey=True, squeeze=False)[0]
    for axes, cause in zip(panels, causes, strict=True):
        _panel(axes, encoded, cause)
    panels[0].set(ylabel="lost generation: log perplexity over the base's")
    found.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    found.suptitle(model, fontsize=10)
    return found


def _panel(axes: Any, encoded: list[Tuned], cause: str) -> None:
    families = dict.fromkeys(each.family for each in encoded)
    kinds = list(dict.fromkeys(each.removesuffix(CAUSAL) for each in families))
    for each in families:
        own = [one for one in encoded if one.family == each]
        number = kinds.index(each.removesuffix(CAUSAL))
        axes.plot(
            *([getattr(one, cause) for one in own], [one.lost for one in own]),
            marker=MARKS[number % len(MARKS)], ls="", ms=5, label=each,
            color=PALETTE[number % len(PALETTE)],
            fillstyle="none" if own[0].is_control else "full",
        )  # fmt: skip
    axes.axhline(0, color="grey", lw=0.6)
    if cause in CAUSES:
        axes.axvline(0, color="grey", lw=0.6)
    axes.set(xlabel=PANELS[cause])
    own = [each for each in encoded if not each.is_control]
    text = [str(correlation(encoded, cause))]
    if len(own) < len(encoded):
        text.append(f"without causally tuned rows: {correlation(own, cause)}")
    axes.set_title("\n".join(text), fontsize=7)
