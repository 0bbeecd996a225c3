"""The paper's Tables 2, 3 and 4 with ours beside them, from the records alone.

A cell of ours is the mean over seeds and their standard deviation, `not run` where there is none;
the published number and the gap stand in brackets. Nothing is averaged over missing cells.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from ubmoe.config import MADE, SCORED, Config, leaves
from ubmoe.report.tables import ROUTES, SHARES, aligned, mixed, model_of, spread, trained, variant
from ubmoe.results.published import published

Record = dict[str, Any]
Records = dict[str, Record]
Cells = dict[str, float | None]
TITLES = {
    2: "Table 2: STS by what was trained, Spearman x 100",
    3: "Table 3: dependence in percent, by length in tokens",
    4: "Table 4: generation in percent, perplexity of held-out answers, and STS averages",
}
NAMES = {2: "sts", 3: "dependence", 4: "generation"}
UBMOE = "learned, top_k 2, chat"  # what the paper's second row of Table 4 is
ENCODER = ", read causally"
NO_TASKS = {
    *("average", "perplexity", "STS bidirectional", "STS causal"),
    *("DP-after", "generation"),
}
# Columns that a row has, but of other data than the rows beside it.
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
    for row in sorted(every, key=lambda row: not row.startswith("base")):
        own, published_row = ours.get(row, []), theirs.get(row, {})
        cells = [_cell(row, own, name, published_row) for name in shown]
        body.append([row, str(len(own)), *cells])
    return [["row", "seeds", *shown], *body]


def columns(number: int, model: str, records: Records, seeds: Sequence[int]) -> list[str]:
    """Those of the published table, and further ones of ours."""
    ours = entries(NAMES[number], model, records, seeds)
    every: list[Iterable[str]] = [*_theirs(number, model).values(), *(each.cells for each in ours)]
    return list(dict.fromkeys(name for row in every for name in row))


def _cell(row: str, own: list["Entry"], name: str, published_row: dict[str, float]) -> str:
    values = [value for each in own if (value := each.cells.get(name)) is not None]
    if not values and own and (said := ELSEWHERE.get((row.partition(",")[0], name))):
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


# --- ours -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """What a record says in a row of a table.

    made: the records of how its model was made; beside: further ones that its cells are from.
    """

    row: str
    record: Record
    cells: Cells
    made: tuple[Record, ...]
    beside: tuple[Record, ...] = ()

    @property
    def is_base(self) -> bool:
        return self.row.startswith("base")

    @property
    def seed(self) -> int | None:
        """The base has none."""
        return None if self.is_base else self.record["config"]["seed"]

    @property
    def tasks(self) -> frozenset[str]:
        return frozenset(name for name in self.cells if name not in NO_TASKS)


def entries(kind: str, model: str, records: Records, seeds: Sequence[int]) -> list[Entry]:
    """The first record of each row and seed, of these seeds and of the base."""
    found: dict[tuple[str, int | None], Entry] = {}
    for each in _all(kind, model, records, seeds):
        found.setdefault((each.row, each.seed), each)
    return list(found.values())


def _all(kind: str, model: str, records: Records, seeds: Sequence[int]) -> list[Entry]:
    return [each for each in KINDS[kind](model, records) if each.seed is None or each.seed in seeds]


def by_row(kind: str, model: str, records: Records, seeds: Sequence[int]) -> dict[str, list[Entry]]:
    """The entries of a kind, a list for each row."""
    found: dict[str, list[Entry]] = {}
    for each in entries(kind, model, records, seeds):
        found.setdefault(each.row, []).append(each)
    return found


def _encoders(model: str, records: Records) -> Iterator[Entry]:
    """What train_bi.py left, and what was measured of it; first those of which more was.

    STS by task and its average, DP-after, and the perplexity and tasks when read causally again.
    """
    found = []
    bases = [record for row, record, _ in _dependences(model, records) if row == "base"]
    for key, record in sorted(records.items()):
        if ".sts." not in key or model_of(record) != model:
            continue
        row, section, beside = trained(record), record["sts"], []
        cells: Cells = section["tasks"] | {"average": section["average"]}
        measured = _beside(key, "dependence", records)
        if row == "base" and not measured and bases:
            measured = bases[0]  # measured by itself, in another folder
        if measured and _flow(measured) == "causal":
            cells["DP-after"] = measured["dependence"]["overall"]["after"]
            beside.append(measured)
        evaluated = _beside(key, "evaluation", records)
        if again := evaluated.get("generation"):
            cells |= {"perplexity": again["perplexity"], "generation": again["average"]}
            beside.append(evaluated)
        found.append(Entry(row, record, cells, (record,), tuple(beside)))
    yield from sorted(found, key=lambda each: -len(each.beside))


def _sts(model: str, records: Records) -> Iterator[Entry]:
    """STS by task, and its average, of every run of train_bi.py."""
    for each in _encoders(model, records):
        cells = {name: each.cells[name] for name in (*each.record["sts"]["tasks"], "average")}
        yield Entry(each.row, each.record, cells, each.made)


def _beside(key: str, program: str, records: Records) -> Record:
    """What another program recorded of the model that a run of train_bi.py left; {} if nothing.

    In the same folder there may be a record of the base, or of an earlier encoder: the measured
    model's name and weights tell.
    """
    own, name = records[key], key.replace(".sts.", f".{program}.")
    left = model_of(own) if trained(own).startswith("base") else "bi"
    return _of_the_same(own, records.get(name, {}), left)


def _of_the_same(made: Record, measured: Record, name: str) -> Record:
    """The second record, if it is of the model that the first one made; else {}."""
    known = _weights(made), _weights(measured)
    unlike = None not in known and known[0] != known[1]
    return {} if unlike or model_of(measured) != name else measured


def _measured(model: str, records: Records) -> Iterator[tuple[str, Record, Record]]:
    """(row, dependence record, how its model was made): base, encoders, and mixtures' routers."""
    for key, record in sorted(records.items()):
        if ".dependence." in key and model_of(record) == model:
            yield "base", record, record
    for key, made in sorted(records.items()):
        if ".sts." in key and model_of(made) == model and not trained(made).startswith("base"):
            yield trained(made), _beside(key, "dependence", records), made
        if ".generation." in key and model_of(made) == model:
            measured = records.get(key.replace(".generation.", ".dependence."), {})
            yield mixed(made, "learned"), _of_the_same(made, measured, "ubmoe"), made


