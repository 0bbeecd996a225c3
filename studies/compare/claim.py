"""What lost generation goes along with: a picture, and rank correlations.

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

from studies.compare.entries import (
    MASK,
    SINK,
    Entry,
    but,
    common_tasks,
    controls_of,
    entries,
    reference,
)
from studies.compare.heads import HEADS, turned
from ubmoe.bootstrap import correlations, interval
from ubmoe.report.figures import PALETTE, blank, styled
from ubmoe.results.records import Records

FEWEST = 8  # rows of an interval, twins as one: of fewer, many draws are of three or four
MARKS = "osD^vPX"  # one more than there are colours, so that no two kinds look alike
PANELS = {"STS": "STS under its own mask"} | {
    cause: f"{cause}, minus the base's (percentage points)" for cause in SINK
}
PANELS |= {cause: f"{said} (percentage points)" for cause, said in HEADS.items()}
WIDTH = 48  # letters that a panel has room for below it
GAIN = "STS gained"
CAUSES = PANELS | {GAIN: "STS gained over the untrained model that reads alike"}
READS = ("attention", "layers", "keep_sink", "pooling")  # how an encoder reads


@dataclass(frozen=True)
class Tuned:
    """An encoder of one seed: how its dependence and its generation differ from the base's.

    settings: how it was tuned, the same for all of its seeds, whatever its row is called. lost: log
    of the perplexity over the base's. causes: those of CAUSES that were measured; STS is the mean
    of the tasks that all encoders have, under each one's own mask, the others are in percentage
    points. is_control: tuned under the causal mask, which the paper did not. by_answer: as `lost`,
    where each answer counts once; None where it was not recorded. run: the row that it is the
    causal control of, if any.
    """

    settings: str
    row: str
    lost: float
    causes: dict[str, float]
    is_control: bool = False
    by_answer: float | None = None
    run: str | None = None


def tuned(model: str, records: Records, seeds: Sequence[int]) -> list[Tuned]:
    """Every encoder whose dependence and generation were measured, on the base's chats."""
    every = entries("encoders", model, records, seeds)
    known = [each for each in every if {"DP-after", "perplexity"} <= each.measures.keys()]
    base = reference(known)
    if base is None:
        return []
    own = [each for each in known if each.has_learnt and each.chats == base.chats]
    common = common_tasks(own)
    untrained = [each for each in every if each.is_base and each.tasks >= set(common)]
    alike = {_reads(each): each.mean(common) for each in untrained if common}
    control_of = controls_of([own])
    return [
        replace(_tuned(each, base, common, alike.get(_reads(each))), run=control_of.get(each.row))
        for each in own
    ]


def _reads(entry: Entry) -> str:
    # older records lack what is false by default
    return json.dumps([entry.settings.get(name) or None for name in READS])


def _tuned(entry: Entry, base: Entry, common: Sequence[str], before: float | None) -> Tuned:
    cells, theirs = (cast(dict[str, float], each.measures) for each in (entry, base))
    there = [cause for cause in SINK if cause in cells and cause in theirs]
    causes = {cause: cells[cause] - theirs[cause] for cause in there}
    causes |= turned(*(each.measured("dependence") for each in (entry, base)))
    if common:
        causes["STS"] = entry.mean(common)
        causes |= {} if before is None else {GAIN: causes["STS"] - before}
    mine, other = (_nats(each) for each in (entry, base))
    return Tuned(
        settings=json.dumps(entry.settings, sort_keys=True),
        row=entry.row,
        lost=math.log(cells["perplexity"] / theirs["perplexity"]),
        causes=causes,
        is_control=entry.is_control,
        by_answer=None if mine is None or other is None else mine - other,
    )


def _nats(entry: Entry) -> float | None:
    """A token, the mean over answers, of which each counts once; None of an older record."""
    evaluated = entry.measured("evaluation")
    answers = evaluated and evaluated.data["generation"].get("answers")
    if not answers:
        return None
    return float(np.mean(np.divide(answers["losses"], answers["tokens"])))


def of_equal_steps(found: Sequence[Tuned]) -> list[Tuned]:
    """Those of the steps and learning rate that most rows have, of one stage without a LM loss.

    Rows that were tuned longer move more and lose more, so that over all rows much goes together.
    """
    groups: dict[tuple[Any, Any], list[Tuned]] = {}
    for each in found:
        stages = json.loads(each.settings).get("stages", [])
        if len(stages) == 1 and not stages[0].get("lm_weight"):
            far = stages[0].get("max_steps"), stages[0].get("learning_rate")
            groups.setdefault(far, []).append(each)
    return max(groups.values(), key=lambda own: len({each.settings for each in own}), default=[])


@dataclass(frozen=True)
class Correlation:
    """Of a cause and lost generation, with its 95 % interval; rows: how many points it is of.

    The interval is None where they are too few.
    """

    value: float
    interval: tuple[float, float] | None
    rows: int

    def __str__(self) -> str:
        ends = "" if self.interval is None else " ({:.2f} to {:.2f})".format(*self.interval)
        return f"{self.value:.2f}{ends}, n = {self.rows}"


