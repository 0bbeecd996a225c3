"""A picture of what embedding costs in generation, of every model of a study.

From the records alone. The plane has a point for every model: STS average to the right (a mixture
reads bidirectionally for it, an encoder as it was tuned), generation upwards, and its Pareto front.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import geometric_mean, mean, stdev
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

from studies.compare import claim, fronts, norms, runs, sink, steps, swapped
from studies.compare.probed import of_context, probings
from studies.compare.records import Records
from studies.compare.rows import Cells, RunRow, common_tasks, main_metrics, run_rows
from studies.compare.shifted import shifted
from ubmoe import owned
from ubmoe.config import Config, UserError
from ubmoe.files import replace_all, save_figure
from ubmoe.report.figures import blank, context, shift, styled
from ubmoe.report.tables import model_of

log = logging.getLogger(__name__)
NO_MIXTURES = ("uni", "bi")  # routes: the two models themselves, forced


@dataclass
class Point:
    """A model of the study, a value for each seed: STS average, tasks' average, perplexity.

    Averages are of the tasks that all models have which have any.

    STS is under the mask of tuning. is_control: tuned causally, or a mixture with such an expert.
    """

    kind: str
    is_control: bool = False
    sts: list[float] = field(default_factory=list)
    tasks: list[float] = field(default_factory=list)
    perplexity: list[float] = field(default_factory=list)

    def add(self, *values: float | None) -> None:
        for known, value in zip((self.sts, self.tasks, self.perplexity), values, strict=True):
            if value is not None:
                known.append(value)


def points(model: str, records: Records, seeds: Sequence[int]) -> dict[str, Point]:
    """Every model of the study that both uses were scored of, by its row's name."""
    placed: dict[str, Point] = {}
    encoders = [
        run
        for run in run_rows("encoders", model, records, seeds)
        if run.tasks and "perplexity" in run.measures and not run.has_collapsed
    ]
    mixtures = [
        run
        for run in run_rows("routes", model, records, seeds)
        if _sts_of(run) in run.measures and run.route not in NO_MIXTURES
    ]
    common = common_tasks(encoders)
    asked = [own for run in (*encoders, *mixtures) if (own := _asked(run))]
    tasks = set.intersection(*(set(scores) for scores in asked)) if asked else set()
    for run in encoders if common else ():
        kind = "base" if run.is_base else "encoder"
        point = placed.setdefault(run.row, Point(kind, run.is_control))
        point.add(run.mean(common), _average(run, tasks), run.measures["perplexity"])
    for run in mixtures:
        point = placed.setdefault(run.row, Point("mixture", run.is_control))
        point.add(run.measures[_sts_of(run)], _average(run, tasks), run.measures["perplexity"])
    return placed


def _sts_of(mixture: RunRow) -> str:
    """The column of its STS as it is meant to read: as its tuned expert was."""
    return f"STS {mixture.record.section.get('bi_attention', 'bidirectional')}"


def _asked(run: RunRow) -> Cells:
    """{generation task: score} of an encoder read causally, or of a mixture."""
    if (evaluated := run.measured("evaluation")) is not None:
        again = evaluated.data["generation"]
        return main_metrics(again, again["metrics"])
    return run.scores if run.role == "mixture" else {}


def _average(run: RunRow, tasks: set[str]) -> float | None:
    scores = [value for name, value in _asked(run).items() if name in tasks and value is not None]
    return mean(scores) if scores else None


