"""Tables of results: DP, STS, generation, speed; and the paper's own."""

from collections.abc import Sequence
from typing import Any

from studies.compare import paper
from studies.compare.blocks.cells import average_of, measure_of, noted, score_of, task_names
from studies.compare.labels import ROUTES, markdown, spread, variant
from studies.compare.published import published
from studies.compare.records import Records
from studies.compare.rows import RunRow, base_first, by_row, common_tasks, first_measured
from ubmoe.report.tables import (
    dependence_caption,
    dependence_rows,
    has_forms,
    scan_form_rows,
    scan_rows,
)

BEST = 12  # patterns of layers of a scan


def dependence_block(name: str, records: Records, _: Sequence[int]) -> str:
    return "\n\n".join(
        f"{markdown(dependence_rows(record.data))}\n\n{dependence_caption(record.data)}"
        for record in records.of("dependence", label=name)
    )


def benchmark_block(benchmarks: list[dict[str, Any]]) -> str:
    """A table for each device."""
    parts = []
    for benchmark in benchmarks:
        rows = benchmark["rows"]
        cells = [list(rows[0]), *([_number(value) for value in row.values()] for row in rows)]
        parts.append(f"On {benchmark['device']}, torch {benchmark['torch']}:\n\n{markdown(cells)}")
    return "\n\n".join(parts)


def sts_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """A row for what was trained on a model, over its seeds: STS by task, DP-after if measured.

    Where measured: what the first token gets, and the perplexity when read causally again.
    """
    rows = by_row("encoders", name, records, seeds)
    there = {name for row in rows.values() for run in row for name in run.measures}
    more = [name for name in ("first", "after without first", "perplexity") if name in there]
    tasks, common = task_names(rows), common_tasks([run for runs in rows.values() for run in runs])
    average = "average" if len(common) == len(tasks) else f"average of {', '.join(common)}"
    averages = [average] if len(common) > 1 else []
    body = [
        [
            *(row, str(len(runs)), *(score_of(runs, task) for task in tasks)),
            *(average_of(runs, common) for _ in averages),
            *(measure_of(runs, column) for column in ("DP-after", *more)),
        ]
        for row, runs in sorted(rows.items(), key=lambda item: base_first(item[1]))
    ]
    header = ["trained", "seeds", *tasks, *averages, "DP-after", *more]
    return noted([header, *body], paper.notes("encoders", name, records, seeds))


def poolings_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """The first seed of every row that was scanned, under both masks with either pooling."""
    body = []
    for row, runs in by_row("encoders", name, records, seeds).items():
        if (scan := first_measured(runs, "scan", records)) is not None:
            none, every = scan.section["patterns"][:2]
            scores = [pattern[pool]["score"] for pattern in (every, none) for pool in POOLINGS]
            body.append([row, *(f"{score:.2f}" for score in scores)])
    header = ["trained", *(f"{mask}, {pool}" for mask in MASKS for pool in POOLINGS.values())]
    return noted([header, *body], [])


POOLINGS = {"mean": "mean", "weighted_mean": "weighted mean"}
MASKS = ("read bidirectionally", "read causally")


def mixture_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """A row for each route and router of a model's mixtures, over the seeds.

    Generation under the causal mask, STS (the average) under both.
    """
    rows = by_row("routes", name, records, seeds)
    tasks, columns = task_names(rows), ["perplexity", "STS bidirectional", "STS causal"]
    body = [
        [
            *(row, str(len(runs)), *(score_of(runs, task) for task in tasks)),
            *(measure_of(runs, column) for column in columns),
        ]
        for row, runs in sorted(rows.items(), key=lambda item: _by_route(item[1][0]))
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
    ordered = sorted(patterns, key=lambda pattern: -pattern["mean"]["score"])
    shown = [pattern for pattern in ordered if pattern in ordered[:BEST] or pattern in patterns[:2]]
    columns = [scan_rows({"patterns": shown}, pooling) for pooling in ("mean", "weighted_mean")]
    weighted = {row[0]: row[1:] for row in columns[1][1:]}
    body = [[*row, *weighted[row[0]]] for row in columns[0][1:]]
    header = [*columns[0][0], "weighted mean", *columns[1][0][2:]]
    return f"{caption}:\n\n{markdown([header, *body])}"


def _by_route(run: RunRow) -> tuple[bool, int, str]:
    """Forced routes in their order, then learned ones; with a causally tuned expert, last.

    A study's own rows stand by their names.
    """
    is_named = run.record.config.get("results", {}).get("row") and not run.is_base
    forced = [] if is_named else list(ROUTES)
    place = forced.index(run.route) if run.route in forced else len(ROUTES)
    return run.is_control, place, run.row


def bitune_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """A row for each variant on a model, over its seeds, beside the paper's averages."""
    runs = by_row("bitune", name, records, seeds)
    ablations, columns = published("bitune")["ablations"], task_names(runs)
    printed = {
        row["method"]: [f"{score:.1f}" for score in row["scores"]] for row in ablations["rows"]
    }
    named = {variant(variant_runs[0].record.data): variant_runs for variant_runs in runs.values()}
    rows = []
    for method in [
        *(method for method in printed if method in named),
        *sorted(named.keys() - printed),
    ]:
        variant_runs = named[method]
        perplexity = spread([run.record.section["perplexity"] for run in variant_runs])
        cells = [perplexity, *(score_of(variant_runs, column) for column in columns)]
        theirs = printed.get(method, [""] * len(ablations["columns"]))
        rows.append([method, str(len(variant_runs)), *cells, *theirs])
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
        " / ".join(f"{value:.2f}" for value in score) if isinstance(score, list) else f"{score:.2f}"
    )


def _number(value: Any) -> str:
    if value == "not run":
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)
