"""The paper's Tables 2, 3 and 4 with ours beside them, from the records alone.

A cell of ours is the mean over seeds and their standard deviation, `not run` where there is none;
the published number and the gap stand in brackets. Nothing is averaged over missing cells.
"""

from collections.abc import Iterable, Sequence
from statistics import mean

from studies.compare.labels import spread
from studies.compare.published import published
from studies.compare.records import Records, recorded
from studies.compare.rows import BASE, KINDS, RunRow, all_run_rows, by_row, run_rows
from ubmoe.config import MADE, SCORED, Config, leaves
from ubmoe.dependence import SHARES
from ubmoe.report.tables import aligned, model_of

TITLES = {
    2: "Table 2: STS by what was trained, Spearman x 100",
    3: "Table 3: dependence in percent, by length in tokens",
    4: "Table 4: generation in percent, perplexity of held-out answers, and STS averages",
}
NAMES = {2: "sts", 3: "dependence", 4: "generation"}
UBMOE = "learned, top_k 2, chat"  # what the paper's second row of Table 4 is
# Columns, by role, that a row has, but of other data than the rows beside it.
OTHER_DATA = {("bitune", "perplexity"): "other chats"}


def table(config: Config) -> str:
    """The tables of `results.table` from the recorded runs."""
    records = recorded(config)
    return text(config.results.table or "all", config, records) + no_runs(config, records)


def no_runs(config: Config, records: Records) -> str:
    """A last line for a table whose columns hold nothing of ours."""
    model = model_of({"config": config.model_dump()})
    if any(run.model == model for run in records.by_name.values()):
        return ""
    return (
        f"\n\nno run of {model} is recorded in {config.results.directory}: "
        "python -m ubmoe.results run, with the same config, makes them"
    )


def text(number: int | str, config: Config, records: Records) -> str:
    """One table, or all three, of config's model for a terminal."""
    model, seeds = model_of({"config": config.model_dump()}), config.results.seeds
    numbers = NAMES if number == "all" else [int(number)]
    return "\n\n".join(
        "\n".join(
            [
                f"{TITLES[table]}, {model}: ours (published, ours minus published).",
                aligned(rows(table, model, records, seeds)),
                *notes(NAMES[table], model, records, seeds),
                *left_out(NAMES[table], model, records, seeds),
                *misprints(table, model),
            ]
        )
        for table in numbers
    )


def rows(
    number: int,
    model: str,
    records: Records,
    seeds: Sequence[int],
    shown: list[str] | None = None,
) -> list[list[str]]:
    """Header and a row for each of the paper's rows and each further one of ours.

    shown: the columns; None: all that there are.
    """
    theirs, ours = published_rows(number, model), by_row(NAMES[number], model, records, seeds)
    shown = shown or columns(number, model, records, seeds)
    every = dict.fromkeys((*theirs, *ours))
    body = []
    for row in sorted(every, key=lambda row: not _is_base(row, ours.get(row, []))):
        runs, published_row = ours.get(row, []), theirs.get(row, {})
        cells = [compared(row, runs, name, published_row) for name in shown]
        body.append([row, str(len(runs)), *cells])
    return [["row", "seeds", *shown], *body]


def _is_base(row: str, runs: list[RunRow]) -> bool:
    """own: ours of the row; of none, it is the paper's, whose own word it is."""
    return runs[0].is_base if runs else row.partition(",")[0] == BASE


def columns(number: int, model: str, records: Records, seeds: Sequence[int]) -> list[str]:
    """Those of the published table, and further ones of ours."""
    ours = run_rows(NAMES[number], model, records, seeds)
    every: list[Iterable[str]] = [
        *published_rows(number, model).values(),
        *(run.cells for run in ours),
    ]
    return list(dict.fromkeys(name for row in every for name in row))


def compared(row: str, runs: list[RunRow], name: str, published_row: dict[str, float]) -> str:
    values = [value for run in runs if (value := run.cells.get(name)) is not None]
    if not values and runs and (said := OTHER_DATA.get((runs[0].role, name))):
        return said
    tasks = {run.tasks for run in runs}
    if name == "average" and len(tasks) > 1:
        return "unlike tasks"
    cell = spread(values) + (f" of {len(values)}" if 0 < len(values) < len(runs) else "")
    if (theirs := published_row.get(name)) is None:
        return cell
    if name == "average" and values and tasks != {frozenset(published_row) - {"average"}}:
        return f"{cell} (other tasks)"  # an average of which is another number
    gap = f", {mean(values) - theirs:+.2f}" if values else ""
    return f"{cell} ({theirs:.2f}{gap})"


