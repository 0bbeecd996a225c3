"""The generated tables of README.md, from the records."""

import re
from collections.abc import Iterable
from typing import Any

from ubmoe import paper
from ubmoe.published import published
from ubmoe.tables import (
    ROUTES,
    dependence_caption,
    dependence_rows,
    markdown,
    mixed,
    model_of,
    probed,
    probes_caption,
    probing_rows,
    spread,
    variant,
)


def renewed(text: str, records: dict[str, dict[str, Any]]) -> str:
    """The text with every block between `<!-- kind: name -->` and `<!-- end -->` made anew."""

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}\n{BLOCKS[match[2]](match[3], records)}\n<!-- end -->"

    return re.sub(r"(<!-- (\w+): ([\w.-]+) -->)\n.*?<!-- end -->", block, text, flags=re.DOTALL)


def _dependence_block(name: str, records: dict[str, dict[str, Any]]) -> str:
    found = [record for key, record in records.items() if key.startswith(f"{name}.dependence.")]
    return "\n\n".join(
        f"{markdown(dependence_rows(record))}\n\n{dependence_caption(record)}" for record in found
    )


def _benchmark_block(name: str, records: dict[str, dict[str, Any]]) -> str:
    parts = []
    for key, record in sorted(records.items()):
        if key.startswith(f"benchmark.{name}."):
            rows = record["rows"]
            cells = [list(rows[0]), *([_number(value) for value in row.values()] for row in rows)]
            parts.append(f"On {record['device']}, torch {record['torch']}:\n\n{markdown(cells)}")
    return "\n\n".join(parts)


def _sts_block(name: str, records: dict[str, dict[str, Any]]) -> str:
    """A row for what was trained on a model, over its seeds: STS by task, DP-after if measured.

    Where it was read causally again, the perplexity of that, too.
    """
    scores = paper.ours(2, name, records)
    after: dict[str, dict[Any, float]] = {}
    for row, record in paper.dependences(name, records):
        seed = None if row == "base" else record["config"]["seed"]
        after.setdefault(row, {})[seed] = record["dependence"]["overall"]["after"]
    again = _perplexities(name, records)
    order = sorted(scores, key=lambda row: (row != "base", row.count(" "), row))
    columns = list(scores[order[0]])
    body = [
        [
            row,
            str(len(scores[row]["average"])),
            *(spread(list(scores[row][column].values())) for column in columns),
            spread(list(after.get(row, {}).values())),
            *([spread(again.get(row, []))] if again else []),
        ]
        for row in order
    ]
    header = ["trained", "seeds", *columns, "DP-after", *(["perplexity"] if again else [])]
    return _noted([header, *body], paper.notes(paper.ENTRIES[2](name, records)))


def _perplexities(name: str, records: dict[str, dict[str, Any]]) -> dict[str, list[float]]:
    """Of what train_bi.py tuned, read causally; the base has no seeds."""
    found: dict[str, dict[Any, float]] = {}
    for entry, record, cells in paper.read_again(name, records):
        row = entry.removesuffix(paper.ENCODER)
        seed = None if row == "base" else record["config"]["seed"]
        if (perplexity := cells["perplexity"]) is not None:
            found.setdefault(row, {})[seed] = perplexity
    return {row: list(seeds.values()) for row, seeds in found.items()}


def _mixture_block(name: str, records: dict[str, dict[str, Any]]) -> str:
    """A row for each route and router of a model's mixtures, over the seeds.

    Generation under the causal mask, STS (the average) under both.
    """
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for _, record in paper.mixtures(name, records):
        for route, scores in record["generation"]["routes"].items():
            seeds = rows.setdefault(mixed(record, route), {})
            seeds[record["config"]["seed"]] = {"scores": scores, "sts": _sts_of(record, route)}
        metrics = record["generation"]["metrics"]
    body = [_mixture_row(label, list(rows[label].values()), metrics) for label in _ordered(rows)]
    header = ["generates with", "seeds", *metrics, "perplexity", "STS bidirectional", "STS causal"]
    return _noted([header, *body], paper.notes(paper.by_route(name, records)))


def _noted(rows: list[list[str]], notes: list[str]) -> str:
    """A table, and below it a paragraph of notes."""
    return "\n".join([markdown(rows), *([""] if notes else []), *notes])


def _ordered(labels: Iterable[str]) -> list[str]:
    """Forced routes in their order, then learned ones; with a causally tuned expert, last."""
    forced = {label: place for place, label in enumerate(ROUTES.values())}
    place = {label: forced.get(label.partition(", causal")[0], len(forced)) for label in labels}
    return sorted(place, key=lambda label: (", causal" in label, place[label], label))


def _sts_of(record: dict[str, Any], route: str) -> dict[str, float]:
    return {row["attention"]: row["average"] for row in record["sts"] if row["route"] == route}


