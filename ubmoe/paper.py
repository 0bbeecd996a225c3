"""The paper's Tables 2, 3 and 4 with ours beside them, from the records alone.

A cell of ours is the mean over seeds and their standard deviation, `not run` where there is none;
the published number and the gap stand in brackets. Nothing is averaged over missing cells.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from statistics import mean
from typing import Any

from ubmoe.config import READS, WITHOUT_EFFECT, Config
from ubmoe.published import published
from ubmoe.tables import SHARES, aligned, mixed, model_of, spread, trained, variant

Records = dict[str, dict[str, Any]]
Seed = int | None
Cells = dict[str, float | None]
Entry = tuple[str, dict[str, Any], Cells]  # row, its record, a value a column
Ours = dict[str, dict[str, dict[Seed, float]]]  # row -> column -> seed -> value
TITLES = {
    2: "Table 2: STS by what was trained, Spearman x 100",
    3: "Table 3: dependence in percent, by length in tokens",
    4: "Table 4: generation in percent, and perplexity of held-out answers",
}
NAMES = {2: "sts", 3: "dependence", 4: "generation"}
UBMOE = "learned, top_k 2, chat"  # what the paper's second row of Table 4 is
ENCODER = ", read causally"


def text(number: int | str, config: Config, records: Records) -> str:
    """One table, or all three, of config's model for a terminal."""
    model = model_of({"config": config.model_dump()})
    numbers = NAMES if number == "all" else [int(number)]
    return "\n\n".join(
        "\n".join(
            [
                f"{TITLES[each]}, {model}: ours (published, ours minus published).",
                aligned(rows(each, model, records)),
                *notes(ENTRIES[each](model, records)),
                *misprints(each, model),
            ]
        )
        for each in numbers
    )


def rows(
    number: int, model: str, records: Records, shown: list[str] | None = None
) -> list[list[str]]:
    """Header and a row for each of the paper's rows and each further one of ours.

    shown: the columns; None: all that there are.
    """
    theirs, own_rows = _theirs(number, model), ours(number, model, records)
    shown = shown or columns(number, model, records)
    body = []
    every = dict.fromkeys((*theirs, *own_rows))
    for row in sorted(every, key=lambda row: not row.startswith("base")):
        own, published_row = own_rows.get(row, {}), theirs.get(row, {})
        # an average over other tasks is another number
        alike = not own or all(name in own for name in published_row if name != "average")
        cells = [
            _cell(own.get(name, {}), published_row.get(name), alike or name != "average")
            for name in shown
        ]
        body.append([row, str(max(map(len, own.values()), default=0)), *cells])
    return [["row", "seeds", *shown], *body]


def columns(number: int, model: str, records: Records) -> list[str]:
    """Those of the published table, and further ones of ours."""
    every: list[Mapping[str, object]] = [
        *_theirs(number, model).values(),
        *ours(number, model, records).values(),
    ]
    return list(dict.fromkeys(name for row in every for name in row))


def _cell(own: dict[Seed, float], theirs: float | None, alike: bool) -> str:
    values = list(own.values())
    if theirs is None:
        return spread(values)
    if not alike:
        return f"{spread(values)} (other tasks)"
    gap = f", {mean(values) - theirs:+.2f}" if values else ""
    return f"{spread(values)} ({theirs:.2f}{gap})"


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


# --- ours -----------------------------------------------------------------------------------------


def ours(number: int, model: str, records: Records) -> Ours:
    """The values of every row by column and seed; the base has no seeds, and one value."""
    found: Ours = {}
    for row, record, cells in ENTRIES[number](model, records):
        seed = None if row.startswith("base") else record["config"]["seed"]
        for column, value in cells.items():
            if value is not None:
                found.setdefault(row, {}).setdefault(column, {}).setdefault(seed, value)
    return found