def front(pairs: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that none surpasses in both, by the first coordinate."""
    order = sorted(range(len(pairs)), key=lambda index: (-pairs[index][0], -pairs[index][1]))
    best, best_indices = -math.inf, []
    for index in order:
        if pairs[index][1] > best:
            best = pairs[index][1]
            best_indices.append(index)
    return best_indices[::-1]


# --- pictures -------------------------------------------------------------------------------------


def draw(config: Config, records: Records) -> str:
    """Write the pictures of the study to output_dir, as the records give.

    Returns their paths. Raises UserError.
    """
    model, seeds = model_of({"config": config.model_dump()}), config.results.seeds
    placed, encoded = points(model, records, seeds), claim.tuned(model, records, seeds)
    scored, measured = fronts.of_model(model, records), norms.by_model(records)
    if len(placed) < 2 and not scored:
        raise UserError(
            f"{config.results.directory}: {len(placed)} models of {model} with STS and generation, "
            "none with a trajectory; results.table=all makes them, with python -m ubmoe.results run"
        )
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {}
    rows = {encoder.settings for encoder in encoded}
    compared = sink.with_controls(sink.measured(model, records, seeds))
    swaps = swapped.swapped(model, records, seeds)
    shifts = shifted(model, records, seeds)
    longer = steps.by_steps(model, records, seeds)
    known = of_context(probings(model, records, seeds))
    pairs = runs.pairs(model, records, seeds)
    comparable = [
        pair for of_kind in pairs.values() for pair in of_kind if pair.cells.keys() > {runs.GAP}
    ]
    for name, least, count, drawn in (
        ("tradeoff.png", 2, len(placed), partial(plane_figure, model, placed)),
        ("fronts.png", 1, len(scored), partial(fronts.figure, model, scored)),
        ("norms.png", 1, len(measured), partial(norms.figure, measured)),
        ("claim.png", 3, len(rows), partial(claim.figure, model, encoded)),
        ("masks.png", runs.MIN_PAIRS, len(comparable), partial(runs.figure, model, pairs)),
        ("sink.png", 3, len(compared), partial(sink.figure, model, compared)),
        ("swaps.png", 1, len(swaps), partial(swapped.figure, model, swaps)),
        ("shifts.png", 1, len(shifts), partial(shift, shifts)),
        ("steps.png", 1, len(longer), partial(steps.figure, model, longer)),
        ("words.png", 2, len(known), partial(context, [*chain(*known)], model)),
    ):
        if count >= least:
            figures[name] = drawn()
        else:
            if owned.is_ours(folder / name):
                (folder / name).unlink()  # of other records
            log.info("%s: not drawn, of %d rows with what it shows", name, count)
    owned.check(*(folder / name for name in figures))
    replace_all({folder / name: partial(save_figure, drawn) for name, drawn in figures.items()})
    return "\n".join(str(folder / name) for name in figures)


PANELS = {
    "tasks": "generation, average of the tasks that all have (%)",
    "perplexity": "perplexity (better: up)",
}
COLOURS = {"base": "black", "encoder": "C0", "mixture": "C1"}


@styled
def plane_figure(model: str, placed: dict[str, Point]) -> Any:
    """A panel for the average of the tasks, and one for the perplexity (downwards is worse).

    Those that any model besides the base has. Hollow: tuned under the causal mask. The models of
    the Pareto front are numbered; the tables name all.
    """
    others = [point for point in placed.values() if point.kind != "base"] or [*placed.values()]
    panels = {
        what: label
        for what, label in PANELS.items()
        if any(getattr(point, what) for point in others)
    }
    figure = blank(0.8 + 4.2 * len(panels), 5.2)
    every = figure.subplots(1, len(panels), squeeze=False)[0]
    numbers: dict[str, int] = {}  # of the models of a front
    for axes, (what, label) in zip(every, panels.items(), strict=True):
        if what == "perplexity":
            axes.set_yscale("log")
            axes.invert_yaxis()
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.set(xlabel="STS under the mask of tuning", ylabel=label)
        _plane(axes, placed, what, numbers)
    named = [Line2D([], [], ls="", label=f"{n} {name}") for name, n in numbers.items()]
    keys = [*_kinds(placed), *named]
    figure.legend(handles=keys, loc="outside lower center", ncols=2 if len(keys) > 8 else 4)
    figure.suptitle(f"{model}: embedding against generation; dashed: Pareto front", fontsize=10)
    return figure


def _kinds(placed: dict[str, Point]) -> list[Any]:
    """A key for each kind of model that is there, and for the causal mask."""
    look: Any = {"marker": "o", "ms": 4, "ls": ""}
    kinds = dict.fromkeys(point.kind for point in placed.values())
    keys = [Line2D([], [], color=COLOURS[kind], label=kind, **look) for kind in kinds]
    if any(point.is_control for point in placed.values()):
        hollow = {"color": "grey", "mfc": "white", "label": "tuned under the causal mask"}
        keys.append(Line2D([], [], **look | hollow))
    return keys


def _plane(axes: Any, placed: dict[str, Point], what: str, numbers: dict[str, int]) -> None:
    """Points with the spread over their seeds, and their front, its models numbered."""
    pairs, best = _front(placed, what)
    axes.plot(*zip(*(pairs[name] for name in best), strict=True), color="grey", lw=1, ls="--")
    for name, (x, y) in pairs.items():
        point = placed[name]
        axes.errorbar(
            *(x, y, _error(getattr(point, what), what), _error(point.sts)),
            fmt="o", ms=4, lw=0.8, color=COLOURS[point.kind],
            mfc="white" if point.is_control else None,
        )  # fmt: skip
    axes.autoscale_view()  # now, so that places are final
    edge = [pairs[name] for name in best]
    fractions = axes.transLimits.transform(axes.transScale.transform(edge))
    for together in close(fractions, NEAR):
        text = ", ".join(
            str(numbers.setdefault(best[number], len(numbers) + 1)) for number in together
        )
        place = edge[together[-1]]
        axes.annotate(text, place, (4, 3), textcoords="offset points", fontsize=8)


def _front(placed: dict[str, Point], what: str) -> tuple[dict[str, tuple[float, float]], list[str]]:
    """The points of a panel, and the names of those that none surpasses in both."""
    shown = {name: point for name, point in placed.items() if getattr(point, what)}
    pairs = {
        name: (mean(point.sts), _middle(getattr(point, what), what))
        for name, point in shown.items()
    }
    sign = 1 if what == "tasks" else -1
    names = list(pairs)
    return pairs, [names[index] for index in front([(x, sign * y) for x, y in pairs.values()])]


NEAR = 0.05  # of the width or height of a panel: labels of such points would overlap


def close(points: Sequence[tuple[float, float]], near: float) -> list[list[int]]:
    """Indices of points that share a label: each within `near`, in both coordinates, of the next.

    In the order of the first coordinate.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(points)), key=lambda run: points[run][0]):
        for group in groups:
            last = points[group[-1]]
            if max(abs(a - b) for a, b in zip(points[index], last, strict=True)) <= near:
                group.append(index)
                break
        else:
            groups.append([index])
    return groups


def _middle(values: list[float], what: str) -> float:
    """The mean; of perplexities the geometric one, as their axis is."""
    return geometric_mean(values) if what == "perplexity" else mean(values)


def _error(values: list[float], what: str = "") -> Any:
    """The standard deviation over seeds; of perplexities that of their logs, down and up."""
    if len(values) < 2:
        return None
    if what != "perplexity":
        return stdev(values)
    middle, factor = geometric_mean(values), math.exp(stdev(map(math.log, values)))
    return [[middle - middle / factor], [middle * factor - middle]]