def _mixture_row(label: str, seeds: list[dict[str, Any]], metrics: dict[str, str]) -> list[str]:
    columns = [
        *(
            [each["scores"]["tasks"].get(task, {}).get(metric) for each in seeds]
            for task, metric in metrics.items()
        ),
        [each["scores"]["perplexity"] for each in seeds],
        *([each["sts"].get(mask) for each in seeds] for mask in ("bidirectional", "causal")),
    ]
    cells = [spread([value for value in column if value is not None]) for column in columns]
    return [label, str(len(seeds)), *cells]


def _bitune_block(name: str, records: dict[str, dict[str, Any]]) -> str:
    """A row for each variant on a model, over its seeds, beside the paper's averages."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for record in records.values():
        if "bitune" in record and model_of(record) == name:
            runs.setdefault(variant(record), []).append(record["bitune"])
    ablations = published("bitune")["ablations"]
    theirs = {row["method"]: row["scores"] for row in ablations["rows"]}
    metrics = next(iter(runs.values()))[0]["metrics"]
    rows = []
    for method in theirs:
        if seeds := runs.get(method, []):
            tasks = [
                spread([each["tasks"][task][metric] for each in seeds])
                for task, metric in metrics.items()
            ]
            perplexity = spread([each["perplexity"] for each in seeds])
            printed = [f"{score:.1f}" for score in theirs[method]]
            rows.append([method, str(len(seeds)), perplexity, *tasks, *printed])
    printed = [f"published average, {column}" for column in ablations["columns"]]
    header = ["variant", "seeds", "perplexity", *metrics, *printed]
    return _noted([header, *rows], paper.notes(paper.by_variant(name, records)))


# The published column of a task, and where it stands.
PUBLISHED_PROBES = {
    "telicity": ("accuracy", "telicity"),
    "duration": ("accuracy", "duration"),
    "concreteness": ("concreteness", "spearman"),
    "sensorimotor": ("sensorimotor", "spearman"),
    "word in context (difference)": ("accuracy", "wic difference"),
    "word in context (cosine)": ("accuracy", "wic cosine"),
    "word in context (concatenation)": ("accuracy", "wic concatenation"),
}
PUBLISHED_FAMILY = "Llama-2-7B"


def _probing_block(name: str, records: dict[str, dict[str, Any]]) -> str:
    """A row a task and split, a column a model, published numbers in brackets.

    The published ones are of another family, at the same stage of training, and of the random or
    the shipped splits.
    """
    found = [record for key, record in records.items() if key.startswith(f"{name}.probing.")]
    return "\n\n".join(
        _probing_table(
            record["probing"]["models"], tiny=record["config"]["probing"]["data"] == "tiny"
        )
        for record in found
    )


def _probing_table(models: list[dict[str, Any]], tiny: bool) -> str:
    """tiny: the little language's own tasks, of which nothing is published."""

    def beside(row: dict[str, Any], label: str) -> str:
        if tiny or row["split"] == "lemma":
            return ""
        theirs = _published_probe(probed(row), row["probe"], label)
        return "" if theirs is None else f" ({theirs:.3f})"

    table = f"{markdown(probing_rows(models, 'accuracy', beside))}\n\n{probes_caption(models)}"
    return table if tiny else f"{table} In brackets: published for {PUBLISHED_FAMILY}."


def _published_probe(task: str, probe: str, label: str) -> float | None:
    feature, at, word = task.partition("@")
    if at and probe != "mlp":
        return None  # the context tasks are published for MLPs alone
    name, column = ("context", f"word {word}") if at else PUBLISHED_PROBES[task]
    found = published("feng")[name if at else f"{name}_{probe}"]
    for row in found["rows"]:
        own = (PUBLISHED_FAMILY, label, feature if at else None)
        if (row["model"], row["method"], row.get("task")) == own:
            return row["scores"][found["columns"].index(column)]
    return None


PAPER = {"sts": 2, "dependence": 3, "generation": 4}


def _paper_block(name: str, records: dict[str, dict[str, Any]]) -> str:
    """A table of the paper, for all of its models: ours and, in brackets, published and gap."""
    number = PAPER[name]
    every = [paper.columns(number, model, records) for model in paper.models()]
    shown = ["average"] if number == 2 else list(dict.fromkeys(sum(every, [])))
    parts = [(model, paper.rows(number, model, records, shown)) for model in paper.models()]
    header = ["model", *parts[0][1][0]]
    body = [[model, *row] for model, rows in parts for row in rows[1:]]
    notes = [
        note
        for model in paper.models()
        for found in (
            paper.notes(paper.ENTRIES[number](model, records)),
            paper.misprints(number, model),
        )
        for note in found
    ]
    return _noted([header, *body], notes)


def _number(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


BLOCKS = {
    "dependence": _dependence_block,
    "sts": _sts_block,
    "mixture": _mixture_block,
    "bitune": _bitune_block,
    "probing": _probing_block,
    "benchmark": _benchmark_block,
    "paper": _paper_block,
}
