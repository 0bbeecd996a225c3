"""Encoders by what they cost: seven sets of STS beside lost perplexity, ours and published ones.

Perplexity is of the language model that the encoder was made from, read causally, over that of the
untouched model: the last point of the run's trajectory over its first.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from numpy import format_float_scientific

from studies.compare.blocks.cells import noted
from studies.compare.labels import spread
from studies.compare.published import published
from studies.compare.records import Records
from studies.compare.rows import is_tuned, perplexity_ratio, reads_causally
from ubmoe.report.tables import family, model_of
from ubmoe.results.records import Record

SETS = ("STS12", "STS13", "STS14", "STS15", "STS16", "STSB", "SICK-R")
FILES = {"STSB-test": "STSB", "STSBenchmark": "STSB", "SICK-R-test": "SICK-R"}
COSTS = ("lima", "wikitext2_valid")  # stems of the files that trajectories read
FORMS = {"eol": "EOL", "plain": "plain", "echo": "echo", "paper": "the paper's"}


def encoders_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """A row for each kind of encoder of a study, over its seeds; below them published ones."""
    del name  # the study, whose records these are
    rows: dict[tuple[str, ...], list[Record]] = {}
    for record in records.of("sts"):
        if record.seed in seeds and scores_of(record):
            rows.setdefault(described(record), []).append(record)
    body = [
        [
            *row,
            str(len(runs)) if is_tuned(runs[0]) else "",
            *(
                spread([score for record in runs for score in scores_of(record, task)])
                for task in SETS
            ),
            average([scores_of(record, *SETS) for record in runs]),
            *(spread([one for record in runs for one in costs(record, text)]) for text in COSTS),
            extra(runs[0]),
            spread([record.data["seconds"] / 60 for record in runs]),
        ]
        for row, runs in sorted(rows.items(), key=lambda item: (item[0][0], is_tuned(item[1][0])))
    ]
    body = [[cell if cell != "not run" else "" for cell in row] for row in body]
    header = ["model", "read as", "tuned", "seeds", *SETS, "average"]
    return noted(
        [[*header, "LIMA", "WikiText-2", "extra (%)", "minutes"], *body, *_published()], []
    )


def _published() -> list[list[str]]:
    """Their rows end before what was measured of ours alone."""
    return [
        [
            *(row["model"], row["form"], f"published: {row['source']}", ""),
            *(f"{score:.2f}" for score in row["scores"]),
            *(f"{mean(row['scores']):.2f}", "", "", "", ""),
        ]
        for row in published("sts")["sts"]["rows"]
    ]


def described(record: Record) -> tuple[str, str, str]:
    """Its model, how a text is read, and what was tuned."""
    bi = record.config["bi"]
    form = FORMS.get(bi.get("form") or "", bi.get("prompt") or "plain")
    white = bi.get("whiten")
    removed = {None: "", "whiten": ", whitened"}.get(white and white["remove"], ", centred")
    return model_of(record.data), f"{form}, {mask(bi)}{removed}", tuned(record)


def mask(bi: dict[str, Any]) -> str:
    """The mask that an encoder is read under."""
    if reads_causally(bi):
        return "causal"
    layers = bi.get("layers", "all")
    named = {"all": "bidirectional"}.get(str(layers)) or "bidirectional in layers " + (
        " ".join(f"{word} {number}" for word, number in layers.items())
        if isinstance(layers, dict)
        else ", ".join(map(str, layers))
    )
    return named + (", sink kept" if bi.get("keep_sink") else "")


def tuned(record: Record) -> str:
    """The modules, steps and rates; nothing where nothing was."""
    stages = record.config["bi"]["stages"]
    if not is_tuned(record):
        return ""
    what = family(record.data).removesuffix(" causal").partition(",")[0]
    rates = [format_float_scientific(s["learning_rate"], trim="-", exp_digits=1) for s in stages]
    steps = [f"{s['max_steps']} steps at {rate}" for s, rate in zip(stages, rates, strict=True)]
    return f"{what}, {' and '.join(steps)}"


def extra(record: Record) -> str:
    """Trained numbers in percent of the model's: what the encoder needs beside it."""
    if not is_tuned(record):
        return ""
    stages = record.section["stages"]
    trained = max(sum(stage.get("trainable", {}).values()) for stage in stages)
    return f"{100 * trained / record.data['environment']['parameters']:.1f}"


def scores_of(record: Record, *tasks: str) -> list[float]:
    """Those of these sets that the record has, or of all seven."""
    scores = {FILES.get(stem, stem): value for stem, value in _by_stem(record).items()}
    return [scores[task] for task in tasks or SETS if task in scores]


def _by_stem(record: Record) -> dict[str, float]:
    """A local file that has the name of a task of mteb is called by its folder, too."""
    return {Path(task).name: score for task, score in record.section["tasks"].items()}


def average(every: Sequence[Sequence[float]]) -> str:
    """Over the seven sets, of the runs that have them all."""
    return spread([mean(scores) for scores in every if len(scores) == len(SETS)])


def costs(record: Record, text: str) -> list[float]:
    """The last perplexity of a trajectory over its first, of one text; or none."""
    points = record.section.get("trajectory", [])
    return (
        [perplexity_ratio(points, -1, text)] if points and text in points[-1]["perplexity"] else []
    )
