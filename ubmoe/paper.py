"""The paper's Tables 2, 3 and 4 with ours beside them, from the records alone.

A cell of ours is the mean over seeds and their standard deviation, `not run` where there is none;
the published number and the gap stand in brackets. Nothing is averaged over missing cells.
"""

from collections.abc import Callable, Iterator, Mapping
from statistics import mean
from typing import Any

from ubmoe.config import Config
from ubmoe.published import published
from ubmoe.tables import SHARES, aligned, mixed, model_of, spread, trained, variant

Records = dict[str, dict[str, Any]]
Seed = int | None
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
    theirs, ours = _theirs(number, model), OURS[number](model, records)
    shown = shown or columns(number, model, records)
    body = []
    for row in sorted(dict.fromkeys((*theirs, *ours)), key=lambda row: not row.startswith("base")):
        own, published_row = ours.get(row, {}), theirs.get(row, {})
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
    theirs, ours = _theirs(number, model), OURS[number](model, records)
    every: list[Mapping[str, object]] = [*theirs.values(), *ours.values()]
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


def _put(found: Ours, row: str, record: dict[str, Any], cells: dict[str, float | None]) -> None:
    """A value for each seed; the base has none, and is put once."""
    seed = None if row.startswith("base") else record["config"]["seed"]
    for column, value in cells.items():
        if value is not None:
            found.setdefault(row, {}).setdefault(column, {}).setdefault(seed, value)


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


def _sts(model: str, records: Records) -> Ours:
    found: Ours = {}
    for row, key in encoders(model, records):
        section = records[key]["sts"]
        _put(found, row, records[key], section["tasks"] | {"average": section["average"]})
    return found


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


def _dependence(model: str, records: Records) -> Ours:
    found: Ours = {}
    for row, record in dependences(model, records):
        for bucket in record["dependence"]["buckets"]:
            low, high = bucket["range"]
            for share in SHARES:
                _put(found, f"{row}, {share}", record, {f"{low}-{high}": bucket[share]})
    return found


def _generation(model: str, records: Records) -> Ours:
    """The base, every encoder as a language model again, mixtures by route, and Bitune."""
    found: Ours = {}
    for row, key in encoders(model, records):
        record = beside(key, "evaluation", records)
        if section := record.get("generation"):
            name = row if row == "base" else row + ENCODER
            _put(found, name, record, scored(section, section["metrics"]))
    for _, record in mixtures(model, records):
        section = record["generation"]
        for route, scores in section["routes"].items():
            row = "base" if route == "uni" else mixed(record, route)
            _put(found, row, record, scored(scores, section["metrics"]))
    for _, record in sorted(records.items()):
        if "bitune" in record and model_of(record) == model:
            tasks = main_metrics(record["bitune"], record["bitune"]["metrics"])
            _put(found, f"bitune, {variant(record)}", record, tasks)
    return found


def main_metrics(scores: dict[str, Any], metrics: dict[str, str]) -> dict[str, float | None]:
    return {task: scores["tasks"].get(task, {}).get(metric) for task, metric in metrics.items()}


def scored(scores: dict[str, Any], metrics: dict[str, str]) -> dict[str, float | None]:
    """The main metric of each task, their average, and the perplexity."""
    rest = {name: scores[name] for name in ("average", "perplexity")}
    return main_metrics(scores, metrics) | rest


OURS: dict[int, Callable[[str, Records], Ours]] = {2: _sts, 3: _dependence, 4: _generation}