def notes(entries: Iterable[Entry]) -> list[str]:
    """What the numbers do not say: rows of unlike runs, and how generation was asked."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for row, record, _ in entries:
        runs.setdefault(row, []).append(record)
    unlike = {row: found for row, every in runs.items() if (found := _unlike(every, row))}
    said = [f"Unlike runs in one row, {row}: {', '.join(keys)}." for row, keys in unlike.items()]
    return said + _asked([each for every in runs.values() for each in every])


def _unlike(records: list[dict[str, Any]], row: str) -> list[str]:
    """The keys, of those that their results depend on, in which the runs of a row differ."""
    values: dict[str, set[str]] = {}
    for record in records:
        kind = next(name for name in READS if name in record)
        # whatever else its run was about, the base is only scored
        sections = ("model", "evaluation") if row.startswith("base") else READS[kind]
        for section in sections:
            for key, value in _flat(record["config"].get(section), section):
                values.setdefault(key, set()).add(value)
    return sorted(key for key, found in values.items() if len(found) > 1)


# Where a run was, and what it scored beside; neither is a setting of its numbers.
ASIDE = {"device", "cache", "name", "bi", "batch_size", "language_model"} | WITHOUT_EFFECT


def _flat(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """(dotted key, value as text) of every leaf that a result depends on; 0.0 is 0."""
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        value = {str(place): each for place, each in enumerate(value)}
    if isinstance(value, dict):
        for key, each in value.items():
            if key not in ASIDE:
                yield from _flat(each, f"{name}.{key}")
    else:
        whole = isinstance(value, float) and value.is_integer()
        yield name, json.dumps(int(value) if whole else value)


def _asked(records: list[dict[str, Any]]) -> list[str]:
    """How many shots and questions a task had; the paper does not say its own."""
    found = set()
    for record in records:
        section = record.get("generation") or record.get("bitune", {})
        known = {
            task: count for task, count in section.get("shots", {}).items() if count is not None
        }
        if shots := ", ".join(f"{task} {count}" for task, count in known.items()):
            limit = section["limit"]
            only = f"; the first {limit} questions of each task" if limit else ""
            found.add(f"Shots of ours: {shots}{only}.")
    return sorted(found)


def encoders(model: str, records: Records) -> Iterator[tuple[str, str]]:
    """(row, record's name) of every run of train_bi.py on a model."""
    for key, record in sorted(records.items()):
        if ".sts." in key and model_of(record) == model:
            yield trained(record), key


def beside(key: str, program: str, records: Records) -> dict[str, Any]:
    """What another program recorded of the model that a run of train_bi.py left; {} if nothing.

    In the same folder there may be a record of the base: the measured model's name tells.
    """
    own = records[key]
    other = records.get(key.replace(".sts.", f".{program}."), {})
    left = model_of(own) if trained(own) == "base" else "bi"
    return other if model_of(other) == left else {}


def mixtures(model: str, records: Records) -> Iterator[tuple[str, dict[str, Any]]]:
    """(record's name, record) of every run of train_ubmoe.py on a model."""
    for key, record in sorted(records.items()):
        if ".generation." in key and model_of(record) == model:
            yield key, record


def _sts(model: str, records: Records) -> Iterator[Entry]:
    for row, key in encoders(model, records):
        section = records[key]["sts"]
        yield row, records[key], section["tasks"] | {"average": section["average"]}


def dependences(model: str, records: Records) -> Iterator[tuple[str, dict[str, Any]]]:
    """(row, record): of the base, of what train_bi.py tuned, and of the mixtures' routers."""
    for key, record in sorted(records.items()):
        if ".dependence." in key and model_of(record) == model:
            yield "base", record
    for row, key in encoders(model, records):
        if row != "base" and (record := beside(key, "dependence", records)):
            yield row, record
    for key, mixture in mixtures(model, records):
        measured = records.get(key.replace(".generation.", ".dependence."), {})
        if model_of(measured) == "ubmoe":
            yield mixed(mixture, "learned"), measured


def _dependence(model: str, records: Records) -> Iterator[Entry]:
    for row, record in dependences(model, records):
        for bucket in record["dependence"]["buckets"]:
            low, high = bucket["range"]
            for share in SHARES:
                yield f"{row}, {share}", record, {f"{low}-{high}": bucket[share]}


def read_again(model: str, records: Records) -> Iterator[Entry]:
    """Generation of the base, and of every encoder as a language model again."""
    for row, key in encoders(model, records):
        record = beside(key, "evaluation", records)
        if section := record.get("generation"):
            name = row if row == "base" else row + ENCODER
            yield name, record, scored(section, section["metrics"])


def by_route(model: str, records: Records) -> Iterator[Entry]:
    """Generation of the mixtures; forced to uni, one is the base."""
    for _, record in mixtures(model, records):
        section = record["generation"]
        for route, scores in section["routes"].items():
            row = "base" if route == "uni" else mixed(record, route)
            yield row, record, scored(scores, section["metrics"])


def by_variant(model: str, records: Records) -> Iterator[Entry]:
    """Generation of Bitune's variants; its perplexity is of other chats than the mixtures'."""
    for _, record in sorted(records.items()):
        if "bitune" in record and model_of(record) == model:
            tasks = main_metrics(record["bitune"], record["bitune"]["metrics"])
            yield f"bitune, {variant(record)}", record, tasks


def _generation(model: str, records: Records) -> Iterator[Entry]:
    for entries in (read_again, by_route, by_variant):
        yield from entries(model, records)


def main_metrics(scores: dict[str, Any], metrics: dict[str, str]) -> Cells:
    return {task: scores["tasks"].get(task, {}).get(metric) for task, metric in metrics.items()}


def scored(scores: dict[str, Any], metrics: dict[str, str]) -> Cells:
    """The main metric of each task, their average, and the perplexity."""
    rest = {name: scores[name] for name in ("average", "perplexity")}
    return main_metrics(scores, metrics) | rest


ENTRIES: dict[int, Callable[[str, Records], Iterator[Entry]]] = {
    2: _sts,
    3: _dependence,
    4: _generation,
}