def _dependences(model: str, records: Records) -> Iterator[tuple[str, Record, Record]]:
    """Those that are there; under another flow than the paper's they are other rows."""
    for row, record, made in _measured(model, records):
        if record:
            flow = _flow(record)
            yield row + (f", {flow} flow" if flow != "causal" else ""), record, made


def _flow(record: Record) -> str:
    return record["config"].get("dependence", {}).get("flow", "causal")


def _dependence(model: str, records: Records) -> Iterator[Entry]:
    """Three rows for each model: a share in every bucket."""
    for row, record, made in _dependences(model, records):
        for share in SHARES:
            buckets = record["dependence"]["buckets"]
            cells = {"-".join(map(str, each["range"])): each[share] for each in buckets}
            yield Entry(f"{row}, {share}", record, cells, (made,))


def _again(model: str, records: Records) -> Iterator[Entry]:
    """Generation of the base, and of every encoder as a language model again; STS as it is."""
    for key, made in sorted(records.items()):
        if ".sts." not in key or model_of(made) != model:
            continue
        record = _beside(key, "evaluation", records)
        if section := record.get("generation"):
            sts = {f"STS {made['config']['bi']['attention']}": made["sts"]["average"]}
            cells = scored(section, section["metrics"]) | sts
            yield Entry(trained(made), record, cells, (made,))


def _routes(model: str, records: Records) -> Iterator[Entry]:
    """The mixtures by route: generation, read causally, and STS under both masks."""
    for key, record in sorted(records.items()):
        if ".generation." not in key or model_of(record) != model:
            continue
        section = record["generation"]
        made = (record, *_encoder_of(record, records))
        for route, scores in section["routes"].items():
            sts = {
                f"STS {row['attention']}": row["average"]
                for row in record["sts"]
                if row["route"] == route
            }
            cells = scored(scores, section["metrics"]) | sts
            yield Entry(mixed(record, route), record, cells, made)


def _encoder_of(mixture: Record, records: Records) -> list[Record]:
    """How its bi expert was tuned, if that run is among the records: its weights tell."""
    weights = mixture["generation"].get("bi_weights")
    tuned = [record for key, record in sorted(records.items()) if ".sts." in key]
    return [each for each in tuned if weights and _weights(each) == weights][:1]


