"""What the records say in rows of tables: encoders, mixtures, dependence, generation, Bitune.

What was measured of one model never stands beside another's: records are paired by the run and by
the digest of the weights.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ubmoe.dependence import SHARES
from ubmoe.report.tables import has_collapsed, mixed, trained, variant
from ubmoe.results.records import EXCHANGES, Record, Records
from ubmoe.similarity import sections

Cells = dict[str, float | None]
Role = Literal["base", "encoder", "mixture", "bitune"]
BASE = "base"  # what tables call the model that all was tuned from
ENCODER = ", read causally"
MASK = "attention"  # the key of the section `bi`
LATER = ("form", "keep_sink", "whiten", "positive_from")  # keys that the first records lack
# Columns of what goes to which tokens, by their names in `by_text`.
SINK = {
    "DP-after": "after",
    "first": "first",
    "after without first": "without_first.after",
}
CHATS = ("dataset", "max_rows", "held_out", "max_tokens")  # what decides of which perplexity is


@dataclass(frozen=True)
class Entry:
    """A run in a row of a table. What it is, its configuration says; `row` is what it is called.

    role: an untrained base, an encoder, a mixture or Bitune. scores: of the tasks, of STS or of
    generation. measures: the further columns. made: the records of how its model was made; beside:
    further ones that its columns are from. route: of a mixture.
    """

    row: str
    role: Role
    record: Record
    scores: Cells
    measures: Cells
    made: tuple[Record, ...] = ()
    beside: tuple[Record, ...] = ()
    route: str = ""

    @property
    def cells(self) -> Cells:
        """Every column."""
        return self.scores | self.measures

    @property
    def is_base(self) -> bool:
        return self.role == "base"

    @property
    def settings(self) -> dict[str, Any]:
        """How it was tuned, and how it reads: the section `bi`; {} of what train_bi.py left not."""
        made = self.made[0] if self.made else self.record
        return made.config["bi"] if made.kind == "sts" else {}

    @property
    def is_control(self) -> bool:
        """It was tuned, or embeds untuned, under the causal mask; a mixture: its expert was."""
        if self.role == "mixture":
            return self.made[0].section["bi_attention"] == "causal"
        return reads_causally(self.settings)

    @property
    def modules(self) -> tuple[Any, ...]:
        """What was tuned, a tuple a stage, and by which objectives."""
        return tuple(
            (
                *(stage["objective"], tuple(stage["train"])),
                *(bool(stage.get("lora")), bool(stage.get("lm_weight"))),
            )
            for stage in self.settings["stages"]
        )

    @property
    def layers(self) -> Any:
        """Those that attend to later tokens where the mask is not causal."""
        layers = self.settings.get("layers", "all")
        return "all" if layers == "none" else layers

    @property
    def has_collapsed(self) -> bool:
        """An encoder for which all texts are alike: a row apart, held against the base alone."""
        made = self.made[0] if self.made else self.record
        return has_collapsed(made.section.get("stages", []))

    @property
    def has_learnt(self) -> bool:
        """Whether it was tuned, and into an encoder."""
        return self.role == "encoder" and not self.has_collapsed

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
        return frozenset(self.scores)

    def mean(self, tasks: Sequence[str]) -> float:
        """Of the scores of these tasks, which it has."""
        scores: list[Any] = [self.scores[task] for task in tasks]
        return sum(scores) / len(scores)


def reads_causally(settings: dict[str, Any]) -> bool:
    """Whether an encoder of this section `bi` reads under the causal mask."""
    return settings.get(MASK) == "causal" or settings.get("layers") == "none"


def lost(points: Sequence[dict[str, Any]], place: int, text: str) -> float:
    """That of a point of a trajectory over the first one's, of one text."""
    values = [points[each]["perplexity"][text]["perplexity"] for each in (place, 0)]
    return values[0] / values[1]


