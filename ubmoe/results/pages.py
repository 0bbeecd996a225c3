"""The generated tables of README.md and of the pages in docs/, from the records."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ubmoe.config import Config, UserError
from ubmoe.files import replace_all, write_text
from ubmoe.report.tables import (
    ROUTES,
    dependence_caption,
    dependence_rows,
    markdown,
    probed,
    probes_caption,
    probing_rows,
    scan_rows,
    spread,
)
from ubmoe.results import paired, paper
from ubmoe.results.entries import (
    NO_TASKS,
    SINK,
    Entry,
    base_first,
    by_row,
    common_tasks,
    first_measured,
)
from ubmoe.results.heads import HEADS
from ubmoe.results.probed import probings
from ubmoe.results.published import published
from ubmoe.results.records import Records, read_benchmarks, recorded

BLOCK = re.compile(r"(<!-- (\w+): ([\w.-]+)(?: seeds ([\d ]+))? -->)\n.*?<!-- end -->", re.DOTALL)
BEST = 12  # patterns of layers of a scan


def renew(config: Config) -> str:
    """Renew the generated tables of every page from the recorded results of `results.seeds`."""
    records, benchmarks = recorded(config), read_benchmarks(config)
    pages = [Path("README.md"), *sorted(Path("docs").glob("*.md"))]
    texts = {
        page: renewed(page.read_text(encoding="utf-8"), records, config.results.seeds, benchmarks)
        for page in pages
    }
    replace_all({page: partial(write_text, text=text) for page, text in texts.items()})
    return "\n".join(map(str, pages))


def renewed(
    text: str,
    records: Records,
    seeds: Sequence[int],
    benchmarks: Mapping[str, list[dict[str, Any]]] = MappingProxyType({}),
) -> str:
    """The text with every block between `<!-- kind: name -->` and `<!-- end -->` made anew.

    seeds: those whose runs are averaged, where a block does not say its own. Raises UserError for a
    block without any record.
    """

    def block(match: re.Match[str]) -> str:
        heading, kind, name, said = match.groups()
        own = [int(each) for each in said.split()] if said else seeds
        made = (
            _benchmark_block(benchmarks.get(name, []))
            if kind == "benchmark"
            else BLOCKS[kind](name, records, own)
        )
        if not made:
            raise UserError(
                f"results.directory: no records of seeds {', '.join(map(str, own))} for the "
                f"block {kind}: {name}"
            )
        return f"{heading}\n{made}\n<!-- end -->"

    return BLOCK.sub(block, text)


def _dependence_block(name: str, records: Records, _: Sequence[int]) -> str:
    return "\n\n".join(
        f"{markdown(dependence_rows(record.data))}\n\n{dependence_caption(record.data)}"
        for record in records.of("dependence", label=name)
    )


def _benchmark_block(found: list[dict[str, Any]]) -> str:
    """A table for each device."""
    parts = []
    for each in found:
        rows = each["rows"]
        cells = [list(rows[0]), *([_number(value) for value in row.values()] for row in rows)]
        parts.append(f"On {each['device']}, torch {each['torch']}:\n\n{markdown(cells)}")
    return "\n\n".join(parts)


def _column(every: Iterable[Entry], name: str) -> str:
    """Empty where there is nothing: a page shows what was measured."""
    values = [value for each in every if (value := each.cells.get(name)) is not None]
    return spread(values) if values else ""


def _average(every: Iterable[Entry], tasks: Sequence[str]) -> str:
    """Of these tasks, which all rows have."""
    return spread([each.mean(tasks) for each in every])


def _names(rows: dict[str, list[Entry]]) -> list[str]:
    """The columns that are tasks."""
    every = (name for row in rows.values() for each in row for name in each.cells)
    return [name for name in dict.fromkeys(every) if name not in NO_TASKS]


def _sts_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """A row for what was trained on a model, over its seeds: STS by task, DP-after if measured.

    Where measured: what the first token gets, and the perplexity when read causally again.
    """
    rows = by_row("encoders", name, records, seeds)
    there = {name for row in rows.values() for each in row for name in each.cells}
    more = [name for name in ("first", "after without first", "perplexity") if name in there]
    tasks, common = _names(rows), common_tasks([each for own in rows.values() for each in own])
    average = "average" if len(common) == len(tasks) else f"average of {', '.join(common)}"
    averages = [average] if len(common) > 1 else []
    body = [
        [
            *(row, str(len(own)), *(_column(own, task) for task in tasks)),
            *(_average(own, common) for _ in averages),
            *(_column(own, column) for column in ("DP-after", *more)),
        ]
        for row, own in sorted(rows.items(), key=lambda each: base_first(each[0]))
    ]
    header = ["trained", "seeds", *tasks, *averages, "DP-after", *more]
    return _noted([header, *body], paper.notes("encoders", name, records, seeds))


def _change_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """A row for what was trained on a model: its differences to the base, paired, with intervals.

    The STS tasks that all of the rows have as they are.
    """
    rows, found = by_row("encoders", name, records, seeds), paired.changes(name, records, seeds)
    tasks = common_tasks([each for row in found for each in rows[row]])
    columns = _differences("the base's", found.values())
    body = [
        [row, str(len(rows[row])), *(_column(rows[row], task) for task in tasks), *cells]
        for row, own in sorted(found.items())
        for cells in [[str(own.get(column) or "") for column in columns]]
    ]
    return _noted([["trained", "seeds", *tasks, *columns.values()], *body], [])


def _differences(whose: str, found: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The columns of paired differences, as the tables call them; further perplexities if any."""
    after, *rest = ((column, f"{column} minus {whose}") for column in SINK)
    ratios = {"perplexity": f"perplexity over {whose}", "by answer": "each answer once"}
    told = {name for cells in found for name, cell in cells.items() if cell is not None}
    further = sorted(each for each in told if each.startswith(paired.FURTHER))
    ratios |= {each: f"{each}, over {whose}" for each in further}
    return dict([*ratios.items(), after, (paired.BY_SINK, "of it by the sink's fall"), *rest])


