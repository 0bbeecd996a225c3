"""Lost generation against its possible causes: a figure, and rank correlations.

From the records alone. The first panel has lost generation against STS, hollow under the causal
mask. The others test the paper's central claim: the more a tuned model attends to later tokens
(DP-after), the more of its generation is lost. Beside it, where they were measured, what goes to
the first token, DP-after without that key, and what single heads do.
"""

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, cast

import numpy as np
from scipy.stats import spearmanr

from studies.compare.heads import HEADS, head_changes
from studies.compare.records import Records
from studies.compare.rows import (
    MASK,
    SINK,
    RunRow,
    common_tasks,
    controls_of,
    reference,
    run_rows,
    settings_key,
)
from ubmoe.bootstrap import correlations, interval
from ubmoe.report.figures import PALETTE, blank, styled

MIN_ROWS = (
    8  # for an interval, a run and its control as one: of fewer, many draws hold three or four
)
MARKERS = "osD^vPX"  # one more than there are colours, so that no two kinds look alike
PANELS = {"STS": "STS under its own mask"} | {
    cause: f"{cause}, minus the base's (percentage points)" for cause in SINK
}
PANELS |= {cause: f"{said} (percentage points)" for cause, said in HEADS.items()}
WIDTH = 48  # letters that fit below a panel
GAIN = "STS gained"
CAUSES = PANELS | {GAIN: "STS gained over the untrained model that reads alike"}
READS = ("attention", "layers", "keep_sink", "pooling")  # how an encoder reads


@dataclass(frozen=True)
class Tuned:
    """An encoder of one seed: how its dependence and its generation differ from the base's.

    settings: how it was tuned, the same for all of its seeds, whatever its row is called. lost: log
    of the perplexity over the base's. causes: those of CAUSES that were measured; STS is the mean
    of the tasks that all encoders have, under each one's own mask, the others are in percentage
    points. is_control: tuned under the causal mask, which the paper did not. per_answer: as `lost`,
    where each answer counts once; None where it was not recorded. run: the row that it is the
    causal control of, if any.
    """

    settings: str
    row: str
    lost: float
    causes: dict[str, float]
    is_control: bool = False
    per_answer: float | None = None
    run: str | None = None


def tuned(model: str, records: Records, seeds: Sequence[int]) -> list[Tuned]:
    """Every encoder whose dependence and generation were measured, on the base's chats."""
    every = run_rows("encoders", model, records, seeds)
    known = [run for run in every if {"DP-after", "perplexity"} <= run.measures.keys()]
    base = reference(known)
    if base is None:
        return []
    learnt = [run for run in known if run.has_learnt and run.chats == base.chats]
    common = common_tasks(learnt)
    untrained = [run for run in every if run.is_base and run.tasks >= set(common)]
    alike = {_reads(run): run.mean(common) for run in untrained if common}
    control_of = controls_of([learnt])
    return [
        replace(_tuned(run, base, common, alike.get(_reads(run))), run=control_of.get(run.row))
        for run in learnt
    ]


def _reads(run: RunRow) -> str:
    # older records lack what is false by default
    return json.dumps([run.settings.get(name) or None for name in READS])


def _tuned(run: RunRow, base: RunRow, common: Sequence[str], before: float | None) -> Tuned:
    cells, theirs = (cast(dict[str, float], side.measures) for side in (run, base))
    there = [cause for cause in SINK if cause in cells and cause in theirs]
    causes = {cause: cells[cause] - theirs[cause] for cause in there}
    causes |= head_changes(*(side.measured("dependence") for side in (run, base)))
    if common:
        causes["STS"] = run.mean(common)
        causes |= {} if before is None else {GAIN: causes["STS"] - before}
    mine, other = (_nats(side) for side in (run, base))
    return Tuned(
        settings=json.dumps(run.settings, sort_keys=True),
        row=run.row,
        lost=math.log(cells["perplexity"] / theirs["perplexity"]),
        causes=causes,
        is_control=run.is_control,
        per_answer=None if mine is None or other is None else mine - other,
    )


def _nats(run: RunRow) -> float | None:
    """A token, the mean over answers, of which each counts once; None of an older record."""
    evaluated = run.measured("evaluation")
    answers = evaluated and evaluated.data["generation"].get("answers")
    if not answers:
        return None
    return float(np.mean(np.divide(answers["losses"], answers["tokens"])))


def of_equal_steps(encoders: Sequence[Tuned]) -> list[Tuned]:
    """Those of the steps and learning rate that most rows have, of one stage without a LM loss.

    Rows that were tuned longer move more and lose more, so that over all rows much is correlated.
    """
    groups: dict[tuple[Any, Any], list[Tuned]] = {}
    for encoder in encoders:
        stages = json.loads(encoder.settings).get("stages", [])
        if len(stages) == 1 and not stages[0].get("lm_weight"):
            far = stages[0].get("max_steps"), stages[0].get("learning_rate")
            groups.setdefault(far, []).append(encoder)
    return max(
        groups.values(), key=lambda group: len({encoder.settings for encoder in group}), default=[]
    )


