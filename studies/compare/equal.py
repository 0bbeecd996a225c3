"""Runs compared where they embed equally well: what perplexity one costs over another.

A front is the path of a run through similarity and lost perplexity, straight between the points of
its trajectory. The log of the perplexity over the untrained model's is what is lost.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean
from typing import Any

from studies.compare.records import Records
from studies.compare.rows import perplexity_ratio, reads_causally
from studies.compare.runs import MeanWithCI
from ubmoe.results.records import Record

EQUAL = math.log(1.1)  # of lost perplexity, within which two fronts are the same
Front = Sequence[tuple[float, float]]  # similarity and lost perplexity, the untrained point first

# What two runs may differ in, and which of them the other one is held against.
COMPARED: list[tuple[tuple[str, ...], Callable[[dict[str, Any]], bool]]] = [
    (("attention", "layers", "keep_sink"), reads_causally),
    (("train",), lambda bi: bi["stages"][0]["train"] == ["ffn"]),
    (("lm_weight", "lm_dataset"), lambda bi: not bi["stages"][0].get("lm_weight")),
]


@dataclass(frozen=True)
class Comparison:
    """Two rows, over the seeds that both have: one is held against the other.

    scores: the similarity of each seed where they are compared. lost: {text: for each seed the
    difference of what is lost there}.
    """

    row: str
    other: str
    scores: list[float]
    lost: dict[str, list[float]]

    def verdict(self, text: str) -> str:
        """By the 95 % interval over seeds: `differs` without 0, `equal` within EQUAL."""
        if (found := MeanWithCI.estimate(self.lost[text])) is None:
            return ""
        low, high = found.interval
        words = ["differs"] if low > 0 or high < 0 else []
        words += ["equal"] if low >= -EQUAL and high <= EQUAL else []
        return ", ".join(words) or "open"


def tuned_on_the_way(records: Records, seeds: Sequence[int]) -> list[Record]:
    """The runs that were scored on their way; noise, which has no steps, is none of them."""
    return [
        record
        for record in records.of("sts")
        if record.seed in seeds
        and len(points := record.section.get("trajectory", [])) > 1
        and points[-1]["step"]
    ]


def front(record: Record, text: str) -> Front:
    points = record.section["trajectory"]
    return [
        (point["sts"]["average"], math.log(perplexity_ratio(points, place, text)))
        for place, point in enumerate(points)
    ]


def lost_at(path: Front, score: float) -> float:
    """What is lost where the run first has this similarity; nan where it never has."""
    if path[0][0] >= score:
        return path[0][1]
    for (before, low), (after, high) in pairwise(path):
        if after >= score:
            return low + (high - low) * (score - before) / (after - before)
    return math.nan


def common_score(one: Front, other: Front) -> float | None:
    """The highest similarity that both reach; None where one begins above all of the other."""
    score = min(max(score for score, _ in path) for path in (one, other))
    return score if score >= max(one[0][0], other[0][0]) else None


def comparisons(records: Records, seeds: Sequence[int]) -> list[Comparison]:
    """Each row against the causal one, that of the FFN, and that without a language-model loss."""
    every = tuned_on_the_way(records, seeds)
    found: dict[tuple[str, str], list[tuple[Record, Record]]] = {}
    for names, is_other in COMPARED:
        others = {_rest(run, names): run for run in every if is_other(run.config["bi"])}
        for run in every:
            other = others.get(_rest(run, names))
            if other is not None and not is_other(run.config["bi"]):
                found.setdefault((_row(run), _row(other)), []).append((run, other))
    return [_comparison(*rows, pairs) for rows, pairs in found.items()]


def _comparison(row: str, other: str, pairs: Sequence[tuple[Record, Record]]) -> Comparison:
    """Of the pairs that reach a common similarity."""
    texts = list(pairs[0][0].section["trajectory"][0]["perplexity"])
    scores: list[float] = []
    lost: dict[str, list[float]] = {text: [] for text in texts}
    for pair in sorted(pairs, key=lambda pair: pair[0].seed or 0):
        paths = {text: [front(run, text) for run in pair] for text in texts}
        score = common_score(*paths[texts[0]])
        if score is not None:
            scores.append(score)
            for text, (one, two) in paths.items():
                lost[text].append(lost_at(one, score) - lost_at(two, score))
    return Comparison(row, other, scores, lost)


def _row(record: Record) -> str:
    return str(record.config["results"]["row"])


def _rest(record: Record, names: Sequence[str]) -> str:
    """Model, seed, and what `bi` says but for these names, in the section and in its stages."""
    bi = record.config["bi"]
    kept = {key: value for key, value in bi.items() if key not in (*names, "stages")}
    stages = [
        {key: value for key, value in stage.items() if key not in names} for stage in bi["stages"]
    ]
    return repr((record.config["model"]["name"], record.seed, sorted(kept.items()), stages))


def moved(runs: Sequence[Record]) -> dict[str, list[float]]:
    """{column: for each run the change from the untrained point to the last}, of attention.

    In percentage points; the weights' distance in percent.
    """
    columns: dict[str, list[float]] = {}
    for run in runs:
        start, *_, end = run.section["trajectory"]
        if "dependence" in end:
            for column, of_point in MOVED.items():
                change = of_point(end["dependence"]) - of_point(start["dependence"])
                columns.setdefault(column, []).append(change)
        columns.setdefault("weights moved (%)", []).append(100 * end["distance"])
    return columns


MOVED: dict[str, Callable[[dict[str, Any]], float]] = {
    "DP-after": lambda section: section["overall"]["after"],
    "first": lambda section: section["first"],
    "DP-after without the first key": lambda section: section["without_first"]["after"],
}


def cell(
    values: Sequence[float], form: str = "{:.2f}", of: Callable[[float], float] = float
) -> str:
    """The mean, with its 95 % interval over seeds where there are enough of them."""
    if not values:
        return ""
    found = MeanWithCI.estimate(values)
    text = form.format(of(found.value if found else mean(values)))
    ends = [form.format(of(end)) for end in found.interval] if found else []
    return f"{text} ({' to '.join(ends)})" if ends else text
