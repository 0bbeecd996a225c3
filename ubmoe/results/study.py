"""The paper's tables, and studies of one's own, as runs: which programs, with which keys.

Every run is a command line of a program, so a cluster's array job can take the printed lines
instead. Nothing here imports torch.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import yaml

from ubmoe.config import (
    MADE,
    SCORED,
    Config,
    ResultsSection,
    RowSection,
    UserError,
    default,
    dump_config,
    leaves,
    numbered,
    with_keys,
)
from ubmoe.data.inputs import MODEL, READ, inputs
from ubmoe.files import replace, write_text
from ubmoe.owned import check_within, refused
from ubmoe.report.tables import CAUSAL
from ubmoe.results.records import EXCHANGES, Record, as_it_ran, label, read_result, stored
from ubmoe.staging import complete_moves

# The mixtures of Table 4 and the controls that it lacks: their encoder's row, and their own keys.
MIXTURES = {
    "ubmoe": (
        "ffn",
        [
            "ubmoe.routes=[learned, half, average, uni, bi, mode]",
            "ubmoe.export=[mixture, modes]",
        ],
    ),
    "ubmoe-top-1": ("ffn", ["ubmoe.top_k=1", "ubmoe.router_init=uni", "ubmoe.routes=[learned]"]),
    "ubmoe-causal": ("ffn causal", ["ubmoe.routes=[learned, bi]"]),
}
BITUNE = ("lora", "full")
# Programs, and their keys, that measure the models of train_bi.py.
MEASURED = {
    "dependence": ("calculate_dp.py",),
    "evaluation": ("-m ubmoe.evaluate", "evaluation.language_model=true"),
    "scan": ("-m ubmoe.scan",),
    "swap": ("-m ubmoe.swap",),
    "shift": ("-m ubmoe.shift",),
    "probing": ("-m ubmoe.probing",),
}
# Programs of rows beside train_bi.py, and their results.
PROGRAMS = {
    "train_ubmoe": ("train_ubmoe.py", "generation"),
    "bitune": ("-m ubmoe.bitune", "bitune"),
}
# Results that are of another model than the one that their step is after.
BESIDE = ("generation", *EXCHANGES)
# Keys that locate an encoder or data, whose digests are compared instead.
LOCATIONS = ("ubmoe.bi", "evaluation.data")
LEFT_NAMES = ("probing.models.N.name",)  # of the model that the step before has made
# The folder of an earlier step's model that a later one reads.
LEFT = {"sts": "bi", "generation": "ubmoe"}
MAKES = ("sts", "generation", "bitune")  # results of what makes a row, and not of its measures
LONGEST = 150  # characters of a row's name


@dataclass(frozen=True)
class Step:
    """One run of one program; `row` names its line in the tables, over the seeds.

    settings: what config_file holds. folder: its output_dir. after: the step whose model this one
    reads; None: it reads the base alone. records: the folder in which its record may be, where its
    output_dir is gone.
    """

    program: tuple[str, ...]
    row: str
    result: str
    settings: Config = field(compare=False, repr=False)
    config_file: str
    folder: str
    keys: tuple[str, ...]
    after: "Step | None" = None
    records: str | None = None

    @cached_property
    def config(self) -> Config:
        return with_keys(self.settings, list(self.keys))

    @property
    def path(self) -> Path:
        return Path(self.config.output_dir) / f"{self.result}.json"

    @property
    def left(self) -> Path:
        """The model that later steps read."""
        return Path(self.config.output_dir) / LEFT[self.result]

    @property
    def command(self) -> str:
        """The command line: of a script by its file where that is, else as a wheel's module."""
        script = Path(self.program[0])
        program = self.program
        if script.suffix == ".py" and not script.is_file():
            program = ("-m", script.stem)
        return shlex.join(["python", *program, self.config_file, *self.keys])

    def state(self) -> str:
        """`there`, with these very settings and of this very model; `other`; or `missing`."""
        kept = self.kept()
        if kept is None:
            return "missing"
        same = self._has_the_same_settings(kept) and self._has_read_the_same(kept)
        known = "weights" in kept.get("environment", {})  # an older version did not say them
        return "there" if same and known and self._is_of_what_it_reads(kept) else "other"

    def kept(self) -> dict[str, Any] | None:
        """Its result; its record, where the result is gone; or None."""
        folder, path = self.path.parent, self.path
        complete_moves(folder)
        if path.exists():
            return as_it_ran(read_result(path))
        name = Record(folder.name, self.result, self.config.seed, {}).name
        kept = None if self.records is None else stored(self.records, name)
        return None if kept is None else as_it_ran(kept)

    def _keys(self, config: dict[str, Any]) -> dict[str, str]:
        """The settings that decide its numbers, except those that only locate a file."""
        read = ("seed", *SCORED[self.result], *MADE.get(self.result, ()))
        places = {*READ[self.result], *MODEL, *LOCATIONS, *(LEFT_NAMES if self.after else ())}
        settings = leaves(config, read)
        return {name: value for name, value in settings.items() if numbered(name) not in places}

    def _has_the_same_settings(self, kept: dict[str, Any]) -> bool:
        """Keys that an older version did not have count as their defaults.

        Where bf16 is auto now, either will do: what it was stands in the result.
        """
        before, now = (self._keys(config) for config in (kept["config"], self.config.model_dump()))
        had: dict[str, str | None] = {**{name: default(name) for name in now}, **before}
        either = [name for name in now if name.endswith(".bf16") and now[name] == '"auto"']
        return had | {name: now[name] for name in either} == now

    def _has_read_the_same(self, kept: dict[str, Any]) -> bool:
        """Whether the digests of data and model are those of what the keys name now."""
        now, before = inputs(self.config, self.result), dict(kept.get("inputs", {}))
        if self.after is not None and self.config.model.name == str(self.after.left):
            for digests in (now, before):  # its weights are compared, and the model may be gone
                digests.pop("model.name", None)
        return now == before and None not in now.values()

    def _is_of_what_it_reads(self, kept: dict[str, Any]) -> bool:
        if self.after is None:
            return True
        upstream = self.after.kept()
        if upstream is None or self.after.state() != "there":
            return False
        if self.result in BESIDE:
            weights = kept[self.result].get("bi_weights")
        else:
            weights = kept["environment"]["weights"]
        return weights == upstream["environment"]["weights"]


