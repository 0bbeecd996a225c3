"""The paper's Tables 2, 3 and 4 with ours beside them, from the records alone.

A cell of ours is the mean over seeds and their standard deviation, `not run` where there is none;
the published number and the gap stand in brackets. Nothing is averaged over missing cells.
"""

from collections.abc import Callable, Iterator, Mapping
from statistics import mean
from typing import Any

from ubmoe.config import Config
from ubmoe.published import published
from ubmoe.tables import aligned, mixed, model_of, spread, trained

Records = dict[str, dict[str, Any]]
Ours = dict[str, dict[str, list[float]]]  # row -> column -> a value for each seed
TITLES = {
    2: "Table 2: STS by what was trained, Spearman x 100",
    3: "Table 3: dependence in percent, by length in tokens",
    4: "Table 4: generation in percent, and perplexity of held-out answers",
}
NAMES = {2: "sts", 3: "dependence", 4: "generation"}
SHARES = ("main", "before", "after")
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


def rows(number: int, model: str, records: Records, column: str | None = None) -> list[list[str]]:
    """Header and a row for each of the paper's rows and each further one of ours.

    column: it alone.
    """
    theirs = _theirs(number, model)
    ours = OURS[number](model, records)
    every: list[Mapping[str, object]] = [*theirs.values(), *ours.values()]
    columns = list(dict.fromkeys(name for row in every for name in row))
    shown = [column] if column else columns
    body = []
    for row in sorted(dict.fromkeys((*theirs, *ours)), key=lambda row: not row.startswith("base")):
        own, published_row = ours.get(row, {}), theirs.get(row, {})
        cells = [_cell(own.get(name, []), published_row.get(name)) for name in shown]
        body.append([row, str(max(map(len, own.values()), default=0)), *cells])
    return [["row", "seeds", *shown], *body]


def _cell(own: list[float], theirs: float | None) -> str:
    if theirs is None:
        return spread(own)
    gap = f", {mean(own) - theirs:+.2f}" if own else ""
    return f"{spread(own)} ({theirs:.2f}{gap})"


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


def _put(found: Ours, row: str, cells: dict[str, float | None]) -> None:
    for column, value in cells.items():
        if value is not None:
            found.setdefault(row, {}).setdefault(column, []).append(value)


def encoders(model: str, records: Records) -> Iterator[tuple[str, str]]:
    """(row, record's name) of every run of train_bi.py on a model."""
    for key, record in sorted(records.items()):
        if ".sts." in key and model_of(record) == model:
            yield trained(record), key


def _sts(model: str, records: Records) -> Ours:
    found: Ours = {}
    for row, key in encoders(model, records):
        section = records[key]["sts"]
        _put(found, row, section["tasks"] | {"average": section["average"]})
    return found


def dependences(model: str, records: Records) -> Iterator[tuple[str, dict[str, Any]]]:
    """(row, section): of the base, of what train_bi.py tuned, and of the mixture."""
    rows = {key.replace(".sts.", ".dependence."): row for row, key in encoders(model, records)}
    for key, record in sorted(records.items()):
        if ".dependence." not in key:
            continue
        measured, mixture = model_of(record), key.replace(".dependence.", ".generation.")
        if measured == model:
            yield "base", record["dependence"]
        elif measured == "bi" and key in rows:
            yield rows[key], record["dependence"]
        elif measured == "ubmoe" and model_of(records.get(mixture, {})) == model:
            yield UBMOE, record["dependence"]


def _dependence(model: str, records: Records) -> Ours:
    found: Ours = {}
    for row, section in dependences(model, records):
        for bucket in section["buckets"]:
            low, high = bucket["range"]
            for share in SHARES:
                _put(found, f"{row}, {share}", {f"{low}-{high}": bucket[share]})
    return found


def mixtures(model: str, records: Records) -> Iterator[tuple[str, dict[str, Any]]]:
    """(record's name, record) of every run of train_ubmoe.py on a model."""
    for key, record in sorted(records.items()):
        if ".generation." in key and model_of(record) == model:
            yield key, record


def _generation(model: str, records: Records) -> Ours:
    """The base, every encoder as a language model again, mixtures by route, and Bitune."""
    found: Ours = {}
    for row, key in encoders(model, records):
        section = records.get(key.replace(".sts.", ".evaluation."), {}).get("generation")
        if section is not None:
            name = row if row == "base" else row + ENCODER
            _put(found, name, scored(section, section["metrics"]))
    for _, record in mixtures(model, records):
        section = record["generation"]
        for route, scores in section["routes"].items():
            if route != "uni":
                _put(found, mixed(record, route), scored(scores, section["metrics"]))
            elif "base" not in found:  # that is what this route is
                _put(found, "base", scored(scores, section["metrics"]))
    for record in records.values():
        if "bitune" in record and model_of(record) == model:
            row = f"bitune, {record['bitune']['variant']}"
            _put(found, row, scored_tasks(record["bitune"]))
    return found


def scored_tasks(section: dict[str, Any]) -> dict[str, float | None]:
    """The main metric of each task, and their average."""
    tasks = {
        task: section["tasks"].get(task, {}).get(metric)
        for task, metric in section["metrics"].items()
    }
    return tasks | {"average": section["average"]}


def scored(scores: dict[str, Any], metrics: dict[str, str]) -> dict[str, float | None]:
    """As `scored_tasks`, and the perplexity."""
    return scored_tasks(scores | {"metrics": metrics}) | {"perplexity": scores["perplexity"]}


OURS: dict[int, Callable[[str, Records], Ours]] = {2: _sts, 3: _dependence, 4: _generation}