def _weights(record: Record) -> str | None:
    return record.get("environment", {}).get("weights")


def _bitune(model: str, records: Records) -> Iterator[Entry]:
    """Bitune's variants: generation; its perplexity is of other chats than the mixtures'."""
    for _, record in sorted(records.items()):
        if "bitune" in record and model_of(record) == model:
            section = record["bitune"]
            cells = main_metrics(section, section["metrics"]) | {"average": section.get("average")}
            yield Entry(f"bitune, {variant(record)}", record, cells, ())


def _generation(model: str, records: Records) -> Iterator[Entry]:
    """All of these; of the base's, first the one that has STS under both masks."""
    routes = list(_routes(model, records))
    for each in routes:
        if each.row == ROUTES["uni"]:
            yield replace(each, row="base")
    for each in _again(model, records):
        yield each if each.is_base else replace(each, row=each.row + ENCODER)
    yield from (each for each in routes if each.row != ROUTES["uni"])
    yield from _bitune(model, records)


def main_metrics(scores: dict[str, Any], metrics: dict[str, str]) -> Cells:
    return {task: scores["tasks"].get(task, {}).get(metric) for task, metric in metrics.items()}


def scored(scores: dict[str, Any], metrics: dict[str, str]) -> Cells:
    """The main metric of each task, their average, and the perplexity."""
    rest = {name: scores[name] for name in ("average", "perplexity")}
    return main_metrics(scores, metrics) | rest


KINDS: dict[str, Callable[[str, Records], Iterator[Entry]]] = {
    "encoders": _encoders,
    "sts": _sts,
    "dependence": _dependence,
    "again": _again,
    "routes": _routes,
    "bitune": _bitune,
    "generation": _generation,
}


# --- what the numbers do not say ------------------------------------------------------------------

# What a run scored beside, and where its models were: no setting of a number.
NO_SETTINGS = {
    *("model.name", "ubmoe.bi", "evaluation.language_model"),
    *("ubmoe.route", "ubmoe.routes", "ubmoe.export"),
}


def notes(kind: str, model: str, records: Records, seeds: Sequence[int]) -> list[str]:
    """In what the runs of a row differ, where they do, and how generation was asked."""
    every = _all(kind, model, records, seeds)
    values: dict[str, dict[str, set[str]]] = {}
    for each in every:
        for key, value in _settings(each).items():
            values.setdefault(each.row, {}).setdefault(key, set()).add(value)
    said = []
    for row, keys in values.items():
        if unlike := sorted(key for key, found in keys.items() if len(found) > 1):
            said.append(f"Unlike runs in one row, {row}: {', '.join(unlike)}.")
    return said + _asked(every)


def left_out(kind: str, model: str, records: Records, seeds: Sequence[int]) -> list[str]:
    """The seeds of runs that are not shown."""
    others = {each.seed for each in KINDS[kind](model, records)} - {None, *seeds}
    said = ", ".join(map(str, sorted(seed for seed in others if seed is not None)))
    return [f"Not shown: runs of seed {said}; see results.seeds."] if others else []


def _settings(entry: Entry) -> dict[str, str]:
    """What an entry's numbers depend on besides the seed: how it was scored, and how made."""
    found: dict[str, str] = {}
    for record in (entry.record, *entry.beside):
        found |= leaves(record["config"], SCORED[_kind(record)])
    for record in () if entry.is_base else entry.made:
        found |= leaves(record["config"], MADE[_kind(record)])
    return {key: value for key, value in found.items() if key not in NO_SETTINGS}


def _kind(record: Record) -> str:
    return next(name for name in SCORED if name in record)


def _asked(every: Iterable[Entry]) -> list[str]:
    """How many shots and questions a task had; the paper does not say its own."""
    found = set()
    for each in every:
        section = each.record.get("generation") or each.record.get("bitune", {})
        counts = section.get("shots", {})
        known = [f"{task} {count}" for task, count in counts.items() if count is not None]
        if known:
            limit = section["limit"]
            only = f"; the first {limit} questions of each task" if limit else ""
            found.add(f"Shots of ours: {', '.join(known)}{only}.")
    return sorted(found)
