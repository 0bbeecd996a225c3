"""Records as rows of tables: encoders, mixtures, dependence, generation, Bitune.

What was measured of one model never stands beside another's: records are paired by the run and by
the digest of the weights.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from studies.compare.labels import mixed, variant
from studies.compare.records import Records
from ubmoe.dependence import SHARES
from ubmoe.report.tables import has_collapsed, trained
from ubmoe.results.records import EXCHANGES, Record
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
class RunRow:
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
        """The modules and the objective of each stage, a tuple a stage."""
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
        return next((record for record in self.beside if record.kind == kind), None)

    @property
    def tasks(self) -> frozenset[str]:
        return frozenset(self.scores)

    def mean(self, tasks: Sequence[str]) -> float:
        """The mean score of these tasks, all of which it has."""
        scores: list[Any] = [self.scores[task] for task in tasks]
        return sum(scores) / len(scores)


def reads_causally(settings: dict[str, Any]) -> bool:
    """Whether an encoder of this section `bi` reads under the causal mask."""
    return settings.get(MASK) == "causal" or settings.get("layers") == "none"


def perplexity_ratio(points: Sequence[dict[str, Any]], place: int, text: str) -> float:
    """That of a point of a trajectory over the first one's, of one text."""
    values = [points[point]["perplexity"][text]["perplexity"] for point in (place, 0)]
    return values[0] / values[1]


def settings_key(settings: dict[str, Any], *left_out: str, of_stages: Collection[str] = ()) -> str:
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


def causal_controls(every: Sequence[RunRow]) -> list[tuple[RunRow, RunRow]]:
    """(run, its causal control): of one seed, their settings equal but for the mask.

    Of runs that have learnt: where one of two has collapsed, there is no control.
    """
    learnt = [run for run in every if run.has_learnt]
    causal = {(settings_key(run.settings, MASK), run.seed): run for run in learnt if run.is_control}
    return [
        (run, control)
        for run in learnt
        if not run.is_control
        and (control := causal.get((settings_key(run.settings, MASK), run.seed)))
    ]


def controls_of(rows: Iterable[Sequence[RunRow]]) -> dict[str, str]:
    """{a row of causal controls: the row that they are of}."""
    every = [run for runs in rows for run in runs]
    return {control.row: run.row for run, control in causal_controls(every)}


def reference(every: Sequence[RunRow]) -> RunRow | None:
    """The untrained base that others are held against: of several, the one with the whole mask."""
    bases = [run for run in every if run.is_base]
    return min(bases, key=lambda run: (run.is_control, run.layers != "all"), default=None)


def run_rows(kind: str, model: str, records: Records, seeds: Sequence[int]) -> list[RunRow]:
    """The first record of each row and seed, of these seeds and of the base."""
    first: dict[tuple[str, int | None], RunRow] = {}
    for run in all_run_rows(kind, model, records, seeds):
        first.setdefault((run.row, run.seed), run)
    return list(first.values())


def all_run_rows(kind: str, model: str, records: Records, seeds: Sequence[int]) -> list[RunRow]:
    return [run for run in KINDS[kind](model, records) if run.seed is None or run.seed in seeds]


def common_tasks(every: Sequence[RunRow]) -> list[str]:
    """Those that all have: averages of unlike tasks are not compared."""
    shared = frozenset.intersection(*(run.tasks for run in every)) if every else frozenset()
    return sorted(shared)


def by_row(
    kind: str, model: str, records: Records, seeds: Sequence[int]
) -> dict[str, list[RunRow]]:
    """The entries of a kind, a list for each row, in the order of their seeds."""
    return grouped(run_rows(kind, model, records, seeds))


def grouped(every: Sequence[RunRow]) -> dict[str, list[RunRow]]:
    """A list for each row, in the order of their seeds."""
    rows: dict[str, list[RunRow]] = {}
    for run in every:
        rows.setdefault(run.row, []).append(run)
    return {row: sorted(runs, key=lambda run: run.seed or 0) for row, runs in rows.items()}