def _twins_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """A row tuned both ways, against the same tuned causally: STS of each, and differences."""
    body, found = [], paired.twins(name, records, seeds)
    columns = _differences("its", [each.cells for each in found.values()])
    common = common_tasks([each for own in found.values() for each in (*own.both, *own.causal)])
    for row, own in sorted(found.items()):
        sts = [_average(each, common) if common else "" for each in (own.both, own.causal)]
        cells = [str(own.cells.get(column) or "") for column in columns]
        body.append([row, str(len(own.both)), *sts, *cells])
    header = ["tuned both ways", "seeds", "STS", "STS of its causal twin", *columns.values()]
    return _noted([header, *body], [])


def _layers_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """In how many layers tuning raises what, and what of it over layers is the sink's."""
    from ubmoe.results import sink  # imports matplotlib, which other blocks do not

    rows, body = sink.measured(name, records, seeds), []
    for row, moved in sink.layers(rows).items():
        rises = [f"{(each > 0).sum()} of {len(each)}" for each in (moved.after, moved.without)]
        body.append([row, str(len(rows[row])), *rises, f"{moved.explained:.2f}"])
    raised = [f"layers with more {each}" for each in ("DP-after", "after without first")]
    return _noted([["trained", "seeds", *raised, "R2 of the sink"], *body], [])


def _swap_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """Of every row that was swapped: what its layers cost together and alone, each answer once."""
    from ubmoe.results import swapped  # imports matplotlib, which other blocks do not

    body = []
    for row, own in swapped.swapped(name, records, seeds).items():
        whole, put, back = own.whole, own.changes("in"), own.changes("back")
        cells = [f"{each:+.2f}" for each in (whole, put.sum(), back.sum())]
        cells += [_largest(put), _largest(-back)]
        ranks = [own.with_after(word) for word in ("in", "back")]
        cells += ["" if rank is None else f"{rank:.2f}" for rank in ranks]
        body.append([row, str(own.section["chats"]), *cells])
    header = ["tuned", "chats", "nats a token over the model's", "sum of each layer put in"]
    header += ["sum of each put back", "dearest put in", "best put back"]
    header += [
        f"rank of DP-after with {each}, at equal depth" for each in ("cost put in", "saving")
    ]
    return _noted([header, *body], [])


