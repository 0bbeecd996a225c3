"""Two pictures of a study: what embedding costs in generation, and whether dependence tells it.

From the records alone. The first plane has a point for every model of the study, STS average to the
right (a mixture reads bidirectionally for it, an encoder as it was tuned), generation upwards, and
its Pareto front. The second tests the paper's central claim: the more a tuned model attends to
later tokens (DP-after), the more of its generation is lost.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from ubmoe.config import Config, UserError
from ubmoe.paper import Records, beside, encoders, mixtures
from ubmoe.results import replace_all, save_figure
from ubmoe.tables import mixed, model_of

RESAMPLES = 2000


@dataclass
class Point:
    """A model of the study, a value for each seed: STS average, tasks' average, perplexity."""

    kind: str
    sts: list[float] = field(default_factory=list)
    tasks: list[float] = field(default_factory=list)
    perplexity: list[float] = field(default_factory=list)

    def add(self, sts: float, generation: dict[str, Any]) -> None:
        self.sts.append(sts)
        self.perplexity.append(generation["perplexity"])
        if generation["average"] is not None:
            self.tasks.append(generation["average"])


def points(model: str, records: Records) -> dict[str, Point]:
    """Every model of the study that both uses were scored of, by its row's name."""
    found: dict[str, Point] = {}
    for row, key in encoders(model, records):
        section = beside(key, "evaluation", records).get("generation")
        sts = records[key]["sts"]["average"]
        if section is not None and sts is not None:
            kind = "base" if row == "base" else "encoder"
            found.setdefault(row, Point(kind)).add(sts, section)
    for _, record in mixtures(model, records):
        for row in record["sts"]:
            if row["attention"] == "bidirectional" and row["route"] not in ("uni", "bi"):
                scores = record["generation"]["routes"][row["route"]]
                name = mixed(record, row["route"])
                found.setdefault(name, Point("mixture")).add(row["average"], scores)
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
    """An encoder of one seed: how its DP-after and its generation differ from the base's."""

    row: str
    after: float  # percentage points
    lost: float  # log of the perplexity over the base's


def tuned(model: str, records: Records) -> list[Tuned]:
    """Every bidirectional encoder whose dependence and generation were measured."""
    scored, after = {}, {}
    for row, key in encoders(model, records):
        evaluated = beside(key, "evaluation", records)
        measured = beside(key, "dependence", records)
        if "generation" in evaluated and "dependence" in measured:
            scored[row, key] = evaluated["generation"]["perplexity"]
            after[row, key] = measured["dependence"]["overall"]["after"]
    base = next((each for each in scored if each[0] == "base"), None)
    if base is None:
        return []
    return [
        Tuned(row, after[row, key] - after[base], math.log(perplexity / scored[base]))
        for (row, key), perplexity in scored.items()
        if row != "base" and not row.endswith(" causal")
    ]


def correlation(found: Sequence[Tuned], seed: int = 0) -> tuple[float, float, float]:
    """Pearson's r of `after` and `lost`, and its 95 % interval.

    The bootstrap draws rows, each with all of its seeds: seeds of one row are no new evidence.
    """
    rows = sorted({each.row for each in found})
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(RESAMPLES):
        chosen = [rows[each] for each in rng.integers(len(rows), size=len(rows))]
        drawn.append(_pearson([each for row in chosen for each in found if each.row == row]))
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return _pearson(found), float(low), float(high)


def _pearson(found: Sequence[Tuned]) -> float:
    after, lost = (np.array([getattr(each, name) for each in found]) for name in ("after", "lost"))
    if np.ptp(after) == 0 or np.ptp(lost) == 0:
        return math.nan
    return float(np.corrcoef(after, lost)[0, 1])


# --- pictures -------------------------------------------------------------------------------------


def draw(config: Config, records: Records) -> str:
    """Write tradeoff.png and claim.png to output_dir; returns their paths. Raises UserError."""
    model = model_of({"config": config.model_dump()})
    placed, encoded = points(model, records), tuned(model, records)
    if len(placed) < 2:
        raise UserError(
            f"{config.results.directory}: {len(placed)} models of {model} with STS and generation; "
            "run results.action=run results.table=all first"
        )
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"tradeoff.png": _plane(model, placed)}
    if len({each.row for each in encoded}) > 2:
        figures["claim.png"] = _claim(model, encoded)
    replace_all({folder / name: partial(save_figure, each) for name, each in figures.items()})
    return "\n".join(str(folder / name) for name in figures)


COLOURS = {"base": "black", "encoder": "C0", "mixture": "C1"}


def _plane(model: str, placed: dict[str, Point]) -> Any:
    """Two panels: the average of the tasks, and the perplexity (downwards is worse)."""
    from matplotlib.ticker import ScalarFormatter

    from ubmoe.figures import blank

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
        axes.set(xlabel="STS average (Spearman x 100)", ylabel=label)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *right.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=7
    )
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


def _claim(model: str, encoded: list[Tuned]) -> Any:
    from ubmoe.figures import blank

    figure = blank(5.6, 4.0)
    axes = figure.subplots()
    for number, row in enumerate(dict.fromkeys(each.row for each in encoded)):
        own = [each for each in encoded if each.row == row]
        axes.plot(
            *([each.after for each in own], [each.lost for each in own]),
            marker="o", ls="", ms=4, color=f"C{number}", label=row,
        )  # fmt: skip
    r, low, high = correlation(encoded)
    axes.axhline(0, color="grey", lw=0.6)
    axes.axvline(0, color="grey", lw=0.6)
    axes.set(
        xlabel="DP-after, minus the base's (percentage points)",
        ylabel="lost generation: log perplexity over the base's",
    )
    axes.set_title(f"{model}: r = {r:.2f}, 95 % interval {low:.2f} to {high:.2f}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure
