"""The paper's tables as runs: which programs with which keys, what is there yet, and what is not.

Every run is a command line of a program, so a cluster's array job can take the printed lines
instead. Nothing here imports torch.
"""

import dataclasses
import hashlib
import logging
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ubmoe.config import (
    MADE,
    SCORED,
    Config,
    ResultsSection,
    RowSection,
    TrainingSection,
    UserError,
    dump_config,
    leaves,
    load_config,
    numbered,
)
from ubmoe.data.bad_rows import dropping
from ubmoe.data.inputs import MODEL, READ, inputs
from ubmoe.data.rows import read_texts
from ubmoe.files import replace, write_text
from ubmoe.report.tables import CAUSAL
from ubmoe.results.records import Record, read_result, record
from ubmoe.staging import complete_moves, locked

log = logging.getLogger(__name__)
ROOT = Path(__file__).parent.parent.parent  # where the three scripts are
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
# Programs, and their keys, that measure what train_bi.py left.
MEASURED = {
    "dependence": ("calculate_dp.py",),
    "evaluation": ("-m ubmoe.evaluate", "evaluation.language_model=true"),
    "scan": ("-m ubmoe.scan",),
    "swap": ("-m ubmoe.swap",),
}


# Programs of rows beside train_bi.py, and their results.
FURTHER = {"train_ubmoe": ("train_ubmoe.py", "generation"), "bitune": ("-m ubmoe.bitune", "bitune")}
# Results that are of another model than the one that their step is after.
BESIDE = ("generation", "swap")
# What a later step reads of an earlier one.
LEFT = {"sts": "bi", "generation": "ubmoe"}


@dataclass(frozen=True)
class Step:
    """One run of one program; `row` names its line in the tables, over the seeds.

    after: the step whose model this one reads; None: it reads the base alone. records: the folder
    in which its record may be, where its output_dir is gone.
    """

    program: tuple[str, ...]
    row: str
    result: str
    config_file: str
    keys: tuple[str, ...]
    after: "Step | None" = None
    records: str | None = None

    @cached_property
    def config(self) -> Config:
        return load_config(self.config_file, list(self.keys))

    @property
    def path(self) -> Path:
        return Path(self.config.output_dir) / f"{self.result}.json"

    @property
    def left(self) -> Path:
        """The model that later steps read."""
        return Path(self.config.output_dir) / LEFT[self.result]

    @property
    def command(self) -> str:
        return shlex.join(["python", *self.program, self.config_file, *self.keys])

    def state(self) -> str:
        """`there`, with these very settings and of this very model; `other`; or `missing`."""
        kept = self.kept()
        if kept is None:
            return "missing"
        same = self._keys(kept["config"]) == self._keys(self.config.model_dump())
        same = same and self._has_read_the_same(kept)
        known = "weights" in kept.get("environment", {})  # an older version did not say them
        return "there" if same and known and self._is_of_what_it_reads(kept) else "other"

    def kept(self) -> dict[str, Any] | None:
        """Its result; its record, where the result is gone; or None."""
        folder = self.path.parent
        complete_moves(folder)
        if self.path.exists():
            return read_result(self.path)
        if self.records is None:
            return None
        name = Record(folder.name, self.result, self.config.seed, {}).name
        path = Path(self.records) / f"{name}.json"
        return read_result(path) if path.exists() else None

    def _keys(self, config: dict[str, Any]) -> dict[str, str]:
        """The settings that decide its numbers, but for those that say where something lies."""
        read = ("seed", *SCORED[self.result], *MADE.get(self.result, ()))
        places = (*READ[self.result], *MODEL, "ubmoe.bi", "evaluation.data")
        found = leaves(config, read)
        return {name: value for name, value in found.items() if numbered(name) not in places}

    def _has_read_the_same(self, kept: dict[str, Any]) -> bool:
        """Whether the digests of data and model are those of what the keys name now."""
        now, before = inputs(self.config, self.result), dict(kept.get("inputs", {}))
        if self.after is not None and self.config.model.name == str(self.after.left):
            for each in (now, before):  # the weights tell, and the model may be gone
                each.pop("model.name", None)
        return now == before and None not in now.values()

    def _is_of_what_it_reads(self, kept: dict[str, Any]) -> bool:
        if self.after is None:
            return True
        upstream = self.after.kept()
        if upstream is None or self.after.state() != "there":
            return False
        if self.result in BESIDE:
            own = kept[self.result].get("bi_weights")
        else:
            own = kept["environment"]["weights"]
        return own == upstream["environment"]["weights"]


