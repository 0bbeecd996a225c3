"""Two pictures of a study: what embedding costs in generation, and whether dependence tells it.

From the records alone. The first plane has a point for every model of the study, STS average to the
right (a mixture reads bidirectionally for it, an encoder as it was tuned), generation upwards, and
its Pareto front. The second has lost generation against STS, hollow under the causal mask, and
tests the paper's central claim: the more a tuned model attends to later tokens (DP-after), the more
is lost. Beside it, where they were measured, what goes to the first token, and DP-after without
that key.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from matplotlib.ticker import ScalarFormatter
from scipy.stats import bootstrap, spearmanr

from ubmoe.config import Config, UserError
from ubmoe.files import replace_all, save_figure
from ubmoe.report.figures import PALETTE, blank, styled
from ubmoe.report.tables import CAUSAL, ROUTES, family, model_of
from ubmoe.results import sink
from ubmoe.results.entries import Entry, entries
from ubmoe.results.records import Records

log = logging.getLogger(__name__)
RESAMPLES = 2000
FEWEST = 6  # rows of an interval: of fewer, most draws are of two or three
NO_MIXTURES = (ROUTES["uni"], ROUTES["bi"])  # the two models themselves, forced


@dataclass
class Point:
    """A model of the study, a value for each seed: STS average, tasks' average, perplexity."""

    kind: str
    sts: list[float] = field(default_factory=list)
    tasks: list[float] = field(default_factory=list)
    perplexity: list[float] = field(default_factory=list)

    def add(self, *values: float | None) -> None:
        for found, value in zip((self.sts, self.tasks, self.perplexity), values, strict=True):
            if value is not None:
                found.append(value)


def points(model: str, records: Records, seeds: Sequence[int]) -> dict[str, Point]:
    """Every model of the study that both uses were scored of, by its row's name."""
    found: dict[str, Point] = {}
    for each in entries("encoders", model, records, seeds):
        cells = each.cells
        if cells["average"] is not None and "perplexity" in cells:
            point = found.setdefault(each.row, Point("base" if each.is_base else "encoder"))
            point.add(cells["average"], cells["generation"], cells["perplexity"])
    for each in entries("routes", model, records, seeds):
        cells, sts = each.cells, each.cells.get("STS bidirectional")
        if sts is not None and not each.row.startswith(NO_MIXTURES):
            point = found.setdefault(each.row, Point("mixture"))
            point.add(sts, cells["average"], cells["perplexity"])
    return found


def front(pairs: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that none surpasses in both, by the first coordinate."""
    order = sorted(range(len(pairs)), key=lambda each: (-pairs[each][0], -pairs[each][1]))
    best, found = -math.inf, []
    for each in order:
        if pairs[each][1] > best:
            best = pairs[each][1]
            found.append(each)
    return found[::-1]


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


# --- pictures -------------------------------------------------------------------------------------


def draw(config: Config, records: Records) -> str:
    """Write tradeoff.png, claim.png and sink.png to output_dir, those that the records give.

    Returns their paths. Raises UserError.
    """
    model, seeds = model_of({"config": config.model_dump()}), config.results.seeds
    placed, encoded = points(model, records, seeds), tuned(model, records, seeds)
    if len(placed) < 2:
        raise UserError(
            f"{config.results.directory}: {len(placed)} models of {model} with STS and generation; "
            "python -m ubmoe.results run, with results.table=all, makes them"
        )
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    figures, rows = {"tradeoff.png": plane_figure(model, placed)}, {each.row for each in encoded}
    if len(rows) > 2:
        figures["claim.png"] = claim_figure(model, encoded)
    else:
        (folder / "claim.png").unlink(missing_ok=True)  # of other records
        log.info("claim.png: not drawn, of %d rows with dependence and perplexity", len(rows))
    twins = sink.measured(model, records, seeds)
    if len(twins) > 2:
        figures["sink.png"] = sink.figure(model, twins)
    replace_all({folder / name: partial(save_figure, each) for name, each in figures.items()})
    return "\n".join(str(folder / name) for name in figures)


MARKS = "osD^vP"
COLOURS = {"base": "black", "encoder": "C0", "mixture": "C1"}


@styled
def plane_figure(model: str, placed: dict[str, Point]) -> Any:
    """Two panels: the average of the tasks, and the perplexity (downwards is worse)."""
    figure = blank(11.0, 4.6)
    left, right = figure.subplots(1, 2)
    right.set_yscale("log")
    right.invert_yaxis()
    for axis in (right.yaxis.set_major_formatter, right.yaxis.set_minor_formatter):
        axis(ScalarFormatter())
    names = {"tasks": "generation, average of tasks (%)", "perplexity": "perplexity (better: up)"}
    for axes, (what, label) in zip((left, right), names.items(), strict=True):
        shown = [
            (number, name, point)
            for number, (name, point) in enumerate(placed.items(), 1)
            if getattr(point, what)
        ]
        axes.set(xlabel="STS average (mixtures: bidirectional)", ylabel=label)
        if not shown:
            axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center")
            continue
        pairs = [(mean(point.sts), mean(getattr(point, what))) for _, _, point in shown]
        sign = 1 if what == "tasks" else -1
        edge = [pairs[each] for each in front([(x, sign * y) for x, y in pairs])]
        axes.plot(*zip(*edge, strict=True), color="grey", lw=1, ls="--", zorder=0)
        for (number, name, point), (x, y) in zip(shown, pairs, strict=True):
            axes.errorbar(
                *(x, y, _error(getattr(point, what)), _error(point.sts)),
                fmt="o", ms=4, lw=0.8, color=COLOURS[point.kind],
                label=f"{number} {name}",
            )  # fmt: skip
        axes.autoscale_view()  # now, so that places are final
        fractions = axes.transLimits.transform(axes.transScale.transform(pairs))
        for together in close(fractions, NEAR):
            text = ", ".join(str(shown[each][0]) for each in together)
            place = pairs[together[-1]]
            axes.annotate(text, place, (4, 3), textcoords="offset points", fontsize=7)
    figure.legend(*right.get_legend_handles_labels(), loc="outside right center", fontsize=7)
    figure.suptitle(f"{model}: embedding against generation; dashed: Pareto front", fontsize=10)
    return figure


NEAR = 0.05  # of the width or height of a panel: labels of such points would overlap


def close(points: Sequence[tuple[float, float]], near: float) -> list[list[int]]:
    """Indices of points that share a label: each within `near`, in both coordinates, of the next.

    In the order of the first coordinate.
    """
    groups: list[list[int]] = []
    for each in sorted(range(len(points)), key=lambda each: points[each][0]):
        for group in groups:
            last = points[group[-1]]
            if max(abs(a - b) for a, b in zip(points[each], last, strict=True)) <= near:
                group.append(each)
                break
        else:
            groups.append([each])
    return groups


def _error(values: list[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


@styled
def claim_figure(model: str, encoded: list[Tuned]) -> Any:
    """Lost generation against STS, and each cause that was measured of every encoder."""
    causes = [c for c in PANELS if all(getattr(each, c) is not None for each in encoded)]
    figure = blank(1.8 + 4.4 * len(causes), 4.4)
    panels = figure.subplots(1, len(causes), sharey=True, squeeze=False)[0]
    for axes, cause in zip(panels, causes, strict=True):
        _claim_panel(axes, encoded, cause)
    panels[0].set(ylabel="lost generation: log perplexity over the base's")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    figure.suptitle(model, fontsize=10)
    return figure


def _claim_panel(axes: Any, encoded: list[Tuned], cause: str) -> None:
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