def _largest(values: Any, count: int = 3) -> str:
    """The layers of the largest values, and these."""
    order = sorted(range(len(values)), key=lambda each: -values[each])[:count]
    return ", ".join(f"{each} ({values[each]:.2f})" for each in order)


def _questions_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """What each row changes of the base's tasks, and Bitune of its second causal set's."""
    tables = []
    for kind, against, said in (
        ("again", "base", "read causally"),
        ("bitune", "bitune, only_causal", "variant"),
    ):
        found = paired.questions(kind, against, name, records, seeds)
        tasks = list(dict.fromkeys(task for cells in found.values() for task in cells))
        body = [
            [row, *(str(cells[task] or "") for task in tasks)]
            for row, cells in sorted(found.items())
        ]
        header = [said, *(f"{task}, minus {against}'s" for task in tasks)]
        tables.append(_noted([header, *body], []))
    return "\n\n".join(filter(None, tables))


def _equal_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """Each row against the rows of the other mask that embed at least as well."""
    body = [
        [each.row, f"{each.sts:.2f}", each.other or "none", sts, str(each.ratio or "")]
        for each in sorted(paired.matches(name, records, seeds), key=lambda each: each.row)
        for sts in ["" if each.other_sts is None else f"{each.other_sts:.2f}"]
    ]
    header = [
        "trained",
        "STS",
        "of the other mask, nearest above",
        "its STS",
        "perplexity over its",
    ]
    return _noted([header, *body], [])


def _masks_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """Tuned both ways against causally, over pairs of runs: their mean, and at equal STS."""
    from ubmoe.results import runs  # imports matplotlib, which other blocks do not

    kinds = runs.pairs(name, records, seeds)
    found = [each.cells for own in kinds.values() for each in own]
    columns = {runs.GAP: "STS minus its"} | _differences("its", found)
    lengths = [each for cells in found for each in cells if paired.BY_LENGTH in each]
    columns |= {each: f"{each}, over its" for each in lengths}
    columns |= _head_columns(found, ", minus its") | _tasks("its", found)
    if not kinds:
        return ""
    table = [["tuned both ways against its causal twin", *columns.values()]]
    for kind, own in kinds.items():
        for equal in (False, True):
            means = [_over(runs.over_runs(own, each, equal), len(own)) for each in columns]
            said = "at equal STS" if equal else f"{kind}, {len(own)} pairs of runs"
            table += [[said, *means]] if any(means) else []
    transposed = [list(measure) for measure in zip(*table, strict=True) if any(measure[1:])]
    return _noted(transposed, [])


def _runs_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """Of every kind of run, by its mask: what tuning changes of the base, over runs."""
    from ubmoe.results import runs  # imports matplotlib, which other blocks do not

    kinds = runs.changes(name, records, seeds)
    found = [each.cells for own in kinds.values() for each in own]
    columns = _differences("the base's", found)
    columns |= _head_columns(found) | _tasks("the base's", found)
    body = [
        [kind, str(len(own)), *(_over(runs.over_runs(own, column), len(own)) for column in columns)]
        for kind, own in kinds.items()
    ]
    body = [row for row in body if any(row[2:])]
    return _noted([["tuned", "runs", *columns.values()], *body], [])


def _head_columns(found: Iterable[Mapping[str, Any]], against: str = "") -> dict[str, str]:
    """The columns of what single heads do, as tables call them; they are changes of the base."""
    told = {column for cells in found for column in cells}
    return {each: f"{said}{against}" for each, said in HEADS.items() if each in told}


