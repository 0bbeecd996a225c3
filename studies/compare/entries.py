"""What the records say in rows of tables: encoders, mixtures, dependence, generation, Bitune.

What was measured of one model never stands beside another's: records are paired by the run and by
the digest of the weights.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ubmoe.dependence import SHARES
from ubmoe.report.tables import CAUSAL, ROUTES, family, has_collapsed, mixed, trained, variant
from ubmoe.results.records import EXCHANGES, Record, Records

Cells = dict[str, float | None]
ENCODER = ", read causally"
# Columns of what goes to which tokens, by their names in `by_text`.
SINK = {
    "DP-after": "after",
    "first": "first",
    "after without first": "without_first.after",
}
CHATS = ("dataset", "max_rows", "held_out", "max_tokens")  # what decides of which perplexity is
NO_TASKS = {
    *("average", "perplexity", "STS bidirectional", "STS causal"),
    *("DP-after", "first", "after without first", "generation"),
}


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
    def is_control(self) -> bool:
        """An encoder that reads causally, whatever its row is called."""
        return family(self.record.data).endswith(CAUSAL)

    @property
    def has_collapsed(self) -> bool:
        """An encoder for which all texts are alike: a row apart, held against the base alone."""
        return has_collapsed(self.record.section.get("stages", []))

    @property
    def has_learnt(self) -> bool:
        """Whether it was tuned, and into an encoder."""
        return not (self.is_base or self.has_collapsed)

    @property
    def seed(self) -> int | None:
        """The base has none."""
        return None if self.is_base else self.record.seed

    @property
    def chats(self) -> tuple[Any, ...]:
        """Those that its perplexity is of, as far as its record says."""
        if (evaluated := self.measured("evaluation")) is None:
            return ()
        asked = evaluated.config.get("ubmoe", {})
        digest = evaluated.data.get("inputs", {}).get("ubmoe.dataset")
        return (digest, *(asked.get(name) for name in CHATS))

    def measured(self, kind: str) -> Record | None:
        """The further record of this kind."""
        return next((each for each in self.beside if each.kind == kind), None)

    @property
    def tasks(self) -> frozenset[str]:
        return frozenset(name for name in self.cells if name not in NO_TASKS)

    def mean(self, tasks: Sequence[str]) -> float:
        """Of the scores of these tasks, which it has."""
        scores: list[Any] = [self.cells[task] for task in tasks]
        return sum(scores) / len(scores)


def entries(kind: str, model: str, records: Records, seeds: Sequence[int]) -> list[Entry]:
    """The first record of each row and seed, of these seeds and of the base."""
    found: dict[tuple[str, int | None], Entry] = {}
    for each in all_entries(kind, model, records, seeds):
        found.setdefault((each.row, each.seed), each)
    return list(found.values())


def all_entries(kind: str, model: str, records: Records, seeds: Sequence[int]) -> list[Entry]:
    return [each for each in KINDS[kind](model, records) if each.seed is None or each.seed in seeds]


def common_tasks(every: Sequence[Entry]) -> list[str]:
    """Those that all have: averages of unlike tasks are not compared."""
    shared = frozenset.intersection(*(each.tasks for each in every)) if every else frozenset()
    return sorted(shared)


def by_row(kind: str, model: str, records: Records, seeds: Sequence[int]) -> dict[str, list[Entry]]:
    """The entries of a kind, a list for each row, in the order of their seeds."""
    return grouped(entries(kind, model, records, seeds))


def grouped(every: Sequence[Entry]) -> dict[str, list[Entry]]:
    """A list for each row, in the order of their seeds."""
    found: dict[str, list[Entry]] = {}
    for each in every:
        found.setdefault(each.row, []).append(each)
    return {row: sorted(own, key=lambda each: each.seed or 0) for row, own in found.items()}


def _encoders(model: str, records: Records) -> Iterator[Entry]:
    """What train_bi.py left, and what was measured of it; first those of which more was.

    STS by task and its average, DP-after with the sink; read causally again, perplexity and tasks.
    """
    found = []
    for record in records.of("sts", model):
        row, section = trained(record.data), record.section
        cells: Cells = section["tasks"] | {"average": section["average"]}
        own = {
            kind: one
            for kind in CAUSALLY
            if (one := measured_of(record, kind, records)) is not None and _tells(one)
        }
        beside = (_of_base(record, records) if row.startswith("base") else {}) | own
        if measured := beside.get("dependence"):
            cells |= {"DP-after": measured.section["overall"]["after"]} | _sink(measured)
        if evaluated := beside.get("evaluation"):
            again = evaluated.data["generation"]
            cells |= {"perplexity": again["perplexity"], "generation": again["average"]}
        entry = Entry(row, record, cells, (record,), tuple(beside.values()))
        found.append((len(own), entry))
    yield from (entry for _, entry in sorted(found, key=lambda each: -each[0]))


CAUSALLY = ("dependence", "evaluation")  # what is measured of a model read causally


def _tells(measured: Record) -> bool:
    if measured.kind == "dependence":
        return _flow(measured) == "causal"
    return bool(measured.data.get("generation"))


def _of_base(made: Record, records: Records) -> dict[str, Record]:
    """What was measured of the model in other folders: however it embeds, it reads causally."""
    every = {kind: records.of(kind, made.model) for kind in CAUSALLY}
    return {
        kind: usable[0]
        for kind, found in every.items()
        if (usable := [each for each in found if _tells(each) and not _unlike(each, made)])
    }


def _unlike(one: Record, other: Record) -> bool:
    """Whether their weights are others, as far as both say."""
    return None not in (one.weights, other.weights) and one.weights != other.weights


def _sink(measured: Record) -> Cells:
    """What goes to the first token, and DP-after without it; older records do not say it."""
    if "first" not in measured.section:
        return {}
    without = measured.section["without_first"]["after"]
    return {"first": measured.section["first"], "after without first": without}


def _sts(model: str, records: Records) -> Iterator[Entry]:
    """STS by task, and its average, of every run of train_bi.py."""
    for each in _encoders(model, records):
        cells = {name: each.cells[name] for name in (*each.record.section["tasks"], "average")}
        yield Entry(each.row, each.record, cells, each.made)


def measured_of(made: Record, kind: str, records: Records) -> Record | None:
    """What another program recorded of the model that a run left.

    In the same folder there may be a record of the base, or of an earlier encoder: the measured
    model's name and weights tell. EXCHANGES are of the base, and of the encoder that they say.
    """
    measured = records.beside(made, kind)
    if kind in EXCHANGES:
        same = measured is not None and measured.section.get("bi_weights") == made.weights
        return measured if same else None
    left = {"sts": "bi", "generation": "ubmoe"}[made.kind]
    if made.kind == "sts" and trained(made.data).startswith("base"):
        left = made.model
    if measured is None or measured.model != left:
        return None
    return None if _unlike(made, measured) else measured


def base_first(row: str) -> tuple[bool, int, str]:
    """To sort rows by: untrained ones, then those of fewer words before others, twins together."""
    return not row.startswith("base"), row.replace(CAUSAL, "").count(" "), row


def first_measured(own: Sequence[Entry], kind: str, records: Records) -> Record | None:
    """What another program recorded of the first of these runs of which it did."""
    every = (measured_of(each.record, kind, records) for each in own)
    return next((each for each in every if each is not None), None)


def _measured(model: str, records: Records) -> Iterator[tuple[str, Record | None, Record]]:
    """(row, dependence record, how its model was made): base, encoders, and mixtures' routers."""
    for record in records.of("dependence", model):
        yield "base", record, record
    for made in sorted(
        (*records.of("sts", model), *records.of("generation", model)), key=lambda each: each.name
    ):
        if made.kind == "generation":
            yield mixed(made.data, "learned"), measured_of(made, "dependence", records), made
        elif not trained(made.data).startswith("base"):
            yield trained(made.data), measured_of(made, "dependence", records), made