@dataclass(frozen=True)
class Correlation:
    """Correlation of a cause with lost generation, its 95 % interval, and the number of points.

    The interval is None where they are too few.
    """

    value: float
    interval: tuple[float, float] | None
    rows: int

    def __str__(self) -> str:
        ends = "" if self.interval is None else " ({:.2f} to {:.2f})".format(*self.interval)
        return f"{self.value:.2f}{ends}, n = {self.rows}"


def correlation(
    encoders: Sequence[Tuned], cause: str = "DP-after", per_answer: bool = False
) -> Correlation:
    """Spearman's, over rows; seeds of one row are one point, their mean.

    The interval draws a row and its causal control together: they share seeds, and all but the
    mask.
    """
    rows = _by_settings(encoders, cause, per_answer)
    moved, lost = np.array([points.mean(0) for points in rows.values()]).T
    if np.ptp(moved) == 0 or np.ptp(lost) == 0:
        return Correlation(math.nan, None, len(rows))
    value = float(spearmanr(moved, lost).statistic)
    families = [settings_key(json.loads(settings), MASK) for settings in rows]
    if len(set(families)) < MIN_ROWS:
        return Correlation(value, None, len(rows))
    low, high = interval(correlations(moved, lost, families=families))
    return Correlation(value, (low, high), len(rows))


def _by_settings(
    encoders: Sequence[Tuned], cause: str, per_answer: bool = False
) -> dict[str, np.ndarray]:
    """(seeds, 2) of a cause and lost generation, of each row, by its settings."""
    rows: dict[str, list[tuple[float, Any]]] = {}
    for encoder in encoders:
        lost = encoder.per_answer if per_answer else encoder.lost
        rows.setdefault(encoder.settings, []).append((encoder.causes[cause], lost))
    return {settings: np.array(points) for settings, points in rows.items()}


def over_seeds(encoders: Sequence[Tuned], cause: str = "DP-after") -> Correlation | None:
    """Correlation within rows, over their seeds: each row's means are subtracted first.

    Pearson's, with n - rows - 1 degrees of freedom, and Fisher's interval: the repeated-measures
    correlation of Bakdash and Marusich (2017), of the common slope within rows. None where they
    leave less than two.
    """
    several = [points for points in _by_settings(encoders, cause).values() if len(points) > 1]
    runs = sum(map(len, several))
    freedom = runs - len(several) - 1
    if freedom < 2:
        return None
    moved, lost = np.concatenate([points - points.mean(0) for points in several]).T
    value = float(np.corrcoef(moved, lost)[0, 1])
    half = NormalDist().inv_cdf(0.975) / math.sqrt(freedom - 1)
    with np.errstate(divide="ignore"):  # of 1 exactly
        low, high = np.tanh(np.arctanh(value) + [-half, half]).tolist()
    return Correlation(value, (low, high), runs)


@styled
def figure(model: str, encoded: list[Tuned]) -> Any:
    """Lost generation against STS, and each cause, of the encoders of which it was measured."""
    measured = {
        cause: [encoder for encoder in encoded if cause in encoder.causes] for cause in PANELS
    }
    measured = {cause: shown for cause, shown in measured.items() if shown}
    lines = -(-len(measured) // 2)  # two a line, for the width of a page
    drawn = blank(1.8 + 4.2 * min(2, len(measured)), 0.6 + 3.5 * lines)
    grid = drawn.subplots(lines, min(2, len(measured)), sharey=True, squeeze=False)
    panels = list(grid.flat)
    looks = _looks({encoder.row: encoder.run or encoder.row for encoder in encoded})
    for axes, (cause, shown) in zip(panels, measured.items(), strict=False):
        _panel(axes, shown, cause, looks)
    for axes in panels[len(measured) :]:
        axes.remove()
    drawn.supylabel("lost generation: log perplexity over the base's", fontsize=9)
    named = [axes.get_legend_handles_labels() for axes in panels[: len(measured)]]
    drawn.legend(*max(named, key=lambda legend: len(legend[0])), loc="outside right center")
    drawn.suptitle(model, fontsize=10)
    return drawn


def _looks(rows: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The marker and colour of each row. rows: {row: itself, or the run that it controls}."""
    runs = list(dict.fromkeys(rows.values()))
    return {
        row: {"marker": MARKERS[number % len(MARKERS)], "color": PALETTE[number % len(PALETTE)]}
        for row, run in rows.items()
        for number in [runs.index(run)]
    }


def _panel(axes: Any, encoded: list[Tuned], cause: str, looks: dict[str, Any]) -> None:
    for row in (row for row in looks if any(encoder.row == row for encoder in encoded)):
        shown = [encoder for encoder in encoded if encoder.row == row]
        fill = "none" if shown[0].is_control else "full"
        points = [run.causes[cause] for run in shown], [run.lost for run in shown]
        axes.plot(*points, ls="", ms=5, label=row, fillstyle=fill, **looks[row])
    axes.axhline(0, color="grey", lw=0.6)
    if cause in SINK:
        axes.axvline(0, color="grey", lw=0.6)
    axes.set_xlabel(textwrap.fill(PANELS[cause], WIDTH), fontsize=9)
    shown = [encoder for encoder in encoded if not encoder.is_control]
    text = f"rank correlation {correlation(encoded, cause)}"
    if shown and len(shown) < len(encoded):
        text += f"\ntuned bidirectionally alone {correlation(shown, cause)}"
    axes.set_title(text, fontsize=8)