def _tasks(whose: str, found: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The columns of generation tasks, as tables call them."""
    told = [column for cells in found for column in cells if column.endswith(paired.ASKED)]
    return {each: f"{each.removesuffix(paired.ASKED)} minus {whose}" for each in told}


def _over(found: Any, every: int) -> str:
    """A mean over runs, and of how many where not all of them tell it."""
    if found is None:
        return ""
    return f"{found}, n = {found.runs}" if found.runs < every else str(found)


def _claim_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """Correlations of lost generation, over all rows, over those of one mask, and over seeds."""
    from ubmoe.results import claim  # imports matplotlib, which other blocks do not

    def cell(own: list[claim.Tuned], cause: str, by_answer: bool = False) -> str:
        if len({each.settings for each in own}) < 3:
            return ""
        return str(claim.correlation(own, cause, by_answer))

    found = claim.tuned(name, records, seeds)
    body = []
    for cause, label in claim.CAUSES.items():
        known = [each for each in found if cause in each.causes]
        told = [each for each in known if each.by_answer is not None]
        masks = [[each for each in known if each.is_control is causal] for causal in (False, True)]
        cells = [*(cell(own, cause) for own in (known, *masks)), cell(told, cause, by_answer=True)]
        cells += [cell(claim.of_equal_steps(known), cause)]
        cells.append(str(claim.over_seeds(known, cause) or ""))
        body += [[label, *cells]] if known else []
    header = ["lost generation goes along with", "all rows", "tuned both ways", "tuned causally"]
    header += ["all rows, each answer once", "rows of equal steps"]
    header += ["over the seeds of a row, all rows as one"]
    return _noted([header, *body], [])


def _poolings_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """The first seed of every row that was scanned, under both masks with either pooling."""
    body = []
    for row, own in by_row("encoders", name, records, seeds).items():
        if (scan := first_measured(own, "scan", records)) is not None:
            none, every = scan.section["patterns"][:2]
            scores = [pattern[pool]["score"] for pattern in (every, none) for pool in POOLINGS]
            body.append([row, *(f"{score:.2f}" for score in scores)])
    header = ["trained", *(f"{mask}, {pool}" for mask in MASKS for pool in POOLINGS.values())]
    return _noted([header, *body], [])


POOLINGS = {"mean": "mean", "weighted_mean": "weighted mean"}
MASKS = ("read both ways", "read causally")


def _mixture_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """A row for each route and router of a model's mixtures, over the seeds.

    Generation under the causal mask, STS (the average) under both.
    """
    rows = by_row("routes", name, records, seeds)
    columns = [*_names(rows), "perplexity", "STS bidirectional", "STS causal"]
    body = [
        [row, str(len(rows[row])), *(_column(rows[row], column) for column in columns)]
        for row in _ordered(rows)
    ]
    header = ["generates with", "seeds", *columns]
    return _noted([header, *body], paper.notes("routes", name, records, seeds))


def _scan_block(name: str, records: Records, _: Sequence[int]) -> str:
    """The best patterns of layers by plain mean, and none and all; weighted mean beside it."""
    return "\n\n".join(_scan_table(record.section) for record in records.of("scan", label=name))


def _scan_table(section: dict[str, Any]) -> str:
    patterns = section["patterns"]
    ordered = sorted(patterns, key=lambda each: -each["mean"]["score"])
    shown = [each for each in ordered if each in ordered[:BEST] or each in patterns[:2]]
    columns = [scan_rows({"patterns": shown}, pooling) for pooling in ("mean", "weighted_mean")]
    weighted = {row[0]: row[1:] for row in columns[1][1:]}
    body = [[*row, *weighted[row[0]]] for row in columns[0][1:]]
    header = [*columns[0][0], "weighted mean", columns[1][0][2]]
    return f"{section['pairs']} pairs of {section['task']}:\n\n{markdown([header, *body])}"


def _noted(rows: list[list[str]], notes: list[str]) -> str:
    """A table, and below it a paragraph of notes; nothing where there are no rows."""
    if len(rows) == 1:
        return ""
    return "\n".join([markdown(rows), *([""] if notes else []), *notes])


def _ordered(labels: Iterable[str]) -> list[str]:
    """Forced routes in their order, then learned ones; with a causally tuned expert, last."""
    forced = {label: place for place, label in enumerate(ROUTES.values())}
    place = {label: forced.get(label.partition(", causal")[0], len(forced)) for label in labels}
    return sorted(place, key=lambda label: (", causal" in label, place[label], label))


def _bitune_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """A row for each variant on a model, over its seeds, beside the paper's averages."""
    runs = by_row("bitune", name, records, seeds)
    ablations, columns = published("bitune")["ablations"], _names(runs)
    printed = {
        row["method"]: [f"{score:.1f}" for score in row["scores"]] for row in ablations["rows"]
    }
    named = {row.removeprefix("bitune, "): own for row, own in runs.items()}
    rows = []
    for method in [*(each for each in printed if each in named), *sorted(named.keys() - printed)]:
        own = named[method]
        perplexity = spread([each.record.section["perplexity"] for each in own])
        cells = [perplexity, *(_column(own, column) for column in columns)]
        theirs = printed.get(method, [""] * len(ablations["columns"]))
        rows.append([method, str(len(own)), *cells, *theirs])
    heads = [f"published average, {column}" for column in ablations["columns"]]
    header = ["variant", "seeds", "perplexity", *columns, *heads]
    return _noted([header, *rows], paper.notes("bitune", name, records, seeds))


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


def _probing_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """A row a task and split, a column a model, published numbers in brackets.

    name: of a run that probed several, or of a model: then of it, and of what was tuned from it.
    The published ones are of another family, at the same stage of training, and of the random or
    the shipped splits.
    """
    found = records.of("probing", label=name)
    tables = [(record.section["models"], record) for record in found]
    if not found and (study := probings(name, records, seeds)):
        tables = [([model for each in study for model in each.section["models"]], study[0])]
    return "\n\n".join(
        _probing_table(models, record.config["probing"]["data"] == "tiny")
        for models, record in tables
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
    if probe == "ridge":
        return None  # nor is any ridge
    name, column = ("context", f"word {word}") if at else PUBLISHED_PROBES[task]
    found = published("feng")[name if at else f"{name}_{probe}"]
    for row in found["rows"]:
        own = (PUBLISHED_FAMILY, label, feature if at else None)
        if (row["model"], row["method"], row.get("task")) == own:
            return row["scores"][found["columns"].index(column)]
    return None


PAPER = {"sts": 2, "dependence": 3, "generation": 4}


def _paper_block(name: str, records: Records, seeds: Sequence[int]) -> str:
    """A table of the paper as it is printed, and the misprints in it.

    Ours stand beside them in what `python -m ubmoe.results table` prints.
    """
    table = published("ubmoe")[name]
    rows = [[row["model"], row["method"], *map(_printed, row["scores"])] for row in table["rows"]]
    notes = [note for model in paper.models() for note in paper.misprints(PAPER[name], model)]
    return _noted([["model", "row", *table["columns"]], *rows], notes)


def _printed(score: Any) -> str:
    """A score, or the triple main, before, after."""
    return (
        " / ".join(f"{each:.2f}" for each in score) if isinstance(score, list) else f"{score:.2f}"
    )


def _number(value: Any) -> str:
    if value == "not run":
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


BLOCKS = {
    "dependence": _dependence_block,
    "sts": _sts_block,
    "change": _change_block,
    "twins": _twins_block,
    "layers": _layers_block,
    "swap": _swap_block,
    "equal": _equal_block,
    "masks": _masks_block,
    "runs": _runs_block,
    "questions": _questions_block,
    "claim": _claim_block,
    "poolings": _poolings_block,
    "mixture": _mixture_block,
    "bitune": _bitune_block,
    "probing": _probing_block,
    "paper": _paper_block,
    "scan": _scan_block,
}