def _encoders(model: str, records: Records) -> Iterator[RunRow]:
    """The runs of train_bi.py with their measurements; those with the most of them first.

    STS by task and its average, DP-after with the sink; read causally again, perplexity and tasks.
    """
    encoders = []
    for record in records.of("sts", model):
        row, section = _row_name(record), record.section
        role: Role = "encoder" if is_tuned(record) else "base"
        measures: Cells = {"average": section["average"]}
        own_measurements = {
            kind: one
            for kind in READ_CAUSALLY
            if (one := measured_of(record, kind, records)) is not None and _has_values(one)
        }
        beside = (_of_base(record, records) if role == "base" else {}) | own_measurements
        if measured := beside.get("dependence"):
            measures |= {"DP-after": measured.section["overall"]["after"]} | _sink(measured)
        if evaluated := beside.get("evaluation"):
            generation = evaluated.data["generation"]
            measures |= {
                "perplexity": generation["perplexity"],
                "generation": generation["average"],
            }
        further = tuple(beside.values())
        run = RunRow(row, role, record, dict(section["tasks"]), measures, (record,), further)
        encoders.append((len(own_measurements), run))
    yield from (run for _, run in sorted(encoders, key=lambda item: -item[0]))


def _row_name(made: Record) -> str:
    """The row of what train_bi.py left; a tuned one that a study calls as the base stands apart."""
    row = trained(made.data)
    return f"{row}, tuned" if row == BASE and is_tuned(made) else row


def is_tuned(made: Record) -> bool:
    """Whether a run of train_bi.py tuned anything; else it scored the base as it is."""
    return any(stage.get("max_steps") != 0 for stage in made.config["bi"]["stages"])


READ_CAUSALLY = ("dependence", "evaluation")  # what is measured of a model read causally


def _has_values(measured: Record) -> bool:
    if measured.kind == "dependence":
        return _flow(measured) == "causal"
    return bool(measured.data.get("generation"))


def _of_base(made: Record, records: Records) -> dict[str, Record]:
    """The base's measurements in other folders: as a language model it always reads causally."""
    every = {kind: records.of(kind, made.model) for kind in READ_CAUSALLY}
    return {
        kind: usable[0]
        for kind, candidates in every.items()
        if (
            usable := [
                record
                for record in candidates
                if _has_values(record) and not _has_other_weights(record, made)
            ]
        )
    }


def _has_other_weights(one: Record, other: Record) -> bool:
    """Whether their weights are others, as far as both say."""
    return None not in (one.weights, other.weights) and one.weights != other.weights


def _sink(measured: Record) -> Cells:
    """The first token's share, and DP-after without it; older records have neither."""
    if "first" not in measured.section:
        return {}
    without = measured.section["without_first"]["after"]
    return {"first": measured.section["first"], "after without first": without}


def _sts(model: str, records: Records) -> Iterator[RunRow]:
    """STS by task, and its average, of every run of train_bi.py."""
    for run in _encoders(model, records):
        average = {"average": run.measures["average"]}
        yield replace(run, measures=average, beside=())


def measured_of(made: Record, kind: str, records: Records) -> Record | None:
    """Another program's record of the model that a run left.

    In the same folder there may be a record of the base, or of an earlier encoder: the measured
    model's name and weights tell them apart. EXCHANGES are of the base, and of the encoder that
    they say.
    """
    measured = records.beside(made, kind)
    if kind in EXCHANGES:
        same = measured is not None and measured.section.get("bi_weights") == made.weights
        return measured if same else None
    left = {"sts": "bi", "generation": "ubmoe"}[made.kind]
    if made.kind == "sts" and not made.config["bi"]["stages"]:
        left = made.model
    if measured is None or measured.model != left:
        return None
    return None if _has_other_weights(made, measured) else measured


def base_first(runs: Sequence[RunRow]) -> tuple[bool, int, str]:
    """To sort rows by: untrained ones, then by the number of words, a control with its run."""
    first = runs[0]
    return not first.is_base, first.row.count(" ") - first.is_control, first.row


def first_measured(runs: Sequence[RunRow], kind: str, records: Records) -> Record | None:
    """Another program's record of the first of these runs that has one."""
    every = (measured_of(run.record, kind, records) for run in runs)
    return next((record for record in every if record is not None), None)


Measured = tuple[str, Role, Record | None, Record]