def steps(config: Config) -> list[Step]:
    """The runs of `results.table`, in an order in which each finds what it needs.

    They read a file of the study's own, what this program was given; its name holds a digest, so
    that another plan does not change what waiting runs will read.
    """
    settings = config.model_copy(update={"results": ResultsSection()})
    text = dump_config(settings)
    name = f"study-{hashlib.sha256(text.encode()).hexdigest()[:8]}.yaml"
    file = Path(config.output_dir) / "study" / name
    check_within(file.parent)  # no link
    rows = [_row(config, given) for given in config.results.rows]
    seeds = dict.fromkeys(seed for row in rows for seed in row.seeds)
    planned = [
        step
        for seed in seeds
        for step in _steps_of_seed(
            config, settings, str(file), seed, [row for row in rows if seed in row.seeds]
        )
    ]
    _check_apart(planned)
    for step in planned:
        _check_place(config, step)  # and all of its keys, before anything is written
    file.parent.mkdir(parents=True, exist_ok=True)
    replace(file, partial(write_text, text=text))
    return planned


def slug(row: str) -> str:
    """A row's name as part of a folder's. Raises UserError for a name that has none."""
    name = re.sub("[^a-z0-9.]+", "-", row.lower()).strip("-")
    if not name.strip(".") or len(name) > LONGEST or not row.isprintable():
        raise UserError(
            f"results.rows: {row!r} cannot be a row's name; expected a line of at most {LONGEST} "
            "characters, with one at least of a-z and 0-9, by which its folder is called"
        )
    return name


def _check_apart(planned: Sequence[Step]) -> None:
    """Raises UserError for two rows that would be made in one folder."""
    rows: dict[str, str] = {}
    for step in planned:
        folder = step.folder
        if step.result in MAKES and folder in rows:
            raise UserError(
                f"results.rows: {rows[folder]!r} and {step.row!r} would both be made in {folder}; "
                "expected names that differ in their letters a-z and digits"
            )
        if step.result in MAKES:
            rows[folder] = step.row


def _check_place(config: Config, step: Step) -> None:
    """Raises UserError for a row whose keys say where it is made, and for a link on the way."""
    given, plain = step.config, ResultsSection(row=step.config.results.row)
    moved = {
        "output_dir": given.output_dir != step.folder,
        "seed": f"seed={given.seed}" != step.keys[0],
        "results": given.results != plain
        or sum(key.startswith("results") for key in step.keys) > 1,
        "resume": given.resume != config.resume,
        "dry_run": given.dry_run != config.dry_run,
        "model.cache": given.model.cache != config.model.cache,
    }
    if names := [name for name, is_moved in moved.items() if is_moved]:
        raise UserError(
            f"results.rows: {step.row}: its keys set {' and '.join(names)}, which the study sets; "
            "expected keys of what is run"
        )
    if len(step.command.splitlines()) > 1:
        raise UserError(
            f"results.rows: {step.row}: a line feed in its keys or in output_dir; expected one "
            'line, as key="a\\nb"'
        )
    place = Path(config.output_dir)
    for part in Path(step.folder).relative_to(place).parts:
        place /= part
        if place.is_symlink():
            raise refused(place)


@dataclass(frozen=True)
class Row:
    """A row of a study: the program that makes it, and its further measurements.

    further: keys of these measurements. of: the row whose encoder it reads.
    """

    name: str
    keys: tuple[str, ...]
    seeds: tuple[int, ...]
    measured: tuple[str, ...]
    further: tuple[str, ...] = ()
    program: str = "train_bi"
    of: str | None = None