def but(settings: dict[str, Any], *left_out: str, of_stages: Collection[str] = ()) -> str:
    """How a run was tuned, by its section `bi`, some of its keys and of its stages' left out."""
    kept = _without(settings, left_out)
    if MASK in left_out:  # two more keys say the mask
        kept.pop("keep_sink", None)
        if kept.get("layers") == "none":
            kept["layers"] = "all"
    stages = [_without(stage, of_stages) for stage in settings.get("stages", [])]
    return json.dumps(kept | {"stages": stages}, sort_keys=True)


def _without(settings: dict[str, Any], left_out: Collection[str]) -> dict[str, Any]:
    """Without some keys, and without those that older records lack where these say nothing."""
    return {
        name: value
        for name, value in settings.items()
        if name not in left_out and not (name in LATER and value in (None, False))
    }


def causal_controls(every: Sequence[Entry]) -> list[tuple[Entry, Entry]]:
    """(run, its causal control): of one seed, their settings equal but for the mask.

    Of runs that have learnt: where one of two has collapsed, there is no control.
    """
    learnt = [each for each in every if each.has_learnt]
    causal = {(but(each.settings, MASK), each.seed): each for each in learnt if each.is_control}
    return [
        (each, control)
        for each in learnt
        if not each.is_control and (control := causal.get((but(each.settings, MASK), each.seed)))
    ]


def controls_of(rows: Iterable[Sequence[Entry]]) -> dict[str, str]:
    """{a row of causal controls: the row that they are of}."""
    every = [each for own in rows for each in own]
    return {control.row: each.row for each, control in causal_controls(every)}


def reference(every: Sequence[Entry]) -> Entry | None:
    """The untrained base that others are held against: of several, the one with the whole mask."""
    bases = [each for each in every if each.is_base]
    return min(bases, key=lambda each: (each.is_control, each.layers != "all"), default=None)


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
        row, section = _called(record), record.section
        role: Role = "encoder" if is_tuned(record) else "base"
        measures: Cells = {"average": section["average"]}
        own = {
            kind: one
            for kind in CAUSALLY
            if (one := measured_of(record, kind, records)) is not None and _tells(one)
        }
        beside = (_of_base(record, records) if role == "base" else {}) | own
        if measured := beside.get("dependence"):
            measures |= {"DP-after": measured.section["overall"]["after"]} | _sink(measured)
        if evaluated := beside.get("evaluation"):
            again = evaluated.data["generation"]
            measures |= {"perplexity": again["perplexity"], "generation": again["average"]}
        further = tuple(beside.values())
        entry = Entry(row, role, record, dict(section["tasks"]), measures, (record,), further)
        found.append((len(own), entry))
    yield from (entry for _, entry in sorted(found, key=lambda each: -each[0]))


def _called(made: Record) -> str:
    """The row of what train_bi.py left; a tuned one that a study calls as the base stands apart."""
    row = trained(made.data)
    return f"{row}, tuned" if row == BASE and is_tuned(made) else row


def is_tuned(made: Record) -> bool:
    """Whether a run of train_bi.py tuned anything; else it scored the base as it is."""
    return bool(made.config["bi"]["stages"])


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
        average = {"average": each.measures["average"]}
        yield replace(each, measures=average, beside=())


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
    if made.kind == "sts" and not is_tuned(made):
        left = made.model
    if measured is None or measured.model != left:
        return None
    return None if _unlike(made, measured) else measured


def base_first(own: Sequence[Entry]) -> tuple[bool, int, str]:
    """To sort rows by: untrained ones, then by the number of words, a control with its run."""
    first = own[0]
    return not first.is_base, first.row.count(" ") - first.is_control, first.row


def first_measured(own: Sequence[Entry], kind: str, records: Records) -> Record | None:
    """What another program recorded of the first of these runs of which it did."""
    every = (measured_of(each.record, kind, records) for each in own)
    return next((each for each in every if each is not None), None)


Measured = tuple[str, Role, Record | None, Record]


def _measured(model: str, records: Records) -> Iterator[Measured]:
    """(row, role, dependence record, how its model was made): base, encoders, mixtures' routers."""
    for record in records.of("dependence", model):
        yield BASE, "base", record, record
    for made in sorted(
        (*records.of("sts", model), *records.of("generation", model)), key=lambda each: each.name
    ):
        if made.kind == "generation":
            row = mixed(made.data, "learned")
            yield row, "mixture", measured_of(made, "dependence", records), made
        elif is_tuned(made):
            yield _called(made), "encoder", measured_of(made, "dependence", records), made