def correlation(
    found: Sequence[Tuned], cause: str = "DP-after", by_answer: bool = False
) -> Correlation:
    """Spearman's, over rows; seeds of one row are one point, their mean.

    The interval draws a row and its twin together: they share seeds, and all but the mask.
    """
    rows = _by_settings(found, cause, by_answer)
    moved, lost = np.array([own.mean(0) for own in rows.values()]).T
    if np.ptp(moved) == 0 or np.ptp(lost) == 0:
        return Correlation(math.nan, None, len(rows))
    value = float(spearmanr(moved, lost).statistic)
    twins = [but(json.loads(each), MASK) for each in rows]
    if len(set(twins)) < FEWEST:
        return Correlation(value, None, len(rows))
    low, high = interval(correlations(moved, lost, families=twins))
    return Correlation(value, (low, high), len(rows))


def _by_settings(
    found: Sequence[Tuned], cause: str, by_answer: bool = False
) -> dict[str, np.ndarray]:
    """(seeds, 2) of a cause and lost generation, of each row, by its settings."""
    rows: dict[str, list[tuple[float, Any]]] = {}
    for each in found:
        lost = each.by_answer if by_answer else each.lost
        rows.setdefault(each.settings, []).append((each.causes[cause], lost))
    return {settings: np.array(own) for settings, own in rows.items()}


def over_seeds(found: Sequence[Tuned], cause: str = "DP-after") -> Correlation | None:
    """Of what the seeds of a row differ in, all rows as one: their own means are taken off first.

    Pearson's, with n - rows - 1 degrees of freedom, and Fisher's interval: the repeated-measures
    correlation of Bakdash and Marusich (2017), of the common slope within rows. None where they
    leave less than two.
    """
    several = [own for own in _by_settings(found, cause).values() if len(own) > 1]
    runs = sum(map(len, several))
    freedom = runs - len(several) - 1
    if freedom < 2:
        return None
    moved, lost = np.concatenate([own - own.mean(0) for own in several]).T
    value = float(np.corrcoef(moved, lost)[0, 1])
    half = NormalDist().inv_cdf(0.975) / math.sqrt(freedom - 1)
    with np.errstate(divide="ignore"):  # of 1 exactly
        low, high = np.tanh(np.arctanh(value) + [-half, half]).tolist()
    return Correlation(value, (low, high), runs)


@styled
def figure(model: str, encoded: list[Tuned]) -> Any:
    """Lost generation against STS, and each cause, of the encoders of which it was measured."""
    measured = {cause: [each for each in encoded if cause in each.causes] for cause in PANELS}
    measured = {cause: own for cause, own in measured.items() if own}
    lines = -(-len(measured) // 2)  # two a line, for the width of a page
    found = blank(1.8 + 4.2 * min(2, len(measured)), 0.6 + 3.5 * lines)
    grid = found.subplots(lines, min(2, len(measured)), sharey=True, squeeze=False)
    panels = list(grid.flat)
    looks = _looks({each.row: each.run or each.row for each in encoded})
    for axes, (cause, own) in zip(panels, measured.items(), strict=False):
        _panel(axes, own, cause, looks)
    for axes in panels[len(measured) :]:
        axes.remove()
    found.supylabel("lost generation: log perplexity over the base's", fontsize=9)
    named = [axes.get_legend_handles_labels() for axes in panels[: len(measured)]]
    found.legend(*max(named, key=lambda each: len(each[0])), loc="outside right center")
    found.suptitle(model, fontsize=10)
    return found


def _looks(rows: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The mark and colour of each row. rows: {row: itself, or the run that it controls}."""
    runs = list(dict.fromkeys(rows.values()))
    return {
        row: {"marker": MARKS[number % len(MARKS)], "color": PALETTE[number % len(PALETTE)]}
        for row, run in rows.items()
        for number in [runs.index(run)]
    }


def _panel(axes: Any, encoded: list[Tuned], cause: str, looks: dict[str, Any]) -> None:
    for row in (row for row in looks if any(each.row == row for each in encoded)):
        own = [each for each in encoded if each.row == row]
        fill = "none" if own[0].is_control else "full"
        told = [each.causes[cause] for each in own], [each.lost for each in own]
        axes.plot(*told, ls="", ms=5, label=row, fillstyle=fill, **looks[row])
    axes.axhline(0, color="grey", lw=0.6)
    if cause in SINK:
        axes.axvline(0, color="grey", lw=0.6)
    axes.set_xlabel(textwrap.fill(PANELS[cause], WIDTH), fontsize=9)
    own = [each for each in encoded if not each.is_control]
    text = f"rank correlation {correlation(encoded, cause)}"
    if own and len(own) < len(encoded):
        text += f"\ntuned bidirectionally alone {correlation(own, cause)}"
    axes.set_title(text, fontsize=8)
