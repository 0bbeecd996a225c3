"""The paper's Tables 2, 3 and 4 with ours beside them, from the records alone.

A cell of ours is the mean over seeds and their standard deviation, `not run` where there is none;
the published number and the gap stand in brackets. Nothing is averaged over missing cells.
"""

from collections.abc import Iterable, Sequence
from statistics import mean

from studies.compare.entries import BASE, KINDS, Entry, all_entries, by_row, entries
from studies.compare.published import published
from ubmoe.config import MADE, SCORED, Config, leaves
from ubmoe.dependence import SHARES
from ubmoe.report.tables import aligned, model_of, spread
from ubmoe.results.records import Records

TITLES = {
    2: "Table 2: STS by what was trained, Spearman x 100",
    3: "Table 3: dependence in percent, by length in tokens",
    4: "Table 4: generation in percent, perplexity of held-out answers, and STS averages",
}
NAMES = {2: "sts", 3: "dependence", 4: "generation"}
UBMOE = "learned, top_k 2, chat"  # what the paper's second row of Table 4 is
# Columns, by role, that a row has, but of other data than the rows beside it.
ELSEWHERE = {("bitune", "perplexity"): "other chats"}


def text(number: int | str, config: Config, records: Records) -> str:
    """One table, or all three, of config's model for a terminal."""
    model, seeds = model_of({"config": config.model_dump()}), config.results.seeds
    numbers = NAMES if number == "all" else [int(number)]
    return "\n\n".join(
        "\n".join(
            [
                f"{TITLES[each]}, {model}: ours (published, ours minus published).",
                aligned(rows(each, model, records, seeds)),
                *notes(NAMES[each], model, records, seeds),
                *left_out(NAMES[each], model, records, seeds),
                *misprints(each, model),
            ]
        )
        for each in numbers
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
    theirs, ours = _theirs(number, model), by_row(NAMES[number], model, records, seeds)
    shown = shown or columns(number, model, records, seeds)
    every = dict.fromkeys((*theirs, *ours))
    body = []
    for row in sorted(every, key=lambda row: not _is_base(row, ours.get(row, []))):
        own, published_row = ours.get(row, []), theirs.get(row, {})
        cells = [compared(row, own, name, published_row) for name in shown]
        body.append([row, str(len(own)), *cells])
    return [["row", "seeds", *shown], *body]


def _is_base(row: str, own: list[Entry]) -> bool:
    """own: ours of the row; of none, it is the paper's, whose own word it is."""
    return own[0].is_base if own else row.partition(",")[0] == BASE


def columns(number: int, model: str, records: Records, seeds: Sequence[int]) -> list[str]:
    """Those of the published table, and further ones of ours."""
    ours = entries(NAMES[number], model, records, seeds)
    every: list[Iterable[str]] = [*_theirs(number, model).values(), *(each.cells for each in ours)]
    return list(dict.fromkeys(name for row in every for name in row))


def compared(row: str, own: list[Entry], name: str, published_row: dict[str, float]) -> str:
    values = [value for each in own if (value := each.cells.get(name)) is not None]
    if not values and own and (said := ELSEWHERE.get((own[0].role, name))):
        return said
    tasks = {each.tasks for each in own}
    if name == "average" and len(tasks) > 1:
        return "unlike tasks"
    cell = spread(values) + (f" of {len(values)}" if 0 < len(values) < len(own) else "")
    if (theirs := published_row.get(name)) is None:
        return cell
    if name == "average" and values and tasks != {frozenset(published_row) - {"average"}}:
        return f"{cell} (other tasks)"  # an average of which is another number
    gap = f", {mean(values) - theirs:+.2f}" if values else ""
    return f"{cell} ({theirs:.2f}{gap})"


def misprints(number: int, model: str) -> list[str]:
    """What is wrong in the published table of a model, as printed."""
    return [
        f"Misprint in {model}, {row['method']}: {row['misprint']}."
        for row in published("ubmoe")[NAMES[number]]["rows"]
        if row["model"] == model and "misprint" in row
    ]


def _theirs(number: int, model: str) -> dict[str, dict[str, float]]:
    table = published("ubmoe")[NAMES[number]]
    found: dict[str, dict[str, float]] = {}
    for row in table["rows"]:
        if row["model"] != model:
            continue
        pairs = list(zip(table["columns"], row["scores"], strict=True))
        if number == 3:
            for place, share in enumerate(SHARES):
                scores = {bucket: triple[place] for bucket, triple in pairs}
                found[f"{row['method']}, {share}"] = scores
        else:
            found[UBMOE if row["method"] == "ubmoe" else row["method"]] = dict(pairs)
    return found


def models() -> list[str]:
    """Those that the paper's tables are of."""
    rows = published("ubmoe")["sts"]["rows"]
    return list(dict.fromkeys(row["model"] for row in rows))


# --- what the numbers do not say ------------------------------------------------------------------

# What a run scored beside, and where its models were: no setting of a number.
NO_SETTINGS = {
    *("model.name", "ubmoe.bi", "evaluation.language_model"),
    *("ubmoe.route", "ubmoe.routes", "ubmoe.export"),
}


def notes(kind: str, model: str, records: Records, seeds: Sequence[int]) -> list[str]:
    """In what the runs of a row differ, where they do, and how generation was asked."""
    every = all_entries(kind, model, records, seeds)
    values: dict[str, dict[str, set[str]]] = {}
    for each in every:
        for key, value in _settings(each).items():
            values.setdefault(each.row, {}).setdefault(key, set()).add(value)
    unlike: dict[str, list[str]] = {}
    for row, keys in values.items():
        if said := ", ".join(sorted(key for key, found in keys.items() if len(found) > 1)):
            unlike.setdefault(said, []).append(row)
    notes = [f"Unlike runs in one row, {'; '.join(rows)}: {said}." for said, rows in unlike.items()]
    return notes + _asked(every)


def left_out(kind: str, model: str, records: Records, seeds: Sequence[int]) -> list[str]:
    """The seeds of runs that are not shown, and further runs of one row and seed."""
    others = {each.seed for each in KINDS[kind](model, records)} - {None, *seeds}
    said = ", ".join(map(str, sorted(seed for seed in others if seed is not None)))
    notes = [f"Not shown: runs of seed {said}; see results.seeds."] if others else []
    shown = {(each.row, each.seed): each for each in entries(kind, model, records, seeds)}
    for each in all_entries(kind, model, records, seeds):
        first = shown[each.row, each.seed]
        if _numbers(each) - _numbers(first):
            notes.append(
                f"Not shown: {each.record.name}, which says otherwise of {each.row} than "
                f"{first.record.name}."
            )
    return notes


def _numbers(entry: Entry) -> set[tuple[str, float]]:
    return {(name, value) for name, value in entry.cells.items() if value is not None}


def _settings(entry: Entry) -> dict[str, str]:
    """What an entry's numbers depend on besides the seed: how it was scored, and how made."""
    found: dict[str, str] = {}
    for record in (entry.record, *entry.beside):
        found |= leaves(record.config, SCORED[record.kind])
    for record in () if entry.is_base else entry.made:
        found |= leaves(record.config, MADE[record.kind])
    return {key: value for key, value in found.items() if key not in NO_SETTINGS}


def _asked(every: Iterable[Entry]) -> list[str]:
    """How many shots and questions a task had; the paper does not say its own."""
    found = set()
    for each in every:
        section = each.record.data.get("generation") or each.record.data.get("bitune", {})
        counts = section.get("shots", {})
        known = [f"{task} {count}" for task, count in counts.items() if count is not None]
        if known:
            limit = section["limit"]
            only = f"; the first {limit} questions of each task" if limit else ""
            found.add(f"Shots of ours: {', '.join(known)}{only}.")
    return sorted(found)