def steps(config: Config) -> list[Step]:
    """The runs of `results.table`, in an order in which each finds what it needs.

    They read a file of the study's own, what this program was given; its name holds a digest, so
    that another plan does not change what waiting runs will read.
    """
    text = dump_config(config.model_copy(update={"results": ResultsSection()}))
    name = f"study-{hashlib.sha256(text.encode()).hexdigest()[:8]}.yaml"
    file = Path(config.output_dir) / "study" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    replace(file, partial(write_text, text=text))
    rows = [_row(config, given) for given in config.results.rows]
    seeds = dict.fromkeys(seed for row in rows for seed in row.seeds)
    return [
        each
        for seed in seeds
        for each in _of_seed(config, str(file), seed, [row for row in rows if seed in row.seeds])
    ]


@dataclass(frozen=True)
class Row:
    """A row of a study: how a program makes it, and what else is measured of it.

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
    """A row in the words of Table 2, or of one's own."""
    every = {2: (), 3: ("dependence",), 4: (), "all": ("dependence", "evaluation"), None: ()}
    measured, seeds = every[config.results.table], tuple(config.results.seeds)
    if isinstance(given, str):  # the base has no seeds
        return Row(given, _trains(config, given), seeds[:1] if given == "base" else seeds, measured)
    own = measured if given.measured is None else tuple(given.measured)
    keys = (*given.keys, f"results.row={given.name}")
    program = (given.program, given.of)
    return Row(given.name, keys, tuple(given.seeds or seeds), own, keys, *program)


def _of_seed(config: Config, config_file: str, seed: int, rows: Sequence[Row]) -> Iterator[Step]:
    table = config.results.table

    def step(program: str, name: str, result: str, *keys: str, after: Step | None = None) -> Step:
        slug = re.sub("[^a-z0-9.]+", "-", name.lower()).strip("-")
        folder = Path(config.output_dir) / "study" / f"seed{seed}" / f"{label(config)}-{slug}"
        given = (f"seed={seed}", f"output_dir={folder}", *keys)
        records = config.results.directory
        return Step(tuple(program.split()), name, result, config_file, given, after, records)

    encoders: dict[str, Step] = {}
    mixed = {encoder for encoder, _ in MIXTURES.values()}
    for row in [row for row in rows if table != 4 or row.name in mixed]:
        if row.program != "train_bi":
            program, result = FURTHER[row.program]
            after = _joined(row, encoders) if row.program == "train_ubmoe" else None
            read = [] if after is None else [f"ubmoe.bi={after.left}"]
            yield step(program, row.name, result, *read, *row.keys, after=after)
            continue
        encoders[row.name] = made = step("train_bi.py", row.name, "sts", *row.keys)
        yield made
        after = made if made.config.bi.stages else None  # else it is the model itself
        for measured in row.measured:
            program, *keys = MEASURED[measured]
            if after is not None:
                keys.append(f"{'ubmoe.bi' if measured == 'swap' else 'model.name'}={after.left}")
            elif measured == "swap":
                raise UserError(f"results.rows: {row.name} tunes nothing that swap could swap")
            if measured == "evaluation" and row.further:
                keys.append("evaluation.sts=[]")  # train_bi.py has scored it
            yield step(program, row.name, measured, *row.further, *keys, after=after)
    mixtures = {}
    if table in (4, "all") and seed in config.results.seeds:
        for name, (needed, keys) in MIXTURES.items():
            if needed not in encoders:
                raise UserError(f"results.rows: {name} needs {needed!r}; add it")
            after = encoders[needed]
            bi = f"ubmoe.bi={after.left}"
            mixtures[name] = step("train_ubmoe.py", name, "generation", bi, *keys, after=after)
            yield mixtures[name]
    if mixtures and table == "all":
        after = mixtures["ubmoe"]
        yield step(
            "calculate_dp.py", "ubmoe", "dependence", f"model.name={after.left}", after=after
        )
        for variant in BITUNE:
            key = f"bitune.variant={variant}"
            yield step("-m ubmoe.bitune", f"bitune {variant}", "bitune", key)