def dependences(model: str, records: Records) -> Iterator[Entry]:
    """Of which it was measured; under another flow than the paper's they are other rows."""
    for row, role, record, made in _measured(model, records):
        if record is not None:
            flow = _flow(record)
            row += f", {flow} flow" if flow != "causal" else ""
            yield Entry(row, role, record, {}, {}, (made,))


def _flow(record: Record) -> str:
    return record.config.get("dependence", {}).get("flow", "causal")


def _dependence(model: str, records: Records) -> Iterator[Entry]:
    """Three rows for each model: a share in every bucket."""
    for each in dependences(model, records):
        for share in SHARES:
            buckets = each.record.section["buckets"]
            cells = {"-".join(map(str, bucket["range"])): bucket[share] for bucket in buckets}
            yield replace(each, row=f"{each.row}, {share}", measures=cells)


def _again(model: str, records: Records) -> Iterator[Entry]:
    """Generation of the base, and of every encoder as a language model again; STS as it is."""
    for made in records.of("sts", model):
        record = measured_of(made, "evaluation", records)
        if record is not None and (section := record.data.get("generation")):
            sts = {f"STS {each['attention']}": each["average"] for each in sections(made.data)}
            role: Role = "encoder" if is_tuned(made) else "base"
            scores, measures = scored(section, section["metrics"])
            yield Entry(_called(made), role, record, scores, measures | sts, (made,))


def _routes(model: str, records: Records) -> Iterator[Entry]:
    """The mixtures by route: generation, read causally, and STS under both masks."""
    for record in records.of("generation", model):
        section = record.section
        made = (record, *_encoder_of(record, records))
        for route, found in section["routes"].items():
            sts = {
                f"STS {row['attention']}": row["average"]
                for row in sections(record.data)
                if row["route"] == route
            }
            role: Role = "base" if route == "uni" else "mixture"
            scores, measures = scored(found, section["metrics"])
            row = mixed(record.data, route)
            yield Entry(row, role, record, scores, measures | sts, made, route=route)


def _encoder_of(mixture: Record, records: Records) -> list[Record]:
    """How its bi expert was tuned, if that run is among the records: its weights tell."""
    weights = mixture.section.get("bi_weights")
    return [each for each in records.of("sts") if weights and each.weights == weights][:1]


def _bitune(model: str, records: Records) -> Iterator[Entry]:
    """Bitune's variants: generation; its perplexity is of other chats than the mixtures'."""
    for record in records.of("bitune", model):
        section = record.section
        scores = main_metrics(section, section["metrics"])
        average = {"average": section.get("average")}
        yield Entry(f"bitune, {variant(record.data)}", "bitune", record, scores, average)


def _generation(model: str, records: Records) -> Iterator[Entry]:
    """All of these; of the base's, first the one that has STS under both masks."""
    routes = list(_routes(model, records))
    for each in routes:
        if each.is_base:
            yield replace(each, row=BASE)
    for each in _again(model, records):
        yield each if each.is_base else replace(each, row=each.row + ENCODER)
    yield from (each for each in routes if not each.is_base)
    yield from _bitune(model, records)


def main_metrics(scores: dict[str, Any], metrics: dict[str, str]) -> Cells:
    return {task: scores["tasks"].get(task, {}).get(metric) for task, metric in metrics.items()}


def scored(scores: dict[str, Any], metrics: dict[str, str]) -> tuple[Cells, Cells]:
    """The main metric of each task; their average, and the perplexity."""
    return main_metrics(scores, metrics), {name: scores[name] for name in ("average", "perplexity")}


KINDS: dict[str, Callable[[str, Records], Iterator[Entry]]] = {
    "encoders": _encoders,
    "sts": _sts,
    "dependence": _dependence,
    "again": _again,
    "routes": _routes,
    "bitune": _bitune,
    "generation": _generation,
}