def _row(config: Config, given: str | RowSection) -> Row:
    """A row in the words of Table 2, or one with keys of its own."""
    every = {2: (), 3: ("dependence",), 4: (), "all": ("dependence", "evaluation"), None: ()}
    measured, seeds = every[config.results.table], tuple(config.results.seeds)
    if isinstance(given, str):  # the base has no seeds
        return Row(
            given, _train_keys(config, given), seeds[:1] if given == "base" else seeds, measured
        )
    if given.measured and given.program != "train_bi":
        raise UserError(
            f"results.rows: {given.name}: measured is of what train_bi leaves, and its program is "
            f"{given.program}; expected no measured"
        )
    if given.of is not None and given.program != "train_ubmoe":
        raise UserError(
            f"results.rows: {given.name}: of is what train_ubmoe joins, and its program is "
            f"{given.program}; expected no of"
        )
    measurements = measured if given.measured is None else tuple(given.measured)
    keys = (*given.keys, f"results.row={as_value(given.name)}")
    program = (given.program, given.of)
    return Row(given.name, keys, tuple(given.seeds or seeds), measurements, keys, *program)


def as_value(name: str) -> str:
    """A text as the value of a key, which is YAML: as it is, or in quotes where it has to be."""
    try:
        return name if yaml.safe_load(name) == name else json.dumps(name)
    except yaml.YAMLError:
        return json.dumps(name)


def _steps_of_seed(
    config: Config, settings: Config, file: str, seed: int, rows: Sequence[Row]
) -> Iterator[Step]:
    table = config.results.table

    def step(program: str, name: str, result: str, *keys: str, after: Step | None = None) -> Step:
        place = Path(config.output_dir) / "study" / f"seed{seed}"
        folder = str(place / f"{label(config)}-{slug(name)}")
        given = (f"seed={seed}", f"output_dir={as_value(folder)}", *keys)
        records = config.results.directory
        command = tuple(program.split())
        return Step(command, name, result, settings, file, folder, given, after, records)

    encoders: dict[str, Step] = {}
    mixed = {encoder for encoder, _ in MIXTURES.values()}
    for row in [row for row in rows if table != 4 or row.name in mixed]:
        if row.program != "train_bi":
            program, result = PROGRAMS[row.program]
            after = _joined(row, encoders) if row.program == "train_ubmoe" else None
            read = [] if after is None else [f"ubmoe.bi={as_value(str(after.left))}"]
            yield step(program, row.name, result, *read, *row.keys, after=after)
            continue
        encoders[row.name] = made = step("train_bi.py", row.name, "sts", *row.keys)
        yield made
        after = made if made.config.bi.stages else None  # else it is the model itself
        for measured in row.measured:
            program, keys = _measuring(row, measured, after)
            yield step(program, row.name, measured, *row.further, *keys, after=after)
    mixtures = {}
    if table in (4, "all") and seed in config.results.seeds:
        for name, (needed, keys) in MIXTURES.items():
            if needed not in encoders:
                raise UserError(f"results.rows: {name} needs {needed!r}; add it")
            after = encoders[needed]
            bi = [f"ubmoe.bi={as_value(str(after.left))}"]
            if not config.ubmoe.mixes:
                bi.append("ubmoe.export=[mixture]")
            mixtures[name] = step("train_ubmoe.py", name, "generation", *bi, *keys, after=after)
            yield mixtures[name]
    if mixtures and table == "all":
        after = mixtures["ubmoe"]
        yield step(
            "calculate_dp.py",
            "ubmoe",
            "dependence",
            f"model.name={as_value(str(after.left))}",
            after=after,
        )
        for variant in BITUNE:
            key = f"bitune.variant={variant}"
            yield step("-m ubmoe.bitune", f"bitune {variant}", "bitune", key)


def _measuring(row: Row, measured: str, after: Step | None) -> tuple[str, list[str]]:
    """The program that measures what a row has made, and its keys. Raises UserError."""
    program, *keys = MEASURED[measured]
    if after is not None:
        read = "ubmoe.bi" if measured in EXCHANGES else "model.name"
        keys.append(f"{read}={as_value(str(after.left))}")
    elif measured in EXCHANGES:
        raise UserError(f"results.rows: {row.name} tunes nothing that {measured} could exchange")
    if measured == "probing" and after is not None:
        probed = {"label": row.name, "name": str(after.left)}
        keys.append(f"probing.models={json.dumps([probed])}")
    if measured == "evaluation" and row.further:
        keys.append("evaluation.sts=[]")  # train_bi.py has scored it
    return program, keys


def _joined(row: Row, encoders: dict[str, Step]) -> Step:
    """The step whose encoder a row joins to the model. Raises UserError."""
    encoder = encoders.get(row.of or "")
    if encoder is None or not encoder.config.bi.stages:
        raise UserError(
            f"results.rows: {row.name}: of is {row.of!r}; expected a row before it that tunes an "
            "encoder with the same seed"
        )
    return encoder


def _train_keys(config: Config, row: str) -> tuple[str, ...]:
    """The keys by which train_bi.py makes a row of Table 2."""
    if row == "base":
        return ("bi.stages=[]",)
    modules = row.removesuffix(CAUSAL).replace("+", ", ")
    keys = [f"bi.stages.{number}.train=[{modules}]" for number in range(len(config.bi.stages))]
    return (*keys, *(["bi.attention=causal"] if row.endswith(CAUSAL) else []))