def _joined(row: Row, encoders: dict[str, Step]) -> Step:
    """The step whose encoder a row joins to the model. Raises UserError."""
    found = encoders.get(row.of or "")
    if found is None or not found.config.bi.stages:
        raise UserError(
            f"results.rows: {row.name}: of is {row.of!r}; expected a row before it that tunes an "
            "encoder with the same seed"
        )
    return found


def _trains(config: Config, row: str) -> tuple[str, ...]:
    """The keys by which train_bi.py makes a row of Table 2."""
    if row == "base":
        return ("bi.stages=[]",)
    modules = row.removesuffix(CAUSAL).replace("+", ", ")
    keys = [f"bi.stages.{number}.train=[{modules}]" for number in range(len(config.bi.stages))]
    return (*keys, *(["bi.attention=causal"] if row.endswith(CAUSAL) else []))


def label(config: Config) -> str:
    """What a study is called: its output_dir's last part."""
    return Path(config.output_dir).name


def plan(config: Config) -> str:
    """The commands, one a line, with what is there yet as a comment above each."""
    _check_table(config, "plan")
    lines = []
    estimates: dict[tuple[str, str], str] = {}  # a row's seeds take as long as each other
    for step in steps(config):
        known = _known(step)
        if step.state() == "missing" and config.results.timed_steps:
            row = (step.row, step.result)
            if row not in estimates:
                estimates[row] = estimate(step, config.results.timed_steps)
            known += f"; {estimates[row]}"
        after = f", after {step.after.row}" if step.after else ""
        lines += [f"# {step.row}, seed {step.config.seed}{after}: {known}", step.command]
    return "\n".join(lines)


def _check_table(config: Config, verb: str) -> None:
    if config.results.table is None:
        raise UserError(f"results.table: {verb} needs one; expected 2, 3, 4 or all")


def _known(step: Step) -> str:
    """Whether it is there, and what it took."""
    state, result = step.state(), step.kept()
    if result is None:
        return "not run"
    took = f"{result['seconds'] / 3600:.2f} h, {result['peak_memory_bytes'] / 1e9:.1f} GB"
    if state == "there":
        return f"done in {took}"
    return f"run with other keys, data, or of another model ({took}); runs again"


def run(config: Config) -> str:
    """Run what is not there yet, one after another, and record each. Raises UserError.

    A run that stopped half-way goes on from its checkpoint; a failed one ends the study, which goes
    on from there when it is called again.
    """
    _check_table(config, "run")
    planned = steps(config)
    with locked(Path(config.output_dir) / "study", "python -m ubmoe.results run"):
        for _ in range(2):  # a model that was made anew on another machine makes others stale
            _run(config, planned)
    return f"{len(planned)} runs in {Path(config.output_dir) / 'study'}"


def _run(config: Config, planned: list[Step]) -> None:
    missing = [step for step in planned if step.state() != "there"]
    keys: dict[str, Any] = {"desc": "study", "unit": "run", "disable": None if missing else True}
    with tqdm(total=len(missing), **keys) as bar:
        for number, step in enumerate(planned, 1):
            if step.state() != "there":
                say = f"{step.row}, seed {step.config.seed}, {step.result}"
                log.info("[%d/%d] %s", number, len(planned), say)
                _remake(step, config)
                execute(step)
                bar.update()
            _record(step, config)
            if not config.results.keep_models:
                _make_room(step, planned)


def _remake(step: Step, config: Config) -> None:
    """Make again what a step reads, where somebody removed that model to make room, or its run."""
    if step.after is not None and not (step.after.left.exists() and step.after.path.exists()):
        _remake(step.after, config)
        execute(step.after)
        _record(step.after, config)


def _make_room(step: Step, planned: list[Step]) -> None:
    """Remove the models and checkpoints that no run which is missing reads."""
    for made in (step, step.after):
        if made is not None and made.result in LEFT:
            readers = [each for each in planned if each.after == made]
            if all(each.state() == "there" for each in readers):
                _remove_folders(Path(made.config.output_dir))