def _dependences(model: str, records: Records) -> Iterator[tuple[str, Record, Record]]:
    """Those that are there; under another flow than the paper's they are other rows."""
    for row, record, made in _measured(model, records):
        if record is not None:
            flow = _flow(record)
            yield row + (f", {flow} flow" if flow != "causal" else ""), record, made


def _flow(record: Record) -> str:
    return record.config.get("dependence", {}).get("flow", "causal")


def _dependence(model: str, records: Records) -> Iterator[Entry]:
    """Three rows for each model: a share in every bucket."""
    for row, record, made in _dependences(model, records):
        for share in SHARES:
            buckets = record.section["buckets"]
            cells = {"-".join(map(str, each["range"])): each[share] for each in buckets}
            yield Entry(f"{row}, {share}", record, cells, (made,))


def _again(model: str, records: Records) -> Iterator[Entry]:
    """Generation of the base, and of every encoder as a language model again; STS as it is."""
    for made in records.of("sts", model):
        record = measured_of(made, "evaluation", records)
        if record is not None and (section := record.data.get("generation")):
            sts = {f"STS {made.config['bi']['attention']}": made.section["average"]}
            cells = scored(section, section["metrics"]) | sts
            yield Entry(trained(made.data), record, cells, (made,))


def _routes(model: str, records: Records) -> Iterator[Entry]:
    """The mixtures by route: generation, read causally, and STS under both masks."""
    for record in records.of("generation", model):
        section = record.section
        made = (record, *_encoder_of(record, records))
        for route, scores in section["routes"].items():
            sts = {
                f"STS {row['attention']}": row["average"]
                for row in record.data["sts"]
                if row["route"] == route
            }
            cells = scored(scores, section["metrics"]) | sts
            yield Entry(mixed(record.data, route), record, cells, made)


def _encoder_of(mixture: Record, records: Records) -> list[Record]:
    """How its bi expert was tuned, if that run is among the records: its weights tell."""
    weights = mixture.section.get("bi_weights")
    return [each for each in records.of("sts") if weights and each.weights == weights][:1]


def _bitune(model: str, records: Records) -> Iterator[Entry]:
    """Bitune's variants: generation; its perplexity is of other chats than the mixtures'."""
    for record in records.of("bitune", model):
        section = record.section
        cells = main_metrics(section, section["metrics"]) | {"average": section.get("average")}
        yield Entry(f"bitune, {variant(record.data)}", record, cells, ())


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