def misprints(number: int, model: str) -> list[str]:
    """The misprints in the published table of a model."""
    return [
        f"Misprint in {model}, {row['method']}: {row['misprint']}."
        for row in published("ubmoe")[NAMES[number]]["rows"]
        if row["model"] == model and "misprint" in row
    ]


def published_rows(number: int, model: str) -> dict[str, dict[str, float]]:
    table = published("ubmoe")[NAMES[number]]
    scores_of: dict[str, dict[str, float]] = {}
    for row in table["rows"]:
        if row["model"] != model:
            continue
        pairs = list(zip(table["columns"], row["scores"], strict=True))
        if number == 3:
            for place, share in enumerate(SHARES):
                scores = {bucket: triple[place] for bucket, triple in pairs}
                scores_of[f"{row['method']}, {share}"] = scores
        else:
            scores_of[UBMOE if row["method"] == "ubmoe" else row["method"]] = dict(pairs)
    return scores_of


def models() -> list[str]:
    """Those that the paper's tables are of."""
    rows = published("ubmoe")["sts"]["rows"]
    return list(dict.fromkeys(row["model"] for row in rows))


# --- notes below the tables -----------------------------------------------------------------------

# What a run scored beside, and where its models were: no setting of a number.
NO_SETTINGS = {
    *("model.name", "ubmoe.bi", "evaluation.language_model"),
    *("ubmoe.route", "ubmoe.routes", "ubmoe.export"),
}


def notes(kind: str, model: str, records: Records, seeds: Sequence[int]) -> list[str]:
    """In what the runs of a row differ, where they do, and how generation was asked."""
    every = all_run_rows(kind, model, records, seeds)
    values: dict[str, dict[str, set[str]]] = {}
    for run in every:
        for key, value in settings_of(run).items():
            values.setdefault(run.row, {}).setdefault(key, set()).add(value)
    unlike: dict[str, list[str]] = {}
    for row, keys in values.items():
        if said := ", ".join(sorted(key for key, distinct in keys.items() if len(distinct) > 1)):
            unlike.setdefault(said, []).append(row)
    notes = [f"Unlike runs in one row, {'; '.join(rows)}: {said}." for said, rows in unlike.items()]
    return notes + _shots(every)


def left_out(kind: str, model: str, records: Records, seeds: Sequence[int]) -> list[str]:
    """The seeds of runs that are not shown, and further runs of one row and seed."""
    others = {run.seed for run in KINDS[kind](model, records)} - {None, *seeds}
    said = ", ".join(map(str, sorted(seed for seed in others if seed is not None)))
    notes = [f"Not shown: runs of seed {said}; see results.seeds."] if others else []
    shown = {(run.row, run.seed): run for run in run_rows(kind, model, records, seeds)}
    for run in all_run_rows(kind, model, records, seeds):
        first = shown[run.row, run.seed]
        if _numbers(run) - _numbers(first):
            notes.append(
                f"Not shown: {run.record.name}, which says otherwise of {run.row} than "
                f"{first.record.name}."
            )
    return notes


def _numbers(run: RunRow) -> set[tuple[str, float]]:
    return {(name, value) for name, value in run.cells.items() if value is not None}


def settings_of(run: RunRow) -> dict[str, str]:
    """The settings behind a run's numbers, besides the seed: of its scoring, and of its making."""
    settings: dict[str, str] = {}
    for record in (run.record, *run.beside):
        settings |= leaves(record.config, SCORED[record.kind])
    for record in () if run.is_base else run.made:
        settings |= leaves(record.config, MADE[record.kind])
    return {key: value for key, value in settings.items() if key not in NO_SETTINGS}


def _shots(every: Iterable[RunRow]) -> list[str]:
    """How many shots and questions a task had; the paper does not say its own."""
    sentences = set()
    for run in every:
        section = run.record.data.get("generation") or run.record.data.get("bitune", {})
        counts = section.get("shots", {})
        known = [f"{task} {count}" for task, count in counts.items() if count is not None]
        if known:
            limit = section["limit"]
            only = f"; the first {limit} questions of each task" if limit else ""
            sentences.add(f"Shots of ours: {', '.join(known)}{only}.")
    return sorted(sentences)