def _remove_folders(folder: Path) -> None:
    """Models and checkpoints of a run; what it found stays."""
    for each in folder.iterdir() if folder.exists() else ():
        if each.is_dir():
            shutil.rmtree(each)


def _record(step: Step, config: Config) -> None:
    if step.path.exists():  # else its record is what is there
        record(step.config.model_copy(update={"results": config.results}), [step.path])


def execute(step: Step, resume: str = "auto") -> None:
    folder = Path(step.config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    log_file = folder / f"{step.result}.log"
    program = [str(ROOT / each) if each.endswith(".py") else each for each in step.program]
    if program[0] != "-m" and not Path(program[0]).is_file():
        raise UserError(
            f"{step.program[0]} is not beside the package; expected a checkout of the repository, "
            "in which the study runs"
        )
    command = [sys.executable, *program, step.config_file, *step.keys, f"resume={resume}"]
    with log_file.open("a") as file:
        done = subprocess.run(command, stdout=file, stderr=file)
    if done.returncode:
        last: Any = log_file.read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise UserError(f"{step.command} failed ({' '.join(last)}); see {log_file}")


# --- hours and memory, from a few steps -----------------------------------------------------------


def estimate(step: Step, count: int) -> str:
    """Hours and memory of a run, from a few of its steps; scoring and checkpoints not counted."""
    keys = _short(step, count)
    if keys is None:
        return "not timed: it only scores"
    if step.after is not None and not step.after.left.exists():
        return f"not timed: {step.after.left} is not there yet"
    folder = Path(step.config.output_dir).parent.parent / "timed" / step.row
    timed = dataclasses.replace(
        step, keys=(*step.keys, *keys, f"output_dir={folder}"), after=None, records=None
    )
    if timed.state() != "there":
        execute(timed, resume="never")
        _remove_folders(folder)  # as large as the run's
    result = read_result(timed.path)
    seconds = extrapolated(step, result)
    took = f"{seconds / 3600:.1f} h" if seconds > 360 else f"{seconds / 60:.1f} min"
    memory = result["peak_memory_bytes"] / 1e9
    what = "texts" if step.result == "dependence" else "steps"
    return f"about {took} and {memory:.1f} GB, from {count} {what}, without scoring"


def _short(step: Step, count: int) -> list[str] | None:
    """Keys for a few steps of a run, without any scoring; None where scoring is all it does."""
    stages = range(len(step.config.bi.stages))
    scoring = ["evaluation.sts=[]", "evaluation.generation=[]"]
    return {
        "sts": [*(f"bi.stages.{each}.max_steps={count}" for each in stages), *scoring],
        "generation": [f"ubmoe.max_steps={count}", "ubmoe.export=[]", *scoring],
        "bitune": [f"bitune.max_steps={count}", "bitune.generation=[]"],
        "dependence": [f"dependence.max_texts={count}"],
        "evaluation": None,
        "scan": None,
        "swap": None,
    }[step.result]


def extrapolated(step: Step, result: dict[str, Any]) -> float:
    """Seconds: what does not grow with the work, and the work at the pace of its small part."""
    section, config = result[step.result], step.config
    seconds = float(result["seconds"])
    if step.result == "dependence":
        with dropping(config.data.skip_bad_rows):
            texts = len(read_texts(config.dependence.dataset, config.dependence.max_texts))
        return seconds + section["seconds"] * (texts / section["texts"] - 1)
    for settings, log_rows, rows in _trained(config, section):
        if log_rows:  # none where nothing trains
            done = log_rows[-1]
            seconds += done["seconds_per_step"] * (settings.steps(rows) - done["step"])
    return seconds


def _trained(
    config: Config, section: dict[str, Any]
) -> list[tuple[TrainingSection, list[dict[str, Any]], int]]:
    """(settings, log, rows) of whatever a result says that it trained."""
    if "stages" in section:
        reports = zip(config.bi.stages, section["stages"], strict=True)
        return [(stage, report["log"], report["rows"]) for stage, report in reports]
    if "router" in section:
        router = section["router"]
        return [(config.ubmoe, router["log"], router["counts"]["chats"])]
    return [(config.bitune, section["log"], section["counts"]["examples"])]