def _measured(model: str, records: Records) -> Iterator[Measured]:
    """(row, role, dependence record, how its model was made): base, encoders, mixtures' routers."""
    for record in records.of("dependence", model):
        yield BASE, "base", record, record
    for made in sorted(
        (*records.of("sts", model), *records.of("generation", model)),
        key=lambda record: record.name,
    ):
        if made.kind == "generation":
            row = mixed(made.data, "learned")
            yield row, "mixture", measured_of(made, "dependence", records), made
        elif is_tuned(made):
            yield _row_name(made), "encoder", measured_of(made, "dependence", records), made


def dependences(model: str, records: Records) -> Iterator[RunRow]:
    """The runs with a measured dependence; a flow other than the paper's makes other rows."""
    for row, role, record, made in _measured(model, records):
        if record is not None:
            flow = _flow(record)
            row += f", {flow} flow" if flow != "causal" else ""
            yield RunRow(row, role, record, {}, {}, (made,))


def _flow(record: Record) -> str:
    return record.config.get("dependence", {}).get("flow", "causal")


def _dependence(model: str, records: Records) -> Iterator[RunRow]:
    """Three rows for each model: a share in every bucket."""
    for run in dependences(model, records):
        for share in SHARES:
            buckets = run.record.section["buckets"]
            cells = {"-".join(map(str, bucket["range"])): bucket[share] for bucket in buckets}
            yield replace(run, row=f"{run.row}, {share}", measures=cells)


def _causal_lm(model: str, records: Records) -> Iterator[RunRow]:
    """Generation of the base, and of every encoder as a language model again; STS as it is."""
    for made in records.of("sts", model):
        record = measured_of(made, "evaluation", records)
        if record is not None and (section := record.data.get("generation")):
            sts = {f"STS {entry['attention']}": entry["average"] for entry in sections(made.data)}
            role: Role = "encoder" if is_tuned(made) else "base"
            scores, measures = scored(section, section["metrics"])
            yield RunRow(_row_name(made), role, record, scores, measures | sts, (made,))


def _routes(model: str, records: Records) -> Iterator[RunRow]:
    """The mixtures by route: generation, read causally, and STS under both masks."""
    for record in records.of("generation", model):
        section = record.section
        made = (record, *_encoder_of(record, records))
        for route, scores_of_route in section["routes"].items():
            sts = {
                f"STS {row['attention']}": row["average"]
                for row in sections(record.data)
                if row["route"] == route
            }
            role: Role = "base" if route == "uni" else "mixture"
            scores, measures = scored(scores_of_route, section["metrics"])
            row = mixed(record.data, route)
            yield RunRow(row, role, record, scores, measures | sts, made, route=route)


def _encoder_of(mixture: Record, records: Records) -> list[Record]:
    """The run that tuned its bi expert, found by its weights, if it is among the records."""
    weights = mixture.section.get("bi_weights")
    return [record for record in records.of("sts") if weights and record.weights == weights][:1]


def _bitune(model: str, records: Records) -> Iterator[RunRow]:
    """Bitune's variants: generation; its perplexity is of other chats than the mixtures'."""
    for record in records.of("bitune", model):
        section = record.section
        scores = main_metrics(section, section["metrics"])
        average = {"average": section.get("average")}
        yield RunRow(f"bitune, {variant(record.data)}", "bitune", record, scores, average)


def _generation(model: str, records: Records) -> Iterator[RunRow]:
    """All of these; of the base's, first the one that has STS under both masks."""
    routes = list(_routes(model, records))
    for run in routes:
        if run.is_base:
            yield replace(run, row=BASE)
    for run in _causal_lm(model, records):
        yield run if run.is_base else replace(run, row=run.row + ENCODER)
    yield from (run for run in routes if not run.is_base)
    yield from _bitune(model, records)


def main_metrics(scores: dict[str, Any], metrics: dict[str, str]) -> Cells:
    return {task: scores["tasks"].get(task, {}).get(metric) for task, metric in metrics.items()}


def scored(scores: dict[str, Any], metrics: dict[str, str]) -> tuple[Cells, Cells]:
    """The main metric of each task; their average, and the perplexity."""
    return main_metrics(scores, metrics), {name: scores[name] for name in ("average", "perplexity")}


KINDS: dict[str, Callable[[str, Records], Iterator[RunRow]]] = {
    "encoders": _encoders,
    "sts": _sts,
    "dependence": _dependence,
    "causal_lm": _causal_lm,
    "routes": _routes,
    "bitune": _bitune,
    "generation": _generation,
}
