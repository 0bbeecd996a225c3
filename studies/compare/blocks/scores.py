"""Tables of what runs reached: DP, STS, generation, speed; and the paper's own."""

from collections.abc import Sequence
from typing import Any

from studies.compare import paper
from studies.compare.blocks.cells import average_of, measure_of, noted, score_of, task_names
from studies.compare.entries import Entry, base_first, by_row, common_tasks, first_measured
from studies.compare.published import published
from ubmoe.report.tables import (
    ROUTES,
    dependence_caption,
    dependence_rows,
    has_forms,
    markdown,
    scan_form_rows,
    scan_rows,
    spread,
    variant,
)
from ubmoe.results.records import Records

BEST = 12  # patterns of layers of a scan


def dependence_block(name: str, records: Records, _: Sequence[int]) -> str:
    return "\n\n".join(
        f"{markdown(dependence_rows(record.data))}\n\n{dependence_caption(record.data)}"
        for record in records.of("dependence", label=name)
    )


def benchmark_block(found: list[dict[str, Any]]) -> str:
    """A table for each device."""
    parts = []
    for each in found:
        rows = each["rows"]
        cells = [list(rows[0]), *([_number(value) for value in row.values()] for row in rows)]
        parts.append(f"On {each['device']}, torch {each['torch']}:\n\n{markdown(cells)}")
    return "\n\n".join(parts)


def sts_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """A row for what was trained on a model, over its seeds: STS by task, DP-after if measured.

    Where measured: what the first token gets, and the perplexity when read causally again.
    """
    rows = by_row("encoders", name, records, seeds)
    there = {name for row in rows.values() for each in row for name in each.measures}
    more = [name for name in ("first", "after without first", "perplexity") if name in there]
    tasks, common = task_names(rows), common_tasks([each for own in rows.values() for each in own])
    average = "average" if len(common) == len(tasks) else f"average of {', '.join(common)}"
    averages = [average] if len(common) > 1 else []
    body = [
        [
            *(row, str(len(own)), *(score_of(own, task) for task in tasks)),
            *(average_of(own, common) for _ in averages),
            *(measure_of(own, column) for column in ("DP-after", *more)),
        ]
        for row, own in sorted(rows.items(), key=lambda each: base_first(each[1]))
    ]
    header = ["trained", "seeds", *tasks, *averages, "DP-after", *more]
    return noted([header, *body], paper.notes("encoders", name, records, seeds))


def poolings_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """The first seed of every row that was scanned, under both masks with either pooling."""
    body = []
    for row, own in by_row("encoders", name, records, seeds).items():
        if (scan := first_measured(own, "scan", records)) is not None:
            none, every = scan.section["patterns"][:2]
            scores = [pattern[pool]["score"] for pattern in (every, none) for pool in POOLINGS]
            body.append([row, *(f"{score:.2f}" for score in scores)])
    header = ["trained", *(f"{mask}, {pool}" for mask in MASKS for pool in POOLINGS.values())]
    return noted([header, *body], [])


POOLINGS = {"mean": "mean", "weighted_mean": "weighted mean"}
MASKS = ("read both ways", "read causally")


def mixture_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """A row for each route and router of a model's mixtures, over the seeds.

    Generation under the causal mask, STS (the average) under both.
    """
    rows = by_row("routes", name, records, seeds)
    tasks, columns = task_names(rows), ["perplexity", "STS bidirectional", "STS causal"]
    body = [
        [
            *(row, str(len(own)), *(score_of(own, task) for task in tasks)),
            *(measure_of(own, column) for column in columns),
        ]
        for row, own in sorted(rows.items(), key=lambda each: _by_route(each[1][0]))
    ]
    header = ["generates with", "seeds", *tasks, *columns]
    return noted([header, *body], paper.notes("routes", name, records, seeds))


def scan_block(name: str, records: Records, _: Sequence[int]) -> str:
    """The best patterns of layers by plain mean, and none and all; weighted mean beside it."""
    return "\n\n".join(_scan_table(record.section) for record in records.of("scan", label=name))


def _scan_table(section: dict[str, Any]) -> str:
    caption = f"{section['pairs']} pairs of {section['task']}"
    if has_forms(section):
        return f"{caption}, Spearman x 100:\n\n{markdown(scan_form_rows(section, BEST))}"
    patterns = section["patterns"]
    ordered = sorted(patterns, key=lambda each: -each["mean"]["score"])
    shown = [each for each in ordered if each in ordered[:BEST] or each in patterns[:2]]
    columns = [scan_rows({"patterns": shown}, pooling) for pooling in ("mean", "weighted_mean")]
    weighted = {row[0]: row[1:] for row in columns[1][1:]}
    body = [[*row, *weighted[row[0]]] for row in columns[0][1:]]
    header = [*columns[0][0], "weighted mean", *columns[1][0][2:]]
    return f"{caption}:\n\n{markdown([header, *body])}"


def _by_route(entry: Entry) -> tuple[bool, int, str]:
    """Forced routes in their order, then learned ones; with a causally tuned expert, last.

    A study's own rows stand by their names.
    """
    is_named = entry.record.config.get("results", {}).get("row") and not entry.is_base
    forced = [] if is_named else list(ROUTES)
    place = forced.index(entry.route) if entry.route in forced else len(ROUTES)
    return entry.is_control, place, entry.row


def bitune_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """A row for each variant on a model, over its seeds, beside the paper's averages."""
    runs = by_row("bitune", name, records, seeds)
    ablations, columns = published("bitune")["ablations"], task_names(runs)
    printed = {
        row["method"]: [f"{score:.1f}" for score in row["scores"]] for row in ablations["rows"]
    }
    named = {variant(own[0].record.data): own for own in runs.values()}
    rows = []
    for method in [*(each for each in printed if each in named), *sorted(named.keys() - printed)]:
        own = named[method]
        perplexity = spread([each.record.section["perplexity"] for each in own])
        cells = [perplexity, *(score_of(own, column) for column in columns)]
        theirs = printed.get(method, [""] * len(ablations["columns"]))
        rows.append([method, str(len(own)), *cells, *theirs])
    heads = [f"published average, {column}" for column in ablations["columns"]]
    header = ["variant", "seeds", "perplexity", *columns, *heads]
    return noted([header, *rows], paper.notes("bitune", name, records, seeds))


PAPER = {"sts": 2, "dependence": 3, "generation": 4}


def paper_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """A table of the paper as it is printed, and the misprints in it.

    Ours stand beside them in what `python -m ubmoe.results table` prints.
    """
    table = published("ubmoe")[name]
    rows = [[row["model"], row["method"], *map(_printed, row["scores"])] for row in table["rows"]]
    notes = [note for model in paper.models() for note in paper.misprints(PAPER[name], model)]
    return noted([["model", "row", *table["columns"]], *rows], notes)


def _printed(score: Any) -> str:
    """A score, or the triple main, before, after."""
    return (
        " / ".join(f"{each:.2f}" for each in score) if isinstance(score, list) else f"{score:.2f}"
    )


def _number(value: Any) -> str:
    if value == "not run":
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)
